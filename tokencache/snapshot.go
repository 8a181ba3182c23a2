package tokencache

import (
	"cmp"
	"slices"
	"time"
)

// Snapshot is what a cache knows, for a later one to begin with: Options.Snapshot. Durations are boot times, of the boot
// that BootID names, unless they say otherwise.
//
// It is the document that is kept, and what it is called in JSON does not change. Written as JSON, it has no token's text,
// so that none gets into a log, nor the record, of which there is a file of its own: whoever keeps it adds both.
type Snapshot struct {
	Source       string          `json:"source,omitempty"` // whose tokens these are; the cache leaves it to those who keep it
	BootID       string          `json:"boot_id"`          // of the boot in which it was taken; empty: not known
	Boot         time.Duration   `json:"boot_ns"`
	On           time.Duration   `json:"on_ns,omitempty"` // on-time when it was taken; 0: kept by a release that had none
	Wall         time.Time       `json:"wall,omitzero"`   // by the device's clock, when it was taken
	Synchronised bool            `json:"synchronised"`    // whether that was known to be right
	Keys         []SnapshotEntry `json:"keys"`
	Rollovers    []Rollover      `json:"rollovers,omitempty"` // of all keys, the latest last

	Paused  time.Duration `json:"paused_ns,omitempty"` // no call before: the source asked for it; 0: it did not
	Failing *BackOff      `json:"failing,omitempty"`   // the source as a whole; nil: it is well

	// Record is the policy changes on record, for a start at which the record that is kept by itself is gone, or older: the
	// cache leaves them to those who keep it.
	Record Record `json:"-"`

	Principals []Principals `json:"principals,omitempty"` // whom each selector's tokens speak for
	Tombstones []Tombstone  `json:"bygones,omitempty"`    // of tokens that are not held any more, the latest last
	// Static says that the source has shown its counts of lives to be none: it gave the same number hours later.
	Static bool `json:"static_counts,omitempty"`
	// CountedOn is the on-time at which its counts had last been shown, over hours, to be some; 0: they have not been, since
	// they were none.
	CountedOn time.Duration `json:"counted_on_ns,omitempty"`
	// OnRecord is how many changes were on record, whether or not there is a copy of them.
	OnRecord int `json:"on_record,omitempty"`
}

// Taken says when m was taken.
func (m *Snapshot) Taken() Instant { return Instant{On: m.On, Boot: m.Boot, BootID: m.BootID} }

// SnapshotEntry is what is known of one key.
type SnapshotEntry struct {
	Key        Key            `json:"key"`
	Token      Token          `json:"token,omitzero"`       // zero when none is held that is valid
	Nominal    time.Duration  `json:"nominal_ns"`           // of the token, by its source
	ReceivedOn time.Time      `json:"received_on,omitzero"` // by the device's clock
	Deadline   time.Duration  `json:"deadline_ns"`          // when it expires
	Next       *time.Duration `json:"next_ns,omitempty"`    // when it is fetched; nil: it is not
	Asked      *time.Duration `json:"asked_ns,omitempty"`   // when it was asked for last; nil: it was not

	// Of the token held last.
	ReceivedAt  time.Duration `json:"received_on_ns,omitempty"`    // on-time at which it was first received; 0: not known
	IssuedFrom  time.Duration `json:"issued_from_on_ns,omitempty"` // on-times between which it was issued; both 0: not known
	IssuedTo    time.Duration `json:"issued_to_on_ns,omitempty"`
	Blind       bool          `json:"blind,omitempty"` // nothing told its age: IssuedFrom is what the longest life allows
	IssueWindow               // by the issuer's clock
	Life        time.Duration `json:"life_ns"`            // at its minting; 0: there never was one, and what follows is zero
	Given       time.Duration `json:"given_ns,omitempty"` // at its receipt, as the back end counted it; 0: not known
	IssuedAt    time.Duration `json:"born_ns"`
	Received    time.Duration `json:"received_ns,omitempty"`
	Shown       time.Duration `json:"shown_ns"`
	Answered    time.Duration `json:"answered_ns"`
	Tries       int           `json:"tries,omitempty"`
	Claims      Claims        `json:"claims"`
	Before      *Claims       `json:"before,omitempty"`

	// Unconfirmed says that the token's life left is not known for certain, since the device was off for a time that
	// nobody can tell.
	Unconfirmed bool `json:"unconfirmed,omitempty"`
	// Presumed says that Deadline is nobody's word, as in Fetched.
	Presumed bool `json:"presumed,omitempty"`

	Rollovers []Rollover `json:"rollovers,omitempty"` // seen of this key, the latest last

	// Withheld names the revocations on record that withhold the token, by their IDs, for a start at which the record is not
	// there to tell: the cache leaves them to those who keep it.
	Withheld []string `json:"withheld,omitempty"`

	Failing *BackOff `json:"failing,omitempty"` // nil: its last fetch did not fail
	Claim   *Claim   `json:"claim,omitempty"`   // that of a former principal, by what the key was given; nil: there is none
}

