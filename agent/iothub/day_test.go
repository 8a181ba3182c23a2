package iothub

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/grants"
	"perceptd/agent/simulator"
	"perceptd/tokencache"
)

// day is what a device cost in 24 hours.
type day struct{ reports, metered, bytes int }

// runDay runs a device until all its tokens have been renewed, and then for the day that counts. It has a token for
// each of so many resources. In that day its twin may list a policy change.
func runDay(t *testing.T, tokens int, change bool) (cost day) {
	synctest.Test(t, func(t *testing.T) {
		var rules agent.Rules
		rules.Identities = []grants.Identity{{Name: "device", Default: true}}
		for i := range tokens {
			rules.Grants = append(rules.Grants, grants.Grant{Caller: grants.Match{Module: fmt.Sprintf("module-%d", i)},
				Identity: "device", Resources: []string{fmt.Sprintf("https://resource-%d.example", i)}, Prefetch: true})
		}
		backend := simulator.New(simulator.Options{Now: time.Now, Rollover: simulator.AtExpiry, Aged: 24 * time.Hour})
		fetch := func(_ context.Context, key tokencache.Key) (tokencache.Fetched, error) {
			token, err := backend.Token(simulator.Selection{By: simulator.SystemAssigned}, key.Resource)
			return tokencache.Fetched{
				Token: tokencache.Token{Text: tokencache.NewSecret(token.Text), ExpiresOn: token.ExpiresOn,
					NotBefore: token.NotBefore, Claims: tokencache.Claims{IssuedAt: token.IssuedAt}},
				Left: token.ExpiresOn.Sub(time.Now().Round(0)), Counted: true,
			}, err
		}
		changed := make(chan struct{}, 1)
		even := func() float64 { return 0.5 }
		a, err := agent.New(agent.Options{Fetch: fetch, Rules: rules, Roll: even, Changed: func() { poke(changed) }})
		if err != nil {
			t.Fatal(err)
		}
		defer a.Close()
		version := int64(0)
		var counting sync.Mutex // protects cost
		r := newReporter(reporterOptions{
			Status: func() api.Status {
				s := a.Status()
				s.Version, s.Now, s.Clock.By = "1.0.0", api.Time(time.Now()), "kernel"
				s.Source = api.SourceStatus{Kind: "managed-identity", Endpoint: "arc"}
				s.Config.SHA256 = strings.Repeat("9f2c", 16)
				s.Requests.Served = time.Now().Unix() // modules ask all the time
				return s
			},
			Send: func(_ context.Context, patch json.RawMessage) (int64, error) {
				counting.Lock()
				defer counting.Unlock()
				cost.reports++
				cost.metered += (len(patch) + 4095) / 4096
				cost.bytes += len(patch)
				version++
				return version, nil
			},
			Roll: even, Log: zap.NewNop(), Changed: func() {},
		})
		defer r.close()
		end := make(chan struct{})
		defer close(end)
		go func() {
			for {
				select {
				case <-changed:
					r.notice()
				case <-end:
					return
				}
			}
		}()
		r.connected(json.RawMessage(`{}`), 0)
		time.Sleep(30 * time.Hour)
		synctest.Wait()
		counting.Lock()
		cost = day{}
		counting.Unlock()
		if change {
			changes := []api.PolicyChangeRequest{{AllResources: true, Effect: api.EffectGranted, At: time.Now()}}
			if _, err := a.SetTwinChanges(device, changes, 2); err != nil {
				t.Fatal(err)
			}
			r.acknowledge(api.DesiredStatus{Version: 2, Applied: 2}, true)
		}
		time.Sleep(24 * time.Hour)
		synctest.Wait()
	})
	return cost
}

// What docs/fleet.md says that a device reports in a day is so.
func TestOrdinaryDay(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../../docs/fleet.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		name   string
		tokens int
		change bool
	}{
		{"4 tokens, nothing happens", 4, false},
		{"4 tokens, one policy change", 4, true},
		{"20 tokens, nothing happens", 20, false},
		{"20 tokens, one policy change", 20, true},
		{"40 tokens, one policy change", 40, true},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			cost := runDay(t, row.tokens, row.change)
			want := fmt.Sprintf("| %s | %d | %d | %.1f KB |", row.name, cost.reports, cost.metered,
				float64(cost.bytes)/1024)
			if !strings.Contains(string(text), want) {
				t.Errorf("docs/fleet.md does not have\n%s", want)
			}
		})
	}
}
