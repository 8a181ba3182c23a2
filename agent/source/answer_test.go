package source

import (
	"slices"
	"strings"
	"testing"
	"time"

	"perceptd/tokencache"
)

func TestTimes(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	on := now.Add(24 * time.Hour)
	jwt, ahead := makeJWT(claimsAt(now)), makeJWT(claimsAt(now).with(object{"iat": now.Unix() + 12*3600,
		"nbf": now.Unix() + 12*3600}))
	for _, test := range []struct {
		name    string
		changes object
		now     time.Time // zero: as above
		left    time.Duration
		nominal time.Duration
		on      time.Time // zero: as above
		ignored string    // fields
	}{
		{name: "as IMDS", left: 24 * time.Hour, nominal: 24*time.Hour + 5*time.Minute},
		{name: "as App Service", changes: object{"expires_in": nil}, left: 24 * time.Hour,
			nominal: 24*time.Hour + 5*time.Minute},
		{name: "JSON numbers", changes: object{"expires_in": 3600, "expires_on": on.Unix()}, left: time.Hour,
			nominal: 24*time.Hour + 5*time.Minute},
		{name: "RFC 3339", changes: object{"expires_in": nil, "expires_on": "2026-11-24T13:00:00.5+01:00"},
			left: 24 * time.Hour, nominal: 24*time.Hour + 5*time.Minute},
		{name: "American date", changes: object{"expires_in": nil, "expires_on": "11/24/2026 12:00:00"},
			left: 24 * time.Hour, nominal: 24*time.Hour + 5*time.Minute},
		{name: "date and time", changes: object{"expires_in": nil, "expires_on": "2026-11-24 12:00:00"},
			left: 24 * time.Hour, nominal: 24*time.Hour + 5*time.Minute},
		{name: "expires_in alone", changes: object{"expires_on": nil, "not_before": nil, "expires_in": "600"},
			left: 10 * time.Minute, on: now.Add(10 * time.Minute)},
		{name: "no not_before", changes: object{"not_before": nil}, left: 24 * time.Hour},
		{name: "not_before 0", changes: object{"not_before": "0"}, left: 24 * time.Hour},
		{name: "life told by the JWT", changes: object{"not_before": nil, "access_token": jwt}, left: 24 * time.Hour,
			nominal: 24*time.Hour + 5*time.Minute},
		{name: "clock years behind", changes: object{"expires_in": nil}, now: now.AddDate(-20, 0, 0),
			left: 24*time.Hour + 5*time.Minute, nominal: 24*time.Hour + 5*time.Minute},
		{name: "clock years ahead, expires_in wins",
			now: now.AddDate(20, 0, 0), left: 24 * time.Hour, nominal: 24*time.Hour + 5*time.Minute},
		{name: "28 hours", changes: object{"expires_in": "100800", "expires_on": now.Unix() + 100800},
			left: 28 * time.Hour, nominal: 28*time.Hour + 5*time.Minute},
		{name: "an unlikely nominal life is not believed",
			changes: object{"expires_in": "100801", "expires_on": now.Unix() + 100801}, left: 100801 * time.Second},
		{name: "a very short one neither", changes: object{"expires_in": "10", "expires_on": now.Unix() + 10},
			left: 10 * time.Second},
		{name: "half a second", changes: object{"expires_in": 3600.5}, left: time.Hour,
			nominal: 24*time.Hour + 5*time.Minute},
		{name: "half a second in words", changes: object{"expires_in": "3600.0"}, left: time.Hour,
			nominal: 24*time.Hour + 5*time.Minute},
		{name: "expires_on with a fraction", changes: object{"expires_in": nil, "expires_on": float64(on.Unix()) + 0.5},
			left: 24 * time.Hour, nominal: 24*time.Hour + 5*time.Minute},
		{name: "twelve hours", changes: object{"expires_in": nil, "expires_on": "11/24/2026 12:00:00 PM +00:00"},
			left: 24 * time.Hour, nominal: 24*time.Hour + 5*time.Minute},
		{name: "twelve hours, of App Service's first version",
			changes: object{"expires_in": nil,
				"expires_on": "11/24/2026 2:00:00 PM +02:00"}, left: 24 * time.Hour, nominal: 24*time.Hour +
				5*time.Minute},
		{name: "expires_in 0", changes: object{"expires_in": "0"}, left: 24 * time.Hour,
			nominal: 24*time.Hour + 5*time.Minute, ignored: "expires_in"},
		{name: "expires_in negative", changes: object{"expires_in": -1}, left: 24 * time.Hour,
			nominal: 24*time.Hour + 5*time.Minute, ignored: "expires_in"},
		{name: "expires_in in milliseconds", changes: object{"expires_in": 86400000}, left: 24 * time.Hour,
			nominal: 24*time.Hour + 5*time.Minute, ignored: "expires_in"},
		{name: "expires_on in milliseconds", changes: object{"expires_on": on.UnixMilli()}, left: 24 * time.Hour,
			ignored: "expires_on"},
		{name: "expires_on in 2200", changes: object{"expires_on": latestTime + 1}, left: 24 * time.Hour,
			ignored: "expires_on"},
		{name: "expires_on in 9999", changes: object{"expires_on": 253402300799}, left: 24 * time.Hour,
			ignored: "expires_on"},
		{name: "the JWT's times in 2200",
			changes: object{"not_before": nil,
				"access_token": makeJWT(claimsAt(now).with(object{"iat": latestTime + 1, "nbf": latestTime + 1,
					"exp": latestTime + 1}))}, left: 24 * time.Hour},
		{name: "expires_on a duration", changes: object{"expires_on": "86400"}, left: 24 * time.Hour,
			ignored: "expires_on"},
		{name: "expires_on words", changes: object{"expires_on": canary}, left: 24 * time.Hour, ignored: "expires_on"},
		{name: "refresh_in with a fraction", changes: object{"refresh_in": 43200.5}, left: 24 * time.Hour,
			nominal: 24*time.Hour + 5*time.Minute},
		{name: "refresh_in negative", changes: object{"refresh_in": -1}, left: 24 * time.Hour,
			nominal: 24*time.Hour + 5*time.Minute, ignored: "refresh_in"},
		{name: "refresh_in of a month", changes: object{"refresh_in": 30 * 86400}, left: 24 * time.Hour,
			nominal: 24*time.Hour + 5*time.Minute, ignored: "refresh_in"},
		{name: "refresh_in words", changes: object{"refresh_in": canary}, left: 24 * time.Hour,
			nominal: 24*time.Hour + 5*time.Minute, ignored: "refresh_in"},
		{name: "not_before words", changes: object{"not_before": canary}, left: 24 * time.Hour, ignored: "not_before"},
		{name: "not_before after the expiry", changes: object{"not_before": now.Unix() + 100000}, left: 24 * time.Hour,
			ignored: "not_before"},
		{name: "not_before at the expiry", changes: object{"not_before": on.Unix()}, left: 24 * time.Hour,
			ignored: "not_before"},
		{name: "not_before within the life that is counted", changes: object{"not_before": now.Unix() + 60},
			left: 24*time.Hour - time.Minute, nominal: 24*time.Hour - time.Minute},
		{name: "not_before hours ahead of the count and of the clock",
			changes: object{"not_before": now.Unix() + 12*3600}, left: 24 * time.Hour},
		{name: "the same by a clock that says otherwise than the count",
			changes: object{"not_before": now.Unix() + 12*3600}, now: now.Add(-time.Hour), left: 12 * time.Hour,
			nominal: 12 * time.Hour},
		{name: "the same by the JWT alone", changes: object{"not_before": nil, "access_token": ahead},
			left: 24 * time.Hour},
		{name: "the same against the JWT's word", changes: object{"not_before": now.Unix() + 60, "access_token": jwt},
			left: 24 * time.Hour, nominal: 24*time.Hour + 5*time.Minute, ignored: "not_before"},
		{name: "not_before a minute before the expiry", changes: object{"not_before": on.Unix() - 60},
			left: 24 * time.Hour, ignored: "not_before"},
		{name: "not_before senseless, life told by the JWT", changes: object{"not_before": canary, "access_token": jwt},
			left: 24 * time.Hour, nominal: 24*time.Hour + 5*time.Minute, ignored: "not_before"},
		{name: "all of them", changes: object{"not_before": canary, "refresh_in": canary, "expires_in": canary},
			left: 24 * time.Hour, ignored: "expires_in refresh_in not_before"},
		{name: "null is absent", changes: object{}, left: 24 * time.Hour, nominal: 24*time.Hour + 5*time.Minute},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			if test.now.IsZero() {
				test.now = now
			}
			if test.on.IsZero() {
				test.on = on
				if n, ok := test.changes["expires_on"].(int64); ok && n < latestTime {
					test.on = time.Unix(n, 0)
				}
			}
			a, err := parseAnswer(fieldsOf(goodAnswer(now).with(test.changes)), true)
			if err != nil {
				t.Fatal(err)
			}
			got, err := a.fetched(test.now)
			if err != nil {
				t.Fatal(err)
			}
			if got.Left != test.left || got.Nominal != test.nominal || !got.Token.ExpiresOn.Equal(test.on) {
				t.Errorf("left %v of %v, expires on %v\nwant %v of %v on %v",
					got.Left, got.Nominal, got.Token.ExpiresOn, test.left, test.nominal, test.on)
			}
			if ignored := strings.Join(a.ignored, " "); ignored != test.ignored {
				t.Errorf("ignored %q, want %q", ignored, test.ignored)
			}
		})
	}
}

