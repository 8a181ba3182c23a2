package tokencache

import (
	"cmp"
	"maps"
	"slices"
	"time"
)

const (
	maxFormer = 8 // former principals remembered of one selector

	// confirmWithin is within how long the selector's other keys are fetched again after a switch was seen at one.
	confirmWithin = 5 * time.Minute

	// returnAfter is how far apart two fetches must be to bring back a former principal.
	returnAfter = 10 * time.Minute

	// warnEvery is how often a selector's switches are reported at most.
	warnEvery = time.Hour
)

// principals is who the tokens of one selector speak for, and spoke for before. Another principal comes when an
// identity is made again under its name, a device is onboarded again, or a disk is moved. Replicas that lag go on
// giving the former one's tokens.
type principals struct {
	current    Principal
	former     []Principal // at most maxFormer, the latest last
	since      bootTime    // when the switch to current was seen; longAgo: there was none
	shown      bootTime    // when a token of current was given last
	reported   bootTime    // when a switch was reported last; longAgo: never
	unreported int         // switches since then
	returnedBy Key         // the key at which the back end insisted on current, a former principal; else zero
}

// Switch says that the tokens of a selector speak for another principal than before.
type Switch struct {
	From, To Principal
	Untold   int // switches of this selector since the last one that was reported
}

// claim is a former principal's claim to be the current one again: a key was given its token.
type claim struct {
	by   Principal
	from bootTime // void if it is before a token of the current principal was shown
}

// principalsLocked returns a selector's principals, and makes an entry if there is none. Of too many selectors, it
// drops the one whose tokens were seen least recently.
func (c *Cache) principalsLocked(of Selector) *principals {
	if p := c.principals[of]; p != nil {
		return p
	}
	if len(c.principals) >= MaxKeys {
		var oldest Selector
		var least *principals
		for s, p := range c.principals {
			byName := Key{Selector: s}.compare(Key{Selector: oldest})
			if least == nil || cmp.Or(cmp.Compare(p.shown, least.shown), byName) < 0 {
				oldest, least = s, p
			}
		}
		delete(c.principals, oldest)
	}
	p := &principals{since: longAgo, shown: longAgo, reported: longAgo}
	c.principals[of] = p
	return p
}

// isFormer reports whether who is a former principal.
func (p *principals) isFormer(who Principal) bool {
	return slices.ContainsFunc(p.former, func(f Principal) bool { return !f.Differs(who) })
}

// admitLocked decides whether a fetched token, which has left to live, may replace the one that e holds, if that is
// another principal's or is not there. It updates the selector's principals, and returns the switch if it is to be
// reported.
//
// A principal that was never seen becomes the current one, whatever the dates. A former principal's token comes from a
// replica that lags, unless it was issued since the switch, or the back end insists. A simulated token is worth
// nothing: it gives way to a real one at once and for good, and replaces none.
func (c *Cache) admitLocked(
	e *entry, f Fetched, left, held time.Duration, now bootTime,
) (admitted bool, reported *Switch) {
	who, p := f.Token.Claims.Principal(), c.principalsLocked(e.key.Selector)
	if !who.Simulated && (p.current.Simulated || e.token.lastClaims.Simulated()) {
		c.dropSimulatedLocked(e, p, now)
	}
	switch {
	case who.Simulated && (!p.current.IsZero() && !p.current.Simulated || held > 0 && !e.token.lastClaims.Simulated()):
		return held <= 0 || e.token.lastClaims.Simulated(), nil
	case !who.Differs(p.current):
		if !who.IsZero() {
			p.current, p.shown, e.claim = p.current.filled(who), now, claim{}
		}
		return true, nil
	case !p.isFormer(who), c.issuedSinceLocked(e, f, left, now, p.since):
		return true, c.switchLocked(e, p, who, now)
	case c.insistsLocked(e, who, now):
		reported = c.switchLocked(e, p, who, now)
		p.returnedBy = e.key
		return true, reported
	}
	before := e.token.lastClaims
	return held <= 0 || !who.Differs(before.Principal()) || before.Simulated() && !who.Simulated, nil
}

// dropSimulatedLocked forgets the simulated principals of e's selector, since e was given a real token. The back end
// has become a real one. So every key with a simulated token is fetched at once, also while policy changes spread,
// since its token is worth nothing.
func (c *Cache) dropSimulatedLocked(e *entry, p *principals, now bootTime) {
	p.former = slices.DeleteFunc(p.former, func(f Principal) bool { return f.Simulated })
	if p.current.Simulated {
		p.current, p.since, p.returnedBy, e.claim = Principal{}, longAgo, Key{}, claim{}
	}
	for _, o := range c.entries {
		if o == e || o.token.Text.IsZero() || !o.token.lastClaims.Simulated() {
			continue
		}
		o.schedule.confirm = now
		if o.schedule.next != never && o.flight == nil && o.backOff.failures == 0 {
			o.schedule.next, o.schedule.probe = now, false
		}
	}
}

