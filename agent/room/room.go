// Package room serves HTTP on a loopback port to a number of connections at most. Every user of the network namespace can reach
// such a port. So when a connection is one too many another leaves, and those of strangers leave first: those of the user with the
// most, and among them the one that has been without a request the longest. Nobody is turned away for the uid.
//
// One that has just connected does not leave for others of its own user, which may ask as many at once: those wait outside, and are
// answered with 429 when nobody has left for a second.
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
	// hearing is how long a connection is waited for that has not asked for anything yet.
	hearing = 500 * time.Millisecond

	// waiting is how long those outside wait when nobody leaves.
	waiting = time.Second

	// lookEvery is how often it is looked whose the connections are, at most: it costs milliseconds. And it is how long those who
	// have just connected have to show that they are no strangers, before others are let in for them.
	lookEvery = 25 * time.Millisecond
)

// Room is the connections of one listener.
type Room struct {
	listener net.Listener
	most     int
	isKnown  func(uid uint32) bool
	patience time.Duration // of those outside, when nobody leaves

	refused limit.Refusals

	mu       sync.Mutex // protects what follows
	changed  sync.Cond
	guests   map[net.Conn]*guest
	familiar map[uint32]bool // users of whom one was known, and this process's own
	looked   time.Time       // whose the connections are
	still    time.Time       // when somebody found no room, and nobody has left since; zero: somebody has
	closed   bool
}

// guest is who is at the other end of a connection.
type guest struct {
	looked bool   // for the uid, which costs milliseconds and is not asked for as long as there is room
	uid    uint32 // tcppeer.NoUser: not known
	known  bool   // no stranger
	asking bool   // a request is under way
	asked  bool   // there has been a request
	since  time.Time
}

// New returns a room for so many connections of l, a TCP listener on one address of this device. isKnown reports which users are no
// strangers; nil: all are.
func New(l net.Listener, most int, isKnown func(uid uint32) bool) *Room {
	r := &Room{
		listener: l, most: most, isKnown: isKnown, patience: waiting,
		guests: make(map[net.Conn]*guest), familiar: map[uint32]bool{uint32(os.Geteuid()): true},
	}
	r.refused.Most = 3 * most // of which one caller can have two thirds
	r.changed.L = &r.mu
	return r
}

// Serve serves those in the room, whose requests are within the bounds of limit.Serve, until the server is closed. It takes the server's
// ConnContext and ConnState for itself.
func (r *Room) Serve(server *http.Server) error {
	server.ConnContext, server.ConnState = r.meet, r.note
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
		hasRoom, err := r.letIn(conn)
		switch {
		case err != nil:
			return nil, errors.Join(err, conn.Close())
		case hasRoom:
			return conn, nil
		}
		r.refused.Refuse(conn, limit.Key{})
	}
}

// letIn waits for room, and reports false when nobody leaves. Meanwhile others wait in the kernel's queue.
func (r *Room) letIn(conn net.Conn) (bool, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for len(r.guests) >= r.most && !r.closed {
		now := time.Now()
		if r.still.IsZero() {
			r.still = now
		}
		leaves, until := leaving(r.guests, r.familiar, now)
		switch {
		case leaves != nil:
			r.sendOff(leaves)
		case r.isUnlooked() && !now.Before(r.nextLook()):
			r.look()
		case now.Sub(r.still) >= r.patience:
			return false, nil
		default:
			if r.isUnlooked() {
				until = earlier(until, r.nextLook())
			}
			r.await(earlier(until, r.still.Add(r.patience)))
		}
	}
	if r.closed {
		return false, net.ErrClosed
	}
	r.guests[conn] = &guest{uid: tcppeer.NoUser, since: time.Now()}
	return true, nil
}

// sendOff ends a connection. What the kernel has of a known one's next request is still answered. The lock is held.
func (r *Room) sendOff(conn net.Conn) {
	half, ok := conn.(interface{ CloseRead() error })
	if !ok || !r.guests[conn].known || half.CloseRead() != nil {
		_ = conn.Close() // ends its goroutine at the next read
	}
	delete(r.guests, conn)
	r.still = time.Time{}
}

