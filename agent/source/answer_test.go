package source

import (
	"strings"
	"testing"
	"time"

	"perceptd/tokencache"
)

func TestTimes(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	on := now.Add(24 * time.Hour)
	jwt := mint(claimsAt(now))
	for _, test := range []struct {
		name    string
		changes object
		now     time.Time // zero: as above
		left    time.Duration
		nominal time.Duration
		on      time.Time // zero: as above
	}{
		{name: "as IMDS", left: 24 * time.Hour, nominal: 24*time.Hour + 5*time.Minute},
		{name: "as App Service", changes: object{"expires_in": nil}, left: 24 * time.Hour, nominal: 24*time.Hour + 5*time.Minute},
		{name: "JSON numbers", changes: object{"expires_in": 3600, "expires_on": on.Unix()}, left: time.Hour, nominal: 24*time.Hour + 5*time.Minute},
		{name: "RFC 3339", changes: object{"expires_in": nil, "expires_on": "2026-11-24T13:00:00.5+01:00"}, left: 24 * time.Hour, nominal: 24*time.Hour + 5*time.Minute},
		{name: "American date", changes: object{"expires_in": nil, "expires_on": "11/24/2026 12:00:00"}, left: 24 * time.Hour, nominal: 24*time.Hour + 5*time.Minute},
		{name: "date and time", changes: object{"expires_in": nil, "expires_on": "2026-11-24 12:00:00"}, left: 24 * time.Hour, nominal: 24*time.Hour + 5*time.Minute},
		{name: "expires_in alone", changes: object{"expires_on": nil, "not_before": nil, "expires_in": "600"}, left: 10 * time.Minute, on: now.Add(10 * time.Minute)},
		{name: "no not_before", changes: object{"not_before": nil}, left: 24 * time.Hour},
		{name: "not_before 0", changes: object{"not_before": "0"}, left: 24 * time.Hour},
		{name: "life told by the JWT", changes: object{"not_before": nil, "access_token": jwt}, left: 24 * time.Hour, nominal: 24*time.Hour + 5*time.Minute},
		{name: "clock years behind", changes: object{"expires_in": nil}, now: now.AddDate(-20, 0, 0), left: 24*time.Hour + 5*time.Minute, nominal: 24*time.Hour + 5*time.Minute},
		{name: "clock years ahead, expires_in wins", now: now.AddDate(20, 0, 0), left: 24 * time.Hour, nominal: 24*time.Hour + 5*time.Minute},
		{name: "28 hours", changes: object{"expires_in": "100800", "expires_on": now.Unix() + 100800}, left: 28 * time.Hour, nominal: 28*time.Hour + 5*time.Minute},
		{name: "an unlikely nominal life is not believed", changes: object{"expires_in": "100801", "expires_on": now.Unix() + 100801}, left: 100801 * time.Second},
		{name: "a very short one neither", changes: object{"expires_in": "10", "expires_on": now.Unix() + 10}, left: 10 * time.Second},
		{name: "null is absent", changes: object{}, left: 24 * time.Hour, nominal: 24*time.Hour + 5*time.Minute},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			if test.now.IsZero() {
				test.now = now
			}
			if test.on.IsZero() {
				test.on = on
				if n, ok := test.changes["expires_on"].(int64); ok {
					test.on = time.Unix(n, 0)
				}
			}
			a, err := parseAnswer([]byte(goodAnswer(now).with(test.changes).String()))
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
		})
	}
}

func TestNullIsAbsent(t *testing.T) {
	t.Parallel()
	now := time.Now()
	body := strings.Replace(goodAnswer(now).with(object{"expires_in": nil, "not_before": nil}).String(),
		"{", `{"expires_in":null,"not_before":null,"client_id":null,"refresh_in":null,`, 1)
	a, err := parseAnswer([]byte(body))
	if err != nil || a.expiresIn != 0 || !a.notBefore.IsZero() || a.echo["client_id"] != "" {
		t.Errorf("got %v", err)
	}
}

func TestRefreshIn(t *testing.T) {
	t.Parallel()
	now := time.Now()
	for told, want := range map[string]time.Duration{"": 0, "0": 0, "43200": 12 * time.Hour, "86400": 0, "100000": 0} {
		a, err := parseAnswer([]byte(goodAnswer(now).with(object{"refresh_in": told}).String()))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := a.fetched(now); err != nil || got.RefreshIn != want {
			t.Errorf("refresh_in %q is %v, %v; want %v", told, got.RefreshIn, err, want)
		}
	}
}

