package source

import (
	"cmp"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
	"unicode"

	"perceptd/tokencache"
)

const (
	longestLife     = 7 * 24 * time.Hour // no managed-identity token lives a third as long
	shortestNominal = 10 * time.Minute
	longestNominal  = 28*time.Hour + 5*time.Minute // the longest known, and the five minutes of back-dating

	clockTolerance = 5 * time.Minute  // by how much clocks that are right may differ from each other
	longExpired    = 5 * time.Minute  // since its expiry: no back end hands out such a token any more
	presumedLife   = 10 * time.Minute // of a token of unknown life; it is asked for again before its end

	earliestTime = 978307200  // 2001, in Unix seconds: less is a duration in place of a time
	latestTime   = 7258118399 // the end of the year 2199
)

// answer is the body of a token endpoint's answer under status 200, field by field.
type answer struct {
	text      tokencache.Secret
	token     jwt               // what the token says of itself; zero for an opaque one
	expiresIn time.Duration     // 0 when absent or ignored
	expiresOn time.Time         // zero when absent or ignored
	notBefore time.Time         // zero when absent or ignored
	refreshIn time.Duration     // 0 when absent or ignored
	resource  string            // empty when absent
	echo      map[string]string // by the names that echoes gives; empty when absent
	ignored   []string          // names of the fields that made no sense, and that the token can do without

	clockTrusted bool // this device's clock was known to be right at the receipt
}

// echoNames are the fields in which an endpoint says which identity it answered for, when it was asked
// with a selector of that kind.
func echoNames(kind tokencache.SelectorKind) []string {
	switch kind {
	case tokencache.ClientID:
		return []string{"client_id"}
	case tokencache.ObjectID:
		return []string{"object_id"}
	case tokencache.ResourceID:
		return []string{"msi_res_id", "mi_res_id"}
	}
	return nil
}

// parseAnswer reads the JSON object in an answer. clockTrusted says that this device's clock is known to be right. No
// error quotes the body.
func parseAnswer(f fields, clockTrusted bool) (answer, error) {
	a := answer{clockTrusted: clockTrusted}
	text, err := f.text("access_token")
	switch {
	case err != nil:
		return answer{}, err
	case text == "":
		return answer{}, errors.New("it has no access_token")
	case !tokenSafe(text):
		return answer{}, errors.New("access_token holds characters that no Authorization header can carry")
	}
	a.text, a.token = tokencache.NewSecret(text), parseJWT(text)
	kind, err := f.text("token_type")
	if err != nil {
		return answer{}, err
	}
	if kind != "" && !strings.EqualFold(kind, "Bearer") {
		return answer{}, errors.New("token_type is not Bearer")
	}
	a.resource = a.echoed(f, "resource")
	a.echo = make(map[string]string)
	for _, kind := range []tokencache.SelectorKind{tokencache.ClientID, tokencache.ObjectID, tokencache.ResourceID} {
		for _, name := range echoNames(kind) {
			a.echo[name] = a.echoed(f, name)
		}
	}
	if err := a.parseTimes(f); err != nil {
		return answer{}, err
	}
	return a, nil
}

// echoed returns a parameter of the request that an endpoint repeats; empty where it is absent or not a string.
func (a *answer) echoed(f fields, name string) string {
	text, err := f.text(name)
	if err != nil {
		a.ignored = append(a.ignored, name)
	}
	return text
}

// parseTimes reads the four times. A token is refused only for want of an expiry: one of expires_in and expires_on may
// be senseless where the other is good, and refresh_in and not_before are advice.
//
// An expires_in of 0 or less says that the token has expired. Only expires_on by a clock that is known to be right can
// show that it has not: with a clock that is behind, a token would be served long after its end.
func (a *answer) parseTimes(f fields) error {
	noLife := a.parseExpiresIn(f)
	noExpiry := a.parseExpiresOn(f)
	switch neither := a.expiresIn == 0 && a.expiresOn.IsZero(); {
	case errors.As(noLife, new(*expiredError)) && !a.clockTrusted:
		return noLife
	case neither && noLife != nil:
		return noLife
	case neither && noExpiry != nil:
		return noExpiry
	case neither:
		return errors.New("it has neither expires_in nor expires_on")
	case noLife != nil:
		a.ignored = append(a.ignored, "expires_in")
	case noExpiry != nil:
		a.ignored = append(a.ignored, "expires_on")
	}
	a.parseRefreshIn(f)
	a.parseNotBefore(f)
	return nil
}

