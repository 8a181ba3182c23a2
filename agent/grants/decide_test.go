package grants_test

import (
	"fmt"
	"strings"
	"testing"

	"perceptd/agent/grants"
)

const (
	vault   = "https://vault.azure.net"
	storage = "https://storage.azure.com"
)

const (
	imageID    = "sha256:6f1d9c0a6f1d9c0a6f1d9c0a6f1d9c0a6f1d9c0a6f1d9c0a6f1d9c0a6f1d9c0a"
	repoDigest = "registry.example/cam@sha256:0a9c1d6f0a9c1d6f0a9c1d6f0a9c1d6f0a9c1d6f0a9c1d6f0a9c1d6f0a9c1d6f"
)

func uid(n uint32) *uint32 { return &n }

func image(id string, digests ...string) *grants.Container {
	return &grants.Container{
		ID: strings.Repeat("ab", 32), Name: "cam", Image: "cam:2", Digest: id, RepoDigests: digests,
	}
}

// kinds grants one resource to callers of every kind, each with another identity.
func kinds() grants.Rules {
	r := grants.Rules{}
	for i, m := range []grants.Match{
		{Module: "vision"}, {Unit: "cam.service"}, {Image: imageID}, {Image: repoDigest},
		{UID: uid(1000)}, {GID: uid(44), Group: "video"}, {GID: uid(995)},
	} {
		name := fmt.Sprintf("id%d", i)
		r.Identities = append(r.Identities,
			grants.Identity{Name: name, ClientID: fmt.Sprintf("00000000-0000-0000-0000-%012d", i)})
		r.Grants = append(r.Grants, grants.Grant{
			Caller: m, Identity: name, Resources: []string{vault}, Place: fmt.Sprintf("config.toml:%d", 10*i),
		})
	}
	return r
}

func TestMostSpecificWins(t *testing.T) {
	t.Parallel()
	a := grants.NewAuthorizer(kinds())
	for _, row := range []struct {
		name     string
		caller   grants.Caller
		want     string // identities that it may have, or why not
		excluded int    // grants that are for it and do not count
	}{
		{"a module", grants.Caller{Module: "vision"}, "id0", 0},
		{"a module whose container's image has a grant too",
			grants.Caller{Module: "vision", Container: image(imageID)}, "id0", 1},
		{"a module with no grant of its own, by its image",
			grants.Caller{Module: "speech", Container: image(imageID)}, "id2", 0},
		{"a module with no grant, in no known container",
			grants.Caller{Module: "speech", UID: 1000, Unit: "cam.service", GID: 44},
			"no grant is for module speech", 0},
		{"a service", grants.Caller{Unit: "cam.service", UID: 0}, "id1", 0},
		{"a service narrows what its user has", grants.Caller{Unit: "cam.service", UID: 1000, GID: 44}, "id1", 2},
		{"another service of that user", grants.Caller{Unit: "other.service", UID: 1000, GID: 44}, "id4", 1},
		{"a service's process in a pid namespace of its own",
			grants.Caller{Unit: "cam.service", UID: 1000, GID: 44, Nested: true}, "id1", 0},
		{"one of another service, whose user says nothing",
			grants.Caller{Unit: "other.service", UID: 1000, GID: 44, Groups: []uint32{995}, Nested: true},
			"no grant is for unit other.service (uid 1000 in a pid namespace of its own), " +
				"whose uid and groups say nothing there", 0},
		{"one of no service", grants.Caller{UID: 1000, GID: 44, Nested: true},
			"no grant is for uid 1000 in a pid namespace of its own", 0},
		{"a service in a container says nothing",
			grants.Caller{Unit: "cam.service", UID: 1000, Container: image("sha256:other")},
			"no grant is for container cam", 0},
		{"an image by its ID", grants.Caller{UID: 1000, Container: image(imageID)}, "id2", 0},
		{"an image by a registry's digest",
			grants.Caller{UID: 1000, Container: image("sha256:other", "x@sha256:1", repoDigest)}, "id3", 0},
		{"by both", grants.Caller{Container: image(imageID, repoDigest)}, "id2 id3", 0},
		{"a tag is nobody's proof",
			grants.Caller{Container: &grants.Container{Image: imageID}}, "no grant is for container", 0},
		{"root of a container is not the user",
			grants.Caller{UID: 1000, GID: 44, Container: image("sha256:other")}, "no grant is for", 0},
		{"a user, and not its groups", grants.Caller{UID: 1000, GID: 44, Groups: []uint32{995}}, "id4", 2},
		{"its own group", grants.Caller{UID: 7, GID: 44}, "id5", 0},
		{"a supplementary group", grants.Caller{UID: 7, GID: 7, Groups: []uint32{1, 995}}, "id6", 0},
		{"two groups", grants.Caller{UID: 7, GID: 44, Groups: []uint32{44, 995}}, "id5 id6", 0},
		{"nobody", grants.Caller{UID: 7, GID: 7}, "no grant is for uid 7", 0},
		{"of whom nothing is known", grants.Caller{UID: grants.NoID, GID: grants.NoID}, "no grant is for", 0},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			d := a.Decide(&row.caller, grants.Request{Resource: vault})
			var all []string
			excluded := 0
			for _, c := range d.Evaluations {
				if c.Decides {
					all = append(all, c.Identity)
				} else {
					excluded++
				}
			}
			switch {
			case strings.HasPrefix(row.want, "no grant"):
				if d.Allowed || d.Grant != nil || !strings.HasPrefix(d.Reason, row.want) ||
					d.Denial.Err != grants.ErrNotGranted {
					t.Errorf("%+v", d)
				}
			case len(all) == 1:
				if !d.Allowed || d.Identity != row.want || d.Grant == nil ||
					!strings.Contains(d.Reason, d.Grant.Place) {
					t.Errorf("%+v", d)
				}
			case d.Allowed || d.Denial.Err != grants.ErrAmbiguousIdentity ||
				strings.Join(d.Denial.Choices, " ") != row.want:
				t.Errorf("%+v", d)
			}
			if !strings.HasPrefix(row.want, "no grant") && strings.Join(all, " ") != row.want {
				t.Errorf("decided by %v, want %s", all, row.want)
			}
			if excluded != row.excluded {
				t.Errorf("%d grants do not count, want %d", excluded, row.excluded)
			}
			if has := a.GrantsFor(&row.caller); len(has) != len(all) {
				t.Errorf("has %v", has)
			}
		})
	}
}

