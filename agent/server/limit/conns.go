package limit

import (
	"context"
	"errors"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Conns is the connection limiter of one kind of listener. It gives each caller its part of the places, so that none
// can use up the memory and the descriptors that the others, the back end and the daemon's check of itself need.
//
// A connection that comes when all places are taken gets the place of one that is idle: of the caller that has most,
// the one that has been without a request the longest. Where none is idle, it waits in line, for Capacity.LineTimeout
// from when it was accepted. Then it is refused: in the server's own words, if a request has come in by that time, or
// else in those of Refusals. So a caller that opens many connections at once gets its answers a little later; and the
// length of the line bounds what refusals take.
type Conns struct {
	clock  func() time.Time // the device's wall clock
	notify func(TurnedAway) // called when a connection is turned away, and none was lately
	line   atomic.Int32     // connections that wait in line

	refusals Refusals // for connections for which there was not even room in the line

	mu sync.Mutex // protects what follows
	places
	own         int     // places of the daemon itself
	waiting     []*Conn // in line, the first to come first
	turnedAways turnedAways

	lingering   []*Conn     // that have ended, and keep their places
	lingerTimer *time.Timer // for the next check of them; nil: none is planned
	lingerCheck time.Time   // when that is
}

// NewConns returns a limiter. clock is the device's wall clock. notify is called by a goroutine of its own when a
// connection was turned away, at most once a minute.
func NewConns(capacity Capacity, clock func() time.Time, notify func(TurnedAway)) *Conns {
	return &Conns{
		clock: clock, notify: notify,
		places: places{capacity: capacity}, refusals: Refusals{Most: capacity.Refused},
	}
}

// AddModules counts n more modules, or with a negative n fewer, that share the places.
func (cs *Conns) AddModules(n int32) { cs.modules.Add(n) }

// Acquire gives c a place, or lets it wait in line for one: see Conn.Waits. If there is neither, c is refused, and
// net/http sees it closed. k is whom c counts for; isOwn is set where c is the daemon's own. Call Release in the end.
func (cs *Conns) Acquire(c *Conn, k Key, isOwn bool) {
	c.key, c.conns = k, cs
	if !cs.acquire(c, isOwn) {
		conn := c.Conn
		c.Conn = handedOver{conn}
		cs.refusals.Refuse(conn, c.top().key)
	}
}

// acquire reports false when there is neither a place for c nor one in line.
func (cs *Conns) acquire(c *Conn, isOwn bool) bool {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if isOwn && cs.own < OwnPlaces {
		c.isOwn = true
		cs.own++
		return true
	}
	c.counted = cs.countedFor(c.key)
	if cs.take(c) || cs.enqueueLocked(c) {
		return true
	}
	cs.turnAwayLocked(c)
	cs.dropEmpty(c)
	return false
}

// Begin notes that a request is under way. It reports false when that is the last one on the connection.
func (c *Conn) Begin() (more bool) {
	if !c.asked.Load() {
		c.asked.Store(true)
	} else if !c.unreadBounded {
		c.BoundUnread()
	}
	if c.unreadAnswer.Load() {
		c.unreadAnswer.Store(false)
	}
	for {
		was := c.phase.Load()
		if was == phaseClosing {
			c.conns.reacquire(c)
			return false
		}
		if c.phase.CompareAndSwap(was, phaseBusy) {
			return true
		}
	}
}

// Idle notes that c has no request any more, which lets one that waits have its place.
func (cs *Conns) Idle(c *Conn) {
	c.setIdle()
	if cs.line.Load() == 0 {
		return
	}
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if c.at >= 0 {
		cs.promoteLocked(c)
	}
}

// Release takes out a connection that has ended, and gives its place to one that waits.
func (cs *Conns) Release(c *Conn) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if c.lingers.Load() {
		cs.reacquireLocked(c)
		cs.lingering = append(cs.lingering, c)
		cs.checkLingeringLocked(lingerFirst)
		return
	}
	cs.releaseLocked(c)
}

