package main

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"perceptd/agent/api"
	"perceptd/cmd/perceptd/e2e/harness"
	"perceptd/systemd"
	"perceptd/tokencache"
)

func TestStatusText(t *testing.T) {
	t.Parallel()
	soon := time.Date(2026, 11, 23, 15, 4, 0, 0, time.UTC)
	var one api.Status
	one.Identities = make([]api.IdentityStatus, 1)
	one.Tokens = make([]api.TokenStatus, 3)
	one.Tokens[0].ExpiresIn, one.Tokens[0].NextRefresh = 3600, soon.Add(time.Hour)
	one.Tokens[0].Permissions.State = api.PermissionsCurrent
	one.Tokens[1].NextRefresh = soon
	one.Tokens[2].State, one.Tokens[2].NextRefresh = tokencache.Idle, soon.Add(-time.Hour) // nobody asks: not refreshed
	for _, row := range []struct {
		simulated bool
		trouble   []string
		want      string
	}{
		{false, nil, "1 identity, 1 token, next refresh Nov 23 15:04 UTC"},
		{true, nil, "SIMULATED; 1 identity, 1 token, next refresh Nov 23 15:04 UTC"},
		{false, []string{"a"}, "trouble: a; 1 identity, 1 token, next refresh Nov 23 15:04 UTC"},
		{false, []string{"a", "b", "c"},
			"trouble: a (and 2 more, see perceptctl status); 1 identity, 1 token, next refresh Nov 23 15:04 UTC"},
	} {
		if got := statusText(one, row.simulated, row.trouble); got != row.want {
			t.Errorf("%q\nwant %q", got, row.want)
		}
	}
	one.Trouble, one.Tokens[0].ExpiresIn, one.Tokens[1].ExpiresIn, one.Tokens[2].ExpiresIn = []string{"its own"}, 0, 1,
		1
	one.Tokens[1].Permissions.State, one.Tokens[2].Permissions.State = api.PermissionsCurrent, api.PermissionsCurrent
	if got := statusText(one, true,
		[]string{"the daemon's"}); got != "SIMULATED; trouble: the daemon's (and 1 more, see perceptctl status); 1 "+
		"identity, 2 tokens, next refresh Nov 23 15:04 UTC" {
		t.Errorf("%q", got)
	}
	if got := statusText(api.Status{}, false, nil); got != "0 identities, 0 tokens" {
		t.Errorf("%q", got)
	}
}

func TestStaleInStatusText(t *testing.T) {
	t.Parallel()
	var s api.Status
	s.Tokens = make([]api.TokenStatus, 3)
	for i := range s.Tokens {
		s.Tokens[i].ExpiresIn = 3600
	}
	s.Tokens[0].Permissions.State, s.Tokens[1].Permissions.State = api.PermissionsStale, api.PermissionsUncertain
	s.Tokens[2].Permissions.State = api.PermissionsCurrent
	if got, want := statusText(s, false, nil), "0 identities, 3 tokens, 2 stale"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	s.Tokens[0].Permissions.Withheld = true
	if got, want := statusText(s, false, nil), "0 identities, 3 tokens, 2 stale (1 withheld)"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

// TestDenyAndHubInStatusText shows that what is denied comes first, and that a hub that is gone crowds nothing out.
func TestDenyAndHubInStatusText(t *testing.T) {
	t.Parallel()
	noon := time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC)
	module := func(origin api.DenyOrigin, idle string) api.DenyRule {
		return api.DenyRule{DenyTarget: api.DenyTarget{Module: "m"}, Origin: origin, Since: noon, By: "uid 0",
			Idle: idle}
	}
	everything := api.DenyRule{DenyTarget: api.DenyTarget{All: true}, Origin: api.DenyTwin, Twin: 12, Since: noon}
	setAside := everything
	setAside.SetAside = true
	rules := &api.DenyStatus{Rules: []api.DenyRule{module(api.DenyLocal, ""), module(api.DenyTwin, "")}}
	all := &api.DenyStatus{Rules: []api.DenyRule{module(api.DenyLocal, ""), module(api.DenyTwin, "it is not here"),
		everything}}
	idle := &api.DenyStatus{Rules: []api.DenyRule{module(api.DenyLocal, "it is not here")}}
	aside := &api.DenyStatus{HubSetAsideOn: time.Unix(1e9, 0),
		Rules: []api.DenyRule{setAside, module(api.DenyLocal, "")}}
	up := &api.HubStatus{Connected: true}
	const gone = "IoT Hub is not connected since Nov 23 11:48 UTC: no such host"
	const refused = "what IoT Hub sets is refused, version 3 of the twin's desired properties: deny[0]"
	for want, row := range map[string]struct {
		status  api.Status
		trouble []string
	}{
		"0 identities, 0 tokens": {api.Status{Deny: &api.DenyStatus{}, Hub: up}, nil},
		"everything is denied, since Nov 28 12:00 UTC by IoT Hub, twin version 12 (and 2 more deny rules); " +
			"0 identities, 0 tokens": {api.Status{Deny: all}, nil},
		"1 deny rule, which is idle; 0 identities, 0 tokens": {api.Status{Deny: idle}, nil},
		"denied: module m, since Nov 28 12:00 UTC by uid 0; 0 identities, 0 tokens; IoT Hub set aside": {
			api.Status{Deny: aside, Hub: up}, nil},
		"0 identities, 0 tokens; IoT Hub not connected": {api.Status{Hub: &api.HubStatus{}}, nil},
		"trouble: IoT Hub: what [iothub] names cannot be used; 0 identities, 0 tokens": {
			api.Status{Hub: &api.HubStatus{}}, []string{"IoT Hub: what [iothub] names cannot be used"}},
		"trouble: " + gone + "; 0 identities, 0 tokens": {api.Status{Hub: &api.HubStatus{}}, []string{gone}},
		"denied: module m, since Nov 28 12:00 UTC by uid 0 (and 1 more deny rule); trouble: no key (and 2 more, see " +
			"perceptctl status); 0 identities, 0 tokens; IoT Hub not " +
			"connected": {
			api.Status{Deny: rules, Hub: &api.HubStatus{}, Trouble: []string{"no key"}}, []string{gone, refused}},
		"trouble: " + refused + "; 0 identities, 0 tokens": {
			api.Status{Hub: up}, []string{refused}},
	} {
		if got := statusText(row.status, false, row.trouble); got != want {
			t.Errorf("%q\nwant %q", got, want)
		}
	}
}

