package tokencache

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"time"
)

const redacted = "[token]"

// Secret is a token's text. It prints as "[token]" under every fmt verb, in JSON and as text, also
// when it sits in an unexported field of a struct that is printed whole; only Reveal gives it out.
type Secret struct {
	// A pointer, since fmt prints unexported fields without asking their methods: of a pointer to a
	// string it shows the address, whatever the verb. (Of one to a struct it may show what is there.)
	text   *string
	digest string
}

// NewSecret wraps a token's text.
func NewSecret(text string) Secret {
	sum := sha256.Sum256([]byte(text))
	return Secret{text: &text, digest: hex.EncodeToString(sum[:])}
}

// Reveal returns the text, for the answer to a caller that was granted it and for nothing else.
func (s Secret) Reveal() string {
	if s.text == nil {
		return ""
	}
	return *s.text
}

// IsZero reports whether there is no text.
func (s Secret) IsZero() bool { return s.Reveal() == "" }

// Equal reports whether both hold the same text.
func (s Secret) Equal(o Secret) bool { return s.Reveal() == o.Reveal() }

// SHA256 returns the text's digest in lower-case hexadecimal: how people and modules name a token
// without showing it. The zero Secret has none.
func (s Secret) SHA256() string { return s.digest }

func (Secret) String() string                 { return redacted }
func (Secret) GoString() string               { return redacted }
func (Secret) Format(f fmt.State, _ rune)     { _, _ = f.Write([]byte(redacted)) }
func (Secret) MarshalText() ([]byte, error)   { return []byte(redacted), nil }
func (Secret) MarshalBinary() ([]byte, error) { return []byte(redacted), nil }

// Claims is what a token says of itself. The device cannot verify the signature and does not need
// to: the claims are shown to people and compared between tokens, never used to decide access.
type Claims struct {
	Issuer    string    `json:"iss,omitempty"`
	Audience  string    `json:"aud,omitempty"`
	ClientID  string    `json:"appid,omitempty"`
	ObjectID  string    `json:"oid,omitempty"`
	TenantID  string    `json:"tid,omitempty"`
	IssuedAt  time.Time `json:"iat,omitzero"`     // which Entra dates back by five minutes
	NotBefore time.Time `json:"nbf,omitzero"`     // dated back likewise
	Groups    []string  `json:"groups,omitempty"` // group memberships, stale until the next token
	Roles     []string  `json:"roles,omitempty"`  // app roles, stale likewise
	WIDs      []string  `json:"wids,omitempty"`   // directory roles, stale likewise

	// Omitted names the claims of the token that are left out here, since they are too long or cannot be shown as text.
	// They count as missing.
	Omitted []string `json:"omitted,omitempty"`
}

// simulatedIssuer is the issuer in the tokens of the simulated back end. No name under .invalid belongs to anybody.
const simulatedIssuer = "https://sts.simulated.invalid/"

// Simulated reports whether the token says that a simulated back end made it. Then it is worth nothing, whatever its
// source is called.
func (c Claims) Simulated() bool { return strings.HasPrefix(c.Issuer, simulatedIssuer) }

// Token is a bearer access token with its times as the back end gave them.
type Token struct {
	Text      Secret    `json:"text"`
	ExpiresOn time.Time `json:"expires_on,omitzero"` // wall time of the issuer
	NotBefore time.Time `json:"not_before,omitzero"` // zero: not known
	Claims    Claims    `json:"claims"`              // zero when the token is opaque
}

// Fetched is a source's answer.
type Fetched struct {
	Token Token

	// Left is the life the token had left when it was received, preferably as the back end counted
	// it (expires_in), since the local wall clock may be wrong.
	Left time.Duration
	// Counted says that Left is as the back end counted it, and ExpiresOn by a clock of its own.
	Counted bool
	// Reckoned says that the back end gave no expiry: ExpiresOn is Left from now by the device's own clock.
	Reckoned bool

	// Presumed says that Left is a guess: it is only known that the back end hands the token out. Its expiry has long
	// passed by a clock that may be wrong.
	Presumed bool

	// Nominal is the whole life such a token has. Zero means 24 hours.
	Nominal time.Duration

	// RefreshIn is when the back end advises to ask again; zero: it does not.
	RefreshIn time.Duration
}

// EndOfDates is the year 2200, in Unix seconds. Issuers and people mean times from 1970 until then. Other times mean
// nothing, and do not fit into what is kept and shown.
const EndOfDates = 7258118400

// Plausible reports whether each is zero, or a time that an issuer or a person may mean.
func Plausible(times ...time.Time) bool {
	return !slices.ContainsFunc(times, func(t time.Time) bool {
		return !t.IsZero() && (t.Unix() < 0 || t.Unix() >= EndOfDates)
	})
}

// withoutStrangeTimes returns f, which was received at the wall time now, without the times that no issuer means. If
// the expiry is such a time, it is as if the back end had given none: nothing is learned from it.
func (f Fetched) withoutStrangeTimes(now time.Time) Fetched {
	for _, t := range []*time.Time{&f.Token.NotBefore, &f.Token.Claims.IssuedAt, &f.Token.Claims.NotBefore} {
		if !Plausible(*t) {
			*t = time.Time{}
		}
	}
	if !Plausible(f.Token.ExpiresOn) {
		f.Token.ExpiresOn = now.Truncate(time.Second).Add(f.Left)
		f.Counted, f.Reckoned = false, true
	}
	return f
}
