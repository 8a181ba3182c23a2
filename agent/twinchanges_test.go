package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"perceptd/agent/api"
	"perceptd/agent/grants"
	"perceptd/tokencache"
	"perceptd/tokencache/tokencachetest"
)

// twinAgent is an agent with two identities, of which one may have tokens of two resources, in virtual time by a clock
// that is known to be right.
func twinAgent(t *testing.T, o Options) *Agent {
	t.Helper()
	uid := uint32(1)
	o.Rules = Rules{Rules: grants.Rules{
		Identities: []grants.Identity{{Name: "edge", Default: true},
			{Name: "vision", ClientID: "00000000-0000-0000-0000-000000000001"}},
		Grants: []grants.Grant{
			{Caller: grants.Match{UID: &uid}, Identity: "edge",
				Resources: []string{"https://vault.azure.net", "api://b"}},
			{Caller: grants.Match{UID: &uid}, Identity: "vision", Resources: []string{"https://vault.azure.net"}},
		},
	}}
	if o.Fetch == nil {
		o.Fetch = func(context.Context, tokencache.Key) (tokencache.Fetched, error) {
			return tokencache.Fetched{}, errors.New("no back end")
		}
	}
	a, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(a.Close)
	return a
}

func idsOf(a *Agent) (ids []string) {
	for _, c := range a.Changes() {
		ids = append(ids, c.ID)
	}
	slices.Sort(ids)
	return ids
}

// A twin's policy changes are on record once, whatever the version, and for as long as the twin lists them.
func TestTwinChanges(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var saves atomic.Int32
		var last atomic.Pointer[tokencache.Record]
		save := func(r tokencache.Record) error { saves.Add(1); last.Store(&r); return nil }
		a := twinAgent(t, Options{SaveRecord: save})
		time.Sleep(time.Hour)
		at := time.Now().Add(-time.Minute)
		vault := api.PolicyChangeRequest{Resource: "https://VAULT.azure.net/", At: at, Effect: tokencache.Revoked,
			Note: "n"}
		all := api.PolicyChangeRequest{AllResources: true, Identity: "vision", At: at, Effect: tokencache.Granted}
		byHand, err := a.RecordChange("uid 0", api.PolicyChangeRequest{AllResources: true, Effect: tokencache.Changed})
		if err != nil {
			t.Fatal(err)
		}
		set := func(version int64, changes ...api.PolicyChangeRequest) []string {
			t.Helper()
			if err := CheckTwinChanges(changes); err != nil {
				t.Fatal(err)
			}
			idle, err := a.SetTwinChanges("hub/device", changes, version)
			if err := cmp.Or(err, a.KeepPolicyChanges()); err != nil {
				t.Fatal(err)
			}
			return idle
		}
		want := slices.Sorted(slices.Values([]string{byHand.ID, twinID(vault), twinID(all)}))
		for version := range int64(3) {
			if idle := set(version, vault, all, vault); len(idle) > 0 || !slices.Equal(idsOf(a), want) {
				t.Errorf("version %d: %q, idle %q", version, idsOf(a), idle)
			}
		}
		saved := saves.Load()
		set(4, vault, all)
		if saves.Load() != saved {
			t.Error("what is on record already was saved once more")
		}
		for _, c := range a.Changes() {
			if c.ID == twinID(vault) && (c.Resource != "https://vault.azure.net" || c.Effect != tokencache.Revoked ||
				!c.At.Equal(at) || c.Note != "n") {
				t.Errorf("%+v", c)
			}
		}
		if _, err := a.WithdrawChange("uid 0", twinID(vault)); err == nil ||
			!strings.Contains(err.Error(), "take it out of percept.policyChanges there") {
			t.Errorf("withdrawn on the device: %v", err)
		}

		again := twinAgent(t, Options{Record: last.Load(), SaveRecord: save})
		if !slices.Equal(idsOf(again), want) {
			t.Errorf("after a restart: %q", idsOf(again))
		}
		a = again
		set(5, all)
		if want := slices.Sorted(slices.Values([]string{byHand.ID, twinID(all)})); !slices.Equal(idsOf(a), want) {
			t.Errorf("one is listed no more: %q", idsOf(a))
		}
		set(6)
		if !slices.Equal(idsOf(a), []string{byHand.ID}) {
			t.Errorf("none is listed: %q", idsOf(a))
		}
	})
}

