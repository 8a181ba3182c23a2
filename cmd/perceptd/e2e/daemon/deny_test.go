package daemon

import (
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"perceptd/agent/api"
	"perceptd/cmd/perceptd/e2e/harness"
)

// TestDenyByHand stops a module's tokens with perceptctl deny on every form and ends its open watch, over a restart,
// until perceptctl deny lift; others are served throughout, and every screen says who is denied what.
func TestDenyByHand(t *testing.T) {
	t.Parallel()
	d := harness.LaunchDaemon(t, harness.SimulatedFor("vision"))
	d.AwaitReady(t)
	forms := []string{harness.VaultToken, api.PathIMDSToken + "?api-version=2018-02-01&resource=" + harness.VaultURI,
		api.PathAppServiceToken + "?api-version=2019-08-01&resource=" + harness.VaultURI}
	module := d.Module("vision")
	answers := func(when string, d *harness.Daemon, want int) {
		t.Helper()
		for _, form := range forms {
			status, body, err := d.Get(module, form)
			if err != nil || status != want || want == 403 && !strings.Contains(body, string(api.CodeDenied)) {
				t.Errorf("%s: %s: %d %s %v, want %d", when, form, status, body, err, want)
			}
		}
		if status, body, err := d.Get(d.Token(), harness.VaultToken); err != nil || status != 200 {
			t.Errorf("%s: another caller: %d %s %v", when, status, body, err)
		}
	}
	answers("before", d, 200)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	events := watch(ctx, t, harness.Over(t, module), api.PathWatch+"?resource="+harness.VaultURI)
	await(t, events, "the token is told of", func(event watched) bool { return event.name == api.EventToken })

	out, err := d.Tool(t, "deny", "--module", "vision", "--note", "camera 4 was stolen", "--json")
	harness.Must(t, err)
	var rule api.DenyAnswer
	harness.Must(t, json.Unmarshal([]byte(out), &rule))
	if rule.Module != "vision" || rule.Origin != api.DenyLocal || !strings.HasPrefix(rule.By, "uid ") ||
		rule.Idle != "" {
		t.Errorf("%s", out)
	}
	ended := await(t, events, "it is ended", func(event watched) bool { return event.name == api.EventEnded })
	if !strings.Contains(ended.Detail, "deny rule") {
		t.Errorf("the watch ended with %q", ended.Detail)
	}
	answers("denied", d, 403)

	for _, row := range []struct {
		verb []string
		want string
	}{
		{[]string{"deny"}, rule.ID + "  "},
		{[]string{"status"}, "denied: module vision, since "},
		{[]string{"doctor"}, "1 rule takes tokens away"},
		{[]string{"explain", harness.VaultURI, "--identity", "vision"}, "Callers that a deny rule names"},
		{[]string{"grants", "check", "--module", "vision", "--resource", harness.VaultURI}, "denied   "},
		{[]string{"whoami", "--socket", module}, "https://vault.azure.net  denied"},
	} {
		out, _ := d.Tool(t, row.verb...) // doctor fails for other reasons here, and a denial is exit status 4
		if !strings.Contains(out, row.want) {
			t.Errorf("%q lacks %q:\n%s", row.verb, row.want, out)
		}
	}
	d.Stop(t)
	d = d.Restart(t)
	answers("after a restart", d, 403)
	out, err = d.Tool(t, "deny", "lift", rule.ID)
	if err != nil || !strings.HasPrefix(out, "lifted: "+rule.ID+", module vision, since ") {
		t.Errorf("%s %v", out, err)
	}
	answers("lifted", d, 200)
	if out, err := d.Tool(t, "deny", "lift", rule.ID); err == nil || !strings.Contains(err.Error(), "no deny rule") {
		t.Errorf("lifted again: %s %v", out, err)
	}
}

