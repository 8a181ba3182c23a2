package grants_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"perceptd/agent/grants"
)

// suggestionText is a suggestion in a line.
func suggestionText(s *grants.Suggestion) string {
	switch {
	case s == nil:
		return "nothing"
	case s.Why != "":
		return s.Why
	}
	var all []string
	if s.AddTo != nil {
		all = append(all, "add to "+s.AddTo.String())
	}
	for _, g := range s.Grants {
		all = append(all, fmt.Sprintf("%v %s %s", g.Caller, g.Identity, strings.Join(g.Resources, " ")))
	}
	if s.Repeats {
		all = append(all, "repeats")
	}
	return strings.Join(all, "; ")
}

func TestSuggestions(t *testing.T) {
	t.Parallel()
	const other, digest = "https://other.example",
		"sha256:0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a"
	const repo = "registry.example/cam@" + digest
	edge, video, eight := uint32(1000), uint32(44), uint32(8)
	a := grants.NewAuthorizer(grants.Rules{
		Identities: []grants.Identity{{Name: "device", Default: true}, {Name: "vision", ClientID: someID}},
		Grants: []grants.Grant{
			{Caller: grants.Match{Unit: "cam.service"}, Identity: "vision", Resources: []string{vault},
				Place: "config.toml:23"},
			{Caller: grants.Match{UID: &edge, User: "edge"}, Identity: "device", Resources: []string{vault, storage}},
			{Caller: grants.Match{GID: &video, Group: "video"}, Identity: "device", Resources: []string{vault}},
			{Caller: grants.Match{Image: digest}, Identity: "device", Resources: []string{vault}},
			{Caller: grants.Match{UID: &edge, User: "edge"}, Identity: "vision", Resources: []string{storage}},
			{Caller: grants.Match{UID: &eight}, Identity: "device", Resources: []string{vault}},
			{Caller: grants.Match{UID: &eight}, Identity: "vision", Resources: []string{"https://spelt.example"}},
		},
	})
	asks := func(resource string) grants.Request { return grants.Request{Resource: resource} }
	for _, row := range []struct {
		name    string
		caller  grants.Caller
		request grants.Request
		want    string
	}{
		{"a service with a grant of its own", camera, asks(other),
			"add to grant 1 (config.toml:23); unit cam.service vision " + other},
		{"the same, of another identity", camera, grants.Request{Resource: vault, Identity: "device"},
			"unit cam.service device " + vault},
		{"the same, in a pid namespace of its own",
			grants.Caller{Unit: "cam.service", UID: 0, Nested: true}, asks(other),
			"add to grant 1 (config.toml:23); unit cam.service vision " + other},
		{"a service that its user's grants decide about", grants.Caller{Unit: "other.service", UID: 1000}, asks(other),
			"add to grant 2; user edge (uid 1000) device " + other},
		{"a service that its user's group's grants decide about", grants.Caller{Unit: "other.service", UID: 7, GID: 44},
			asks(other), "uid 7 device " + other + " " + vault + "; repeats"},
		{"a spelling of another identity's grant", grants.Caller{UID: 8, GID: 8}, asks("https://spelt.example/"),
			"add to grant 7; uid 8 vision https://spelt.example/"},
		{"the same, of the identity that is named", grants.Caller{UID: 8, GID: 8},
			grants.Request{Resource: "https://spelt.example/", Identity: "device"},
			"add to grant 6; uid 8 device https://spelt.example/"},
		{"a service with no grant", grants.Caller{Unit: "other.service", UID: 0}, asks(other),
			"unit other.service device " + other},
		{"a login with grants", grants.Caller{UID: 1000, GID: 1000}, asks(other),
			"add to grant 2; user edge (uid 1000) device " + other},
		{"a login with a grant of its group", grants.Caller{UID: 7, GID: 44}, asks(other),
			"uid 7 device " + other + " " + vault + "; repeats"},
		{"a login", grants.Caller{UID: 7, GID: 7}, asks(other), "uid 7 device " + other},
		{"a group's secret", grants.Caller{UID: grants.NoID, GID: 44, Via: "header secret"}, asks(other),
			"add to grant 3; group video (gid 44) device " + other},
		{"a module", grants.Caller{Module: "speech", UID: 1000, Container: &grants.Container{Digest: digest}},
			asks(other),
			"module speech device " + other + " " + vault + "; repeats"},
		{"root of a container without a module", grants.Caller{Container: &grants.Container{Digest: digest,
			RepoDigests: []string{repo}}, UID: 0}, asks(other), "add to grant 4; container image " + digest +
			" device " + other},
		{"one that no grant is for", grants.Caller{Container: &grants.Container{Digest: "sha256:x",
			RepoDigests: []string{repo}}, UID: 0}, asks(other), "container image " + repo + " device " + other},
		{"one whose image is not known", grants.Caller{Container: &grants.Container{Image: "cam:2"}, UID: 0},
			asks(other),
			"no grant can be for a container whose image the engine does not say: give it a module's socket"},
		{"a process in a pid namespace of its own", grants.Caller{UID: 1000, Nested: true}, asks(other),
			"no grant can be for a process in a pid namespace of its own that is of no service: " +
				"run it as a service, or " +
				"give it a module's socket"},
		{"a spelling that is not Azure's own", camera, asks(vault + "/"), "nothing"},
		{"the same, where no grant has the other", camera, asks("http://iothubs.azure.net/"),
			"add to grant 1 (config.toml:23); unit cam.service vision https://iothubs.azure.net"},
	} {
		_, denial := a.Authorize(&row.caller, row.request)
		if denial == nil || denial.Err != grants.ErrNotGranted || suggestionText(denial.Suggestion) != row.want {
			t.Errorf("%s: %s, want %s", row.name, suggestionText(denial.Suggestion), row.want)
		}
	}
}