func (a *answer) parseExpiresIn(f fields) error {
	in, given, err := f.seconds("expires_in")
	switch {
	case err != nil:
		return err
	case given && in <= 0:
		on, _ := f.time("expires_on")
		return &expiredError{-in, on, "the token is already expired by its expires_in"}
	case in > longestLife:
		return errors.New("expires_in is more than seven days")
	}
	a.expiresIn = in
	return nil
}

func (a *answer) parseExpiresOn(f fields) error {
	on, err := f.time("expires_on")
	a.expiresOn = on
	return err
}

func (a *answer) parseRefreshIn(f fields) {
	in, _, err := f.seconds("refresh_in")
	if err != nil || in < 0 || in > longestLife {
		a.ignored = append(a.ignored, "refresh_in")
		return
	}
	a.refreshIn = in
}

// parseNotBefore leaves not_before out where it is none: not before the expiry, or so late that the token would have
// been given less life than the back end counts left, while the token itself says more or it would be a few minutes in
// all. Otherwise the count may be what is wrong, as from an endpoint whose clock is behind.
func (a *answer) parseNotBefore(f fields) {
	from, err := f.time("not_before")
	senseless := err != nil
	if !from.IsZero() && !a.expiresOn.IsZero() {
		given := a.expiresOn.Sub(from)
		senseless = given <= 0 || given < a.expiresIn && (given < shortestNominal || a.token.lifetime() >= a.expiresIn)
	}
	if senseless {
		a.ignored = append(a.ignored, "not_before")
		return
	}
	a.notBefore = from
}

// fetched is the token with its times, as received at the wall time now.
func (a answer) fetched(now time.Time) (tokencache.Fetched, error) {
	on, left, presumed, err := a.expiry(now)
	if err != nil {
		return tokencache.Fetched{}, err
	}
	f := tokencache.Fetched{
		Token: tokencache.Token{
			Text:      a.text,
			ExpiresOn: on,
			NotBefore: a.notBefore,
			Claims:    a.token.claims,
		},
		Left:      left,
		Presumed:  presumed,
		Counted:   a.expiresIn > 0 && !a.expiresOn.IsZero(),
		Reckoned:  a.expiresOn.IsZero() && !on.Equal(a.token.expiry()),
		RefreshIn: a.refreshIn,
	}
	if f.Token.NotBefore.IsZero() {
		f.Token.NotBefore = a.token.claims.NotBefore
	}
	whole := a.lifetime()
	if !a.plausibleStart(on.Add(-whole), now) {
		whole = 0
	}
	if whole > 0 {
		// A token cannot have more life left than it was given: the clock that says so is behind.
		f.Left = min(f.Left, whole)
	}
	if f.Left > longestLife {
		return tokencache.Fetched{}, fmt.Errorf(
			"the token expires on %s, more than seven days after %s: is the clock right?",
			stamp(on), stamp(now))
	}
	if whole >= shortestNominal && whole <= longestNominal {
		f.Nominal = whole
	}
	if f.RefreshIn >= f.Left {
		f.RefreshIn = 0
	}
	return f, nil
}

