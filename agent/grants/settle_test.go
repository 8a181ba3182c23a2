package grants_test

import (
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"perceptd/agent/grants"
	"perceptd/tokencache"
)

const badResource = "vault" // neither a URI nor a GUID

// subjects are whom drawn grants are for: two of each kind.
var subjects = []grants.Match{
	{Module: "vision"}, {Module: "speech"}, {Unit: "cam.service"}, {Unit: "mic.service"}, {Image: imageID},
	{Image: repoDigest}, {UID: uid(1000)}, {UID: uid(0)}, {GID: uid(44)}, {GID: uid(995)},
}

var resources = []string{vault, storage, blob}

// drawRules draws rules without a fault.
func drawRules(t *rapid.T) grants.Rules {
	r := grants.Rules{Identities: []grants.Identity{
		{Name: "device"}, {Name: "a", ClientID: guid1}, {Name: "b", ObjectID: guid2},
		{Name: "c", ResourceID: "/subscriptions/c"},
	}}
	if i := rapid.IntRange(-1, len(r.Identities)-1).Draw(t, "default"); i >= 0 {
		r.Identities[i].Default = true
	}
	for range rapid.IntRange(1, 6).Draw(t, "grants") {
		r.Grants = append(r.Grants, grants.Grant{
			Caller:   rapid.SampledFrom(subjects).Draw(t, "caller"),
			Identity: rapid.SampledFrom(r.Identities).Draw(t, "identity").Name,
			Resources: rapid.SliceOfNDistinct(rapid.SampledFrom(resources), 1, 2, rapid.ID[string]).
				Draw(t, "resources"),
			Prefetch: rapid.Bool().Draw(t, "prefetch"),
		})
	}
	if rapid.Bool().Draw(t, "alternates") {
		r.Alternates = map[string][]string{vault: {storage}}
	}
	return r
}

// copyOf returns r in memory of its own.
func copyOf(r grants.Rules) grants.Rules {
	r.Identities, r.Grants = slices.Clone(r.Identities), slices.Clone(r.Grants)
	return r
}

// breaks are all the ways in which an element of rules can be faulty, by what is understood of it. Each breaks the
// identity or the grant with that index.
var breaks = []struct {
	name  string
	what  string // identity, grant, or the rules
	apply func(r *grants.Rules, i int)
}{
	{"a key too many", "identity", func(r *grants.Rules, i int) { r.Identities[i].Fault = "x" }},
	{"no name", "identity", func(r *grants.Rules, i int) { r.Identities[i].Fault, r.Identities[i].Name = "x", "" }},
	{"a bad name", "identity", func(r *grants.Rules, i int) { r.Identities[i].Name = "a b" }},
	{"a name twice", "identity", func(r *grants.Rules, i int) { r.Identities[i].Name = r.Identities[(i+1)%4].Name }},
	{"an ID twice", "identity", func(r *grants.Rules, i int) {
		other := r.Identities[(i+1)%4]
		r.Identities[i].ClientID, r.Identities[i].ObjectID, r.Identities[i].ResourceID =
			other.ClientID, other.ObjectID, other.ResourceID
	}},
	{"a bad client ID", "identity", func(r *grants.Rules, i int) { r.Identities[i].ClientID = "1234" }},
	{"no ID that is understood", "identity", func(r *grants.Rules, i int) {
		r.Identities[i] = grants.Identity{Fault: "x", Name: r.Identities[i].Name, Default: r.Identities[i].Default}
	}},
	{"perhaps the default", "identity", func(r *grants.Rules, i int) {
		r.Identities[i].Fault, r.Identities[i].Default = "x", true
	}},
	{"nothing understood", "identity", func(r *grants.Rules, i int) {
		r.Identities[i] = grants.Identity{Fault: "x", Default: true}
	}},
	{"two defaults", "identity", func(r *grants.Rules, i int) {
		r.Identities[i].Default, r.Identities[(i+1)%4].Default = true, true
	}},
	{"a misspelt table", "identity", func(r *grants.Rules, i int) {
		r.Identities = slices.Delete(r.Identities, i, i+1)
	}},

	{"a key too many", "grant", func(r *grants.Rules, i int) { r.Grants[i].Fault = "x" }},
	{"another identity", "grant", func(r *grants.Rules, i int) { r.Grants[i].Identity = "visoin" }},
	{"no identity", "grant", func(r *grants.Rules, i int) { r.Grants[i].Fault, r.Grants[i].Identity = "x", "" }},
	{"no resources", "grant", func(r *grants.Rules, i int) { r.Grants[i].Resources = nil }},
	{"a bad resource", "grant", func(r *grants.Rules, i int) { r.Grants[i].Resources = []string{badResource} }},
	{"resources not understood", "grant", func(r *grants.Rules, i int) {
		r.Grants[i].Fault, r.Grants[i].Resources, r.Grants[i].AnyResource = "x", nil, true
	}},
	{"no caller", "grant", func(r *grants.Rules, i int) { r.Grants[i].Caller = grants.Match{} }},
	{"two callers", "grant", func(r *grants.Rules, i int) {
		if r.Grants[i].Caller.Unit == "" {
			r.Grants[i].Caller.Unit = "x.service"
		} else {
			r.Grants[i].Caller.GID = uid(7)
		}
	}},
	{"a bad name of its caller", "grant", func(r *grants.Rules, i int) {
		switch c := &r.Grants[i].Caller; {
		case c.Module != "":
			c.Module = "a b"
		case c.Unit != "":
			c.Unit = "cam.socket"
		case c.Image != "":
			c.Image = "cam:2"
		default: // a user or group that is not there
			r.Grants[i].Fault, r.Grants[i].Unclear, *c = "x", grants.Users|grants.Groups, grants.Match{}
		}
	}},
	{"nothing understood", "grant", func(r *grants.Rules, i int) {
		r.Grants[i] = grants.Grant{Fault: "x", Unclear: grants.AllKinds, AnyResource: true}
	}},

	{"a bad alternate", "rules", func(r *grants.Rules, _ int) {
		r.Alternates = map[string][]string{vault: {badResource}}
	}},
	{"alternates not understood", "rules", func(r *grants.Rules, _ int) { r.Alternates, r.AnyAlternate = nil, true }},
	{"a module", "rules", func(r *grants.Rules, _ int) { r.IdleContainers = []string{"cam"} }},
	{"a module not understood", "rules", func(r *grants.Rules, _ int) { r.AnyContainerIdle = true }},
}

