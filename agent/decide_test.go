package agent_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"perceptd/agent"
	"perceptd/tokencache/tokencachetest"
)

const (
	imageID    = "sha256:6f1d9c0a6f1d9c0a6f1d9c0a6f1d9c0a6f1d9c0a6f1d9c0a6f1d9c0a6f1d9c0a"
	repoDigest = "registry.example/cam@sha256:0a9c1d6f0a9c1d6f0a9c1d6f0a9c1d6f0a9c1d6f0a9c1d6f0a9c1d6f0a9c1d6f"
)

func image(id string, digests ...string) *agent.Container {
	return &agent.Container{ID: strings.Repeat("ab", 32), Name: "cam", Image: "cam:2", Digest: id, RepoDigests: digests}
}

// kinds grants the same resource to callers of every kind, each with an identity of its own.
func kinds() agent.Rules {
	r := agent.Rules{}
	for i, m := range []agent.Match{
		{Module: "vision"}, {Unit: "cam.service"}, {Image: imageID}, {Image: repoDigest}, {UID: uid(1000)}, {GID: uid(44), Group: "video"}, {GID: uid(995)},
	} {
		name := fmt.Sprintf("id%d", i)
		r.Identities = append(r.Identities, agent.Identity{Name: name, ClientID: fmt.Sprintf("00000000-0000-0000-0000-%012d", i)})
		r.Grants = append(r.Grants, agent.Grant{Caller: m, Identity: name, Resources: []string{vault}, Place: fmt.Sprintf("config.toml:%d", 10*i)})
	}
	return r
}

func newAgent(t testing.TB, r agent.Rules) *agent.Agent {
	t.Helper()
	a, err := agent.New(agent.Options{Fetch: new(tokencachetest.Source).Fetch, Rules: r})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(a.Close)
	return a
}

func TestMostSpecificWins(t *testing.T) {
	t.Parallel()
	a := newAgent(t, kinds())
	for _, row := range []struct {
		name     string
		caller   agent.Caller
		want     string // identities that it may have, or why not
		excluded int    // grants that are for it and do not count
	}{
		{"a module", agent.Caller{Module: "vision"}, "id0", 0},
		{"a module whose container's image has a grant too", agent.Caller{Module: "vision", Container: image(imageID)}, "id0", 1},
		{"a module with no grant of its own, by its image", agent.Caller{Module: "speech", Container: image(imageID)}, "id2", 0},
		{"a module with no grant, in no known container", agent.Caller{Module: "speech", UID: 1000, Unit: "cam.service", GID: 44}, "no grant is for module speech", 0},
		{"a service", agent.Caller{Unit: "cam.service", UID: 0}, "id1", 0},
		{"a service narrows what its user has", agent.Caller{Unit: "cam.service", UID: 1000, GID: 44}, "id1", 2},
		{"another service of that user", agent.Caller{Unit: "other.service", UID: 1000, GID: 44}, "id4", 1},
		{"a service's process in a pid namespace of its own", agent.Caller{Unit: "cam.service", UID: 1000, GID: 44, Nested: true}, "id1", 0},
		{"one of another service, whose user says nothing", agent.Caller{Unit: "other.service", UID: 1000, GID: 44, Groups: []uint32{995}, Nested: true},
			"no grant is for unit other.service (uid 1000 in a pid namespace of its own), whose uid and groups say nothing there", 0},
		{"one of no service", agent.Caller{UID: 1000, GID: 44, Nested: true}, "no grant is for uid 1000 in a pid namespace of its own", 0},
		{"a service in a container says nothing", agent.Caller{Unit: "cam.service", UID: 1000, Container: image("sha256:other")}, "no grant is for container cam", 0},
		{"an image by its ID", agent.Caller{UID: 1000, Container: image(imageID)}, "id2", 0},
		{"an image by a registry's digest", agent.Caller{UID: 1000, Container: image("sha256:other", "x@sha256:1", repoDigest)}, "id3", 0},
		{"by both", agent.Caller{Container: image(imageID, repoDigest)}, "id2 id3", 0},
		{"a tag is nobody's proof", agent.Caller{Container: &agent.Container{Image: imageID}}, "no grant is for container", 0},
		{"root of a container is not the user", agent.Caller{UID: 1000, GID: 44, Container: image("sha256:other")}, "no grant is for", 0},
		{"a user, and not its groups", agent.Caller{UID: 1000, GID: 44, Groups: []uint32{995}}, "id4", 2},
		{"its own group", agent.Caller{UID: 7, GID: 44}, "id5", 0},
		{"a supplementary group", agent.Caller{UID: 7, GID: 7, Groups: []uint32{1, 995}}, "id6", 0},
		{"two groups", agent.Caller{UID: 7, GID: 44, Groups: []uint32{44, 995}}, "id5 id6", 0},
		{"nobody", agent.Caller{UID: 7, GID: 7}, "no grant is for uid 7", 0},
		{"of whom nothing is known", agent.Caller{UID: agent.NoID, GID: agent.NoID}, "no grant is for", 0},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			d := a.Decide(row.caller, agent.Request{Resource: vault + "/.default"})
			var all []string
			excluded := 0
			for _, c := range d.Considered {
				if c.Decides {
					all = append(all, c.Identity)
				} else {
					excluded++
				}
			}
			switch {
			case strings.HasPrefix(row.want, "no grant"):
				if d.Allowed || d.Grant != nil || !strings.HasPrefix(d.Reason, row.want) || d.Err.Reason != agent.NotGranted {
					t.Errorf("%+v", d)
				}
			case len(all) == 1:
				if !d.Allowed || d.Identity != row.want || d.Grant == nil || !strings.Contains(d.Reason, d.Grant.Place) {
					t.Errorf("%+v", d)
				}
			case d.Allowed || d.Err.Reason != agent.AmbiguousIdentity || strings.Join(d.Err.Choices, " ") != row.want:
				t.Errorf("%+v", d)
			}
			if !strings.HasPrefix(row.want, "no grant") && strings.Join(all, " ") != row.want {
				t.Errorf("decided by %v, want %s", all, row.want)
			}
			if excluded != row.excluded {
				t.Errorf("%d grants do not count, want %d", excluded, row.excluded)
			}
			if held := a.Holdings(row.caller); len(held) != len(all) {
				t.Errorf("holds %v", held)
			}
		})
	}
}

