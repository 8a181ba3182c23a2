package daemon

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"perceptd/agent/api"
	"perceptd/cmd/perceptd/e2e/harness"
)

// wantEverywhere waits until a socket answers each form so. Denials say by their code that they are no missing grant.
func wantEverywhere(t *testing.T, d *harness.Daemon, socket string, want int) {
	t.Helper()
	for form, path := range forms {
		var status int
		var body string
		harness.Until(t, fmt.Sprintf("%d in the form %s", want, form), d.Ended, func() bool {
			var err error
			status, body, err = d.Get(socket, path)
			return err == nil && status == want
		})
		if want == 403 && form == "own" && !strings.Contains(body, string(api.CodeDenied)) {
			t.Errorf("%s: %s", form, body)
		}
	}
}

// deniedModule is what a twin and a method say.
var deniedModule = map[string]any{"module": "vision", "note": "camera was stolen"}

// A denial by the twin stops a module's tokens in each form and on each socket, ends its streams,
// and ends when the twin no longer says so; no other caller notices any of it.
func TestDenyByTheTwin(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	address := harness.FreeAddress(t)
	config := harness.WithLoopback(harness.SimulatedFor("vision", "speech"), address) +
		s.byFile(t, "deny", s.CreateDevice("deny"))
	d := harness.LaunchDaemon(t, config)
	awaitHub(t, d, "the connection", isConnected)
	stop := askSteadily(t, d, d.Token(), d.Module("speech"))
	wantEverywhere(t, d, d.Module("vision"), 200)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	events := watch(ctx, t, harness.Over(t, d.Module("vision")), api.PathWatch+"?resource="+harness.VaultURI)
	secret := harness.ValueOf(d.Env(t, "--module", "vision"), "IDENTITY_HEADER")

	version := s.desire(t, "deny", map[string]any{"deny": []any{deniedModule}})
	wantEverywhere(t, d, d.Module("vision"), 403)
	if status, body, err := askTCP(t, address, secret); status != 403 {
		t.Errorf("on loopback: %d %s %v", status, body, err)
	}
	await(t, events, "the end of the stream", func(e watched) bool { return e.name == api.EventEnded })
	rule := onlyRule(t, d)
	if rule.Origin != api.DenyTwin || rule.Module != "vision" || rule.Twin != version || rule.Since.IsZero() ||
		rule.Note != "camera was stolen" {
		t.Errorf("%+v", rule)
	}
	s.awaitReported(t, d, "deny", "the denial", func(percept map[string]any) bool {
		summary, _ := percept["summary"].(map[string]any)
		return fmt.Sprint(summary["denied"]) == "1"
	})
	stop()

	stop = askSteadily(t, d, d.Token(), d.Module("speech"))
	s.desire(t, "deny", map[string]any{"deny": nil})
	wantEverywhere(t, d, d.Module("vision"), 200)
	stop()
}

// onlyRule returns the only deny rule that there is.
func onlyRule(t *testing.T, d *harness.Daemon) api.DenyRule {
	t.Helper()
	status := d.Status(t)
	if status.Deny == nil || len(status.Deny.Rules) != 1 {
		t.Fatalf("%+v", status.Deny)
	}
	return status.Deny.Rules[0]
}

// A denial by a method holds like one by the twin, and is lifted by a method alone; a person's is a person's.
func TestDenyByMethod(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	config := harness.SimulatedFor("vision", "speech") + s.byFile(t, "method", s.CreateDevice("method"))
	d := harness.LaunchDaemon(t, config)
	awaitHub(t, d, "the connection", isConnected)
	stop := askSteadily(t, d, d.Token(), d.Module("speech"))
	byMethod := s.deny(t, "method", deniedModule, 200)
	wantEverywhere(t, d, d.Module("vision"), 403)
	if rule := onlyRule(t, d); rule.ID != byMethod.ID || rule.Origin != api.DenyMethod || rule.Twin != 0 {
		t.Errorf("%+v", rule)
	}
	if _, err := d.Tool(t, "deny", "lift", byMethod.ID); err == nil {
		t.Error("a person on the device has lifted what the hub set")
	}
	stop()
	_, err := d.Tool(t, "deny", "--module", "speech")
	must(t, err)
	wantEverywhere(t, d, d.Module("speech"), 403)
	var local api.DenyRule
	for _, rule := range d.Status(t).Deny.Rules {
		if rule.Origin == api.DenyLocal {
			local = rule
		}
	}
	s.deny(t, "method", map[string]any{"lift": local.ID}, 400)

	s.deny(t, "method", map[string]any{"lift": byMethod.ID}, 200)
	wantEverywhere(t, d, d.Module("vision"), 200)
	wantEverywhere(t, d, d.Module("speech"), 403)
	_, err = d.Tool(t, "deny", "lift", local.ID)
	must(t, err)
	wantEverywhere(t, d, d.Module("speech"), 200)
}

