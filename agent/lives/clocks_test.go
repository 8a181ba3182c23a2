package lives

import (
	"fmt"
	"sync"
	"time"

	"perceptd/tokencache"
)

// clocks are the device's. The bubble's own clock is the true time.
type clocks struct {
	mu      sync.Mutex
	boots   int
	booted  time.Time
	ahead   time.Duration // of the wall clock, of the true time, at set
	set     time.Time
	drift   float64
	vouched bool
}

// agreeing is how far a clock that is vouched for may be from the truth and count as right: NTP keeps it within that.
const agreeing = 30 * time.Second

func (c *clocks) aheadLocked(now time.Time) time.Duration {
	return c.ahead + time.Duration(c.drift*float64(now.Sub(c.set)))
}

func (c *clocks) wall() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now().Round(0)
	return now.Add(c.aheadLocked(now))
}

func (c *clocks) boot() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	return time.Since(c.booted)
}

func (c *clocks) isVouched() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.vouched
}

// error returns how far the clock is ahead, and whether it is vouched for.
func (c *clocks) error() (ahead time.Duration, vouched bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.aheadLocked(time.Now()), c.vouched
}

// step sets the clock.
func (c *clocks) step(ahead time.Duration, vouched bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ahead, c.set, c.vouched = ahead, time.Now(), vouched
}

// reboot begins another boot.
func (c *clocks) reboot() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.boots++
	c.booted = time.Now().Add(-booting)
}

// booting is how long a boot has lasted when the daemon starts.
const booting = 12 * time.Second

func (c *clocks) number() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.boots
}

func (c *clocks) bootID() string { return fmt.Sprint("boot ", c.boots) }

func (c *clocks) bootedOn() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.booted
}

func (c *clocks) forDaemon() tokencache.Clock {
	return tokencache.Clock{Wall: c.wall, Boot: c.boot, Synchronised: c.isVouched}
}