// Why somebody is denied is told with the grants that stand nearest.
func TestDenialsExplainThemselves(t *testing.T) {
	t.Parallel()
	rules := kinds()
	rules.Grants[4].Resources = []string{vault, storage}
	a := newAgent(t, rules)
	service := agent.Caller{Unit: "cam.service", UID: 1000, PID: 3}
	for _, row := range []struct {
		request agent.Request
		want    string
	}{
		{agent.Request{Resource: storage}, `none of the grants that decide over unit cam.service (uid 1000, pid 3) names https://storage.azure.com: grant 2 (config.toml:10) for unit cam.service; grant 5 (config.toml:40) for uid 1000 would allow it, but it is less specific and does not count`},
		{agent.Request{Resource: vault, Identity: "id0"}, `none of the grants that decide over unit cam.service (uid 1000, pid 3) names https://vault.azure.net with that identity: grant 2 (config.toml:10) for unit cam.service`},
		{agent.Request{Resource: vault, Identity: "robot"}, "Identity not found"},
		{agent.Request{Resource: "nothing"}, "is no App ID URI"},
	} {
		d := a.Decide(service, row.request)
		if d.Allowed || !strings.Contains(d.Reason, row.want) {
			t.Errorf("got  %s\nwant %s", d.Reason, row.want)
		}
		for _, c := range d.Considered {
			if c.Why == "" || strings.Contains(c.Why, "allows it") {
				t.Errorf("%+v: %q", c.GrantRef, c.Why)
			}
		}
	}
	if all := a.Grants(); len(all) != 7 || all[4].String() != "grant 5 (config.toml:40)" || (&agent.GrantRef{}).String() != "grant 1" {
		t.Errorf("%v", all)
	}
}

