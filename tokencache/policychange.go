package tokencache

import (
	"cmp"
	"slices"
	"time"
)

// Effect is what a policy change did to the permissions that it is about.
type Effect string

const (
	// Changed: it is not known how, or some were added and some removed. Older tokens are served and labelled, and the
	// back end is probed for newer ones.
	Changed Effect = "changed"
	// Granted: there are more permissions than before. Handled as Changed is.
	Granted Effect = "granted"
	// Revoked: there are fewer. A token that is not known to be current is withheld.
	Revoked Effect = "revoked"
	// Unknown: the record of policy changes is lost, or cannot be read now. Older tokens are uncertain. People do not
	// enter it.
	Unknown Effect = "unknown"
)

// PolicyChange is a notice that permissions changed: whose, on what, and when.
type PolicyChange struct {
	ID string `json:"id"` // names it, for withdrawing; unique

	AllIdentities bool     `json:"-"`                  // every identity; else the one that Selector selects
	Selector      Selector `json:"selector"`           // unused with AllIdentities; not kept then
	Resource      string   `json:"resource,omitempty"` // empty: every resource, as a group's membership touches

	// At is when it happened, for people: by their clocks, or by the device's. For RecordChange, zero means now.
	At     time.Time `json:"at"`
	Effect Effect    `json:"effect"`
	Note   string    `json:"note,omitempty"` // what people wrote beside it

	// What follows is filled in by RecordChange.

	// RecordedAt is when it was recorded, by the device's wall clock.
	RecordedAt time.Time `json:"noted_on"`
	// Vouched says that the wall clock was known to be right then.
	Vouched bool `json:"vouched,omitempty"`
	// Moment is the on-time at which it happened, as if the device had been on since. It never moves. Zero: not known,
	// since a release without on-time recorded it.
	Moment time.Duration `json:"moment_ns,omitempty"`
	// By is the on-time at which it happened at the latest. It is later than Moment if the change is dated before the
	// boot in which it was recorded.
	By time.Duration `json:"by_ns,omitempty"`
	// Issuer is when it happened by the clock of those who issue tokens, as far as that is known.
	Issuer Window `json:"issuer,omitzero"`
	// Checked says that Issuer is no earlier than the back end's counting shows.
	Checked bool `json:"checked,omitempty"`
	// Unplaced says that it is not known in which boot it was recorded, since its record did not name one. Moment may
	// be as late as the start at which it was read.
	Unplaced bool `json:"unplaced,omitempty"`
	// NotLater is a time that the issuer's clock had not passed when it happened, by what the back end has handed out
	// since. Zero: not known.
	NotLater time.Time `json:"not_later,omitzero"`
	// Joined is how many others it also stands for, since the record was full.
	Joined int `json:"joined,omitempty"`

	// Alone keeps it from being joined with others when the record is full, since it is to go first. It is not kept.
	Alone bool `json:"-"`
}

// Window is an interval by the issuer's clock. A zero end is not known.
type Window struct {
	Earliest time.Time `json:"earliest,omitzero"`
	Latest   time.Time `json:"latest,omitzero"`
}

// RecordedChange is a policy change on record, and how many tokens carry it.
type RecordedChange struct {
	PolicyChange
	Unsure        bool      // At was read off a clock that was not known to be right
	AsOfRecording bool      // it counts as of RecordedAt and not of At, since they differ and At is unsure
	Touched       int       // valid tokens held that it is about
	Waiting       int       // of these, those that are not current yet
	EndsOn        time.Time // when it goes off the record, by the device's clock, if the device stays on
}

const (
	// MaxChanges is how many policy changes are on record at once. If a Record given to a cache has more, some are
	// joined and none is left out.
	MaxChanges = 512

	// DefaultPropagationDelay is how long a policy change may take to reach newly issued tokens.
	DefaultPropagationDelay = 10 * time.Minute

	// recordAfter is how long a change stays on record after every older token has expired. It then concerns no token,
	// but people may still want to read about it.
	recordAfter = 25 * time.Hour

	// postponedBeyond is how long after the spreading of a change a token must be issued to be known as current, since
	// its times are whole seconds.
	postponedBeyond = 5 * time.Second

	// futureTolerance is how far ahead of a trusted clock a change may be dated, since two clocks always differ.
	futureTolerance = 2 * time.Minute
)

// change is a policy change in force.
type change struct {
	PolicyChange
	canonical string // its Resource, as it is compared
	assumed   bool   // its moment is that of the loading, since no other is known
	dated     bool   // At was put right for people, since the clock is known by now
}

