package tokencache

import (
	"slices"
	"time"
)

// countSlack is how far apart two counts of one life may be and agree: they have whole seconds, and an answer takes its time.
const countSlack = 30 * time.Second

// briefly is a life for which a token is taken on the back end's mere word.
const briefly = 2 * time.Minute

func agree(a, b time.Duration) bool { return (a - b).Abs() <= countSlack }

// recountLocked returns the life that a token has left, of which the back end says that it is left, where it gave the same
// token before and said something else.
//
// What it said before is corrected downwards by any later word. Upwards only by one that something else bears out: a
// wall clock that is known to be right, and the expiry that the issuer gave the token; the first count of all; the life
// that the token was given by its own dates, of which as much is over as boot time has passed since the receipt; or another
// answer by which, boot time added, the issuer's clock shows the same. The number that it gave before, hours later, is no
// count of anything. What it says to end within a minute or two does little harm, and is taken.
//
// What is believed of a token that was kept over a boot of unknown length was never said by the back end, which has that other
// answer alone to bear it out.
func (c *Cache) recountLocked(first tombstone, f Fetched, left time.Duration, now bootTime) time.Duration {
	believed, passed := first.deadline.sub(now), now.sub(first.received)
	counted := first.given - passed // what is left of the first count
	dated := (f.Token.ExpiresOn.Sub(first.expiresOn)).Abs() <= countSlack
	switch {
	case f.Presumed: // which says nothing against what is believed, and is as true again as long as the back end hands it out
		if first.deadline != never {
			left = max(believed, left)
		}
		return min(left, c.mostLeftLocked(first, now))
	case first.deadline == never:
		return min(left, c.mostLeftLocked(first, now))
	case left <= max(believed, briefly):
		return left
	case dated && c.clockTrusted():
		return left // which is no more than there is until that expiry
	case dated && !f.Counted && believed <= 0 && agree(left, f.Token.ExpiresOn.Sub(c.clock.Wall())):
		return left // by a wall clock, which may have been wrong before as well as now: nothing contradicts the back end
	case !f.Counted, first.given == 0 && first.received >= 0:
		return believed
	case left <= counted+countSlack: // what made it seem shorter in between was wrong
		return min(left, counted)
	case agree(left, first.given):
		return believed
	case first.given > 0 && freshAt(f.Token, left, passed):
		return left
	case dated && c.readings.confirms(readingOf(f, left, now)) && left <= c.mostLeftLocked(first, now):
		return left
	}
	return believed
}

// mostLeftLocked returns the life that a token has left at most which was received first when r was: it had been issued by then. What is known of
// an earlier boot is the on-time, than which more time has passed.
func (c *Cache) mostLeftLocked(r tombstone, now bootTime) time.Duration {
	received := max(0, r.received)
	if r.receipt.on > 0 {
		received = c.bootAt(r.receipt.on)
	}
	return received.sub(now) + longestNominal
}

// staticLocked looks whether the back end gives the number that it gave with this token at its receipt, though that is long ago, or
// the number that it gave with another token, though this one's expiry is earlier than time has passed since: by it the issuer's
// clock has gone back. Then none of its numbers counts anything, and what they have shown is void.
func (c *Cache) staticLocked(e *entry, f Fetched, left time.Duration, now bootTime) {
	c.countsLocked(e, f, left, now)
	if c.static {
		return
	}
	first, known := c.tombstoneLocked(e, f.Token.Text)
	passed := now.sub(first.received)
	again := known && first.given != 0 && passed >= readingsApart && agree(left, first.given)
	if !f.Counted || !again && !c.readings.repeats(readingOf(f, left, now)) {
		return
	}
	c.voidCountsLocked(now)
}

// voidCountsLocked takes it that the source's numbers count nothing, and never did.
func (c *Cache) voidCountsLocked(now bootTime) {
	c.static, c.readings, c.counted, c.countedOn = true, nil, counted{}, 0
	c.clockTrust.forgetCounts()
	for _, ch := range c.changes {
		if !ch.Vouched {
			ch.Issuer, ch.Checked = Window{}, false
		}
	}
	c.generation++
	for i := range c.tombstones {
		c.tombstones[i].receipt.doubt()
	}
	for _, o := range c.entries {
		o.last.said = said{}
		o.token.receipt.doubt()
		if c.clockTrusted() {
			c.ageLocked(o, now)
		}
	}
	c.rejudgeLocked(now)
}

// ageLocked dates e's token by the clock, which is known to be right by now, where nothing told its age when it was received.
func (c *Cache) ageLocked(e *entry, now bootTime) {
	if !e.token.receipt.blind || e.token.ExpiresOn.IsZero() {
		return
	}
	wall := c.clock.Wall()
	e.token.issued = issueWindowOf(*e.token.Token, e.token.ExpiresOn.Sub(wall), true)
	e.token.receipt.age(e.token.issued, wall, c.on, c.onAt(now))
	before := e.policy
	if c.judgeLocked(e); e.policy != before {
		c.expediteLocked(e, now)
	}
}

// said is what a back end said of a token.
type said struct {
	digest string // of the token's text; empty: nothing
	at     bootTime
	left   time.Duration
}