// drawCaller draws a caller, of few values so that grants are for it.
func drawCaller(t *rapid.T) agent.Caller {
	small := rapid.Uint32Range(0, 2)
	c := agent.Caller{UID: small.Draw(t, "uid"), GID: small.Draw(t, "gid"), Groups: rapid.SliceOfN(small, 0, 3).Draw(t, "groups"), PID: 9}
	switch rapid.IntRange(0, 5).Draw(t, "place") {
	case 0:
		c.Module = rapid.SampledFrom([]string{"a", "b"}).Draw(t, "module")
	case 1:
		c.Module = "a"
		c.Container = image(rapid.SampledFrom([]string{imageID, "sha256:x"}).Draw(t, "image"))
	case 2:
		c.Container = image(imageID, repoDigest)
	case 3, 4:
		c.Unit = rapid.SampledFrom([]string{"a.service", "b.service"}).Draw(t, "unit")
	}
	return c
}

func drawMatch(t *rapid.T) agent.Match {
	n := rapid.Uint32Range(0, 2).Draw(t, "id")
	return rapid.SampledFrom([]agent.Match{
		{Module: "a"}, {Module: "b"}, {Unit: "a.service"}, {Unit: "b.service"}, {Image: imageID}, {Image: repoDigest}, {UID: &n}, {GID: &n},
	}).Draw(t, "match")
}

// Whatever the grants and the caller: a decision and a token say the same, it is one kind of grants that
// decides, and what is allowed is what one of these says.
func TestDecisionIsWhatTokensFollow(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(rt *rapid.T) {
		rules := kinds()
		rules.Grants = nil
		for range rapid.IntRange(0, 6).Draw(rt, "grants") {
			rules.Grants = append(rules.Grants, agent.Grant{
				Caller: drawMatch(rt), Identity: rapid.SampledFrom([]string{"id0", "id1"}).Draw(rt, "identity"),
				Resources: []string{rapid.SampledFrom([]string{vault, storage}).Draw(rt, "resource")},
			})
		}
		a, err := agent.New(agent.Options{Fetch: new(tokencachetest.Source).Fetch, Rules: rules})
		if err != nil {
			rt.Fatal(err)
		}
		defer a.Close()
		caller := drawCaller(rt)
		request := agent.Request{Resource: vault, Identity: rapid.SampledFrom([]string{"", "id0", "id1", "id2"}).Draw(rt, "asked")}
		d := a.Decide(caller, request)
		answer, err := a.Token(t.Context(), caller, request)
		var refusal *agent.Error
		switch errors.As(err, &refusal); {
		case d.Allowed != (err == nil):
			rt.Fatalf("decided %+v, and the token says %v", d, err)
		case d.Allowed && answer.Identity.Name != d.Identity:
			rt.Fatalf("decided %s, and the token is of %s", d.Identity, answer.Identity.Name)
		case !d.Allowed && refusal.Reason != d.Err.Reason:
			rt.Fatalf("decided %+v, and the token says %v", d.Err, refusal)
		case d.Allowed && !slices.ContainsFunc(d.Considered, func(c agent.Considered) bool {
			return c.Decides && c.Allows && c.Index == d.Grant.Index && c.Identity == d.Identity
		}):
			rt.Fatalf("the grant that allows it does not decide: %+v", d)
		}
		kind := func(m agent.Match) int {
			return slices.Index([]bool{m.Module != "", m.Unit != "" || m.Image != "", m.UID != nil, m.GID != nil}, true)
		}
		decides := -1
		for _, c := range d.Considered {
			if c.Decides {
				decides = kind(c.Caller)
			}
		}
		for _, c := range d.Considered {
			if k := kind(c.Caller); c.Decides != (k == decides) || k < decides {
				rt.Fatalf("a grant by %d stands beside one by %d: %+v", k, decides, d.Considered)
			}
		}
	})
}

