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
	"perceptd/agent/attest"
	"perceptd/agent/headlimit"
)

// Server answers on any number of sockets. Set the fields before its first use.
type Server struct {
	// Agent decides which caller gets which token. Required.
	Agent *agent.Agent

	// Callers proves who is at the other end of a connection. Required.
	Callers *attest.Prover

	// Reload puts the configuration in force anew and returns what changed, one line each, and warnings; an error
	// says why nothing did. Nil: every reload is refused.
	Reload func(context.Context) (api.ReloadResponse, error)

	// Describe returns the daemon's own part of the status: version, start, source, configuration,
	// whether it is simulated, and trouble that the agent cannot know. Nil: none.
	Describe func() api.Status

	// Loopback returns where the loopback listener is configured to be, and the header secrets by which callers are known
	// there. The zero address, or nil: there is none.
	Loopback func() (netip.AddrPort, *attest.Secrets)

	Log *zap.Logger      // nil: none
	Now func() time.Time // the device's wall clock; nil: time.Now

	Limits Limits

	// CrowdChanged is called, by any goroutine, when Crowds may have something new to say. Nil: nobody wants to know.
	CrowdChanged func()

	denied, invalid, failed atomic.Int64 // requests on token sockets that the agent did not see
	spare                   spare
	pace                    pace
	waiting, watching       queue
	administering           queue // requests on the admin socket

	crowds crowds

	mu      sync.Mutex // protects what follows
	stopped bool
	running map[*http.Server]net.Listener
}

// transfer is how long a body may take to arrive, or an answer to leave, beside the time to answer.
const transfer = 5 * time.Second

// ServeTokens answers requests for tokens on l until l is closed or Shutdown is called. module is the
// module whose own socket l is, or empty for the socket of all local services. It closes l.
//
// The error is nil unless accepting failed.
func (s *Server) ServeTokens(l net.Listener, module string) error {
	return s.serve(l, onToken, attest.Socket{Module: module})
}

// ServeAdmin answers technicians on l, as ServeTokens does. Who may connect is the business of the
// socket's mode and group.
func (s *Server) ServeAdmin(l net.Listener) error {
	return s.serve(l, onAdmin, attest.Socket{Shut: true})
}

func (s *Server) serve(l net.Listener, kind socket, from attest.Socket) error {
	hs := s.httpServer(kind, from)
	if !s.add(hs, l) { // before anybody is accepted: whoever is, Shutdown hears
		return l.Close()
	}
	if kind == onLoopback {
		l = s.Callers.ListenTCP(l)
	} else {
		l = s.Callers.Listen(l)
	}
	switch cr, budget := s.crowdOf(kind, from.Module), s.Limits.orDefaults().arrivals(); {
	case kind == onToken && from.Module == "":
		l = takeTurns(l, s.whence(), s.refuseEarly(cr, s.whence()), s.Limits.orDefaults())
	case kind == onToken: // a module's own socket has no others on it
		module := func(net.Conn, bool) quotaKey { return quotaKey{module: from.Module, whole: true} }
		l = &budgeted{Listener: l, from: module, refuse: s.refuseEarly(cr, module), budget: budget}
		cr.modules.Add(1)
		defer cr.modules.Add(-1)
	case kind == onAdmin:
		l = &budgeted{Listener: l, from: s.whence(), refuse: s.refuseEarly(cr, s.whence()), budget: budget}
	}
	l = connections{l, s.Limits.orDefaults().Header}
	d := hs.Handler.(*door)
	err := headlimit.Serve(hs, l) // until l fails: hs is not shut down before that
	close(d.accepted)
	defer s.remove(hs)
	ctx, cancel := context.WithTimeout(context.Background(), d.answer+transfer)
	defer cancel()
	s.end(ctx, hs)
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

func (s *Server) httpServer(kind socket, from attest.Socket) *http.Server {
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
			c := conn.(*connection)
			ctx = d.arrivals.add(ctx, c)
			if kind == onLoopback {
				ctx = meet(ctx, c)
			} else {
				ctx = s.Callers.NewContext(ctx, c.Conn, from)
			}
			s.welcome(ctx, c, kind, from.Module)
			return ctx
		},
		ConnState: func(conn net.Conn, state http.ConnState) {
			c := conn.(*connection)
			switch state {
			case http.StateIdle:
				c.crowd.rest(c)
			case http.StateClosed, http.StateHijacked:
				c.crowd.forget(c)
				d.arrivals.forget(c)
			}
		},
	}
	hs.RegisterOnShutdown(sync.OnceFunc(func() { close(down) }))
	return hs
}

// crowds are the connections, by kind of listener. Use crowdOf.
type crowds struct {
	made                             sync.Once
	tokens, modules, admin, loopback crowd
}

func (c *crowds) all() [4]*crowd { return [...]*crowd{&c.tokens, &c.modules, &c.admin, &c.loopback} }

// crowdOf returns the crowd of a kind of listener.
func (s *Server) crowdOf(kind socket, module string) *crowd {
	c := &s.crowds
	c.made.Do(func() {
		c.tokens.room, c.modules.room, c.admin.room, c.loopback.room = s.Limits.orDefaults().rooms()
		for _, one := range c.all() {
			one.notify, one.wall, one.refused.Most = s.tellTurnedAway, s.now, one.room.refused
		}
	})
	switch {
	case kind == onAdmin:
		return &c.admin
	case kind == onLoopback:
		return &c.loopback
	case module != "":
		return &c.modules
	}
	return &c.tokens
}

// welcome gives a connection its place, or refuses it when there is not even one in the line.
func (s *Server) welcome(ctx context.Context, c *connection, kind socket, module string) {
	var itself bool
	if kind == onLoopback {
		c.key = peerIn(ctx).key()
	} else {
		who, isUnproved := seenIn(ctx)
		c.key, itself = keyOf(&who, ownerIn(ctx), isUnproved), !isUnproved && isOwn(who)
	}
	if kind == onAdmin {
		c.bound() // its answers may be long
	}
	c.crowd = s.crowdOf(kind, module)
	if !c.crowd.enter(c, itself) {
		c.refuse()
	}
}

// tellTurnedAway reports whose fault it is that connections are turned away.
func (s *Server) tellTurnedAway(one turnedAway) {
	s.log().Warn("connections are turned away", zap.String("listener", one.room), zap.Stringer("turned_away", one.who),
		zap.Stringer("held_by", one.holder), zap.Int("holds", one.holds), zap.Int("of", one.of), zap.Int64("count", one.count))
	if s.CrowdChanged != nil {
		s.CrowdChanged()
		time.AfterFunc(goesOn, s.CrowdChanged)
	}
}

// Crowds returns how full the listeners are, and in sentences whose fault it is that connections were turned away lately.
func (s *Server) Crowds() (all []api.ConnectionsStatus, trouble []string) {
	_ = s.crowdOf(onToken, "")
	for _, cr := range s.crowds.all() {
		all = append(all, cr.status())
		if why := cr.trouble(time.Now()); why != "" {
			trouble = append(trouble, why)
		}
	}
	return all, trouble
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
	for _, cr := range s.crowds.all() {
		cr.close()
	}
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