// expiry returns when the token expires by the issuer's clock, and the life that it has left: as the answer says or as
// the token says of itself, whichever is earlier.
//
// exp is by the issuer's clock, and so is expires_on, so that their difference needs no clock: what expires_in counts
// is shorter by it. expires_on alone has no other judge than the wall clock, and then exp has none either; but no back
// end hands out what was over for minutes, so that it is the clock that is ahead then, unless it is known to be right.
// Beside expires_in alone, exp is no evidence of the life left, since the wall clock may be wrong: it is passed on as
// the expiry, by which the cache judges while it knows the wall clock to be right.
func (a answer) expiry(now time.Time) (on time.Time, left time.Duration, presumed bool, err error) {
	exp := a.token.expiry()
	switch {
	case a.expiresOn.IsZero():
		on, left = now.Truncate(time.Second).Add(a.expiresIn), a.expiresIn // of whole seconds, as every other expiry
		behind := now.Before(a.token.claims.IssuedAt)                      // then on is too early
		if !exp.IsZero() && (behind || exp.Before(on)) {
			on = exp
		}
		return on, left, false, nil
	case a.expiresIn == 0:
		on = earlier(a.expiresOn, exp)
		left = on.Sub(now)
		if !a.clockTrusted && now.Sub(a.expiresOn) > longExpired {
			return on, presumedLife, true, nil
		}
		if left <= 0 {
			return on, 0, false, &expiredError{-left, on,
				fmt.Sprintf("the token expired on %s and it is %s: is the clock right?", stamp(on), stamp(now))}
		}
		return on, left, false, nil
	}
	on = earlier(a.expiresOn, exp)
	left = a.expiresIn - a.expiresOn.Sub(on)
	if left <= 0 {
		return on, 0, false, &expiredError{-left, time.Time{},
			fmt.Sprintf(
				"the token expired by its own exp on %s, though expires_in and expires_on promise life until %s",
				stamp(on), stamp(a.expiresOn))}
	}
	return on, left, false, nil
}

// earlier returns the earlier of an expiry and another one, which may be zero for none.
func earlier(on, other time.Time) time.Time {
	if !other.IsZero() && other.Before(on) {
		return other
	}
	return on
}

// plausibleStart reports whether from can be the time from which a token is valid that was received at the wall time
// now. It cannot where it is in the future both by the back end's count and by a clock that is known to be right.
func (a answer) plausibleStart(from, now time.Time) bool {
	if a.expiresIn == 0 || a.expiresOn.IsZero() || !a.clockTrusted {
		return true
	}
	counted := a.expiresOn.Add(-a.expiresIn)
	return counted.Sub(now).Abs() > clockTolerance || from.Before(counted.Add(clockTolerance))
}

// lifetime is the life that the token was given, back-dating included, by the answer or else by the
// token itself; zero when neither has it.
func (a answer) lifetime() time.Duration {
	if !a.expiresOn.IsZero() && !a.notBefore.IsZero() {
		return a.expiresOn.Sub(a.notBefore)
	}
	return a.token.lifetime()
}

