package source

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"perceptd/tokencache"
)

const (
	longestLife     = 7 * 24 * time.Hour // no managed-identity token lives a third as long
	shortestNominal = 10 * time.Minute
	longestNominal  = 28*time.Hour + 5*time.Minute // the longest known, and the five minutes of back-dating

	earliestTime = 978307200    // 2001, in Unix seconds: less is a duration that somebody took for a time
	latestTime   = 253402300799 // the end of the year 9999
)

// answer is the body of a token endpoint's answer under status 200, field by field.
type answer struct {
	text      tokencache.Secret
	token     jwt               // what the token says of itself; zero for an opaque one
	expiresIn time.Duration     // 0 when absent
	expiresOn time.Time         // zero when absent
	notBefore time.Time         // zero when absent
	refreshIn time.Duration     // 0 when absent
	resource  string            // empty when absent
	echo      map[string]string // by the names that echoes gives; empty when absent
}

// echoes are the fields in which an endpoint says which identity it answered for, when it was asked
// with a selector of that kind.
func echoes(kind tokencache.SelectorKind) []string {
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

// parseAnswer reads the body of an answer. Its errors are in our words: none quotes the body.
func parseAnswer(body []byte) (answer, error) {
	var f fields
	if err := json.Unmarshal(body, &f); err != nil || f == nil {
		if strings.HasPrefix(strings.TrimSpace(string(body[:min(len(body), 512)])), "<") {
			return answer{}, errors.New("it is a web page: what answers is no token endpoint")
		}
		return answer{}, errors.New("it is not a JSON object")
	}
	var a answer
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
	if a.resource, err = f.text("resource"); err != nil {
		return answer{}, err
	}
	a.echo = make(map[string]string)
	for _, kind := range []tokencache.SelectorKind{tokencache.ClientID, tokencache.ObjectID, tokencache.ResourceID} {
		for _, name := range echoes(kind) {
			if a.echo[name], err = f.text(name); err != nil {
				return answer{}, err
			}
		}
	}
	return a, a.parseTimes(f)
}

func (a *answer) parseTimes(f fields) error {
	var err error
	var given bool
	if a.expiresIn, given, err = f.seconds("expires_in"); err != nil {
		return err
	}
	if given && a.expiresIn <= 0 {
		return errors.New("the token is already expired by its expires_in")
	}
	if a.expiresIn > longestLife {
		return errors.New("expires_in is more than seven days")
	}
	if a.refreshIn, _, err = f.seconds("refresh_in"); err != nil {
		return err
	}
	if a.refreshIn < 0 || a.refreshIn > longestLife {
		return errors.New("refresh_in is negative or more than seven days")
	}
	if a.expiresOn, err = f.time("expires_on"); err != nil {
		return err
	}
	if a.notBefore, err = f.time("not_before"); err != nil {
		return err
	}
	switch {
	case a.expiresIn == 0 && a.expiresOn.IsZero():
		return errors.New("it has neither expires_in nor expires_on")
	case !a.expiresOn.IsZero() && !a.notBefore.IsZero() && !a.notBefore.Before(a.expiresOn):
		return errors.New("not_before is not before expires_on")
	}
	return nil
}

// fetched is the token with its times, as received at the wall time now.
func (a answer) fetched(now time.Time) (tokencache.Fetched, error) {
	f := tokencache.Fetched{
		Token: tokencache.Token{
			Text:      a.text,
			ExpiresOn: a.expiresOn,
			NotBefore: a.notBefore,
			Claims:    a.token.claims,
		},
		Left:      a.expiresIn,
		Counted:   a.expiresIn > 0 && !a.expiresOn.IsZero(),
		RefreshIn: a.refreshIn,
	}
	if f.Token.ExpiresOn.IsZero() {
		f.Token.ExpiresOn = now.Add(a.expiresIn)
	}
	if f.Token.NotBefore.IsZero() {
		f.Token.NotBefore = a.token.claims.NotBefore
	}
	whole := a.whole()
	if f.Left == 0 {
		f.Left = a.expiresOn.Sub(now)
	}
	if whole > 0 {
		// A token cannot have more life left than it was given: the clock that says so is behind.
		f.Left = min(f.Left, whole)
	}
	switch {
	case f.Left <= 0:
		return tokencache.Fetched{}, fmt.Errorf("the token expired on %s and it is %s: is the clock right?",
			stamp(a.expiresOn), stamp(now))
	case f.Left > longestLife:
		return tokencache.Fetched{}, fmt.Errorf("the token expires on %s, more than seven days after %s: is the clock right?",
			stamp(a.expiresOn), stamp(now))
	}
	if whole >= shortestNominal && whole <= longestNominal {
		f.Nominal = whole
	}
	if f.RefreshIn >= f.Left {
		f.RefreshIn = 0
	}
	return f, nil
}

// whole is the life that the token was given, back-dating included, by the answer or else by the
// token itself; zero when neither tells.
func (a answer) whole() time.Duration {
	if !a.expiresOn.IsZero() && !a.notBefore.IsZero() {
		return a.expiresOn.Sub(a.notBefore)
	}
	if !a.token.expiresOn.IsZero() && !a.token.claims.NotBefore.IsZero() {
		return max(0, a.token.expiresOn.Sub(a.token.claims.NotBefore))
	}
	return 0
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// fields is a JSON object whose members' names are compared exactly. null counts as absent.
type fields map[string]json.RawMessage

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

func (f fields) seconds(name string) (_ time.Duration, given bool, _ error) {
	s, err := f.digits(name)
	if err != nil || s == "" {
		return 0, false, err
	}
	n, err := strconv.ParseInt(s, 10, 32)
	if err != nil {
		return 0, true, fmt.Errorf("%s is not a sane whole number of seconds", name)
	}
	return time.Duration(n) * time.Second, true, nil
}

// time reads a time in one of the spellings that azidentity accepts. Zero counts as absent.
func (f fields) time(name string) (time.Time, error) {
	s, err := f.digits(name)
	if err != nil || s == "" || s == "0" {
		return time.Time{}, err
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
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

func parseDate(s string) (time.Time, bool) {
	for _, layout := range []string{"01/02/2006 15:04:05", "2006-01-02 15:04:05", time.RFC3339Nano} {
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
