package server

import (
	"context"
	"io"
	"net"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"perceptd/agent/turnaway"
)

// phase is what a connection is at.
type phase = int32

const (
	phaseSilent  phase = iota // nothing has come in on it yet
	phaseReading              // some of a request has come in
	phaseBusy                 // a request is under way
	phaseIdle                 // between two requests, with nothing of the next one
	phaseLeaving              // no request is read any more but what has come in already
)

// connection is a connection as net/http sees it, with what is kept of it.
type connection struct {
	net.Conn
	header time.Duration // for a request's header
	on     time.Time     // when it was accepted
	phase  atomic.Int32
	idleOn atomic.Int64 // since it was accepted, when it was last left idle
	asked  atomic.Bool  // a request has come in
	wrote  atomic.Bool  // something was sent, be it net/http's own refusal of what is not a request
	inLine atomic.Bool  // it has no place yet
	// stuck tells that its client had not read all of its answers when its place was wanted; then it keeps it.
	stuck atomic.Bool
	// lingers tells that it has ended, but for what the client has not read.
	lingers atomic.Bool

	// What follows is set before net/http reads from it.
	key   quotaKey
	crowd *crowd // nil: it is closed already

	// What follows is the crowd's, and protected by its lock.
	at      int // among those that have a place; -1: it has none
	isOwn   bool
	counted []tallied
	turn    chan struct{} // closed when it gets a place; nil: it never was in the line
	refused bool          // it was told that it gets none
	expiry  *time.Timer

	bounded bool // for one request at a time: what is written and not read is bounded
}

type connectionKey struct{}

// connectionIn returns the connection whose context that is, or nil.
func connectionIn(ctx context.Context) *connection {
	c, _ := ctx.Value(connectionKey{}).(*connection)
	return c
}

// connections is a listener whose connections are *connection.
type connections struct {
	net.Listener
	header time.Duration // for each request's header
}

func (l connections) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &connection{Conn: conn, header: l.header, on: time.Now(), at: -1}, nil
}

// Read notes that a request has begun.
func (c *connection) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if n == 0 {
		return n, err
	}
	if was := c.phase.Load(); was == phaseSilent || was == phaseIdle {
		c.phase.CompareAndSwap(was, phaseReading)
		if was == phaseIdle && n < 4 {
			// net/http lets its own clock for a header run from the fourth byte on.
			_ = c.Conn.SetReadDeadline(time.Now().Add(c.header))
		}
	}
	return n, err
}

// Write notes that there is something for the client to read.
func (c *connection) Write(b []byte) (int, error) {
	if !c.wrote.Load() {
		c.wrote.Store(true)
	}
	return c.Conn.Write(b)
}

// CloseWrite is what net/http looks for, to have a refusal read before the end.
func (c *connection) CloseWrite() error {
	if to, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return to.CloseWrite()
	}
	return nil
}

// begin notes that a request is under way, and reports false when it is the last one.
func (c *connection) begin() (more bool) {
	if !c.asked.Load() {
		c.asked.Store(true)
	} else if !c.bounded {
		c.bound()
	}
	if c.stuck.Load() {
		c.stuck.Store(false)
	}
	for {
		was := c.phase.Load()
		if was == phaseLeaving {
			c.crowd.takeBack(c)
			return false
		}
		if c.phase.CompareAndSwap(was, phaseBusy) {
			return true
		}
	}
}

// rest notes that a request is done and the next one has not come.
func (c *connection) rest() {
	c.idleOn.Store(int64(time.Since(c.on)))
	c.phase.CompareAndSwap(phaseBusy, phaseIdle)
}

// leave has c end as soon as what has come in on it already is answered. It reports false when a request is under way,
// or may be at any moment: then c keeps its place until that is answered.
//
// Only the reading end is shut. So a request that the kernel has is not lost, and a client that asks later is refused by
// the kernel before anything of it is sent, and may ask elsewhere.
func (c *connection) leave(now time.Time) bool {
	was := c.phase.Load()
	if !c.isIdle(was, now) {
		return false
	}
	if was == phaseIdle && c.hasUnread() {
		c.stuck.Store(true)
		return false
	}
	if !c.phase.CompareAndSwap(was, phaseLeaving) {
		return false
	}
	c.end()
	return turnaway.Queued(c.Conn, unix.SIOCINQ) == 0
}

func (c *connection) end() {
	if to, ok := c.Conn.(interface{ CloseRead() error }); ok && to.CloseRead() == nil {
		return
	}
	_ = c.Conn.Close() // it ends its goroutine at the first read
}

// isIdle reports whether c can be ended in that phase: it has no request under way, or has never had one.
func (c *connection) isIdle(at phase, now time.Time) bool {
	return at == phaseIdle && !c.stuck.Load() || at == phaseSilent && now.Sub(c.on) >= hearing
}

// idleSince returns since when c is without a request.
func (c *connection) idleSince() time.Time { return c.on.Add(time.Duration(c.idleOn.Load())) }

// unreadAnswers bounds what a client can leave unread: the kernel holds that for it, and counts it as this process's
// memory. Linux takes twice as much, for its own bookkeeping. A longer answer is written piece by piece.
const unreadAnswers = 4 << 10

// bound keeps a client from having answers pile up. One that asks for a token for the first time has none.
func (c *connection) bound() {
	c.bounded = true
	if to, ok := c.Conn.(interface{ SetWriteBuffer(bytes int) error }); ok {
		_ = to.SetWriteBuffer(unreadAnswers) // without it there is more to hold, and nothing else is wrong
	}
}

// refuse hands the connection over to those that are refused, before net/http has read from it. That finds it ended.
func (c *connection) refuse() {
	conn := c.Conn
	c.Conn = handedOver{conn}
	c.crowd.refused.Refuse(conn, c.whole().key)
}

// handedOver is a connection that is no longer net/http's, which sees its end.
type handedOver struct{ net.Conn }

func (handedOver) Read([]byte) (int, error)         { return 0, io.EOF }
func (handedOver) Write([]byte) (int, error)        { return 0, net.ErrClosed }
func (handedOver) Close() error                     { return nil }
func (handedOver) SetDeadline(time.Time) error      { return nil }
func (handedOver) SetReadDeadline(time.Time) error  { return nil }
func (handedOver) SetWriteDeadline(time.Time) error { return nil }