// breakOne breaks one element of r in one way.
func breakOne(t *rapid.T, r *grants.Rules) {
	way := rapid.SampledFrom(breaks).Draw(t, "way")
	count := map[string]int{"identity": len(r.Identities), "grant": len(r.Grants), "rules": 1}[way.what]
	i := rapid.IntRange(0, count-1).Draw(t, way.what)
	t.Logf("%s %d: %s", way.what, i, way.name)
	way.apply(r, i)
}

// askers are callers of every kind, and of several.
func askers() (all []grants.Caller) {
	none := grants.Caller{UID: grants.NoID, GID: grants.NoID}
	for _, module := range []string{"vision", "speech", "other"} {
		c := none
		c.Module = module
		all = append(all, c)
		c.Container = image(imageID, repoDigest)
		all = append(all, c)
	}
	for _, c := range []*grants.Container{
		image(imageID), image("sha256:other", repoDigest), image(imageID, repoDigest),
	} {
		all = append(all, grants.Caller{Container: c, UID: 0, GID: 0})
	}
	for _, unit := range []string{"", "cam.service", "mic.service", "x.service"} {
		for _, user := range []uint32{0, 1000, 7} {
			for _, groups := range [][]uint32{{7}, {44}, {995, 44}} {
				c := grants.Caller{Unit: unit, UID: user, GID: groups[0], Groups: groups}
				nested := c
				nested.Nested = true
				all = append(all, c, nested)
			}
		}
	}
	return all
}

// questions are requests for every resource, in each way in which an identity can be named.
func questions() (all []grants.Request) {
	for _, resource := range resources {
		all = append(all, grants.Request{Resource: resource},
			grants.Request{Resource: resource, ClientID: guid1}, grants.Request{Resource: resource, ObjectID: guid2},
			grants.Request{Resource: resource, ResourceID: "/Subscriptions/c"})
		for _, name := range []string{"device", "a", "b", "c"} {
			all = append(all, grants.Request{Resource: resource, Identity: name})
		}
	}
	return all
}

