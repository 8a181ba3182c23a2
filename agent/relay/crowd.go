package relay

import (
	"cmp"
	"context"
	"net"
	"net/http"
	"sync"
	"time"

	"perceptd/agent/tcppeer"
)

// crowd is a listener that has a number of connections at most. The port is open to every user of the network namespace, and
// the uid says nothing of who may have a token: the command may have become another user. So nobody is turned away for it; but
// when a connection is one too many, another has to make room: first one on which the secret was never shown.
type crowd struct {
	net.Listener // tcppeer's

	mu     sync.Mutex // protects what follows
	left   sync.Cond
	guests map[net.Conn]*guest
	closed bool
}

// guest is who is at the other end of a connection.
type guest struct {
	uid    uint32    // tcppeer.NoUser: not known
	shown  bool      // the secret was
	asking int       // requests with the secret that are under way; there is one at most
	since  time.Time // the last of those, or when it came
}

func newCrowd(l net.Listener) *crowd {
	c := &crowd{Listener: tcppeer.Listen(l, "/proc", tcppeer.NoUser), guests: make(map[net.Conn]*guest)}
	c.left.L = &c.mu
	return c
}

// Accept waits for the next connection, and for room.
func (c *crowd) Accept() (net.Conn, error) {
	conn, err := c.Listener.Accept()
	if err != nil {
		return nil, err
	}
	uid, _ := tcppeer.User(conn) // all who are not known count as one
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(c.guests) >= connections && !c.closed {
		leaves := leaving(c.guests)
		if leaves == nil {
			c.left.Wait()
			continue
		}
		_ = leaves.Close() // ends its goroutine at the next read
		delete(c.guests, leaves)
	}
	c.guests[conn] = &guest{uid: uid, since: time.Now()}
	return conn, nil
}

// leaving returns the connection that has to make room: of those on which the secret was never shown, or else of those without
// a request, one of the user with the most; and of his the one without a request for the longest. Nil: every one is in use.
func leaving(guests map[net.Conn]*guest) (leaves net.Conn) {
	type count struct {
		uid   uint32
		shown bool
	}
	counts := make(map[count]int)
	for _, g := range guests {
		if g.asking == 0 {
			counts[count{g.uid, g.shown}]++
		}
	}
	var most *guest
	for conn, g := range guests {
		if g.asking > 0 {
			continue
		}
		if most == nil || cmp.Or(
			compare(most.shown, g.shown),
			cmp.Compare(counts[count{g.uid, g.shown}], counts[count{most.uid, most.shown}]),
			most.since.Compare(g.since),
		) > 0 {
			leaves, most = conn, g
		}
	}
	return leaves
}

// compare orders false before true.
func compare(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return 1
	}
	return -1
}

// Close has nobody come any more.
func (c *crowd) Close() error {
	c.mu.Lock()
	c.closed = true
	c.left.Broadcast()
	c.mu.Unlock()
	return c.Listener.Close()
}

// note forgets a connection that has ended. It is an http.Server's ConnState.
func (c *crowd) note(conn net.Conn, state http.ConnState) {
	if state == http.StateClosed {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.guests, conn)
		c.left.Broadcast()
	}
}

type guestKey struct{}

// meet returns ctx with who is at the other end of conn. It is an http.Server's ConnContext.
func (c *crowd) meet(ctx context.Context, conn net.Conn) context.Context {
	c.mu.Lock()
	defer c.mu.Unlock()
	return context.WithValue(ctx, guestKey{}, c.guests[conn])
}

// asks notes that a request has shown the secret, until what it returns is called.
func (c *crowd) asks(ctx context.Context) (answered func()) {
	g, _ := ctx.Value(guestKey{}).(*guest)
	if g == nil { // it has just made room
		return func() {}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	g.shown, g.since = true, time.Now()
	g.asking++
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		g.asking--
		g.since = time.Now()
	}
}