// Rollover is one that was seen: between which shares of a token's life it took place, and from which on the back end was
// probed often.
type Rollover struct {
	Key     Key     `json:"of,omitzero"`
	After   float64 `json:"after"`
	By      float64 `json:"by"`
	Watched float64 `json:"watched"`
}

// Snapshot returns what c knows.
func (c *Cache) Snapshot() Snapshot {
	m, judged := c.snapshot()
	for i := range m.Keys {
		for _, at := range judged[i].lacks {
			if p := &m.Record.Changes[at]; p.Effect == Revoked {
				m.Keys[i].Withheld = append(m.Keys[i].Withheld, p.ID)
			}
		}
	}
	slices.SortFunc(m.Record.Changes, latestFirst)
	slices.SortFunc(m.Keys, func(a, b SnapshotEntry) int { return a.Key.compare(b.Key) })
	return m
}

// memory returns what c knows, the changes of the record by their places, and how each key's token stands to these instead of what
// withholds it.
func (c *Cache) snapshot() (m Snapshot, judged []judgement) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.now()
	m = Snapshot{
		BootID: c.bootID, Boot: time.Duration(now), On: c.onAt(now), Wall: c.clock.Wall(), Synchronised: c.clockTrusted(), Rollovers: c.rollovers.export(),
		Record: c.recordLocked(), Principals: c.exportPrincipalsLocked(), Tombstones: c.tombstones.export(),
		Paused: time.Duration(max(0, c.queue.paused)), Failing: c.queue.backOff.export(), Static: c.static, CountedOn: c.countedOn,
	}
	m.OnRecord = len(m.Record.Changes)
	m.Keys, judged = make([]SnapshotEntry, 0, len(c.entries)), make([]judgement, 0, len(c.entries))
	for _, e := range c.entries {
		if e.token.life != 0 || e.backOff.failures > 0 {
			m.Keys, judged = append(m.Keys, e.snapshot(now, c.queue.paused)), append(judged, e.judgement)
		}
	}
	return m, judged
}

// Withholders returns the revocations that withhold key's token, the earliest first; none where it is not withheld, or not there.
func (c *Cache) Withholders(key Key) []PolicyChange {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.entries[key]
	if e == nil {
		return nil
	}
	all := make([]PolicyChange, 0, len(e.judgement.lacks))
	for _, at := range e.judgement.lacks {
		if ch := c.changes[at]; ch.Effect == Revoked {
			all = append(all, ch.PolicyChange)
		}
	}
	return all
}

// remember tells what is known of e, which is fetched no sooner than the pause is over that the back end asked for.
func (e *entry) snapshot(now, paused bootTime) SnapshotEntry {
	r := SnapshotEntry{
		Key: e.key, Nominal: e.token.nominal, ReceivedOn: e.token.receivedWall, Deadline: time.Duration(e.token.deadline),
		Next: unless(never, max(e.schedule.next, paused)), Asked: unless(longAgo, e.asked),
		ReceivedAt: e.token.receipt.on, IssuedFrom: e.token.receipt.from, IssuedTo: e.token.receipt.to, Blind: e.token.receipt.blind,
		IssueWindow: e.token.issued, Life: e.token.life, Given: e.token.given,
		IssuedAt: time.Duration(e.token.issuedAt), Received: time.Duration(e.token.received),
		Shown: time.Duration(e.token.shown), Answered: time.Duration(e.last.answered), Tries: e.schedule.tries,
		Claims: e.token.lastClaims, Before: e.token.before, Unconfirmed: e.token.unconfirmed, Presumed: e.token.presumed, Rollovers: e.rollovers.export(),
		Failing: e.backOff.export(),
	}
	if !e.claim.by.IsZero() {
		r.Claim = &Claim{By: e.claim.by, From: time.Duration(e.claim.from)}
	}
	if e.token.deadline > now {
		r.Token = *e.token.Token
	}
	return r
}

