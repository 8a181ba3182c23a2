package tokencache_test

import (
	"context"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"perceptd/tokencache"
)

// The status has a verdict on each change on record that touches the key, the latest first, also through an alternate or another spelling,
// and on no other.
func TestVerdicts(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		fetch := func(_ context.Context, key tokencache.Key) (tokencache.Fetched, error) {
			return tokenOf("o", key, began), nil
		}
		c := tokencache.New(tokencache.Options{Fetch: fetch, Clock: (&watch{known: true}).clock()})
		defer c.Close()
		const alternate = "https://alternate.example"
		c.SetAlternates(map[string][]string{vault.Resource: {alternate}})
		mustGet(t, c, vault, sdk)
		for _, p := range []tokencache.PolicyChange{
			{ID: "met", AllIdentities: true, At: began.Add(-time.Hour), Effect: tokencache.Granted},
			{ID: "spreading", AllIdentities: true, Resource: vault.Resource + "/", At: began.Add(-time.Minute), Effect: tokencache.Changed},
			{ID: "another's", Selector: tokencache.Selector{Kind: tokencache.ClientID, ID: "c"}, At: began, Effect: tokencache.Revoked},
			{ID: "of another", AllIdentities: true, Resource: storage.Resource, At: began, Effect: tokencache.Revoked},
			{ID: "lacked", AllIdentities: true, Resource: alternate, Effect: tokencache.Granted},
		} {
			time.Sleep(time.Minute)
			if _, err := c.Note(p); err != nil {
				t.Fatal(err)
			}
		}
		want := []tokencache.Verdict{
			{Change: "lacked", Standing: tokencache.Stale}, {Change: "spreading", Standing: tokencache.Uncertain}, {Change: "met"},
		}
		got := only(t, c)
		if !slices.Equal(got.Changes, want) {
			t.Errorf("got %+v, want %+v", got.Changes, want)
		}
		if got.Permissions.Standing != tokencache.Stale {
			t.Errorf("the token is %v", got.Permissions.Standing)
		}
	})
}
