package tokencache

import "time"

const (
	testBefore = 2 * time.Minute  // a moment at which the back end may roll over is asked this long before
	testAfter  = 5 * time.Second  // and this long after: tokens' times are whole seconds
	nearEnough = 90 * time.Minute // a call so shortly before one that shows more is not worth it
	seldomStep = 4 * time.Hour    // nor is one that comes sooner than this after the last, when the rollover is known
)

// planLocked decides when the schedule fetches e's token next: after an answer, and when the policy changes on record
// differ. While a call is under way, and after a failure, that is decided elsewhere. But here a next try is put off
// that would come while a change spreads, and so is the first fetch of a key without a token.
func (c *Cache) planLocked(e *entry, now bootTime) {
	switch {
	case e.flight != nil:
		return
	case e.backOff.failures > 0:
		e.schedule.next = max(e.schedule.next, c.postponedUntilLocked(e, now))
		return
	case e.token.Text.IsZero():
		if e.schedule.next != never {
			e.schedule.next = max(now, c.postponedUntilLocked(e, now))
		}
		return
	}
	e.schedule.probe = e.schedule.tries > 0 || e.policy.worst != Current
	switch last := e.token.deadline.add(-lastMinutes); {
	case c.postponedLocked(e, now):
		e.schedule.next = c.postponedUntilLocked(e, now)
	case now < c.spreadsUntilLocked(e, now) && now < last:
		e.schedule.next = last // the token expires before the change has spread: as late as is safe
	case e.policy.worst == Current:
		e.schedule.next = c.ordinaryLocked(e, now)
	default:
		e.schedule.next = c.nextProbeLocked(e, now)
	}
	e.schedule.next = max(min(e.schedule.next, e.token.deadline.add(afterExpiry)), c.barredUntilLocked(e, now))
	if at := max(now, e.schedule.confirm); at >= c.postponedUntilLocked(e, now) {
		e.schedule.next = min(e.schedule.next, at)
	}
}

// expediteLocked plans e's next fetch again, if one is planned, and never for later than it was.
func (c *Cache) expediteLocked(e *entry, now bootTime) {
	before := e.schedule.next
	if before == never {
		return
	}
	c.planLocked(e, now)
	e.schedule.next = min(e.schedule.next, before)
}

// ordinaryLocked returns when a current token is refreshed. A known rollover saves calls; a rollover that is nearly
// known is tested.
func (c *Cache) ordinaryLocked(e *entry, now bootTime) bootTime {
	left := e.token.deadline.sub(now)
	step := now.add(nextTry(left, c.roll()))
	switch {
	case e.schedule.tries == 0 && e.schedule.advised > now:
		return e.schedule.advised
	case e.schedule.tries == 0:
		step = now.add(firstRefresh(left, 0, c.roll()))
	}
	if e.token.life < shortLived {
		return step
	}
	if e.schedule.tries == 0 && c.learnedPatternLocked(e).kind == Irregular {
		// If the back end has rolled over and was not asked since, then the token after a policy change is issued after
		// the change. So a refresh at half life is left out if it seldom brings anything.
		return now.add(jitter(left*3/4, c.roll()))
	}
	if at := c.rolloverLocked(e); at > now {
		if step.sub(now) < seldomStep || step > at.add(-nearEnough) {
			return at.add(testAfter)
		}
		return step
	}
	for _, test := range c.testsLocked(e) {
		if at := e.token.issuedAt.add(test); now < at && step > at.add(-nearEnough) {
			return at
		}
	}
	return step
}

// testsLocked returns the ages of the token at which a call shows most about when it rolls over, while that is not
// known: just before and after half of its life, where a rollover is likely; else in the middle of where it may be.
// There are none for a back end that gives another token at each call.
func (c *Cache) testsLocked(e *entry) []time.Duration {
	p := c.learnedPatternLocked(e)
	age := func(share float64) time.Duration { return time.Duration(share * float64(e.token.life)) }
	switch {
	case p.kind != Unlearnt || p.seen == 0:
		return nil
	case p.common.contains(0.5):
		return []time.Duration{age(0.5) - testBefore, age(0.5) + testAfter}
	case p.common.contains(1):
		return nil // the schedule closes in on the expiry by itself
	case p.eager:
		return nil
	}
	return []time.Duration{age((p.common.after + p.common.by) / 2), age(p.common.by) + testAfter}
}

// nextProbeLocked returns when the back end is probed for a newer token, since e's is not current: first as soon as the
// change has spread, then by what is known of the rollover.
func (c *Cache) nextProbeLocked(e *entry, now bootTime) bootTime {
	if e.last.answered < e.policy.unmet {
		return max(now, min(e.policy.unmet, e.spreadsUntil()))
	}
	e.schedule.probedSince = min(e.schedule.probedSince, now)
	left := e.token.deadline.sub(now)
	if at := c.rolloverLocked(e); at > now {
		if at.sub(now) <= nearEnough {
			return at.add(testAfter)
		}
		return now.add(jitter(watchStep, c.roll()))
	}
	p := c.learnedPatternLocked(e)
	step := now.add(probeInterval(left, c.roll()))
	if opens := e.token.issuedAt.add(time.Duration(c.rollovers.earliest() * float64(e.token.life))); now < opens {
		step = min(now.add(jitter(2*watchStep, c.roll())), opens)
	}
	if half := e.token.issuedAt.add(e.token.life/2 + testAfter); p.kind == Unlearnt && now < half {
		step = min(step, half)
	}
	return step
}
