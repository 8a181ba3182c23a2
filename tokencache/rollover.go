package tokencache

import (
	"math"
	"slices"
	"time"
)

// PatternKind says what was learnt of when a back end hands out newer tokens.
type PatternKind string

const (
	Unlearnt  PatternKind = "unlearnt"  // too little was seen
	Regular   PatternKind = "regular"   // at the same share of every token's life
	Irregular PatternKind = "irregular" // at shares that differ
)

// Pattern is what was learnt of the rollovers of a key.
type Pattern struct {
	Kind PatternKind
	Age  time.Duration // at which the token now held rolls over, with Regular
}

// rollover is one that was seen: the shares of a token's life between which it took place. Shares and
// not ages, since the lives that back ends give differ.
type rollover struct {
	of    Key
	after float64 // the token was still handed out
	by    float64 // its successor had been minted

	watched float64 // from then on the back end was probed often; 1: it was not
}

func share(age, life time.Duration) float64 { return float64(age) / float64(life) }

func (r rollover) width() float64 { return r.by - r.after }

func (r rollover) holds(share float64) bool { return r.after < share && share <= r.by }

const (
	keyHistory    = 8   // rollovers remembered of a key
	sourceHistory = 512 // and of all keys together

	ownEnough    = 3 // a key that has seen so many learns from its own alone
	otherKeys    = 8 // and else from so many of the others' besides
	likelyHalf   = 0.3
	likelyEnd    = 0.4
	believedOdds = 10.0 // odds from which a pattern is believed
	narrowShare  = 10.0 / (24 * 60)

	newborn     = narrowShare // a token of which no more of its life was seen was not seen to come from a cache
	eagerEnough = 4           // so many of these, and no cache is looked for any more

	chanceDistances = 3 // mean distances between what was seen
)

// history is rollovers, the latest last.
type history []rollover

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

// meet returns where all of h could have taken place, and how likely they are to have been seen so if
// each took place anywhere.
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

// precise reports whether r says when the rollover takes place to some minutes, or to a known moment.
func (r rollover) precise() bool {
	return r.width() <= narrowShare || r.holds(1) && r.after > 0.97 || r.holds(0.5) && r.after > 0.48
}

// likelihood is how likely a regular back end is to have its rollover within r: it has it at the expiry or
// at half of the life more often than not.
func (r rollover) likelihood() float64 {
	p := (1 - likelyEnd - likelyHalf) * r.width()
	if r.holds(1) {
		p += likelyEnd
	}
	if r.holds(0.5) {
		p += likelyHalf
	}
	return p
}

// pattern is a Pattern with what the schedule needs of it besides.
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
		if common.holds(0.5) {
			p.share = 0.5
		}
		if common.holds(1) {
			p.share = 1
		}
	}
	return p
}

// earliest returns a share of a token's life before which rollovers are hardly to be expected: earlier
// than any that was seen, by what chance may have hidden from those tokens that were watched from before
// that on.
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

// learnt is what was learnt for one key from the histories as they were. It is worked out once for each rollover that is
// seen, since every answer of a token that is not current tells of it.
type learnt struct {
	from    uint64 // Cache.seen, when it was worked out; 0: never
	pattern pattern
	middle  middle
}

// learntLocked returns e's learnt, worked out anew where a rollover was seen since.
func (c *Cache) learntLocked(e *entry) *learnt {
	if e.learnt.from != c.seen {
		e.learnt = learnt{from: c.seen, pattern: c.learnLocked(e)}
	}
	return &e.learnt
}

// learnedLocked returns what is known of e's rollovers.
func (c *Cache) learnedLocked(e *entry) pattern { return c.learntLocked(e).pattern }

// learnLocked learns from e's own rollovers, and from the other keys' too while these are few or tell nothing, since they
// share a back end.
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
	c.seen++
}

func (c *Cache) patternLocked(e *entry) Pattern {
	p := c.learnedLocked(e)
	return Pattern{Kind: p.kind, Age: time.Duration(p.share * float64(e.token.life))}
}

// rolloverLocked returns the boot time at which e's token is known to roll over, longAgo when it is not.
func (c *Cache) rolloverLocked(e *entry) bootTime {
	p := c.learnedLocked(e)
	if p.kind != Regular || e.token.life == 0 {
		return longAgo
	}
	if p.share == 1 {
		return e.token.deadline
	}
	return e.token.issuedAt.add(time.Duration(p.share * float64(e.token.life)))
}

// likelyLocked returns the boot time at which a newer token is to be expected, or never when that is not
// known: by the pattern, or where there is none in the middle of what is left of those seen.
func (c *Cache) likelyLocked(e *entry, now bootTime) bootTime {
	var at bootTime
	switch c.learnedLocked(e).kind {
	case Regular:
		at = c.rolloverLocked(e)
	case Irregular:
		at = e.token.issuedAt.add(time.Duration(c.medianLocked(e, share(now.sub(e.token.issuedAt), e.token.life)) * float64(e.token.life)))
	case Unlearnt:
		return never
	}
	if at <= e.token.shown {
		return never // it should have come: what was learnt does not hold
	}
	return min(max(at, e.policy.unmet, now), e.token.deadline.add(afterExpiry))
}

// medianLocked returns the middle of the rollovers of all keys seen later than at that share of a life, at which e's token is
// now; 1 when there is none.
func (c *Cache) medianLocked(e *entry, age float64) float64 {
	l := c.learntLocked(e)
	if !l.middle.tells(age) {
		l.middle = c.rollovers.middle(age)
	}
	return max(age, l.middle.at)
}

// middle is the middle of the rollovers seen later than at a share of a life. It is the same from that share on until the
// first of them is over.
type middle struct {
	from, until float64
	at          float64 // where no more of the life has passed
}

func (m middle) tells(age float64) bool { return m.from <= age && age < m.until }

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
