package source

import (
	"encoding/base64"
	"encoding/json"
	"math"
	"strings"
	"time"
	"unicode"

	"perceptd/tokencache"
)

const (
	maxListed    = 2048 // entries kept of a list claim; Entra writes at most 200 groups
	maxClaimText = 1024 // bytes kept of one text
	maxIDText    = 128  // and of an ID, which is a GUID: no token fits, which an endpoint might put there to have it logged
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
	client := c.id("appid")
	if client == "" {
		client = c.id("azp") // its name in version 2 tokens
	}
	audience := c.text("aud")
	if list := c.list("aud"); len(list) > 0 {
		audience = list[0]
	}
	return jwt{
		claims: tokencache.Claims{
			Issuer:    c.text("iss"),
			Audience:  audience,
			ClientID:  client,
			ObjectID:  c.id("oid"),
			TenantID:  c.id("tid"),
			IssuedAt:  c.time("iat"),
			NotBefore: c.time("nbf"),
			Groups:    c.list("groups"),
			Roles:     c.list("roles"),
			WIDs:      c.list("wids"),
		},
		expiresOn:  c.time("exp"),
		resourceID: c.text("xms_mirid"),
	}
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
	if json.Unmarshal(c[name], &s) != nil || !shown(s, maxClaimText) {
		return ""
	}
	return s
}

func (c payloadClaims) id(name string) string {
	if s := c.text(name); len(s) <= maxIDText {
		return s
	}
	return ""
}

// shown reports whether logs and screens can show text as it is.
func shown(text string, most int) bool {
	return len(text) <= most && !strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) })
}

func (c payloadClaims) list(name string) []string {
	var all []string
	if json.Unmarshal(c[name], &all) != nil {
		return nil
	}
	var kept []string
	for _, s := range all[:min(len(all), maxListed)] {
		if s != "" && shown(s, maxClaimText) {
			kept = append(kept, s)
		}
	}
	return kept
}

func (c payloadClaims) time(name string) time.Time {
	var n float64 // RFC 7519 allows fractions of a second
	if json.Unmarshal(c[name], &n) != nil || n < earliestTime || n > latestTime {
		return time.Time{}
	}
	return time.Unix(int64(math.Floor(n)), 0).UTC()
}
