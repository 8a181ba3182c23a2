package deny

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"perceptd/agent/grants"
)

const (
	vault   = "https://vault.azure.net"
	storage = "https://storage.azure.com"
	blob    = "https://blob.storage.azure.net"
	guid    = "00000000-0000-0000-0000-0000000000aB"
)

var (
	device = grants.Identity{Name: "device"}
	vision = grants.Identity{Name: "vision", ClientID: guid}
)

func uid(n uint32) *uint32 { return &n }

func names() Names {
	return Names{
		Rules: grants.Rules{
			Identities: []grants.Identity{device, vision},
			Grants: []grants.Grant{
				{Caller: grants.Match{Module: "vision"}, Identity: "vision", Resources: []string{vault, storage, blob}},
			},
			Alternates: map[string][]string{storage: {blob}},
		},
		LookupUser: func(name string) (uint32, bool, error) {
			switch name {
			case "edge":
				return 1000, true, nil
			case "broken":
				return 0, false, errors.New("no directory")
			}
			return 0, false, nil
		},
	}
}

func listOf(targets ...Target) *List {
	var r Record
	for i, target := range targets {
		r.Rules = append(r.Rules, Rule{ID: string(rune('a' + i)), Target: target, Origin: Local})
	}
	return Compile(r, names())
}

// A rule takes no token of another identity away since its own is faulty, and takes all away that the resource's other
// names may be where these are not understood.
func TestRulesWhileTheConfigurationIsFaulty(t *testing.T) {
	t.Parallel()
	faulty := names()
	faulty.Rules.Identities = []grants.Identity{device, {Name: "vision", Fault: "its client_id is no GUID"}}
	record := func(target Target) Record {
		return Record{Rules: []Rule{{ID: "a", Target: target, Origin: Local}}}
	}
	module := grants.Caller{Module: "vision"}
	ofIdentity := Compile(record(Target{Identity: "vision"}), faulty)
	if rule := ofIdentity.Denies(&module, &device, vault); rule != nil {
		t.Errorf("the system-assigned identity is denied by %+v", rule)
	}
	if idle := ofIdentity.Idle("a"); !strings.Contains(idle, "is faulty") {
		t.Errorf("idle: %q", idle)
	}
	for name, change := range map[string]func(*grants.Rules){
		"idle":           func(r *grants.Rules) { r.Alternates, r.IdleAlternates = nil, r.Alternates },
		"not understood": func(r *grants.Rules) { r.Alternates, r.AnyAlternate = nil, true },
	} {
		faulty := names()
		change(&faulty.Rules)
		if Compile(record(Target{Resource: storage}), faulty).Denies(&module, &vision, blob) == nil {
			t.Errorf("alternates %s: not denied by the other name", name)
		}
		byAny := Compile(record(Target{Resource: "api://alternate"}), faulty).Denies(&module, &vision, blob) != nil
		if byAny != faulty.Rules.AnyAlternate {
			t.Errorf("alternates %s: denied by a name that nothing has: %v", name, byAny)
		}
	}
}

