package server

import (
	"slices"
	"time"

	"perceptd/agent/turnaway"
)

// A client may leave its answer unread. The kernel keeps it then for as long as the client keeps its end, also when this end
// is closed, and counts it as this process's memory. So a connection with something unread keeps its place when it ends,
// and its caller has no more of them than connections.

const (
	lingerFirst = 10 * time.Millisecond // most clients are about to read
	lingerMost  = time.Second           // between two looks at those that do not
)

// Close ends the connection: at once, or when its client has read what it was sent, or has gone.
func (c *connection) Close() error {
	if c.lingers.Load() {
		return nil
	}
	if c.crowd == nil || !c.wrote.Load() || !c.hasUnread() {
		return c.Conn.Close()
	}
	c.lingers.Store(true)
	c.phase.Store(phaseLeaving)
	_ = c.CloseWrite() // the client sees the end, after what it has not read
	c.end()
	return nil
}

// hasUnread reports whether the client has not read all that was written.
func (c *connection) hasUnread() bool { return turnaway.Unread(c.Conn) }

// linger keeps c's place. The lock is held.
func (cr *crowd) linger(c *connection) {
	cr.lingering = append(cr.lingering, c)
	cr.lookIn(lingerFirst)
}

// lookIn has those that linger looked at after a while, and then less and less often. The next look is never put off. The
// lock is held.
func (cr *crowd) lookIn(wait time.Duration) {
	at := time.Now().Add(wait)
	if cr.look != nil {
		if !at.Before(cr.lookOn) {
			return
		}
		cr.look.Stop()
	}
	cr.lookOn = at
	cr.look = time.AfterFunc(wait, func() {
		cr.mu.Lock()
		defer cr.mu.Unlock()
		cr.look = nil
		cr.release((*connection).hasUnread)
		if len(cr.lingering) > 0 {
			cr.lookIn(min(2*wait, lingerMost))
		}
	})
}

// release closes those that linger, but for those that are to stay. The lock is held.
func (cr *crowd) release(stays func(*connection) bool) {
	var gone []*connection
	cr.lingering = slices.DeleteFunc(cr.lingering, func(c *connection) bool {
		if stays(c) {
			return false
		}
		gone = append(gone, c)
		return true
	})
	for _, c := range gone {
		_ = c.Conn.Close()
		cr.leave(c)
	}
}

// close lets go of all that linger, or were refused.
func (cr *crowd) close() {
	cr.refused.Close()
	cr.mu.Lock()
	defer cr.mu.Unlock()
	if cr.look != nil {
		cr.look.Stop()
	}
	cr.release(func(*connection) bool { return false })
}
