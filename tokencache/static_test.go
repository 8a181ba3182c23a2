package tokencache_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"perceptd/tokencache"
	"perceptd/tokencache/tokencachetest"
)

// A number that a back end gives with each token is no count of a key's first token either, once it has had the
// issuer's clock go back. Where it counts, or two replicas' clocks differ by a little, a new token is current.
func TestStaticCountOfAnotherToken(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name      string
		static    bool
		aged      time.Duration // the second token, when it is given
		behind    time.Duration // the clock of the replica that gives it
		later     time.Duration // after the revocation
		withholds bool
	}{
		{name: "static, soon", static: true, aged: 6 * time.Hour, later: jitter + time.Minute, withholds: true},
		{name: "static, hours later", static: true, aged: 11 * time.Hour, later: 6 * time.Hour, withholds: true},
		{name: "counted", aged: 6 * time.Hour, later: jitter + time.Minute, withholds: true},
		{name: "counted and new", later: jitter + time.Minute},
		{name: "a replica that is behind", behind: 4 * time.Minute, later: jitter + time.Minute},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				w, warm := &tokencachetest.Clock{}, tokencache.Key{Resource: "api://warm"}
				c := tokencache.New(tokencache.Options{Clock: w.AfterUptime(),
					Fetch: func(_ context.Context, key tokencache.Key) (tokencache.Fetched, error) {
						aged, behind := row.aged, row.behind
						if key == warm {
							aged, behind = 5*time.Hour, 0
							if !row.static {
								aged = 0
							}
						}
						f := tokenOf("o", key, time.Now().Add(-aged-behind))
						f.Left = 24*time.Hour - aged
						if row.static {
							f.Left = 24 * time.Hour
						}
						return f, nil
					}})
				defer c.Close()
				mustGet(t, c, warm, sdk)
				time.Sleep(time.Hour)
				if _, err := c.RecordChange(tokencache.PolicyChange{ID: "x", AllIdentities: true,
					Resource: vault.Resource, Effect: tokencache.Revoked}); err != nil {
					t.Fatal(err)
				}
				time.Sleep(row.later)
				if got := withheld(t, c); got != row.withholds {
					t.Errorf("withheld: %v, want %v", got, row.withholds)
				}
				if got := c.Snapshot().Static; got != row.static {
					t.Errorf("static: %v, want %v", got, row.static)
				}
			})
		})
	}
}