func TestNullIsAbsent(t *testing.T) {
	t.Parallel()
	now := time.Now()
	body := strings.Replace(goodAnswer(now).with(object{"expires_in": nil, "not_before": nil}).String(),
		"{", `{"expires_in":null,"not_before":null,"client_id":null,"refresh_in":null,`, 1)
	a, err := parseAnswer(parseFields([]byte(body)), true)
	if err != nil || a.expiresIn != 0 || !a.notBefore.IsZero() || a.echo["client_id"] != "" {
		t.Errorf("got %v", err)
	}
}

func TestRefreshIn(t *testing.T) {
	t.Parallel()
	now := time.Now()
	for told, want := range map[string]time.Duration{"": 0, "0": 0, "43200": 12 * time.Hour, "86400": 0, "100000": 0} {
		a, err := parseAnswer(fieldsOf(goodAnswer(now).with(object{"refresh_in": told})), true)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := a.fetched(now); err != nil || got.RefreshIn != want {
			t.Errorf("refresh_in %q is %v, %v; want %v", told, got.RefreshIn, err, want)
		}
	}
}

// What an endpoint repeats in no text is no word of what it answered for.
func TestEchoesThatAreNone(t *testing.T) {
	t.Parallel()
	now := time.Now()
	for name, echo := range map[string]any{"resource": 1, "client_id": []string{objectID}, "object_id": 7,
		"msi_res_id": object{}, "mi_res_id": true} {
		a, err := parseAnswer(fieldsOf(goodAnswer(now).with(object{name: echo})), true)
		if err != nil || !slices.Equal(a.ignored, []string{name}) {
			t.Errorf("%s %v: %v, ignored %q", name, echo, err, a.ignored)
			continue
		}
		if failed := a.checkIdentity(target{form: IMDS}, byClient); failed != nil {
			t.Errorf("%s %v: %v", name, echo, failed)
		}
		if failed := a.checkIdentity(target{form: Arc}, byClient); failed == nil {
			t.Errorf("%s %v: Arc's silence is taken for a word", name, echo)
		}
	}
}

