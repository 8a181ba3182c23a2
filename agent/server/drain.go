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

// Shutdown closes every listener, waits a moment for the requests of clients that have just connected, ends the
// streams of events and the requests that asked to wait, lets the other requests end until ctx does, and then cuts
// the connections that are left. Listeners that are served afterwards are closed at once. The error is ctx's when
// connections had to be cut.
func (s *Server) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	s.stopped = true
	running := s.running
	s.running = nil
	s.mu.Unlock()

	var all sync.WaitGroup
	var cut atomic.Bool
	for _, l := range running {
		_ = l.Close() // all of them first; one that cannot be closed is closed already
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
	<-h.accepted // before that the last connection may still be under attestation, and not yet among open
	h.open.wait(ctx)
	if err := hs.Shutdown(ctx); err != nil && ctx.Err() != nil {
		hs.Close() // its error is the listener's, which is closed already
		return true
	}
	return false
}

// add counts hs as running. It reports false after Shutdown.
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

// openConns are the open connections of a listener. net/http's Shutdown cuts off those that were accepted and have not
// sent anything yet, although their requests may be on the way.
type openConns struct {
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
func (o *openConns) add(ctx context.Context, c *limit.Conn) context.Context {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.conns == nil {
		o.conns = make(map[*limit.Conn]struct{})
	}
	o.conns[c] = struct{}{}
	return context.WithValue(ctx, connectionKey{}, c)
}

// remove takes out a connection that has ended.
func (o *openConns) remove(c *limit.Conn) {
	o.mu.Lock()
	defer o.mu.Unlock()
	delete(o.conns, c)
}

// wait waits for a request on every connection, for limit.SilenceTimeout from when it was accepted, or until ctx
// ends. Then it closes those without one: net/http would wait 5 s for each. No more may be added meanwhile.
func (o *openConns) wait(ctx context.Context) {
	const pollInterval = 2 * time.Millisecond
	for o.isExpecting() && ctx.Err() == nil {
		select {
		case <-time.After(pollInterval):
		case <-ctx.Done():
		}
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	for c := range o.conns {
		if !c.HasAsked() {
			_ = c.Close() // there is nothing to lose
		}
	}
}

// isExpecting reports whether a request may be on its way.
func (o *openConns) isExpecting() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	for c := range o.conns {
		if !c.HasAsked() && time.Since(c.AcceptedAt()) < limit.SilenceTimeout {
			return true
		}
	}
	return false
}
