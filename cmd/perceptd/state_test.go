package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"perceptd/agent"
	"perceptd/agent/api"
)

const blobURI = "https://account.blob.core.windows.net"

func TestSpreadAndResources(t *testing.T) {
	t.Parallel()
	path := write(t, map[string]string{
		"config.toml":     strings.Replace(goodConfig, "[source]\n", "[source]\nspread = \"8m\"\n", 1) + "\n[tokens]\nspread = \"5m\"\n[[resource]]\nuri = \"https://vault.azure.net\"\nalternates = [\"" + blobURI + "\"]\n",
		"config.d/a.toml": "[tokens]\nspread = \"0s\"\n[[resource]]\nuri = \"api://x\"\nalternates = [\"api://y\", \"api://z\"]\n[[grant]]\ncaller = { module = \"vision\" }\nidentity = \"vision\"\nresources = [\"api://x\", \"api://y\"]\n",
	})
	c, err := loadConfig(path)
	if err != nil {
		t.Fatal(err)
	}
	if c.source.spread != 8*time.Minute || c.rules.Spread != noSpread || len(c.rules.Alternates) != 2 || !slices.Equal(c.rules.Alternates["api://x"], []string{"api://y", "api://z"}) {
		t.Errorf("%+v", c)
	}
	for _, line := range []string{
		"resource: api://x accepts tokens for api://y, api://z too\n",
		"resource: https://vault.azure.net accepts tokens for " + blobURI + " too\n",
		"warning: api://z will never stand in for api://x: no caller's grants name both with the same identity\n",
		"warning: " + blobURI + " will never stand in for https://vault.azure.net: no caller's",
		"a policy change takes up to 0s to reach new tokens\n",
	} {
		if !strings.Contains(c.describe(), line) {
			t.Errorf("%q is missing in\n%s", line, c.describe())
		}
	}
	if strings.Contains(c.describe(), "warning: api://y") {
		t.Errorf("a warning of what will be served:\n%s", c.describe())
	}
}

func TestSpreadAndResourceFaults(t *testing.T) {
	t.Parallel()
	resource := func(text string) string { return goodConfig + "\n[[resource]]\n" + text }
	alternates := "alternates = [\"api://y\"]\n"
	for _, row := range []struct{ name, text, want string }{
		{"no duration", goodConfig + "\n[tokens]\nspread = 10\n", `config.toml:19: tokens.spread is 10: write a duration in quotes`},
		{"a negative one", goodConfig + "\n[tokens]\nspread = \"-1s\"\n", "config.toml:19: spread is -1s: it must be between 0s and 24h0m0s"},
		{"a long one", goodConfig + "\n[tokens]\nspread = \"25h\"\n", "config.toml:19: spread is 25h0m0s: it must be between 0s and 24h0m0s"},
		{"of the real one", "[source]\nspread = \"8m\"\n", `config.toml:2: source.speed, source.rollover and source.spread are for source.kind = "simulated" only`},
		{"of the simulated one", "[source]\nkind = \"simulated\"\nspread = \"25h\"\n", "config.toml:3: source.spread is 25h0m0s: it must be between 0s and 24h0m0s"},
		{"one bracket", "[[identity]]\nname = \"a\"\n\n[resource]\nuri = \"api://x\"\n", "config.toml: write [[identity]], [[grant]], [[resource]] and [[module]], each with two brackets"},
		{"a word for a lost record", goodConfig + "\n[tokens]\nlost_record = \"drop\"\n", `config.toml:19: tokens.lost_record is "drop": it must be "serve" or "withhold"`},
		{"unknown key", resource("url = \"api://x\"\n"), "config.toml:19: unknown key resource.url: [[resource]] has uri and alternates"},
		{"unknown table", "[resources]\n", "config.toml:1: unknown key resources: the tables are [source], [tokens], [callers], [loopback], [[identity]], [[grant]], [[resource]] and [[module]]"},
		{"no URI", resource(alternates), "config.toml:18: the resource is empty"},
		{"no alternates", resource("uri = \"api://x\"\n"), "config.toml:18: resource api://x has 0 alternates: name 1 to 8"},
		{"its own", resource("uri = \"api://y\"\n" + alternates), "config.toml:18: the alternates of api://y: it is no alternate of itself"},
		{"twice", resource("uri = \"api://x\"\n"+alternates) + "\n[[resource]]\nuri = \"api://x\"\n" + alternates, "config.toml:22: resource api://x is there twice"},
	} {
		_, err := loadConfig(write(t, map[string]string{"config.toml": row.text}))
		if err == nil || !strings.Contains(err.Error(), row.want) {
			t.Errorf("%s: %v\nwant %s", row.name, err, row.want)
		}
	}
	path := write(t, map[string]string{
		"config.toml":     resource("uri = \"api://x\"\n" + alternates),
		"config.d/a.toml": "\n[[resource]]\nuri = \"api://y\"\nalternates = [\"api://z\"]\n\n[[resource]]\nuri = \"api://x\"\n" + alternates,
	})
	if _, err := loadConfig(path); err == nil || !strings.Contains(err.Error(), "a.toml:6: resource api://x is there twice") {
		t.Errorf("in two files: %v", err)
	}
}