func TestAnswersThatAreNone(t *testing.T) {
	t.Parallel()
	now := time.Now()
	only := func(name string, value any) object {
		changes := object{"expires_in": nil, "expires_on": nil, "not_before": nil}
		changes[name] = value
		return changes
	}
	for _, test := range []struct {
		name, words string
		changes     object
	}{
		{"no token", "no access_token", object{"access_token": nil}},
		{"empty token", "no access_token", object{"access_token": ""}},
		{"token a number", "access_token is not a string", object{"access_token": 7}},
		{"token of two lines", "Authorization header", object{"access_token": canary + "\r\nX: y"}},
		{"token with a space", "Authorization header", object{"access_token": canary + " " + canary}},
		{"token beyond ASCII", "Authorization header", object{"access_token": canary + "é"}},
		{"another type", "token_type", object{"token_type": "pop " + canary}},
		{"type a list", "token_type is not a string", object{"token_type": []string{canary}}},
		{"no times", "neither expires_in nor expires_on", object{"expires_in": nil, "expires_on": nil}},
		{"empty times", "neither expires_in nor expires_on", object{"expires_in": "", "expires_on": ""}},
		{"expires_in negative", "already expired", only("expires_in", "-1")},
		{"expires_in zero", "already expired", only("expires_in", 0)},
		{"expires_in absurd", "more than seven days", only("expires_in", "604801")},
		{"expires_in too long a number", "expires_in is no", only("expires_in", "99999999999999999999")},
		{"expires_in not a number", "expires_in is no", only("expires_in", "NaN")},
		{"expires_in words", "expires_in is no", only("expires_in", canary)},
		{"expires_in true", "expires_in is no", only("expires_in", true)},
		{"expires_on just past", "clock right", only("expires_on", now.Unix()-1)},
		{"expires_on far", "clock right", only("expires_on", now.AddDate(1, 0, 0).Unix())},
		{"expires_on words", "expires_on is no time", only("expires_on", canary)},
		{"expires_on an object", "expires_on is no time", only("expires_on", object{canary: 1})},
		{"expires_on of a 13th month", "expires_on is no time", only("expires_on", "13/24/2026 1:09:39 AM +00:00")},
		{"expires_on negative", "no sane time", only("expires_on", "-5")},
		{"expires_on a duration", "no sane time", only("expires_on", "86400")},
		{"expires_on in microseconds", "no sane time", only("expires_on", now.UnixMicro())},
		{"both senseless", "expires_in is no", object{"expires_in": canary, "expires_on": canary}},
		{"another resource", "another resource", object{"resource": "https://storage.azure.com/" + canary}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			m := imds(t, answering(200, goodAnswer(now).with(test.changes).String()))
			_, err := m.Fetch(t.Context(), system)
			wantFailure(t, err, tokencache.Malformed, test.words)
		})
	}
}

