package server

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"perceptd/agent/api"
	"perceptd/tokencache"
)

// report returns the text of a report of a refused token.
func report(more string) string {
	return post(api.PathRejected, `{"resource":"https://vault.azure.net"`+more+`}`)
}

func causes(a api.Advice) []api.Cause {
	var all []api.Cause
	for _, finding := range a.Findings {
		all = append(all, finding.Cause)
	}
	return all
}

func TestRejected(t *testing.T) {
	t.Parallel()
	challenge := base64.StdEncoding.EncodeToString([]byte(fmt.Sprintf(
		`{"access_token":{"nbf":{"essential":true,"value":"%d"}}}`, time.Now().Unix())))
	for _, test := range []struct {
		name, report string
		change       tokencache.Effect
		newer        bool // the back end has one by then
		likeliest    api.Cause
		retry, later bool
		fetched      api.Outcome
	}{
		{"nothing known", `,"status":403`, "", false, api.CauseStaleClaims, false, true, ""},
		{"stale", `,"status":403`, tokencache.Changed, false, api.CauseStale, false, true, ""},
		{"withheld", `,"status":403`, tokencache.Revoked, false, api.CauseStale, false, true, ""},
		{"another token", `,"status":401,"token_sha256":"` + strings.Repeat("0f", 32) + `"`, "", false,
			api.CauseOldToken, true, false, ""},
		{"a challenge", `,"status":401,"claims":"` + challenge + `"`, "", false, api.CauseRevoked, false, true,
			api.OutcomeUnchanged},
		{"a challenge that helps", `,"status":401,"claims":"Bearer claims=\"` + challenge + `\""`, "", true,
			api.CauseRevoked, true, false, api.OutcomeNewer},
		{"the identity by name", `,"status":403,"identity":"vision"`, "", false, api.CauseUnknownToken, true, false,
			""},
	} {
		back := newRolling(2 * time.Hour)
		d := newDaemon(t, back.fetch)
		socket := d.tokens("")
		send(t, socket, get(v1Vault))
		if test.change != "" {
			d.change(test.change, time.Hour)
		}
		if test.newer {
			back.roll("", time.Minute)
		}
		got := send(t, socket, report(test.report))
		if got.status != 200 || got.header.Get("Content-Type") != "application/json" ||
			strings.Contains(got.body, "canary") {
			t.Fatalf("%s: %+v", test.name, got)
		}
		advice := decoded[api.Advice](t, got.body)
		if len(advice.Findings) == 0 || advice.Findings[0].Cause != test.likeliest || advice.Findings[0].Detail == "" ||
			advice.Findings[0].Action == "" {
			t.Errorf("%s: %q", test.name, causes(advice))
		}
		if advice.Retry != test.retry || advice.RetryOn.IsZero() == test.later || advice.Fetched != test.fetched ||
			advice.Resource != vault {
			t.Errorf("%s: %+v", test.name, advice)
		}
		if test.likeliest == api.CauseUnknownToken {
			if advice.SHA256 != "" || advice.Permissions != (api.Permissions{}) || advice.Identity != "vision" {
				t.Errorf("%s: %+v", test.name, advice)
			}
			continue
		}
		if advice.Identity != "device" || len(advice.SHA256) != 64 || advice.Permissions.State == "" ||
			!slices.Equal(advice.Claims.Groups, []string{"group-1"}) {
			t.Errorf("%s: %+v", test.name, advice)
		}
	}
}

func TestRejectedRefuses(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	socket := d.tokens("")
	for _, test := range []struct {
		name, text string
		status     int
		code       api.Code
		want       string
	}{
		{"nothing", post(api.PathRejected, ""), 400, api.CodeBadRequest, "status is 0"},
		{"a status that is no refusal", report(`,"status":500`), 400, api.CodeBadRequest, "status is 500"},
		{"a status in words", report(`,"status":"403"`), 400, api.CodeBadRequest,
			`field "status" is a text, and must be a whole number`},
		{"a digest that is none", report(`,"status":403,"token_sha256":"` + canary + `"`), 400, api.CodeBadRequest,
			"64 hexadecimal"},
		{"claims that are none", report(`,"status":401,"claims":"revoked"`), 400, api.CodeBadRequest,
			`field "claims" is no claims challenge`},
		{"claims that say nothing", report(`,"status":401,"claims":"{\"access_token\":7}"`), 400, api.CodeBadRequest,
			"claims challenge"},
		{"an unknown field", report(`,"token":"` + canary + `"`), 400, api.CodeBadRequest, `unknown field "token"`},
		{"no resource", post(api.PathRejected, `{"status":403}`), 400, api.CodeBadRequest, "App ID URI"},
		{"an unknown identity", report(`,"status":403,"identity":"nobody"`), 400, api.CodeUnknownIdentity,
			"Identity not found"},
		{"not granted", post(api.PathRejected, `{"resource":"https://not.granted","status":403}`), 403,
			api.CodeNotGranted, "[[grant]]"},
		{"too large", report(`,"claims":"` + strings.Repeat("e", maxBody) + `"`), 400, api.CodeBadRequest,
			"larger than"},
		{"a query", post(api.PathRejected+"?x=1", ""), 400, api.CodeBadRequest, "no query parameters"},
	} {
		got := send(t, socket, test.text)
		checkRefusal(t, test.name, got, test.status, test.code)
		if detail := got.problem(t).Detail; !strings.Contains(detail, test.want) {
			t.Errorf("%s: %q, want %q", test.name, detail, test.want)
		}
	}
	if d.denied.Load() != 1 {
		t.Errorf("%d denials", d.denied.Load())
	}
}

