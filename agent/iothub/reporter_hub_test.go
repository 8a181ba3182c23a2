package iothub

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/zap"

	"perceptd/agent/api"
	"perceptd/agent/iothub/hubtest"
	"perceptd/agent/iothub/link"
)

// onHub is a reporter on a link to a hub on loopback.
type onHub struct {
	*reporter
	hub *hubtest.Hub
	ctx context.Context
}

// reportTo starts a reporter for a device of a hub that has these reported properties already.
func reportTo(t *testing.T, has string, status func() api.Status) onHub {
	t.Helper()
	hub, err := hubtest.Start(hubtest.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(hub.Close)
	file := filepath.Join(t.TempDir(), "iothub")
	if err := os.WriteFile(file, []byte(hub.CreateDevice("cam")), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, end := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(end)
	connected, changed := make(chan link.Twin, 16), make(chan struct{}, 1)
	l := link.New(link.Options{
		Credentials: link.SharedKeyFile{Path: file}, RootCAs: hub.RootCAs(), Address: hub.MQTTAddress(),
		MaxBackoff: 50 * time.Millisecond, Twin: func(twin link.Twin) { connected <- twin },
		Patch: func(json.RawMessage, link.Identity, int64) {},
		Method: func(context.Context, link.Identity, string, json.RawMessage) (int, any) {
			return http.StatusNotFound, nil
		},
		Changed: func() { poke(changed) },
	})
	t.Cleanup(l.Close)
	for !l.Status().Connected {
		select {
		case <-changed:
		case <-ctx.Done():
			t.Fatal(ctx.Err(), l.Status().LastError)
		}
	}
	if _, err := l.Report(ctx, json.RawMessage(has)); err != nil { // as an earlier version did
		t.Fatal(err)
	}
	h := onHub{hub: hub, ctx: ctx, reporter: newReporter(reporterOptions{
		Status: status, Send: l.Report, Every: 10 * time.Millisecond, Spread: time.Nanosecond,
		Log: zap.NewNop(), Changed: func() {},
	})}
	t.Cleanup(h.close)
	read := make(chan struct{})
	t.Cleanup(func() { <-read })
	go func() {
		defer close(read)
		for {
			select {
			case twin := <-connected:
				h.connected(twin.Reported, twin.ReportedVersion)
			case <-ctx.Done():
				return
			}
		}
	}()
	t.Cleanup(end)
	hub.Drop("cam") // so that the twin is read
	return h
}

// What an earlier version left in the twin goes, and what others of the device report there stays. A hub that is busy,
// fails and drops the connection has it in the end.
func TestReportsToAHub(t *testing.T) {
	t.Parallel()
	status := func() api.Status {
		return api.Status{
			Version: "2", Now: time.Now(), Config: api.ConfigStatus{SHA256: "abc"},
			Tokens: []api.TokenStatus{token("device", "https://vault.azure.net")},
		}
	}
	h := reportTo(t, `{"percept":{"schema":0,"old":{"a":1},"source":"x","tokens":[]},"firmware":{"version":7}}`, status)
	h.hub.Faults.ThrottleTwin.Store(1)
	has := func(version int64) func(map[string]any) bool {
		return func(reported map[string]any) bool {
			percept, _ := reported["percept"].(map[string]any)
			desired, _ := percept["desired"].(map[string]any)
			tokens, _ := percept["tokens"].([]any)
			_, old := percept["old"]
			_, others := reported["firmware"]
			return !old && others && percept["version"] == "2" && len(tokens) == 1 &&
				fmt.Sprint(desired["version"]) == fmt.Sprint(version)
		}
	}
	h.acknowledge(api.DesiredStatus{Version: 3, Applied: 3}, true)
	if err := h.hub.WaitReported(h.ctx, "cam", has(3)); err != nil {
		t.Fatalf("%v: the hub has %v", err, h.hub.Reported("cam"))
	}
	h.hub.Faults.FailTwin.Store(1)
	h.acknowledge(api.DesiredStatus{Version: 4, Applied: 4}, true)
	h.hub.Drop("cam")
	if err := h.hub.WaitReported(h.ctx, "cam", has(4)); err != nil {
		t.Fatalf("%v: the hub has %v", err, h.hub.Reported("cam"))
	}
	if reported := h.hub.Counters("cam").Reported; reported.Messages > 6 {
		t.Errorf("%d reports were sent", reported.Messages)
	}
}
