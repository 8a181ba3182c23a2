package tokencache

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"
)

// Effect is what a policy change did to the permissions of those it touches.
type Effect uint8

const (
	// Changed: in a way that is not told, or both ways. The token held is served, labelled, and a newer
	// one is looked for.
	Changed Effect = iota + 1
	// Granted: there are more permissions than before. Handled as Changed is.
	Granted
	// Revoked: there are fewer. A token that is not known to be current is withheld.
	Revoked
	// Unknown: nobody knows whether anything changed, since the record of policy changes is lost, or cannot be read now.
	// Tokens from before are uncertain. It is not for people to enter.
	Unknown
)

func (e Effect) String() string {
	switch e {
	case Changed:
		return "changed"
	case Granted:
		return "granted"
	case Revoked:
		return "revoked"
	case Unknown:
		return "unknown"
	}
	return "no effect"
}

// PolicyChange is a notice that permissions changed: whose, on what and when.
type PolicyChange struct {
	ID string // names it, for withdrawing; unique

	AllIdentities bool     // every identity; else the one that Selector selects
	Selector      Selector // unused with AllIdentities
	Resource      string   // empty: every resource, as a group's membership touches

	// At is when it happened. Zero, given to Note, means now.
	At     time.Time
	Effect Effect
	Note   string // what people wrote beside it

	// NotedOn is when Note took it, by the device's wall clock.
	NotedOn time.Time

	// Floating says that At was read off a wall clock that was not known to be right. The change then
	// happened at the boot time BootAt, which Note fills in, and At is corrected once the clock is
	// known. A change that is loaded after a reboot has lost its anchor: give it the boot time of the
	// loading, which is later than the truth and so on the safe side.
	Floating bool
	BootAt   time.Duration

	// Moment is the on-time at which it happened, at the latest. Note fixes it, and it is never moved. Zero: not known, since
	// a release that had no on-time noted it.
	Moment time.Duration
	// Vouched says that the wall clock was known to be right when Note took it.
	Vouched bool
	// Issuer is when it happened by the clock of those who issue tokens, as far as that is known.
	Issuer Window
}

// Window is an interval by the issuer's clock. A zero end is not known.
type Window struct {
	Earliest, Latest time.Time
}

// Record is the policy changes on record, the latest first.
type Record struct {
	// Taken says when the record was taken from the cache. A start works out by it what time it is: see OnAtBoot.
	Taken
	// Lineage names the record from its beginning on: generations of two lineages have no order. Empty: from before there
	// were lineages.
	Lineage string
	// Generation rises with each change of the record: one that is noted, withdrawn, dated, or over. Of two copies of one
	// record, that of the higher generation is the newer. Zero: from before there were generations, or nothing was ever noted.
	Generation uint64
	Changes    []PolicyChange
}

// Noted is a policy change on record, and how far it has got.
type Noted struct {
	PolicyChange
	Touched int       // valid tokens held that it is about
	Waiting int       // of these, those that are not current yet
	EndsOn  time.Time // when it goes off the record by itself, by the device's clock
}

const (
	// MaxChanges is how many policy changes are on record at once.
	MaxChanges = 512

	// DefaultSpread is how long a policy change may take to reach newly minted tokens.
	DefaultSpread = 10 * time.Minute

	// recordAfter is how long a change stays on record after every token that was minted before it has
	// expired: by then it cannot touch anything, and people may still want to read of it.
	recordAfter = 25 * time.Hour

	// heldBeyond is how long after its spreading a token must be minted to be known as current: its times
	// are whole seconds.
	heldBeyond = 5 * time.Second

	// tellable is how far ahead of a right clock a change may be dated: two clocks are never one.
	tellable = 2 * time.Minute
)

// ErrTooManyChanges is returned by Note when MaxChanges are on record.
var ErrTooManyChanges = errors.New("too many policy changes are on record")

// FutureError is returned by Note for a change that is dated ahead of a clock that is known to be right.
type FutureError struct {
	Ahead time.Duration
}

func (e *FutureError) Error() string {
	return fmt.Sprintf("the policy change is dated %v in the future", e.Ahead.Round(time.Second))
}

// change is a policy change in force. Times are boot times.
type change struct {
	PolicyChange
	noted time.Duration
	holds time.Duration // until then a fetch could bring a token that lacks it, and keep it for a day
}

// touches reports whether ch is about key, whose resource goes by its alternates as well.
func (c *Cache) touches(ch *change, key Key) bool {
	if !ch.AllIdentities && ch.Selector != key.Selector {
		return false
	}
	return ch.Resource == "" || ch.Resource == key.Resource ||
		slices.Contains(c.alternates[ch.Resource], key.Resource) || slices.Contains(c.alternates[key.Resource], ch.Resource)
}

