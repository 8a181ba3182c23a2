package server

import (
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"perceptd/agent"
	"perceptd/agent/turnaway"
)

// crowd is the connections of one kind of listener. It gives each caller its part of the room that there is, so that none
// can use up the memory and the descriptors that the others, the back end and the daemon's check of itself need.
//
// Who comes when all places are taken gets the place of a connection that is idle: of the caller who has most, the one
// that has been without a request the longest. Where none is, it waits in line (line.go).
type crowd struct {
	room    room
	wall    func() time.Time // the device's wall clock
	notify  func(turnedAway) // somebody was turned away, and that was not reported lately
	modules atomic.Int32     // how many modules share the room, where modules do

	mu      sync.Mutex // protects what follows
	placed  []*connection
	own     int
	root    int // of placed, those that forRoot is for
	tallies map[quotaKey]*tally
	line    []*connection // the first to come first
	away    away

	lingering []*connection // that have ended, and keep their places
	look      *time.Timer   // at them; nil: none is planned
	lookOn    time.Time     // when

	waiting atomic.Int32 // as many as are in the line

	refused turnaway.Refusals[quotaKey] // for whom there was not even a place in the line
}

// room is how many connections there may be.
type room struct {
	name     string
	all      int           // but for ownPlaces of the daemon itself
	perWhole int           // of one user, one unit or one container
	share    int           // of one caller who is a part of such a whole
	forRoot  int           // of all, for root's processes that are in no unit alone
	line     int           // who wait for a place, or for their refusal
	linePer  int           // of one user, unit or container
	wait     time.Duration // for a place
	refused  int           // who were told that there is no place, and are not closed yet

	perModule bool // each module has an equal part, instead of perWhole
}

// tally is how many connections of one quota key there are.
type tally struct {
	key             quotaKey
	placed, waiting int
}

// tallied is a tally that a connection counts for, and how many connections that may have.
type tallied struct {
	*tally
	most int
}

// enter gives c a place, or one in the line. It reports false when there is neither, and c is to be refused.
func (cr *crowd) enter(c *connection, itself bool) bool {
	cr.mu.Lock()
	defer cr.mu.Unlock()
	if itself && cr.own < ownPlaces {
		c.isOwn = true
		cr.own++
		return true
	}
	c.counted = cr.countedFor(c.key)
	if cr.admit(c) || cr.queue(c) {
		return true
	}
	cr.turnAway(c)
	cr.tidy(c)
	return false
}

// isOwn reports whether who is this very process, and not another one of its user.
func isOwn(who agent.Caller) bool {
	return int(who.PID) == os.Getpid() && int(who.UID) == os.Geteuid()
}

// countedFor returns what a connection of k counts for: first k itself, last the whole that it belongs to most.
func (cr *crowd) countedFor(k quotaKey) []tallied {
	wholes, count := k.wholes()
	all := make([]tallied, 0, 1+count)
	whole, share := cr.room.perWhole, cr.room.share
	if cr.room.perModule {
		whole = min(max(cr.room.all/max(1, int(cr.modules.Load())), fewestPerModule), mostPerModule)
		share = whole
		if k.unproved {
			share = whole / 2
		}
	}
	if count == 0 || k.uid == 0 && k.module == "" {
		share = whole // it is no part of a user
	}
	all = append(all, tallied{cr.tallyOf(k), share})
	for i := count - 1; i >= 0; i-- { // a user's last
		all = append(all, tallied{cr.tallyOf(wholes[i]), whole})
	}
	return all
}

func (cr *crowd) tallyOf(k quotaKey) *tally {
	t := cr.tallies[k]
	if t == nil {
		if cr.tallies == nil {
			cr.tallies = make(map[quotaKey]*tally)
		}
		t = &tally{key: k}
		cr.tallies[k] = t
	}
	return t
}

// tidy forgets tallies of c's that count nothing.
func (cr *crowd) tidy(c *connection) {
	for _, of := range c.counted {
		if of.placed == 0 && of.waiting == 0 && cr.tallies[of.key] == of.tally {
			delete(cr.tallies, of.key)
		}
	}
}

// whole is the tally that callers are compared by: all of a user, or of one of root's units, or of a container.
func (c *connection) whole() *tally { return c.counted[len(c.counted)-1].tally }

