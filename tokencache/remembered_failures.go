package tokencache

import "time"

// BackOff is what is remembered of failures in a row: of one key, or of the source as a whole. So that a daemon that crashes
// again and again asks no more often than one that does not. Durations are boot times.
type BackOff struct {
	Kind     Kind
	Extent   Extent
	Detail   string
	Failures int
	Waits    int           // of the schedule, each longer than the one before; of a key
	Asks     int           // fetches that callers waited for and that failed; of a key
	Until    time.Duration // the schedule makes no call before
	Callers  time.Duration // and nobody does before for a caller
}

func failingOf(f *FetchError, failures int, until, callers time.Duration) *BackOff {
	if failures == 0 {
		return nil
	}
	return &BackOff{Kind: f.Kind, Extent: f.Extent, Detail: f.Detail, Failures: failures, Until: until, Callers: callers}
}

// failing tells of e's failures, nil without any.
func (e *entry) failing() *BackOff {
	f := failingOf(e.failure, e.failures, e.rests, e.failedUntil)
	if f != nil {
		f.Waits, f.Asks = e.waits, e.asks
	}
	return f
}

// failing tells of the source's failures, nil without any.
func (r *rest) failing() *BackOff { return failingOf(r.failure, r.failures, r.until, r.callers) }

func (f *BackOff) failure() *FetchError {
	return &FetchError{Kind: f.Kind, Extent: f.Extent, Detail: f.Detail}
}

// recallRest goes on leaving the source alone. However long the absence seems, no wait is longer than any that there is.
func (c *Cache) recallRest(m *Memory, a absence, now time.Duration) {
	if m.Paused != 0 {
		c.gate.paused = min(a.at(m.Paused), now+retryAfter)
	}
	if f := m.Failing; f != nil {
		c.gate.rest = rest{
			failures: f.Failures, failure: f.failure(), since: now,
			until: min(a.at(f.Until), now+backoffTop), callers: min(a.at(f.Callers), now+retryAfter),
		}
	}
}

// recallFailing goes on leaving a key alone.
func (c *Cache) recallFailing(e *entry, f *BackOff, a absence, now time.Duration) {
	if f == nil {
		return
	}
	e.failure, e.failures, e.waits, e.asks = f.failure(), f.Failures, f.Waits, f.Asks
	schedule, callers := backoffTop, max(askTop, retryAfter)
	if e.failure.lasts() || e.failure.Kind == Throttled {
		schedule, callers = longTop, askLongTop
	}
	e.rests, e.failedUntil = min(a.at(f.Until), now+schedule), min(a.at(f.Callers), now+callers)
	if e.next != never {
		e.next = max(e.next, e.rests)
	}
}

// recallFailed makes an entry of a key of which nothing is remembered but that it failed.
func (c *Cache) recallFailed(r Remembered, a absence, now time.Duration) {
	e := c.addLocked(r.Key)
	c.uses++
	e.used, e.asked = c.uses, a.at(r.lastAsked())
	if r.Next != never { // it is to be prefetched, until Prefetch says otherwise
		e.prefetch, e.next = true, max(now, c.heldUntilLocked(e, now))
	}
	c.recallFailing(e, r.Failing, a, now)
}