func (h history) export() []Rollover {
	told := make([]Rollover, len(h))
	for i, r := range h {
		told[i] = Rollover{Key: r.of, After: r.after, By: r.by, Watched: r.watched}
	}
	return told
}

// recall begins with what m tells. Nobody else has c yet.
func (c *Cache) restore(m *Snapshot) {
	now := c.now()
	c.rollovers, c.static, c.countedOn = importHistory(m.Rollovers, sourceHistory), m.Static, c.restoredOn(m, m.CountedOn, now)
	c.restorePrincipals(m)
	c.restoreTombstones(m)
	c.restoreSourceBackOff(m, c.downtime(m, SnapshotEntry{}, now), now)
	keys := slices.Clone(m.Keys)
	slices.SortStableFunc(keys, func(a, b SnapshotEntry) int { return cmp.Compare(a.lastAsked(), b.lastAsked()) })
	for _, r := range keys {
		switch {
		case c.entries[r.Key] != nil:
		case r.Life > 0:
			c.restoreEntry(m, r, now)
		case r.Failing != nil:
			c.restoreFailed(r, c.downtime(m, r, now), now)
		}
	}
	c.evictLocked()
	c.confirmRestoredLocked(!m.ofBoot(c.bootID, now), now)
	if m.BootID != c.bootID || slices.ContainsFunc(c.changes, m.lacks) {
		for _, e := range c.entries {
			if e.policy.worst != Current { // by a change of which the plan that is remembered may know nothing
				c.expediteLocked(e, now)
			}
		}
	}
	if m.On == 0 {
		c.refetchUncertainLocked(now)
	}
}

// Recall takes over from m, which could not be read when c began, the tokens of keys that c has none of, and what it tells of the others that
// c has, had, or may be given yet: when they were received first. What c was given since stays, and so does what was dropped.
func (c *Cache) Restore(m *Snapshot) {
	c.ContinueFrom(m.Taken())
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.now()
	if m.Static && !c.static && m.Taken().In(c.instantLocked()).On > c.countedOn { // else it has been shown since that they count
		c.voidCountsLocked(now)
	}
	var gone []tombstone
	for _, r := range m.Keys {
		kept, ok := r.Tombstone()
		if !ok {
			continue
		}
		before := c.restoredTombstone(m, kept, now)
		_, dropped := c.tombstones.find(r.Token.Text)
		c.receivedFirstLocked(before, now)
		e := c.entries[r.Key]
		if dropped || r.Life <= 0 || e != nil && !e.token.Text.IsZero() {
			gone = append(gone, before)
			continue
		}
		planned, asked := never, longAgo
		if e != nil {
			planned, asked, r.Failing = e.schedule.next, e.asked, nil
		}
		c.restoreEntry(m, r, now)
		e = c.entries[r.Key]
		e.schedule.next, e.asked = min(e.schedule.next, planned), max(e.asked, asked)
		if c.formerLocked(e) {
			c.forgetLocked(e)
		}
		if e.schedule.confirm = min(c.confirmLocked(e, now), now.add(confirmAfterBoot)); e.schedule.next != never && e.schedule.confirm >= c.heldUntilLocked(e, now) {
			e.schedule.next = min(e.schedule.next, max(e.schedule.confirm, e.backOff.until))
		}
		e.notify()
	}
	for _, before := range gone {
		c.restoreTombstoneLocked(before, now)
	}
	c.restoreTombstones(m)
	c.evictLocked()
	c.wakeSchedule()
}

// askAgainLocked has the back end asked at once for each key whose token is not known to be current, where what was kept is by a
// release that judged otherwise and kept no receipts. An answer may show that the token met all changes.
func (c *Cache) refetchUncertainLocked(now bootTime) {
	for _, e := range c.entries {
		if e.policy.worst != Current && e.schedule.next != never && !c.heldLocked(e, now) {
			e.schedule.next = now
		}
	}
}

