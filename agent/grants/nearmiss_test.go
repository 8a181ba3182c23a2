package grants_test

import (
	"fmt"
	"strings"
	"testing"

	"perceptd/agent/grants"
)

// spelt returns rules under which the service cam.service may have tokens for a resource.
func spelt(resource string) *grants.Authorizer {
	return grants.NewAuthorizer(grants.Rules{
		Identities: []grants.Identity{{Name: "device", Default: true}, {Name: "vision", ClientID: someID}},
		Grants: []grants.Grant{{Caller: grants.Match{Unit: "cam.service"}, Identity: "device",
			Resources: []string{resource}, Place: "/etc/percept/config.toml:23"}},
	})
}

const someID = "00000000-0000-0000-0000-000000000001"

var camera = grants.Caller{Unit: "cam.service", UID: 1000, GID: 1000, PID: 7}

// What differs in its spelling alone is denied, and said to be granted in another spelling, and which one is likely.
func TestNearMisses(t *testing.T) {
	t.Parallel()
	const here = "grant 1 (config.toml:23) names "
	for _, row := range []struct{ granted, asked, differs, says string }{
		{vault, vault + "/", "the slash at the end", "ask for that one, which is Azure's own spelling"},
		{vault, "http://vault.azure.net", "the scheme http", "ask for that one, which is Azure's own"},
		{vault, "https://Vault.Azure.NET", "upper and lower case", "ask for that one, which is Azure's own"},
		{vault, "HTTPS://vault.azure.net", "upper and lower case", "Azure's own"},
		{vault, "vault.azure.net", "a missing scheme", "Azure's own"},
		{vault, "vault.azure.net:443", "a missing scheme and the port :443", "Azure's own"},
		{vault, vault + ":443", "the port :443", "Azure's own"},
		{vault, vault + ":8443", "the port :8443", "Azure's own"},
		{vault, "https:/vault.azure.net", "the slashes", "Azure's own"},
		{vault, "https:///vault.azure.net", "the slashes", "Azure's own"},
		{vault, vault + "//", "the slash at the end and the slashes", "Azure's own"},
		{vault, vault + "/.default/.default", "the /.default", "Azure's own"},
		{vault, vault + "/.DEFAULT", "the /.default", "Azure's own"},
		{vault, vault + ".", "the dot behind the host", "Azure's own"},
		{vault, "'" + vault + "'", "the spaces or quotes around it", "Azure's own"},
		{vault, "http://VAULT.azure.net:80/",
			"the scheme http, the port :80, the slash at the end and upper and lower " +
				"case", "Azure's own"},
		{vault + "/", vault, "a missing slash at the end",
			"have the one that was asked for granted, which is Azure's own"},
		{"http://vault.azure.net", vault, "the scheme https", "have the one that was asked for granted"},
		{"https://management.azure.com", "https://management.azure.com/", "the slash at the end",
			"ask for that one, or have this one granted too, since Azure takes them for two resources"},
		{storage, storage + "/", "the slash at the end", "or have this one granted too"},
		{"api://contoso/app", "api://contoso//app", "the slashes", "or have this one granted too"},
		{"api://contoso/app", "api://Contoso/App", "upper and lower case", "or have this one granted too"},
		{"api://" + someID, someID, "a missing scheme", "or have this one granted too"},
		{"https://iothubs.azure.net", "https://iothubs.azure.net/", "the slash at the end", "Azure's own"},

		{vault, vault, "", ""},
		{vault, storage, "", ""},
		{vault, vault + "/secrets", "", ""},
		{vault, "https://my.vault.azure.net", "", ""},
		{vault, "api://vault.azure.net", "", ""},
		{vault, "https://vault.azure.net.example", "", ""},
	} {
		a := spelt(row.granted)
		r := grants.Request{Resource: grants.TrimScope(row.asked)}
		_, denial := a.Authorize(&camera, r)
		if row.differs == "" {
			if denial != nil && strings.Contains(denial.Detail, "differs") {
				t.Errorf("%s where %s is granted: %+v", row.asked, row.granted, denial)
			}
			continue
		}
		want := here + row.granted + ", which differs in " + row.differs + " alone: "
		if denial == nil || !strings.Contains(denial.Detail, want) || !strings.Contains(denial.Detail, row.says) ||
			strings.Contains(denial.Detail, "/etc") {
			t.Errorf("%s where %s is granted: %+v, want %s%s", row.asked, row.granted, denial, want, row.says)
			continue
		}
		if denial.Err == grants.ErrBadResource {
			continue
		}
		d := a.Decide(&camera, r)
		if !strings.Contains(d.Reason,
			"grant 1 (/etc/percept/config.toml:23) for unit cam.service names "+row.granted) ||
			d.NearMiss == nil || !d.NearMiss.Decides ||
			!strings.Contains(fmt.Sprint(d.Evaluations),
				"decides, and names "+row.granted+", which the back end takes") {
			t.Errorf("%s where %s is granted: %+v", row.asked, row.granted, d)
		}
		// What is not Azure's own spelling, where that is granted, is not to be granted.
		if denial.NearMiss == nil || (denial.Suggestion == nil) != (denial.NearMiss.Usual == row.granted) {
			t.Errorf("%s where %s is granted: %+v, %+v", row.asked, row.granted, denial.NearMiss, denial.Suggestion)
		}
	}
}