// What concerns nothing here is said, and keeps nothing else from being in force: a fleet has one twin for many.
func TestIdleTwinChanges(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		a := twinAgent(t, Options{})
		now := time.Now()
		idle, err := a.SetTwinChanges("hub/device", []api.PolicyChangeRequest{
			{Resource: "api://elsewhere", At: now, Effect: tokencache.Revoked},
			{Resource: "api://b", Identity: "speech", At: now, Effect: tokencache.Revoked},
			{Resource: "api://b", At: now.Add(-4 * 24 * time.Hour), Effect: tokencache.Revoked},
			{Resource: "api://b", At: now, Effect: tokencache.Granted},
		}, 1)
		if err != nil || len(a.Changes()) != 1 {
			t.Errorf("%v, %+v", err, a.Changes())
		}
		for i, says := range []string{`policyChanges[0]: no grant names resource api://elsewhere`,
			`policyChanges[1]: no [[identity]] of the configuration is named "speech"`,
			"policyChanges[2]: it is over"} {
			if len(idle) != 3 || !strings.HasPrefix(idle[i], says) {
				t.Errorf("%q, want %s", idle, says)
			}
		}
		// Over since it was recorded, and still listed: it is not on record again.
		time.Sleep(4 * 24 * time.Hour)
		if err := a.Ping(t.Context()); err != nil { // the cache looks at its record, as it does every few minutes
			t.Fatal(err)
		}
		synctest.Wait()
		for range 2 {
			_, err := a.SetTwinChanges("hub/device", []api.PolicyChangeRequest{{Resource: "api://b", At: now,
				Effect: tokencache.Granted}}, 2)
			if err != nil || len(a.Changes()) != 0 {
				t.Errorf("%v, %+v", err, a.Changes())
			}
		}
	})
}

// When a change on record is over the cache says, by all clocks that count. That the wall clock was moved ends none
// that the twin still lists.
func TestTwinChangeIsNotEndedByAWallClock(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		clock := new(tokencachetest.Clock)
		a := twinAgent(t, Options{Clock: clock.AfterUptime()})
		revoked := []api.PolicyChangeRequest{{AllResources: true, At: time.Now(), Effect: tokencache.Revoked}}
		if _, err := a.SetTwinChanges("hub/device", revoked, 1); err != nil {
			t.Fatal(err)
		}
		clock.Set(-10*24*time.Hour, true)
		idle, err := a.SetTwinChanges("hub/device", revoked, 2)
		if err != nil || len(idle) > 0 || len(a.Changes()) != 1 {
			t.Errorf("%v, idle %q, on record %+v", err, idle, a.Changes())
		}
		// One of that date that is not on record is over, as far as is known.
		earlier := append(revoked, api.PolicyChangeRequest{Resource: "api://b", At: revoked[0].At,
			Effect: tokencache.Granted})
		if idle, err := a.SetTwinChanges("hub/device", earlier, 3); err != nil || len(idle) != 1 ||
			len(a.Changes()) != 1 {
			t.Errorf("%v, idle %q, on record %+v", err, idle, a.Changes())
		}
	})
}

// Changes of which one cannot be recorded are not in force, whole.
func TestTwinChangesAreRefusedWhole(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		a := twinAgent(t, Options{})
		now := time.Now()
		before := api.PolicyChangeRequest{Resource: "api://b", At: now, Effect: tokencache.Changed}
		if _, err := a.SetTwinChanges("hub/device", []api.PolicyChangeRequest{before}, 1); err != nil {
			t.Fatal(err)
		}
		_, err := a.SetTwinChanges("hub/device", []api.PolicyChangeRequest{
			{AllResources: true, At: now, Effect: tokencache.Revoked},
			{Resource: "api://b", At: now.Add(time.Hour), Effect: tokencache.Revoked},
			{Resource: "https://vault.azure.net", At: now, Effect: tokencache.Revoked},
		}, 2)
		if err == nil || !strings.Contains(err.Error(), "policyChanges[1]: it is dated 1h0m0s ahead") ||
			!slices.Equal(idsOf(a),
				[]string{twinID(before)}) {
			t.Errorf("%v, %q", err, idsOf(a))
		}
	})
}

