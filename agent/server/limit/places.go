package limit

import (
	"slices"
	"sync/atomic"
	"time"
)

// Capacity is how many connections one kind of listener may have.
type Capacity struct {
	Name      string
	Total     int // places, beside those for the daemon itself
	PerParent int // of one user, one unit or one container
	PerKey    int // of one key that is a part of such a parent
	ForRoot   int // of Total, for root's processes that are in no unit alone

	Line          int           // connections that wait for a place, or for their refusal
	LinePerParent int           // of one user, unit or container
	LineTimeout   time.Duration // for a place

	Refused int // connections that were told that there is no place, and are not closed yet

	PerModule bool // each module has an equal part, instead of PerParent
}

// OwnPlaces is how many connections of the daemon to itself have a place, however many others there are. Its check
// makes one at a time; when that many wait, a restart is what it should lead to.
const OwnPlaces = 4

// fewestPerModule and mostPerModule bound a module's part.
const fewestPerModule, mostPerModule = 2, 128

// places are the connections that have a place, and how many each key and each parent of keys has. The lock of Conns
// protects them.
type places struct {
	capacity Capacity
	modules  atomic.Int32 // that share the places, by Capacity.PerModule
	placed   []*Conn
	root     int // of placed, those that Capacity.ForRoot is for
	tallies  map[Key]*tally
}

// tally is how many connections of one key there are.
type tally struct {
	key             Key
	placed, waiting int
}

// cappedTally is a tally that a connection counts for, and how many connections that may have.
type cappedTally struct {
	*tally
	most int
}

// top is the tally that callers are compared by: all of a user, or of one of root's units, or of a container.
func (c *Conn) top() *tally { return c.counted[len(c.counted)-1].tally }

func (c *Conn) countsFor(t *tally) bool {
	return slices.ContainsFunc(c.counted, func(of cappedTally) bool { return of.tally == t })
}

// countedFor returns what a connection of k counts for: first k itself, last the parent that it belongs to most.
func (p *places) countedFor(k Key) []cappedTally {
	parents, count := k.parents()
	all := make([]cappedTally, 0, 1+count)
	perParent, perKey := p.capacity.PerParent, p.capacity.PerKey
	if p.capacity.PerModule {
		perParent = min(max(p.capacity.Total/max(1, int(p.modules.Load())), fewestPerModule), mostPerModule)
		perKey = perParent
		if k.Unattested {
			perKey = perParent / 2
		}
	}
	if count == 0 || k.UID == 0 && k.Module == "" {
		perKey = perParent // it is no part of a user
	}
	all = append(all, cappedTally{p.tallyOf(k), perKey})
	for i := count - 1; i >= 0; i-- { // a user's last
		all = append(all, cappedTally{p.tallyOf(parents[i]), perParent})
	}
	return all
}

func (p *places) tallyOf(k Key) *tally {
	t := p.tallies[k]
	if t == nil {
		if p.tallies == nil {
			p.tallies = make(map[Key]*tally)
		}
		t = &tally{key: k}
		p.tallies[k] = t
	}
	return t
}

// dropEmpty forgets tallies of c's that count nothing.
func (p *places) dropEmpty(c *Conn) {
	for _, of := range c.counted {
		if of.placed == 0 && of.waiting == 0 && p.tallies[of.key] == of.tally {
			delete(p.tallies, of.key)
		}
	}
}

// add gives c a place.
func (p *places) add(c *Conn) {
	c.at = len(p.placed)
	p.placed = append(p.placed, c)
	for _, of := range c.counted {
		of.placed++
	}
	if c.key.IsBareRoot() {
		p.root++
	}
}

// remove takes c's place away.
func (p *places) remove(c *Conn) {
	last := len(p.placed) - 1
	p.placed[c.at] = p.placed[last]
	p.placed[c.at].at = c.at
	p.placed[last] = nil
	p.placed = p.placed[:last]
	c.at = -1
	for _, of := range c.counted {
		of.placed--
	}
	if c.key.IsBareRoot() {
		p.root--
	}
	p.dropEmpty(c)
}

// take gives c a place if there is one, or an idle connection can yield its own.
func (p *places) take(c *Conn) bool {
	if p.fits(c, nil) {
		p.add(c)
		return true
	}
	now := time.Now()
	for range 16 { // some may have begun a request in between, or not read their answers
		last := p.longestIdle(c, now)
		if last == nil {
			return false
		}
		if last.yield(now) {
			p.remove(last)
			p.add(c)
			return true
		}
	}
	return false
}

// fits reports whether there is a place for c, or would be without that other connection.
func (p *places) fits(c, without *Conn) bool {
	for _, of := range c.counted {
		n := of.placed
		if without != nil && without.countsFor(of.tally) {
			n--
		}
		if n >= of.most {
			return false
		}
	}
	if without != nil && without.top() != c.top() && without.top().placed <= c.top().placed {
		return false // a caller that has no more than that keeps it
	}
	all := len(p.placed)
	if without != nil {
		all--
	}
	return all < p.capacity.Total-p.reservedForRoot(c, without)
}

// reservedForRoot is how many places are kept from c.
func (p *places) reservedForRoot(c, without *Conn) int {
	if c.key.IsBareRoot() {
		return 0
	}
	taken := p.root
	if without != nil && without.key.IsBareRoot() {
		taken--
	}
	return max(0, p.capacity.ForRoot-taken)
}

// longestIdle returns the connection whose place c can have: of those with most, the one that has been idle the
// longest.
func (p *places) longestIdle(c *Conn, now time.Time) (found *Conn) {
	for _, other := range p.placed {
		if other.canYield(other.phase.Load(), now) && p.fits(c, other) && (found == nil || other.yieldsBefore(found)) {
			found = other
		}
	}
	return found
}

// yieldsBefore reports whether c is to yield its place rather than other.
func (c *Conn) yieldsBefore(other *Conn) bool {
	switch mine, others := c.top().placed, other.top().placed; {
	case mine != others:
		return mine > others
	case c.counted[0].placed != other.counted[0].placed:
		return c.counted[0].placed > other.counted[0].placed
	}
	return c.restsSince().Before(other.restsSince())
}

// holder returns the key that has taken the places that c would need: how many it has, of how many that it or, if
// everyone, all keys together may have.
func (p *places) holder(c *Conn) (key Key, holds, of int, everyone bool) {
	for _, counted := range c.counted {
		if counted.placed >= counted.most {
			return counted.key, counted.placed, counted.most, false
		}
	}
	for _, other := range p.placed {
		if top := other.top(); top.placed > holds {
			key, holds = top.key, top.placed
		}
	}
	return key, holds, p.capacity.Total, true
}