func TestBodiesThatAreNone(t *testing.T) {
	t.Parallel()
	for body, words := range map[string]string{
		"":                                    "answered 200 with nothing",
		"null":                                "no JSON object",
		"[]":                                  "no JSON object",
		`"` + canary + `"`:                    "no JSON object",
		`{"access_token":"` + canary:          "no JSON object",
		" <!doctype html>" + canary:           "answered 200 with a web page",
		"\ufeff<?xml?>" + canary:              "answered 200 with a web page, or XML",
		goodAnswer(time.Now()).String() + "x": "no JSON object",
	} {
		m := imds(t, answering(200, body))
		_, err := m.Fetch(t.Context(), system)
		wantFailure(t, err, tokencache.Unreachable, words)
	}
}

// exp is by the issuer's clock, which this device's may not agree with: none of these but those that say so depends on
// it.
func TestOwnExpiry(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC) // by the issuer's clock
	day := now.Add(24 * time.Hour)
	const right, behind, ahead = 0, -3 * 365 * 24 * time.Hour, 3 * 24 * time.Hour
	counted := object{}
	onAlone := object{"expires_in": nil}
	inAlone := object{"expires_on": nil, "not_before": nil}
	for _, test := range []struct {
		name   string
		answer object
		exp    time.Time // zero: there is none
		wall   time.Duration
		left   time.Duration // zero: refused
		on     time.Time
	}{
		{"none", counted, time.Time{}, right, 24 * time.Hour, day},
		{"that of the answer", counted, day, right, 24 * time.Hour, day},
		{"later than the answer's", counted, day.Add(time.Hour), right, 24 * time.Hour, day},
		{"earlier than the answer's", counted, now.Add(time.Hour), right, time.Hour, now.Add(time.Hour)},
		{"earlier, clock behind", counted, now.Add(time.Hour), behind, time.Hour, now.Add(time.Hour)},
		{"earlier, clock ahead", counted, now.Add(time.Hour), ahead, time.Hour, now.Add(time.Hour)},
		{"an hour ago", counted, now.Add(-time.Hour), right, 0, time.Time{}},
		{"an hour ago, clock behind", counted, now.Add(-time.Hour), behind, 0, time.Time{}},
		{"just now", counted, now, right, 0, time.Time{}},

		{"expires_on alone, earlier than it", onAlone, now.Add(time.Hour), right, time.Hour, now.Add(time.Hour)},
		{"expires_on alone, an hour ago", onAlone, now.Add(-time.Hour), right, 0, time.Time{}},
		{"expires_on alone, clock behind: no more than it was given",
			onAlone, day, behind, 24*time.Hour + 5*time.Minute, day},
		{"expires_on alone, a clock that is said to be right and three days ahead",
			onAlone, day, ahead, 0, time.Time{}},

		{"expires_in alone", inAlone, day, right, 24 * time.Hour, day},
		{"expires_in alone, clock ahead: no reason to refuse it, and the cache knows when",
			inAlone, day, ahead, 24 * time.Hour, day},
		{"expires_in alone, clock behind the token", inAlone, day, behind, 24 * time.Hour, day},
		{"expires_in alone, an hour ago: for the cache to judge by a clock it knows", inAlone, now.Add(-time.Hour),
			right, 24 * time.Hour, now.Add(-time.Hour)},
		{"expires_in alone, later than it", inAlone, day.Add(time.Hour), right, 24 * time.Hour, day},
		{"expires_in alone, none", inAlone, time.Time{}, right, 24 * time.Hour, day},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			claims := claimsAt(now).with(object{"exp": nil})
			if !test.exp.IsZero() {
				issued := min(now.Unix(), test.exp.Unix()-86400) - 300
				claims = claims.with(object{"exp": test.exp.Unix(), "iat": issued, "nbf": issued})
			}
			a, err := parseAnswer(fieldsOf(goodAnswer(now).with(test.answer).and("access_token", makeJWT(claims))),
				true)
			if err != nil {
				t.Fatal(err)
			}
			got, err := a.fetched(now.Add(test.wall))
			if test.left == 0 {
				if err == nil {
					t.Errorf("%v left of a token that has expired", got.Left)
				}
				return
			}
			if err != nil || got.Left != test.left || !got.Token.ExpiresOn.Equal(test.on) {
				t.Errorf("%v left, expires on %v, %v\nwant %v on %v",
					got.Left, got.Token.ExpiresOn, err, test.left, test.on)
			}
		})
	}
}