// Which identity is meant is not guessed where several could be.
func TestSuggestionWithoutIdentity(t *testing.T) {
	t.Parallel()
	a := grants.NewAuthorizer(grants.Rules{Identities: []grants.Identity{{Name: "one", ClientID: someID},
		{Name: "two"}}})
	_, denial := a.Authorize(&camera, grants.Request{Resource: vault})
	if got := suggestionText(denial.Suggestion); got != "unit cam.service  "+vault {
		t.Error(got)
	}
	_, denial = a.Authorize(&camera, grants.Request{Resource: vault, ClientID: someID})
	if got := suggestionText(denial.Suggestion); got != "unit cam.service one "+vault {
		t.Error(got)
	}
}

// Where a faulty grant decides too, it is to be mended first, and its resources are near misses of nothing.
func TestNoSuggestionBesideAFault(t *testing.T) {
	t.Parallel()
	service := grants.Match{Unit: "cam.service"}
	a := grants.NewAuthorizer(grants.Rules{
		Identities: []grants.Identity{{Name: "device", Default: true}},
		Grants: []grants.Grant{
			{Caller: service, Identity: "device", Resources: []string{storage}},
			{Caller: service, Identity: "device", Resources: []string{vault}, Fault: "a fault",
				Place: "/etc/percept/config.toml:9"},
		},
	})
	_, denial := a.Authorize(&camera, grants.Request{Resource: vault + "/"})
	const want = "grant 2 (config.toml:9) decides about it and is faulty: " +
		"an administrator mends it, and then: perceptctl reload"
	if denial.Err != grants.ErrNotGranted || denial.NearMiss != nil || suggestionText(denial.Suggestion) != want {
		t.Errorf("%+v, %s", denial, suggestionText(denial.Suggestion))
	}
}

