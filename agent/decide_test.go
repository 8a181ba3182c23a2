package agent_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"perceptd/agent"
	"perceptd/agent/grants"
	"perceptd/tokencache/tokencachetest"
)

const (
	imageID    = "sha256:6f1d9c0a6f1d9c0a6f1d9c0a6f1d9c0a6f1d9c0a6f1d9c0a6f1d9c0a6f1d9c0a"
	repoDigest = "registry.example/cam@sha256:0a9c1d6f0a9c1d6f0a9c1d6f0a9c1d6f0a9c1d6f0a9c1d6f0a9c1d6f0a9c1d6f"
)

func image(id string, digests ...string) *grants.Container {
	return &grants.Container{ID: strings.Repeat("ab", 32), Name: "cam", Image: "cam:2", Digest: id,
		RepoDigests: digests}
}

// kinds grants the same resource to callers of every kind, each with an identity of its own.
func kinds() agent.Rules {
	r := agent.Rules{}
	for i, m := range []grants.Match{
		{Module: "vision"}, {Unit: "cam.service"}, {Image: imageID}, {Image: repoDigest}, {UID: uid(1000)},
		{GID: uid(44), Group: "video"}, {GID: uid(995)},
	} {
		name := fmt.Sprintf("id%d", i)
		r.Identities = append(r.Identities,
			grants.Identity{Name: name, ClientID: fmt.Sprintf("00000000-0000-0000-0000-%012d", i)})
		r.Grants = append(r.Grants, grants.Grant{Caller: m, Identity: name, Resources: []string{vault},
			Place: fmt.Sprintf("config.toml:%d", 10*i)})
	}
	return r
}

// drawCaller draws a caller, of few values so that grants are for it.
func drawCaller(t *rapid.T) grants.Caller {
	small := rapid.Uint32Range(0, 2)
	c := grants.Caller{UID: small.Draw(t, "uid"), GID: small.Draw(t, "gid"),
		Groups: rapid.SliceOfN(small, 0, 3).Draw(t, "groups"), PID: 9}
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

func drawMatch(t *rapid.T) grants.Match {
	n := rapid.Uint32Range(0, 2).Draw(t, "id")
	return rapid.SampledFrom([]grants.Match{
		{Module: "a"}, {Module: "b"}, {Unit: "a.service"}, {Unit: "b.service"}, {Image: imageID}, {Image: repoDigest},
		{UID: &n}, {GID: &n},
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
			rules.Grants = append(rules.Grants, grants.Grant{
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
		asked := rapid.SampledFrom([]string{"", "id0", "id1", "id2"}).Draw(rt, "asked")
		request := grants.Request{Resource: vault, Identity: asked}
		d, denial := a.Decide(caller, request)
		answer, err := a.Token(t.Context(), caller, agent.Request{Request: request})
		var refusal *agent.Error
		switch errors.As(err, &refusal); {
		case d.Allowed != (err == nil):
			rt.Fatalf("decided %+v, and the token says %v", d, err)
		case d.Allowed && answer.Identity.Name != d.Identity:
			rt.Fatalf("decided %s, and the token is of %s", d.Identity, answer.Identity.Name)
		case !d.Allowed && refusal.Code != denial.Code:
			rt.Fatalf("decided %+v, and the token says %v", denial, refusal)
		case d.Allowed && !slices.ContainsFunc(d.Evaluations, func(c grants.Evaluation) bool {
			return c.Decides && c.Allows && c.Index == d.Grant.Index && c.Identity == d.Identity
		}):
			rt.Fatalf("the grant that allows it does not decide: %+v", d)
		}
		kind := func(m grants.Match) int {
			return slices.Index([]bool{m.Module != "", m.Unit != "" || m.Image != "", m.UID != nil, m.GID != nil}, true)
		}
		decides := -1
		for _, c := range d.Evaluations {
			if c.Decides {
				decides = kind(c.Caller)
			}
		}
		for _, c := range d.Evaluations {
			if k := kind(c.Caller); c.Decides != (k == decides) || k < decides {
				rt.Fatalf("a grant by %d stands beside one by %d: %+v", k, decides, d.Evaluations)
			}
		}
	})
}
