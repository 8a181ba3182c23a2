package daemon

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"perceptd/agent/api"
	"perceptd/cmd/perceptd/e2e/harness"
)

// A daemon that is started by hand beside the device's leaves the device's state alone, and says what its own is worth.
func TestStateBesideTheRuntimeFolder(t *testing.T) {
	t.Parallel()
	d := harness.NewDaemon(t, harness.SimulatedFor())
	beside := d.Dir + "-state"
	t.Cleanup(func() { _ = os.RemoveAll(beside) })
	if err := os.WriteFile(d.KeyFile(), bytes.Repeat([]byte("k"), 32), 0o600); err != nil {
		t.Fatal(err)
	}
	d.Process = harness.Launch(t, nil, "perceptd", "--config", d.Config, "--runtime-dir", d.Dir, "--cache-key",
		d.KeyFile())
	d.AwaitHealth(t)
	noted := harness.RecordChange(t, d, `{"all_resources":true,"effect":"changed"}`)
	if s := d.Status(t); s.Kept.Reboot ||
		!strings.Contains(s.Kept.Why, "the state is in "+beside+", which is not kept over a reboot") ||
		len(s.Trouble) != 0 {
		t.Errorf("%+v, trouble %q", s.Kept, s.Trouble)
	}
	if text, err := os.ReadFile(filepath.Join(beside, "policy-changes.json")); err != nil ||
		!strings.Contains(string(text), noted.ID) {
		t.Errorf("%v: %s", err, text)
	}
	d.Stop(t)
	if _, err := os.Lstat(filepath.Join(beside, "tokens.sealed")); err == nil {
		t.Error("tokens were written beside the runtime folder")
	}
}

// Two daemons never share a folder, be it the sockets' or the state's, whoever else would like to lock it.
func TestTwoDaemons(t *testing.T) {
	t.Parallel()
	d := harness.LaunchDaemon(t, harness.SimulatedFor())
	other := harness.NewDaemon(t, harness.SimulatedFor())
	pid := strconv.Itoa(d.Cmd.Process.Pid)
	for says, args := range map[string][]string{
		"another perceptd (process " + pid + ") is serving in " +
			d.Dir + ": stop it, or name other folders with --runtime-dir and --state-dir": {
			"--runtime-dir", d.Dir, "--state-dir", filepath.Join(other.Dir, "state")},
		"another perceptd (process " + pid + ") keeps its state in " + d.StateDir() +
			": stop it, or name other folders with --runtime-dir and --state-dir": {
			"--runtime-dir", other.Dir, "--state-dir", d.StateDir()},
	} {
		p := harness.Launch(t, nil, "perceptd", append(args, "--config", d.Config)...)
		<-p.Ended
		if got := p.Cmd.ProcessState.ExitCode(); got != harness.ExitFailed || !strings.Contains(p.Text(), says) {
			t.Errorf("exit status %d, %q is not said: %s", got, says, p.Text())
		}
	}
	if os.Getuid() != 0 {
		return // only root can be somebody else
	}
	if err := os.Chmod(d.Dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]int{d.Dir: 0, filepath.Join(d.Dir, api.ModulesDirName): 1, d.StateDir(): 1} {
		c := exec.Command("/bin/sh", "-c", `if (exec 3<"$1") 2>/dev/null; then exit 0; else exit 1; fi`, "sh", path)
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		if _ = c.Run(); c.ProcessState.ExitCode() != want {
			t.Errorf("another user who opens %s, to lock it: exit status %d, want %d",
				path, c.ProcessState.ExitCode(), want)
		}
	}
}

func TestPolicyChangesOutliveTheDaemon(t *testing.T) {
	t.Parallel()
	d := harness.LaunchDaemon(t, harness.SimulatedFor())
	noted := harness.RecordChange(t, d, `{"resource":"`+harness.VaultURI+`","effect":"revoked","note":"left the team"}`)
	for _, end := range []func(){
		func() { d.Stop(t) },
		func() {
			_ = d.Cmd.Process.Kill() // no less than a power cut
			<-d.Ended
		},
	} {
		end()
		d = d.Restart(t)
		changes := d.Status(t).Changes
		if len(changes) != 1 || changes[0].ID != noted.ID || !changes[0].At.Equal(noted.At) ||
			changes[0].Note != "left the team" {
			t.Errorf("%+v, want %+v", changes, noted)
		}
		// What the back end mints now may still lack the change.
		if status, body, err := d.Get(d.Token(), harness.VaultToken); err != nil || status != 403 ||
			!strings.Contains(body, string(api.CodeRevoked)) {
			t.Errorf("not in force: %d %s %v", status, body, err)
		}
	}
	if status, body, err := d.Ask(d.Admin(), "DELETE", api.PathPolicyChanges+"?id="+noted.ID, ""); status != 200 {
		t.Errorf("%d %s %v", status, body, err)
	}
	d.Stop(t)
	if d = d.Restart(t); len(d.Status(t).Changes) != 0 {
		t.Errorf("withdrawn, and back: %+v", d.Status(t).Changes)
	}
}

