package tokencache

// holds returns the boot time until which the back end is to be left alone, since policy changes are still spreading by on-time. Where
// each follows before the one before it has spread, it is asked every silence spreads all the same.
func (e *entry) holds() bootTime {
	s := e.policy
	return min(s.holds, max(s.began, e.last.answered).add(s.longestHold))
}

// barredUntil returns the boot time until which nothing is fetched for anybody, whether or not there is a token: a revocation is still
// spreading, so a token that is issued now would be withheld as well, and stay in the back end for a day.
func (e *entry) barredUntil() bootTime { return min(e.holds(), e.policy.lacked) }

// holdsLocked returns until when the back end is to be left alone for e: see holds. On-time is less than the time that has passed, as after a
// night in which the device was off: nothing holds where the issuer's clock is known to be past the spreading.
func (c *Cache) holdsLocked(e *entry, now bootTime) bootTime {
	holds := e.holds()
	if now < holds && c.hasSpreadLocked(e.policy.latest, now) {
		return longAgo
	}
	return holds
}

// heldUntilLocked returns the boot time until which the schedule leaves the back end alone for e: not where there was a token and it would
// expire meanwhile, unless nobody would get the one that follows it either. For a key that never had one, whoever asks has it
// fetched at once, unless barred.
func (c *Cache) heldUntilLocked(e *entry, now bootTime) bootTime {
	holds := c.holdsLocked(e, now)
	if e.token.life == 0 || !e.token.Text.IsZero() && holds.add(lastMinutes) < e.token.deadline {
		return holds
	}
	return c.barredUntilLocked(e, now)
}

// heldLocked reports whether the schedule leaves the back end alone for e.
func (c *Cache) heldLocked(e *entry, now bootTime) bool { return now < c.heldUntilLocked(e, now) }

// barredUntilLocked returns until when nothing is fetched even for a caller that gets nothing else: see barredUntil and holdsLocked.
func (c *Cache) barredUntilLocked(e *entry, now bootTime) bootTime {
	until := e.barredUntil()
	if now < until && c.hasSpreadLocked(e.policy.revoked, now) {
		return longAgo
	}
	return until
}

// barredLocked reports whether nothing is fetched now even for a caller that gets nothing else.
func (c *Cache) barredLocked(e *entry, now bootTime) bool {
	return now < c.barredUntilLocked(e, now)
}

// hasSpreadLocked reports whether ch reaches whatever is issued now, by the issuer's clock: as the back end counts it, or else as a clock
// tells it that is known to be right.
func (c *Cache) hasSpreadLocked(ch *change, now bootTime) bool {
	issuer := now.by(c.clockTrust.issuer)
	switch {
	case ch.Issuer.Latest.IsZero():
		return false
	case c.clockTrust.issuer.IsZero() && (!c.clockTrusted() || c.at(ch) > 0 && !ch.Unplaced):
		return false // since it was noted in this boot, whose clock tells how long ago that is, and the other may have been set since
	case c.clockTrust.issuer.IsZero():
		issuer = c.clock.Wall()
	}
	return issuer.After(ch.Issuer.Latest.Add(c.propagationDelay + heldBeyond + backdated))
}
