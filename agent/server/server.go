// Package server answers HTTP on perceptd's Unix sockets, and on a loopback address for programs that cannot dial one.
//
// It guarantees that every request is checked against one route table before its handler sees it,
// that a connection whose caller could not be proved gets nothing but 403, that a request for a token
// is answered within 10 seconds whatever the back end does, or as much later as it asked to wait, and
// that no token text leaves it except in the body of an answer with status 200.
//
// Whoever makes a Server gives it the listeners, one call of ServeTokens, ServeAdmin or ServeLoopback for each, and
// calls Shutdown in the end. A listener may be closed at any time: its connections end, the others
// go on.
package server

import (
	"cmp"
	"context"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/caller"
	"perceptd/agent/headlimit"
)

// Server answers on any number of sockets. Set the fields before its first use.
type Server struct {
	// Agent decides which caller gets which token. Required.
	Agent *agent.Agent

	// Callers proves who is at the other end of a connection. Required.
	Callers *caller.Prover

	// Reload puts the configuration in force anew and returns what changed, one line each; an error
	// says why nothing did. Nil: every reload is refused.
	Reload func(context.Context) (changes []string, err error)

	// Describe returns the daemon's own part of the status: version, start, source, configuration,
	// whether it is simulated, and trouble that the agent cannot know. Nil: none.
	Describe func() api.Status

	// Loopback returns where the loopback listener is configured to be, and the header secrets by which callers are known
	// there. The zero address, or nil: there is none.
	Loopback func() (netip.AddrPort, *caller.Secrets)

	Log *zap.Logger      // nil: none
	Now func() time.Time // the device's wall clock; nil: time.Now

	Limits Limits

	denied, invalid, failed atomic.Int64 // requests on token sockets that the agent did not see
	spare                   spare
	crowd                   crowd
	loopbackCrowd           crowd // of the loopback listener
	pace                    pace
	waiting, watching       queue

	mu      sync.Mutex // protects what follows
	stopped bool
	running map[*http.Server]net.Listener
}

// Limits bounds how long a connection may take over each thing. Zero fields mean the defaults.
type Limits struct {
	Header time.Duration // to send a request's header; 5 s
	Answer time.Duration // until a request for a token is answered, beside what it asked to wait; 8 s, so that 10 s are kept on a busy device too
	Admin  time.Duration // until a request on the admin socket is answered; 8 s as well
	Idle   time.Duration // between two requests on one connection; 60 s
	Alive  time.Duration // between two signs of life on a stream of events; 15 s

	Waiting     int // requests of one caller at once that asked to wait; 64
	Watching    int // streams of events of one caller at once; 16
	AllWatching int // streams of events at once; 512

	Connections int // at once on all token sockets; 4,096
	PerCaller   int // of one caller there; 1,024. More are closed unanswered
	// A few of this process to itself, which tell a watchdog that it is well, are let in beyond both.

	PerSecond int // requests of one caller there, in the long run; 200. More wait, and then get 429
	Burst     int // requests of one caller at once; 400
}

// orDefaults fills in the zero fields.
func (l Limits) orDefaults() Limits {
	for _, limit := range []struct {
		field *time.Duration
		value time.Duration
	}{
		{&l.Header, 5 * time.Second},
		{&l.Answer, 8 * time.Second},
		{&l.Admin, 8 * time.Second},
		{&l.Idle, 60 * time.Second},
		{&l.Alive, 15 * time.Second},
	} {
		*limit.field = cmp.Or(*limit.field, limit.value)
	}
	for _, limit := range []struct {
		field *int
		value int
	}{
		{&l.Waiting, 64}, {&l.Watching, 16}, {&l.AllWatching, 512}, {&l.Connections, 4096}, {&l.PerCaller, 1024},
		{&l.PerSecond, 200}, {&l.Burst, 400},
	} {
		*limit.field = cmp.Or(*limit.field, limit.value)
	}
	return l
}

// transfer is how long a body may take to arrive, or an answer to leave, beside the time to answer.
const transfer = 5 * time.Second

