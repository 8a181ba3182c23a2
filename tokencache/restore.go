package tokencache

import (
	"cmp"
	"slices"
	"time"
)

// restore begins with what m has. Nobody else has c yet.
func (c *Cache) restore(m *Snapshot) {
	now := c.now()
	c.rollovers = importHistory(m.Rollovers, sourceHistory)
	c.static, c.countedOn = m.Static, c.restoredOn(m, m.CountedOn, now)
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

// Restore adds a snapshot that could not be read when c began. Keys without a token get theirs from m. Of the others c
// learns when their tokens, held, dropped or yet to come, were first received. What c was given since stays, and what
// was dropped stays dropped.
func (c *Cache) Restore(m *Snapshot) {
	c.ContinueFrom(m.Taken())
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.now()
	if m.Static && !c.static && m.Taken().In(c.instantLocked()).On > c.countedOn { // else they have counted since
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
		e.schedule.confirm = min(c.confirmLocked(e, now), now.add(confirmAfterBoot))
		if e.schedule.next != never && e.schedule.confirm >= c.postponedUntilLocked(e, now) {
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

// refetchUncertainLocked plans a fetch at once for each key whose token is not known to be current, if the snapshot is
// of a release that judged otherwise and kept no receipts. The answer may show that the token carries all changes.
func (c *Cache) refetchUncertainLocked(now bootTime) {
	for _, e := range c.entries {
		if e.policy.worst != Current && e.schedule.next != never && !c.postponedLocked(e, now) {
			e.schedule.next = now
		}
	}
}

const (
	// confirmAfterBoot is how long after its boot a device is on the network.
	confirmAfterBoot = 30 * time.Second
	// confirmBootWithin is within how long all restored keys are then fetched, which also spreads a fleet's fetches.
	confirmBootWithin = 10 * time.Minute
)

// confirmRestoredLocked plans one fetch soon for each token that the back end has not given since this boot: while the
// device was off, its disk may have been moved, or its identity made again. If the back end gives the same token, that
// confirms it. A token of which it is open whom it speaks for is confirmed again as usual.
func (c *Cache) confirmRestoredLocked(booted bool, now bootTime) {
	for _, e := range c.entries {
		if e.token.Text.IsZero() {
			continue
		}
		e.schedule.confirm = c.confirmLocked(e, now)
		if booted || e.last.answered <= 0 { // else the back end answered in this boot
			soon := now.add(confirmAfterBoot + time.Duration(c.roll()*float64(confirmBootWithin)))
			e.schedule.confirm = min(e.schedule.confirm, soon)
		}
		// Without a boot, what was planned is restored.
		if booted && e.schedule.next != never && e.schedule.confirm >= c.postponedUntilLocked(e, now) {
			e.schedule.next = min(e.schedule.next, max(e.schedule.confirm, e.backOff.until))
		}
	}
}

// ofBoot reports whether m was taken in that boot, and no later in it than now.
func (m *Snapshot) ofBoot(id string, now bootTime) bool {
	return m.Taken().ofBoot(id, time.Duration(now))
}

// lacks reports whether ch, or a change that it stands for, was recorded after m was taken.
func (m *Snapshot) lacks(ch *change) bool {
	return !slices.ContainsFunc(m.Record.Changes, func(p PolicyChange) bool {
		return p.ID == ch.ID && p.Joined == ch.Joined
	})
}

// lastAsked returns when r was last asked for; longAgo: it was not.
func (r SnapshotEntry) lastAsked() bootTime {
	return or(longAgo, r.Asked)
}

// importHistory returns kept rollovers, the latest most of them.
func importHistory(kept []Rollover, most int) (h history) {
	for _, r := range kept {
		h.add(rollover{of: r.Key, after: r.After, by: r.By, watched: r.Watched}, most)
	}
	return h
}

// downtime maps boot times of a snapshot to this boot.
type downtime struct {
	shift   time.Duration // from the one to the other
	beyond  time.Duration // how much longer a token may be valid than it seems
	certain bool          // nothing of this is a guess
}

// downtime returns how long the cache was away from r.
//
// Within one boot the boot clock shows it. After a reboot, a wall clock that is known to be right shows it, against the
// issuer's expiry of the token. Otherwise it is at least as long as this boot has lasted; the wall clock, which may be
// wrong, is good enough for planning, but no token is dropped by it.
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

// restoredReceipt returns the receipt of a token in m. A token kept in an earlier boot was received before this boot,
// and so before every change recorded in it.
func (c *Cache) restoredReceipt(m *Snapshot, got receipt, now bootTime) receipt {
	if got.from == 0 && got.to == 0 {
		got.from, got.to, got.blind = got.on-longestNominal, got.on, true
	}
	if c.static && !m.Static {
		got.doubt() // what showed its age did not count, as is known now
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

// restoredOn returns an on-time in m by this boot's on-time, now at the latest.
func (c *Cache) restoredOn(m *Snapshot, on time.Duration, now bootTime) time.Duration {
	if began, more := m.Taken().behind(c.instantLocked()); on > began {
		on += more
	}
	return min(on, c.onAt(now))
}

// longestAbsence keeps durations in range when a clock is wrong.
const longestAbsence = 10 * 365 * 24 * time.Hour

// at returns the boot time in this boot of one in the snapshot's.
func (a downtime) at(t bootTime) bootTime {
	if t == never || t == longAgo {
		return t
	}
	return t.add(a.shift)
}

// restoreEntry makes an entry from r. It leaves out a token that has certainly expired.
func (c *Cache) restoreEntry(m *Snapshot, r SnapshotEntry, now bootTime) {
	a := c.downtime(m, r, now)
	e := c.entries[r.Key]
	if e == nil {
		e = c.addLocked(r.Key)
	}
	got := receipt{on: r.ReceivedOnTime, from: r.IssuedFrom, to: r.IssuedTo, blind: r.Blind}
	e.token.digest, e.token.receipt = r.Token.Text.SHA256(), c.restoredReceipt(m, got, now)
	e.token.nominal, e.token.receivedWall = r.Nominal, r.ReceivedWall
	e.token.issued, e.token.life, e.token.lastClaims, e.token.before = r.IssueWindow, r.Life, r.Claims, r.Before
	e.token.issuedAt, e.token.received = a.at(bootTime(r.IssuedAt)), a.at(bootTime(r.ReceivedBoot))
	e.token.shown, e.last.answered, e.schedule.tries = a.at(bootTime(r.Shown)), a.at(bootTime(r.Answered)), r.Tries
	e.rollovers = importHistory(r.Rollovers, keyHistory)
	if r.Claim != nil {
		e.claim = claim{by: r.Claim.By, from: c.restoredAt(m, bootTime(r.Claim.From))}
	}
	c.learnedVersion++
	e.token.unconfirmed, e.token.presumed = !a.certain, r.Presumed
	if e.token.given = r.Given; e.token.unconfirmed {
		e.token.given = 0 // how long ago that was is not known
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
	e.schedule.softFetchAfter = e.softFetchDue()
	c.judgeLocked(e)
	e.schedule.next = c.restoredNext(e, or(never, r.Next), seems, a, now)
	c.restoreBackOff(e, r.Failing, a, now)
	e.schedule.probe = e.schedule.tries > 0 || e.policy.worst != Current
}

// restoredNext returns when a restored key is fetched that was planned for next, and whose token seems to expire at
// seems.
func (c *Cache) restoredNext(e *entry, next, seems bootTime, a downtime, now bootTime) bootTime {
	switch {
	case e.token.Text.IsZero() && next != never:
		// A failure may have put it off.
		return max(now, min(a.at(next), now.add(backoffTop)), c.postponedUntilLocked(e, now))
	case e.token.Text.IsZero():
		return never
	case c.leftLocked(e, now) <= 0, seems <= now:
		return max(now, c.barredUntilLocked(e, now)) // it has expired as far as is known
	case next == never:
		return never
	}
	return max(now, min(a.at(next), max(seems.add(afterExpiry), now.add(backoffTop))), c.postponedUntilLocked(e, now))
}

// restoreSourceBackOff continues the back-off of the source. However long the downtime seems, no wait is longer than
// the longest there is.
func (c *Cache) restoreSourceBackOff(m *Snapshot, a downtime, now bootTime) {
	if m.Paused != 0 {
		c.queue.paused = min(a.at(bootTime(m.Paused)), now.add(retryAfter))
	}
	if f := m.Failing; f != nil {
		c.queue.backOff = sourceBackOff{
			failures: f.Failures, failure: f.failure(), since: now,
			until:   min(a.at(bootTime(f.Until)), now.add(backoffTop)),
			callers: min(a.at(bootTime(f.Callers)), now.add(retryAfter)),
		}
	}
}

// restoreBackOff continues the back-off of a key.
func (c *Cache) restoreBackOff(e *entry, f *BackOff, a downtime, now bootTime) {
	if f == nil {
		return
	}
	e.backOff.failure, e.backOff.failures, e.backOff.waits, e.backOff.asks = f.failure(), f.Failures, f.Waits, f.Asks
	schedule, callers := backoffTop, max(askTop, retryAfter)
	if e.backOff.failure.lasts() || e.backOff.failure.Kind == Throttled {
		schedule, callers = longTop, askLongTop
	}
	e.backOff.until = min(a.at(bootTime(f.Until)), now.add(schedule))
	e.backOff.callers = min(a.at(bootTime(f.Callers)), now.add(callers))
	if e.schedule.next != never {
		e.schedule.next = max(e.schedule.next, e.backOff.until)
	}
}

// restoreFailed makes an entry of a key of which only its failures were kept.
func (c *Cache) restoreFailed(r SnapshotEntry, a downtime, now bootTime) {
	e := c.addLocked(r.Key)
	c.uses++
	e.used, e.asked = c.uses, a.at(r.lastAsked())
	if r.Next != nil { // it is to be prefetched, until Prefetch says otherwise
		e.prefetch, e.schedule.next = true, max(now, c.postponedUntilLocked(e, now))
	}
	c.restoreBackOff(e, r.Failing, a, now)
}

// restoreTombstones adds the tombstones of m.
func (c *Cache) restoreTombstones(m *Snapshot) {
	now := c.now()
	for _, t := range m.Tombstones {
		c.restoreTombstoneLocked(c.restoredTombstone(m, t, now), now)
	}
}

// restoredTombstone returns t, which is in m. Of a token from an earlier boot it is only known that it was.
func (c *Cache) restoredTombstone(m *Snapshot, t Tombstone, now bootTime) tombstone {
	got := receipt{on: t.ReceivedOnTime, from: t.IssuedFrom, to: t.IssuedTo, blind: t.Blind}
	r := tombstone{
		digest: t.SHA256, received: bootTime(t.ReceivedBoot), cameOn: c.restoredOn(m, cmp.Or(t.Came, m.On), now),
		receivedWall: t.ReceivedWall, expiresOn: t.ExpiresOn, given: t.Given, deadline: or(never, t.Deadline),
		unlearnt: t.Unlearnt, receipt: c.restoredReceipt(m, got, now),
	}
	if m.BootID == "" || m.BootID != c.bootID {
		r.received, r.given, r.deadline = beforeBoot, 0, never
	}
	return r
}

// restoreTombstoneLocked adds r. If the token has a tombstone already, the earlier first receipt counts.
func (c *Cache) restoreTombstoneLocked(r tombstone, now bootTime) {
	c.receivedFirstLocked(r, now)
	if c.tombstones.index(r.digest) < 0 {
		c.tombstones.add(r)
	}
}

// softFetchDue returns until when the last answer meets callers' soft needs.
func (e *entry) softFetchDue() bootTime {
	if e.schedule.tries == 0 {
		return e.last.answered.add(softFetchEvery)
	}
	return e.last.answered.add(softFetchPause(e.token.deadline.sub(e.last.answered)))
}

// confirmExpiriesLocked recomputes expiries that were estimates, since the downtime was not known, once the clock is
// known to be right. It reports whether there were any.
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

// restorePrincipals begins with the principals of m. A snapshot of a release that did not keep them has them in its
// tokens, of which the one received last counts.
func (c *Cache) restorePrincipals(m *Snapshot) {
	sameBoot := m.BootID != "" && m.BootID == c.bootID
	for _, kept := range m.Principals[:min(len(m.Principals), MaxKeys)] {
		p := c.principalsLocked(kept.Selector)
		p.current = kept.Current
		p.former = slices.Clone(kept.Former[max(0, len(kept.Former)-maxFormer):])
		if kept.Since != nil {
			p.since = 0 // in an earlier boot, so before this one began
		}
		if sameBoot {
			p.since = or(longAgo, kept.Since)
		}
		p.shown, p.reported = c.restoredAt(m, or(longAgo, kept.Shown)), c.restoredAt(m, or(longAgo, kept.Told))
		p.unreported = max(0, kept.Untold)
		if kept.By != "" {
			p.returnedBy = Key{Selector: kept.Selector, Resource: kept.By}
		}
	}
	keys := slices.Clone(m.Keys)
	slices.SortStableFunc(keys, func(x, y SnapshotEntry) int { return cmp.Compare(x.ReceivedBoot, y.ReceivedBoot) })
	isKept := func(s Selector) bool {
		return slices.ContainsFunc(m.Principals, func(p Principals) bool { return p.Selector == s })
	}
	for _, r := range keys {
		who := r.Claims.Principal()
		if who.IsZero() || isKept(r.Key.Selector) {
			continue
		}
		p := c.principalsLocked(r.Key.Selector)
		if who.Differs(p.current) {
			p.switchTo(who)
		}
		p.current = p.current.filled(who)
	}
}

// restoredAt returns the boot time in this boot of a boot time in m. That is no longer ago than it truly is, since only
// the time counts that the device was on. No wall clock matters.
func (c *Cache) restoredAt(m *Snapshot, t bootTime) bootTime {
	switch {
	case t == longAgo:
		return longAgo
	case m.BootID != "" && m.BootID == c.bootID:
		return t
	}
	at := t.add(-m.Boot)
	if m.On > 0 { // else a release that had no on-time kept it
		at = at.add(-max(0, c.on-m.On))
	}
	return at
}
