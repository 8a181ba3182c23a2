package tokencache

import "time"

// Clock is how a cache tells the time. Deadlines run on Boot, which no person and no NTP step moves;
// Wall only translates to and from the times that the back end and people speak of.
type Clock struct {
	// Wall returns the wall clock's time, right or wrong.
	Wall func() time.Time
	// Boot returns the time since the device booted, suspended time included.
	Boot func() time.Duration
	// Synchronised reports whether the wall clock is known to be right.
	Synchronised func() bool
	// Timer returns a channel that is sent to or closed once, after d of Boot, and a function that
	// frees the timer; stop may be called at any time and more than once.
	Timer func(d time.Duration) (fired <-chan time.Time, stop func() bool)
}

// OrRuntime fills the zero fields of c from Go's own clock, which stands still while the machine
// is suspended: right for tests in a synctest bubble, and where nothing better is at hand.
func (c Clock) OrRuntime() Clock {
	if c.Wall == nil {
		c.Wall = func() time.Time { return time.Now().Round(0) }
	}
	if c.Boot == nil {
		start := time.Now()
		c.Boot = func() time.Duration { return time.Since(start) }
	}
	if c.Synchronised == nil {
		c.Synchronised = func() bool { return true }
	}
	if c.Timer == nil {
		c.Timer = func(d time.Duration) (<-chan time.Time, func() bool) {
			t := time.NewTimer(d)
			return t.C, t.Stop
		}
	}
	return c
}

// clockTrusted reports whether the wall clock is known to be right. The lock is held, or nobody else has c yet.
func (c *Cache) clockTrusted() bool { return c.clock.Synchronised() }

// overLocked returns the boot time at which the life was over of the token that e held last, or will be; longAgo without one.
func (c *Cache) overLocked(e *entry, now time.Duration) time.Duration {
	if e.token.Text.IsZero() {
		return e.token.deadline
	}
	return now + c.leftLocked(e, now)
}

// leftLocked returns the life that e's token has left: by boot time, and by the wall clock too where
// that is known to be right. Expired if either says so.
func (c *Cache) leftLocked(e *entry, now time.Duration) time.Duration {
	if e.token.Text.IsZero() {
		return 0
	}
	return c.leftOf(e.token.ExpiresOn, e.token.deadline-now)
}

func (c *Cache) leftOf(expiresOn time.Time, byBoot time.Duration) time.Duration {
	if expiresOn.IsZero() || !c.clockTrusted() {
		return byBoot
	}
	return min(byBoot, expiresOn.Sub(c.clock.Wall()))
}

// unconfirmedLocked reports whether e's token may have expired without the device being able to know.
func (c *Cache) unconfirmedLocked(e *entry) bool { return e.token.unconfirmed && !c.clockTrusted() }
