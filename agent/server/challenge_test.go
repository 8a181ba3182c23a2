package server

import (
	"encoding/base64"
	"encoding/json"
	"strings"
	"testing"
)

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
	const header = `Bearer realm="", authorization_uri="https://login.microsoftonline.com/common/oauth2/authorize", error="insufficient_claims", claims="`
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
		{"a large one", `{"x":"` + strings.Repeat("x", maxClaims-8) + `"}`, `{"x":"` + strings.Repeat("x", maxClaims-8) + `"}`},
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
