package tokencache_test

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"perceptd/tokencache"
	"perceptd/tokencache/tokencachetest"
)

// The status has a verdict on each change on record that touches the key, the latest first, also through an alternate
// or another spelling, and on no other.
func TestVerdicts(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		fetch := func(_ context.Context, key tokencache.Key) (tokencache.Fetched, error) {
			return tokenOf("o", key, began), nil
		}
		c := tokencache.New(tokencache.Options{Fetch: fetch,
			Clock: (&tokencachetest.Clock{Trusted: true}).AfterUptime()})
		defer c.Close()
		const alternate = "https://alternate.example"
		c.SetAlternates(map[string][]string{vault.Resource: {alternate}})
		mustGet(t, c, vault, sdk)
		for _, p := range []tokencache.PolicyChange{
			{ID: "met", AllIdentities: true, At: began.Add(-time.Hour), Effect: tokencache.Granted},
			{ID: "spreading", AllIdentities: true, Resource: vault.Resource + "/", At: began.Add(-time.Minute),
				Effect: tokencache.Changed},
			{ID: "another's", Selector: tokencache.Selector{Kind: tokencache.ClientID, ID: "c"}, At: began,
				Effect: tokencache.Revoked},
			{ID: "of another", AllIdentities: true, Resource: storage.Resource, At: began, Effect: tokencache.Revoked},
			{ID: "lacked", AllIdentities: true, Resource: alternate, Effect: tokencache.Granted},
		} {
			time.Sleep(time.Minute)
			if _, err := c.RecordChange(p); err != nil {
				t.Fatal(err)
			}
		}
		want := []tokencache.Verdict{
			{ID: "lacked", State: tokencache.Stale}, {ID: "spreading", State: tokencache.Uncertain}, {ID: "met",
				State: tokencache.Current},
		}
		got := only(t, c)
		if !slices.Equal(got.Changes, want) {
			t.Errorf("got %+v, want %+v", got.Changes, want)
		}
		if got.Permissions.State != tokencache.Stale {
			t.Errorf("the token is %v", got.Permissions.State)
		}
	})
}

// Of many changes there is a verdict on a few: the latest that the token may lack before any other, and the rest is
// counted.
func TestVerdictsAreFew(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		fetch := func(_ context.Context, key tokencache.Key) (tokencache.Fetched, error) {
			return tokenOf("o", key, began), nil
		}
		c := tokencache.New(tokencache.Options{Fetch: fetch,
			Clock: (&tokencachetest.Clock{Trusted: true}).AfterUptime()})
		defer c.Close()
		add := func(id string, at time.Time) {
			if _, err := c.RecordChange(tokencache.PolicyChange{ID: id, AllIdentities: true, At: at,
				Effect: tokencache.Granted}); err != nil {
				t.Fatal(err)
			}
		}
		for i := range tokencache.MaxVerdicts {
			add(fmt.Sprint("met ", i), began.Add(time.Duration(i-100)*time.Minute))
		}
		mustGet(t, c, vault, sdk)
		told := func() (ids []string, more int) {
			s := only(t, c)
			for _, v := range s.Changes {
				ids = append(ids, v.ID)
			}
			return ids, s.MoreChanges
		}
		add("lacked", time.Time{})
		if ids, more := told(); !slices.Equal(ids, []string{"lacked", "met 5", "met 4", "met 3", "met 2", "met 1"}) ||
			more != 1 {
			t.Errorf("one is lacked: %q and %d", ids, more)
		}
		for i := range tokencache.MaxVerdicts {
			time.Sleep(time.Minute)
			add(fmt.Sprint("later ", i), time.Time{})
		}
		if ids, more := told(); len(ids) != tokencache.MaxVerdicts || ids[0] != "later 5" || ids[5] != "later 0" ||
			more != 7 {
			t.Errorf("many are lacked: %q and %d", ids, more)
		}
	})
}
