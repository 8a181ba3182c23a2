package tokencache

import "time"

// knowledge is what fetches have shown of the device's wall clock.
type knowledge struct {
	dated bool          // a server that can be trusted has told the time
	date  time.Time     // that
	at    time.Duration // and when that was

	skew    time.Duration // by how much the wall clock was ahead of the back end's
	counted bool          // that is known
}

// agreeing is how far the wall clock may be from a server's date and count as right: a date has whole seconds, an answer
// takes its time, and two clocks are never one.
const agreeing = 30 * time.Second

// learn takes in what an answer shows of the clock.
func (k *knowledge) learn(f Fetched, wall time.Time, now time.Duration) {
	if f.DateTrusted && !f.Date.IsZero() {
		k.dated, k.date, k.at = true, f.Date, now
	}
	if f.Counted && !f.Token.ExpiresOn.IsZero() {
		k.skew, k.counted = wall.Add(f.Left).Sub(f.Token.ExpiresOn), true
	}
}

// knowsTime reports whether the wall clock is known to be right: the kernel says so, or it agrees with a server that can be
// trusted. The lock is held, or nobody else has c yet.
func (c *Cache) knowsTime() bool {
	if c.clock.Synchronised() {
		return true
	}
	k := &c.knowledge
	return k.dated && c.clock.Wall().Sub(k.date.Add(c.clock.Boot()-k.at)).Abs() <= agreeing
}

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