func TestWhatRulesMatch(t *testing.T) {
	t.Parallel()
	module := grants.Caller{Module: "vision", UID: 1000}
	edgeModule := grants.Caller{UID: 0, Container: &grants.Container{EdgeModule: "vision"}}
	unit := grants.Caller{Unit: "camera.service", UID: 1000}
	nested := grants.Caller{Unit: "camera.service", UID: 1000, Nested: true}
	user := grants.Caller{UID: 1000}
	rootless := grants.Caller{UID: 1000, Container: &grants.Container{}}
	other := grants.Caller{UID: 1001, Unit: "other.service"}
	secretOfUnit := grants.Caller{UID: grants.NoID, GID: grants.NoID, Unit: "camera.service", Via: "loopback",
		Peer: uid(1000)}
	secretOfGroup := grants.Caller{UID: grants.NoID, GID: 44, Via: "loopback"}
	supposed := grants.Caller{UID: grants.NoID, GID: grants.NoID, Module: "speech"}
	for _, row := range []struct {
		name     string
		rule     Target
		caller   grants.Caller
		identity grants.Identity
		resource string
		denied   bool
	}{
		{"all", Target{All: true}, other, device, vault, true},
		{"module", Target{Module: "vision"}, module, vision, vault, true},
		{"module by edgeAgent's label", Target{Module: "vision"}, edgeModule, vision, vault, true},
		{"another module", Target{Module: "speech"}, module, vision, vault, false},
		{"module, and no module calls", Target{Module: "vision"}, user, vision, vault, false},
		{"unit", Target{Unit: "camera.service"}, unit, device, vault, true},
		{"unit without its suffix", Target{Unit: "camera"}, nested, device, vault, true},
		{"unit by its secret", Target{Unit: "camera"}, secretOfUnit, device, vault, true},
		{"another unit", Target{Unit: "camera"}, other, device, vault, false},
		{"user by name", Target{User: "edge"}, user, device, vault, true},
		{"user by uid", Target{User: "1000"}, user, device, vault, true},
		{"the user's unit", Target{User: "edge"}, unit, device, vault, true},
		{"the user's unit with own pids", Target{User: "edge"}, nested, device, vault, true},
		{"the user's container", Target{User: "edge"}, rootless, device, vault, true},
		{"the user's module", Target{User: "edge"}, module, vision, vault, true},
		{"the user at the other end of loopback", Target{User: "edge"}, secretOfUnit, device, vault, true},
		{"another at the other end", Target{User: "1001"}, secretOfUnit, device, vault, false},
		{"nobody knows who is at the other end", Target{User: "edge"}, secretOfGroup, device, vault, true},
		{"nobody says of which user", Target{User: "edge"}, supposed, device, vault, false},
		{"another user", Target{User: "edge"}, other, device, vault, false},
		{"a user that there is not", Target{User: "ghost"}, secretOfGroup, device, vault, false},
		{"a user that cannot be looked up", Target{User: "broken"}, other, device, vault, true},
		{"identity", Target{Identity: "vision"}, user, vision, vault, true},
		{"identity by what the source is asked with", Target{Identity: "vision"}, user,
			grants.Identity{Name: "x", ClientID: "00000000-0000-0000-0000-0000000000Ab"}, vault, true},
		{"another identity", Target{Identity: "vision"}, user, device, vault, false},
		{"identity that is not configured", Target{Identity: "speech"}, user, device, vault, false},
		{"resource", Target{Resource: vault}, user, device, vault, true},
		{"resource in another spelling", Target{Resource: "HTTPS://Vault.Azure.Net:443/"}, user, device, vault, true},
		{"resource as a scope", Target{Resource: vault + "/.default"}, user, device, vault, true},
		{"another resource", Target{Resource: vault}, user, device, storage, false},
		{"alternate of a denied resource", Target{Resource: storage}, user, device, blob, true},
		{"resource of a denied alternate", Target{Resource: blob}, user, device, storage, true},
		{"all that it names", Target{Module: "vision", Identity: "vision", Resource: vault}, module, vision, vault, true},
		{"not all that it names", Target{Module: "vision", Resource: vault}, module, vision, storage, false},
	} {
		rule := listOf(row.rule).Denies(&row.caller, &row.identity, row.resource)
		if (rule != nil) != row.denied {
			t.Errorf("%s: denied %v", row.name, rule != nil)
		}
	}
	var none *List
	if none.Denies(&user, &device, vault) != nil || none.DeniesAll(&device, vault) != nil || none.Lost() != "" {
		t.Error("no list denies")
	}
	if all := listOf(Target{Module: "vision"}, Target{Identity: "vision"}); all.DeniesAll(&vision, vault) == nil ||
		all.DeniesAll(&device, vault) != nil {
		t.Error("who is denied to all is wrong")
	}
}

// TestNamesOfAResource shows which names a rule for one of a resource's names has besides: those of its alternates, and
// of what they are alternates of.
func TestNamesOfAResource(t *testing.T) {
	t.Parallel()
	const queue, file = "https://queue.storage.azure.net", "api://Files"
	n := names()
	n.Rules.Alternates = map[string][]string{storage: {blob}, queue: {blob, file}}
	for named, want := range map[string][]string{
		"":                       nil,
		vault:                    nil,
		storage + ":443/":        {"api://files", blob, queue, storage},
		blob:                     {"api://files", blob, queue, storage},
		"API://files//.default":  {"api://files", blob, queue, storage},
		"https://other.example/": nil,
	} {
		rule := Rule{ID: "a", Target: Target{Resource: named, Module: "vision"}}
		if got := Compile(Record{Rules: []Rule{rule}}, n).NamesOfResource("a"); !slices.Equal(got, want) {
			t.Errorf("%s: %q", named, got)
		}
	}
	if got := new(List).NamesOfResource("a"); got != nil {
		t.Errorf("a rule that is not in force: %q", got)
	}
}

func TestBadTargets(t *testing.T) {
	t.Parallel()
	for _, target := range []Target{
		{}, {All: true, Module: "vision"}, {Module: "a b"}, {Module: "../x"}, {Unit: "a/b"}, {Unit: "x@.service"},
		{User: "a:b"}, {User: "a\n"}, {User: "4294967295"}, {User: "99999999999"}, {Identity: "a b"}, {Resource: "vault"},
		{Resource: "https://a\n"},
	} {
		if target.Check() == nil {
			t.Errorf("%+v is taken", target)
		}
	}
	for _, target := range []Target{
		{All: true}, {Module: "vision"}, {Unit: "camera"}, {Unit: "camera@1.service"}, {User: "edge"}, {User: "0"},
		{Identity: "device"}, {Resource: vault}, {Resource: vault + "/.default"},
	} {
		if err := target.Check(); err != nil {
			t.Errorf("%+v: %v", target, err)
		}
	}
}

