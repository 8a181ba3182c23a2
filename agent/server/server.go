// Package server answers HTTP on perceptd's Unix sockets, and on a loopback address for programs that cannot dial one.
//
// It guarantees that every request is checked against one route table before its handler sees it; that a caller that
// could not be proved gets no token, but 403, or 503 where asking again attests it (429 where it asks too often), and
// only /v1/whoami answers it; that a request for a token is answered within 10 seconds whatever the back end does, or
// as much later as it asked to wait; and that no token text leaves it except in the body of an answer with status 200.
//
// Call ServeTokens, ServeAdmin or ServeLoopback for each listener, and Shutdown in the end. A listener may be closed at
// any time: its connections end, the others go on.
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
	"perceptd/agent/server/limit"
)

// Server answers on any number of sockets. Set the fields before its first use.
type Server struct {
	// Agent decides which caller gets which token. Required.
	Agent *agent.Agent

	// Callers proves who is at the other end of a connection. Required.
	Callers *attest.Attestor

	// Reload puts the configuration in force anew and returns what changed, one line each, and warnings; an error
	// says why nothing did. Nil: every reload is refused.
	Reload func(context.Context) (api.ReloadResponse, error)

	// Describe returns the daemon's own part of the status: version, start, source, configuration,
	// whether it is simulated, and trouble that the agent cannot know. Nil: none.
	Describe func() api.Status

	// Loopback returns the configured address of the loopback listener, and the header secrets by which callers are
	// known there. The zero address, or nil: there is no such listener.
	Loopback func() (netip.AddrPort, *attest.Secrets)

	Log *zap.Logger      // nil: none
	Now func() time.Time // the device's wall clock; nil: time.Now

	Limits Limits

	// ConnectionsChanged is called, by any goroutine, when Connections may have something new to say. Nil: it is not.
	ConnectionsChanged func()

	denied, invalid, failed atomic.Int64 // requests on token sockets that the agent did not see
	pool                    requestPool
	usage                   quotas

	mu      sync.Mutex // protects what follows
	stopped bool
	running map[*http.Server]net.Listener
}

// ServeTokens answers requests for tokens on l until l is closed or Shutdown is called. module is the module whose own
// socket l is, or empty for the socket of all local services. It closes l.
//
// The error is nil unless accepting failed.
func (s *Server) ServeTokens(l net.Listener, module string) error {
	return s.serve(l, onToken, attest.Socket{Module: module})
}

// ServeAdmin answers technicians on l, as ServeTokens does. The socket's mode and group decide who may connect.
func (s *Server) ServeAdmin(l net.Listener) error {
	return s.serve(l, onAdmin, attest.Socket{Restricted: true})
}

// ServeLoopback answers requests for tokens on l, a TCP listener on a loopback address, as ServeTokens does. Callers
// are known by the secrets that the Server's Loopback returns.
func (s *Server) ServeLoopback(l net.Listener) error {
	return s.serve(l, onLoopback, attest.Socket{})
}

func (s *Server) serve(l net.Listener, kind socket, from attest.Socket) error {
	hs := s.httpServer(kind, from)
	if !s.add(hs, l) { // before anything is accepted, so that Shutdown answers all that is
		return l.Close()
	}
	if kind == onLoopback {
		l = s.Callers.ListenTCP(l)
	} else {
		l = s.Callers.Listen(l)
	}
	switch conns := s.connsOf(kind, from.Module); {
	case kind == onToken && from.Module == "":
		l = limit.NewFairListener(l, s.Limits.orDefaults().mostArriving(), s.admission(conns, ""))
	case kind == onToken:
		l = &limit.RateListener{Listener: l, Admission: s.admission(conns, from.Module)}
		conns.AddModules(1)
		defer conns.AddModules(-1)
	case kind == onAdmin:
		l = &limit.RateListener{Listener: l, Admission: s.admission(conns, "")}
	}
	l = limit.Listener{Listener: l, HeaderTimeout: s.Limits.orDefaults().Header}
	h := hs.Handler.(*handler)
	err := limit.Serve(hs, l) // until l fails: hs is not shut down before that
	close(h.accepted)
	defer s.remove(hs)
	ctx, cancel := context.WithTimeout(context.Background(), h.answerTime+transferTime)
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
	conns := s.connsOf(kind, from.Module)
	h := &handler{
		server: s, socket: kind, module: from.Module, answerTime: answer, stopping: down, accepted: make(chan struct{}),
	}
	hs := &http.Server{
		Handler:   h,
		Protocols: &protocols,

		ReadHeaderTimeout: limits.Header,
		// Its end would cancel a request that still waits for the back end, so it comes last.
		ReadTimeout:  limits.Header + answer + transferTime,
		WriteTimeout: answer + transferTime,
		IdleTimeout:  limits.Idle,

		DisableGeneralOptionsHandler: true,

		ErrorLog: httpLog(s.log()),
		ConnContext: func(ctx context.Context, conn net.Conn) context.Context {
			c := conn.(*limit.Conn)
			ctx = h.open.add(ctx, c)
			if kind == onLoopback {
				ctx = withPeer(ctx, c)
			} else {
				ctx = s.Callers.NewContext(ctx, c.Conn, from)
			}
			s.acquire(ctx, c, conns, kind)
			return ctx
		},
		ConnState: func(conn net.Conn, state http.ConnState) {
			c := conn.(*limit.Conn)
			switch state {
			case http.StateIdle:
				conns.Idle(c)
			case http.StateClosed, http.StateHijacked:
				conns.Release(c)
				h.open.remove(c)
			}
		},
	}
	hs.RegisterOnShutdown(sync.OnceFunc(func() { close(down) }))
	return hs
}
