package daemon

import (
	"context"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"perceptd/agent/api"
	"perceptd/cmd/perceptd/e2e/harness"
)

// TestDenyByHand stops a module's tokens with perceptctl deny on every form and ends its open watch, until
// perceptctl deny lift; others are served throughout, and every screen says who is denied what.
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
	if rule.Module != "vision" || rule.Origin != api.DenyLocal || !strings.HasPrefix(rule.By, "uid ") || rule.Idle != "" {
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
	out, err = d.Tool(t, "deny", "lift", rule.ID)
	if err != nil || !strings.HasPrefix(out, "lifted: "+rule.ID+", module vision, since ") {
		t.Errorf("%s %v", out, err)
	}
	answers("lifted", d, 200)
	if out, err := d.Tool(t, "deny", "lift", rule.ID); err == nil || !strings.Contains(err.Error(), "no deny rule") {
		t.Errorf("lifted again: %s %v", out, err)
	}
}
