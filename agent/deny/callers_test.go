package deny

import (
	"testing"

	"perceptd/agent/grants"
)

// TestRulesAndCallers has every kind of rule meet every way in which a caller can come, with all that is not known of
// it there. A caller that may be the denied one is denied.
func TestRulesAndCallers(t *testing.T) {
	t.Parallel()
	edge, gid := uint32(1000), uint32(44)
	const image = "sha256:aa"
	bySecret := func(of grants.Match, peer *uint32) grants.Caller {
		c := of.Caller()
		c.Via = "header secret"
		if c.UID == grants.NoID {
			c.Peer = peer
		}
		return c
	}
	type verdict struct{ same, other bool } // by a rule for what the caller is, or may be, and by one for another
	known, may, not := verdict{true, false}, verdict{true, true}, verdict{}
	for _, row := range []struct {
		way                string
		caller             grants.Caller
		module, unit, user verdict
	}{
		{"token socket, a unit", grants.Caller{Unit: "camera.service", UID: edge}, not, known, known},
		{"token socket, a unit with own pids", grants.Caller{Unit: "camera.service", UID: edge, Nested: true}, not,
			known, known},
		{"token socket, no unit", grants.Caller{UID: edge}, not, not, known},
		{"token socket, a container", grants.Caller{UID: edge, Container: &grants.Container{ID: "c"}}, not, not, known},
		{"token socket, an IoT Edge module", grants.Caller{UID: edge,
			Container: &grants.Container{ID: "c", EdgeModule: "vision"}},
			known, not, known},
		{"module's socket", grants.Caller{Module: "vision", UID: edge}, known, not, known},
		{"module's socket and container", grants.Caller{Module: "vision", UID: edge,
			Container: &grants.Container{ID: "c"}},
			known, not, known},
		{"secret of a module", bySecret(grants.Match{Module: "vision"}, &edge), known, may, known},
		{"secret of a unit", bySecret(grants.Match{Unit: "camera.service"}, &edge), not, known, known},
		{"secret of an image", bySecret(grants.Match{Image: image}, &edge), may, not, known},
		{"secret of a user", bySecret(grants.Match{UID: &edge}, nil), not, may, known},
		{"secret of a group", bySecret(grants.Match{GID: &gid}, &edge), not, may, known},
		{"secret of a module, peer unknown", bySecret(grants.Match{Module: "vision"}, nil), known, may, may},
		{"secret of a unit, peer unknown", bySecret(grants.Match{Unit: "camera.service"}, nil), not, known, may},
		{"secret of an image, peer unknown", bySecret(grants.Match{Image: image}, nil), may, not, may},
		{"secret of a group, peer unknown", bySecret(grants.Match{GID: &gid}, nil), not, may, may},
	} {
		for _, rule := range []struct {
			target Target
			want   bool
		}{
			{Target{All: true}, true},
			{Target{Resource: vault}, true},
			{Target{Identity: "device"}, true},
			{Target{Module: "vision"}, row.module.same},
			{Target{Module: "speech"}, row.module.other},
			{Target{Unit: "camera"}, row.unit.same},
			{Target{Unit: "other.service"}, row.unit.other},
			{Target{User: "edge"}, row.user.same},
			{Target{User: "1000"}, row.user.same},
			{Target{User: "1001"}, row.user.other},
			{Target{User: "ghost"}, false},
			{Target{User: "broken"}, true},
			{Target{Module: "vision", Unit: "camera", User: "edge"}, row.module.same && row.unit.same && row.user.same},
			{Target{Module: "vision", User: "edge"}, row.module.same && row.user.same},
			{Target{Unit: "camera", User: "1001"}, row.unit.same && row.user.other},
			{Target{Unit: "camera", Resource: storage}, false},
		} {
			caller := row.caller
			if got := listOf(rule.target).Denies(&caller, &device, vault) != nil; got != rule.want {
				t.Errorf("%s, rule for %v: denied %v", row.way, rule.target, got)
			}
		}
		for kind, of := range map[string]struct {
			verdict
			target Target
		}{
			"module": {row.module, Target{Module: "speech"}}, "unit": {row.unit, Target{Unit: "camera"}},
			"user": {row.user, Target{User: "edge"}},
		} {
			want := ""
			if of.other {
				want = kind
			}
			if got := of.target.Unknown(&row.caller); got != want {
				t.Errorf("%s: a rule by %s finds %q not known", row.way, kind, got)
			}
		}
	}
}