// Whatever is faulty, nobody gets what the rules would not give without the fault, and who loses something by it is
// told that it is a fault.
func TestFaultsGiveNobodyMore(t *testing.T) {
	t.Parallel()
	all, asked := askers(), questions()
	rapid.Check(t, func(t *rapid.T) {
		rules := drawRules(t)
		if faults := rules.Faults(); faults != nil {
			t.Fatalf("sound rules have faults: %v", faults)
		}
		broken := copyOf(rules)
		breakOne(t, &broken)
		settled := broken.Settle()
		if again := settled.Settle(); !reflect.DeepEqual(again, settled) {
			t.Fatalf("settled %+v\nagain   %+v", settled, again)
		}
		whole, left := grants.NewAuthorizer(rules), grants.NewAuthorizer(settled)
		for _, caller := range all {
			for _, request := range asked {
				compare(t, whole, left, caller, request)
			}
		}
	})
}

// compare fails the test if left gives caller more than whole, or explains badly why it gives less.
func compare(t *rapid.T, whole, left *grants.Authorizer, caller grants.Caller, request grants.Request) {
	before, denied := whole.Authorize(&caller, request)
	now, denial := left.Authorize(&caller, request)
	fail := func(format string, args ...any) {
		t.Helper()
		t.Fatalf("%v asks for %+v: %s", caller, request, fmt.Sprintf(format, args...))
	}
	switch {
	case denial == nil && denied != nil:
		fail("gets %q, and the whole rules say: %s", now.Identity.Name, denied.Detail)
	case denial == nil && now.Identity.Name != before.Identity.Name:
		fail("gets %q, and %q by the whole rules", now.Identity.Name, before.Identity.Name)
	case denial != nil && denied == nil && denial.Err == grants.ErrNotGranted:
		fail("gets %q by the whole rules, and is told: %s", before.Identity.Name, denial.Detail)
	case denial == nil:
		for _, alternate := range left.AlternatesFor(&caller, now.Identity, request.Resource) {
			if !slices.Contains(whole.AlternatesFor(&caller, before.Identity, request.Resource), alternate) {
				fail("gets the token for %s in its place", alternate)
			}
		}
	}
	if request.NamesIdentity() {
		return
	}
	d := left.Decide(&caller, request)
	if d.Allowed != (denial == nil) {
		fail("decided %+v, answered %+v", d, denial)
	}
	for _, e := range d.Evaluations {
		if e.Why == "" || e.Fault != "" && e.Allows {
			fail("%+v allows it", e)
		}
	}
}

// By alternates with a fault none gets the token of another resource; what is denied or revoked by one name stays so by
// each that the whole entry may give it.
func TestFaultyAlternates(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name         string
		change       func(r *grants.Rules)
		alternates   bool // storage may stand in for vault
		known, other bool // vault goes by the name of storage; it may by any
	}{
		{"sound", func(*grants.Rules) {}, true, true, false},
		{"a bad one", func(r *grants.Rules) { r.Alternates[vault] = []string{storage, badResource} },
			false, true, true},
		{"a key too many", func(r *grants.Rules) { r.Alternates, r.IdleAlternates = nil, r.Alternates },
			false, true, false},
		{"not understood", func(r *grants.Rules) { r.Alternates, r.AnyAlternate = nil, true }, false, false, true},
		{"one of two", func(r *grants.Rules) { r.AnyAlternate = true }, true, true, true},
	} {
		rules := edge()
		rules.Grants[0].Resources = resources
		rules.Alternates = map[string][]string{vault: {storage}}
		row.change(&rules)
		settled := rules.Settle()
		a, names := grants.NewAuthorizer(settled), settled.OtherNames()
		may := a.AlternatesFor(&grants.Caller{Module: "vision"}, a.Named("vision"), vault)
		known := tokencache.GoesBy(names, vault, storage)
		if len(may) > 0 != row.alternates || known != row.known || settled.AnyAlternate != row.other {
			t.Errorf("%s: %v, %v", row.name, may, names)
		}
	}
}

// faulty returns rules in which each of two subjects has a grant, the first of which is faulty.
func faulty(first, second grants.Match, fault string, unclear grants.Kinds) grants.Rules {
	r := grants.Rules{
		Identities: []grants.Identity{{Name: "device", Default: true}},
		Grants: []grants.Grant{
			{Caller: first, Identity: "device", Resources: []string{vault}, Place: "config.toml:7",
				Fault: fault, Unclear: unclear},
			{Caller: second, Identity: "device", Resources: []string{vault}, Place: "config.toml:12"},
		},
	}
	return r.Settle()
}