// counted is how far a back end has shown that its numbers count.
type counted struct {
	answers int      // in a row, each of which said less than the one before about its token by the time between
	since   bootTime // boot time of the answer that the first of these was held against
}

// A back end whose numbers were none is believed again when so many answers in a row have counted, over so long: a proxy that repeats answers for half
// an hour now and then looks like one that counts.
const (
	countsAgainMost = 4
	countsAgainOver = 6 * time.Hour
)

// countsLocked looks whether the numbers are shown to count. One that does not, for whatever key, starts it anew. What was voided stays
// void: what is believed again is what is said from now on.
func (c *Cache) countsLocked(e *entry, f Fetched, left time.Duration, now bootTime) {
	if !f.Counted {
		return
	}
	digest := f.Token.Text.SHA256()
	before := e.last.said
	passed := now.sub(before.at)
	switch {
	case before.digest != digest:
		e.last.said = said{digest, now, left}
		return
	case passed < readingsApart:
		return
	}
	e.last.said = said{digest, now, left}
	if !agree(left, before.left-passed) {
		c.counted = counted{}
		return
	}
	if c.counted.answers == 0 {
		c.counted.since = before.at
	}
	c.counted.answers++
	if c.counted.answers >= countsAgainMost && now.sub(c.counted.since) >= countsAgainOver {
		c.static, c.countedOn = false, c.onAt(now)
	}
}

// reading is the issuer's clock as a counted answer shows it.
type reading struct {
	at   bootTime      // boot time
	zero time.Time     // the issuer's time when this boot began
	left time.Duration // by which it is shown
}

func readingOf(f Fetched, left time.Duration, now bootTime) reading {
	return reading{at: now, zero: now.zero(f.Token.ExpiresOn.Add(-left)), left: left}
}

// readings is some of the latest, the latest last.
type readings []reading

const (
	maxReadings = 8
	// readingsApart is how far apart two readings are so that a number that is no count does not make them agree.
	readingsApart = 2 * countSlack
)

// add takes in what a counted answer shows.
func (all *readings) add(r reading) {
	if n := len(*all); n > 0 && r.at.sub((*all)[n-1].at) < readingsApart {
		return
	}
	*all = append(*all, r)
	*all = (*all)[max(0, len(*all)-maxReadings):]
}

// bear reports whether another answer showed what r does.
func (all readings) confirms(r reading) bool {
	return slices.ContainsFunc(all, func(o reading) bool {
		return r.at.sub(o.at) >= readingsApart && r.zero.Sub(o.zero).Abs() <= countSlack
	})
}

// replicasDiffer is how far apart the clocks of a back end's replicas may be.
const replicasDiffer = 5 * time.Minute

// repeat reports whether r has the number of another answer, and shows the issuer's clock to have gone back since by more than that of
// one replica and another's.
func (all readings) repeats(r reading) bool {
	return slices.ContainsFunc(all, func(o reading) bool {
		return agree(r.left, o.left) && r.zero.Before(o.zero.Add(-replicasDiffer))
	})
}

// freshAt reports whether a token with that much life left had, that long ago, the whole life that its dates give it.
func freshAt(t Token, left, ago time.Duration) bool {
	m := issueWindowOf(t, left, true)
	least, most := t.ExpiresOn.Sub(m.Latest), t.ExpiresOn.Sub(m.Earliest)
	if most-least > backdated+2*issueSlack {
		return false // it has no date
	}
	whole := left + ago
	return least-countSlack <= whole && whole <= most+countSlack
}

// longestLocked returns what a back end may say at most of the life that a token has left, whose answer has come now. One without a date
// may have more than is usual where a clock that is known to be right, or another answer, bears it out.
func (c *Cache) longestLocked(f Fetched, begun, now bootTime) time.Duration {
	if f.Nominal > 0 || !f.Counted || f.Reckoned {
		return nominalOf(f)
	}
	left := f.Left - now.sub(begun)
	if c.clockTrusted() && agree(left, f.Token.ExpiresOn.Sub(c.clock.Wall())) || c.readings.confirms(readingOf(f, left, now)) {
		return longestNominal
	}
	return defaultNominal
}

// countedLocked returns the life left at receipt where the back end counted it and no better clock has corrected it; else 0.
func (c *Cache) countedLocked(f Fetched, left time.Duration, begun, now bootTime) time.Duration {
	if !f.Counted || !agree(left, min(f.Left, c.longestLocked(f, begun, now))-now.sub(begun)) {
		return 0
	}
	return left
}

// recountedLocked notes what life the token that e holds has left, by f, the back end's latest word.
func (c *Cache) recountedLocked(e *entry, f Fetched, left time.Duration, now bootTime) {
	deadline := now.add(left)
	presumed := e.token.presumed
	e.token.presumed = f.Presumed && (presumed || deadline > e.token.deadline)
	if c.clockTrusted() && deadline < e.token.received.add(e.token.given-countSlack) {
		e.token.given = 0 // a better clock has proved the first count wrong
	}
	if (!e.token.unconfirmed || presumed) && deadline > e.token.deadline {
		e.token.extend(deadline)
		return
	}
	e.token.deadline = min(e.token.deadline, deadline)
}