const (
	// A device is on the network by then.
	confirmAfterBoot = 30 * time.Second
	// confirmBootWithin is over how long the keys that there are at a boot are then asked for, which spreads a fleet's, too.
	confirmBootWithin = 10 * time.Minute
)

// confirmRecalledLocked has each token that the back end has not answered for since this boot asked for soon, once: while the
// device was off, its disk may have moved, or its identity may have been made anew. That the back end gives the same one is the
// confirmation. Those of which it is open whom they speak for are asked for again as ever.
func (c *Cache) confirmRestoredLocked(booted bool, now bootTime) {
	for _, e := range c.entries {
		if e.token.Text.IsZero() {
			continue
		}
		e.schedule.confirm = c.confirmLocked(e, now)
		if booted || e.last.answered <= 0 { // else the back end answered in this boot
			e.schedule.confirm = min(e.schedule.confirm, now.add(confirmAfterBoot+time.Duration(c.roll()*float64(confirmBootWithin))))
		}
		if booted && e.schedule.next != never && e.schedule.confirm >= c.heldUntilLocked(e, now) { // else what was planned is remembered
			e.schedule.next = min(e.schedule.next, max(e.schedule.confirm, e.backOff.until))
		}
	}
}

// ofBoot reports whether m is of that boot, and not from later in it.
func (m *Snapshot) ofBoot(id string, now bootTime) bool {
	return m.Taken().ofBoot(id, time.Duration(now))
}

// lacks reports whether ch, or what it stands for, was noted after m was taken.
func (m *Snapshot) lacks(ch *change) bool {
	return !slices.ContainsFunc(m.Record.Changes, func(p PolicyChange) bool { return p.ID == ch.ID && p.Joined == ch.Joined })
}

func (r SnapshotEntry) lastAsked() bootTime {
	return or(longAgo, r.Asked)
}

func importHistory(told []Rollover, most int) (h history) {
	for _, r := range told {
		h.add(rollover{of: r.Key, after: r.After, by: r.By, watched: r.Watched}, most)
	}
	return h
}

// downtime is how m's boot clock and this one's are to each other, and what is known of the time between.
type downtime struct {
	shift   time.Duration // from the one to the other
	beyond  time.Duration // how much longer a token may be valid than it seems
	certain bool          // nothing of this is a guess
}

// downtime tells how long the cache was away from r.
//
// Within one boot nothing needs to be told. After another one, the clock that is known to be right tells it, against
// what the issuer said of the token. Else it is at least as long as this boot has lasted, and the wall clock, which may
// be wrong, is good enough to plan by but not to drop a token.
func (c *Cache) downtime(m *Snapshot, r SnapshotEntry, now bootTime) downtime {
	if m.ofBoot(c.bootID, now) {
		return downtime{certain: !r.Unconfirmed}
	}
	wall, synchronised := c.clock.Wall(), c.clockTrusted()
	then := m.Wall
	known := synchronised && m.Synchronised
	if !r.Token.Text.IsZero() && !r.Token.ExpiresOn.IsZero() && synchronised {
		then, known = r.Token.ExpiresOn.Add(m.Boot-r.Deadline), true
	}
	least := time.Duration(now)
	if known {
		least = 0
	}
	away := min(max(wall.Sub(then), least), longestAbsence)
	a := downtime{shift: time.Duration(now) - m.Boot - away, certain: known}
	if !known {
		a.beyond = away - time.Duration(now)
	}
	return a
}

// recallReceipt returns when a token was received and issued, by what m tells of it. One that was kept in an earlier boot was received before
// this one, and so before every change that was noted in this one.
func (c *Cache) restoredReceipt(m *Snapshot, got receipt, now bootTime) receipt {
	if got.from == 0 && got.to == 0 {
		got.from, got.to, got.blind = got.on-longestNominal, got.on, true
	}
	if c.static && !m.Static {
		got.doubt() // what told its age counted nothing, as was found out since
	}
	got.shift(m.Taken().behind(c.instantLocked()))
	latest := c.on
	if m.ofBoot(c.bootID, now) || m.BootID == "" || c.bootID == "" {
		latest = c.onAt(now)
	}
	beyond := max(0, got.on-latest)
	got.on, got.from = got.on-beyond, got.from-beyond
	got.to = min(got.to-beyond, got.on)
	return got
}

