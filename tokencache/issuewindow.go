package tokencache

import "time"

const (
	// backdated is how far Entra dates a token's iat and nbf before its minting.
	backdated = 5 * time.Minute

	// issueSlack covers that a token's times are whole seconds.
	issueSlack = 2 * time.Second
)

// IssueWindow is the interval, by the issuer's clock, in which a token was minted.
type IssueWindow struct {
	Earliest time.Time `json:"minted_earliest,omitzero"`
	Latest   time.Time `json:"minted_latest,omitzero"`
}

// blur returns how much later than its minting a token seems to have been minted at the earliest, beyond
// a few seconds: what to wait longer so that a token shows that it is current.
func (m IssueWindow) uncertainty() time.Duration {
	if m.Latest.Sub(m.Earliest) > 2*issueSlack {
		return backdated
	}
	return 0
}

// aheadAtMost is how much later than its receipt, by the issuer's own clock, a token may be dated: two clocks are never one.
const aheadAtMost = 2 * time.Minute

// issueWindowOf tells when a token was minted, of which life was left at receipt. sure says that this is known: the back end
// counted it, or the device's clock is known to be right.
//
// A token is dated back, so its iat is the earliest moment. When it was given a whole number of hours
// and the five minutes of back-dating besides, as all that were seen, the minting is known to the
// second. A token without a date was minted no longer ago than the longest life that is known; a date later than the
// receipt is none, and one that leaves no life but what tokens are dated back by.
func issueWindowOf(t Token, left time.Duration, sure bool) IssueWindow {
	latest := t.ExpiresOn
	if sure {
		latest = latest.Add(-left)
	}
	dated := t.Claims.IssuedAt
	if dated.IsZero() {
		dated = t.NotBefore
	}
	if dated.IsZero() || t.ExpiresOn.Sub(dated) < backdated || sure && dated.After(latest.Add(aheadAtMost)) {
		return IssueWindow{Earliest: t.ExpiresOn.Add(-longestNominal), Latest: latest}
	}
	given := t.ExpiresOn.Sub(dated) - backdated
	whole := given.Round(time.Hour)
	if off := (given - whole).Abs(); whole > 0 && off <= issueSlack && left <= given+issueSlack {
		minted := dated.Add(backdated)
		return IssueWindow{Earliest: minted.Add(-issueSlack), Latest: minted.Add(issueSlack)}
	}
	return IssueWindow{Earliest: dated, Latest: dated.Add(backdated + issueSlack)}
}

// undated reports whether m is no more than what the expiry tells, or nothing.
func (m IssueWindow) undated() bool {
	return m == IssueWindow{} || m.Latest.Sub(m.Earliest) > backdated+issueSlack
}

// issuedBefore reports whether t was minted before o, which were minted at m and om as far as is known.
func issuedBefore(t Token, m IssueWindow, nominal time.Duration, o Token, om IssueWindow, oNominal time.Duration) bool {
	return ranked(t, m, nominal).Before(ranked(o, om, oNominal))
}

// ranked returns a time by which tokens of one key are in the order of their minting: that of t, which was minted at m as far as is
// known. Expiry less nominal life stands in for it where the token has no date, and less the usual life where its date is none: then
// a nominal life that was taken from it is none either.
func ranked(t Token, m IssueWindow, nominal time.Duration) time.Time {
	switch {
	case !m.undated():
		return m.Latest
	case t.Claims.IssuedAt.IsZero() && t.NotBefore.IsZero():
		return t.ExpiresOn.Add(-nominal)
	}
	return t.ExpiresOn.Add(-defaultNominal)
}

// lifeOf returns the life that a token had when it was minted, as far as that can be told.
func lifeOf(t Token, m IssueWindow, left time.Duration) time.Duration {
	if m.undated() {
		return max(left, defaultNominal)
	}
	return max(left, t.ExpiresOn.Sub(m.Latest.Add(-issueSlack)))
}

// receipt is when a token was first received and when it was issued, in on-time. Receiving it again changes nothing of it.
type receipt struct {
	on       time.Duration
	from, to time.Duration // it was issued between
	blind    bool          // nothing told the token's age: from is what the longest life allows
}

// received returns the receipt of a token that came at the on-time on, in a boot that began at the on-time boot. m is when it was
// issued, and received is when it came by the issuer's clock; zero: not known.
//
// More time has passed than on-time, so a token that was issued so long before its receipt was issued no earlier in on-time,
// but later where the device was off in between.
func received(m IssueWindow, received time.Time, boot, on time.Duration) receipt {
	r := receipt{on: on, from: on - longestNominal, to: on, blind: true}
	if !received.IsZero() {
		r.age(m, received, boot, on)
	}
	return r
}

// again returns the receipt of a token that was received first as r tells, and that came again as o does. That tells how old it is
// where nothing did before.
func (r receipt) again(o receipt) receipt {
	if r.blind && !r.contradicts(o.from) {
		r.from, r.to, r.blind = max(r.from, min(o.from, r.on)), min(r.to, o.to), o.blind
	}
	return r
}

// contradicts reports whether the token was there before it was issued, if it was issued from then on: then its date is none, though it may
// look like one when the token comes again, or the clock is set right, hours later.
func (r receipt) contradicts(from time.Duration) bool { return from > r.on+aheadAtMost }

// doubt forgets what told how old the token was.
func (r *receipt) doubt() {
	r.from, r.to, r.blind = min(r.from, r.on-longestNominal), r.on, true
}

// age takes in how old the token was at the on-time on, when it was received or later, in a boot that began at the on-time boot.
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

// receiptOf returns the receipt of a token that has left at now, and when it was minted.
func (c *Cache) receiptOf(f Fetched, first tombstone, again bool, left time.Duration, now bootTime) (receipt, IssueWindow) {
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
