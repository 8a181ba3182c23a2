package source

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"

	"perceptd/tokencache"
)

func TestIdentityOfTheAnswer(t *testing.T) {
	t.Parallel()
	now := time.Now()
	own := makeJWT(claimsAt(now))
	foreign := func(claim string) string { return makeJWT(claimsAt(now).with(object{claim: "another-" + canary})) }
	machine := makeJWT(claimsAt(now).with(object{
		"xms_mirid": "/subscriptions/s/providers/Microsoft.HybridCompute/machines/m",
	}))
	for _, test := range []struct {
		name    string
		form    Endpoint
		key     tokencache.Key
		changes object
		words   string // empty: accepted
	}{
		{"silent and opaque", IMDS, byClient, object{}, ""},
		{"echoed", IMDS, byClient, object{"client_id": clientID}, ""},
		{"echoed in braces", IMDS, byClient, object{"client_id": "{" + clientID + "}"}, ""},
		{"echoed without hyphens", IMDS, byClient, object{"client_id": " " + strings.ReplaceAll(clientID, "-", "")},
			""},
		{"echoed in capitals", AppService, byObject,
			object{"object_id": strings.ToUpper(objectID), "client_id": "whatever"}, ""},
		{"echoed by either name", AppService, byARM, object{"mi_res_id": strings.ToUpper(armID)}, ""},
		{"echoed by the other name on Arc", Arc, byARM, object{"mi_res_id": armID}, ""},
		{"claims agree", IMDS, byARM, object{"access_token": own}, ""},
		{"another client_id", IMDS, byClient, object{"client_id": objectID}, "client_id"},
		{"another object_id", AppService, byObject, object{"object_id": clientID}, "object_id"},
		{"another msi_res_id", IMDS, byARM, object{"msi_res_id": "/x"}, "msi_res_id"},
		{"another mi_res_id beside the right one", AppService, byARM, object{"msi_res_id": armID, "mi_res_id": "/x"},
			"mi_res_id"},
		{"another appid", IMDS, byClient, object{"access_token": foreign("appid")}, "the token's appid"},
		{"another oid", IMDS, byObject, object{"access_token": foreign("oid")}, "the token's oid"},
		{"another xms_mirid", AppService, byARM, object{"access_token": foreign("xms_mirid")}, "the token's xms_mirid"},
		{"the right echo with another's token", Arc, byClient,
			object{"client_id": clientID, "access_token": foreign("appid")}, "appid"},
		{"silent Arc agent", Arc, byClient, object{}, "update the agent"},
		{"silent Arc agent, right token", Arc, byClient, object{"access_token": own}, "update the agent"},
		{"Arc agent that answers for another", Arc, byObject, object{"object_id": clientID}, "object_id"},
		{"system-assigned on Arc", Arc, system, object{"access_token": machine, "client_id": "anything"}, ""},
		{"fall-back to the only user-assigned identity", IMDS, system, object{"access_token": own},
			"user-assigned identity's"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			a, err := parseAnswer(fieldsOf(goodAnswer(now).with(test.changes)), true)
			if err != nil {
				t.Fatal(err)
			}
			failed := a.checkIdentity(target{form: test.form, dial: "h:1"}, test.key)
			if test.words == "" {
				if failed != nil {
					t.Errorf("refused: %v", failed)
				}
				return
			}
			if failed == nil {
				t.Fatal("another identity's token was accepted")
			}
			wantFailure(t, failed, tokencache.IdentityNotFound, test.words)
		})
	}
}

func TestResourceOfTheAnswer(t *testing.T) {
	t.Parallel()
	for echo, ok := range map[string]bool{
		"": true, vault: true, vault + "/": true, "https://VAULT.azure.net": true, "HTTPS://VAULT.AZURE.NET/": true,
		vault + "//": true, vault + ":443": true, vault + "/.default": true, vault + ":444": false, vault + "/x": false,
		"https://storage.azure.com": false, "http://vault.azure.net": false,
	} {
		a := answer{resource: echo}
		if failed := a.checkIdentity(target{}, system); (failed == nil) != ok {
			t.Errorf("resource %q: %v", echo, failed)
		}
	}
}