// recalledOn returns an on-time at which something happened, by what m tells of it: now at the latest.
func (c *Cache) restoredOn(m *Snapshot, on time.Duration, now bootTime) time.Duration {
	if began, more := m.Taken().behind(c.instantLocked()); on > began {
		on += more
	}
	return min(on, c.onAt(now))
}

// longestAbsence keeps a wrong clock from leaving the range of durations.
const longestAbsence = 10 * 365 * 24 * time.Hour

// at translates a boot time of the earlier boot.
func (a downtime) at(t bootTime) bootTime {
	if t == never || t == longAgo {
		return t
	}
	return t.add(a.shift)
}

// recallKey makes an entry of what is remembered. A token that has certainly expired is not among it.
func (c *Cache) restoreEntry(m *Snapshot, r SnapshotEntry, now bootTime) {
	a := c.downtime(m, r, now)
	e := c.entries[r.Key]
	if e == nil {
		e = c.addLocked(r.Key)
	}
	e.token.digest, e.token.receipt = r.Token.Text.SHA256(), c.restoredReceipt(m, receipt{on: r.ReceivedAt, from: r.IssuedFrom, to: r.IssuedTo, blind: r.Blind}, now)
	e.token.nominal, e.token.receivedWall = r.Nominal, r.ReceivedOn
	e.token.issued, e.token.life, e.token.lastClaims, e.token.before, e.schedule.tries = r.IssueWindow, r.Life, r.Claims, r.Before, r.Tries
	e.token.issuedAt, e.token.received, e.token.shown, e.last.answered = a.at(bootTime(r.IssuedAt)), a.at(bootTime(r.Received)), a.at(bootTime(r.Shown)), a.at(bootTime(r.Answered))
	e.rollovers = importHistory(r.Rollovers, keyHistory)
	if r.Claim != nil {
		e.claim = claim{by: r.Claim.By, from: c.recalledAt(m, bootTime(r.Claim.From))}
	}
	c.seen++
	e.token.unconfirmed, e.token.presumed = !a.certain, r.Presumed
	if e.token.given = r.Given; e.token.unconfirmed {
		e.token.given = 0 // how long ago that was nobody can tell
	}
	if e.asked = a.at(r.lastAsked()); e.asked != longAgo {
		e.asked = e.asked.add(a.beyond) // perhaps it was asked for a moment ago
	}
	c.uses++
	e.used = c.uses
	seems := a.at(bootTime(r.Deadline))
	e.token.deadline = seems.add(a.beyond)
	if !r.Token.Text.IsZero() && e.token.deadline > now {
		e.token.Token = &r.Token
	}
	if r.Unconfirmed && a.certain {
		e.token.anchor(e.token.deadline)
	}
	e.schedule.softFetchAfter = e.wished()
	c.judgeLocked(e)
	e.schedule.next = c.restoredNext(e, or(never, r.Next), seems, a, now)
	c.restoreBackOff(e, r.Failing, a, now)
	e.schedule.probe = e.schedule.tries > 0 || e.policy.worst != Current
}

// recallNext returns when a key of which that is remembered is fetched, whose token seems to expire then.
func (c *Cache) restoredNext(e *entry, next, seems bootTime, a downtime, now bootTime) bootTime {
	switch {
	case e.token.Text.IsZero() && next != never:
		return max(now, min(a.at(next), now.add(backoffTop)), c.heldUntilLocked(e, now)) // a failure may have put it off
	case e.token.Text.IsZero():
		return never
	case c.leftLocked(e, now) <= 0, seems <= now:
		return max(now, c.barredUntilLocked(e, now)) // it has expired as far as can be told
	case next == never:
		return never
	}
	return max(now, min(a.at(next), max(seems.add(afterExpiry), now.add(backoffTop))), c.heldUntilLocked(e, now))
}

