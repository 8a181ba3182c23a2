package tokencache

import "time"

// receipt is when a token was first received and when it was issued, in on-time. Receiving it again does not change it.
type receipt struct {
	on       time.Duration
	from, to time.Duration // it was issued between
	blind    bool          // nothing shows the token's age: from is what the longest life allows
}

// received returns the receipt of a token that came at the on-time on, in a boot that began at the on-time boot. m is
// when it was issued, and received is when it came by the issuer's clock; zero: not known.
//
// At least as much time has passed as on-time. So a token that was issued so long before its receipt was issued no
// earlier in on-time, and later if the device was off in between.
func received(m IssueWindow, received time.Time, boot, on time.Duration) receipt {
	r := receipt{on: on, from: on - longestNominal, to: on, blind: true}
	if !received.IsZero() {
		r.age(m, received, boot, on)
	}
	return r
}

// again returns the receipt of a token that was first received as in r and came again as in o. o shows the token's age
// if nothing did before.
func (r receipt) again(o receipt) receipt {
	if r.blind && !r.contradicts(o.from) {
		r.from, r.to, r.blind = max(r.from, min(o.from, r.on)), min(r.to, o.to), o.blind
	}
	return r
}

// contradicts reports whether a token issued from then on would have been received before it was issued. Then its date
// does not count, though it may look right when the token comes again, or the clock is set right, hours later.
func (r receipt) contradicts(from time.Duration) bool { return from > r.on+aheadAtMost }

// doubt forgets what showed the token's age.
func (r *receipt) doubt() {
	r.from, r.to, r.blind = min(r.from, r.on-longestNominal), r.on, true
}

// age takes in how old the token was at the on-time on, when it was received or later, in a boot that began at the
// on-time boot.
func (r *receipt) age(m IssueWindow, then time.Time, boot, on time.Duration) {
	since := func(t time.Time) time.Duration { return max(0, then.Sub(t)) }
	from := on - since(m.Earliest)
	if r.contradicts(from) {
		return
	}
	if from = min(from, r.on); !r.blind {
		from = max(from, r.from)
	}
	r.from = from
	r.to = min(r.to, max(boot, on-since(m.Latest)))
	r.blind = false
}

// shift moves the receipt later by more, if it was in the boot that began then.
func (r *receipt) shift(began, more time.Duration) {
	if r.on > began {
		r.on, r.from, r.to = r.on+more, r.from+more, r.to+more
	}
}

// receiptOf returns the receipt of a token that has left to live at now, and when it was issued.
func (c *Cache) receiptOf(
	f Fetched, first tombstone, again bool, left time.Duration, now bootTime,
) (receipt, IssueWindow) {
	sure := f.Counted || c.clockTrusted()
	m := issueWindowOf(f.Token, left, sure)
	var then time.Time
	if sure || f.Reckoned && m.undated() { // then both are by the same clock, be it right or wrong
		then = f.Token.ExpiresOn.Add(-left)
	}
	r := received(m, then, c.on, c.onAt(now))
	if again {
		r = first.receipt.again(r)
	}
	if f.Reckoned && !sure && m.undated() {
		m = IssueWindow{}
	}
	return r, m
}

// receiptLocked updates the receipt of e, unless the token is the one received last, and returns when the token was
// issued. If again, the token was first received as in first.
func (c *Cache) receiptLocked(
	e *entry, f Fetched, first tombstone, again bool, left time.Duration, now bootTime,
) IssueWindow {
	r, m := c.receiptOf(f, first, again, left, now)
	if digest := f.Token.Text.SHA256(); digest != e.token.digest {
		e.token.digest, e.token.receipt = digest, r
	}
	return m
}
