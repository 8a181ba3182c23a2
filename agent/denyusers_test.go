package agent_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/zap/zaptest/observer"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/grants"
	"perceptd/tokencache/tokencachetest"
)

// TestDenyUsersWhoComeLater shows that a rule by a user's name is about who has the name now: an account that is made,
// is given another uid, or is removed after the rule was set, without a reload. It is looked up once a second at most.
func TestDenyUsersWhoComeLater(t *testing.T) {
	t.Parallel()
	bubble(t, edge(), new(tokencachetest.Source), func(t *testing.T, a *agent.Agent, _ *observer.ObservedLogs) {
		var uid uint32
		var fault error
		version, looked, lookups := int64(1), 0, 0
		a.SetAccounts(
			func(string) (uint32, bool, error) { lookups++; return uid, uid != 0, fault },
			func() int64 { looked++; return version })
		denied := func(want bool, when string) {
			t.Helper()
			if code := askFor(a, user, vault); (code == api.CodeDenied) != want {
				t.Errorf("%s: %q", when, code)
			}
		}
		accounts := func(newUID uint32, err error) {
			uid, fault = newUID, err
			version++
			time.Sleep(time.Second)
		}
		for range 100 {
			denied(false, "no rule")
		}
		if looked != 0 || lookups != 0 {
			t.Errorf("without a rule by name accounts are looked at %d times", looked)
		}
		mustDeny(t, a, api.DenyLocal, api.DenyRequest{DenyTarget: api.DenyTarget{User: "svc"}})
		if idle := a.DenyStatus().Rules[0].Idle; idle == "" {
			t.Error("a rule for an account that is not there is not idle")
		}
		accounts(user.UID, nil)
		denied(true, "the account is made")
		if idle := a.DenyStatus().Rules[0].Idle; idle != "" {
			t.Errorf("then: %s", idle)
		}
		looked, lookups = 0, 0
		for range 1000 {
			denied(true, "it is there")
			time.Sleep(10 * time.Millisecond)
		}
		if looked < 9 || looked > 11 || lookups != 0 {
			t.Errorf("in ten seconds accounts are looked at %d times, and looked up %d times", looked, lookups)
		}
		accounts(user.UID+1, nil)
		denied(false, "it has another uid")
		other := user
		other.UID++
		if code := askFor(a, other, vault); code == "" {
			t.Error("who has the uid now is served")
		}
		accounts(0, errors.New("cannot be read"))
		denied(true, "nobody knows who it is")
		version = 0 // which version it is cannot be told
		uid, fault = user.UID+1, nil
		time.Sleep(time.Second)
		denied(false, "it can be read again")
		uid = user.UID
		time.Sleep(time.Second)
		denied(true, "and is another at once")
		_, changed, err := a.Peek(module, agent.Request{Request: grants.Request{Resource: vault}})
		if err != nil {
			t.Fatal(err)
		}
		uid = user.UID + 1
		time.Sleep(time.Second)
		a.Decide(user, grants.Request{Resource: vault})
		select {
		case <-changed:
		default:
			t.Error("a watcher is not woken when a rule is about others")
		}
	})
}

// The version of a file is another whenever its content may be.
func TestAccountsVersion(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "passwd")
	write := func(path, text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	later := time.Now().Add(time.Hour)
	if agent.VersionOf(path, later) != nil {
		t.Error("there is no file, and it has a version")
	}
	write(path, "a:x:1000:1000::/:/bin/sh\n")
	first := agent.VersionOf(path, later)
	if first == nil || first != agent.VersionOf(path, later) {
		t.Error("the same file has two versions")
	}
	if agent.VersionOf(path, time.Now()) != nil || agent.VersionOf(path, time.Unix(0, 0)) != nil {
		t.Error("a file that changed just now, or after now, has a version")
	}
	write(path+"+", "a:x:1001:1000::/:/bin/sh\n") // as useradd does
	if err := os.Rename(path+"+", path); err != nil {
		t.Fatal(err)
	}
	second := agent.VersionOf(path, later)
	write(path, "a:x:1001:1000::/:/bin/sh\nb:x:1002:1000::/:/bin/sh\n")
	if third := agent.VersionOf(path, later); second == first || third == second {
		t.Error("another content has the same version")
	}
}
