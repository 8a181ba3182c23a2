package grants_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"perceptd/agent/grants"
	"perceptd/tokencache"
)

const (
	blob  = "https://blob.storage.azure.net"
	guid1 = "00000000-0000-0000-0000-000000000001"
	guid2 = "00000000-0000-0000-0000-000000000002"
)

// edge has two identities and a few callers.
func edge() grants.Rules {
	return grants.Rules{
		Identities: []grants.Identity{{Name: "device", Default: true}, {Name: "vision", ClientID: guid1}},
		Grants: []grants.Grant{
			{Caller: grants.Match{Module: "vision"}, Identity: "vision", Resources: []string{vault, storage}},
			{Caller: grants.Match{UID: uid(1000), User: "edge"}, Identity: "device", Resources: []string{vault}},
		},
	}
}

func TestFaults(t *testing.T) {
	t.Parallel()
	grant := func(g grants.Grant) func(*grants.Rules) {
		return func(r *grants.Rules) { r.Grants = append(r.Grants, g) }
	}
	identity := func(i grants.Identity) func(*grants.Rules) {
		return func(r *grants.Rules) { r.Identities = append(r.Identities, i) }
	}
	caller := grants.Match{Module: "m"}
	many := make([]string, tokencache.MaxKeys+1)
	for i := range many {
		many[i] = fmt.Sprintf("api://%d", i)
	}
	for _, row := range []struct {
		name, want string
		change     func(*grants.Rules)
	}{
		{"no identity", "no [[identity]]", func(r *grants.Rules) { r.Identities, r.Grants = nil, nil }},
		{"name", "identity name", identity(grants.Identity{Name: "a b", ClientID: guid2})},
		{"empty name", "identity name", identity(grants.Identity{ClientID: guid2})},
		{"twice", "there twice", identity(grants.Identity{Name: "vision", ClientID: guid2})},
		{"two defaults", "second default", identity(grants.Identity{Name: "x", Default: true, ClientID: guid2})},
		{"two system-assigned",
			`identities "device" and "x" are both the system-assigned one, which a device has once: ` +
				`give one of them a client_id, object_id or resource_id`, identity(grants.Identity{Name: "x"})},
		{"same client ID", `have the same client_id`, identity(grants.Identity{Name: "x", ClientID: guid1})},
		{"no GUID", "is no GUID", identity(grants.Identity{Name: "x", ClientID: "1234"})},
		{"no object GUID", "object_id", identity(grants.Identity{Name: "x", ObjectID: "1234"})},
		{"no ARM ID", "/subscriptions/", identity(grants.Identity{Name: "x", ResourceID: "vision"})},
		{"grant of nothing",
			`names identity "x"`, grant(grants.Grant{Caller: caller, Identity: "x", Resources: []string{vault}})},
		{"grant to nobody", "exactly one of", grant(grants.Grant{Identity: "vision", Resources: []string{vault}})},
		{"grant to two", "exactly one of", grant(grants.Grant{
			Caller: grants.Match{Module: "m", UID: uid(1)}, Identity: "vision", Resources: []string{vault},
		})},
		{"module name", "module name",
			grant(grants.Grant{Caller: grants.Match{Module: "../x"}, Identity: "vision", Resources: []string{vault}})},
		{"no resources", "names no resources", grant(grants.Grant{Caller: caller, Identity: "vision"})},
		{"bad resource",
			"no App ID URI", grant(grants.Grant{Caller: caller, Identity: "vision", Resources: []string{"vault"}})},
		{"control character",
			"a character", grant(grants.Grant{Caller: caller, Identity: "vision", Resources: []string{"api://a\n"}})},
		{"long resource", "bytes long", grant(grants.Grant{
			Caller: caller, Identity: "vision", Resources: []string{"api://" + strings.Repeat("a", 600)},
		})},
		{"scope", "drop the /.default",
			grant(grants.Grant{Caller: caller, Identity: "vision", Resources: []string{vault + "/.default"}})},
		{"too much to prefetch",
			"257 tokens", grant(grants.Grant{Caller: caller, Identity: "vision", Resources: many, Prefetch: true})},
	} {
		rules := edge()
		row.change(&rules)
		err := errors.Join(rules.Faults()...)
		var fault *grants.RuleError
		if err == nil || !strings.Contains(err.Error(), row.want) || !errors.As(err, &fault) {
			t.Errorf("%s: %v, want %q", row.name, err, row.want)
		}
	}
	if faults := edge().Faults(); faults != nil {
		t.Error(faults)
	}
	if err := grants.CheckResource(guid1); err != nil {
		t.Errorf("a GUID is a resource: %v", err)
	}
}

func TestBadAlternates(t *testing.T) {
	t.Parallel()
	nine := make([]string, 9)
	for _, row := range []struct {
		resource   string
		alternates []string
		says       string
	}{
		{"storage", []string{blob}, "no App ID URI"},
		{storage, nil, "0 alternates"},
		{storage, nine, "9 alternates: name 1 to 8"},
		{storage, []string{"blob"}, "the alternates of " + storage + `: resource "blob" is no App ID URI`},
		{storage, []string{blob + "/.default"}, "drop the /.default"},
		{storage, []string{storage}, "no alternate of itself"},
		{storage, []string{blob, blob}, "there twice"},
	} {
		rules := edge()
		rules.Alternates = map[string][]string{row.resource: row.alternates}
		err := errors.Join(rules.Faults()...)
		var fault *grants.RuleError
		if !errors.As(err, &fault) || fault.Kind != "resource" || !strings.Contains(err.Error(), row.says) {
			t.Errorf("%v, want %q", err, row.says)
		}
	}
}

func TestUselessAlternates(t *testing.T) {
	t.Parallel()
	rules := edge()
	rules.Alternates = map[string][]string{vault: {blob}}
	want := blob + " will never stand in for " + vault + ": no caller's grants name both with the same identity"
	if got := rules.UselessAlternates(); !slices.Equal(got, []string{want}) {
		t.Errorf("%q", got)
	}
	rules.Grants[0].Resources = append(rules.Grants[0].Resources, blob)
	if got := rules.UselessAlternates(); len(got) != 0 {
		t.Errorf("%q", got)
	}
}