func TestJWT(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	minted := now.Add(-5 * time.Minute)
	got := parseJWT(makeJWT(claimsAt(now)))
	c := got.claims
	if c.Audience != vault || c.ClientID != clientID || c.ObjectID != objectID || c.TenantID != "t" ||
		!c.IssuedAt.Equal(minted) || !c.NotBefore.Equal(minted) ||
		!slices.Equal(c.Groups, []string{"g1", "g2"}) || !slices.Equal(c.Roles, []string{"r"}) ||
		!slices.Equal(c.WIDs, []string{"w"}) {
		t.Errorf("claims %+v", c)
	}
	if got.resourceID != armID || !got.expiresOn.Equal(now.Add(24*time.Hour)) {
		t.Errorf("xms_mirid %q, exp %v", got.resourceID, got.expiresOn)
	}

	odd := parseJWT(makeJWT(object{
		"aud": []string{"a", "b"}, "azp": "v2", "oid": 7, "tid": strings.Repeat("x", maxClaimText+1),
		"iat": minted.Unix(), "nbf": float64(minted.Unix()) + 0.9, "exp": -1,
		"groups": make([]string, 3*maxClaimList), "roles": "one", "wids": []any{"a", 1},
	})).claims
	if odd.Audience != "a" || odd.ClientID != "v2" || odd.ObjectID != "" || odd.TenantID != "" ||
		!odd.NotBefore.Equal(minted) ||
		odd.Groups != nil || odd.Roles != nil || odd.WIDs != nil {
		t.Errorf("claims of odd shapes: %+v", odd)
	}

	for _, opaque := range []string{"", "a.b", "a.b.c.d", "a.!.c", "a.bnVsbA.c", "a.W10.c"} {
		if got := parseJWT(opaque); got.resourceID != "" || got.claims.ClientID != "" || !got.expiresOn.IsZero() {
			t.Errorf("%q has claims %+v", opaque, got.claims)
		}
	}
}

// A claim is kept whole, or it is left out whole and named: no two are the same for having been cut off. What is kept
// of a token has a bound, however it is written.
func TestClaimsAreKeptWholeOrNotAtAll(t *testing.T) {
	t.Parallel()
	claim := func(c tokencache.Claims, name string) string {
		return map[string]string{
			"iss": c.Issuer, "aud": c.Audience, "appid": c.ClientID, "azp": c.ClientID, "oid": c.ObjectID,
			"tid":    c.TenantID,
			"groups": strings.Join(c.Groups, ""), "roles": strings.Join(c.Roles, ""), "wids": strings.Join(c.WIDs, ""),
		}[name]
	}
	listed := func(name string) bool { return slices.Contains([]string{"groups", "roles", "wids"}, name) }
	largest := make(object)
	for name, most := range map[string]int{
		"iss": maxClaimText, "aud": maxClaimText, "appid": maxClaimID, "azp": maxClaimID, "oid": maxClaimID,
		"tid":    maxClaimID,
		"groups": maxClaimList, "roles": maxClaimList, "wids": maxClaimList,
	} {
		fits := strings.Repeat("x", most-len(`"",`))
		for _, text := range []string{"x", fits} {
			got := parseJWT(makeJWT(object{name: whole(listed(name), text)})).claims
			if claim(got, name) != text || got.Omitted != nil {
				t.Errorf("%s of %d bytes: %+v", name, len(text), got)
			}
		}
		for _, text := range []string{fits + "x", "a\u009bb", "a\u202eb", "a\u2028b", "a\nb", "a\xff",
			strings.Repeat("<", most/6+1)} {
			got := parseJWT(makeJWT(object{name: whole(listed(name), text)})).claims
			if claim(got, name) != "" || !slices.Equal(got.Omitted, []string{name}) {
				t.Errorf("%s %.40q: %+v", name, text, got)
			}
		}
		largest[name] = whole(listed(name), fits)
	}
	kept := parseJWT(makeJWT(largest)).claims
	if text, err := json.Marshal(kept); err != nil || len(text) > 28<<10 || kept.Omitted != nil {
		t.Errorf("%d bytes are kept, %v", len(text), err)
	}
	guids := slices.Repeat([]string{objectID}, 200)
	if got := parseJWT(makeJWT(object{"groups": guids})).claims; !slices.Equal(got.Groups, guids) {
		t.Errorf("of as many groups as Entra writes, %d are kept: %v", len(got.Groups), got.Omitted)
	}
}

// whole is a text as a claim has it that is a list, or none.
func whole(list bool, text string) any {
	if list {
		return []string{text}
	}
	return text
}

func FuzzParseJWT(f *testing.F) {
	f.Add(makeJWT(claimsAt(time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC))))
	f.Add(makeJWT(object{"groups": []any{1}, "nbf": 1e300, "aud": []string{}}))
	f.Add("a.bnVsbA.c")
	f.Fuzz(func(t *testing.T, token string) {
		got := parseJWT(token)
		for _, list := range [][]string{got.claims.Groups, got.claims.Roles, got.claims.WIDs} {
			if !storable(maxClaimList, list...) {
				t.Errorf("%d entries are kept", len(list))
			}
		}
		for _, id := range []string{got.claims.ObjectID, got.claims.TenantID, got.claims.ClientID} {
			if !storable(maxClaimID, id) {
				t.Errorf("%q is kept", id)
			}
		}
		for _, at := range []time.Time{got.claims.IssuedAt, got.claims.NotBefore, got.expiresOn} {
			if !at.IsZero() && (at.Unix() < earliestTime || at.Unix() > latestTime) {
				t.Errorf("time %v", at)
			}
		}
	})
}