func TestTwinChangeFaults(t *testing.T) {
	t.Parallel()
	at := time.Date(2026, 11, 28, 8, 0, 0, 0, time.UTC)
	good := api.PolicyChangeRequest{Resource: "api://b", At: at, Effect: tokencache.Revoked}
	with := func(change func(*api.PolicyChangeRequest)) []api.PolicyChangeRequest {
		bad := good
		change(&bad)
		return []api.PolicyChangeRequest{good, bad}
	}
	for name, row := range map[string]struct {
		all  []api.PolicyChangeRequest
		says string
	}{
		"none":     {nil, ""},
		"a few":    {[]api.PolicyChangeRequest{good, good}, ""},
		"too many": {make([]api.PolicyChangeRequest, MaxTwinChanges+1), "policyChanges lists 101: at most 100 can be"},
		"no time": {with(func(c *api.PolicyChangeRequest) { c.At = time.Time{} }),
			"policyChanges[1]: its time is missing"},
		"no effect": {with(func(c *api.PolicyChangeRequest) { c.Effect = "" }), "policyChanges[1]: the effect of"},
		"lost": {with(func(c *api.PolicyChangeRequest) { c.Effect = tokencache.Unknown }),
			"policyChanges[1]: the effect of"},
		"about nothing": {with(func(c *api.PolicyChangeRequest) { c.Resource = "" }),
			"policyChanges[1]: a policy change names a resource"},
		"no resource": {with(func(c *api.PolicyChangeRequest) { c.Resource = "vault" }), "policyChanges[1]: "},
		"a note of two lines": {with(func(c *api.PolicyChangeRequest) { c.Note = "a\nb" }),
			"policyChanges[1]: the note has a character"},
	} {
		if err := CheckTwinChanges(row.all); (err == nil) != (row.says == "") ||
			!strings.Contains(fmt.Sprint(err), row.says) &&
				err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// What a twin lists stays on record while faults keep it from being known what it is about.
func TestTwinChangesStayWhileRulesAreFaulty(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		a := twinAgent(t, Options{})
		whole := a.rules.Load().Rules
		at := time.Now()
		listed := []api.PolicyChangeRequest{
			{Identity: "vision", Resource: "https://vault.azure.net", At: at, Effect: tokencache.Revoked},
			{Resource: "api://b", At: at, Effect: tokencache.Revoked},
		}
		if idle, err := a.SetTwinChanges("hub", listed, 1); err != nil || len(idle) > 0 {
			t.Fatal(idle, err)
		}
		before := idsOf(a)
		for name, change := range map[string]func(*Rules){
			"no configuration": func(r *Rules) { *r = Rules{NoRules: "it cannot be read"} },
			"an identity whose name is not understood": func(r *Rules) {
				r.Identities = []grants.Identity{r.Identities[0], {Fault: "x"}}
			},
			"a faulty identity": func(r *Rules) {
				r.Identities = []grants.Identity{r.Identities[0], {Name: "vision", Fault: "x"}}
			},
			"a grant whose resources are not understood": func(r *Rules) {
				r.Grants = []grants.Grant{{Caller: r.Grants[0].Caller, Fault: "x", AnyResource: true}}
			},
		} {
			rules := whole
			change(&rules)
			if _, err := a.Apply(rules); err != nil {
				t.Fatal(err)
			}
			idle, err := a.SetTwinChanges("hub", listed, 2)
			if err != nil || len(idle) > 0 || !slices.Equal(idsOf(a), before) {
				t.Errorf("%s: %v, idle %q, on record %q, before %q", name, err, idle, idsOf(a), before)
			}
			more := append(slices.Clone(listed), api.PolicyChangeRequest{Identity: "vision",
				Resource: "https://vault.azure.net", At: at.Add(time.Second), Effect: tokencache.Revoked})
			if idle, err := a.SetTwinChanges("hub", more, 3); name == "a faulty identity" &&
				(err != nil || len(idle) != 1 || !strings.Contains(idle[0], "is faulty")) {
				t.Errorf("%s: one more: %v, idle %q", name, err, idle)
			}
			if _, err := a.SetTwinChanges("hub", listed, 4); err != nil {
				t.Fatal(err)
			}
		}
		without := whole
		without.Identities, without.Grants = without.Identities[:1], without.Grants[:1]
		if _, err := a.Apply(without); err != nil {
			t.Fatal(err)
		}
		if idle, err := a.SetTwinChanges("hub", listed, 5); err != nil || len(idle) != 1 || len(idsOf(a)) != 1 {
			t.Errorf("without that identity, by sound rules: %v, idle %q, on record %q", err, idle, idsOf(a))
		}
	})
}

// What a twin has prefetched is beside what is configured, also after a reload, and never more than grants allow.
func TestTwinPrefetch(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		a := twinAgent(t, Options{})
		prefetched := func() (names []string) {
			for _, s := range a.cache.Status() {
				if s.Prefetch {
					names = append(names, a.rules.Load().IdentityOf(s.Key).Name+" "+s.Key.Resource)
				}
			}
			return slices.Sorted(slices.Values(names))
		}
		idle, err := a.SetPrefetch([]api.PrefetchRequest{{Resource: "https://vault.azure.net/"}, {Resource: "api://b"},
			{Resource: "api://b", Identity: "vision"}, {Resource: "api://c"},
			{Resource: "api://b", Identity: "speech"}})
		want := []string{"edge api://b", "edge https://vault.azure.net", "vision https://vault.azure.net"}
		if err != nil || len(idle) != 3 || !slices.Equal(prefetched(), want) {
			t.Errorf("%v, idle %q, prefetched %q", err, idle, prefetched())
		}
		if _, err := a.Apply(a.rules.Load().Rules); err != nil || !slices.Equal(prefetched(), want) {
			t.Errorf("after a reload: %v, %q", err, prefetched())
		}
		without := a.rules.Load().Rules
		without.Grants = without.Grants[:1]
		if _, err := a.Apply(without); err != nil || !slices.Equal(prefetched(), want[:2]) {
			t.Errorf("a grant is gone: %v, %q", err, prefetched())
		}
		if _, err := a.SetPrefetch(nil); err != nil || len(prefetched()) > 0 {
			t.Errorf("none: %v, %q", err, prefetched())
		}
	})
}
