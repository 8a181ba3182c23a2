package daemon

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"perceptd/agent/api"
	"perceptd/cmd/perceptd/e2e/harness"
)

// A daemon tells callers how it sees them, and an administrator what it would decide, by the rules that it has
// read.
func TestDaemonExplainsItself(t *testing.T) {
	t.Parallel()
	d := harness.LaunchDaemon(t, harness.SimulatedFor("vision"))
	status, body, err := d.Get(d.Token(), api.PathWhoAmI)
	if err != nil || status != 200 || !strings.Contains(body, `"identity":"device"`) ||
		strings.Contains(body, "config.toml") {
		t.Errorf("%d %v %s", status, err, body)
	}
	if _, body, _ := d.Get(d.Admin(),
		api.PathGrantsCheck+"?module=vision&resource="+harness.VaultURI); !strings.Contains(body, `"allowed":true`) ||
		!strings.Contains(body, `config.toml:`) {
		t.Error(body)
	}
	if _, body, _ := d.Get(d.Admin(),
		api.PathGrantsCheck+"?module=speech&resource="+harness.VaultURI); !strings.Contains(body,
		"no grant is for module speech") {
		t.Error(body)
	}
}

// Root in a pid namespace of its own is not root: not for a grant, and not for an administrator's secrets.
func TestNestedRoot(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("making pid namespaces needs root")
	}
	d := harness.LaunchDaemon(t, harness.WithLoopback(harness.SimulatedFor("vision"), harness.FreeAddress(t)))
	d.AwaitReady(t)
	nested := func(args ...string) (out string, status int) {
		c := exec.Command("/usr/bin/unshare",
			append([]string{"-p", "-f", "-m", harness.Binary(t, "perceptctl"), "--socket", d.Token()}, args...)...)
		text, _ := c.CombinedOutput()
		// on one line, wherever it was wrapped
		return strings.Join(strings.Fields(string(text)), " "), c.ProcessState.ExitCode()
	}
	if out, status := nested("token", "--resource", harness.VaultURI, "--json"); status != 4 ||
		strings.Contains(out, "eyJ") {
		t.Errorf("a token: %d %s", status, out)
	}
	if out, status := nested("whoami"); status != 4 ||
		!strings.Contains(out, "in a pid namespace of its own, as in a container: its uid says nothing") {
		t.Errorf("whoami: %d %s", status, out)
	}
	if out, status := nested("env", "--module", "vision"); status != 4 ||
		!strings.Contains(out, "only root may ask for another's") || strings.Contains(out, "IDENTITY_HEADER=") {
		t.Errorf("a module's secret: %d %s", status, out)
	}
	if out, status := nested("status"); status != 0 || !strings.Contains(out, "in a pid namespace of its own") {
		t.Errorf("the admin socket's file decides who is let in: %d %s", status, out)
	}
	if secret := harness.ValueOf(d.Env(t, "--module", "vision"), "IDENTITY_HEADER"); secret == "" {
		t.Error("root gets no secret")
	}
	if said := d.Text(); !strings.Contains(said, "caller not proved") ||
		!strings.Contains(said, "its uid says nothing") {
		t.Errorf("the log does not tell why: %s", said)
	}
}
