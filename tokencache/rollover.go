package tokencache

import (
	"math"
	"slices"
	"time"
)

// PatternKind says what was learned about when a back end rolls over to newer tokens.
type PatternKind string

const (
	Unlearnt  PatternKind = "unlearnt"  // too little was seen
	Regular   PatternKind = "regular"   // at the same share of every token's life
	Irregular PatternKind = "irregular" // at shares that differ
)

// Pattern is what was learned about the rollovers of a key.
type Pattern struct {
	Kind PatternKind
	Age  time.Duration // at which the token now held rolls over, with Regular
}

// rollover is one rollover: between which shares of a token's life it took place. These are shares and not ages, since
// back ends give different lives.
type rollover struct {
	of    Key
	after float64 // the token was still handed out
	by    float64 // its successor had been issued

	watched float64 // from then on the back end was probed often; 1: it was not
}

// share returns age as a share of life.
func share(age, life time.Duration) float64 { return float64(age) / float64(life) }

// width returns how far r is from precise.
func (r rollover) width() float64 { return r.by - r.after }

// contains reports whether the rollover may have been at that share.
func (r rollover) contains(share float64) bool { return r.after < share && share <= r.by }

const (
	keyHistory    = 8   // rollovers remembered of a key
	sourceHistory = 512 // and of all keys together

	ownEnough    = 3 // a key that has seen so many learns from its own alone
	otherKeys    = 8 // and else from so many of the others' as well
	likelyHalf   = 0.3
	likelyEnd    = 0.4
	believedOdds = 10.0 // odds from which a pattern is believed
	narrowShare  = 10.0 / (24 * 60)

	newborn     = narrowShare // a token of which no more of its life was seen was not seen to come from a cache
	eagerEnough = 4           // after so many of these, the back end has no cache

	chanceDistances = 3 // mean distances between what was seen
)

// history is observed rollovers, the latest last.
type history []rollover

// add adds a rollover, and keeps the latest most of them.
func (h *history) add(r rollover, most int) {
	*h = append(*h, r)
	if len(*h) > most {
		*h = slices.Delete(*h, 0, len(*h)-most)
	}
}

// last returns the n latest.
func (h history) last(n int) history { return h[max(0, len(h)-n):] }

// with returns h and the n latest of others that are of another key.
func (h history) with(others history, n int, key Key) history {
	all := slices.Clone(h)
	for _, r := range slices.Backward(others) {
		if n > 0 && r.of != key {
			all, n = append(all, r), n-1
		}
	}
	return all
}

// intersection returns where all of h could have taken place, and how likely they would look like that if each took
// place anywhere.
func (h history) intersection() (common rollover, chance float64) {
	common, chance = rollover{after: 0, by: 1}, 1
	for i, r := range h {
		if i == 0 {
			common = r
		}
		common.after, common.by = max(common.after, r.after), min(common.by, r.by)
		chance *= max(min(r.width(), 1), 1e-6)
	}
	return common, chance
}

// precise reports whether r gives the rollover to within some minutes, or to a known moment.
func (r rollover) precise() bool {
	return r.width() <= narrowShare || r.contains(1) && r.after > 0.97 || r.contains(0.5) && r.after > 0.48
}

// likelihood is how likely a regular back end rolls over within r. Most do so at the expiry or at half of the life.
func (r rollover) likelihood() float64 {
	p := (1 - likelyEnd - likelyHalf) * r.width()
	if r.contains(1) {
		p += likelyEnd
	}
	if r.contains(0.5) {
		p += likelyHalf
	}
	return p
}

// pattern is a Pattern with what else the schedule needs of it.
type pattern struct {
	kind   PatternKind
	share  float64  // at which a token rolls over, with Regular
	common rollover // where all that was seen could have taken place, unless Irregular
	seen   int      // rollovers that this was learnt from
	eager  bool     // the back end has no cache as far as was seen: it gave another token at each call
}

// learn weighs whether all of h took place at one share of a life, or anywhere.
func (h history) learn() pattern {
	common, chance := h.intersection()
	p := pattern{kind: Unlearnt, common: common, seen: len(h)}
	switch {
	case len(h) == 0:
	case common.after >= common.by:
		p.kind = Irregular
	case common.after < newborn:
		p.eager = len(h) >= eagerEnough
	case common.precise() && common.likelihood()/chance >= believedOdds:
		p.kind, p.share = Regular, common.by
		if common.contains(0.5) {
			p.share = 0.5
		}
		if common.contains(1) {
			p.share = 1
		}
	}
	return p
}

