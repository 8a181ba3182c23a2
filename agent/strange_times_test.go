package agent_test

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/store"
	"perceptd/tokencache"
)

// A time that an answer tells and no issuer means keeps nothing else from being kept or told: neither a policy change,
// nor the tokens, nor the status.
func TestStrangeTimesInAnAnswer(t *testing.T) {
	t.Parallel()
	for _, year := range []int{1969, 2200, 12000} {
		strange := time.Date(year, 6, 1, 0, 0, 0, 0, time.UTC)
		for what, put := range map[string]func(f *tokencache.Fetched){
			"expires_on": func(f *tokencache.Fetched) { f.Token.ExpiresOn = strange },
			"alone":      func(f *tokencache.Fetched) { f.Token.ExpiresOn, f.Counted = strange, false },
			"not_before": func(f *tokencache.Fetched) { f.Token.NotBefore = strange },
			"iat":        func(f *tokencache.Fetched) { f.Token.Claims.IssuedAt = strange },
			"nbf":        func(f *tokencache.Fetched) { f.Token.Claims.NotBefore = strange },
		} {
			for _, vouched := range []bool{false, true} {
				dir := t.TempDir()
				t.Run(fmt.Sprintf("%s in %d, vouched %v", what, year, vouched), func(t *testing.T) {
					t.Parallel()
					synctest.Test(t, func(t *testing.T) {
						s := new(shelf)
						record := store.OpenPolicyChanges(store.Disk(dir), func() time.Duration { return time.Minute })
						a, err := agent.New(agent.Options{
							Rules: edge(), BootID: "b", SaveRecord: record.Save,
							Clock: tokencache.Clock{Synchronised: func() bool { return vouched }},
							Fetch: func(_ context.Context, key tokencache.Key) (tokencache.Fetched, error) {
								f := tokencache.Fetched{Counted: true, Left: 24 * time.Hour, Token: tokencache.Token{
									Text: tokencache.NewSecret(fmt.Sprintf("canary-%s-%d", key.Resource,
										time.Now().UnixNano())), ExpiresOn: time.Now().Round(0).Add(24 * time.Hour),
								}}
								put(&f)
								return f, nil
							},
							Persistence: s.keeping(),
						})
						if err != nil {
							t.Fatal(err)
						}
						defer a.Close()
						mustHave(t, a)
						if _, err := a.RecordChange("test",
							api.PolicyChangeRequest{AllResources: true, Effect: tokencache.Changed}); err != nil {
							t.Error(err)
						}
						time.Sleep(25 * time.Hour)
						mustHave(t, a)
						if got, err := store.OpenPolicyChanges(store.Disk(dir),
							func() time.Duration { return time.Minute }).Load(); err != nil || len(got.Changes) != 1 {
							t.Errorf("%v, %+v is on the disk", err, got)
						}
						if _, err := json.Marshal(a.Status()); err != nil {
							t.Errorf("the status: %v", err)
						}
						if carried, sealed := s.counts(); carried == 0 || sealed == 0 {
							t.Errorf("the tokens were carried %d times and saved %d times", carried, sealed)
						}
						s.mu.Lock()
						saved := slices.Clone(s.saved)
						s.mu.Unlock()
						for _, m := range saved {
							if n := len(keptOf(t, m).Keys); n != len(m.Keys) {
								t.Fatalf("of %d keys %d are kept", len(m.Keys), n)
							}
						}
					})
				})
			}
		}
	}
}

// keptOf is what the next process reads of m.
func keptOf(t *testing.T, m tokencache.Snapshot) *tokencache.Snapshot {
	t.Helper()
	f, err := store.WriteMemfd(m)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	read, err := store.ReadMemfd(f)
	if err != nil {
		t.Fatal(err)
	}
	return read
}