// admit gives c a place if there is one, or can be.
func (cr *crowd) admit(c *connection) bool {
	if cr.fits(c, nil) {
		cr.place(c)
		return true
	}
	now := time.Now()
	for range 16 { // some may have begun a request in between, or not read their answers
		last := cr.longestIdle(c, now)
		if last == nil {
			return false
		}
		if last.leave(now) {
			cr.remove(last)
			cr.place(c)
			return true
		}
	}
	return false
}

// fits reports whether there is a place for c, or would be without that other connection.
func (cr *crowd) fits(c, without *connection) bool {
	for _, of := range c.counted {
		n := of.placed
		if without != nil && without.countsFor(of.tally) {
			n--
		}
		if n >= of.most {
			return false
		}
	}
	if without != nil && without.whole() != c.whole() && without.whole().placed <= c.whole().placed {
		return false // who has no more than that keeps it
	}
	all := len(cr.placed)
	if without != nil {
		all--
	}
	return all < cr.room.all-cr.keptForRoot(c, without)
}

// keptForRoot is how many places are kept from c.
func (cr *crowd) keptForRoot(c, without *connection) int {
	if c.key.isBareRoot() {
		return 0
	}
	taken := cr.root
	if without != nil && without.key.isBareRoot() {
		taken--
	}
	return max(0, cr.room.forRoot-taken)
}

func (c *connection) countsFor(t *tally) bool {
	return slices.ContainsFunc(c.counted, func(of tallied) bool { return of.tally == t })
}

// longestIdle returns the connection whose place c can have: of those with most, the one that has been idle the longest.
func (cr *crowd) longestIdle(c *connection, now time.Time) (found *connection) {
	for _, other := range cr.placed {
		if other.isIdle(other.phase.Load(), now) && cr.fits(c, other) && (found == nil || other.goesBefore(found)) {
			found = other
		}
	}
	return found
}

// goesBefore reports whether c is to go rather than other.
func (c *connection) goesBefore(other *connection) bool {
	switch mine, others := c.whole().placed, other.whole().placed; {
	case mine != others:
		return mine > others
	case c.counted[0].placed != other.counted[0].placed:
		return c.counted[0].placed > other.counted[0].placed
	}
	return c.idleSince().Before(other.idleSince())
}

func (cr *crowd) place(c *connection) {
	c.at = len(cr.placed)
	cr.placed = append(cr.placed, c)
	for _, of := range c.counted {
		of.placed++
	}
	if c.key.isBareRoot() {
		cr.root++
	}
}

func (cr *crowd) remove(c *connection) {
	last := len(cr.placed) - 1
	cr.placed[c.at] = cr.placed[last]
	cr.placed[c.at].at = c.at
	cr.placed[last] = nil
	cr.placed = cr.placed[:last]
	c.at = -1
	for _, of := range c.counted {
		of.placed--
	}
	if c.key.isBareRoot() {
		cr.root--
	}
	cr.tidy(c)
}

// forget takes out a connection that has ended, and gives its place to who waits for one.
func (cr *crowd) forget(c *connection) {
	cr.mu.Lock()
	defer cr.mu.Unlock()
	if c.lingers.Load() {
		cr.retake(c)
		cr.linger(c)
		return
	}
	cr.leave(c)
}

// leave is forget with the lock held.
func (cr *crowd) leave(c *connection) {
	switch {
	case c.isOwn:
		c.isOwn = false
		cr.own--
		return
	case c.at >= 0:
		cr.remove(c)
	case c.inLine.Load():
		cr.unqueue(c)
	}
	cr.callUp(nil)
}

// takeBack gives c, which had made room, its place again, be there one or not: a request of its came in at that very moment.
func (cr *crowd) takeBack(c *connection) {
	cr.mu.Lock()
	defer cr.mu.Unlock()
	cr.retake(c)
}

// retake is takeBack with the lock held.
func (cr *crowd) retake(c *connection) {
	if c.at >= 0 || c.isOwn || c.inLine.Load() {
		return
	}
	c.counted = cr.countedFor(c.key)
	cr.place(c)
}

// rest notes that c has no request any more, which lets one who waits have its place.
func (cr *crowd) rest(c *connection) {
	c.rest()
	if cr.waiting.Load() == 0 {
		return
	}
	cr.mu.Lock()
	defer cr.mu.Unlock()
	if c.at >= 0 {
		cr.callUp(c)
	}
}
