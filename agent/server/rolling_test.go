package server

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/tokencache"
)

// rolling is a back end that hands out the same token of a resource until the test rolls it over.
type rolling struct {
	mu     sync.Mutex
	minted map[string]time.Time // by resource; "" stands for all others
	fault  error                // what it answers instead
	calls  int
}

// newRolling returns a back end whose tokens were minted so long ago.
func newRolling(ago time.Duration) *rolling {
	b := &rolling{minted: make(map[string]time.Time)}
	b.roll("", ago)
	return b
}

// roll makes the tokens of resource, or of all that were never named, such as were minted so long ago.
func (b *rolling) roll(resource string, ago time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.minted[resource] = time.Now().Add(-ago).Truncate(time.Second)
}

func (b *rolling) fail(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.fault = err
}

// asked returns how many calls there were.
func (b *rolling) asked() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.calls
}

func (b *rolling) fetch(_ context.Context, key tokencache.Key) (tokencache.Fetched, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.calls++
	if b.fault != nil {
		return tokencache.Fetched{}, b.fault
	}
	minted, ok := b.minted[key.Resource]
	if !ok {
		minted = b.minted[""]
	}
	expires := minted.Add(24 * time.Hour)
	return tokencache.Fetched{
		Token: tokencache.Token{
			Text:      tokencache.NewSecret(fmt.Sprintf("canary %v %d", key, minted.Unix())),
			ExpiresOn: expires,
			Claims: tokencache.Claims{
				Audience: key.Resource, ClientID: claimed, ObjectID: objectID, IssuedAt: minted.Add(-5 * time.Minute),
				NotBefore: minted.Add(-5 * time.Minute),
				Groups:    []string{"group-1"}, Roles: []string{"role-1"}, WIDs: []string{"wid-1"},
			},
		},
		Left: time.Until(expires),
	}, nil
}

// refresh has the agent fetch everything anew.
func (d *daemon) refresh() {
	d.t.Helper()
	if _, err := d.Agent.Refresh(context.Background(), "", "", true); err != nil {
		d.t.Fatal(err)
	}
}

// change notes a policy change on everything, so long ago.
func (d *daemon) change(effect tokencache.Effect, ago time.Duration) api.PolicyChange {
	d.t.Helper()
	return changeOn(d.t, d.Agent, effect, ago)
}

func changeOn(t testing.TB, a *agent.Agent, effect tokencache.Effect, ago time.Duration) api.PolicyChange {
	t.Helper()
	noted, err := a.RecordChange("the test", api.PolicyChangeRequest{AllResources: true, Effect: effect,
		At: time.Now().Add(-ago).Truncate(time.Second)})
	if err != nil {
		t.Fatal(err)
	}
	return noted
}
