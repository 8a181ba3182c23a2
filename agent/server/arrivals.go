package server

import (
	"context"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

// arrivals are the connections of a listener, by whether a request has come in on them. net/http's Shutdown cuts those
// off that it has accepted and not yet heard from, however sure it is that a request is on its way.
type arrivals struct {
	mu  sync.Mutex // protects what follows
	all map[net.Conn]*arrival
}

type arrival struct {
	on    time.Time
	heard atomic.Bool // a request has come in
}

// hearing is how long a connection is waited for that nothing was heard on: a client on a busy device may take a while
// from connecting to asking.
const hearing = time.Second

type arrivalKey struct{}

// add counts a connection, and returns ctx with what heardIn needs.
func (a *arrivals) add(ctx context.Context, conn net.Conn) context.Context {
	one := &arrival{on: time.Now()}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.all == nil {
		a.all = make(map[net.Conn]*arrival)
	}
	a.all[conn] = one
	return context.WithValue(ctx, arrivalKey{}, one)
}

// heardIn notes that a request has come in on the connection whose context that is.
func heardIn(ctx context.Context) {
	if one, ok := ctx.Value(arrivalKey{}).(*arrival); ok {
		one.heard.Store(true)
	}
}

// note forgets a connection that has ended. It is an http.Server's ConnState.
func (a *arrivals) note(conn net.Conn, state http.ConnState) {
	if state == http.StateClosed || state == http.StateHijacked {
		a.mu.Lock()
		defer a.mu.Unlock()
		delete(a.all, conn)
	}
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
	for conn, one := range a.all {
		if !one.heard.Load() {
			_ = conn.Close() // there is nothing to lose
		}
	}
}

// expected reports whether a request may be on its way.
func (a *arrivals) expected() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, one := range a.all {
		if !one.heard.Load() && time.Since(one.on) < hearing {
			return true
		}
	}
	return false
}
