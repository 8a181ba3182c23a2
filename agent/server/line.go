package server

import (
	"fmt"
	"slices"
	"time"

	"perceptd/agent/api"
	"perceptd/agent/turnaway"
)

// The line is of connections for which there is no place. Each waits for one, for a second from when it came (Limits.Place), and is
// refused then: in its own words, if it has asked for something by that time, or else in those of turnaway. So a caller that opens many connections at once
// gets its answers a little later; and what a refusal takes is bounded by the length of the line.

// queue has c wait for a place, and reports false when the line is full.
func (cr *crowd) queue(c *connection) bool {
	if len(cr.line) >= cr.room.line || c.whole().waiting >= cr.room.linePer {
		return false
	}
	cr.line = append(cr.line, c)
	cr.waiting.Store(int32(len(cr.line)))
	c.whole().waiting++
	c.inLine.Store(true)
	c.turn = make(chan struct{})
	c.expiry = time.AfterFunc(cr.room.wait, func() { cr.expire(c) })
	return true
}

// unqueue takes c out of the line.
func (cr *crowd) unqueue(c *connection) {
	cr.line = slices.DeleteFunc(cr.line, func(other *connection) bool { return other == c })
	cr.waiting.Store(int32(len(cr.line)))
	c.whole().waiting--
	c.inLine.Store(false)
	c.expiry.Stop()
	cr.tidy(c)
}

// callUp gives the place of a connection that is idle, or one that is free, to the first in line whom it does.
func (cr *crowd) callUp(rests *connection) {
	now := time.Now()
	for _, c := range cr.line {
		if now.Sub(c.on) >= cr.room.wait || c.lingers.Load() || !cr.fits(c, rests) {
			continue
		}
		if rests != nil {
			if !rests.leave(now) {
				return
			}
			cr.remove(rests)
		}
		cr.letIn(c)
		return
	}
}

// letIn gives c, which is in the line, a place.
func (cr *crowd) letIn(c *connection) {
	cr.place(c)
	cr.unqueue(c)
	close(c.turn)
}

// await waits until c has its place. It returns why c gets none: then it stays in the line until it has been told so. Who
// is refused has waited, so that to come again at once brings nothing.
func (c *connection) await(x *exchange) *fault {
	cr := c.crowd
	cr.mu.Lock()
	refused := c.refused
	if !refused && c.inLine.Load() && cr.admit(c) { // something may be idle by now
		cr.unqueue(c)
		close(c.turn)
	}
	cr.mu.Unlock()
	if refused { // its client asks again: what it asked for must not come about as well
		return busy("there was no free connection in time: ask again")
	}
	timer := time.NewTimer(time.Until(c.on.Add(cr.room.wait)))
	defer timer.Stop()
	select {
	case <-c.turn:
		return nil
	case <-timer.C:
	case <-x.down:
		return goingDown()
	case <-x.request.Context().Done():
	}
	cr.mu.Lock()
	defer cr.mu.Unlock()
	if !c.inLine.Load() {
		return nil
	}
	f := busy(cr.turnAway(c).advice())
	f.retryAfter = time.Second
	return f
}

// expire refuses a connection that has waited its time and has not asked for anything.
func (cr *crowd) expire(c *connection) {
	cr.mu.Lock()
	defer cr.mu.Unlock()
	if !c.inLine.Load() {
		return
	}
	for {
		was := c.phase.Load()
		if was != phaseSilent && was != phaseReading {
			return
		}
		if c.phase.CompareAndSwap(was, phaseLeaving) {
			cr.turnAway(c)
			c.refused = true
			if !c.wrote.Load() { // net/http has not refused it for another reason
				turnaway.Tell(c)
			}
			c.end()
			return
		}
	}
}

// away is who was turned away.
type away struct {
	count int64
	last  turnedAway
	told  time.Time
}