// recallRest goes on leaving the source alone. However long the downtime seems, no wait is longer than any that there is.
func (c *Cache) restoreSourceBackOff(m *Snapshot, a downtime, now bootTime) {
	if m.Paused != 0 {
		c.queue.paused = min(a.at(bootTime(m.Paused)), now.add(retryAfter))
	}
	if f := m.Failing; f != nil {
		c.queue.backOff = sourceBackOff{
			failures: f.Failures, failure: f.failure(), since: now,
			until: min(a.at(bootTime(f.Until)), now.add(backoffTop)), callers: min(a.at(bootTime(f.Callers)), now.add(retryAfter)),
		}
	}
}

// recallFailing goes on leaving a key alone.
func (c *Cache) restoreBackOff(e *entry, f *BackOff, a downtime, now bootTime) {
	if f == nil {
		return
	}
	e.backOff.failure, e.backOff.failures, e.backOff.waits, e.backOff.asks = f.failure(), f.Failures, f.Waits, f.Asks
	schedule, callers := backoffTop, max(askTop, retryAfter)
	if e.backOff.failure.lasts() || e.backOff.failure.Kind == Throttled {
		schedule, callers = longTop, askLongTop
	}
	e.backOff.until, e.backOff.callers = min(a.at(bootTime(f.Until)), now.add(schedule)), min(a.at(bootTime(f.Callers)), now.add(callers))
	if e.schedule.next != never {
		e.schedule.next = max(e.schedule.next, e.backOff.until)
	}
}

// recallFailed makes an entry of a key of which nothing is remembered but that it failed.
func (c *Cache) restoreFailed(r SnapshotEntry, a downtime, now bootTime) {
	e := c.addLocked(r.Key)
	c.uses++
	e.used, e.asked = c.uses, a.at(r.lastAsked())
	if r.Next != nil { // it is to be prefetched, until Prefetch says otherwise
		e.prefetch, e.schedule.next = true, max(now, c.heldUntilLocked(e, now))
	}
	c.restoreBackOff(e, r.Failing, a, now)
}

// recallBygones takes over those that m tells of.
func (c *Cache) restoreTombstones(m *Snapshot) {
	now := c.now()
	for _, t := range m.Tombstones {
		c.restoreTombstoneLocked(c.restoredTombstone(m, t, now), now)
	}
}

// recalledBygone returns t, which m tells of. Of the life of one from an earlier boot no more is known than that it was.
func (c *Cache) restoredTombstone(m *Snapshot, t Tombstone, now bootTime) tombstone {
	r := tombstone{
		digest: t.SHA256, received: bootTime(t.Received), came: c.restoredOn(m, cmp.Or(t.Came, m.On), now),
		receivedOn: t.ReceivedOn, expiresOn: t.ExpiresOn, given: t.Given, deadline: or(never, t.Deadline), unlearnt: t.Unlearnt,
		receipt: c.restoredReceipt(m, receipt{on: t.ReceivedAt, from: t.IssuedFrom, to: t.IssuedTo, blind: t.Blind}, now),
	}
	if m.BootID == "" || m.BootID != c.bootID {
		r.received, r.given, r.deadline = beforeBoot, 0, never
	}
	return r
}

// recallBygoneLocked remembers r. Where the token is remembered already, what is known of its first receipt stays.
func (c *Cache) restoreTombstoneLocked(r tombstone, now bootTime) {
	c.receivedFirstLocked(r, now)
	if c.tombstones.index(r.digest) < 0 {
		c.tombstones.add(r)
	}
}

// wished returns until when callers' wishes for more life had been met by what the back end answered last.
func (e *entry) wished() bootTime {
	if e.schedule.tries == 0 {
		return e.last.answered.add(softFetchEvery)
	}
	return e.last.answered.add(softFetchPause(e.token.deadline.sub(e.last.answered)))
}

// confirmExpiriesLocked has tokens' times as they really are, once the clock is known to be right, where the downtime before this
// boot had left them open. It reports whether there were any.
func (c *Cache) confirmExpiriesLocked(now bootTime) (any bool) {
	if !c.clockTrusted() {
		return false
	}
	for _, e := range c.entries {
		c.ageLocked(e, now)
		if e.token.unconfirmed && !e.token.ExpiresOn.IsZero() {
			e.token.unconfirmed, any = false, true
			e.token.anchor(now.add(c.leftLocked(e, now)))
			c.expediteLocked(e, now)
		}
	}
	return any
}