// forAzidentity is the answer as azidentity reads it without fail: with what was judged here, and nothing else. It
// knows times that it takes and others over which it refuses the token, and takes a member of another case for its own.
func (a answer) forAzidentity(key tokencache.Key, left time.Duration) []byte {
	members := map[string]string{
		"access_token": a.text.Reveal(),
		"token_type":   "Bearer",
		"resource":     key.Resource,
		"expires_in":   strconv.FormatInt(int64(left/time.Second), 10),
	}
	for _, name := range echoNames(key.Selector.Kind) {
		members[name] = key.Selector.ID // as checkIdentity has found; on Arc azidentity looks
	}
	body, err := json.Marshal(members)
	if err != nil {
		panic("source: strings did not marshal: " + err.Error())
	}
	return body
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// fields is a JSON object whose members' names are compared exactly. null counts as absent.
type fields map[string]json.RawMessage

// parseFields returns nil for what is no JSON object.
func parseFields(body []byte) fields {
	var f fields
	if json.Unmarshal(body, &f) != nil {
		return nil
	}
	return f
}

func (f fields) text(name string) (string, error) {
	raw, ok := f[name]
	if !ok {
		return "", nil
	}
	var s string
	if json.Unmarshal(raw, &s) != nil {
		return "", fmt.Errorf("%s is not a string", name)
	}
	return s, nil
}

// digits returns a member's text without its quotes, if it has any: endpoints send numbers as strings.
func (f fields) digits(name string) (string, error) {
	raw := string(f[name])
	if raw == "null" {
		return "", nil
	}
	if strings.HasPrefix(raw, `"`) {
		return f.text(name)
	}
	return raw, nil
}

// seconds reads a duration; a fraction of a second is cut off.
func (f fields) seconds(name string) (_ time.Duration, given bool, _ error) {
	s, err := f.digits(name)
	if err != nil || s == "" {
		return 0, false, err
	}
	n, ok := wholeNumber(s)
	if !ok || n < math.MinInt32 || n > math.MaxInt32 {
		return 0, true, fmt.Errorf("%s is no sane number of seconds", name)
	}
	return time.Duration(n) * time.Second, true, nil
}

// time reads a time in one of the spellings that azidentity accepts, with fractions of a second, which are cut off, and
// and with the twelve hours of App Service's first version. Zero counts as absent.
func (f fields) time(name string) (time.Time, error) {
	s, err := f.digits(name)
	if err != nil || s == "" || s == "0" {
		return time.Time{}, err
	}
	n, ok := wholeNumber(s)
	if !ok {
		at, ok := parseDate(s)
		if !ok {
			return time.Time{}, fmt.Errorf("%s is no time", name)
		}
		n = at.Unix()
	}
	if n < earliestTime || n > latestTime {
		return time.Time{}, fmt.Errorf("%s is no sane time", name)
	}
	return time.Unix(n, 0).UTC(), nil
}

// wholeNumber reads a number in decimal digits and cuts its fraction off.
func wholeNumber(s string) (int64, bool) {
	if n, err := strconv.ParseInt(s, 10, 64); err == nil {
		return n, true
	}
	if strings.Trim(s, "+-.0123456789eE") != "" {
		return 0, false // ParseFloat also reads NaN and hexadecimal digits
	}
	n, err := strconv.ParseFloat(s, 64)
	if err != nil || math.Abs(n) > latestTime {
		return 0, false
	}
	return int64(math.Floor(n)), true
}

func parseDate(s string) (time.Time, bool) {
	for _, layout := range []string{"01/02/2006 15:04:05", "2006-01-02 15:04:05",
		time.RFC3339Nano, "1/2/2006 3:04:05 PM -07:00"} {
		if t, err := time.Parse(layout, s); err == nil {
			return t, true
		}
	}
	return time.Time{}, false
}

// tokenSafe reports whether an Authorization header can carry s: visible ASCII and no space.
func tokenSafe(s string) bool {
	for i := range len(s) {
		if s[i] <= ' ' || s[i] >= 0x7f {
			return false
		}
	}
	return true
}

// A claim is kept whole or not at all: whether two claims differ cannot be seen once they are cut off. These are the
// bytes that one may take, as JSON writes it.
const (
	maxClaimList = 8 << 10 // Entra writes at most 200 groups, which are GUIDs
	maxClaimText = 1024
	maxClaimID   = 128 // it is a GUID; a token, which an endpoint might put there to get it logged, does not fit
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
		if storable(claim.most, claim.text) {
			*claim.in = cmp.Or(claim.text, *claim.in)
		} else {
			t.claims.Omitted = append(t.claims.Omitted, claim.name)
		}
	}
	for _, claim := range []struct {
		name string
		in   *[]string
	}{{"groups", &t.claims.Groups}, {"roles", &t.claims.Roles}, {"wids", &t.claims.WIDs}} {
		if list := c.list(claim.name); storable(maxClaimList, list...) {
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

// lifetime is the life that the token was given, back-dating included; zero when it is not in the claims.
func (t jwt) lifetime() time.Duration {
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
	var values []string
	for _, s := range all {
		if s != "" {
			values = append(values, s)
		}
	}
	return values
}

// storable reports whether logs and screens can show a claim's values as they are, and whether they take at most most
// bytes.
func storable(most int, values ...string) bool {
	for _, s := range values {
		text, err := json.Marshal(s)
		if most -= len(text) + len(","); err != nil || most < 0 || strings.ContainsFunc(s, unprintable) {
			return false
		}
	}
	return true
}

// unprintable reports whether r cannot be shown, or stands for bytes that were no character.
func unprintable(r rune) bool { return !unicode.IsPrint(r) || r == unicode.ReplacementChar }

func (c payloadClaims) time(name string) time.Time {
	var n float64 // RFC 7519 allows fractions of a second
	if json.Unmarshal(c[name], &n) != nil || n < earliestTime || n > latestTime {
		return time.Time{}
	}
	return time.Unix(int64(math.Floor(n)), 0).UTC()
}