func TestMatches(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		match agent.Match
		want  string // "" for a good one
	}{
		{agent.Match{Unit: "cam.service"}, ""},
		{agent.Match{Unit: `cam@3f\x2dx.service`}, ""},
		{agent.Match{Image: imageID}, ""},
		{agent.Match{Image: repoDigest}, ""},
		{agent.Match{Image: "localhost:5000/a/b@" + imageID}, ""},
		{agent.Match{GID: uid(0)}, ""},
		{agent.Match{}, "exactly one"},
		{agent.Match{Unit: "cam.service", UID: uid(1)}, "exactly one"},
		{agent.Match{UID: uid(1), GID: uid(1)}, "exactly one"},
		{agent.Match{Unit: "session-1.scope"}, "is no service"},
		{agent.Match{Unit: "../cam.service"}, "is no service's name"},
		{agent.Match{Unit: ".service"}, "is no service's name"},
		{agent.Match{Unit: "a b.service"}, "is no service's name"},
		{agent.Match{Unit: strings.Repeat("a", 250) + ".service"}, "is no service's name"},
		{agent.Match{Unit: "cam@.service"}, "is a template"},
		{agent.Match{Image: "cam:2"}, "is a tag, and tags move"},
		{agent.Match{Image: "cam"}, "is a tag, and tags move"},
		{agent.Match{Image: "sha256:6F1D"}, "is neither"},
		{agent.Match{Image: "@" + imageID}, "is neither"},
		{agent.Match{Image: "a@b@" + imageID}, "is neither"},
	} {
		err := row.match.Check()
		if (err == nil) != (row.want == "") || err != nil && !strings.Contains(err.Error(), row.want) {
			t.Errorf("%v: %v, want %q", row.match, err, row.want)
		}
	}
	for name, want := range map[string]string{"cam": "cam.service", "cam.service": "cam.service", "a.b": "a.b.service", "x.scope": "x.scope", "": ".service"} {
		if got := agent.UnitName(name); got != want {
			t.Errorf("%q is %q, want %q", name, got, want)
		}
	}
	for _, row := range []struct {
		match agent.Match
		want  string
	}{
		{agent.Match{Unit: "cam.service"}, "unit cam.service"},
		{agent.Match{Image: imageID}, "container image " + imageID},
		{agent.Match{GID: uid(44), Group: "video"}, "group video (gid 44)"},
		{agent.Match{GID: uid(44)}, "gid 44"},
	} {
		if got := row.match.String(); got != row.want {
			t.Errorf("%q, want %q", got, row.want)
		}
	}
}

func TestCallersNameThemselves(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		caller agent.Caller
		want   string
	}{
		{agent.Caller{Module: "vision", UID: 0, PID: 7}, "module vision (uid 0, pid 7)"},
		{agent.Caller{Module: "vision", Container: image(imageID), PID: 7}, "module vision (container abababababab, uid 0, pid 7)"},
		{agent.Caller{Container: image(imageID), UID: 5, PID: 7}, "container cam (container abababababab, uid 5, pid 7)"},
		{agent.Caller{Unit: "cam.service", UID: 5, PID: 7}, "unit cam.service (uid 5, pid 7)"},
		{agent.Caller{Unit: "cam.service", UID: 5, PID: 7, Nested: true}, "unit cam.service (uid 5 in a pid namespace of its own, pid 7)"},
		{agent.Caller{UID: 5, PID: 7}, "uid 5 (pid 7)"},
		{agent.Caller{UID: agent.NoID, GID: 44}, "gid 44"},
		{agent.Caller{UID: agent.NoID, GID: agent.NoID, Unit: "cam.service"}, "unit cam.service"},
		{agent.Caller{UID: agent.NoID, GID: agent.NoID, PID: 7}, "pid 7"},
		{agent.Caller{UID: agent.NoID, GID: agent.NoID}, "somebody"},
	} {
		if got := row.caller.String(); got != row.want {
			t.Errorf("%q, want %q", got, row.want)
		}
	}
}

// Nothing that a configuration can say for a caller passes for a name that systemd or an engine does not use.
func FuzzMatch(f *testing.F) {
	f.Add("cam.service", imageID)
	f.Add("cam@.service", repoDigest)
	f.Add("../x.service", "cam:latest")
	f.Fuzz(func(t *testing.T, unit, image string) {
		if m := (agent.Match{Unit: unit}); m.Check() == nil && (strings.ContainsAny(unit, "/ \n\x00") || !strings.HasSuffix(unit, ".service") || len(unit) > 255) {
			t.Errorf("unit %q", unit)
		}
		if m := (agent.Match{Image: image}); m.Check() == nil {
			_, digest, named := strings.Cut(image, "@")
			if !named {
				digest = image
			}
			if hex, ok := strings.CutPrefix(digest, "sha256:"); !ok || len(hex) != 64 || strings.ContainsAny(image, " \n\x00") {
				t.Errorf("image %q", image)
			}
		}
	})
}