// deny calls percept.deny, and returns the rule that its answer is about.
func (s *site) deny(t *testing.T, id string, what map[string]any, want int) (rule api.DenyRule) {
	t.Helper()
	text, err := json.Marshal(what)
	must(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	status, answer, err := s.InvokeMethod(ctx, id, api.MethodDeny, text)
	if err != nil || status != want {
		t.Fatalf("%s of %s: %d %s %v", api.MethodDeny, text, status, answer, err)
	}
	if want == 200 {
		must(t, json.Unmarshal(answer, &rule))
	}
	return rule
}

// Root on the device sets aside what the hub says, which the hub is told; whoever is not root cannot.
func TestHubIsSetAside(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("needs root: only root sets the hub aside")
	}
	s := newSite(t)
	d := harness.LaunchDaemon(t, harness.SimulatedFor("vision")+s.byFile(t, "stolen", s.CreateDevice("stolen")))
	awaitHub(t, d, "the connection", isConnected)
	s.desire(t, "stolen", map[string]any{"deny": []any{map[string]any{"all": true}}})
	wantEverywhere(t, d, d.Token(), 403)
	wantEverywhere(t, d, d.Module("vision"), 403)
	setAside := func(percept map[string]any) bool {
		summary, _ := percept["summary"].(map[string]any)
		return summary["setAside"] == true
	}
	_, err := d.Tool(t, "deny", "lift", "--from-hub")
	must(t, err)
	wantEverywhere(t, d, d.Token(), 200)
	wantEverywhere(t, d, d.Module("vision"), 200)
	s.awaitReported(t, d, "stolen", "that it is set aside", setAside)
	version := s.desire(t, "stolen", map[string]any{"deny": []any{deniedModule}})
	awaitHub(t, d, "the next version", func(h api.HubStatus) bool { return h.Desired.Version == version })
	wantEverywhere(t, d, d.Module("vision"), 200)
	if on := d.Status(t).Deny.HubSetAsideOn; on.IsZero() {
		t.Error("the status does not say that the hub is set aside")
	}
	_, err = d.Tool(t, "deny", "heed-hub")
	must(t, err)
	wantEverywhere(t, d, d.Module("vision"), 403)
	wantEverywhere(t, d, d.Token(), 200)
}

// What the hub denies, by twin and by method, and that root has set it aside, outlive a stop, a crash and an upgrade on
// which there is no hub.
func TestDenialsOutliveRestarts(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	d := harness.LaunchDaemon(t, harness.SimulatedFor("vision", "speech")+s.byFile(t, "kept", s.CreateDevice("kept")))
	awaitHub(t, d, "the connection", isConnected)
	s.desire(t, "kept", map[string]any{"deny": []any{deniedModule}})
	wantEverywhere(t, d, d.Module("vision"), 403)
	byMethod := s.deny(t, "kept", map[string]any{"module": "speech"}, 200)
	wantEverywhere(t, d, d.Module("speech"), 403)
	s.Stop()
	for _, end := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL, syscall.SIGTERM} {
		must(t, d.Cmd.Process.Signal(end))
		<-d.Ended
		d.Again(t)
		wantEverywhere(t, d, d.Module("vision"), 403)
		wantEverywhere(t, d, d.Module("speech"), 403)
		wantEverywhere(t, d, d.Token(), 200)
	}
	must(t, s.Resume())
	awaitHub(t, d, "the connection", isConnected)
	s.deny(t, "kept", map[string]any{"lift": byMethod.ID}, 200)
	wantEverywhere(t, d, d.Module("speech"), 200)
	if os.Getuid() != 0 {
		return // only root sets the hub aside
	}
	_, err := d.Tool(t, "deny", "lift", "--from-hub")
	must(t, err)
	wantEverywhere(t, d, d.Module("vision"), 200)
	d.Stop(t)
	d.Again(t)
	wantEverywhere(t, d, d.Module("vision"), 200)
	if d.Status(t).Deny.HubSetAsideOn.IsZero() {
		t.Error("after a restart the status does not say that the hub is set aside")
	}
}
