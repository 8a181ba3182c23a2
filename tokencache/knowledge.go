package tokencache

import "time"

// knowledge is what fetches have shown of the device's wall clock.
type knowledge struct {
	skew    time.Duration // by how much the wall clock was ahead of the back end's
	counted bool          // that is known
}

// learn takes in what an answer shows of the clock.
func (k *knowledge) learn(f Fetched, wall time.Time) {
	if f.Counted && !f.Token.ExpiresOn.IsZero() {
		k.skew, k.counted = wall.Add(f.Left).Sub(f.Token.ExpiresOn), true
	}
}

// knowsTime reports whether the wall clock is known to be right. The lock is held, or nobody else has c yet.
func (c *Cache) knowsTime() bool { return c.clock.Synchronised() }

// Knowledge is what is known of the device's wall clock.
type Knowledge struct {
	Known   bool          // to be right
	Skew    time.Duration // by how much it was ahead of the back end's when that was asked last
	Counted bool          // Skew is known
}

// Knowledge returns what is known of the device's wall clock.
func (c *Cache) Knowledge() Knowledge {
	c.mu.Lock()
	defer c.mu.Unlock()
	return Knowledge{Known: c.knowsTime(), Skew: c.knowledge.skew, Counted: c.knowledge.counted}
}
