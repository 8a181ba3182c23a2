// Package room serves HTTP on a loopback port to a number of connections at most. Every user of the network namespace can reach
// such a port. So when a connection is one too many another leaves, and those of strangers leave first: those of the user with the
// most, and among them the one that has been without a request the longest. Nobody is turned away for the uid.
package room

import (
	"cmp"
	"context"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"perceptd/agent/headlimit"
	"perceptd/agent/tcppeer"
)

// Room is the connections of one listener.
type Room struct {
	listener net.Listener
	most     int
	isKnown  func(uid uint32) bool

	mu     sync.Mutex // protects what follows
	left   sync.Cond
	guests map[net.Conn]*guest
	closed bool
}

// guest is who is at the other end of a connection.
type guest struct {
	looked bool   // for the uid, which costs milliseconds and is not asked for as long as there is room
	uid    uint32 // tcppeer.NoUser: not known
	known  bool   // no stranger
	asking bool   // a request is under way
	since  time.Time
}

// New returns a room for so many connections of l, a TCP listener on one address of this device. isKnown reports which users are no
// strangers; nil: all are.
func New(l net.Listener, most int, isKnown func(uid uint32) bool) *Room {
	r := &Room{listener: l, most: most, isKnown: isKnown, guests: make(map[net.Conn]*guest)}
	r.left.L = &r.mu
	return r
}

// Serve serves those in the room, whose requests are within headlimit's bounds, until the server is closed. It takes the server's
// ConnContext and ConnState for itself.
func (r *Room) Serve(server *http.Server) error {
	server.ConnContext, server.ConnState = r.meet, r.note
	return headlimit.Serve(server, r)
}

// Accept waits for the next connection, and for room.
func (r *Room) Accept() (net.Conn, error) {
	conn, err := r.listener.Accept()
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for len(r.guests) >= r.most {
		leaves := leaving(r.guests)
		switch {
		case r.closed:
			return nil, errors.Join(net.ErrClosed, conn.Close())
		case leaves == nil:
			r.left.Wait()
		case !r.guests[leaves].looked:
			r.look()
		default:
			_ = leaves.Close() // ends its goroutine at the next read
			delete(r.guests, leaves)
		}
	}
	r.guests[conn] = &guest{uid: tcppeer.NoUser, since: time.Now()}
	return conn, nil
}

// look finds out whose the connections are. The lock is held, and given back while the kernel is asked. All that are not known
// count as one user's.
func (r *Room) look() {
	r.mu.Unlock()
	users, _ := r.users()
	r.mu.Lock()
	for conn, g := range r.guests {
		if uid, found := users[tcppeer.AddressOf(conn.RemoteAddr())]; found && !g.looked {
			g.uid = uid
			g.known = g.known || r.isKnown != nil && r.isKnown(uid)
		}
		g.looked = true
	}
}

func (r *Room) users() (map[netip.AddrPort]uint32, error) {
	return tcppeer.Users("/proc", tcppeer.AddressOf(r.listener.Addr()))
}

// leaving returns the connection that has to make room: a stranger's, or else a known one's without a request; of the user with the
// most of those; and the one without a request for the longest. Nil: all are in use.
func leaving(guests map[net.Conn]*guest) (leaves net.Conn) {
	type kind struct {
		uid   uint32
		known bool
	}
	counts := make(map[kind]int)
	for _, g := range guests {
		counts[kind{g.uid, g.known}]++
	}
	var first *guest
	for conn, g := range guests {
		if g.known && g.asking {
			continue
		}
		if first == nil || cmp.Or(
			cmp.Compare(strangeness(g), strangeness(first)),
			cmp.Compare(counts[kind{g.uid, g.known}], counts[kind{first.uid, first.known}]),
			first.since.Compare(g.since),
		) > 0 {
			leaves, first = conn, g
		}
	}
	return leaves
}

func strangeness(g *guest) int {
	if g.known {
		return 0
	}
	return 1
}

// Addr returns the listener's address.
func (r *Room) Addr() net.Addr { return r.listener.Addr() }

// Close has nobody come any more.
func (r *Room) Close() error {
	r.mu.Lock()
	r.closed = true
	r.left.Broadcast()
	r.mu.Unlock()
	return r.listener.Close()
}

// note forgets a connection that has ended, and notes that an answer has left.
func (r *Room) note(conn net.Conn, state http.ConnState) {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch g := r.guests[conn]; {
	case state == http.StateClosed || state == http.StateHijacked:
		delete(r.guests, conn)
	case state == http.StateIdle && g != nil:
		g.asking, g.since = false, time.Now()
	default:
		return
	}
	r.left.Broadcast()
}

type guestKey struct{}

// meet returns ctx with who is at the other end of conn.
func (r *Room) meet(ctx context.Context, conn net.Conn) context.Context {
	r.mu.Lock()
	defer r.mu.Unlock()
	return context.WithValue(ctx, guestKey{}, r.guests[conn])
}

// User returns the uid of whoever made the connection that a request came in on, or why it is not known.
func (r *Room) User(q *http.Request) (uint32, error) {
	users, err := r.users()
	if err != nil {
		return tcppeer.NoUser, err
	}
	from, err := netip.ParseAddrPort(q.RemoteAddr)
	if err != nil {
		return tcppeer.NoUser, err
	}
	if uid, found := users[netip.AddrPortFrom(from.Addr().Unmap(), from.Port())]; found {
		return uid, nil
	}
	return tcppeer.NoUser, errors.New("the kernel's table of sockets does not have the other end")
}

// Asks notes that a request with this context is under way, and if isKnown that it is no stranger's: the connection of one that
// is known stays until the answer has left.
func (r *Room) Asks(ctx context.Context, isKnown bool) {
	if g, _ := ctx.Value(guestKey{}).(*guest); g != nil { // nil: it has just made room for another
		r.mu.Lock()
		defer r.mu.Unlock()
		g.known = g.known || isKnown
		g.asking, g.since = true, time.Now()
	}
}
