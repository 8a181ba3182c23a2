package tokencache

import (
	"slices"
	"time"
)

// countSlack is how much two counts of one life may differ and still agree: counts are in whole seconds, and an answer
// takes time.
const countSlack = 30 * time.Second

// briefly is a life for which a token is accepted on the back end's word alone.
const briefly = 2 * time.Minute

// agree reports whether two lives left are the same, as far as they are measured.
func agree(a, b time.Duration) bool { return (a - b).Abs() <= countSlack }

// believedLifeLocked returns the life that a token has left, if the back end gave the same token before and said
// something else of its life then.
//
// A later word always shortens the life. It lengthens the life only if something else confirms it: a wall clock that is
// known to be right, with the issuer's expiry; the first count; the token's own dates, minus the boot time since its
// receipt; or another answer that shows the same issuer's clock, boot time added. A number that is the same hours later
// counts nothing. A life of a minute or two does little harm, and is accepted.
//
// If a token was kept over a boot of unknown length, its life was never said by the back end. Then only another answer
// confirms it.
func (c *Cache) believedLifeLocked(first tombstone, f Fetched, left time.Duration, now bootTime) time.Duration {
	believed, passed := first.deadline.sub(now), now.sub(first.received)
	counted := first.given - passed // what is left of the first count
	dated := (f.Token.ExpiresOn.Sub(first.expiresOn)).Abs() <= countSlack
	switch {
	case f.Presumed: // it does not contradict what is believed, and holds again while the back end hands the token out
		if first.deadline != never {
			left = max(believed, left)
		}
		return min(left, c.mostLeftLocked(first, now))
	case first.deadline == never:
		return min(left, c.mostLeftLocked(first, now))
	case left <= max(believed, briefly):
		return left
	case dated && c.clockTrusted():
		return left // which goes no further than that expiry
	case dated && !f.Counted && believed <= 0 && agree(left, f.Token.ExpiresOn.Sub(c.clock.Wall())):
		return left // by a wall clock that may have been wrong before or now: nothing contradicts the back end
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

// mostLeftLocked returns the longest life that a token can have left that was first received when r was, since it had
// been issued by then. Of an earlier boot only the on-time is known, and at least that much time has passed.
func (c *Cache) mostLeftLocked(r tombstone, now bootTime) time.Duration {
	received := max(0, r.received)
	if r.receipt.on > 0 {
		received = c.bootAt(r.receipt.on)
	}
	return received.sub(now) + longestNominal
}

// detectStaticLocked finds out whether the back end's expires_in counts down. It does not if the back end gives the
// same number with the same token long after the receipt, or the same number with another token although by it the
// issuer's clock would have gone back. Then all its numbers are void, and what they have shown.
func (c *Cache) detectStaticLocked(e *entry, f Fetched, left time.Duration, now bootTime) {
	c.collectCountsLocked(e, f, left, now)
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

// voidCountsLocked treats the source's numbers as if they had never counted.
func (c *Cache) voidCountsLocked(now bootTime) {
	c.static, c.readings, c.countdown, c.countedOn = true, nil, countdown{}, 0
	c.issuerClock.forgetCounts()
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

// ageLocked dates e's token by the wall clock, which is now known to be right, if nothing showed the token's age when
// it was received.
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

// said is the life left that a back end gave with a token.
type said struct {
	digest string // of the token's text; empty: nothing
	at     bootTime
	left   time.Duration
}

// countdown is the evidence that a back end's numbers count down.
type countdown struct {
	answers int      // in a row, each of which said less than the one before about its token by the time between
	since   bootTime // boot time of the answer that the first of these was held against
}

// A back end whose numbers were void is trusted again after this many answers in a row that counted down, over this
// long. A proxy that repeats answers for half an hour now and then would pass for one that counts if this were shorter.
const (
	countsAgainMost = 4
	countsAgainOver = 6 * time.Hour
)

// collectCountsLocked collects evidence that the numbers count down. One number that does not, for any key, starts it
// again. What was voided stays void: only later numbers are trusted.
func (c *Cache) collectCountsLocked(e *entry, f Fetched, left time.Duration, now bootTime) {
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
		c.countdown = countdown{}
		return
	}
	if c.countdown.answers == 0 {
		c.countdown.since = before.at
	}
	c.countdown.answers++
	if c.countdown.answers >= countsAgainMost && now.sub(c.countdown.since) >= countsAgainOver {
		c.static, c.countedOn = false, c.onAt(now)
	}
}

// reading is the issuer's clock as a counted answer shows it.
type reading struct {
	at   bootTime      // boot time
	zero time.Time     // the issuer's time when this boot began
	left time.Duration // by which it is shown
}

// readingOf returns what f shows of the issuer's clock.
func readingOf(f Fetched, left time.Duration, now bootTime) reading {
	return reading{at: now, zero: now.zero(f.Token.ExpiresOn.Add(-left)), left: left}
}

// readings is some of the latest readings, the latest last.
type readings []reading

const (
	maxReadings = 8
	// readingsApart is how far apart two readings must be: a number that does not count down then makes them differ.
	readingsApart = 2 * countSlack
)

// add takes in a reading, unless the last one is too close.
func (all *readings) add(r reading) {
	if n := len(*all); n > 0 && r.at.sub((*all)[n-1].at) < readingsApart {
		return
	}
	*all = append(*all, r)
	*all = (*all)[max(0, len(*all)-maxReadings):]
}

// confirms reports whether another answer showed the same issuer's clock as r.
func (all readings) confirms(r reading) bool {
	return slices.ContainsFunc(all, func(o reading) bool {
		return r.at.sub(o.at) >= readingsApart && r.zero.Sub(o.zero).Abs() <= countSlack
	})
}

// replicasDiffer is how far apart the clocks of a back end's replicas may be.
const replicasDiffer = 5 * time.Minute

// repeats reports whether r has the number of another answer, although by it the issuer's clock went back by more than
// replicas differ.
func (all readings) repeats(r reading) bool {
	return slices.ContainsFunc(all, func(o reading) bool {
		return agree(r.left, o.left) && r.zero.Before(o.zero.Add(-replicasDiffer))
	})
}

// freshAt reports whether a token with left to live had its whole life, as its dates give it, that long ago.
func freshAt(t Token, left, ago time.Duration) bool {
	m := issueWindowOf(t, left, true)
	least, most := t.ExpiresOn.Sub(m.Latest), t.ExpiresOn.Sub(m.Earliest)
	if most-least > backdated+2*issueSlack {
		return false // it has no date
	}
	whole := left + ago
	return least-countSlack <= whole && whole <= most+countSlack
}

// longestLocked returns the longest life left that is believed of an answer. A token without a date may have more than
// the usual life only if a clock that is known to be right, or another answer, confirms it.
func (c *Cache) longestLocked(f Fetched, begun, now bootTime) time.Duration {
	if f.Nominal > 0 || !f.Counted || f.Reckoned {
		return nominalOf(f)
	}
	left := f.Left - now.sub(begun)
	if c.clockTrusted() && agree(left, f.Token.ExpiresOn.Sub(c.clock.Wall())) ||
		c.readings.confirms(readingOf(f, left, now)) {
		return longestNominal
	}
	return defaultNominal
}

// lifeCountedLocked returns the life left at receipt if the back end counted it and no better clock corrected it; else
// 0.
func (c *Cache) lifeCountedLocked(f Fetched, left time.Duration, begun, now bootTime) time.Duration {
	if !f.Counted || !agree(left, min(f.Left, c.longestLocked(f, begun, now))-now.sub(begun)) {
		return 0
	}
	return left
}

// updateLifeLocked updates the life of the token that e holds by f, the back end's latest answer.
func (c *Cache) updateLifeLocked(e *entry, f Fetched, left time.Duration, now bootTime) {
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