// A caller learns of no grant but those that decide about it. An administrator does.
func TestNearMissesOfOthers(t *testing.T) {
	t.Parallel()
	a := spelt(vault)
	for _, other := range []grants.Caller{
		{Unit: "other.service", UID: 1000}, {Module: "vision"}, {UID: 1000, GID: 1000},
		{Unit: "cam.service", Container: &grants.Container{}}, {Unit: "other.service", Nested: true},
	} {
		r := grants.Request{Resource: vault + "/"}
		_, denial := a.Authorize(&other, r)
		if denial.Err != grants.ErrNotGranted || denial.NearMiss != nil || strings.Contains(denial.Detail,
			"cam.service") ||
			strings.Contains(denial.Detail, "grant 1") || strings.Contains(denial.Detail, "differs") {
			t.Errorf("%v: %+v", other, denial)
		}
		if _, bad := a.Authorize(&other,
			grants.Request{Resource: "vault.azure.net"}); bad.Err != grants.ErrBadResource ||
			strings.Contains(bad.Detail, "grant") {
			t.Errorf("%v: %+v", other, bad)
		}
		d := a.Decide(&other, r)
		const want = "; grant 1 (/etc/percept/config.toml:23) for unit cam.service names " + vault +
			", which differs in "
		if d.NearMiss == nil || d.NearMiss.Decides || !strings.Contains(d.Reason, want) || a.WhyNot(&other,
			r) != d.Reason {
			t.Errorf("%v: %+v", other, d)
		}
	}
	// A request that names the identity is about grants of that one alone.
	if d := a.Decide(&camera, grants.Request{Resource: vault + "/", Identity: "vision"}); d.NearMiss != nil {
		t.Errorf("%+v", d.NearMiss)
	}
}

// The closest one is said: of a grant that decides before those of others, and with the least that differs.
func TestClosestNearMiss(t *testing.T) {
	t.Parallel()
	a := grants.NewAuthorizer(grants.Rules{
		Identities: []grants.Identity{{Name: "device"}},
		Grants: []grants.Grant{
			{Caller: grants.Match{Module: "vision"}, Identity: "device", Resources: []string{"https://x.example"}},
			{Caller: grants.Match{Unit: "cam.service"}, Identity: "device",
				Resources: []string{"http://x.example:1/", "https://x.example:2", "https://x.example"}},
		},
	})
	if d := a.Decide(&camera, grants.Request{Resource: "https://x.example/"}); d.NearMiss == nil ||
		d.NearMiss.Index != 1 || d.NearMiss.Spelling != "https://x.example" {
		t.Errorf("%+v", d.NearMiss)
	}
}

func TestSpellingNotes(t *testing.T) {
	t.Parallel()
	for resource, want := range map[string]string{
		vault + "/":                            vault + "/ is not how Azure spells that resource: " + vault + " is",
		"https://VAULT.azure.net":              "is not how Azure spells",
		"http://vault.azure.net":               "is not how Azure spells",
		"http://other.example":                 "has the scheme http",
		"https://other.example:443":            "has the port :443",
		"https://Other.example":                "has upper and lower case",
		"https://other.example//x":             "has the slashes",
		"https://management.azure.com/":        "",
		"https://management.azure.com":         "",
		"https://management.core.windows.net/": "",
		"https://management.core.windows.net":  "",
		"https://storage.azure.com/":           "",
		"https://database.windows.net/":        "",
		"https://my.vault.azure.net":           "",
		"https://acc.blob.core.windows.net":    "",
		"https://other.example/":               "",
		"api://contoso/App":                    "",
		someID:                                 "",
		"https://vault.azure.net":              "",
	} {
		r := grants.Rules{Grants: []grants.Grant{{Resources: []string{resource}}, {Resources: []string{resource}}}}
		notes := r.SpellingNotes()
		if want == "" && len(notes) > 0 || want != "" && (len(notes) != 1 || !strings.Contains(notes[0], want)) {
			t.Errorf("%s: %q, want %q", resource, notes, want)
		}
	}
}

// FuzzNearMiss checks that no text is a near miss of itself, that being one goes both ways, and that nothing is allowed
// that is not granted to the letter.
func FuzzNearMiss(f *testing.F) {
	f.Add("https://vault.azure.net", "HTTP:///vault.azure.net.:443//.default")
	f.Add("api://x", "x")
	f.Add("https://x/?a#b", "https:x")
	f.Fuzz(func(t *testing.T, granted, asked string) {
		if grants.CheckResource(granted) != nil {
			return
		}
		_, denial := spelt(granted).Authorize(&camera, grants.Request{Resource: asked})
		if (denial == nil) != (granted == asked) {
			t.Fatalf("%q where %q is granted: %+v", asked, granted, denial)
		}
		if denial == nil || grants.CheckResource(asked) != nil {
			return
		}
		_, other := spelt(asked).Authorize(&camera, grants.Request{Resource: granted})
		if (denial.NearMiss == nil) != (other.NearMiss == nil) {
			t.Fatalf("%q and %q: %+v, %+v", asked, granted, denial.NearMiss, other.NearMiss)
		}
		if denial.NearMiss != nil && len(denial.NearMiss.Differs) == 0 {
			t.Fatalf("%q and %q differ in nothing", asked, granted)
		}
	})
}
