package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"perceptd/agent/api"
	"perceptd/cmd/perceptd/e2e/perceptdtest"
)

// A daemon that is started by hand beside the device's leaves the device's state alone, and says what its own is worth.
func TestStateBesideTheRuntimeFolder(t *testing.T) {
	t.Parallel()
	d := newFolder(t, simulatedFor())
	beside := d.dir + "-state"
	t.Cleanup(func() { _ = os.RemoveAll(beside) })
	if err := os.WriteFile(d.keyFile(), bytes.Repeat([]byte("k"), 32), 0o600); err != nil {
		t.Fatal(err)
	}
	d.process = launch(t, nil, "perceptd", "--config", d.config, "--runtime-dir", d.dir, "--cache-key", d.keyFile())
	d.awaitHealth(t)
	noted := noteChange(t, d, `{"all_resources":true,"effect":"changed"}`)
	if s := d.status(t); s.Kept.Reboot || !strings.Contains(s.Kept.Why, "the state is in "+beside+", which is not kept over a reboot") || len(s.Trouble) != 0 {
		t.Errorf("%+v, trouble %q", s.Kept, s.Trouble)
	}
	if text, err := os.ReadFile(filepath.Join(beside, "policy-changes.json")); err != nil || !strings.Contains(string(text), noted.ID) {
		t.Errorf("%v: %s", err, text)
	}
	d.stop(t)
	if _, err := os.Lstat(filepath.Join(beside, "tokens.sealed")); err == nil {
		t.Error("tokens were written beside the runtime folder")
	}
}

// Two daemons never share a folder, be it the sockets' or the state's, whoever else would like to lock it.
func TestTwoDaemons(t *testing.T) {
	t.Parallel()
	d := launchDaemon(t, simulatedFor())
	other := newFolder(t, simulatedFor())
	pid := strconv.Itoa(d.cmd.Process.Pid)
	for says, args := range map[string][]string{
		"another perceptd (process " + pid + ") is serving in " + d.dir + ": stop it, or name other folders with --runtime-dir and --state-dir": {
			"--runtime-dir", d.dir, "--state-dir", filepath.Join(other.dir, "state")},
		"another perceptd (process " + pid + ") keeps its state in " + d.state() + ": stop it, or name other folders with --runtime-dir and --state-dir": {
			"--runtime-dir", other.dir, "--state-dir", d.state()},
	} {
		p := launch(t, nil, "perceptd", append(args, "--config", d.config)...)
		<-p.ended
		if got := p.cmd.ProcessState.ExitCode(); got != exitFailed || !strings.Contains(p.text(), says) {
			t.Errorf("exit status %d, %q is not said: %s", got, says, p.text())
		}
	}
	if os.Getuid() != 0 {
		return // only root can be somebody else
	}
	if err := os.Chmod(d.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]int{d.dir: 0, filepath.Join(d.dir, api.ModulesDirName): 1, d.state(): 1} {
		c := exec.Command("/bin/sh", "-c", `if (exec 3<"$1") 2>/dev/null; then exit 0; else exit 1; fi`, "sh", path)
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		if _ = c.Run(); c.ProcessState.ExitCode() != want {
			t.Errorf("another user who opens %s, to lock it: exit status %d, want %d", path, c.ProcessState.ExitCode(), want)
		}
	}
}

func noteChange(t testing.TB, d *daemonProcess, body string) api.PolicyChange {
	t.Helper()
	status, answer, err := d.ask(d.admin(), "POST", api.PathPolicyChanges, body)
	var noted api.PolicyChange
	if err != nil || status != 200 || json.Unmarshal([]byte(answer), &noted) != nil {
		t.Fatalf("%d %s %v", status, answer, err)
	}
	return noted
}

// restart starts a daemon again on what another one left.
func (d *daemonProcess) restart(t testing.TB, environment ...string) *daemonProcess {
	t.Helper()
	again := &daemonProcess{dir: d.dir, config: d.config}
	again.process = launch(t, environment, "perceptd", again.arguments()...)
	again.awaitHealth(t)
	return again
}

