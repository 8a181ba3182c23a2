package tokencache

import "time"

// issuerClock is what fetches have shown of the wall clock and of the issuer's clock.
type issuerClock struct {
	skew      time.Duration // by how much the wall clock was ahead of the back end's
	skewKnown bool          // whether skew is known

	// issuer is what the back end's clock showed at most when the device booted, by its last count; zero: it never
	// counted.
	issuer time.Time

	// floor and ceiling bound the same by what was handed out: a token that is handed out has been issued, by its date,
	// and has not expired.
	floor, ceiling time.Time
}

// learn takes in what an answer shows of the clocks. m is when its token was issued.
func (k *issuerClock) learn(f Fetched, m IssueWindow, wall time.Time, begun, now bootTime) {
	if f.Counted && !f.Token.ExpiresOn.IsZero() {
		k.skew, k.skewKnown = wall.Add(f.Left).Sub(f.Token.ExpiresOn), true
		k.issuer = begun.zero(f.Token.ExpiresOn.Add(-f.Left))
	}
	if f.Reckoned || f.Token.ExpiresOn.IsZero() {
		return
	}
	if latest := begun.zero(f.Token.ExpiresOn.Add(handedOutAfter)); k.ceiling.IsZero() || latest.Before(k.ceiling) {
		k.ceiling = latest
	}
	dated := f.Token.Claims.IssuedAt
	if earliest := now.zero(dated); !m.undated() && !dated.IsZero() && earliest.After(k.floor) {
		k.floor = earliest
	}
}

// forgetCounts forgets what counted answers have shown.
func (k *issuerClock) forgetCounts() { k.skew, k.skewKnown, k.issuer = 0, false, time.Time{} }

// handedOutAfter is how long after its expiry a back end may still hand out a token, since its servers' clocks differ.
const handedOutAfter = 5 * time.Minute

// notLater returns a time that the issuer's clock had not passed at a boot time, by what the back end handed out in
// this boot. False: nothing shows it, or what was handed out contradicts itself.
func (k *issuerClock) notLater(at bootTime) (time.Time, bool) {
	if k.ceiling.IsZero() || k.floor.After(k.ceiling) {
		return time.Time{}, false
	}
	return at.by(k.ceiling), true
}

// at returns the boot time of ch, negative if ch happened before this boot.
func (c *Cache) at(ch *change) bootTime { return c.bootAt(ch.Moment) }

// inEarlierBoot reports whether ch was recorded in an earlier boot, and so happened before this one began. The same
// holds for a change that was recorded in this boot for a time before it, and for one whose boot is not known.
func (c *Cache) inEarlierBoot(ch *change) bool {
	return ch.By < c.on || ch.Moment == c.on || ch.Unplaced
}

// ClockStatus is what is known of the device's wall clock.
type ClockStatus struct {
	Trusted bool          // to be right
	Skew    time.Duration // by how much it was ahead of the back end's when that was asked last
	Counted bool          // Skew is known
}

// ClockStatus returns what is known of the device's wall clock.
func (c *Cache) ClockStatus() ClockStatus {
	c.mu.Lock()
	defer c.mu.Unlock()
	return ClockStatus{Trusted: c.clockTrusted(), Skew: c.issuerClock.skew, Counted: c.issuerClock.skewKnown}
}
