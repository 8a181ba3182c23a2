package server

import (
	"testing"

	"perceptd/agent"
)

func TestQuotaKeys(t *testing.T) {
	t.Parallel()
	in := &agent.Container{ID: "1f"}
	const nobody = agent.NoID
	type who struct {
		caller   agent.Caller
		owner    uint32
		unproved bool
	}
	for _, row := range []struct {
		name string
		a, b who
		same bool // key
		part bool // of the same whole
	}{
		{"one user", who{caller: agent.Caller{UID: 1}, owner: nobody}, who{caller: agent.Caller{UID: 1, GID: 5, PID: 7}, owner: nobody}, true, true},
		{"two users", who{caller: agent.Caller{UID: 1}, owner: nobody}, who{caller: agent.Caller{UID: 2}, owner: nobody}, false, false},
		{"a user's unit", who{caller: agent.Caller{UID: 1, Unit: "a.service"}, owner: nobody}, who{caller: agent.Caller{UID: 1}, owner: nobody}, false, true},
		{"a user's two units", who{caller: agent.Caller{UID: 1, Unit: "a.service"}, owner: nobody}, who{caller: agent.Caller{UID: 1, Unit: "b.service"}, owner: nobody}, false, true},
		{"a user, not proved", who{caller: agent.Caller{UID: 1}, owner: nobody}, who{caller: agent.Caller{UID: 1}, owner: nobody, unproved: true}, false, true},
		{"two users of a unit", who{caller: agent.Caller{UID: 1, Unit: "a.service"}, owner: nobody}, who{caller: agent.Caller{UID: 2, Unit: "a.service"}, owner: nobody}, false, true},
		{"a user's manager", who{caller: agent.Caller{UID: 1}, owner: 1}, who{caller: agent.Caller{UID: 1}, owner: nobody}, true, true},
		{"a user that the owner of a session has become", who{caller: agent.Caller{UID: 100_001}, owner: 1}, who{caller: agent.Caller{UID: 1}, owner: nobody}, true, true},
		{"that, not proved", who{caller: agent.Caller{UID: 100_001}, owner: 1, unproved: true}, who{caller: agent.Caller{UID: 100_002}, owner: 1, unproved: true}, true, true},
		{"root in a user's session", who{caller: agent.Caller{UID: 0}, owner: 1}, who{caller: agent.Caller{UID: 0}, owner: nobody}, true, false},
		{"a user in root's session", who{caller: agent.Caller{UID: 1}, owner: 0}, who{caller: agent.Caller{UID: 1}, owner: nobody}, true, true},
		{"two units of root's", who{caller: agent.Caller{UID: 0, Unit: "a.service"}, owner: nobody}, who{caller: agent.Caller{UID: 0, Unit: "b.service"}, owner: nobody}, false, false},
		{"a unit of root's and root", who{caller: agent.Caller{UID: 0, Unit: "a.service"}, owner: nobody}, who{caller: agent.Caller{UID: 0}, owner: nobody}, false, false},
		{"two users of a container", who{caller: agent.Caller{UID: 1, Container: in}, owner: nobody}, who{caller: agent.Caller{UID: 2, Container: in}, owner: nobody}, true, false},
		{"a user in a container", who{caller: agent.Caller{UID: 1, Container: in}, owner: nobody}, who{caller: agent.Caller{UID: 1}, owner: nobody}, false, false},
		{"on a module's socket", who{caller: agent.Caller{UID: 1, Module: "m"}, owner: nobody}, who{caller: agent.Caller{UID: 2, Module: "m", Container: in}, owner: nobody}, true, true},
		{"there, not proved", who{caller: agent.Caller{UID: 1, Module: "m"}, owner: nobody}, who{caller: agent.Caller{UID: 2, Module: "m"}, owner: nobody, unproved: true}, false, true},
		{"two modules", who{caller: agent.Caller{Module: "m"}, owner: nobody}, who{caller: agent.Caller{Module: "n"}, owner: nobody}, false, false},
		{"users who are not known", who{caller: agent.Caller{UID: nobody}, owner: nobody, unproved: true}, who{caller: agent.Caller{UID: nobody}, owner: nobody, unproved: true}, true, false},
	} {
		a, b := keyOf(&row.a.caller, row.a.owner, row.a.unproved), keyOf(&row.b.caller, row.b.owner, row.b.unproved)
		if (a == b) != row.same {
			t.Errorf("%s: %v and %v", row.name, a, b)
		}
		if shareWhole(a, b) != row.part {
			t.Errorf("%s: %v and %v are of one whole: %v", row.name, a, b, !row.part)
		}
	}
}

func shareWhole(a, b quotaKey) bool {
	of, n := a.wholes()
	others, m := b.wholes()
	for _, x := range of[:n] {
		for _, y := range others[:m] {
			if x == y {
				return true
			}
		}
	}
	return false
}

func TestQuotaKeysAreNamed(t *testing.T) {
	t.Parallel()
	for want, k := range map[string]quotaKey{
		"uid 1000":                        {uid: 1000, whole: true},
		"uid 1000 (not proved)":           {uid: 1000, unproved: true},
		"unit cron.service as uid 1000":   {uid: 1000, unit: "cron.service"},
		"unit cron.service":               {unit: "cron.service"},
		"uid 0 outside of units":          {},
		"uid 0 (not proved)":              {unproved: true},
		"module vision":                   {module: "vision", whole: true},
		"container 0123456789ab":          {container: "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"},
		"callers whose user is not known": {uid: agent.NoID, loopback: true},
		"perceptd itself":                 {own: true},
		"uid 0":                           {loopback: true},
	} {
		if got := k.String(); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
