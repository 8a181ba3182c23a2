package server

import (
	"context"
	"sync"
	"time"

	"perceptd/agent/server/limit"
)

type connectionKey struct{}

// connectionIn returns the connection that a context is of, or nil.
func connectionIn(ctx context.Context) *limit.Conn {
	c, _ := ctx.Value(connectionKey{}).(*limit.Conn)
	return c
}

// arrivals are the connections of a listener, by whether a request has come in on them. net/http's Shutdown cuts those
// off that it has accepted and not yet heard from, however sure it is that a request is on its way.
type arrivals struct {
	mu  sync.Mutex // protects what follows
	all map[*limit.Conn]struct{}
}

// add counts a connection, and returns ctx with it.
func (a *arrivals) add(ctx context.Context, c *limit.Conn) context.Context {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.all == nil {
		a.all = make(map[*limit.Conn]struct{})
	}
	a.all[c] = struct{}{}
	return context.WithValue(ctx, connectionKey{}, c)
}

// forget takes out a connection that has ended.
func (a *arrivals) forget(c *limit.Conn) {
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
		if !c.HasAsked() {
			_ = c.Close() // there is nothing to lose
		}
	}
}

// expected reports whether a request may be on its way.
func (a *arrivals) expected() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	for c := range a.all {
		if !c.HasAsked() && time.Since(c.AcceptedAt()) < limit.SilenceTimeout {
			return true
		}
	}
	return false
}
