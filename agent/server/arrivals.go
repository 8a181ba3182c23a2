package server

import (
	"context"
	"sync"
	"time"
)

// arrivals are the connections of a listener, by whether a request has come in on them. net/http's Shutdown cuts those
// off that it has accepted and not yet heard from, however sure it is that a request is on its way.
type arrivals struct {
	mu  sync.Mutex // protects what follows
	all map[*connection]struct{}
}

// hearing is how long a connection is waited for that nothing was heard on: a client on a busy device may take a while
// from connecting to asking.
const hearing = time.Second

// add counts a connection, and returns ctx with it.
func (a *arrivals) add(ctx context.Context, c *connection) context.Context {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.all == nil {
		a.all = make(map[*connection]struct{})
	}
	a.all[c] = struct{}{}
	return context.WithValue(ctx, connectionKey{}, c)
}

// forget takes out a connection that has ended.
func (a *arrivals) forget(c *connection) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.all, c)
}

// wait returns when something was heard on every connection, or nothing for long enough, or ctx has ended, and closes
// those that nothing was heard on: net/http would wait 5 s for each. No more may be added meanwhile.
func (a *arrivals) wait(ctx context.Context) {
	const often = 2 * time.Millisecond
	for a.expected() && ctx.Err() == nil {
		select {
		case <-time.After(often):
		case <-ctx.Done():
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for c := range a.all {
		if !c.asked.Load() {
			_ = c.Close() // there is nothing to lose
		}
	}
}

// expected reports whether a request may be on its way.
func (a *arrivals) expected() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	for c := range a.all {
		if !c.asked.Load() && time.Since(c.on) < hearing {
			return true
		}
	}
	return false
}