// The back end's word that a token is over counts against a clock that may be behind.
func TestLifeThatIsOverByTheBackEndsCount(t *testing.T) {
	t.Parallel()
	now := time.Now()
	for _, in := range []any{"0", 0, -1, "-90000"} {
		body := fieldsOf(goodAnswer(now).and("expires_in", in))
		if _, err := parseAnswer(body, false); err == nil || !strings.Contains(err.Error(), "already expired") {
			t.Errorf("expires_in %v, clock not known: %v", in, err)
		}
		if a, err := parseAnswer(body, true); err != nil || a.expiresIn != 0 || len(a.ignored) != 1 {
			t.Errorf("expires_in %v, clock known: %v", in, err)
		}
		over, err := parseAnswer(fieldsOf(goodAnswer(now.Add(-86402*time.Second)).and("expires_in", in)), true)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := over.fetched(now); err == nil {
			t.Errorf("expires_in %v, and over by a clock that is known: %v left", in, got.Left)
		}
	}
}

// A clock that is ahead refuses nothing: what an endpoint hands out, with an expiry alone, was not over for minutes.
func TestExpiryByAClockThatIsAhead(t *testing.T) {
	t.Parallel()
	now := time.Now().Truncate(time.Second)
	past := makeJWT(claimsAt(now).with(object{"exp": now.Unix() - 3600, "iat": now.Unix() - 90000,
		"nbf": now.Unix() - 90000}))
	for _, test := range []struct {
		name    string
		changes object
		ahead   time.Duration
		left    time.Duration // zero: refused
	}{
		{"hours", nil, 5 * time.Hour, 19 * time.Hour},
		{"days", nil, 72 * time.Hour, presumedLife},
		{"years", nil, 20 * 365 * 24 * time.Hour, presumedLife},
		{"a little, at the token's end: it may be over", nil, 24*time.Hour + time.Minute, 0},
		{"right, but the token's own exp is past", object{"access_token": past}, 0, 0},
		{"counted by the back end", object{"expires_in": "3600"}, 72 * time.Hour, time.Hour},
		{"over by the back end's count", object{"expires_in": "0"}, 72 * time.Hour, 0},
	} {
		a, err := parseAnswer(fieldsOf(goodAnswer(now).with(object{"expires_in": nil}).with(test.changes)), false)
		var got tokencache.Fetched
		if err == nil {
			got, err = a.fetched(now.Add(test.ahead))
		}
		if (err == nil) != (test.left > 0) || got.Left != test.left {
			t.Errorf("%s: %v left, %v; want %v", test.name, got.Left, err, test.left)
		}
	}
}

