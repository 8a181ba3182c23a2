package source

import (
	"cmp"
	"encoding/base64"
	"encoding/json"
	"math"
	"strings"
	"time"
	"unicode"

	"perceptd/tokencache"
)

// A claim is kept whole or not at all: of two that are cut off, nobody can tell whether they differ. These are the bytes that one may
// take, as JSON writes it.
const (
	maxClaimList = 8 << 10 // Entra writes at most 200 groups, which are GUIDs
	maxClaimText = 1024
	maxClaimID   = 128 // it is a GUID; no token fits, which an endpoint might put there to have it logged
)

// jwt is what a token says of itself, unverified: the device is not its audience. Zero for an
// opaque token.
type jwt struct {
	claims     tokencache.Claims
	expiresOn  time.Time // exp
	resourceID string    // xms_mirid: the ARM resource ID of the identity
}

// Claims returns what a token says of itself, unverified; zero for one that is opaque.
func Claims(token tokencache.Secret) tokencache.Claims { return parseJWT(token.Reveal()).claims }

// parseJWT reads a token's claims. A claim of an unexpected shape counts as absent, and a token that
// is no JWT as one without claims.
func parseJWT(token string) jwt {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return jwt{}
	}
	payload, err := base64.RawURLEncoding.DecodeString(strings.TrimRight(parts[1], "="))
	if err != nil {
		return jwt{}
	}
	var c payloadClaims
	if json.Unmarshal(payload, &c) != nil {
		return jwt{}
	}
	var t jwt
	for _, claim := range []struct {
		name, text string
		most       int
		in         *string
	}{
		{"iss", c.text("iss"), maxClaimText, &t.claims.Issuer},
		{"aud", cmp.Or(c.text("aud"), c.first("aud")), maxClaimText, &t.claims.Audience},
		{"azp", c.text("azp"), maxClaimID, &t.claims.ClientID}, // appid's name in version 2 tokens
		{"appid", c.text("appid"), maxClaimID, &t.claims.ClientID},
		{"oid", c.text("oid"), maxClaimID, &t.claims.ObjectID},
		{"tid", c.text("tid"), maxClaimID, &t.claims.TenantID},
		{"xms_mirid", c.text("xms_mirid"), maxClaimText, &t.resourceID},
	} {
		if keepable(claim.most, claim.text) {
			*claim.in = cmp.Or(claim.text, *claim.in)
		} else {
			t.claims.Omitted = append(t.claims.Omitted, claim.name)
		}
	}
	for _, claim := range []struct {
		name string
		in   *[]string
	}{{"groups", &t.claims.Groups}, {"roles", &t.claims.Roles}, {"wids", &t.claims.WIDs}} {
		if list := c.list(claim.name); keepable(maxClaimList, list...) {
			*claim.in = list
		} else {
			t.claims.Omitted = append(t.claims.Omitted, claim.name)
		}
	}
	t.claims.IssuedAt, t.claims.NotBefore, t.expiresOn = c.time("iat"), c.time("nbf"), c.time("exp")
	return t
}

// expiry is exp; zero where there is none, and where it is not after the token's own beginning.
func (t jwt) expiry() time.Time {
	if !t.expiresOn.After(t.claims.NotBefore) || !t.expiresOn.After(t.claims.IssuedAt) {
		return time.Time{}
	}
	return t.expiresOn
}

// whole is the life that the token was given, back-dating included; zero when it does not tell.
func (t jwt) whole() time.Duration {
	exp, from := t.expiry(), t.claims.NotBefore
	if exp.IsZero() || from.IsZero() {
		return 0
	}
	return exp.Sub(from)
}

type payloadClaims map[string]json.RawMessage

func (c payloadClaims) text(name string) string {
	var s string
	if json.Unmarshal(c[name], &s) != nil {
		return ""
	}
	return s
}

// first returns the first of several texts.
func (c payloadClaims) first(name string) string {
	if list := c.list(name); len(list) > 0 {
		return list[0]
	}
	return ""
}

func (c payloadClaims) list(name string) []string {
	var all []string
	if json.Unmarshal(c[name], &all) != nil {
		return nil
	}
	var told []string
	for _, s := range all {
		if s != "" {
			told = append(told, s)
		}
	}
	return told
}

// keepable reports whether logs and screens can show what a claim says as it is, and whether it takes no more than so many bytes.
func keepable(most int, values ...string) bool {
	for _, s := range values {
		text, err := json.Marshal(s)
		if most -= len(text) + len(","); err != nil || most < 0 || strings.ContainsFunc(s, unshown) {
			return false
		}
	}
	return true
}

// unshown reports whether r cannot be shown, or stands for what was none and may have been anything.
func unshown(r rune) bool { return !unicode.IsPrint(r) || r == unicode.ReplacementChar }

func (c payloadClaims) time(name string) time.Time {
	var n float64 // RFC 7519 allows fractions of a second
	if json.Unmarshal(c[name], &n) != nil || n < earliestTime || n > latestTime {
		return time.Time{}
	}
	return time.Unix(int64(math.Floor(n)), 0).UTC()
}