func (cs *Conns) releaseLocked(c *Conn) {
	switch {
	case c.isOwn:
		c.isOwn = false
		cs.own--
		return
	case c.at >= 0:
		cs.remove(c)
	case c.inLine.Load():
		cs.dequeueLocked(c)
	}
	cs.promoteLocked(nil)
}

// reacquire gives c, which has yielded its place, a place again, be there one or not: a request of its came in at that
// very moment.
func (cs *Conns) reacquire(c *Conn) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	cs.reacquireLocked(c)
}

func (cs *Conns) reacquireLocked(c *Conn) {
	if c.at >= 0 || c.isOwn || c.inLine.Load() {
		return
	}
	c.counted = cs.countedFor(c.key)
	cs.add(c)
}

// enqueueLocked lets c wait for a place, and reports false when the line is full.
func (cs *Conns) enqueueLocked(c *Conn) bool {
	if len(cs.waiting) >= cs.capacity.Line || c.top().waiting >= cs.capacity.LinePerParent {
		return false
	}
	cs.waiting = append(cs.waiting, c)
	cs.line.Store(int32(len(cs.waiting)))
	c.top().waiting++
	c.inLine.Store(true)
	c.gotPlace = make(chan struct{})
	c.lineTimer = time.AfterFunc(cs.capacity.LineTimeout, func() { cs.expire(c) })
	return true
}

// dequeueLocked takes c out of the line.
func (cs *Conns) dequeueLocked(c *Conn) {
	cs.waiting = slices.DeleteFunc(cs.waiting, func(other *Conn) bool { return other == c })
	cs.line.Store(int32(len(cs.waiting)))
	c.top().waiting--
	c.inLine.Store(false)
	c.lineTimer.Stop()
	cs.dropEmpty(c)
}

// promoteLocked gives the place of a connection that is idle, or one that is free, to the first in line that can have
// it.
func (cs *Conns) promoteLocked(idle *Conn) {
	now := time.Now()
	for _, c := range cs.waiting {
		if now.Sub(c.acceptedAt) >= cs.capacity.LineTimeout || c.lingers.Load() || !cs.fits(c, idle) {
			continue
		}
		if idle != nil {
			if !idle.yield(now) {
				return
			}
			cs.remove(idle)
		}
		cs.add(c)
		cs.dequeueLocked(c)
		close(c.gotPlace)
		return
	}
}

// Errors of Await, beside *TurnedAway and the context's.
var (
	// ErrRefused: the client was told already that there is no place. It asks again, so that what it asked for must not
	// come about as well.
	ErrRefused = errors.New("there was no free connection in time: ask again")
	// ErrStopped: the server goes down.
	ErrStopped = errors.New("the server goes down")
)

// Await waits until c, which Waits, has its place. The error says why it gets none; then c stays in line until its
// client was told so. A client that is refused has waited, so that it gains nothing by asking again at once. stopped is
// closed when the server goes down.
func (c *Conn) Await(ctx context.Context, stopped <-chan struct{}) error {
	cs := c.conns
	cs.mu.Lock()
	refused := c.refused
	if !refused && c.inLine.Load() && cs.take(c) { // something may be idle by now
		cs.dequeueLocked(c)
		close(c.gotPlace)
	}
	cs.mu.Unlock()
	if refused {
		return ErrRefused
	}
	timer := time.NewTimer(time.Until(c.acceptedAt.Add(cs.capacity.LineTimeout)))
	defer timer.Stop()
	select {
	case <-c.gotPlace:
		return nil
	case <-timer.C:
	case <-stopped:
		return ErrStopped
	case <-ctx.Done():
	}
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if !c.inLine.Load() {
		return nil
	}
	return cs.turnAwayLocked(c)
}

// expire refuses a connection that has waited its time without asking for anything.
func (cs *Conns) expire(c *Conn) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if !c.inLine.Load() {
		return
	}
	for {
		was := c.phase.Load()
		if was != phaseSilent && was != phaseReading {
			return
		}
		if c.phase.CompareAndSwap(was, phaseClosing) {
			cs.turnAwayLocked(c)
			c.refused = true
			if !c.wrote.Load() { // net/http has not refused it for another reason
				writeRefusal(c)
			}
			c.closeRead()
			return
		}
	}
}