func TestRejectedTooOften(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	socket, module := d.tokens(""), d.tokens("vision")
	for {
		got := send(t, socket, report(`,"status":403`))
		if got.status == 200 {
			continue
		}
		checkRefusal(t, "too often", got, 429, api.CodeBusy)
		if after := got.header.Get("Retry-After"); after == "" || after == "0" || after == "2" {
			t.Errorf("Retry-After %q", after)
		}
		break
	}
	if got := send(t, module, report(`,"status":403`)); got.status != 200 {
		t.Errorf("another caller: %+v", got)
	}
}

func TestChallengesAreRead(t *testing.T) {
	t.Parallel()
	const object = `{"access_token":{"nbf":{"essential":true,"value":"1795435200"}},"x":"?????"}`
	std := base64.StdEncoding.EncodeToString([]byte(object))
	raw := base64.RawStdEncoding.EncodeToString([]byte(object))
	url := base64.URLEncoding.EncodeToString([]byte(object))
	rawURL := base64.RawURLEncoding.EncodeToString([]byte(object))
	if !strings.ContainsAny(std, "+/") || !strings.ContainsAny(url, "-_") || std == raw {
		t.Fatal("the alphabets do not differ")
	}
	const header = `Bearer realm="", authorization_uri="https://login.microsoftonline.com/common/oauth2/authorize", ` +
		`error="insufficient_claims", claims="`
	quoted := strings.ReplaceAll(object, `"`, `\"`)
	for _, test := range []struct{ name, text, want string }{
		{"none", "", ""},
		{"white space", " \r\n", ""},
		{"JSON", object, object},
		{"JSON in white space", "\n " + object + " ", object},
		{"base64", std, object},
		{"base64 without padding", raw, object},
		{"base64url", url, object},
		{"base64url without padding", rawURL, object},
		{"an empty object", "{}", "{}"},
		{"a header", header + std + `"`, object},
		{"a header with more behind", header + rawURL + `", error_description="a, \"b\""`, object},
		{"a header with the JSON in it", header + quoted + `"`, object},
		{"a header in other case", `BEARER error="x",Claims = "` + std + `"`, object},
		{"claims without quotes", "Bearer claims=" + rawURL, object},
		{"a header without claims", `Bearer error="invalid_token", error_description="it expired"`, ""},
		{"a header with empty claims", `Bearer claims=""`, ""},
		{"a header with nothing", `Bearer `, ""},
		{"a large one", `{"x":"` + strings.Repeat("x", maxClaims-8) + `"}`,
			`{"x":"` + strings.Repeat("x", maxClaims-8) + `"}`},
	} {
		got, err := readChallenge(test.text)
		if err != nil || string(got) != test.want || (got == nil) != (test.want == "") {
			t.Errorf("%s: got %q (%v), want %q", test.name, got, err, test.want)
		}
	}
}

func TestWrongChallengesAreRefused(t *testing.T) {
	t.Parallel()
	encoded := func(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }
	for _, test := range []struct{ name, text, want string }{
		{"words", "no claims here", "neither JSON nor base64"},
		{"base64 in the middle", "e30=e30=", "neither JSON nor base64"},
		{"too much padding", "e30===", "neither JSON nor base64"},
		{"only padding", "==", "a JSON object"},
		{"bits left over", "e31", "neither JSON nor base64"},
		{"broken JSON", `{"a":`, "a JSON object"},
		{"two objects", `{}{}`, "a JSON object"},
		{"a list", encoded(`[]`), "a JSON object"},
		{"a list in plain", `[]`, "neither JSON nor base64"},
		{"null", encoded(`null`), "a JSON object"},
		{"a text", encoded(`"x"`), "a JSON object"},
		{"no JSON in base64", encoded(`hello`), "a JSON object"},
		{"too large", `{"x":"` + strings.Repeat("x", maxClaims) + `"}`, "larger than 8192"},
		{"too large in base64", encoded(`{"x":"` + strings.Repeat("x", maxClaims) + `"}`), "larger than 8192"},
		{"a header that does not end", `Bearer claims="e30=`, "header cannot be read"},
		{"a header of words", `Bearer please send claims`, "header cannot be read"},
		{"a header with a name only", `Bearer error="x", claims`, "header cannot be read"},
		{"a header with no value", `Bearer claims=, error="x"`, "header cannot be read"},
		{"a header with rubbish", `Bearer claims="hello world"`, "neither JSON nor base64"},
		{"another scheme", `Basic realm="x"`, "neither JSON nor base64"},
	} {
		got, err := readChallenge(test.text)
		if err == nil || got != nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: got %q, %v, want %q", test.name, got, err, test.want)
		}
	}
}

func FuzzChallenge(f *testing.F) {
	f.Add(`{"access_token":{}}`)
	f.Add("eyJhY2Nlc3NfdG9rZW4iOnt9fQ==")
	f.Add(`Bearer error="insufficient_claims", claims="eyJhY2Nlc3NfdG9rZW4iOnt9fQ=="`)
	f.Add(`Bearer a=b,claims="\"`)
	f.Fuzz(func(t *testing.T, text string) {
		got, err := readChallenge(text)
		if err != nil {
			if got != nil || err.Error() == "" {
				t.Fatalf("%q: %q beside %v", text, got, err)
			}
			return
		}
		var object map[string]json.RawMessage
		if got != nil && (len(got) > maxClaims || json.Unmarshal(got, &object) != nil) {
			t.Fatalf("%q was read as %q", text, got)
		}
		again, err := readChallenge(base64.RawURLEncoding.EncodeToString(got))
		if err != nil || string(again) != string(got) {
			t.Fatalf("%q becomes %q by way of base64 (%v)", got, again, err)
		}
	})
}