func TestPolicyChangesOutliveTheDaemon(t *testing.T) {
	t.Parallel()
	d := launchDaemon(t, simulatedFor())
	noted := noteChange(t, d, `{"resource":"`+perceptdtest.VaultURI+`","effect":"revoked","note":"left the team"}`)
	for _, end := range []func(){
		func() { d.stop(t) },
		func() {
			_ = d.cmd.Process.Kill() // no less than a power cut
			<-d.ended
		},
	} {
		end()
		d = d.restart(t)
		changes := d.status(t).Changes
		if len(changes) != 1 || changes[0].ID != noted.ID || !changes[0].At.Equal(noted.At) || changes[0].Note != "left the team" {
			t.Errorf("%+v, want %+v", changes, noted)
		}
		// What the back end mints now may still lack the change.
		if status, body, err := d.get(d.token(), vaultToken); err != nil || status != 403 || !strings.Contains(body, string(api.CodeRevoked)) {
			t.Errorf("not in force: %d %s %v", status, body, err)
		}
	}
	if status, body, err := d.ask(d.admin(), "DELETE", api.PathPolicyChanges+"?id="+noted.ID, ""); status != 200 {
		t.Errorf("%d %s %v", status, body, err)
	}
	d.stop(t)
	if d = d.restart(t); len(d.status(t).Changes) != 0 {
		t.Errorf("withdrawn, and back: %+v", d.status(t).Changes)
	}
}

// What cannot be read is moved aside and told; tokens count as uncertain until somebody looked.
func TestUnreadablePolicyChanges(t *testing.T) {
	t.Parallel()
	d := newFolder(t, simulatedFor())
	state := filepath.Join(d.dir, "state")
	record := filepath.Join(state, "policy-changes.json")
	if err := errors.Join(os.Mkdir(state, 0o700), os.WriteFile(record, []byte(`{"version":1,"chan`), 0o600)); err != nil {
		t.Fatal(err)
	}
	manager, told := listenAsSystemd(t)
	d = d.restart(t, "NOTIFY_SOCKET="+manager)
	awaitMessages(t, told, "trouble: the record of policy changes could not be read: policy-changes.json: ")
	for range 2 {
		s := d.status(t)
		if len(s.Changes) != 1 || s.Changes[0].Effect != api.EffectUnknown || len(s.Trouble) != 1 {
			t.Fatalf("%+v", s)
		}
		for _, part := range []string{"could not be read: policy-changes.json", "policy-changes.json.unreadable-", "perceptctl policy-changes withdraw " + s.Changes[0].ID} {
			if !strings.Contains(s.Trouble[0], part) {
				t.Errorf("%q lacks %q", s.Trouble[0], part)
			}
		}
		d.stop(t)
		d = d.restart(t) // what is unknown stays unknown
	}
	if status, body, err := d.ask(d.admin(), "DELETE", api.PathPolicyChanges+"?id="+d.status(t).Changes[0].ID, ""); status != 200 {
		t.Errorf("%d %s %v", status, body, err)
	}
	if trouble := d.status(t).Trouble; len(trouble) != 0 {
		t.Errorf("trouble %q", trouble)
	}
	aside, err := filepath.Glob(record + ".unreadable-*")
	if err != nil || len(aside) != 1 {
		t.Errorf("%q, %v", aside, err)
	}
}

// Without a place to keep things in the daemon serves, and says so.
func TestNoStateDirectory(t *testing.T) {
	t.Parallel()
	d := newFolder(t, simulatedFor())
	if err := os.WriteFile(filepath.Join(d.dir, "state"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	d = d.restart(t)
	if status, body, err := d.ask(d.admin(), "POST", api.PathPolicyChanges, `{"all_resources":true,"effect":"changed"}`); status != 507 || !strings.Contains(body, "the change is in force, and the record of policy changes cannot be read now") {
		t.Errorf("%d %s %v", status, body, err)
	}
	if trouble := d.status(t).Trouble; len(trouble) != 1 || !strings.Contains(trouble[0], "the record of policy changes cannot be read now") || !strings.Contains(trouble[0], "move what is in the place of "+d.state()+" away") {
		t.Errorf("trouble %q", trouble)
	}
	if status, body, err := d.get(d.token(), vaultToken); err != nil || status != 200 {
		t.Errorf("%d %s %v", status, body, err)
	}
}
