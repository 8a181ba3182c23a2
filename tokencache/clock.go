package tokencache

import (
	"math"
	"time"
)

// bootTime is a moment by the boot clock: the time since the device booted, suspended time included. No person and no
// NTP step moves it. A negative one was in an earlier boot, counted as if the device had been on since.
type bootTime time.Duration

const (
	never   = bootTime(math.MaxInt64)
	longAgo = bootTime(math.MinInt64 / 2) // halved, so that adding to it stays in range
)

// forever is a wait without end.
const forever = time.Duration(never)

// add returns the moment d after t.
func (t bootTime) add(d time.Duration) bootTime { return t + bootTime(d) }

// sub returns the time from o to t.
func (t bootTime) sub(o bootTime) time.Duration { return time.Duration(t) - time.Duration(o) }

// by returns the time at t by a clock that showed zero when the device booted.
func (t bootTime) by(zero time.Time) time.Time { return zero.Add(time.Duration(t)) }

// zero returns what a clock showed when the device booted, if it shows at at t.
func (t bootTime) zero(at time.Time) time.Time { return at.Add(-time.Duration(t)) }

// unless returns t as it is kept: nil, if t is the value that stands for none.
func unless(none, t bootTime) *time.Duration {
	if t == none {
		return nil
	}
	kept := time.Duration(t)
	return &kept
}

// or returns a boot time that was kept. For nil it returns the value that stands for none.
func or(none bootTime, kept *time.Duration) bootTime {
	if kept == nil {
		return none
	}
	return bootTime(*kept)
}

// Clock is the device's clocks. Deadlines run on Boot, which no person and no NTP step moves. Wall only translates to
// and from the times of the back end and of people.
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

// OrRuntime fills the zero fields of c from Go's own clock. That one stops while the machine is suspended, which is
// right for tests in a synctest bubble, or if nothing better is there.
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

// now returns the boot time.
func (c *Cache) now() bootTime { return bootTime(c.clock.Boot()) }

// onAt returns the on-time at a boot time of this boot.
func (c *Cache) onAt(t bootTime) time.Duration { return c.on + time.Duration(t) }

// bootAt returns the boot time at an on-time.
func (c *Cache) bootAt(on time.Duration) bootTime { return bootTime(on - c.on) }

// clockTrusted reports whether the wall clock is known to be right. The caller holds the lock, or is New.
func (c *Cache) clockTrusted() bool { return c.clock.Synchronised() }

// overLocked returns the boot time at which e's last token expires or has expired; longAgo if there was none.
func (c *Cache) overLocked(e *entry, now bootTime) bootTime {
	if e.token.Text.IsZero() {
		return e.token.deadline
	}
	return now.add(c.leftLocked(e, now))
}

// leftLocked returns the life that e's token has left. It is over when the boot clock says so, or the wall clock does
// and is known to be right.
func (c *Cache) leftLocked(e *entry, now bootTime) time.Duration {
	if e.token.Text.IsZero() {
		return 0
	}
	return c.leftOf(e.token.ExpiresOn, e.token.deadline.sub(now))
}

// leftOf returns the lesser of the life left by the boot clock and, if the wall clock is trusted, by the wall clock.
func (c *Cache) leftOf(expiresOn time.Time, byBoot time.Duration) time.Duration {
	if expiresOn.IsZero() || !c.clockTrusted() {
		return byBoot
	}
	return min(byBoot, expiresOn.Sub(c.clock.Wall()))
}

// unconfirmedLocked reports whether e's token may have expired while the device cannot know it.
func (c *Cache) unconfirmedLocked(e *entry) bool { return e.token.unconfirmed && !c.clockTrusted() }
