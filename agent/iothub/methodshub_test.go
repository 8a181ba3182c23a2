package iothub

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/iothub/hubtest"
	"perceptd/agent/iothub/link"
	"perceptd/tokencache/tokencachetest"
)

// connectedHub returns a hub to which an agent with such a source is connected as percept-7. The agent has asked for each
// of its tokens. ctx ends before the test would.
func connectedHub(t *testing.T, source *tokencachetest.Source, events bool) (ctx context.Context, hub *hubtest.Hub) {
	t.Helper()
	hub, err := hubtest.Start(hubtest.Options{Logf: t.Logf})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(hub.Close)
	fetched := make(chan struct{}, 100)
	a, err := agent.New(agent.Options{Fetch: source.Fetch, Rules: edge(), Changed: func() { poke(fetched) }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(a.Close)
	for slices.ContainsFunc(a.Status().Tokens, func(token api.TokenStatus) bool { return token.LastOutcome == "" }) {
		<-fetched
	}
	connection := hub.CreateDevice("percept-7")
	h := New(Options{
		Link: link.Options{
			Credentials: link.SharedKeyFile{Read: func(string) ([]byte, error) { return []byte(connection), nil }},
			Address:     hub.MQTTAddress(), RootCAs: hub.RootCAs(),
		},
		Agent: a, Status: a.Status, Level: zap.NewAtomicLevel(), Log: zap.NewNop(), Events: events,
	})
	t.Cleanup(h.Close)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	if err := hub.WaitListening(ctx, "percept-7"); err != nil {
		t.Fatal(err)
	}
	return ctx, hub
}

// 200 calls at once are all answered, also while the hub is slow to acknowledge, and the device is there afterwards.
func TestManyMethodsAtOnce(t *testing.T) {
	t.Parallel()
	ctx, hub := connectedHub(t, &tokencachetest.Source{}, false)
	hub.Faults.PubackDelay.Store(int64(time.Millisecond))
	var all sync.WaitGroup
	for range 200 {
		all.Go(func() {
			status, answer, err := hub.InvokeMethod(ctx, "percept-7", "percept.status", nil)
			var got api.StatusAnswer
			if err != nil || status != 200 || json.Unmarshal(answer, &got) != nil || len(got.Tokens) != 3 {
				t.Errorf("%d %.200s %v", status, answer, err)
			}
		})
	}
	all.Wait()
	status, answer, err := hub.InvokeMethod(ctx, "percept-7", "Percept.Unknown", []byte(`{"a":[1]}`))
	if err != nil || status != 404 || !strings.Contains(string(answer), `"code":"unknown_method"`) {
		t.Errorf("%d %s %v", status, answer, err)
	}
	if n := hub.Counters("percept-7").Connects; n != 1 {
		t.Errorf("%d connections", n)
	}
}

// Events reach the hub, each in its turn, with the properties by which they are routed.
func TestEventsReachTheHub(t *testing.T) {
	t.Parallel()
	ctx, hub := connectedHub(t, &tokencachetest.Source{Err: errors.New("no answer")}, true)
	if err := hub.WaitEvents(ctx, "percept-7", func(all []hubtest.Event) bool { return len(all) == 3 }); err != nil {
		t.Fatal(err)
	}
	about := make(map[string]bool)
	for _, e := range hub.Events("percept-7") {
		var body api.HubEvent
		if err := json.Unmarshal(e.Body, &body); err != nil {
			t.Fatal(err)
		}
		p := e.Properties
		if body.Type != api.HubEventTokenTrouble || p["type"] != string(body.Type) || p["severity"] != "error" ||
			p["identity"] != body.Identity || p["resource"] != body.Resource || p["$.ct"] != "application/json" ||
			p["$.ce"] != "utf-8" || p["$.ctime"] == "" || p["$.mid"] == "" {
			t.Errorf("%s with %v", e.Body, p)
		}
		about[body.Identity+body.Resource+p["$.mid"]] = true
	}
	if len(about) != 3 {
		t.Errorf("%v", about)
	}
}