// turnAwayLocked counts c as turned away, and returns which key has taken the places.
func (cs *Conns) turnAwayLocked(c *Conn) *TurnedAway {
	one := TurnedAway{Key: c.key}
	one.Holder, one.Holds, one.Of, one.everyone = cs.holder(c)
	return cs.recordLocked(one)
}

// recordLocked counts a connection that was turned away, and reports it unless one was reported lately.
func (cs *Conns) recordLocked(one TurnedAway) *TurnedAway {
	one.at, one.Listener = time.Now(), cs.capacity.Name
	if cs.clock != nil {
		one.On = cs.clock()
	}
	if cs.turnedAways.add(&one) && cs.notify != nil {
		go cs.notify(one) // which may look at cs
	}
	return &one
}

// RecordOverBudget counts a connection of k as turned away on its way in, since its caller connects more often, or more
// at once, than it may.
func (cs *Conns) RecordOverBudget(k Key) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	cs.recordLocked(TurnedAway{Key: k, Holder: k, overBudget: true})
}

// Refuse answers conn, which has not come as far as Acquire, with status 429. It does not wait.
func (cs *Conns) Refuse(conn net.Conn, k Key) { cs.refusals.Refuse(conn, k) }

// Usage is how full the places of one kind of listener are.
type Usage struct {
	Listener   string
	Open       int // connections that have a place, or wait for one
	Waiting    int // of Open, those that wait
	Silent     int // of Open, those that have a place, and on which nothing has come in yet
	Idle       int // of Open, those that have a place, and are between two requests
	Lingering  int // of Open, those that have ended, but for what their clients have not read
	Own        int // connections of the daemon itself, beside Open
	Limit      int
	TurnedAway int64      // since the start
	Last       TurnedAway // if any were
}

// Usage returns how full the places are.
func (cs *Conns) Usage() Usage {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	u := Usage{
		Listener: cs.capacity.Name, Open: len(cs.placed) + len(cs.waiting), Waiting: len(cs.waiting),
		Lingering: len(cs.lingering), Own: cs.own, Limit: cs.capacity.Total,
		TurnedAway: cs.turnedAways.count, Last: cs.turnedAways.last,
	}
	for _, c := range cs.placed {
		switch c.phase.Load() {
		case phaseSilent:
			u.Silent++
		case phaseIdle:
			u.Idle++
		}
	}
	return u
}

// Trouble is a sentence on connections that were turned away lately, and on who has the places; empty when none were.
func (cs *Conns) Trouble(now time.Time) string {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	return cs.turnedAways.trouble(now)
}

// checkLingeringLocked plans a check of the connections that linger, and then less and less frequent ones. The next
// check is never put off.
func (cs *Conns) checkLingeringLocked(wait time.Duration) {
	at := time.Now().Add(wait)
	if cs.lingerTimer != nil {
		if !at.Before(cs.lingerCheck) {
			return
		}
		cs.lingerTimer.Stop()
	}
	cs.lingerCheck = at
	cs.lingerTimer = time.AfterFunc(wait, func() {
		cs.mu.Lock()
		defer cs.mu.Unlock()
		cs.lingerTimer = nil
		cs.endLingeringLocked((*Conn).hasUnread)
		if len(cs.lingering) > 0 {
			cs.checkLingeringLocked(min(2*wait, lingerMost))
		}
	})
}

// endLingeringLocked closes the connections that linger, but for those that are to stay.
func (cs *Conns) endLingeringLocked(stays func(*Conn) bool) {
	var gone []*Conn
	cs.lingering = slices.DeleteFunc(cs.lingering, func(c *Conn) bool {
		if stays(c) {
			return false
		}
		gone = append(gone, c)
		return true
	})
	for _, c := range gone {
		_ = c.Conn.Close()
		cs.releaseLocked(c)
	}
}

// Close closes all connections that linger, or were refused.
func (cs *Conns) Close() {
	cs.refusals.Close()
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if cs.lingerTimer != nil {
		cs.lingerTimer.Stop()
	}
	cs.endLingeringLocked(func(*Conn) bool { return false })
}