func TestAnswersThatAreNone(t *testing.T) {
	t.Parallel()
	now := time.Now()
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
		{"resource a number", "resource is not a string", object{"resource": 1}},
		{"echo a list", "client_id is not a string", object{"client_id": []string{clientID}}},
		{"no times", "neither expires_in nor expires_on", object{"expires_in": nil, "expires_on": nil}},
		{"empty times", "neither expires_in nor expires_on", object{"expires_in": "", "expires_on": ""}},
		{"expires_in negative", "already expired", object{"expires_in": "-1"}},
		{"expires_in zero", "already expired", object{"expires_in": 0}},
		{"expires_in absurd", "more than seven days", object{"expires_in": "604801"}},
		{"expires_in too long a number", "expires_in is not", object{"expires_in": "99999999999999999999"}},
		{"expires_in a fraction", "expires_in is not", object{"expires_in": 3599.5}},
		{"expires_in words", "expires_in is not", object{"expires_in": canary}},
		{"expires_in true", "expires_in is not", object{"expires_in": true}},
		{"expires_on past", "clock right", object{"expires_in": nil, "expires_on": now.Unix() - 1, "not_before": nil}},
		{"expires_on far", "clock right", object{"expires_in": nil, "expires_on": now.AddDate(1, 0, 0).Unix(), "not_before": nil}},
		{"expires_on words", "expires_on is no time", object{"expires_on": canary}},
		{"expires_on an object", "expires_on is no time", object{"expires_on": object{canary: 1}}},
		{"expires_on a bad string", "expires_on is no time", object{"expires_on": "11/24/2026 1:09:39 AM +00:00"}},
		{"expires_on negative", "no sane time", object{"expires_on": "-5"}},
		{"expires_on a duration", "no sane time", object{"expires_on": "86400"}},
		{"expires_on in milliseconds", "no sane time", object{"expires_on": now.UnixMilli() * 1000}},
		{"not_before words", "not_before is no time", object{"not_before": canary}},
		{"not_before after expires_on", "not before expires_on", object{"not_before": now.Unix() + 100000}},
		{"refresh_in negative", "refresh_in", object{"refresh_in": -1}},
		{"refresh_in absurd", "refresh_in", object{"refresh_in": 604801}},
		{"refresh_in words", "refresh_in", object{"refresh_in": canary}},
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
		"":                                    "not a JSON object",
		"null":                                "not a JSON object",
		"[]":                                  "not a JSON object",
		`"` + canary + `"`:                    "not a JSON object",
		`{"access_token":"` + canary:          "not a JSON object",
		" <!doctype html>" + canary:           "web page",
		goodAnswer(time.Now()).String() + "x": "not a JSON object",
	} {
		m := imds(t, answering(200, body))
		_, err := m.Fetch(t.Context(), system)
		wantFailure(t, err, tokencache.Malformed, words)
	}
}

func FuzzParseAnswer(f *testing.F) {
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	f.Add(goodAnswer(now).String())
	f.Add(goodAnswer(now).with(object{"access_token": mint(claimsAt(now)), "expires_in": nil, "client_id": clientID}).String())
	f.Add(`{"access_token":"a","expires_on":"2026-11-24T12:00:00Z","not_before":null,"refresh_in":1}`)
	f.Add(`{"access_token":"a","expires_on":-1}`)
	f.Add("<html>")
	f.Fuzz(func(t *testing.T, body string) {
		a, err := parseAnswer([]byte(body))
		if err != nil {
			return
		}
		got, err := a.fetched(now)
		if err != nil {
			return
		}
		if got.Token.Text.IsZero() || !tokenSafe(got.Token.Text.Reveal()) {
			t.Error("a token that cannot be used")
		}
		if got.Left <= 0 || got.Left > longestLife || got.RefreshIn < 0 || got.RefreshIn >= got.Left || got.Token.ExpiresOn.IsZero() {
			t.Errorf("left %v, refresh in %v, expires on %v", got.Left, got.RefreshIn, got.Token.ExpiresOn)
		}
		if n := got.Nominal; n != 0 && (n < shortestNominal || n > longestNominal || got.Left > n) {
			t.Errorf("nominal life %v with %v left", n, got.Left)
		}
	})
}