// A faulty grant decides by its kind, and by each that it may be of, and gives nothing.
func TestFaultyGrantDecides(t *testing.T) {
	t.Parallel()
	const broken = `unknown key "resorces"`
	user, group, unit := grants.Match{UID: uid(1000)}, grants.Match{GID: uid(44)}, grants.Match{Unit: "cam.service"}
	service := grants.Caller{Unit: "cam.service", UID: 1000, GID: 44}
	plain := grants.Caller{UID: 1000, GID: 44}
	for _, row := range []struct {
		name   string
		rules  grants.Rules
		caller grants.Caller
		want   string // of the denial; empty: it is allowed
	}{
		{"a faulty unit grant keeps its service from what its user has", faulty(unit, user, broken, 0), service,
			`grant 1 (config.toml:7) decides about unit cam.service (uid 1000), is faulty and gives nothing: ` +
				broken + `; an administrator mends it, and then: perceptctl reload`},
		{"and no other service", faulty(unit, user, broken, 0), grants.Caller{Unit: "mic.service", UID: 1000}, ""},
		{"nor its user", faulty(unit, user, broken, 0), plain, ""},
		{"a user that is not there keeps groups from giving",
			faulty(grants.Match{}, group, `user "edgy" is not there`, grants.Users), plain,
			`grant 1 (config.toml:7) may be for uid 1000, is faulty and gives nothing: user "edgy" is not there; `},
		{"and no user that has a grant", faulty(grants.Match{}, user, "x", grants.Users), plain, ""},
		{"nor a service that has one", faulty(grants.Match{}, unit, "x", grants.Users), service, ""},
		{"a group that is not there keeps nobody", faulty(grants.Match{}, user, "x", grants.Groups), plain, ""},
		{"an unclear unit keeps services from what their user has", faulty(grants.Match{}, user, "x", grants.Units),
			service, "grant 1 (config.toml:7) may be for unit cam.service"},
		{"and not that user", faulty(grants.Match{}, user, "x", grants.Units), plain, ""},
		{"one of any kind keeps users from what their groups have",
			faulty(grants.Match{}, group, "x", grants.AllKinds), plain, "grant 1 (config.toml:7) may be for uid 1000"},
		{"and not groups where users are known", faulty(grants.Match{}, group, "x", grants.AllKinds),
			grants.Caller{UID: 7, GID: 44}, "grant 1 (config.toml:7) may be for uid 7"},
		{"nor those that have a grant of the first kind", faulty(grants.Match{}, unit, "x", grants.AllKinds),
			service, ""},
		{"a unit that is none", faulty(grants.Match{Unit: "cam.socket"}, user, "", 0), service,
			`unit "cam.socket" is no service`},
		{"a caller by nothing", faulty(grants.Match{}, user, "", 0), service, "exactly one of"},
		{"a module keeps its container's image from giving",
			faulty(grants.Match{Module: "vision"}, grants.Match{Image: imageID}, "x", 0),
			grants.Caller{Module: "vision", Container: image(imageID)}, "grant 1 (config.toml:7) decides about module"},
		{"an unclear module too", faulty(grants.Match{}, grants.Match{Image: imageID}, "x", grants.Modules),
			grants.Caller{Module: "vision", Container: image(imageID)}, "grant 1 (config.toml:7) may be for module"},
		{"and no container without a module's socket",
			faulty(grants.Match{}, grants.Match{Image: imageID}, "x", grants.Modules),
			grants.Caller{Container: image(imageID)}, ""},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			a := grants.NewAuthorizer(row.rules)
			request := grants.Request{Resource: vault}
			_, denial := a.Authorize(&row.caller, request)
			d := a.Decide(&row.caller, request)
			if row.want == "" {
				if denial != nil || !d.Allowed {
					t.Errorf("denied: %+v, %+v", denial, d)
				}
				return
			}
			if denial == nil || denial.Err != grants.ErrFaulty || !strings.Contains(d.Reason, row.want) {
				t.Fatalf("%+v, want %s", denial, row.want)
			}
			isKnown := a.GrantsFor(&row.caller)[0].Unclear == 0
			if d.Reason != denial.ForAdministrator || (denial.Detail == d.Reason) != isKnown {
				t.Errorf("reason %q, and the caller is told %q", d.Reason, denial.Detail)
			}
			if has := a.GrantsFor(&row.caller); len(has) != 1 || has[0].Fault == "" || has[0].Index != 0 {
				t.Errorf("decided by %+v", has)
			}
			for _, e := range d.Evaluations {
				if e.Decides != (e.Index == 0) || e.Index == 0 && !strings.Contains(e.Why, "gives nothing: "+e.Fault) {
					t.Errorf("%+v", e)
				}
			}
		})
	}
}

