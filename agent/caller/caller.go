// Package caller proves who is at the other end of a connection.
//
// It guarantees that nobody is taken for a caller on less than the whole proof: whatever cannot be
// read or is unclear is a refusal. The proof is made once, when the connection is accepted, and holds
// for every request on it, since the kernel recorded the peer when it connected.
//
// Whoever serves a socket calls NewContext for each accepted connection, asks FromContext on each
// request, and answers nothing but the refusal when that returns an error.
package caller

import (
	"context"
	"errors"
	"fmt"
	"net"

	"golang.org/x/sys/unix"

	"perceptd/agent"
)

// Socket is what the socket that a connection came in on says about the caller: the first part of
// every proof.
type Socket struct {
	// Module is the module whose own socket this is. Empty: a socket that anyone may connect to.
	Module string
}

var (
	errNotUnix  = errors.New("the connection did not come in on a Unix socket")
	errNotAsked = errors.New("nobody asked who is calling")
)

// Prove returns who is at the other end of conn, which came in on that socket. An error says which
// part of the proof is missing; it is fit for a log, and the caller is to be denied.
//
// The order is socket, then the peer's credentials; each further part of a proof (unit, container,
// liveness) belongs here, after them.
func Prove(conn net.Conn, socket Socket) (agent.Caller, error) {
	peer, err := credentials(conn)
	if err != nil {
		return agent.Caller{}, err
	}
	caller := agent.Caller{Module: socket.Module, UID: peer.Uid, GID: peer.Gid, PID: peer.Pid}
	if err := plausible(caller); err != nil {
		return agent.Caller{}, err
	}
	return caller, nil
}

// credentials returns what the kernel recorded of the peer when it connected (SO_PEERCRED).
func credentials(conn net.Conn) (*unix.Ucred, error) {
	unixConn, ok := conn.(*net.UnixConn)
	if !ok {
		return nil, errNotUnix
	}
	raw, err := unixConn.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("the connection has no descriptor: %w", err)
	}
	var peer *unix.Ucred
	var optErr error
	err = raw.Control(func(fd uintptr) {
		peer, optErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if err := errors.Join(err, optErr); err != nil {
		return nil, fmt.Errorf("the kernel does not tell the peer's credentials: %w", err)
	}
	return peer, nil
}

// noID is what the kernel tells where there is no uid or gid to tell.
const noID = ^uint32(0)

// plausible refuses credentials that name nobody in particular.
func plausible(c agent.Caller) error {
	switch {
	case c.PID <= 0:
		// Seen from outside its pid namespace every peer has pid 0, and may look like root.
		return errors.New("the peer is outside the daemon's pid namespace")
	case c.UID == noID || c.GID == noID:
		return errors.New("the peer has no uid or gid")
	}
	return nil
}

// key is the type of the one context value of this package.
type key struct{}

// proof is what Prove returned for a connection.
type proof struct {
	caller agent.Caller
	err    error
}

// NewContext proves who is at the other end of conn and returns ctx with the outcome attached, good
// or bad, and the error of a proof that failed. It is made for http.Server.ConnContext.
func NewContext(ctx context.Context, conn net.Conn, socket Socket) (context.Context, error) {
	caller, err := Prove(conn, socket)
	return context.WithValue(ctx, key{}, &proof{caller: caller, err: err}), err
}

// FromContext returns the caller that NewContext attached. The error says why there is none.
func FromContext(ctx context.Context) (agent.Caller, error) {
	p, ok := ctx.Value(key{}).(*proof)
	if !ok {
		return agent.Caller{}, errNotAsked
	}
	return p.caller, p.err
}
