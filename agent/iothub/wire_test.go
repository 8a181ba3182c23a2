package iothub

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"perceptd/agent/iothub/hubtest"
	"perceptd/agent/iothub/link"
)

// wireCost is how many bytes go over TCP, TLS included, beside what a message carries.
type wireCost struct{ connection, report, change float64 }

// measureWire has a device connect to a hub, report and take changes of its desired properties.
func measureWire(t *testing.T) (cost wireCost) {
	t.Helper()
	hub, err := hubtest.Start(hubtest.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(hub.Close)
	const device, times = "percept-7", 20
	file := filepath.Join(t.TempDir(), "iothub")
	if err := os.WriteFile(file, []byte(hub.CreateDevice(device)), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, end := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(end)
	twins, changed := make(chan link.Twin, 2*times), make(chan struct{}, 1)
	l := link.New(link.Options{
		Credentials: link.SharedKeyFile{Path: file}, RootCAs: hub.RootCAs(), Address: hub.MQTTAddress(),
		Twin: func(twin link.Twin) { twins <- twin }, Patch: func(json.RawMessage, link.Identity, int64) {},
		Method: func(context.Context, link.Identity, string, json.RawMessage) (int, any) {
			return http.StatusNotFound, nil
		},
		Changed: func() { poke(changed) },
	})
	t.Cleanup(l.Close)
	next := func() (twin link.Twin) {
		select {
		case twin = <-twins:
		case <-ctx.Done():
			t.Fatal(ctx.Err(), l.Status().LastError)
		}
		return twin
	}
	beside := func() float64 {
		c := hub.Counters(device)
		return float64(c.BytesIn + c.BytesOut - int64(c.TwinReads.Bytes+c.Reported.Bytes+c.Notifications.Bytes))
	}
	next()
	for !l.Status().Connected {
		select {
		case <-changed:
		case <-ctx.Done():
			t.Fatal(ctx.Err(), l.Status().LastError)
		}
	}
	cost.connection = beside()
	for n := range times {
		if _, err := l.Report(ctx, json.RawMessage(fmt.Sprintf(`{"percept":{"version":"%d"}}`, n))); err != nil {
			t.Fatal(err)
		}
	}
	reported := beside()
	cost.report = (reported - cost.connection) / times
	for n := range times {
		version, err := hub.UpdateDesired(device, []byte(fmt.Sprintf(`{"percept":{"other":%d}}`, n)))
		if err != nil {
			t.Fatal(err)
		}
		for next().DesiredVersion < version {
		}
	}
	cost.change = (beside() - reported) / times
	return cost
}

// What docs/fleet.md says that goes over the wire beside messages is so. Signatures and names differ in length.
func TestWireCost(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../../docs/fleet.md")
	if err != nil {
		t.Fatal(err)
	}
	cost := measureWire(t)
	for _, row := range []struct {
		name string
		cost float64
	}{
		{"a connection, beside the twin that is read", cost.connection},
		{"a report, beside its patch", cost.report},
		{"a change of desired properties, beside its notification and the twin", cost.change},
	} {
		found := regexp.MustCompile(`\| ` + row.name + ` \| ([0-9.]+) KB \|`).FindStringSubmatch(string(text))
		if found == nil {
			t.Errorf("docs/fleet.md has no row %q, which costs %.1f KB", row.name, row.cost/1024)
			continue
		}
		said, _ := strconv.ParseFloat(found[1], 64)
		if off := row.cost/1024 - said; max(off, -off) > max(0.1, said/10) {
			t.Errorf("%s costs %.2f KB, and not %s", row.name, row.cost/1024, strings.TrimSpace(found[1]))
		}
	}
}
