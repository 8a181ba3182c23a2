package server

import (
	"context"
	"net"
	"os"
	"time"

	"perceptd/agent/attest"
	"perceptd/agent/grants"
	"perceptd/agent/server/limit"
)

// presumedCaller returns what a connection's context shows of the caller without further look-ups, and whether it is
// certain already that it cannot be proved.
func presumedCaller(ctx context.Context) (who grants.Caller, isUnattested bool) {
	attestation, err := attest.FromContext(ctx)
	if err != nil {
		return grants.Caller{UID: grants.NoID, GID: grants.NoID}, true
	}
	who, err = attestation.Unconfirmed()
	return who, err != nil
}

// attestedCaller returns the caller that a connection's context proves. The error says why it could not be proved;
// then the caller is what is known of it.
func attestedCaller(ctx context.Context) (grants.Caller, error) {
	attestation, err := attest.FromContext(ctx)
	if err != nil {
		return grants.Caller{UID: grants.NoID, GID: grants.NoID}, err
	}
	return attestation.Caller(ctx)
}

// sessionOwner returns the user in whose session or service manager the caller of a connection's context runs.
func sessionOwner(ctx context.Context) uint32 {
	attestation, err := attest.FromContext(ctx)
	if err != nil {
		return grants.NoID
	}
	return attestation.Owner()
}

// peer is the user at the other end of a TCP connection.
type peer struct {
	uid     uint32
	unknown error // why uid is not known
}

type peerKey struct{}

// peerIn returns the peer of a connection's context.
func peerIn(ctx context.Context) peer {
	if p, ok := ctx.Value(peerKey{}).(peer); ok {
		return p
	}
	return peer{uid: grants.NoID, unknown: errNoPeer}
}

// withPeer looks up the user at the other end of c, and returns ctx with it.
func withPeer(ctx context.Context, c *limit.Conn) context.Context {
	var p peer
	p.uid, p.unknown = attest.TCPPeerUID(c.Conn)
	return context.WithValue(ctx, peerKey{}, p)
}

// caller is what is known of the peer before its secret is looked at.
func (p peer) caller() grants.Caller {
	return grants.Caller{UID: p.uid, GID: grants.NoID, Via: "loopback, " + attest.DescribeTCPPeer(p.uid, p.unknown)}
}

// key is whom the peer's connections and requests count for: apart from those on the sockets, so that no user of this
// listener can keep a service from its tokens there.
func (p peer) key() limit.Key {
	return limit.Key{UID: p.uid, Unattested: p.unknown != nil, Loopback: true}
}

// isOwnProcess reports whether who is this very process, and not a different one of its user.
func isOwnProcess(who grants.Caller) bool {
	return int(who.PID) == os.Getpid() && int(who.UID) == os.Geteuid()
}

// isOwnConn reports whether a connection is this process's own, by which it checks that it answers. That is never one
// too many.
func isOwnConn(conn net.Conn) bool {
	return isOwnProcess(grants.Caller{PID: attest.PeerPID(conn), UID: attest.PeerUID(conn)})
}

// keyOf returns whom a caller counts for. owner is the user in whose session or service manager it runs, grants.NoID
// where it runs in none: other users that a user can become, such as those of /etc/subuid, count for that user.
//
// On a module's socket every caller counts for the module: a process that takes a place there takes it from the
// module alone. That includes callers that cannot be proved: their user says nothing, nor does a container's, whose
// root can be any user.
func keyOf(who *grants.Caller, owner uint32, isUnattested bool) limit.Key {
	uid := who.UID
	if who.Nested { // then it says nothing, as in a container
		uid = grants.NoID
	}
	if uid != 0 && owner != 0 && owner != grants.NoID {
		uid = owner
	}
	switch {
	case who.Module != "":
		return limit.Key{Module: who.Module, Unattested: isUnattested}
	case isUnattested:
		return limit.Key{UID: uid, Unattested: true}
	case who.Container != nil:
		return limit.Key{Container: who.Container.ID}
	}
	return limit.Key{UID: uid, Unit: who.Unit}
}

// newKeyOf returns a function that returns whom a connection counts for before it is let in, for one goroutine. A
// look-up of a process is kept for a moment: one that connects in a loop is not looked up each time.
func (s *Server) newKeyOf() func(conn net.Conn, closely bool) limit.Key {
	const keepTime, most = 100 * time.Millisecond, 256
	seen, since := make(map[int32]limit.Key), time.Time{}
	return func(conn net.Conn, closely bool) limit.Key {
		if !closely {
			return limit.Key{UID: attest.PeerUID(conn), Parent: true}
		}
		pid := attest.PeerPID(conn)
		if now := time.Now(); now.Sub(since) >= keepTime || len(seen) >= most {
			clear(seen)
			since = now
		}
		k, known := seen[pid]
		if !known {
			who, owner := s.Callers.Peer(conn)
			k = keyOf(&who, owner, false)
			seen[pid] = k
		}
		return k
	}
}