// TestSettingTheHubAsideIsForRoot shows that an administrator who is not root denies tokens and lifts that, but does
// not set IoT Hub aside.
func TestSettingTheHubAsideIsForRoot(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("needs root: the administrator is another user")
	}
	d := harness.LaunchDaemon(t, harness.SimulatedFor("vision"))
	for _, dir := range []string{d.Dir, filepath.Dir(harness.Binary(t, "perceptctl"))} {
		harness.Must(t, os.Chmod(dir, 0o755))
	}
	harness.Must(t, os.Chown(d.Admin(), 0, 65533))
	asAdministrator := func(args ...string) (int, string) {
		c := exec.Command(harness.Binary(t, "perceptctl"), append([]string{"--socket", d.Token()}, args...)...)
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65533}}
		out, _ := c.CombinedOutput()
		return c.ProcessState.ExitCode(), string(out)
	}
	status, out := asAdministrator("deny", "--module", "vision", "--json")
	var rule api.DenyAnswer
	if err := json.Unmarshal([]byte(out), &rule); status != 0 || err != nil ||
		!strings.HasPrefix(rule.By, "uid 65534 ") {
		t.Fatalf("%d %s %v", status, out, err)
	}
	for _, args := range [][]string{{"deny", "lift", "--from-hub"}, {"deny", "heed-hub"}, {"deny", "forget-lost"}} {
		want := "for root on this device, and not from a container or a pid namespace of its own: sudo perceptctl " +
			strings.Join(args, " ")
		if status, out := asAdministrator(args...); status != 4 || !strings.Contains(out, want) {
			t.Errorf("%v: %d %s", args, status, out)
		}
	}
	if s := d.Status(t); !s.Deny.HubSetAsideOn.IsZero() {
		t.Error("the hub is set aside")
	}
	if status, out := asAdministrator("deny", "lift", rule.ID); status != 0 {
		t.Errorf("lifting: %d %s", status, out)
	}
	out, err := d.Tool(t, "deny", "lift", "--from-hub")
	if s := d.Status(t); err != nil || s.Deny.HubSetAsideOn.IsZero() ||
		!strings.HasPrefix(out, "set aside: what IoT Hub") {
		t.Errorf("by root: %s %v", out, err)
	}
	if out, err := d.Tool(t, "deny", "heed-hub"); err != nil || !strings.HasPrefix(out, "heeded: ") {
		t.Errorf("by root: %s %v", out, err)
	}
	for _, want := range []string{"IoT Hub sets is set aside", `"by": "uid 0 (pid `, "IoT Hub sets is heeded again"} {
		if !strings.Contains(d.Text(), want) {
			t.Errorf("the log lacks %s", want)
		}
	}
}

// TestLostDenyRulesByHand shows that a spoilt record of deny rules has every request refused, that doctor names the
// command which ends that, and that the command does.
func TestLostDenyRulesByHand(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("needs root: the command is for root")
	}
	d := harness.LaunchDaemon(t, harness.SimulatedFor("vision"))
	d.AwaitReady(t)
	_, err := d.Tool(t, "deny", "--module", "vision")
	harness.Must(t, err)
	d.Stop(t)
	files, err := filepath.Glob(filepath.Join(d.StateDir(), "deny-rules*.json"))
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, file := range files {
		harness.Must(t, os.WriteFile(file, []byte("spoilt"), 0o600))
	}
	d = d.Restart(t)
	for _, socket := range []string{d.Module("vision"), d.Token()} {
		status, body, err := d.Get(socket, harness.VaultToken)
		if err != nil || status != 503 || !strings.Contains(body, string(api.CodeDenyRulesLost)) {
			t.Errorf("%s: %d %s %v", socket, status, body, err)
		}
	}
	if out, _ := d.Tool(t, "doctor"); !strings.Contains(out, "FAIL  deny rules: every request is refused: ") ||
		!strings.Contains(strings.Join(strings.Fields(out), " "), "perceptctl deny forget-lost") {
		t.Errorf("%s", out)
	}
	if out, err := d.Tool(t, "deny"); err == nil || !strings.HasPrefix(out, "refused: every request: ") {
		t.Errorf("%s %v", out, err)
	}
	out, err := d.Tool(t, "deny", "--identity", "vision") // what is to stay denied is denied again first
	if err != nil {
		t.Errorf("%s %v", out, err)
	}
	if out, err = d.Tool(t, "deny", "forget-lost"); err != nil || !strings.HasPrefix(out, "ended: ") {
		t.Errorf("%s %v", out, err)
	}
	served := func(when string) {
		t.Helper()
		for socket, want := range map[string]int{d.Module("vision"): 403, d.Token(): 200} {
			if status, body, err := d.Get(socket, harness.VaultToken); err != nil || status != want {
				t.Errorf("%s: %s: %d %s %v, want %d", when, socket, status, body, err, want)
			}
		}
	}
	served("ended")
	d.Stop(t)
	d = d.Restart(t)
	served("after another restart")
}
