package tokencache

import "time"

const (
	// backdated is how far Entra dates a token's iat and nbf before its minting.
	backdated = 5 * time.Minute

	// mintSlack covers that a token's times are whole seconds.
	mintSlack = 2 * time.Second
)

// Minting is the interval, by the issuer's clock, in which a token was minted.
type Minting struct {
	Earliest, Latest time.Time
}

// blur returns how much later than its minting a token seems to have been minted at the earliest, beyond
// a few seconds: what to wait longer so that a token shows that it is current.
func (m Minting) blur() time.Duration {
	if m.Latest.Sub(m.Earliest) > 2*mintSlack {
		return backdated
	}
	return 0
}

// mintingOf tells when a token was minted, of which life was left at receipt.
//
// A token is dated back, so its iat is the earliest moment. When it was given a whole number of hours
// and the five minutes of back-dating besides, as all that were seen, the minting is known to the
// second. A token without a date was minted no longer ago than the longest life that is known.
func mintingOf(t Token, left time.Duration) Minting {
	received := t.ExpiresOn.Add(-left)
	dated := t.Claims.IssuedAt
	if dated.IsZero() {
		dated = t.NotBefore
	}
	if dated.IsZero() || !dated.Before(t.ExpiresOn) {
		return Minting{Earliest: t.ExpiresOn.Add(-longestNominal), Latest: received}
	}
	given := t.ExpiresOn.Sub(dated) - backdated
	whole := given.Round(time.Hour)
	if off := (given - whole).Abs(); whole > 0 && off <= mintSlack && left <= given+mintSlack {
		minted := dated.Add(backdated)
		return Minting{Earliest: minted.Add(-mintSlack), Latest: minted.Add(mintSlack)}
	}
	return Minting{Earliest: dated, Latest: dated.Add(backdated + mintSlack)}
}

// lifeOf returns the life that a token had when it was minted, as far as that can be told.
func lifeOf(t Token, left time.Duration) time.Duration {
	m := mintingOf(t, left)
	if m.Latest.Sub(m.Earliest) > backdated+mintSlack {
		return max(left, defaultNominal)
	}
	return max(left, t.ExpiresOn.Sub(m.Latest.Add(-mintSlack)))
}