func anyTarget(t *rapid.T) Target {
	pick := func(name string, of ...string) string { return rapid.SampledFrom(append(of, "")).Draw(t, name) }
	target := Target{
		Module: pick("module", "vision", "speech"), Unit: pick("unit", "camera", "camera.service"),
		User: pick("user", "edge", "0", "ghost"), Identity: pick("identity", "device", "vision", "gone"),
		Resource: pick("resource", vault, storage, blob, vault+"/"),
	}
	if target == (Target{}) {
		target.All = true
	}
	return target
}

func anyCaller(t *rapid.T) grants.Caller {
	return grants.Caller{
		Module: rapid.SampledFrom([]string{"", "vision", "speech"}).Draw(t, "module"),
		Unit:   rapid.SampledFrom([]string{"", "camera.service"}).Draw(t, "unit"),
		UID:    rapid.SampledFrom([]uint32{0, 1000, grants.NoID}).Draw(t, "uid"),
		Via:    rapid.SampledFrom([]string{"", "loopback"}).Draw(t, "via"),
	}
}

// More rules never deny less: not in a list, and not in a record that they are added to.
func TestMoreRulesDenyMore(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		targets := rapid.SliceOfN(rapid.Custom(anyTarget), 1, 6).Draw(t, "targets")
		kept := rapid.IntRange(0, len(targets)).Draw(t, "kept")
		caller := anyCaller(t)
		identity := rapid.SampledFrom([]grants.Identity{device, vision}).Draw(t, "identity")
		resource := rapid.SampledFrom([]string{vault, storage, blob}).Draw(t, "resource")
		few, all := listOf(targets[:kept]...), listOf(targets...)
		if few.Denies(&caller, &identity, resource) != nil && all.Denies(&caller, &identity, resource) == nil {
			t.Fatalf("%v deny, and with %v they do not", targets[:kept], targets[kept:])
		}
		for _, target := range targets {
			if !slices.ContainsFunc(all.standing, func(s standing) bool { return s.rule.Target == target }) {
				t.Fatalf("%v is not in force", target)
			}
		}
	})
}

// A rule is idle only where no grant can be for whom it names.
func TestIdleByGrants(t *testing.T) {
	image := "sha256:" + strings.Repeat("0123456789abcdef", 4)
	uid := uint32(1000)
	module, container := grants.Match{Module: "log"}, grants.Match{Image: image}
	unit, user, group := grants.Match{Unit: "camera.service"}, grants.Match{UID: &uid}, grants.Match{GID: &uid}
	for _, c := range []struct {
		rule    Target
		granted []grants.Match
		why     string
	}{
		{Target{Module: "vision"}, []grants.Match{module, unit, user, group}, "no grant is for a module named vision"},
		{Target{Module: "log"}, []grants.Match{module}, ""},
		{Target{Module: "vision"}, []grants.Match{module, container}, ""},
		{Target{Unit: "camra"}, []grants.Match{unit, container}, "no grant is for a unit named camra.service"},
		{Target{Unit: "camera.socket"}, []grants.Match{unit}, "no grant is for a unit named camera.socket"},
		{Target{Unit: "camera"}, []grants.Match{unit}, ""},
		{Target{Unit: "camra"}, []grants.Match{unit, user}, ""},
		{Target{Unit: "camra"}, []grants.Match{unit, group}, ""},
		{Target{Unit: "camra"}, []grants.Match{unit, module}, ""},
	} {
		rules := grants.Rules{Identities: []grants.Identity{{Name: "device"}}}
		for _, m := range c.granted {
			rules.Grants = append(rules.Grants,
				grants.Grant{Caller: m, Identity: "device", Resources: []string{"https://vault.azure.net"}})
		}
		l := Compile(Record{Lineage: "L", Rules: []Rule{{ID: "a", Target: c.rule, Origin: Twin, Hub: "h"}}}, Names{Rules: rules})
		if why := l.Idle("a"); why != c.why {
			t.Errorf("%v with grants for %v: idle %q, not %q", c.rule, c.granted, why, c.why)
		}
	}
}

// An IoT Edge module that is granted by its image is denied by its name, and the rule is not shown as idle.
func TestEdgeModuleIsNotIdle(t *testing.T) {
	image := "sha256:" + strings.Repeat("0123456789abcdef", 4)
	rules := grants.Rules{
		Identities: []grants.Identity{{Name: "device"}},
		Grants: []grants.Grant{{
			Caller: grants.Match{Image: image}, Identity: "device", Resources: []string{"https://vault.azure.net"}}},
	}
	l := Compile(Record{Lineage: "L", Rules: []Rule{{ID: "a", Target: Target{Module: "vision"}, Origin: Twin, Hub: "h"}}},
		Names{Rules: rules})
	caller := grants.Caller{
		UID: grants.NoID, GID: grants.NoID, Container: &grants.Container{Digest: image, EdgeModule: "vision"}}
	if l.Denies(&caller, &rules.Identities[0], "https://vault.azure.net") == nil || l.Idle("a") != "" {
		t.Errorf("not denied, or idle: %q", l.Idle("a"))
	}
}