// RecordChange puts a policy change on record and in force, and returns it as it is recorded. The error is a
// *FutureError or ErrTooManyChanges; then nothing has changed. There is always room for a revocation. The returned
// change stands for others as well if Joined is not zero.
func (c *Cache) RecordChange(p PolicyChange) (RecordedChange, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now, wall, sure := c.now(), c.clock.Wall(), c.clockTrusted()
	if ahead := p.At.Sub(wall); !p.At.IsZero() && sure && ahead > futureTolerance {
		return RecordedChange{}, &FutureError{Ahead: ahead}
	}
	p.RecordedAt, p.Vouched, p.Joined = wall, sure, 0
	if p.At.IsZero() || sure && p.At.After(wall) {
		p.At = wall // it was dated by another clock, and has happened
	}
	p.Moment, p.By = c.momentLocked(p, now)
	p.Issuer, p.Checked = c.byIssuerLocked(p, now), !c.issuerClock.issuer.IsZero()
	p.NotLater, _ = c.issuerClock.notLater(c.bootAt(p.Moment))
	if !c.enterLocked(c.changeLocked(p, now)) {
		return RecordedChange{}, ErrTooManyChanges
	}
	c.generation++
	c.rejudgeLocked(now)
	i := slices.IndexFunc(c.changes, func(ch *change) bool { return ch.ID == p.ID })
	return c.progressLocked(i, now), nil
}

// momentLocked returns the on-times of a change that is being recorded: its date by the clock, if the clock is known to
// be right, else now. If it is dated before this boot, nobody knows for how much of the time since the device was off.
// So it happened by the start of this boot at the latest.
func (c *Cache) momentLocked(p PolicyChange, now bootTime) (moment, by time.Duration) {
	moment = c.onAt(now) - c.agoLocked(p, now)
	if moment == 0 {
		moment-- // 0 stands for unknown
	}
	return moment, max(moment, c.on)
}

// agoLocked returns how long ago p happened, which is being recorded, by the wall clock; 0 if that clock is not known
// to be right. If the back end's clock says that it was less long ago, the wall clock is wrong, and the back end's
// counts.
func (c *Cache) agoLocked(p PolicyChange, now bootTime) time.Duration {
	if !p.Vouched {
		return 0
	}
	ago := c.clock.Wall().Sub(p.At)
	if issuer := c.issuerClock.issuer; !issuer.IsZero() {
		ago = min(ago, now.by(issuer).Sub(p.At))
	}
	return max(0, ago)
}

// byIssuerLocked returns when p happened, which is being recorded, by the issuer's clock. The back end's counting shows
// it, and so does the wall clock if it is known to be right. If they differ, p happened anywhere between.
func (c *Cache) byIssuerLocked(p PolicyChange, now bootTime) (w Window) {
	if p.Vouched {
		w = Window{p.At, p.At}
	}
	if c.issuerClock.issuer.IsZero() {
		return w
	}
	counted := now.add(-c.agoLocked(p, now)).by(c.issuerClock.issuer)
	if counted.After(w.Latest) {
		w.Latest = counted
	}
	dated := !p.At.Equal(p.RecordedAt) // by an unknown clock: then it was earlier, by an unknown time
	if p.Vouched && counted.Before(w.Earliest) || !p.Vouched && !dated {
		w.Earliest = counted
	}
	return w
}

// clockTolerance is how far two clocks may differ and still count as equal, since answers take time.
const clockTolerance = 30 * time.Second

// correctLocked dates changes by the back end's counting if they have no date by the issuer's clock, or too early a one
// because the wall clock was trusted and behind. A change of an earlier boot happened no later than its on-time says,
// since the device was off in between for an unknown time. That bounds its date, if no counting of its own boot has
// checked it.
func (c *Cache) correctLocked(now bootTime) {
	if c.issuerClock.issuer.IsZero() {
		return
	}
	corrected := false
	for _, ch := range c.changes {
		counted := c.at(ch).by(c.issuerClock.issuer)
		here := c.at(ch) > 0 && !ch.Unplaced
		if !here && !ch.Checked && c.inEarlierBoot(ch) {
			counted, here = c.bootAt(ch.By).by(c.issuerClock.issuer), true
		}
		behind := ch.Vouched && here && counted.After(ch.Issuer.Latest.Add(clockTolerance))
		if behind || ch.Issuer.Latest.IsZero() {
			ch.Issuer.Latest, corrected = counted, true
		}
		if here && !ch.Checked {
			ch.Checked, corrected = true, true
		}
	}
	if corrected {
		c.generation++
		c.rejudgeLocked(now)
	}
}

