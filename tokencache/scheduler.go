package tokencache

import (
	"cmp"
	"slices"
	"time"
)

// runFrom runs the schedule once begin is closed; nil: at once.
func (c *Cache) runFrom(begin <-chan struct{}) {
	if begin != nil {
		select {
		case <-begin:
		case <-c.ctx.Done():
			return
		}
	}
	c.run()
}

// run is the schedule: it begins what is due, sleeps until the next moment that matters, and looks again whenever it is
// woken.
func (c *Cache) run() {
	for {
		c.mu.Lock()
		now := c.now()
		confirmed := c.confirmExpiriesLocked(now)
		next := c.tickLocked(now)
		c.mu.Unlock()
		if confirmed {
			c.clockConfirmed()
		}

		var fired <-chan time.Time
		stop := func() bool { return true }
		if next != never {
			fired, stop = c.clock.Timer(max(0, next.sub(now)))
		}
		select {
		case <-c.ctx.Done():
			stop()
			return
		case <-fired:
		case <-c.wake:
		case alive := <-c.pings:
			c.mu.Lock() // that the lock can be had is part of the answer
			close(alive)
			c.mu.Unlock()
		}
		stop()
	}
}

// maxTick bounds how late the schedule notices that the wall clock was moved.
const maxTick = 5 * time.Minute

// tickLocked forgets what expired, begins what is due, and returns when to look again.
func (c *Cache) tickLocked(now bootTime) bootTime {
	if c.reviewLocked(now) {
		c.rejudgeLocked(now)
	}
	c.reviewTombstonesLocked(now)
	for _, e := range c.entries {
		c.expireLocked(e, now)
	}
	for _, e := range c.allDueLocked(now) {
		c.dueLocked(e, now)
	}
	next := never
	for key, e := range c.entries {
		if e.token.Text.IsZero() && e.flight == nil && !e.wanted(now) {
			e.notify()
			delete(c.entries, key)
			continue
		}
		if !e.token.Text.IsZero() {
			next = min(next, e.token.deadline, now.add(maxTick))
		}
		if e.flight == nil {
			next = min(next, e.schedule.next)
		}
	}
	c.dispatchLocked(now)
	return min(next, c.queue.nextStart(now))
}

// allDueLocked returns the entries whose planned fetch is due, the longest due first. Many are due at one moment when a
// policy change has spread. Then keys are sorted by name, so that the same history makes the same calls.
func (c *Cache) allDueLocked(now bootTime) (due []*entry) {
	for _, e := range c.entries {
		if e.schedule.next <= now && e.flight == nil {
			due = append(due, e)
		}
	}
	slices.SortFunc(due, func(a, b *entry) int {
		return cmp.Or(cmp.Compare(a.schedule.next, b.schedule.next), a.key.compare(b.key))
	})
	return due
}

// expireLocked forgets a token that has expired by the boot clock. A token that has expired by the wall clock alone is
// kept, though not served, since the clock may be set right again. A newer one is fetched at once.
func (c *Cache) expireLocked(e *entry, now bootTime) {
	switch {
	case e.token.Text.IsZero():
	case now >= e.token.deadline:
		c.forgetLocked(e)
		e.notify()
	case e.backOff.failures == 0 && c.leftLocked(e, now) <= 0:
		due := max(now, c.overLocked(e, now).add(afterExpiry), c.barredUntilLocked(e, now))
		e.schedule.next = min(e.schedule.next, due)
	}
}

// dueLocked begins e's planned fetch, unless e is not asked for any more.
func (c *Cache) dueLocked(e *entry, now bootTime) {
	switch {
	case !e.wanted(now):
		e.schedule.next = never
	case e.schedule.probe:
		c.startFetchLocked(e, forProbe, now)
	default:
		c.startFetchLocked(e, forRefresh, now)
	}
}
