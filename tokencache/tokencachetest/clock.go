package tokencachetest

import (
	"sync"
	"time"

	"perceptd/tokencache"
)

// Uptime is for how long the device of AfterUptime has been on.
const Uptime = 100 * time.Hour

// Clock is a device's clocks over the time of a synctest bubble, which is the true time. Its wall clock may be wrong.
type Clock struct {
	mu      sync.Mutex
	Behind  time.Duration // by how much the wall clock is behind
	Trusted bool          // whether the device knows that the wall clock is right
}

// Set changes the wall clock while a cache runs on it.
func (c *Clock) Set(behind time.Duration, trusted bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.Behind, c.Trusted = behind, trusted
}

// AfterUptime returns the clocks of a device that has been on for Uptime now.
func (c *Clock) AfterUptime() tokencache.Clock { return c.bootedFor(Uptime) }

// AfterBoot returns the clocks of a device that booted a minute ago.
func (c *Clock) AfterBoot() tokencache.Clock { return c.bootedFor(time.Minute) }

func (c *Clock) bootedFor(uptime time.Duration) tokencache.Clock {
	began := time.Now().Add(-uptime)
	return tokencache.Clock{
		Boot: func() time.Duration { return time.Since(began) },
		Wall: func() time.Time {
			c.mu.Lock()
			defer c.mu.Unlock()
			return time.Now().Round(0).Add(-c.Behind)
		},
		Synchronised: func() bool {
			c.mu.Lock()
			defer c.mu.Unlock()
			return c.Trusted
		},
	}
}
