package tokencache

import (
	"slices"
	"time"
)

// PermissionState says whether a token carries the policy changes on record. Zero: there is no valid token.
type PermissionState string

const (
	Current   PermissionState = "current"   // issued after every change had reached new tokens; or no change is known
	Uncertain PermissionState = "uncertain" // it is not known
	Stale     PermissionState = "stale"     // issued before a change
)

// worse returns the one of s and o that promises less.
func (s PermissionState) worse(o PermissionState) PermissionState {
	if s == Stale || o == Current || o == "" {
		return s
	}
	return o
}

// Permissions is what is known of the permissions that a token carries. Times are by the device's clock.
type Permissions struct {
	State     PermissionState
	Changed   time.Time // the latest change that the token may lack; zero when current
	CurrentBy time.Time // a current token is here by then at the latest, if the back end answers; zero when current
	Likely    time.Time // and probably by then; zero when current, or not known
	Withheld  bool      // a revocation keeps the token from everybody
}

// verdictLocked returns whether e's token carries ch. First its receipt decides: a token received before a change does
// not carry it, whatever a clock says of its dates. Then its age in on-time decides: at least that much time has
// passed, so a token that was issued after the spreading by on-time truly was. Last the issuer's clock decides, if both
// the token and the change are dated by it.
func (c *Cache) verdictLocked(e *entry, ch *change) PermissionState {
	r, m, by := e.token.receipt, e.token.issued, ch.Issuer
	after := r.on > ch.Moment
	switch {
	case ch.Effect == Unknown && r.on < ch.Moment:
		return Uncertain
	case r.on < ch.Moment:
		return Stale
	case after && r.from > ch.By+c.propagationDelay:
		return Current
	case after && !by.Latest.IsZero() && m.Earliest.After(by.Latest.Add(c.propagationDelay)):
		return Current
	case ch.Effect == Unknown:
		return Uncertain
	case r.to < ch.Moment, !m.Latest.IsZero() && m.Latest.Before(by.Earliest):
		return Stale
	}
	return Uncertain
}

// touches reports whether ch is about e, including e's alternates.
func (ch *change) touches(e *entry) bool {
	if !ch.AllIdentities && ch.Selector != e.key.Selector {
		return false
	}
	return ch.Resource == "" || ch.canonical == e.canonical || e.anyName || slices.Contains(e.goesBy, ch.canonical)
}

// judgeLocked judges e's token by every change on record. The judgement holds until the token, the record, or what is
// known of their dates changes. Time alone does not change it.
func (c *Cache) judgeLocked(e *entry) {
	before := e.policy
	uncertainty := c.uncertaintyLocked(e)
	s := policyState{worst: Current, longestWait: longestWaitDelays*c.propagationDelay + postponedBeyond + uncertainty}
	j := judgement{
		about: make([]place, 0, len(e.judgement.about)),
		lacks: make([]place, 0, len(e.judgement.lacks)), stale: make([]bool, 0, len(e.judgement.lacks)),
	}
	for i, ch := range c.changes { // the earliest first
		if !ch.touches(e) {
			continue
		}
		j.about = append(j.about, place(i))
		at := c.at(ch)
		if at > s.spreadsUntil {
			s.began = at
		}
		holds := at.add(c.propagationDelay + postponedBeyond + uncertainty)
		if s.spreadsUntil = max(s.spreadsUntil, holds); s.spreadsUntil == holds {
			s.latest = ch
		}
		verdict := c.verdictLocked(e, ch)
		if verdict == Current {
			continue
		}
		j.lacks, j.stale = append(j.lacks, place(i)), append(j.stale, verdict == Stale)
		s.worst = s.worst.worse(verdict)
		s.unmet = max(s.unmet, holds)
		s.changed = ch
		if ch.Effect == Revoked {
			s.revoked, s.lacked = ch, s.unmet
		}
	}
	e.judgement = j
	if e.policy = s; s != before {
		e.notify()
	}
}

// place is the index of a change in Cache.changes.
type place int32

// judgement is whether an entry's token carries each change on record. It is replaced and never changed, so that it can
// be read without the lock.
type judgement struct {
	about []place // the changes that are about the key, in their order
	lacks []place // of these, those that the token is not known to carry
	stale []bool  // of each of these, whether it is known not to carry it
}

// uncertaintyLocked returns the uncertainty of e's issue window. If e never had a token, it is that of the other keys,
// since they share the back end.
func (c *Cache) uncertaintyLocked(e *entry) (uncertainty time.Duration) {
	if e.token.life != 0 {
		return e.token.issued.uncertainty()
	}
	for _, o := range c.entries {
		uncertainty = max(uncertainty, o.token.issued.uncertainty())
	}
	return uncertainty
}

// tighter is how much earlier a bound on when a change happened has to be to replace the one on record. In all a bound
// moves by one token's life, so the record changes a few times for it, and not at each of many restarts.
const tighter = 4 * time.Hour

