package tokencache

// spreadsUntil returns the boot time until which nothing is fetched, since policy changes still spread by on-time. If
// each change follows before the one before it has spread, the back end is still asked once in a while: see
// longestWaitDelays.
func (e *entry) spreadsUntil() bootTime {
	s := e.policy
	return min(s.spreadsUntil, max(s.began, e.last.answered).add(s.longestWait))
}

// barredUntil returns the boot time until which nothing is fetched for anybody, with or without a token: a revocation
// still spreads. A token issued now would be withheld as well, and stay in the back end for a day.
func (e *entry) barredUntil() bootTime { return min(e.spreadsUntil(), e.policy.lacked) }

// spreadsUntilLocked returns until when nothing is fetched for e: see entry.holds. On-time is less than the time that
// has passed, as after a night in which the device was off. So nothing holds if the issuer's clock shows that the
// changes have spread.
func (c *Cache) spreadsUntilLocked(e *entry, now bootTime) bootTime {
	holds := e.spreadsUntil()
	if now < holds && c.hasSpreadLocked(e.policy.latest, now) {
		return longAgo
	}
	return holds
}

// postponedUntilLocked returns the boot time until which the schedule does not fetch e. A token that would expire
// meanwhile is fetched before, unless the next one would be withheld too. A key that never had a token is fetched at
// once for whoever asks, unless it is barred.
func (c *Cache) postponedUntilLocked(e *entry, now bootTime) bootTime {
	holds := c.spreadsUntilLocked(e, now)
	if e.token.life == 0 || !e.token.Text.IsZero() && holds.add(lastMinutes) < e.token.deadline {
		return holds
	}
	return c.barredUntilLocked(e, now)
}

// postponedLocked reports whether the schedule does not fetch e now, since a change spreads.
func (c *Cache) postponedLocked(e *entry, now bootTime) bool {
	return now < c.postponedUntilLocked(e, now)
}

// barredUntilLocked returns until when nothing is fetched, even for a caller without a token: see barredUntil and
// spreadsUntilLocked.
func (c *Cache) barredUntilLocked(e *entry, now bootTime) bootTime {
	until := e.barredUntil()
	if now < until && c.hasSpreadLocked(e.policy.revoked, now) {
		return longAgo
	}
	return until
}

// barredLocked reports whether nothing is fetched now, even for a caller without a token.
func (c *Cache) barredLocked(e *entry, now bootTime) bool {
	return now < c.barredUntilLocked(e, now)
}

// hasSpreadLocked reports whether every token issued now carries ch, by the issuer's clock: as the back end counts it,
// or as a wall clock shows it that is known to be right.
func (c *Cache) hasSpreadLocked(ch *change, now bootTime) bool {
	issuer := now.by(c.issuerClock.issuer)
	switch {
	case ch.Issuer.Latest.IsZero():
		return false
	case c.issuerClock.issuer.IsZero() && (!c.clockTrusted() || c.at(ch) > 0 && !ch.Unplaced):
		// It was recorded in this boot, whose boot clock shows how long ago that is. The wall clock may have been set
		// since.
		return false
	case c.issuerClock.issuer.IsZero():
		issuer = c.clock.Wall()
	}
	return issuer.After(ch.Issuer.Latest.Add(c.propagationDelay + postponedBeyond + backdated))
}
