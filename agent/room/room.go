// Package room serves HTTP on a loopback port to a bounded number of connections. Every user of the network namespace
// can reach such a port. So when a connection is one too many, an open one is evicted: a stranger's first, of the
// user with the most, and among those the one that has been without a request the longest. No connection is refused
// for its uid.
//
// A connection that was just made is not evicted for others of its own user, which may ask as many at once. Those
// wait in the kernel's queue, and are answered with 429 when no connection has ended for a second.
package room

import (
	"cmp"
	"context"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"os"
	"sync"
	"time"

	"perceptd/agent/server/limit"
	"perceptd/agent/tcppeer"
)

const (
	// firstRequestTimeout is how long a new connection is kept on which no request has come in.
	firstRequestTimeout = 500 * time.Millisecond

	// admitTimeout is how long a connection waits for room.
	admitTimeout = time.Second

	// lookupInterval is how often the users of the connections are looked up, at most: it costs milliseconds. And it
	// is how long new connections have to show that they are not strangers', before others are let in for them.
	lookupInterval = 25 * time.Millisecond
)

// Room is the connections of one listener.
type Room struct {
	listener net.Listener
	most     int
	isKnown  func(uid uint32) bool
	timeout  time.Duration // of a connection that waits for room

	refused limit.Refusals

	mu        sync.Mutex // protects what follows
	changed   sync.Cond
	clients   map[net.Conn]*client
	familiar  map[uint32]bool // users that had a known connection, and this process's own
	lookedUp  time.Time       // when users were last looked up
	fullSince time.Time       // when a connection found no room, and none has ended since; zero: one has
	closed    bool
}

// client is what is known of the other end of a connection.
type client struct {
	lookedUp  bool   // the uid was, which costs milliseconds and is not done as long as there is room
	uid       uint32 // tcppeer.NoUser: not known
	known     bool   // not a stranger
	asking    bool   // a request is under way
	asked     bool   // there has been a request
	idleSince time.Time
}

// New returns a room for so many connections of l, a TCP listener on one address of this device. isKnown reports which
// users are not strangers; nil: all are.
func New(l net.Listener, most int, isKnown func(uid uint32) bool) *Room {
	r := &Room{
		listener: l, most: most, isKnown: isKnown, timeout: admitTimeout,
		clients: make(map[net.Conn]*client), familiar: map[uint32]bool{uint32(os.Geteuid()): true},
	}
	r.refused.Most = 3 * most // of which one caller can have two thirds
	r.changed.L = &r.mu
	return r
}

// Serve serves the connections in the room, within the bounds of limit.Serve, until the server is closed. It takes the
// server's ConnContext and ConnState for itself.
func (r *Room) Serve(server *http.Server) error {
	server.ConnContext, server.ConnState = r.connContext, r.connState
	defer r.refused.Close()
	return limit.Serve(server, r)
}

// Accept waits for the next connection, and for room.
func (r *Room) Accept() (net.Conn, error) {
	for {
		conn, err := r.listener.Accept()
		if err != nil {
			return nil, err
		}
		admitted, err := r.admit(conn)
		switch {
		case err != nil:
			return nil, errors.Join(err, conn.Close())
		case admitted:
			return conn, nil
		}
		r.refused.Refuse(conn, limit.Key{})
	}
}

// admit waits for room, and reports false when there is none in time. Meanwhile other connections wait in the kernel's
// queue.
func (r *Room) admit(conn net.Conn) (bool, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for len(r.clients) >= r.most && !r.closed {
		now := time.Now()
		if r.fullSince.IsZero() {
			r.fullSince = now
		}
		evicted, until := chooseEvicted(r.clients, r.familiar, now)
		switch {
		case evicted != nil:
			r.evictLocked(evicted)
		case r.needsLookupLocked() && !now.Before(r.nextLookupLocked()):
			r.lookUpLocked()
		case now.Sub(r.fullSince) >= r.timeout:
			return false, nil
		default:
			if r.needsLookupLocked() {
				until = earlier(until, r.nextLookupLocked())
			}
			r.awaitLocked(earlier(until, r.fullSince.Add(r.timeout)))
		}
	}
	if r.closed {
		return false, net.ErrClosed
	}
	r.clients[conn] = &client{uid: tcppeer.NoUser, idleSince: time.Now()}
	return true, nil
}

// evictLocked ends a connection. What the kernel has of a known client's next request is still answered.
func (r *Room) evictLocked(conn net.Conn) {
	half, ok := conn.(interface{ CloseRead() error })
	if !ok || !r.clients[conn].known || half.CloseRead() != nil {
		_ = conn.Close() // ends its goroutine at the next read
	}
	delete(r.clients, conn)
	r.fullSince = time.Time{}
}

// awaitLocked waits for a change, or until then. It gives the lock back meanwhile.
func (r *Room) awaitLocked(until time.Time) {
	timer := time.AfterFunc(time.Until(until), func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.changed.Broadcast()
	})
	defer timer.Stop()
	r.changed.Wait()
}

// earlier returns the earlier of two moments. Zero: never.
func earlier(a, b time.Time) time.Time {
	if a.IsZero() || b.Before(a) {
		return b
	}
	return a
}