// An exp that is none says nothing: one that is not after the token's own beginning, or no time.
func TestSenselessOwnExpiry(t *testing.T) {
	t.Parallel()
	now := time.Now()
	for _, exp := range []any{0, -1, "soon", now.Unix() - 400, now.UnixMilli()} {
		a, err := parseAnswer(fieldsOf(goodAnswer(now).and("access_token", makeJWT(claimsAt(now).and("exp", exp)))),
			true)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := a.fetched(now); err != nil || got.Left != 24*time.Hour {
			t.Errorf("exp %v: %v left, %v", exp, got.Left, err)
		}
	}
}

func FuzzParseAnswer(f *testing.F) {
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	f.Add(goodAnswer(now).String())
	f.Add(goodAnswer(now).with(object{"access_token": makeJWT(claimsAt(now)), "expires_in": nil,
		"client_id": clientID}).String())
	f.Add(`{"access_token":"a","expires_on":"2026-11-24T12:00:00Z","not_before":null,"refresh_in":1}`)
	f.Add(`{"access_token":"a","expires_on":-1}`)
	f.Add(`{"access_token":"a","expires_in":3599.5,"expires_on":"11/24/2026 1:09:39 AM +00:00","refresh_in":-1,` +
		`"not_before":"never"}`)
	f.Add(goodAnswer(now).and("access_token", makeJWT(claimsAt(now).and("exp", now.Unix()+3600))).String())
	f.Add(goodAnswer(now).with(object{"access_token": makeJWT(claimsAt(now).and("exp", now.Unix()-200)),
		"expires_on": nil}).String())
	f.Add("<html>")
	f.Fuzz(func(t *testing.T, body string) {
		a, err := parseAnswer(parseFields([]byte(body)), true)
		if err != nil {
			return
		}
		got, err := a.fetched(now)
		if err != nil {
			return
		}
		if exp := a.token.expiry(); got.Counted && !exp.IsZero() && got.Token.ExpiresOn.After(exp) {
			t.Errorf("expires on %v, after the token's own exp %v", got.Token.ExpiresOn, exp)
		}
		if again := parseFields(a.forAzidentity(system, got.Left)); again == nil {
			t.Error("azidentity gets no JSON object")
		}
		if got.Token.Text.IsZero() || !tokenSafe(got.Token.Text.Reveal()) {
			t.Error("a token that cannot be used")
		}
		if got.Left <= 0 || got.Left > longestLife || got.RefreshIn < 0 || got.RefreshIn >= got.Left ||
			got.Token.ExpiresOn.IsZero() {
			t.Errorf("left %v, refresh in %v, expires on %v", got.Left, got.RefreshIn, got.Token.ExpiresOn)
		}
		if n := got.Nominal; n != 0 && (n < shortestNominal || n > longestNominal || got.Left > n) {
			t.Errorf("nominal life %v with %v left", n, got.Left)
		}
	})
}