// What cannot be read is moved aside and told; tokens count as uncertain until somebody looked.
func TestUnreadablePolicyChanges(t *testing.T) {
	t.Parallel()
	d := harness.NewDaemon(t, harness.SimulatedFor())
	state := filepath.Join(d.Dir, "state")
	record := filepath.Join(state, "policy-changes.json")
	if err := errors.Join(os.Mkdir(state, 0o700), os.WriteFile(record, []byte(`{"version":1,"chan`),
		0o600)); err != nil {
		t.Fatal(err)
	}
	manager, told := harness.ListenAsSystemd(t)
	d = d.Restart(t, "NOTIFY_SOCKET="+manager)
	harness.AwaitMessages(t, told, "trouble: the record of policy changes could not be read: policy-changes.json: ")
	for range 2 {
		s := d.Status(t)
		if len(s.Changes) != 1 || s.Changes[0].Effect != api.EffectUnknown || len(s.Trouble) != 1 {
			t.Fatalf("%+v", s)
		}
		for _, part := range []string{"could not be read: policy-changes.json", "policy-changes.json.unreadable-",
			"perceptctl policy-changes withdraw " + s.Changes[0].ID} {
			if !strings.Contains(s.Trouble[0], part) {
				t.Errorf("%q lacks %q", s.Trouble[0], part)
			}
		}
		d.Stop(t)
		d = d.Restart(t) // what is unknown stays unknown
	}
	if status, body, err := d.Ask(d.Admin(), "DELETE", api.PathPolicyChanges+"?id="+d.Status(t).Changes[0].ID,
		""); status != 200 {
		t.Errorf("%d %s %v", status, body, err)
	}
	if trouble := d.Status(t).Trouble; len(trouble) != 0 {
		t.Errorf("trouble %q", trouble)
	}
	aside, err := filepath.Glob(record + ".unreadable-*")
	if err != nil || len(aside) != 1 {
		t.Errorf("%q, %v", aside, err)
	}
}

// Where a file is in the place of the state folder, it is not known what was kept there: the daemon refuses every
// token, says so, and serves when root says that nothing was denied.
func TestNoStateDirectory(t *testing.T) {
	t.Parallel()
	d := harness.NewDaemon(t, harness.SimulatedFor())
	if err := os.WriteFile(filepath.Join(d.Dir, "state"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	d = d.Restart(t)
	if status, body, err := d.Ask(d.Admin(), "POST", api.PathPolicyChanges,
		`{"all_resources":true,"effect":"changed"}`); status != 507 ||
		!strings.Contains(body, "the change is in force, and the record of policy changes cannot be read now") {
		t.Errorf("%d %s %v", status, body, err)
	}
	move := "move what is in the place of " + d.StateDir() + " away"
	trouble := d.Status(t).Trouble
	for _, want := range []string{
		"the record of policy changes cannot be read now", "every request is refused: the record of deny rules " +
			"cannot be read now",
	} {
		if !slices.ContainsFunc(trouble, func(text string) bool {
			return strings.Contains(text, want) && strings.Contains(text, move)
		}) {
			t.Errorf("trouble %q lacks %q and %q", trouble, want, move)
		}
	}
	if status, body, err := d.Get(d.Token(), harness.VaultToken); err != nil || status != 503 ||
		!strings.Contains(body, move) {
		t.Errorf("%d %s %v", status, body, err)
	}
	status, body, err := d.Ask(d.Admin(), "DELETE", api.PathDenyLost, "")
	if os.Getuid() != 0 {
		if status != 403 {
			t.Errorf("%d %s %v", status, body, err)
		}
		return
	}
	if status != 200 && status != 507 {
		t.Errorf("%d %s %v", status, body, err)
	}
	if status, body, err := d.Get(d.Token(), harness.VaultToken); err != nil || status != 200 {
		t.Errorf("%d %s %v", status, body, err)
	}
}