// await waits for a change, or until then. The lock is held, and given back meanwhile.
func (r *Room) await(until time.Time) {
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

// nextLook returns when it may be looked whose the connections are. The lock is held.
func (r *Room) nextLook() time.Time {
	if r.looked.After(r.still) {
		return r.looked.Add(lookEvery)
	}
	return r.still.Add(lookEvery)
}

// isUnlooked reports whether it is worth to look whose the connections are. The lock is held.
func (r *Room) isUnlooked() bool {
	for _, g := range r.guests {
		if !g.looked && !g.known {
			return true
		}
	}
	return false
}

// look finds out whose the connections are. The lock is held, and given back while the kernel is asked. All that are not known
// count as one user's.
func (r *Room) look() {
	before := make(map[net.Conn]bool, len(r.guests))
	for conn := range r.guests {
		before[conn] = true
	}
	r.mu.Unlock()
	users, _ := r.users()
	r.mu.Lock()
	r.looked = time.Now()
	for conn, g := range r.guests {
		if uid, found := users[tcppeer.AddressOf(conn.RemoteAddr())]; found && !g.looked {
			g.uid = uid
			g.known = g.known || r.isKnown != nil && r.isKnown(uid)
		}
		g.looked = g.looked || before[conn]
		r.meetAgain(g)
	}
}

// meetAgain notes whose a known connection is. The lock is held.
func (r *Room) meetAgain(g *guest) {
	if g.known && g.uid != tcppeer.NoUser {
		r.familiar[g.uid] = true
	}
}

func (r *Room) users() (map[netip.AddrPort]uint32, error) {
	return tcppeer.Users("/proc", tcppeer.AddressOf(r.listener.Addr()))
}

// leaving returns the connection that has to make room: a stranger's, or else one that has not shown that it is none, or else a
// known one's without a request; of the user with the most of those; and the one without a request for the longest. Nil: there is
// none yet, and until is when another may, zero for never.
//
// One of a familiar user that has just connected is heard first, and before that no known one leaves. So is one of whom it is not
// known yet whose it is.
func leaving(guests map[net.Conn]*guest, familiar map[uint32]bool, now time.Time) (leaves net.Conn, until time.Time) {
	type kind struct {
		uid   uint32
		known bool
	}
	counts := make(map[kind]int)
	for _, g := range guests {
		counts[kind{g.uid, g.known}]++
	}
	var first *guest
	unheard := false
	for conn, g := range guests {
		switch {
		case g.known && g.asking:
			continue
		case !g.known && !g.looked:
			unheard = true
			continue
		case (g.known || familiar[g.uid]) && !g.asked && now.Sub(g.since) < hearing:
			unheard = true
			until = earlier(until, g.since.Add(hearing))
			continue
		}
		if first == nil || cmp.Or(
			cmp.Compare(g.strangeness(familiar), first.strangeness(familiar)),
			cmp.Compare(counts[kind{g.uid, g.known}], counts[kind{first.uid, first.known}]),
			first.since.Compare(g.since),
		) > 0 {
			leaves, first = conn, g
		}
	}
	if first != nil && first.known && unheard {
		return nil, until
	}
	return leaves, until
}

func (g *guest) strangeness(familiar map[uint32]bool) int {
	switch {
	case g.known:
		return 0
	case familiar[g.uid]:
		return 1
	}
	return 2
}

// Addr returns the listener's address.
func (r *Room) Addr() net.Addr { return r.listener.Addr() }

// Close has nobody come any more.
func (r *Room) Close() error {
	r.mu.Lock()
	r.closed = true
	r.changed.Broadcast()
	r.mu.Unlock()
	return r.listener.Close()
}

// note forgets a connection that has ended, and notes that an answer has left.
func (r *Room) note(conn net.Conn, state http.ConnState) {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch g := r.guests[conn]; {
	case state == http.StateClosed || state == http.StateHijacked:
		if g != nil {
			delete(r.guests, conn)
			r.still = time.Time{}
		}
	case state == http.StateIdle && g != nil:
		g.asking, g.since = false, time.Now()
	default:
		return
	}
	r.changed.Broadcast()
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
		g.asking, g.asked, g.since = true, true, time.Now()
		r.meetAgain(g)
		r.changed.Broadcast()
	}
}