// ServeTokens answers requests for tokens on l until l is closed or Shutdown is called. module is the
// module whose own socket l is, or empty for the socket of all local services. It closes l.
//
// The error is nil unless accepting failed.
func (s *Server) ServeTokens(l net.Listener, module string) error {
	return s.serve(l, onToken, caller.Socket{Module: module})
}

// ServeAdmin answers technicians on l, as ServeTokens does. Who may connect is the business of the
// socket's mode and group.
func (s *Server) ServeAdmin(l net.Listener) error {
	return s.serve(l, onAdmin, caller.Socket{Shut: true})
}

func (s *Server) serve(l net.Listener, kind socket, from caller.Socket) error {
	hs := s.httpServer(kind, from)
	if kind == onLoopback {
		l = s.Callers.ListenTCP(l)
	} else {
		l = s.Callers.Listen(l)
	}
	if kind == onToken && from.Module == "" { // a module's own socket has no others on it
		l = takeTurns(l, caller.UserOf, s.Limits.orDefaults())
	}
	if !s.add(hs, l) {
		return l.Close()
	}
	err := headlimit.Serve(hs, l)
	close(hs.Handler.(*door).accepted)
	if errors.Is(err, http.ErrServerClosed) {
		return nil // Shutdown ends the connections
	}
	defer s.remove(hs)
	ctx, cancel := context.WithTimeout(context.Background(), s.Limits.orDefaults().Answer+transfer)
	defer cancel()
	s.end(ctx, hs)
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

func (s *Server) httpServer(kind socket, from caller.Socket) *http.Server {
	limits := s.Limits.orDefaults()
	answer := limits.Answer
	if kind == onAdmin {
		answer = limits.Admin
	}
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	down := make(chan struct{})
	d := &door{server: s, socket: kind, module: from.Module, answer: answer, down: down, accepted: make(chan struct{})}
	hs := &http.Server{
		Handler:   d,
		Protocols: &protocols,

		ReadHeaderTimeout: limits.Header,
		// Its end would cancel a request that still waits for the back end, so it comes last.
		ReadTimeout:  limits.Header + answer + transfer,
		WriteTimeout: answer + transfer,
		IdleTimeout:  limits.Idle,

		DisableGeneralOptionsHandler: true,

		ErrorLog: httpLog(s.log()),
		ConnContext: func(ctx context.Context, conn net.Conn) context.Context {
			ctx = d.arrivals.add(ctx, conn)
			if kind == onLoopback {
				return s.meet(ctx, conn)
			}
			ctx = s.Callers.NewContext(ctx, conn, from)
			if who, isUnproved := seenIn(ctx); kind == onToken && !s.crowd.admit(conn, who, isUnproved, limits) {
				s.log().Debug("too many connections", zap.Stringer("caller", who))
				_ = conn.Close() // ends its goroutine at the first read
			}
			return ctx
		},
		ConnState: func(conn net.Conn, state http.ConnState) {
			s.crowd.note(conn, state)
			s.loopbackCrowd.note(conn, state)
			d.arrivals.note(conn, state)
		},
	}
	hs.RegisterOnShutdown(sync.OnceFunc(func() { close(down) }))
	return hs
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
	if cut.Load() {
		return ctx.Err()
	}
	return nil
}

// end lets hs finish within ctx and reports whether connections had to be cut.
func (s *Server) end(ctx context.Context, hs *http.Server) (cut bool) {
	d := hs.Handler.(*door)
	<-d.accepted // until then the last one may still be looked at, and be no arrival yet
	d.arrivals.wait(ctx)
	if err := hs.Shutdown(ctx); err != nil && ctx.Err() != nil {
		hs.Close() // its error is the listener's, which is closed already
		return true
	}
	return false
}

func (s *Server) log() *zap.Logger {
	if s.Log == nil {
		return zap.NewNop()
	}
	return s.Log
}

func (s *Server) now() time.Time {
	if s.Now == nil {
		return time.Now()
	}
	return s.Now()
}