// Where a faulty grant may be for another identity, a request has to name the one that it means.
func TestFaultyGrantOfAnotherIdentity(t *testing.T) {
	t.Parallel()
	user := grants.Match{UID: uid(1000)}
	caller := grants.Caller{UID: 1000}
	toVault, toVision := grants.Request{Resource: vault}, grants.Request{Resource: vault, ClientID: guid1}
	rules := func(change func(r *grants.Rules)) grants.Rules {
		r := grants.Rules{
			Identities: []grants.Identity{{Name: "device"}, {Name: "vision", ClientID: guid1}},
			Grants: []grants.Grant{
				{Caller: user, Identity: "device", Resources: []string{vault}},
				{Caller: user, Identity: "vision", Resources: []string{vault}, Fault: "x"},
			},
		}
		change(&r)
		return r.Settle()
	}
	for _, row := range []struct {
		name    string
		change  func(r *grants.Rules)
		request grants.Request
		want    string // identity, or the denial
	}{
		{"another one", func(*grants.Rules) {}, toVault, `it may be for another identity than "device"`},
		{"which is named", func(*grants.Rules) {}, grants.Request{Resource: vault, Identity: "device"}, "device"},
		{"which is the faulty one", func(*grants.Rules) {}, toVision, "gives nothing: x"},
		{"the same one", func(r *grants.Rules) { r.Grants[1].Identity = "device" }, toVault, "device"},
		{"one that is not understood", func(r *grants.Rules) { r.Grants[1].Identity = "" }, toVault,
			"it may be for another identity"},
		{"for another resource", func(r *grants.Rules) { r.Grants[1].Resources = []string{storage} },
			toVault, "device"},
		{"for any", func(r *grants.Rules) { r.Grants[1].Resources, r.Grants[1].AnyResource = nil, true }, toVault,
			"it may be for another identity"},
		{"where the default is granted", func(r *grants.Rules) { r.Identities[0].Default = true }, toVault, "device"},
		{"where the default is faulty", func(r *grants.Rules) {
			r.Identities[1] = grants.Identity{Name: "vision", Default: true, Fault: "x"}
		}, toVault, "it may be for another identity"},
		{"where another may be the default", func(r *grants.Rules) {
			r.Identities[0].Default = true
			r.Identities[1] = grants.Identity{Name: "vision", Default: true, Fault: "x"}
		}, toVault, "it may be for another identity"},
		{"a faulty identity by name", func(r *grants.Rules) {
			r.Identities[1].Fault, r.Identities[1].Place = "y", "b.toml:3"
		}, grants.Request{Resource: vault, Identity: "vision"},
			`identity "vision" (b.toml:3) is faulty and gives nothing: y; `},
		{"and by ID", func(r *grants.Rules) { r.Identities[1].Fault = "y" }, toVision,
			`identity "vision" is faulty and gives nothing: y; `},
	} {
		a := grants.NewAuthorizer(rules(row.change))
		one, denial := a.Authorize(&caller, row.request)
		switch {
		case denial != nil && (denial.Err != grants.ErrFaulty || !strings.Contains(denial.Detail, row.want)):
			t.Errorf("%s: %+v, want %s", row.name, denial, row.want)
		case denial == nil && one.Identity.Name != row.want:
			t.Errorf("%s: %s, want %s", row.name, one.Identity.Name, row.want)
		}
	}
}

// A grant that is idle for one fault may still name any resource for another.
func TestSettleGrantOfTwoFaults(t *testing.T) {
	t.Parallel()
	rules := edge()
	rules.Grants[0].Fault, rules.Grants[0].Resources = "x", []string{vault, badResource}
	if g := rules.Settle().Grants[0]; !g.AnyResource || g.Fault != "x" {
		t.Errorf("%+v", g)
	}
}

