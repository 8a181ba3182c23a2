package limit

import (
	"io"
	"net"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// phase is what a connection is at.
type phase = int32

const (
	phaseSilent  phase = iota // nothing has come in on it yet
	phaseReading              // some of a request has come in
	phaseBusy                 // a request is under way
	phaseIdle                 // between two requests, with nothing of the next one
	phaseClosing              // no request is read any more but what has come in already
)

// Conn is a connection as net/http sees it, with what Conns keeps of it.
type Conn struct {
	net.Conn
	headerTimeout time.Duration // for a request's header
	acceptedAt    time.Time
	phase         atomic.Int32
	idleSince     atomic.Int64 // when it was last left idle, counted from acceptedAt
	asked         atomic.Bool  // a request has come in
	wrote         atomic.Bool  // something was sent, be it net/http's own refusal of what is not a request
	inLine        atomic.Bool  // it waits for a place
	// unreadAnswer is set when its client had not read all of its answers when its place was wanted: then it keeps it.
	unreadAnswer atomic.Bool
	// lingers is set when it has ended, but for what the client has not read.
	lingers atomic.Bool

	// What follows is set before net/http reads from it.
	key   Key
	conns *Conns // nil: it is closed already

	// What follows is protected by the lock of conns.
	at        int // its index among those that have a place; -1: it has none
	isOwn     bool
	counted   []cappedTally
	gotPlace  chan struct{} // closed when it gets a place; nil: it never was in the line
	refused   bool          // its client was told that it gets none
	lineTimer *time.Timer

	unreadBounded bool // for one request at a time: what is written and not read is bounded
}

// Listener is a listener whose connections are *Conn.
type Listener struct {
	net.Listener
	HeaderTimeout time.Duration // for each request's header
}

// Accept waits for the next connection.
func (l Listener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return NewConn(conn, l.HeaderTimeout), nil
}

// NewConn returns a connection that was just accepted.
func NewConn(conn net.Conn, headerTimeout time.Duration) *Conn {
	return &Conn{Conn: conn, headerTimeout: headerTimeout, acceptedAt: time.Now(), at: -1}
}

// Key returns whom c counts for.
func (c *Conn) Key() Key { return c.key }

// AcceptedAt returns when c was accepted.
func (c *Conn) AcceptedAt() time.Time { return c.acceptedAt }

// HasAsked reports whether a request has come in on c.
func (c *Conn) HasAsked() bool { return c.asked.Load() }

// Waits reports whether c has no place yet and waits for one: see Await.
func (c *Conn) Waits() bool { return c.inLine.Load() }

// Read notes that a request has begun.
func (c *Conn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if n == 0 {
		return n, err
	}
	if was := c.phase.Load(); was == phaseSilent || was == phaseIdle {
		c.phase.CompareAndSwap(was, phaseReading)
		if was == phaseIdle && n < 4 {
			// net/http lets its own clock for a header run from the fourth byte on.
			_ = c.Conn.SetReadDeadline(time.Now().Add(c.headerTimeout))
		}
	}
	return n, err
}

// Write notes that there is something for the client to read.
func (c *Conn) Write(b []byte) (int, error) {
	if !c.wrote.Load() {
		c.wrote.Store(true)
	}
	return c.Conn.Write(b)
}

// CloseWrite is what net/http looks for, so that a refusal is read before the end.
func (c *Conn) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return nil
}

// Close ends the connection: at once, or when its client has read what it was sent, or has gone.
//
// A client may leave its answer unread. The kernel keeps that for as long as the client keeps its end, also when this
// end is closed, and counts it as this process's memory. So a connection with something unread keeps its place when it
// ends, and its caller has no more of them than connections.
func (c *Conn) Close() error {
	if c.lingers.Load() {
		return nil
	}
	if c.conns == nil || !c.wrote.Load() || !c.hasUnread() {
		return c.Conn.Close()
	}
	c.lingers.Store(true)
	c.phase.Store(phaseClosing)
	_ = c.CloseWrite() // the client sees the end, after what it has not read
	c.closeRead()
	return nil
}

// closeRead ends c, but for what is still to be written.
func (c *Conn) closeRead() {
	if half, ok := c.Conn.(interface{ CloseRead() error }); ok && half.CloseRead() == nil {
		return
	}
	_ = c.Conn.Close() // it ends its goroutine at the first read
}

// hasUnread reports whether the client has not read all that was written.
func (c *Conn) hasUnread() bool { return hasUnread(c.Conn) }

// setIdle notes that a request is done and the next one has not come.
func (c *Conn) setIdle() {
	c.idleSince.Store(int64(time.Since(c.acceptedAt)))
	c.phase.CompareAndSwap(phaseBusy, phaseIdle)
}

// SilenceTimeout is how long a connection is waited for on which nothing has come in: a client on a busy device may
// take a while from connecting to asking.
const SilenceTimeout = time.Second

// canYield reports whether c can be ended in that phase: it has no request under way, or has never had one.
func (c *Conn) canYield(at phase, now time.Time) bool {
	return at == phaseIdle && !c.unreadAnswer.Load() || at == phaseSilent && now.Sub(c.acceptedAt) >= SilenceTimeout
}

// restsSince returns since when c has been without a request.
func (c *Conn) restsSince() time.Time { return c.acceptedAt.Add(time.Duration(c.idleSince.Load())) }

// yield ends c as soon as what has come in on it already is answered. It reports false when a request is under way, or
// may be at any moment: then c keeps its place until that is answered.
//
// Only the reading end is shut. So a request that the kernel has is not lost, and a client that asks later is refused
// by the kernel before anything of it is sent, and may ask elsewhere.
func (c *Conn) yield(now time.Time) bool {
	was := c.phase.Load()
	if !c.canYield(was, now) {
		return false
	}
	if was == phaseIdle && c.hasUnread() {
		c.unreadAnswer.Store(true)
		return false
	}
	if !c.phase.CompareAndSwap(was, phaseClosing) {
		return false
	}
	c.closeRead()
	return queuedBytes(c.Conn, unix.SIOCINQ) == 0
}

// unreadAnswers bounds what a client can leave unread: the kernel holds that for it, and counts it as this process's
// memory. Linux takes twice as much, for its own bookkeeping. A longer answer is written piece by piece.
const unreadAnswers = 4 << 10

// BoundUnread bounds what the client can leave unread, so that its answers do not pile up. A client that asks for the
// first time has none.
func (c *Conn) BoundUnread() {
	c.unreadBounded = true
	if to, ok := c.Conn.(interface{ SetWriteBuffer(bytes int) error }); ok {
		_ = to.SetWriteBuffer(unreadAnswers) // without it there is more to hold, and nothing else is wrong
	}
}

// handedOver is a connection that is no longer net/http's, which sees its end.
type handedOver struct{ net.Conn }

func (handedOver) Read([]byte) (int, error)         { return 0, io.EOF }
func (handedOver) Write([]byte) (int, error)        { return 0, net.ErrClosed }
func (handedOver) Close() error                     { return nil }
func (handedOver) SetDeadline(time.Time) error      { return nil }
func (handedOver) SetReadDeadline(time.Time) error  { return nil }
func (handedOver) SetWriteDeadline(time.Time) error { return nil }