// Note puts a policy change on record and in force, and returns it with what was filled in. The error
// is a *FutureError or ErrTooManyChanges; nothing has changed then.
func (c *Cache) Note(p PolicyChange) (PolicyChange, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now, wall, sure := c.clock.Boot(), c.clock.Wall(), c.knowsTime()
	if len(c.changes) >= MaxChanges {
		return PolicyChange{}, ErrTooManyChanges
	}
	if ahead := p.At.Sub(wall); !p.At.IsZero() && sure && ahead > tellable {
		return PolicyChange{}, &FutureError{Ahead: ahead}
	}
	if p.At.IsZero() {
		p.At, p.Floating, p.BootAt = wall, !sure, now
	}
	p.NotedOn = wall
	c.enterLocked(p, now)
	c.generation++
	c.rejudgeLocked(now)
	return p, nil
}

// enterLocked puts p on record.
func (c *Cache) enterLocked(p PolicyChange, now time.Duration) {
	wall := c.clock.Wall()
	if c.knowsTime() && p.At.After(wall) {
		p.At = wall // whoever dated it had a clock that was ahead, and it has happened by now
	}
	ch := &change{PolicyChange: p, noted: now}
	since := wall.Sub(p.At)
	if since < 0 { // ahead of an unsure clock: it had happened when it was noted
		since = max(0, wall.Sub(p.NotedOn))
	}
	if p.Floating {
		since = now - p.BootAt
	}
	ch.holds = now - since + c.spread + heldBeyond
	c.changes = append(c.changes, ch)
}

// Withdraw takes a policy change off the record, as if it had never been noted. False: there is none
// of that ID.
func (c *Cache) Withdraw(id string) (PolicyChange, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	i := slices.IndexFunc(c.changes, func(ch *change) bool { return ch.ID == id })
	if i < 0 {
		return PolicyChange{}, false
	}
	withdrawn := c.changes[i].PolicyChange
	c.changes = slices.Delete(c.changes, i, i+1)
	c.generation++
	c.rejudgeLocked(c.clock.Boot())
	return withdrawn, true
}

// Changes returns the policy changes on record, the latest first.
func (c *Cache) Changes() []Noted {
	c.mu.Lock()
	defer c.mu.Unlock()
	now, wall := c.clock.Boot(), c.clock.Wall()
	all := make([]Noted, 0, len(c.changes))
	for _, ch := range c.changes {
		n := Noted{PolicyChange: ch.PolicyChange, EndsOn: wall.Add(c.endsLocked(ch, now) - now)}
		for _, e := range c.entries {
			if c.leftLocked(e, now) <= 0 || !c.touches(ch, e.key) {
				continue
			}
			n.Touched++
			if c.verdictLocked(e, ch) != Current {
				n.Waiting++
			}
		}
		all = append(all, n)
	}
	slices.SortFunc(all, func(x, y Noted) int { return latestFirst(x.PolicyChange, y.PolicyChange) })
	return all
}

// Record returns the policy changes on record as they are kept.
func (c *Cache) Record() Record {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.recordLocked()
}

func (c *Cache) recordLocked() Record {
	r := Record{Taken: c.takenLocked(), Lineage: c.lineage, Generation: c.generation, Changes: make([]PolicyChange, len(c.changes))}
	for i, ch := range c.changes {
		r.Changes[i] = ch.PolicyChange
	}
	slices.SortFunc(r.Changes, latestFirst)
	return r
}

func latestFirst(x, y PolicyChange) int { return cmp.Or(y.At.Compare(x.At), cmp.Compare(x.ID, y.ID)) }

// endsLocked returns the boot time at which ch goes off the record.
func (c *Cache) endsLocked(ch *change, now time.Duration) time.Duration {
	lasts := c.spread + longestNominal + recordAfter
	ends := ch.noted + lasts
	if !ch.Floating && c.knowsTime() {
		ends = min(ends, now+ch.At.Add(lasts).Sub(c.clock.Wall()))
	}
	return ends
}

// reviewLocked dates floating changes when the clock is known by now, and takes those off the record
// whose time is over. It reports whether anything is different.
func (c *Cache) reviewLocked(now time.Duration) bool {
	before := len(c.changes)
	c.changes = slices.DeleteFunc(c.changes, func(ch *change) bool { return now >= c.endsLocked(ch, now) })
	different := len(c.changes) != before
	for _, ch := range c.changes {
		if ch.Floating && c.knowsTime() {
			ch.At, ch.Floating = c.clock.Wall().Add(ch.BootAt-now), false
			different = true
		}
	}
	if different {
		c.generation++
	}
	return different
}

// SetSpread changes how long a policy change may take to reach newly minted tokens. Zero: DefaultSpread.
func (c *Cache) SetSpread(spread time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.clock.Boot()
	spread = cmp.Or(spread, DefaultSpread)
	for _, ch := range c.changes {
		ch.holds += spread - c.spread
	}
	c.spread = spread
	c.rejudgeLocked(now)
}

// SetAlternates names, for each resource, the other URIs that it goes by: a policy change for one of
// them is about all.
func (c *Cache) SetAlternates(alternates map[string][]string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.alternates = maps.Clone(alternates)
	c.rejudgeLocked(c.clock.Boot())
}

// Replace puts r in the place of the record, as if c had begun with it.
func (c *Cache) Replace(r Record) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.clock.Boot()
	c.changes, c.lineage, c.generation = nil, r.Lineage, r.Generation
	for _, p := range r.Changes {
		c.enterLocked(p, now)
	}
	c.rejudgeLocked(now)
}
