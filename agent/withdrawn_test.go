package agent

import (
	"context"
	"errors"
	"testing"

	"perceptd/agent/api"
	"perceptd/agent/grants"
	"perceptd/tokencache"
)

// Whoever notes and withdraws changes for as long as the record cannot be read has nothing pile up: what is noted then
// is on nothing that is read later.
func TestWithdrawnIsBounded(t *testing.T) {
	t.Parallel()
	eio := errors.New("input/output error")
	a, err := New(Options{
		Fetch: func(context.Context, tokencache.Key) (tokencache.Fetched, error) {
			return tokencache.Fetched{},
				eio
		},
		Rules:        Rules{Rules: grants.Rules{Identities: []grants.Identity{{Name: "edge"}}}},
		UnreadRecord: eio, LoadRecord: func() (*tokencache.Record, error) {
			return nil,
				eio
		}, SaveRecord: func(tokencache.Record) error { return nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	for range 2 * tokencache.MaxChanges {
		noted, _ := a.RecordChange("test", api.PolicyChangeRequest{AllResources: true, Effect: tokencache.Revoked})
		_, _ = a.WithdrawChange("test", noted.ID)
	}
	a.naming.Lock()
	defer a.naming.Unlock()
	if n := len(a.deferred.withdrawn); n > 0 || len(a.cache.Changes()) != 1 {
		t.Errorf("%d withdrawn are remembered; on record: %+v", n, a.cache.Changes())
	}
}