func TestStaleInStatusText(t *testing.T) {
	t.Parallel()
	var s agent.Status
	s.Keys = make([]agent.KeyStatus, 3)
	for i := range s.Keys {
		s.Keys[i].Left = time.Hour
	}
	s.Stale = 2
	if got, want := statusText(s, false, nil), "0 identities, 3 tokens, 2 stale"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	s.Keys[0].Permissions.Withheld = true
	if got, want := statusText(s, false, nil), "0 identities, 3 tokens, 2 stale (1 withheld)"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestStateDirectory(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		environment, source string
		args                []string
		want                string
		passing             bool
	}{
		{"", managedIdentity, nil, "/var/lib/percept", false},
		{"", managedIdentity, []string{"--runtime-dir", "/run/percept/"}, "/var/lib/percept", false},
		{"/var/lib/one:/var/lib/two", managedIdentity, nil, "/var/lib/one", false},
		{"/var/lib/one", simulated, []string{"--runtime-dir", "/tmp/run"}, "/var/lib/one", false},
		{"/var/lib/one", simulated, []string{"--state-dir", "/elsewhere"}, "/elsewhere", false},
		{"", managedIdentity, []string{"--runtime-dir", "/tmp/run/"}, "/tmp/run-state", true},
		{"", simulated, nil, "/run/percept-state", true},
		{"", simulated, []string{"--runtime-dir", "run"}, "run-state", true},
		{"", simulated, []string{"--runtime-dir", "run", "--state-dir", "state"}, "state", false},
	} {
		var errs bytes.Buffer
		f, err := parseFlags(row.args, &errs)
		if err != nil {
			t.Fatal(err)
		}
		if f.placeState(row.source, row.environment); f.stateDir != row.want || f.passing != row.passing {
			t.Errorf("%+v: %q %v, want %q", row, f.stateDir, f.passing, row.want)
		}
	}
}

func TestLostRecordInTheConfiguration(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]bool{"": false, `lost_record = "serve"`: false, `lost_record = "withhold"`: true} {
		c, err := loadConfig(write(t, map[string]string{"config.toml": goodConfig + "\n[tokens]\n" + text + "\n"}))
		if err != nil || c.rules.WithholdLost != want {
			t.Errorf("%s: %v, %v", text, c.rules.WithholdLost, err)
		}
		if said := strings.Contains(c.describe(), "tokens from before are withheld"); said != want {
			t.Errorf("%s: %s", text, c.describe())
		}
	}
}

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
	noted := noteChange(t, d, `{"resource":"`+vaultURI+`","effect":"revoked","note":"left the team"}`)
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
