package server

import (
	"context"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"perceptd/agent/server/limit"
)

// Shutdown closes every listener, hears those who have just connected, ends the streams of events and the requests that
// asked to wait, lets the others under way end until ctx does, and then cuts the connections that are left. Listeners
// that are served afterwards are closed at once. The error is ctx's when connections had to be cut.
func (s *Server) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	s.stopped = true
	running := s.running
	s.running = nil
	s.mu.Unlock()

	var all sync.WaitGroup
	var cut atomic.Bool
	for _, l := range running {
		_ = l.Close() // first all of them; whoever cannot be closed is closed already
	}
	for hs := range running {
		all.Go(func() {
			if s.end(ctx, hs) {
				cut.Store(true)
			}
		})
	}
	all.Wait()
	for _, conns := range s.quotas().conns() {
		conns.Close()
	}
	if cut.Load() {
		return ctx.Err()
	}
	return nil
}

// end lets hs finish within ctx and reports whether connections had to be cut.
func (s *Server) end(ctx context.Context, hs *http.Server) (cut bool) {
	h := hs.Handler.(*handler)
	<-h.accepted // until then the last one may still be looked at, and be no arrival yet
	h.pending.wait(ctx)
	if err := hs.Shutdown(ctx); err != nil && ctx.Err() != nil {
		hs.Close() // its error is the listener's, which is closed already
		return true
	}
	return false
}

// add reports false after Shutdown.
func (s *Server) add(hs *http.Server, l net.Listener) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopped {
		return false
	}
	if s.running == nil {
		s.running = make(map[*http.Server]net.Listener)
	}
	s.running[hs] = l
	return true
}

func (s *Server) remove(hs *http.Server) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.running, hs)
}

// pending are the connections of a listener, by whether a request has come in on them. net/http's Shutdown cuts those
// off that it has accepted and not yet heard from, however sure it is that a request is on its way.
type pendingConns struct {
	mu    sync.Mutex // protects what follows
	conns map[*limit.Conn]struct{}
}

type connectionKey struct{}

// connectionIn returns the connection that a context is of, or nil.
func connectionIn(ctx context.Context) *limit.Conn {
	c, _ := ctx.Value(connectionKey{}).(*limit.Conn)
	return c
}

// add counts a connection, and returns ctx with it.
func (a *pendingConns) add(ctx context.Context, c *limit.Conn) context.Context {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.conns == nil {
		a.conns = make(map[*limit.Conn]struct{})
	}
	a.conns[c] = struct{}{}
	return context.WithValue(ctx, connectionKey{}, c)
}

// remove takes out a connection that has ended.
func (a *pendingConns) remove(c *limit.Conn) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.conns, c)
}

// wait returns when something was heard on every connection, or nothing for long enough, or ctx has ended, and closes
// those that nothing was heard on: net/http would wait 5 s for each. No more may be added meanwhile.
func (a *pendingConns) wait(ctx context.Context) {
	const often = 2 * time.Millisecond
	for a.isExpecting() && ctx.Err() == nil {
		select {
		case <-time.After(often):
		case <-ctx.Done():
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for c := range a.conns {
		if !c.HasAsked() {
			_ = c.Close() // there is nothing to lose
		}
	}
}

// isExpecting reports whether a request may be on its way.
func (a *pendingConns) isExpecting() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	for c := range a.conns {
		if !c.HasAsked() && time.Since(c.AcceptedAt()) < limit.SilenceTimeout {
			return true
		}
	}
	return false
}