// boundIssuerLocked finds out, after an answer, whether what the back end has handed out shows that e's token was
// issued after a change, if nothing counts its life and no clock is known to be right. A token that was still handed
// out had not expired. So the issuer's clock had not passed its expiry when the change happened. That bound goes on
// record, since what is handed out in a later boot shows less: nobody knows how long the device was off.
func (c *Cache) boundIssuerLocked(e *entry, now bootTime) {
	learnt, blind := false, !c.issuerClock.skewKnown && !c.clockTrusted()
	for _, i := range e.judgement.lacks {
		ch := c.changes[i]
		latest, known := c.issuerClock.notLater(c.at(ch))
		if !known {
			continue
		}
		if blind && (ch.NotLater.IsZero() || latest.Before(ch.NotLater.Add(-tighter))) {
			ch.NotLater, learnt = latest, true
		}
		if !ch.NotLater.IsZero() && ch.NotLater.Before(latest) {
			latest = ch.NotLater
		}
		if e.token.receipt.on > ch.Moment && e.token.issued.Earliest.After(latest.Add(c.propagationDelay)) {
			ch.Issuer.Latest, learnt = latest, true
		}
	}
	if learnt {
		c.generation++
		c.rejudgeLocked(now)
	}
}

// rejudgeLocked judges every token again after the record of changes differs, and plans again what that affects.
func (c *Cache) rejudgeLocked(now bootTime) {
	for _, e := range c.entries {
		before := e.policy
		c.judgeLocked(e)
		if e.policy == before {
			continue
		}
		c.standDownLocked(e, now)
		planned := e.schedule.next
		if planned == never {
			continue
		}
		c.planLocked(e, now)
		if e.policy.worst == before.worst && now >= c.spreadsUntilLocked(e, now) && e.schedule.next > planned {
			if e.schedule.putOff { // else changes that follow each other would do so for ever
				e.schedule.next = planned
			}
			e.schedule.putOff = true
		}
	}
	c.wakeSchedule()
}

// standDownLocked takes e's fetch out of the queue if a policy change began to spread since it was queued, as during a
// pause. A fetch stays that somebody insists on, or that a caller waits for and would get.
func (c *Cache) standDownLocked(e *entry, now bootTime) {
	f := e.flight
	if f == nil || f.started || f.insisted || !c.postponedLocked(e, now) {
		return
	}
	if f.priority == forCaller && !c.barredLocked(e, now) {
		return
	}
	c.queue.remove(f)
	e.flight = nil
	f.outcome, f.err = Held, &PostponedError{For: c.postponedUntilLocked(e, now).sub(now)}
	close(f.done)
}

// policyState is what all changes about an entry come to for its token.
type policyState struct {
	worst        PermissionState
	changed      *change  // the latest not met
	revoked      *change  // the latest revocation not met; nil: nothing is withheld
	latest       *change  // of all
	spreadsUntil bootTime // boot time until which changes are spreading
	began        bootTime // and since when they are without a break
	unmet        bootTime // until when the latest change is spreading that is not met
	lacked       bootTime // and the latest revocation

	longestWait time.Duration // how long the back end is left alone at most
}

// longestWaitDelays is for how many propagation delays nothing is fetched at most, while policy changes follow each
// other.
const longestWaitDelays = 3

// withheld reports whether a revocation withholds the token.
func (s policyState) withheld() bool { return s.revoked != nil }

// permissionsLocked returns e's Permissions.
func (c *Cache) permissionsLocked(e *entry, now bootTime) Permissions {
	s := e.policy
	if s.worst == Current {
		return Permissions{State: Current}
	}
	wall := c.clock.Wall()
	p := Permissions{State: s.worst, Changed: s.changed.At, Withheld: s.withheld()}
	by := c.metByLocked(e, s.unmet)
	p.CurrentBy = wall.Add(by.sub(now))
	if at := c.likelyLocked(e, now); at != never {
		p.Likely = wall.Add(min(at, by).sub(now))
	}
	return p
}

// withheldLocked returns the error for callers while a revocation withholds e's token.
func (c *Cache) withheldLocked(e *entry, now bootTime) *WithheldError {
	s, wall := e.policy, c.clock.Wall()
	err := &WithheldError{
		Permissions: c.permissionsLocked(e, now), Revoked: s.revoked.At,
		Until: wall.Add(c.metByLocked(e, s.lacked).sub(now)),
	}
	if spread := c.barredUntilLocked(e, now).sub(now); spread > 0 && c.leftLocked(e, now) <= 0 {
		err.Spread = wall.Add(spread)
	}
	return err
}

// metByLocked returns the boot time by which a token is here at the latest that carries the changes which have spread
// by unmet. A fetch after a change has spread shows which token the back end holds: then it is that token's expiry.
// Before that fetch it is a whole life after the spreading, since the back end may issue a token until then.
//
// If nothing shows a token's age, neither the back end's counting nor a clock that is known to be right, the next token
// need not be known to be current. Then only a token that is still handed out a whole life after the spreading is.
func (c *Cache) metByLocked(e *entry, unmet bootTime) bootTime {
	if !c.issuerClock.skewKnown && !c.clockTrusted() {
		return unmet.add(longestNominal + shownBy)
	}
	life := max(e.token.life, defaultNominal)
	known := unmet // a token issued later is known to be current
	if e.token.life != 0 && e.token.issued.undated() {
		// The next token may have no longer a life than this one had left. How long ago that was is a guess after a
		// boot.
		known = known.add(max(0, longestNominal-min(e.token.life, e.token.deadline.sub(e.token.received))))
	}
	if e.token.shown < known || e.token.deadline == longAgo {
		return known.add(life)
	}
	return e.token.deadline.add(afterExpiry)
}

// shownBy is how long it takes at most until a probe asks the back end again, and how long after its expiry the back
// end may hand out a token.
const shownBy = 2 * time.Hour
