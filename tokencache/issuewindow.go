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