// An identity that is not found may be one whose IDs are not understood.
func TestUnknownIdentityMayBeIdle(t *testing.T) {
	t.Parallel()
	rules := edge()
	rules.Identities[1] = grants.Identity{Name: "vision", Place: "config.toml:12", Fault: "client_id is a number"}
	a := grants.NewAuthorizer(rules.Settle())
	_, denial := a.Authorize(&grants.Caller{Module: "vision"}, grants.Request{Resource: vault, ClientID: guid1})
	const says = `it may be identity "vision" (config.toml:12), which is faulty: client_id is a number`
	if denial == nil || denial.Err != grants.ErrUnknownIdentity || !strings.Contains(denial.Detail, says) {
		t.Errorf("%+v", denial)
	}
}

// Of what is there twice all are idle, since it is not known which one is meant; of two defaults none is the default.
func TestSettleWhatIsThereTwice(t *testing.T) {
	t.Parallel()
	identities := func(all ...grants.Identity) grants.Rules { return grants.Rules{Identities: all}.Settle() }
	for name, r := range map[string]grants.Rules{
		"name": identities(grants.Identity{Name: "a", ClientID: guid1}, grants.Identity{Name: "a", ClientID: guid2}),
		"ID":   identities(grants.Identity{Name: "a", ClientID: guid1}, grants.Identity{Name: "b", ClientID: guid1}),
	} {
		if r.Identities[0].Fault == "" || r.Identities[1].Fault == "" || r.Faults() != nil {
			t.Errorf("%s: %+v, %v", name, r.Identities, r.Faults())
		}
	}
	two := identities(grants.Identity{Name: "a", Default: true},
		grants.Identity{Name: "b", ClientID: guid1, Default: true})
	for _, i := range two.Identities {
		if i.Default || i.Fault != "" {
			t.Errorf("one of two defaults: %+v", i)
		}
	}
	half := identities(grants.Identity{Name: "device"}, grants.Identity{Name: "a", Fault: "x"})
	if half.Identities[0].Fault != "" {
		t.Errorf("a faulty identity without an ID takes the place of the system-assigned one: %+v", half.Identities)
	}
}

// Tokens that an idle grant may allow once it is mended are kept, and no others.
func TestKeepsTokensOfIdleGrants(t *testing.T) {
	t.Parallel()
	key := func(id, resource string) tokencache.Key {
		k := tokencache.Key{Resource: resource}
		if id != "" {
			k.Selector = tokencache.Selector{Kind: tokencache.ClientID, ID: id}
		}
		return k
	}
	rules := edge()
	rules.Grants = rules.Grants[:1]
	rules.Grants[0].Fault = "x"
	a := grants.NewAuthorizer(rules.Settle())
	for k, want := range map[tokencache.Key]bool{
		key(guid1, vault): true, key(guid1, storage): true, key(guid1, blob): false, key("", vault): false,
	} {
		if a.Keeps(k) != want || a.IdentityOf(k) != nil {
			t.Errorf("%v: kept %v", k, a.Keeps(k))
		}
	}
	rules.Identities[1].Fault = "which ID it has is not understood"
	if a = grants.NewAuthorizer(rules.Settle()); !a.Keeps(key(guid2, vault)) || a.Keeps(key(guid2, blob)) {
		t.Error("of an identity that is not understood")
	}
}

// No grant loses its tokens for asking that too many are prefetched.
func TestSettleTooManyToPrefetch(t *testing.T) {
	t.Parallel()
	rules := edge()
	for i := range tokencache.MaxKeys + 1 {
		rules.Grants = append(rules.Grants, grants.Grant{Caller: grants.Match{Module: "m"}, Identity: "device",
			Resources: []string{fmt.Sprintf("api://%d", i)}, Prefetch: true})
	}
	settled := rules.Settle()
	a := grants.NewAuthorizer(settled)
	last := grants.Request{Resource: fmt.Sprintf("api://%d", tokencache.MaxKeys)}
	_, denial := a.Authorize(&grants.Caller{Module: "m"}, last)
	if n := len(a.Prefetch()); denial != nil || n != tokencache.MaxKeys {
		t.Errorf("%+v, %d are prefetched", denial, n)
	}
	if settled.Faults() != nil || len(rules.Faults()) != 1 {
		t.Errorf("%v, before %v", settled.Faults(), rules.Faults())
	}
}
