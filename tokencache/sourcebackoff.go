package tokencache

import "time"

const (
	sourceBackOffTop = 2 * time.Minute // for an endpoint that cannot be reached: one call finds out for all keys

	askFirst       = 2 * time.Second  // wait of callers after a miss that failed; it doubles with each
	askTop         = 5 * time.Minute  // up to this
	askLongTop     = 20 * time.Minute // or this, where only an administrator heals it
	askSourceTop   = 5 * time.Second  // or this, where one call finds out for all keys
	askThrottleTop = 30 * time.Second // or this, where each call counts against the device
)

const (
	// callersFirst is for how long the first call is left to a caller that was turned away. It comes again within 10 s.
	callersFirst = 11 * time.Second
	// restOver is how long after its last failure a source that only refuses counts as well.
	restOver = 2 * backoffTop
)

// sourceBackOff is how a source that throttles, or cannot be reached, is left alone as a whole. Meanwhile there is one
// call at a time: it finds out for all keys whether the source is well again. A token shows that. A refusal does not,
// since an endpoint may refuse one call and throttle the next: if each refusal made all keys ask again, it would
// throttle for ever.
type sourceBackOff struct {
	failures   int         // in a row; 0: the source is well
	failure    *FetchError // the last of them
	since      bootTime    // when that came
	until      bootTime    // the schedule makes no call before
	callers    bootTime    // callers cause no call before, which is no later than until
	turnedAway bool        // a caller was turned away, whose key does not yield, and none has had a call since
}

// failed takes in a failure of the source as a whole, by a call that began at began.
func (r *sourceBackOff) failed(failure *FetchError, began, now bootTime, roll float64) {
	if r.failures == 0 || began >= r.since { // else another call at the same time has shown it already
		r.failures++
	}
	r.failure, r.since, r.turnedAway = failure, now, false
	wait := backoff(r.failures, noToken, roll)
	if failure.Kind != Throttled {
		wait = min(wait, sourceBackOffTop)
	}
	atLeast := min(failure.RetryAfter, retryAfter)
	r.callers = now.add(max(askWait(failure, r.failures, noToken), atLeast))
	r.until = max(r.callers, now.add(wait))
}

// endWaitsLocked lets the next call begin at once, unless the source asked for a pause.
func (c *Cache) endWaitsLocked(now bootTime) {
	r := &c.queue.backOff
	r.until, r.callers, r.turnedAway = min(r.until, now), min(r.callers, now), false
	c.queue.quarantine = min(c.queue.quarantine, now)
}

// sourceAnsweredLocked takes in what a finished call shows of the source and of the identity, whatever became of its
// key.
func (c *Cache) sourceAnsweredLocked(f *flight, now bootTime, failure *FetchError) {
	extent := OfKey
	if failure != nil {
		extent = failure.extent()
	}
	c.queue.ended(f, extent != OfIdentity)
	if failure == nil {
		c.queue.given++
	}
	switch {
	case extent == OfSource:
		if failure.Kind == Throttled {
			c.queue.paused = max(c.queue.paused, now.add(min(failure.RetryAfter, retryAfter)))
		}
		c.queue.backOff.failed(failure, f.startedAt, now, c.roll())
		c.turnAwayLocked(now)
	case extent == OfKey && c.queue.backOff.endedBy(f, failure, now):
		c.queue.backOff = sourceBackOff{}
		c.retrySourceFailuresLocked(now)
	}
}

// endedBy reports whether the answer to f shows that the source is well again.
func (r *sourceBackOff) endedBy(f *flight, failure *FetchError, now bootTime) bool {
	return r.failures > 0 && f.startedAt >= r.since && (failure == nil || now.sub(r.since) > restOver)
}

// turnAwayLocked answers the callers whose call has not begun with what was just learned about the source, so that they
// do not wait for it. Refreshes and probes stay queued.
func (c *Cache) turnAwayLocked(now bootTime) {
	var stay []*flight
	for _, f := range c.queue.waiting {
		e := c.entries[f.key]
		failure := c.pauseLocked(now)
		if f.priority != forCaller || e == nil || failure == nil {
			stay = append(stay, f)
			continue
		}
		e.flight = nil
		c.queue.backOff.turnedAway = c.queue.backOff.turnedAway || !f.yields
		f.outcome, f.err = Failed, failure
		close(f.done)
	}
	c.queue.waiting = stay
}

// pauseLocked returns why callers may not call the source now, or nil.
func (c *Cache) pauseLocked(now bootTime) *FetchError {
	if failure := c.askedPauseLocked(now); failure != nil {
		return failure
	}
	if r := c.queue.backOff; r.failures > 0 && now < r.callers {
		return r.failure.withRetryAfter(r.callers.sub(now))
	}
	return nil
}

// askedPauseLocked returns the pause that the back end asked for, if it is not over, or nil.
func (c *Cache) askedPauseLocked(now bootTime) *FetchError {
	pause := c.queue.paused.sub(now)
	switch r := c.queue.backOff; {
	case pause <= 0:
		return nil
	case r.failures > 0 && r.failure.Kind == Throttled:
		return r.failure.withRetryAfter(pause)
	default:
		return &FetchError{Kind: Throttled, RetryAfter: pause, Detail: "the back end asked for a pause in all calls"}
	}
}

// nextLocked returns when the schedule fetches e, which is not before the source may be called; never: it does not.
func (c *Cache) nextLocked(e *entry, now bootTime) bootTime {
	if e.schedule.next == never {
		return never
	}
	source := c.queue.backOff.earliest(&flight{priority: forRefresh, expires: e.token.deadline}, now)
	return max(now, e.schedule.next, c.quarantinedUntilLocked(e), c.queue.paused, source)
}

// retrySourceFailuresLocked plans fetches for all keys that failed because the source did, after their own waits.
func (c *Cache) retrySourceFailuresLocked(now bootTime) {
	for _, e := range c.entries {
		if e.backOff.failures > 0 && e.backOff.failure.extent() == OfSource {
			c.resumeLocked(e, max(now, e.backOff.until), now)
		}
	}
}

// TryAgain ends every wait that follows failures, as after somebody changed what may have caused them. A pause that the
// source asked for stays.
func (c *Cache) TryAgain() {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.now()
	c.endWaitsLocked(now)
	for _, e := range c.entries {
		if e.backOff.failures > 0 {
			e.backOff.waits, e.backOff.asks, e.backOff.quarantines = 0, 0, 0
			c.retryNowLocked(e, now)
		}
	}
	c.wakeSchedule()
}

// retryNowLocked plans a fetch at once for a key that failed.
func (c *Cache) retryNowLocked(e *entry, now bootTime) {
	e.backOff.until, e.backOff.callers = longAgo, longAgo
	c.resumeLocked(e, now, now)
}

// resumeLocked plans the fetch of a key that failed for at, if it is not planned for sooner.
func (c *Cache) resumeLocked(e *entry, at, now bootTime) {
	if e.schedule.next == never || e.flight != nil {
		return
	}
	e.schedule.next = max(min(e.schedule.next, at), c.postponedUntilLocked(e, now))
}
