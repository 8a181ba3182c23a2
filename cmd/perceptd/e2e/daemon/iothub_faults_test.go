package daemon

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"perceptd/agent/api"
	"perceptd/cmd/perceptd/e2e/harness"
)

// A hub that is stopped, cut off, slow or refuses is shown, with its kind, and never felt; and when that is over the
// device is connected again and its twin is what it was.
func TestHubFaults(t *testing.T) {
	t.Parallel()
	for name, row := range map[string]struct {
		begin func(t *testing.T, s *site, d *harness.Daemon)
		shown func(api.HubStatus) bool
		end   func(t *testing.T, s *site, d *harness.Daemon)
	}{
		"the hub is started anew": {
			func(_ *testing.T, s *site, _ *harness.Daemon) { s.Stop() },
			func(h api.HubStatus) bool { return !h.Connected && h.LastError != "" && !h.LastErrorOn.IsZero() },
			func(t *testing.T, s *site, _ *harness.Daemon) { must(t, s.Resume()) },
		},
		"its connections are cut": {
			func(_ *testing.T, s *site, _ *harness.Daemon) { s.Faults.RefuseLogins.Store(true); s.network.drop() },
			func(h api.HubStatus) bool { return !h.Connected && h.Failure == api.HubFailureRefused },
			func(_ *testing.T, s *site, _ *harness.Daemon) { s.Faults.RefuseLogins.Store(false) },
		},
		"the network is cut without a word": {
			func(_ *testing.T, s *site, _ *harness.Daemon) { s.network.setCut(true) },
			func(h api.HubStatus) bool { return !h.Connected && h.Failure == api.HubFailureNetwork },
			func(_ *testing.T, s *site, _ *harness.Daemon) { s.network.setCut(false) },
		},
		"it refuses what is subscribed to": {
			func(_ *testing.T, s *site, _ *harness.Daemon) { s.Faults.RefuseSubscribes.Store(1 << 20); s.DropAll() },
			func(h api.HubStatus) bool { return !h.Connected && h.LastError != "" },
			func(_ *testing.T, s *site, _ *harness.Daemon) { s.Faults.RefuseSubscribes.Store(0) },
		},
		"it cuts where it should confirm": {
			func(_ *testing.T, s *site, _ *harness.Daemon) { s.Faults.CutAtSubscribe.Store(1 << 20); s.DropAll() },
			func(h api.HubStatus) bool { return !h.Connected && h.LastError != "" },
			func(_ *testing.T, s *site, _ *harness.Daemon) { s.Faults.CutAtSubscribe.Store(0) },
		},
		"the device was removed": {
			func(_ *testing.T, s *site, _ *harness.Daemon) { s.Delete("faulty") },
			func(h api.HubStatus) bool { return !h.Connected && h.Failure == api.HubFailureRefused },
			func(t *testing.T, s *site, d *harness.Daemon) { // registered anew: another key, and a twin at version 1
				s.secret(t, "faulty", s.CreateDevice("faulty"))
				if status, body, err := d.Ask(d.Admin(), "POST", api.PathReload, ""); status != 200 {
					t.Errorf("%d %s %v", status, body, err)
				}
			},
		},
		"its key is gone from the device": {
			func(t *testing.T, s *site, _ *harness.Daemon) { must(t, os.Remove(s.path("faulty"))); s.DropAll() },
			func(h api.HubStatus) bool { return !h.Connected && h.Failure == api.HubFailureCredentials },
			nil,
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t)
			key := s.CreateDevice("faulty")
			config := harness.SimulatedFor("vision") + s.byFile(t, "faulty", key) + "keep_alive = \"10s\"\n"
			d := harness.LaunchDaemon(t, config)
			awaitHub(t, d, "the connection", isConnected)
			stop := askSteadily(t, d, d.Token(), d.Module("vision"))
			row.begin(t, s, d)
			gone := awaitHub(t, d, "the fault to show", row.shown)
			if strings.Contains(fmt.Sprintf("%+v", gone), "SharedAccess") {
				t.Errorf("%+v", gone)
			}
			if row.end == nil {
				s.secret(t, "faulty", key)
			} else {
				row.end(t, s, d)
			}
			awaitHub(t, d, "the connection after it", isConnected)
			stop()
			version := s.desire(t, "faulty", map[string]any{"deny": []any{deniedModule}})
			awaitHub(t, d, "what the hub sets", func(h api.HubStatus) bool { return h.Desired.Applied == version })
			wantEverywhere(t, d, d.Module("vision"), 403)
		})
	}
}