// nextLookupLocked returns when users may be looked up again.
func (r *Room) nextLookupLocked() time.Time {
	if r.lookedUp.After(r.fullSince) {
		return r.lookedUp.Add(lookupInterval)
	}
	return r.fullSince.Add(lookupInterval)
}

// needsLookupLocked reports whether there are connections whose user was not looked up.
func (r *Room) needsLookupLocked() bool {
	for _, c := range r.clients {
		if !c.lookedUp && !c.known {
			return true
		}
	}
	return false
}

// lookUpLocked looks up the users of all connections. It gives the lock back while it asks the kernel. Connections
// whose user is not known count as one user's.
func (r *Room) lookUpLocked() {
	before := make(map[net.Conn]bool, len(r.clients))
	for conn := range r.clients {
		before[conn] = true
	}
	r.mu.Unlock()
	users, _ := r.users()
	r.mu.Lock()
	r.lookedUp = time.Now()
	for conn, c := range r.clients {
		if uid, found := users[tcppeer.AddressOf(conn.RemoteAddr())]; found && !c.lookedUp {
			c.uid = uid
			c.known = c.known || r.isKnown != nil && r.isKnown(uid)
		}
		c.lookedUp = c.lookedUp || before[conn]
		r.noteFamiliarLocked(c)
	}
}

// noteFamiliarLocked notes the user of a known connection.
func (r *Room) noteFamiliarLocked(c *client) {
	if c.known && c.uid != tcppeer.NoUser {
		r.familiar[c.uid] = true
	}
}

func (r *Room) users() (map[netip.AddrPort]uint32, error) {
	return tcppeer.Users("/proc", tcppeer.AddressOf(r.listener.Addr()))
}

// chooseEvicted returns the connection that has to make room: a stranger's, or else one of a familiar user that is
// not known itself, or else a known one without a request; of the user with the most of those; and the one without a
// request for the longest. Nil: there is none yet, and until is when there may be one, zero for never.
//
// A new connection of a familiar user, or of a user that was not looked up yet, has time to ask first. Until then no
// known connection is evicted.
func chooseEvicted(
	clients map[net.Conn]*client, familiar map[uint32]bool, now time.Time,
) (evicted net.Conn, until time.Time) {
	type kind struct {
		uid   uint32
		known bool
	}
	counts := make(map[kind]int)
	for _, c := range clients {
		counts[kind{c.uid, c.known}]++
	}
	var worst *client
	awaited := false
	for conn, c := range clients {
		switch {
		case c.known && c.asking:
			continue
		case !c.known && !c.lookedUp:
			awaited = true
			continue
		case (c.known || familiar[c.uid]) && !c.asked && now.Sub(c.idleSince) < firstRequestTimeout:
			awaited = true
			until = earlier(until, c.idleSince.Add(firstRequestTimeout))
			continue
		}
		if worst == nil || cmp.Or(
			cmp.Compare(c.evictionRank(familiar), worst.evictionRank(familiar)),
			cmp.Compare(counts[kind{c.uid, c.known}], counts[kind{worst.uid, worst.known}]),
			worst.idleSince.Compare(c.idleSince),
		) > 0 {
			evicted, worst = conn, c
		}
	}
	if worst != nil && worst.known && awaited {
		return nil, until
	}
	return evicted, until
}

// evictionRank is the higher the sooner c is evicted.
func (c *client) evictionRank(familiar map[uint32]bool) int {
	switch {
	case c.known:
		return 0
	case familiar[c.uid]:
		return 1
	}
	return 2
}

// Addr returns the listener's address.
func (r *Room) Addr() net.Addr { return r.listener.Addr() }

// Close stops accepting.
func (r *Room) Close() error {
	r.mu.Lock()
	r.closed = true
	r.changed.Broadcast()
	r.mu.Unlock()
	return r.listener.Close()
}

// connState forgets a connection that has ended, and notes that an answer was sent.
func (r *Room) connState(conn net.Conn, state http.ConnState) {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch c := r.clients[conn]; {
	case state == http.StateClosed || state == http.StateHijacked:
		if c != nil {
			delete(r.clients, conn)
			r.fullSince = time.Time{}
		}
	case state == http.StateIdle && c != nil:
		c.asking, c.idleSince = false, time.Now()
	default:
		return
	}
	r.changed.Broadcast()
}

type clientKey struct{}

// connContext returns ctx with the client at the other end of conn.
func (r *Room) connContext(ctx context.Context, conn net.Conn) context.Context {
	r.mu.Lock()
	defer r.mu.Unlock()
	return context.WithValue(ctx, clientKey{}, r.clients[conn])
}

// User returns the uid of the user that made the connection of a request, or why it is not known.
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

// Asks notes that a request with this context is under way, and if isKnown that it is not a stranger's: a known
// client's connection stays until the answer was sent.
func (r *Room) Asks(ctx context.Context, isKnown bool) {
	if c, _ := ctx.Value(clientKey{}).(*client); c != nil { // nil: it was just evicted
		r.mu.Lock()
		defer r.mu.Unlock()
		c.known = c.known || isKnown
		c.asking, c.asked, c.idleSince = true, true, time.Now()
		r.noteFamiliarLocked(c)
		r.changed.Broadcast()
	}
}