// issuedSinceLocked reports whether a token fetched for e, which has left to live, was certainly issued after that boot
// time. If the back end counted its life, the boot clock shows it; else the wall clock must be known to be right.
func (c *Cache) issuedSinceLocked(e *entry, f Fetched, left time.Duration, now, since bootTime) bool {
	if !f.Counted && !c.clockTrusted() {
		return false
	}
	if r, known := c.tombstoneLocked(e, f.Token.Text); known && r.received <= since {
		return false
	}
	longest := f.Token.ExpiresOn.Sub(issueWindowOf(f.Token, left, f.Counted || c.clockTrusted()).Earliest)
	earliest := now.add(left - longest)
	return since < earliest && earliest <= now
}

// insistsLocked reports whether the back end insists on a former principal: two fetches of e, far enough apart, gave
// its tokens, and since the first one no key of the selector was given the current principal's. While another key holds
// a token of the current principal, the answer for e may be the back end's cached copy. Then such a key is asked first.
func (c *Cache) insistsLocked(e *entry, who Principal, now bootTime) bool {
	p := c.principals[e.key.Selector]
	if e.claim.by.IsZero() || e.claim.by.Differs(who) || e.claim.from <= p.shown {
		e.claim = claim{by: who, from: now}
		return false
	}
	if now.sub(e.claim.from) < returnAfter {
		return false
	}
	if e.token.lastClaims.Principal().Differs(who) {
		return true
	}
	witness := c.witnessLocked(e.key.Selector, p.current, now)
	if witness != nil {
		c.askSoonLocked(witness, now)
	}
	return witness == nil
}

// witnessLocked returns the key of a selector that holds a token of who's. Of several it is the one answered longest
// ago.
func (c *Cache) witnessLocked(of Selector, who Principal, now bootTime) (witness *entry) {
	for _, o := range c.entries {
		if o.key.Selector != of || c.leftLocked(o, now) <= 0 || !o.token.speaksFor(who) {
			continue
		}
		if witness == nil || cmp.Or(cmp.Compare(o.last.answered, witness.last.answered),
			cmp.Compare(o.key.Resource, witness.key.Resource)) < 0 {
			witness = o
		}
	}
	return witness
}

// askSoonLocked plans a fetch of e within minutes, if the schedule works for e. If the selector's principals alternate
// without end, it waits longer each time.
func (c *Cache) askSoonLocked(e *entry, now bootTime) {
	e.schedule.confirm = now.add(time.Duration(c.roll() * float64(confirmWithin)))
	if untold := c.principalsLocked(e.key.Selector).unreported; untold > 0 {
		e.schedule.confirm = max(e.schedule.confirm, e.last.answered.add(doubled(confirmWithin, untold+1, warnEvery)))
	}
	idle := e.flight == nil && e.backOff.failures == 0
	if e.schedule.next != never && idle && e.schedule.confirm >= c.postponedUntilLocked(e, now) {
		e.schedule.next, e.schedule.probe = min(e.schedule.next, e.schedule.confirm), false
	}
}

// switchLocked makes who, whose token e was given, the current principal, and plans to confirm the selector's other
// keys. It returns the switch if it is to be reported.
func (c *Cache) switchLocked(e *entry, p *principals, who Principal, now bootTime) *Switch {
	s := &Switch{From: p.current, To: who}
	p.switchTo(who)
	p.since, p.shown, p.returnedBy = now, now, Key{}
	e.claim = claim{}
	again := now.sub(p.reported) < warnEvery
	if again {
		p.unreported++
	}
	for _, o := range slices.SortedFunc(maps.Values(c.entries), func(x, y *entry) int { return x.key.compare(y.key) }) {
		if o.key.Selector == e.key.Selector && o != e && !o.token.Text.IsZero() && !o.token.speaksFor(who) {
			c.askSoonLocked(o, now)
		}
	}
	if again {
		return nil
	}
	s.Untold = p.unreported
	p.reported, p.unreported = now, 0
	return s
}

// switchTo makes who the current principal, and the current one a former one.
func (p *principals) switchTo(who Principal) {
	p.former = slices.DeleteFunc(p.former, func(f Principal) bool { return !f.Differs(who) })
	p.former = append(p.former, p.current)
	p.former = p.former[max(0, len(p.former)-maxFormer):]
	p.current = who
}

