package tokencache

import "time"

const (
	// backdated is how far Entra dates a token's iat and nbf before it issues the token.
	backdated = 5 * time.Minute

	// issueSlack covers that a token's times are whole seconds.
	issueSlack = 2 * time.Second
)

// IssueWindow is the interval, by the issuer's clock, in which a token was issued.
type IssueWindow struct {
	Earliest time.Time `json:"minted_earliest,omitzero"`
	Latest   time.Time `json:"minted_latest,omitzero"`
}

// uncertainty returns the width of the issue window: 0, or 5 minutes if it is more than a few seconds. The schedule
// waits that much longer, so that the next token is known to be current.
func (m IssueWindow) uncertainty() time.Duration {
	if m.Latest.Sub(m.Earliest) > 2*issueSlack {
		return backdated
	}
	return 0
}

// aheadAtMost is how much later than its receipt, by the issuer's clock, a token may be dated, since two clocks always
// differ.
const aheadAtMost = 2 * time.Minute

// issueWindowOf returns when a token was issued that had left to live at its receipt. sure says that left is known: the
// back end counted it, or the device's clock is known to be right.
//
// Tokens are dated back, so the iat is the earliest moment. If a token was given a whole number of hours and the five
// minutes of back-dating, as all seen so far, it is known to the second when it was issued. A token without a date was
// issued no longer ago than the longest known life. A date later than the receipt does not count, nor one that leaves
// no life beyond the back-dating.
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
		issued := dated.Add(backdated)
		return IssueWindow{Earliest: issued.Add(-issueSlack), Latest: issued.Add(issueSlack)}
	}
	return IssueWindow{Earliest: dated, Latest: dated.Add(backdated + issueSlack)}
}

// undated reports whether m follows from the expiry alone, or is not known.
func (m IssueWindow) undated() bool {
	return m == IssueWindow{} || m.Latest.Sub(m.Earliest) > backdated+issueSlack
}

// issuedBefore reports whether t was issued before o. m and om are their issue windows.
func issuedBefore(t Token, m IssueWindow, nominal time.Duration, o Token, om IssueWindow, oNominal time.Duration) bool {
	return ranked(t, m, nominal).Before(ranked(o, om, oNominal))
}

// ranked returns a time that orders tokens of one key by when they were issued. m is t's issue window. Without a date
// it is the expiry less the nominal life. If the date does not count, it is the expiry less the usual life, since then
// a nominal life computed from the date does not count either.
func ranked(t Token, m IssueWindow, nominal time.Duration) time.Time {
	switch {
	case !m.undated():
		return m.Latest
	case t.Claims.IssuedAt.IsZero() && t.NotBefore.IsZero():
		return t.ExpiresOn.Add(-nominal)
	}
	return t.ExpiresOn.Add(-defaultNominal)
}

// lifeOf returns the life that a token had when it was issued, as far as that is known.
func lifeOf(t Token, m IssueWindow, left time.Duration) time.Duration {
	if m.undated() {
		return max(left, defaultNominal)
	}
	return max(left, t.ExpiresOn.Sub(m.Latest.Add(-issueSlack)))
}