// changeLocked returns p as a change in force.
func (c *Cache) changeLocked(p PolicyChange, now bootTime) *change {
	ch := &change{PolicyChange: p, canonical: Canonical(p.Resource), assumed: p.Moment == 0}
	if ch.assumed { // from before there were on-times, when a date counted
		ch.Vouched = p.Vouched && c.clockTrusted()
		ch.Moment, ch.By = c.momentLocked(ch.PolicyChange, now)
		if ch.Vouched {
			ch.Issuer = Window{p.At, p.At}
		}
	}
	if latest := c.onAt(now); ch.By > latest { // it has happened, whatever another life of this device says
		ch.Moment, ch.By, ch.Unplaced = min(ch.Moment, latest), latest, true
	}
	return ch
}

// Withdraw takes a policy change off the record, as if it had never been recorded, and returns it as it was. False:
// none has that ID.
func (c *Cache) Withdraw(id string) (RecordedChange, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	i := slices.IndexFunc(c.changes, func(ch *change) bool { return ch.ID == id })
	if i < 0 {
		return RecordedChange{}, false
	}
	withdrawn := c.progressLocked(i, c.now())
	c.changes = slices.Delete(c.changes, i, i+1)
	c.generation++
	c.rejudgeLocked(c.now())
	return withdrawn, true
}

// Changes returns the policy changes on record, the latest first.
func (c *Cache) Changes() []RecordedChange {
	all, held := c.describeAll()
	for _, j := range held {
		for _, i := range j.about {
			all[i].Touched++
		}
		for _, i := range j.lacks {
			all[i].Waiting++
		}
	}
	slices.SortFunc(all, func(x, y RecordedChange) int { return latestFirst(x.PolicyChange, y.PolicyChange) })
	return all
}

// describeAll returns the policy changes on record in their order, without counts, and the judgements of the valid
// tokens.
func (c *Cache) describeAll() (all []RecordedChange, held []judgement) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now, wall := c.now(), c.clock.Wall()
	all, held = make([]RecordedChange, 0, len(c.changes)), make([]judgement, 0, len(c.entries))
	for _, ch := range c.changes {
		all = append(all, c.describeLocked(ch, now, wall))
	}
	for _, e := range c.entries {
		if c.leftLocked(e, now) > 0 {
			held = append(held, e.judgement)
		}
	}
	return all, held
}

// describeLocked returns ch, but not how far it has got.
func (c *Cache) describeLocked(ch *change, now bootTime, wall time.Time) RecordedChange {
	unsure := !ch.Vouched && !ch.dated
	return RecordedChange{
		PolicyChange: ch.PolicyChange, Unsure: unsure, AsOfRecording: unsure && !ch.At.Equal(ch.RecordedAt),
		EndsOn: wall.Add(c.lastsLocked(ch, now)),
	}
}

// progressLocked returns the change in that place, and how far it has got.
func (c *Cache) progressLocked(i int, now bootTime) RecordedChange {
	r := c.describeLocked(c.changes[i], now, c.clock.Wall())
	for _, e := range c.entries {
		if c.leftLocked(e, now) <= 0 {
			continue
		}
		if _, touched := slices.BinarySearch(e.judgement.about, place(i)); touched {
			r.Touched++
		}
		if _, waits := slices.BinarySearch(e.judgement.lacks, place(i)); waits {
			r.Waiting++
		}
	}
	return r
}

// Record returns the policy changes on record as they are kept.
func (c *Cache) Record() Record {
	c.mu.Lock()
	r := c.exportRecordLocked()
	c.mu.Unlock()
	slices.SortFunc(r.Changes, latestFirst)
	return r
}

// exportRecordLocked returns the record, its changes in their order.
func (c *Cache) exportRecordLocked() Record {
	r := Record{
		Instant: c.instantLocked(), Lineage: c.lineage, Origins: c.origins, Generation: c.generation,
		Changes: make([]PolicyChange, len(c.changes)),
	}
	for i, ch := range c.changes {
		r.Changes[i] = ch.PolicyChange
	}
	return r
}

// latestFirst compares changes for listing, the latest first.
func latestFirst(x, y PolicyChange) int {
	return cmp.Or(cmp.Compare(y.Moment, x.Moment), y.At.Compare(x.At), cmp.Compare(x.ID, y.ID))
}

// IsOver reports whether a policy change of that time would be off the record by now: no token from before it can be
// valid any more. While the wall clock is not known to be right that cannot be told, and it is not over.
func (c *Cache) IsOver(at time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.clockTrusted() && c.clock.Wall().Sub(at) >= c.changeLifeLocked()
}