// turnedAway is a connection for which there was no place, and who had taken them.
type turnedAway struct {
	on       time.Time // by this process's clock, and shown by the daemon's
	shown    time.Time
	room     string
	who      quotaKey // who was turned away
	holder   quotaKey // who has most of the places that it needed
	holds    int
	of       int   // that the holder, or everybody, may have
	everyone bool  // of is what everybody together may have
	arriving bool  // it was on its way in, and places had nothing to do with it
	count    int64 // since the start
}

// tellEvery is how often it is reported that connections are turned away.
const tellEvery = time.Minute

// turnAway notes that c was turned away, and returns who has taken the places.
func (cr *crowd) turnAway(c *connection) turnedAway {
	one := turnedAway{on: time.Now(), room: cr.room.name, who: c.key}
	for _, of := range c.counted {
		if of.placed >= of.most {
			one.holder, one.holds, one.of = of.key, of.placed, of.most
			break
		}
	}
	if one.of == 0 {
		one.of, one.everyone = cr.room.all, true
		for _, other := range cr.placed {
			if whole := other.whole(); whole.placed > one.holds {
				one.holder, one.holds = whole.key, whole.placed
			}
		}
	}
	return cr.noteAway(one)
}

// noteAway counts a connection that was turned away, and has it reported where that was not done lately.
func (cr *crowd) noteAway(one turnedAway) turnedAway {
	cr.away.count++
	one.count = cr.away.count
	if cr.wall != nil {
		one.shown = cr.wall()
	}
	cr.away.last = one
	if cr.notify != nil && (cr.away.told.IsZero() || one.on.Sub(cr.away.told) >= tellEvery) {
		cr.away.told = one.on
		go cr.notify(one) // which may look at the crowd
	}
	return one
}

// missed notes that a connection was turned away on its way in, since its caller connects more often, or more at once, than it may.
func (cr *crowd) missed(from quotaKey) {
	cr.mu.Lock()
	defer cr.mu.Unlock()
	cr.noteAway(turnedAway{on: time.Now(), room: cr.room.name, who: from, holder: from, arriving: true})
}

// status reports how full the room is.
func (cr *crowd) status() api.ConnectionsStatus {
	cr.mu.Lock()
	defer cr.mu.Unlock()
	s := api.ConnectionsStatus{Listener: cr.room.name, Open: len(cr.placed) + len(cr.line), Limit: cr.room.all, TurnedAway: cr.away.count}
	if cr.away.count > 0 {
		last := cr.away.last
		s.TurnedAwayOn, s.TurnedAwayFor, s.HeldBy, s.Holds = &last.shown, last.who.String(), last.holder.String(), last.holds
	}
	return s
}

// goesOn is how long after the last connection was turned away that is still trouble.
const goesOn = 5 * time.Minute

// trouble says whose fault it is that connections are turned away, or nothing when none were lately.
func (cr *crowd) trouble(now time.Time) string {
	cr.mu.Lock()
	defer cr.mu.Unlock()
	if cr.away.count == 0 || now.Sub(cr.away.last.on) >= goesOn {
		return ""
	}
	return cr.away.last.String()
}

// advice tells who was turned away. It names nobody else.
func (t turnedAway) advice() string {
	if t.everyone {
		return fmt.Sprintf("all connections to the %s are in use: ask again in a moment", t.room)
	}
	return fmt.Sprintf("all %d connections that %s may have to the %s are in use: keep fewer at once, and close those that are not needed", t.of, t.holder, t.room)
}

// String says it in a sentence.
func (t turnedAway) String() string {
	if t.arriving {
		return fmt.Sprintf("connections to the %s are turned away: %s connects more often than it may", t.room, t.who)
	}
	many := fmt.Sprintf("which is all that it may have (%d)", t.of)
	if t.everyone {
		many = fmt.Sprintf("of %d for all", t.of)
	}
	return fmt.Sprintf("connections to the %s are turned away (the last of %s): %s holds %d, %s", t.room, t.who, t.holder, t.holds, many)
}