// earliest returns a share of a token's life before which a rollover is hardly to be expected. It is earlier than every
// one seen, by what chance may have hidden from the tokens that were watched from before that on.
func (h history) earliest() float64 {
	least, most, n := 1.0, 0.0, 0
	for _, r := range h {
		if r.watched < r.after {
			least, most = min(least, r.after), max(most, r.by)
		}
	}
	for _, r := range h {
		if r.watched < min(least, r.after) {
			n++
		}
	}
	if n < 4 {
		return 0
	}
	return max(0, least-chanceDistances*(most-least)/float64(n))
}

// learned is what was learned for one key from the histories as they were. It is computed once per observed rollover,
// since every answer with a token that is not current needs it.
type learned struct {
	from    uint64 // Cache.learnedVersion, when it was worked out; 0: never
	pattern pattern
	middle  middle
}

// cachedPatternLocked returns what was learned for e, and learns again if a rollover was seen since.
func (c *Cache) cachedPatternLocked(e *entry) *learned {
	if e.learned.from != c.learnedVersion {
		e.learned = learned{from: c.learnedVersion, pattern: c.learnLocked(e)}
	}
	return &e.learned
}

// learnedPatternLocked returns the pattern of e's rollovers.
func (c *Cache) learnedPatternLocked(e *entry) pattern { return c.cachedPatternLocked(e).pattern }

// learnLocked learns from e's own rollovers. While these are few or show nothing, it also learns from the other keys',
// which share the back end.
func (c *Cache) learnLocked(e *entry) pattern {
	if len(e.rollovers) >= ownEnough {
		if p := e.rollovers.learn(); p.kind != Unlearnt {
			return p
		}
	}
	return e.rollovers.with(c.rollovers.last(2*otherKeys), otherKeys, e.key).learn()
}

// sawLocked takes in a rollover of e's.
func (c *Cache) sawLocked(e *entry, r rollover) {
	e.rollovers.add(r, keyHistory)
	c.rollovers.add(r, sourceHistory)
	c.learnedVersion++
}

// patternLocked returns the pattern of e's rollovers as it is shown.
func (c *Cache) patternLocked(e *entry) Pattern {
	p := c.learnedPatternLocked(e)
	return Pattern{Kind: p.kind, Age: time.Duration(p.share * float64(e.token.life))}
}

// rolloverLocked returns the boot time at which e's token is known to roll over; longAgo if it is not known.
func (c *Cache) rolloverLocked(e *entry) bootTime {
	p := c.learnedPatternLocked(e)
	if p.kind != Regular || e.token.life == 0 {
		return longAgo
	}
	if p.share == 1 {
		return e.token.deadline
	}
	return e.token.issuedAt.add(time.Duration(p.share * float64(e.token.life)))
}

// likelyLocked returns the boot time at which a newer token is expected: by the pattern, or without one, in the middle
// of the remaining observed rollovers. never: it is not known.
func (c *Cache) likelyLocked(e *entry, now bootTime) bootTime {
	var at bootTime
	switch c.learnedPatternLocked(e).kind {
	case Regular:
		at = c.rolloverLocked(e)
	case Irregular:
		age := share(now.sub(e.token.issuedAt), e.token.life)
		at = e.token.issuedAt.add(time.Duration(c.medianLocked(e, age) * float64(e.token.life)))
	case Unlearnt:
		return never
	}
	if at <= e.token.shown {
		return never // it should have come: what was learnt does not hold
	}
	return min(max(at, e.policy.unmet, now), e.token.deadline.add(afterExpiry))
}

// medianLocked returns the median of all keys' rollovers later than that share of a life, which e's token has reached;
// 1 if there is none.
func (c *Cache) medianLocked(e *entry, age float64) float64 {
	l := c.cachedPatternLocked(e)
	if !l.middle.covers(age) {
		l.middle = c.rollovers.middle(age)
	}
	return max(age, l.middle.at)
}

// middle is the median of the rollovers later than a share of a life. It stays the same from that share on until the
// first of them has passed.
type middle struct {
	from, until float64
	at          float64 // where no more of the life has passed
}

// covers reports whether m is the median at that share too.
func (m middle) covers(age float64) bool { return m.from <= age && age < m.until }

// middle returns the median of h's rollovers later than that share.
func (h history) middle(age float64) middle {
	m := middle{from: age, until: math.Inf(1), at: 1}
	var later []float64
	for _, r := range h {
		if r.by > age {
			later = append(later, (r.after+r.by)/2)
			m.until = min(m.until, r.by)
		}
	}
	if len(later) > 0 {
		slices.Sort(later)
		m.at = later[len(later)/2]
	}
	return m
}