// A denial names the grants that come nearest to allowing the request.
func TestDenialsExplainThemselves(t *testing.T) {
	t.Parallel()
	rules := kinds()
	rules.Grants[4].Resources = []string{vault, storage}
	a := grants.NewAuthorizer(rules)
	service := grants.Caller{Unit: "cam.service", UID: 1000, PID: 3}
	for _, row := range []struct {
		request grants.Request
		want    string
	}{
		{grants.Request{Resource: storage},
			`none of the grants that decide over unit cam.service (uid 1000, pid 3) names https://storage.azure.com: ` +
				`grant 2 (config.toml:10) for unit cam.service; ` +
				`grant 5 (config.toml:40) for uid 1000 would allow it, but it is less specific and does not count`},
		{grants.Request{Resource: vault, Identity: "id0"},
			`none of the grants that decide over unit cam.service (uid 1000, pid 3) names https://vault.azure.net ` +
				`with that identity: grant 2 (config.toml:10) for unit cam.service`},
		{grants.Request{Resource: vault, Identity: "robot"}, "Identity not found"},
		{grants.Request{Resource: "nothing"}, "is no App ID URI"},
	} {
		d := a.Decide(&service, row.request)
		if d.Allowed || !strings.Contains(d.Reason, row.want) {
			t.Errorf("got  %s\nwant %s", d.Reason, row.want)
		}
		for _, c := range d.Evaluations {
			if c.Why == "" || strings.Contains(c.Why, "allows it") {
				t.Errorf("%+v: %q", c.Ref, c.Why)
			}
		}
	}
	if all := a.Refs(); len(all) != 7 || all[4].String() != "grant 5 (config.toml:40)" {
		t.Errorf("%v", all)
	}
	if name := (&grants.Ref{}).String(); name != "grant 1" {
		t.Errorf("%q", name)
	}
}
