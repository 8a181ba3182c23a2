package daemon

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"perceptd/agent/api"
	"perceptd/cmd/perceptd/e2e/harness"
)

// toolWith runs perceptctl with what a person types.
func toolWith(t *testing.T, d *harness.Daemon, typed string, args ...string) (string, int) {
	t.Helper()
	c := exec.Command(harness.Binary(t, "perceptctl"), append([]string{"--socket", d.Token()}, args...)...)
	c.Stdin = strings.NewReader(typed)
	text, _ := c.CombinedOutput()
	return string(text), c.ProcessState.ExitCode()
}

// From a denial to a token it is one command, which doctor prints: run as it stands, it gives the caller what it was
// denied, and its file outlives a restart.
func TestGrantsAddMendsADenial(t *testing.T) {
	t.Parallel()
	d := harness.LaunchDaemon(t, harness.SimulatedFor("vision"))
	const resource = "https://other.example"
	ask := api.PathToken + "?resource=" + resource
	if status, body, err := d.Get(d.Module("vision"), ask); err != nil || status != 403 ||
		!strings.Contains(body, `"command":"perceptctl grants add --module vision --identity `) {
		t.Fatalf("%d %v %s", status, err, body)
	}
	said, _ := toolWith(t, d, "", "doctor")
	command := regexp.MustCompile(`sudo\s+perceptctl\s+(grants add --from-denial \d+)`).FindStringSubmatch(
		strings.Join(strings.Fields(said), " "))
	if command == nil {
		t.Fatalf("doctor prints no command: %s", said)
	}
	args := append(strings.Fields(command[1]), "--config", d.Config)
	if said, status := toolWith(t, d, "n\n", args...); status != 1 || !strings.Contains(said, "nothing was written") {
		t.Errorf("a no: %d %s", status, said)
	}
	if status, _, _ := d.Get(d.Module("vision"), ask); status != 403 {
		t.Errorf("after a no: %d", status)
	}
	if said, status := toolWith(t, d, "y\n", args...); status != 0 || !strings.Contains(said,
		"granted: module vision") {
		t.Fatalf("a yes: %d %s", status, said)
	}
	if status, body, err := d.Get(d.Module("vision"), ask); err != nil || status != 200 {
		t.Errorf("%d %v %s", status, err, body)
	}
	if said, status := toolWith(t, d, "y\n", args...); status != 0 || !strings.Contains(said, "granted since") {
		t.Errorf("again: %d %s", status, said)
	}
	again := d.Restart(t)
	if status, body, err := again.Get(again.Module("vision"), ask); err != nil || status != 200 {
		t.Errorf("after a restart: %d %v %s", status, err, body)
	}
}

// What a 403 prints runs as it stands where the caller's group has two identities: the caller gets what it was denied,
// and keeps what it had.
func TestPrintedCommandKeepsBothIdentities(t *testing.T) {
	t.Parallel()
	const device, vision = "https://device.example", "https://vision.example"
	config := harness.SimulatedIdentities
	for identity, resource := range map[string]string{"device": device, "vision": vision} {
		config += fmt.Sprintf("\n[[grant]]\ncaller = { gid = %d }\nidentity = %q\nresources = [%q]\n",
			os.Getgid(), identity, resource)
	}
	d := harness.LaunchDaemon(t, config)
	const other = "https://other.example"
	status, body, err := d.Get(d.Token(), api.PathToken+"?resource="+other)
	var problem api.Problem
	if err := errors.Join(err, json.Unmarshal([]byte(body), &problem)); err != nil || status != 403 ||
		problem.Suggestion == nil {
		t.Fatalf("%d %v %s", status, err, body)
	}
	commands := strings.Split(problem.Suggestion.Command, " && sudo ")
	if len(commands) != 2 {
		t.Fatal(problem.Suggestion.Command)
	}
	for _, command := range commands {
		args := append(strings.Fields(command)[1:], "--config", d.Config)
		if said, status := toolWith(t, d, "y\n", args...); status != 0 {
			t.Fatalf("%s: %d %s", command, status, said)
		}
	}
	for _, resource := range []string{other, device, vision} {
		if status, body, err := d.Get(d.Token(), api.PathToken+"?resource="+resource); err != nil || status != 200 {
			t.Errorf("%s: %d %v %s", resource, status, err, body)
		}
	}
}

// What perceptd refuses is undone whole, also where the fault is in another file.
func TestGrantsAddIsUndone(t *testing.T) {
	t.Parallel()
	d := harness.LaunchDaemon(t, harness.SimulatedFor("vision"))
	args := []string{"grants", "add", "--yes", "--config", d.Config, "--module", "vision", "--identity", "device",
		"--resource", "https://other.example"}
	folder := filepath.Join(filepath.Dir(d.Config), "config.d")
	sound, err := os.ReadFile(d.Config)
	if err != nil {
		t.Fatal(err)
	}
	d.Rewrite(t, string(sound)+"\n[[grnt]]\n")
	if said, status := toolWith(t, d, "", args...); status != 1 || !strings.Contains(said, "grnt") ||
		!strings.Contains(said, "50-grants.toml is as it was before") {
		t.Errorf("%d %s", status, said)
	}
	if left, err := os.ReadDir(folder); err == nil {
		t.Errorf("left behind: %v", left)
	}
	d.Rewrite(t, string(sound))
	if said, status := toolWith(t, d, "", args...); status != 0 {
		t.Errorf("%d %s", status, said)
	}
	if said, status := toolWith(t, d, "", args...); status != 0 || !strings.Contains(said, "granted already: grant ") {
		t.Errorf("again: %d %s", status, said)
	}
	info, err := os.Stat(filepath.Join(folder, "50-grants.toml"))
	if err != nil || info.Mode() != 0o644 {
		t.Errorf("%v %v", info, err)
	}
	if left, _ := os.ReadDir(folder); len(left) != 1 {
		t.Errorf("beside it: %v", left)
	}
}

// A person without the rights is shown what would be written, and told to use sudo.
func TestGrantsAddWithoutRights(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("needs root: the configuration is another user's")
	}
	d := harness.LaunchDaemon(t, harness.SimulatedFor("vision"))
	if err := errors.Join(os.Chmod(d.Dir, 0o755), os.Chmod(d.Admin(), 0o666)); err != nil {
		t.Fatal(err)
	}
	c := exec.Command("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", harness.Binary(t, "perceptctl"),
		"--socket", d.Token(), "grants", "add", "--yes", "--config", d.Config, "--module", "vision", "--identity",
		"device",
		"--resource", "https://other.example")
	said, _ := c.CombinedOutput()
	if c.ProcessState.ExitCode() != 1 || !strings.Contains(string(said), "caller    = { module = \"vision\" }") ||
		!strings.Contains(string(said), "the configuration is root's: run it with sudo") {
		t.Errorf("%v %s", c.ProcessState, said)
	}
	if _, err := os.Stat(filepath.Join(filepath.Dir(d.Config), "config.d")); err == nil {
		t.Error("a folder was made")
	}
}