// confirmLocked returns when e is to be fetched again because it is open whom its token speaks for: to see whether the
// back end insists on a former principal; whether lagging replicas brought one back; or whether there is a token of the
// current principal by now.
func (c *Cache) confirmLocked(e *entry, now bootTime) bootTime {
	p := c.principalsLocked(e.key.Selector)
	switch {
	case !e.claim.by.IsZero() && e.claim.from > p.shown && now.sub(e.claim.from) < returnAfter:
		return e.claim.from.add(returnAfter)
	case p.returnedBy == e.key && now.sub(p.since) < watchStep:
		return p.since.add(watchStep)
	case c.formerLocked(e):
		return now.add(jitter(watchStep, c.roll()))
	}
	return never
}

// formerLocked reports whether e's token is another principal's than its selector's current one.
func (c *Cache) formerLocked(e *entry) bool {
	p := c.principals[e.key.Selector]
	return p != nil && e.token.lastClaims.Principal().Differs(p.current)
}

// forgetRolloversLocked forgets e's rollovers, which were those of another principal's tokens.
func (c *Cache) forgetRolloversLocked(e *entry) {
	e.rollovers, e.token.before = nil, nil
	c.rollovers = slices.DeleteFunc(c.rollovers, func(r rollover) bool { return r.of == e.key })
	c.learnedVersion++
}

// Principals is who the tokens of a selector speak for, as it is kept. Durations are boot times.
type Principals struct {
	Selector Selector       `json:"selector"`
	Current  Principal      `json:"current"`
	Former   []Principal    `json:"former,omitempty"`   // the latest last
	Since    *time.Duration `json:"since_ns,omitempty"` // when the switch to Current was seen; nil: there was none
	Shown    *time.Duration `json:"shown_ns,omitempty"` // when a token of Current was given last; nil: not known
	Told     *time.Duration `json:"told_ns,omitempty"`  // when a switch was reported last; nil: none was
	Untold   int            `json:"untold,omitempty"`   // switches since then
	// By is the resource at whose key the back end insisted on Current, a former principal; empty: it did not.
	By string `json:"by,omitempty"`
}

// UnmarshalJSON refuses principals without a selector, which would else be the system-assigned identity's.
func (p *Principals) UnmarshalJSON(text []byte) error {
	type fields Principals
	doc := struct {
		*fields
		Selector *Selector `json:"selector"`
	}{fields: (*fields)(p)}
	if err := unmarshalKnown(text, &doc); err != nil {
		return err
	}
	if doc.Selector == nil {
		return errSelectorMissing
	}
	p.Selector = *doc.Selector
	return nil
}

// Claim is a former principal's claim to be the current one again: a key was given its token, and no key of the
// selector was given the current one's since.
type Claim struct {
	By   Principal     `json:"by"`
	From time.Duration `json:"from_ns"` // boot time
}

// Principals returns who the tokens of each selector speak for, as far as they say.
func (c *Cache) Principals() []Principals {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.exportPrincipalsLocked()
}

// exportPrincipalsLocked returns the principals as they are kept.
func (c *Cache) exportPrincipalsLocked() []Principals {
	var all []Principals
	for s, p := range c.principals {
		if !p.current.IsZero() {
			all = append(all, Principals{
				Selector: s, Current: p.current, Former: slices.Clone(p.former),
				Since: unless(longAgo, p.since), Shown: unless(longAgo, p.shown),
				Told: unless(longAgo, p.reported), Untold: p.unreported, By: p.returnedBy.Resource,
			})
		}
	}
	slices.SortFunc(all, func(x, y Principals) int {
		return Key{Selector: x.Selector}.compare(Key{Selector: y.Selector})
	})
	return all
}

// WithoutSimulated returns m without the tokens of a simulated back end, what was learnt from them and whom they speak
// for. It also returns how many keys had such a token.
func (m *Snapshot) WithoutSimulated() (left *Snapshot, dropped int) {
	real := *m
	simulated := make(map[Key]bool)
	real.Keys = slices.DeleteFunc(slices.Clone(m.Keys), func(r SnapshotEntry) bool {
		simulated[r.Key] = r.Claims.Simulated() || r.Token.Claims.Simulated()
		if simulated[r.Key] && !r.Token.Text.IsZero() {
			dropped++
		}
		return simulated[r.Key]
	})
	for i := range real.Keys {
		if of := real.Keys[i].Claim; of != nil && of.By.Simulated {
			real.Keys[i].Claim = nil
		}
	}
	real.Rollovers = slices.DeleteFunc(slices.Clone(m.Rollovers), func(r Rollover) bool { return simulated[r.Key] })
	real.Principals = nil
	for _, p := range m.Principals {
		p.Former = slices.DeleteFunc(slices.Clone(p.Former), func(f Principal) bool { return f.Simulated })
		if !p.Current.Simulated {
			real.Principals = append(real.Principals, p)
		}
	}
	return &real, dropped
}