// serviceManager returns what tells a service manager of its own, the path of that one's socket, and a function that
// returns what was told since its last call.
func serviceManager(t *testing.T) (notify systemd.Notify, path string, told func() []string) {
	t.Helper()
	path = filepath.Join(harness.ShortFolder(t), "n")
	manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = manager.Close() })
	t.Setenv("NOTIFY_SOCKET", path)
	notify, err = systemd.NotifyFromEnvironment()
	if err != nil {
		t.Fatal(err)
	}
	raw, err := manager.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	return notify, path, func() (all []string) {
		message := make([]byte, 4096)
		for {
			n := -1
			if err := raw.Read(func(fd uintptr) bool {
				n, _,
					_ = syscall.Recvfrom(int(fd), message, syscall.MSG_DONTWAIT)
				return true
			}); err != nil {
				t.Fatal(err)
			}
			if n < 0 {
				return all
			}
			all = append(all, string(message[:n]))
		}
	}
}

// The text is sent when it differs from what systemd took, and only then. Where nothing else looks, trouble has it
// looked at again each minute, until there is none.
func TestStatusTeller(t *testing.T) {
	notify, _, told := serviceManager(t)
	synctest.Test(t, func(t *testing.T) {
		text, troubled, looked := "fine", false, 0
		s := &statusTeller{notify: notify, text: func() (string, bool) { looked++; return text, troubled }}
		tell := func() {
			if err := s.tell(); err != nil {
				t.Error(err)
			}
		}
		s.again = tell
		becomes := func(now string, trouble bool) {
			s.mu.Lock()
			defer s.mu.Unlock()
			text, troubled = now, trouble
		}
		pass := func(d time.Duration) { time.Sleep(d); synctest.Wait() }
		wants := func(what string, looks int, want ...string) {
			t.Helper()
			got := told()
			s.mu.Lock()
			defer s.mu.Unlock()
			for i := range want {
				if len(got) != len(want) || !strings.HasPrefix(got[i], "STATUS="+want[i]+"\n") {
					break
				}
				got[i] = ""
			}
			if strings.Join(got, "") != "" || len(got) != len(want) || looked != looks {
				t.Errorf("%s: looked %d times, want %d, and told %q, want %q", what, looked, looks, got, want)
			}
			looked = 0
		}
		tell()
		tell()
		wants("at first", 2, "fine")
		pass(time.Hour)
		wants("without trouble", 0)
		becomes("trouble: connections", true)
		tell()
		wants("trouble", 1, "trouble: connections")
		pass(5*recheckInterval + recheckInterval/2)
		wants("trouble that stays", 5)
		becomes("fine", false)
		pass(recheckInterval)
		wants("its end", 1, "fine")
		pass(time.Hour)
		wants("after it", 0)
		becomes("trouble: again", true)
		tell()
		s.stop()
		pass(time.Hour)
		wants("a stop", 1, "trouble: again")
	})
}

// What systemd did not take is sent again.
func TestStatusTellerWithoutManager(t *testing.T) {
	notify, path, told := serviceManager(t)
	s := &statusTeller{notify: notify, text: func() (string, bool) { return "fine", false }}
	if err := os.Rename(path, path+".aside"); err != nil {
		t.Fatal(err)
	}
	if err := s.tell(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("told nobody: %v", err)
	}
	if err := os.Rename(path+".aside", path); err != nil {
		t.Fatal(err)
	}
	if err := s.tell(); err != nil {
		t.Error(err)
	}
	if got := told(); len(got) != 1 || !strings.HasPrefix(got[0], "STATUS=fine\n") {
		t.Errorf("told %q", got)
	}
}