// What is suggested gives the caller what it asked for beside what it has, and gives nothing to a caller of which only
// the user or group is the same. To another user's process in the same service it gives what was asked for at most.
func TestSuggestionsGrantNoMore(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		rules := kinds()
		for i := range rules.Grants {
			rules.Grants[i].Resources = rapid.SliceOfNDistinct(rapid.SampledFrom([]string{vault, storage,
				"https://a.example"}), 1, 3, rapid.ID).Draw(t, "resources")
		}
		rules.Grants = rapid.SliceOfN(rapid.SampledFrom(rules.Grants), 0, 6).Draw(t, "grants")
		caller := grants.Caller{
			Module: rapid.SampledFrom([]string{"", "vision", "speech"}).Draw(t, "module"),
			Unit:   rapid.SampledFrom([]string{"", "cam.service", "other.service"}).Draw(t, "unit"),
			UID:    rapid.SampledFrom([]uint32{0, 7, 1000}).Draw(t, "uid"), GID: rapid.SampledFrom([]uint32{7,
				44}).Draw(t, "gid"),
			Nested: rapid.Bool().Draw(t, "nested"),
		}
		if rapid.Bool().Draw(t, "in a container") {
			caller.Container = image(imageID, repoDigest)
		}
		r := grants.Request{Resource: rapid.SampledFrom([]string{vault, storage, "https://b.example"}).Draw(t, "asked")}
		before := grants.NewAuthorizer(rules)
		_, denial := before.Authorize(&caller, r)
		if denial == nil || denial.Err != grants.ErrNotGranted || denial.Suggestion.Why != "" ||
			denial.Suggestion.Grants[0].Identity == "" {
			return
		}
		with := rules
		with.Grants = append(slices.Clone(rules.Grants), denial.Suggestion.Grants...)
		after := grants.NewAuthorizer(with)
		if !after.MayHave(&caller, after.Named(denial.Suggestion.Grants[0].Identity), r.Resource) {
			t.Fatalf("%v is not granted %s by %s", caller, r.Resource, suggestionText(denial.Suggestion))
		}
		others := []grants.Caller{{UID: caller.UID, GID: caller.GID}, {Unit: "third.service", UID: caller.UID,
			GID: caller.GID},
			{Module: "third", UID: caller.UID, GID: caller.GID}}
		var beside []grants.Caller // of other users in the same service
		for _, uid := range []uint32{0, 7, 8, 1000} {
			if caller.Unit != "" && uid != caller.UID {
				beside = append(beside, grants.Caller{Unit: caller.Unit, UID: uid, GID: uid},
					grants.Caller{Unit: caller.Unit, UID: uid, GID: 44}, grants.Caller{Unit: caller.Unit, Nested: true})
			}
		}
		suggested := denial.Suggestion.Grants[0].Caller
		for i := range rules.Identities {
			identity := &rules.Identities[i]
			for _, resource := range []string{vault, storage, "https://a.example", "https://b.example"} {
				if before.MayHave(&caller, before.Named(identity.Name), resource) &&
					!after.MayHave(&caller, after.Named(identity.Name), resource) {
					t.Fatalf("%v loses %s by %s", caller, resource, suggestionText(denial.Suggestion))
				}
				for _, other := range others {
					ownUser := suggested.UID != nil // then a user's grant is what there is
					if !ownUser && after.MayHave(&other, after.Named(identity.Name), resource) &&
						!before.MayHave(&other, before.Named(identity.Name), resource) {
						t.Fatalf("%v gains %s by %s", other, resource, suggestionText(denial.Suggestion))
					}
				}
				for _, other := range beside {
					had := before.MayHave(&other, before.Named(identity.Name), resource)
					has := after.MayHave(&other, after.Named(identity.Name), resource)
					if asked := suggested.Unit != "" && resource == r.Resource; has && !had && !asked {
						t.Fatalf("%v gains %s by %s", other, resource, suggestionText(denial.Suggestion))
					}
					if had && !has && suggested.Unit == "" {
						t.Fatalf("%v loses %s by %s", other, resource, suggestionText(denial.Suggestion))
					}
				}
			}
		}
	})
}

// Two users' cron jobs are in one service: what one of them is denied is suggested for its user.
func TestSuggestionInAServiceOfSeveralUsers(t *testing.T) {
	t.Parallel()
	seven, eight := uint32(7), uint32(8)
	rules := grants.Rules{
		Identities: []grants.Identity{{Name: "device", Default: true}, {Name: "vision", ClientID: someID}},
		Grants: []grants.Grant{
			{Caller: grants.Match{UID: &seven}, Identity: "device", Resources: []string{vault}},
			{Caller: grants.Match{UID: &eight}, Identity: "vision", Resources: []string{"https://a.example"}},
		},
	}
	one := grants.Caller{UID: 7, GID: 7, Unit: "cron.service"}
	other := grants.Caller{UID: 8, GID: 8, Unit: "cron.service"}
	_, denial := grants.NewAuthorizer(rules).Authorize(&one, grants.Request{Resource: storage})
	rules.Grants = append(rules.Grants, denial.Suggestion.Grants...)
	after := grants.NewAuthorizer(rules)
	if !after.MayHave(&one, after.Named("device"), storage) || !after.MayHave(&one, after.Named("device"), vault) {
		t.Errorf("%v has not both by %s", one, suggestionText(denial.Suggestion))
	}
	if after.MayHave(&other, after.Named("device"), storage) || after.MayHave(&other, after.Named("device"), vault) ||
		!after.MayHave(&other, after.Named("vision"), "https://a.example") {
		t.Errorf("%v gains or loses by %s", other, suggestionText(denial.Suggestion))
	}
}