// changeLifeLocked is for how long after its moment a change stays on record.
func (c *Cache) changeLifeLocked() time.Duration {
	return c.propagationDelay + longestNominal + recordAfter
}

// lastsLocked returns how long ch stays on record, at least: until every clock that counts says that its time is over.
// On-time always counts, and at least as much time has passed. The wall clock counts if it is known to be right now,
// was so when the change was recorded, and is not before the change.
func (c *Cache) lastsLocked(ch *change, now bootTime) time.Duration {
	lasts := c.changeLifeLocked()
	left := c.at(ch).sub(now) + lasts
	if wall := c.clock.Wall(); ch.Vouched && c.clockTrusted() && !wall.Before(ch.At) {
		left = max(left, ch.At.Add(lasts).Sub(wall))
	}
	return left
}

// reviewLocked takes changes off the record whose time is over. Once the clock is known, it corrects the dates of the
// others for people. It reports whether the record changed.
func (c *Cache) reviewLocked(now bootTime) bool {
	before := len(c.changes)
	c.changes = slices.DeleteFunc(c.changes, func(ch *change) bool { return c.lastsLocked(ch, now) <= 0 })
	gone := len(c.changes) != before
	dated := c.dateLocked(now)
	if gone || dated {
		c.generation++
	}
	return gone || dated
}

// redatedBy is how much a date must differ to be corrected. Two readings of two clocks differ a little, and such a
// difference does not change the record.
const redatedBy = time.Second

// dateLocked corrects the dates of changes that were recorded in this boot as "now", by a clock that was not known to
// be right. Dates are for people: no token is judged by them.
func (c *Cache) dateLocked(now bootTime) (dated bool) {
	if !c.clockTrusted() {
		return false
	}
	for _, ch := range c.changes {
		if ch.Vouched || ch.dated || ch.assumed || ch.Unplaced || c.at(ch) < 0 || !ch.At.Equal(ch.RecordedAt) {
			continue
		}
		at := c.clock.Wall().Add(c.at(ch).sub(now))
		if at.Before(time.Unix(0, 0)) {
			continue // the clock is wrong, though trusted, and such a date cannot be kept
		}
		if ch.dated = true; ch.At.Sub(at).Abs() > redatedBy {
			ch.At, ch.RecordedAt, dated = at, at, true
		}
	}
	return dated
}

// SetPropagationDelay changes how long a policy change may take to reach newly issued tokens. Zero:
// DefaultPropagationDelay.
func (c *Cache) SetPropagationDelay(spread time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.propagationDelay = cmp.Or(spread, DefaultPropagationDelay)
	c.rejudgeLocked(c.now())
}

// SetAlternates names, for each resource, its alternates: other URIs of it. A policy change for one is about all of
// them, and about the alternates of these.
func (c *Cache) SetAlternates(alternates map[string][]string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.alternates = together(alternates)
	for _, e := range c.entries {
		e.goesBy = c.alternates[e.canonical]
	}
	c.rejudgeLocked(c.now())
}

// SetAlternatesUnknown says whether there may be other alternates than SetAlternates names. While there may, a policy
// change for one resource is about every other as well.
func (c *Cache) SetAlternatesUnknown(unknown bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.anyName == unknown {
		return
	}
	c.anyName = unknown
	for _, e := range c.entries {
		e.anyName = unknown
	}
	c.rejudgeLocked(c.now())
}

// ReplaceRecord replaces the record by r, as if c had begun with it.
func (c *Cache) ReplaceRecord(r Record) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.now()
	c.lineage, c.origins, c.generation = r.Lineage, r.Origins, r.Generation
	c.loadLocked(r.In(c.instantLocked()).Changes)
	c.rejudgeLocked(now)
	c.correctLocked(now) // what the back end has shown since is not in what was kept
}

// loadLocked puts kept changes on record. There may be too many, as from two records: then it joins as many as needed,
// and leaves none out.
func (c *Cache) loadLocked(kept []PolicyChange) {
	now := c.now()
	c.changes = make([]*change, len(kept))
	for i, p := range kept {
		c.changes[i] = c.changeLocked(p, now)
	}
	inOrder(c.changes)
	for len(c.changes) > MaxChanges {
		into, o := makesRoom(c.changes, nil)
		if into == nil {
			return // never: of so many, two are of one effect
		}
		c.changes = replaced(c.changes, into, o)
		inOrder(c.changes)
	}
}