// A twin that is not answered, and one that is throttled, keep nobody from being served; a denial does not wait for it.
func TestDenialDoesNotWaitForTheTwin(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	d := harness.LaunchDaemon(t, harness.SimulatedFor("vision", "speech")+s.byFile(t, "slow", s.CreateDevice("slow")))
	awaitHub(t, d, "the twin", func(h api.HubStatus) bool { return h.Connected && !h.Desired.ReadOn.IsZero() })
	stop := askSteadily(t, d, d.Module("speech"))
	s.Faults.DropTwinAnswers.Store(true)
	version := s.desire(t, "slow", map[string]any{"deny": []any{deniedModule}})
	wantEverywhere(t, d, d.Module("vision"), 403)
	if h := d.Status(t).Hub; h.Desired.Applied == version {
		t.Errorf("the twin was read, though it is not answered: %+v", h.Desired)
	}
	s.Faults.DropTwinAnswers.Store(false)
	s.Faults.ThrottleTwin.Store(3)
	s.DropAll()
	awaitHub(t, d, "the twin", func(h api.HubStatus) bool { return h.Desired.Applied == version })
	stop()
}

// Two devices with one identity: each connection ends the other's. Both serve, and say why they are not connected.
func TestTwoDevicesWithOneIdentity(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	config := harness.SimulatedFor() + s.byFile(t, "twice", s.CreateDevice("twice"))
	one, other := harness.LaunchDaemon(t, config), harness.LaunchDaemon(t, config)
	stop, stopOther := askSteadily(t, one, one.Token()), askSteadily(t, other, other.Token())
	for _, d := range []*harness.Daemon{one, other} {
		awaitHub(t, d, "the other to show", func(h api.HubStatus) bool { return h.LastError != "" })
	}
	stop()
	stopOther()
	other.Stop(t)
	awaitHub(t, one, "the connection", isConnected)
}

// What a twin says that it may not say is refused whole, with where and why, and what was in force stays.
func TestHostileTwins(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	config := harness.SimulatedFor("vision", "speech") + s.byFile(t, "hostile", s.CreateDevice("hostile"))
	d := harness.LaunchDaemon(t, config)
	awaitHub(t, d, "the connection", isConnected)
	version := s.desire(t, "hostile", map[string]any{"deny": []any{deniedModule}})
	awaitHub(t, d, "the denial", func(h api.HubStatus) bool { return h.Desired.Applied == version })
	stop := askSteadily(t, d, d.Token(), d.Module("speech"))
	const topic = "$iothub/twin/PATCH/properties/desired/?$version=1"
	deep := strings.Repeat(`{"a":`, 100_000) + "1" + strings.Repeat("}", 100_000)
	for _, payload := range [][]byte{ // what no hub sends
		nil, []byte("{"), []byte("[]"), []byte(`"percept"`), []byte(deep), bytes.Repeat([]byte("x"), 10<<20),
		[]byte(`{"percept":{"deny":[` + strings.Repeat(`{"all":true},`, 800_000) + `{"all":true}]}}`),
		[]byte(`{"percept":{"deny":[{"all":true}]},"$version":1}`), // an old one
	} {
		must(t, s.SendRaw("hostile", topic, payload))
	}
	for _, percept := range []any{
		"deny", 7, []any{}, map[string]any{"deny": "vision"}, map[string]any{"deny": []any{7}},
		map[string]any{"deny": []any{map[string]any{"modul": "vision"}}},
		map[string]any{"deny": []any{map[string]any{}}},
		map[string]any{"denied": []any{}}, map[string]any{"logLevel": "loud"},
		map[string]any{"policyChanges": []any{map[string]any{"resource": harness.VaultURI, "effect": "revoked"}}},
	} {
		version := s.desire(t, "hostile", nil)
		version = s.desire(t, "hostile", percept)
		refused := awaitHub(t, d, fmt.Sprintf("the refusal of %v", percept), func(h api.HubStatus) bool {
			return h.Desired.Version == version && h.Desired.Refused != "" && h.Connected
		})
		if refused.Desired.Applied >= version {
			t.Errorf("%v: %+v", percept, refused.Desired)
		}
	}
	stop()
}

// Of 200 direct methods at once each is answered, also while denials and tokens are asked for.
func TestManyMethodsAtOnce(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	d := harness.LaunchDaemon(t, harness.SimulatedFor("vision")+s.byFile(t, "busy", s.CreateDevice("busy")))
	awaitHub(t, d, "the connection", isConnected)
	s.Faults.PubackDelay.Store(int64(2 * time.Millisecond))
	stop := askSteadily(t, d, d.Token(), d.Module("vision"))
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var calling sync.WaitGroup
	for n := range 200 {
		calling.Go(func() {
			name, payload := "percept.status", []byte("{}")
			if n%2 == 1 {
				name, payload = "percept.explain", fmt.Appendf(nil, `{"resource":%q}`, harness.VaultURI)
			}
			status, answer, err := s.InvokeMethod(ctx, "busy", name, payload)
			if err != nil || status != 200 && status != 429 {
				t.Errorf("%s: %d %s %v", name, status, answer, err)
			}
		})
	}
	calling.Wait()
	stop()
	status, answer, err := s.InvokeMethod(ctx, "busy", "percept.deny", []byte(`{"module":"vision"}`))
	var denied api.DenyAnswer
	if err != nil || status != 200 || json.Unmarshal(answer, &denied) != nil || denied.Origin != api.DenyMethod {
		t.Errorf("percept.deny: %d %s %v", status, answer, err)
	}
	wantEverywhere(t, d, d.Module("vision"), 403)
}
