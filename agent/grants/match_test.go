package grants_test

import (
	"strings"
	"testing"

	"perceptd/agent/grants"
)

func TestMatches(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		match grants.Match
		want  string // "" for a good one
	}{
		{grants.Match{Unit: "cam.service"}, ""},
		{grants.Match{Unit: `cam@3f\x2dx.service`}, ""},
		{grants.Match{Image: imageID}, ""},
		{grants.Match{Image: repoDigest}, ""},
		{grants.Match{Image: "localhost:5000/a/b@" + imageID}, ""},
		{grants.Match{GID: uid(0)}, ""},
		{grants.Match{}, "exactly one"},
		{grants.Match{Unit: "cam.service", UID: uid(1)}, "exactly one"},
		{grants.Match{UID: uid(1), GID: uid(1)}, "exactly one"},
		{grants.Match{Unit: "session-1.scope"}, "is no service"},
		{grants.Match{Unit: "../cam.service"}, "is no service's name"},
		{grants.Match{Unit: ".service"}, "is no service's name"},
		{grants.Match{Unit: "a b.service"}, "is no service's name"},
		{grants.Match{Unit: strings.Repeat("a", 250) + ".service"}, "is no service's name"},
		{grants.Match{Unit: "cam@.service"}, "is a template"},
		{grants.Match{Image: "cam:2"}, "is a tag, and tags move"},
		{grants.Match{Image: "cam"}, "is a tag, and tags move"},
		{grants.Match{Image: "sha256:6F1D"}, "is neither"},
		{grants.Match{Image: "@" + imageID}, "is neither"},
		{grants.Match{Image: "a@b@" + imageID}, "is neither"},
	} {
		err := row.match.Check()
		if (err == nil) != (row.want == "") || err != nil && !strings.Contains(err.Error(), row.want) {
			t.Errorf("%v: %v, want %q", row.match, err, row.want)
		}
	}
	for name, want := range map[string]string{"cam": "cam.service",
		"cam.service": "cam.service", "a.b": "a.b.service", "x.scope": "x.scope", "": ".service"} {
		if got := grants.UnitName(name); got != want {
			t.Errorf("%q is %q, want %q", name, got, want)
		}
	}
	for _, row := range []struct {
		match grants.Match
		want  string
	}{
		{grants.Match{Unit: "cam.service"}, "unit cam.service"},
		{grants.Match{Image: imageID}, "container image " + imageID},
		{grants.Match{GID: uid(44), Group: "video"}, "group video (gid 44)"},
		{grants.Match{GID: uid(44)}, "gid 44"},
		{grants.Match{UID: uid(1000), User: "edge"}, "user edge (uid 1000)"},
		{grants.Match{}, "nobody"},
	} {
		if got := row.match.String(); got != row.want {
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
		if m := (grants.Match{Unit: unit}); m.Check() == nil {
			if strings.ContainsAny(unit, "/ \n\x00") || !strings.HasSuffix(unit, ".service") || len(unit) > 255 {
				t.Errorf("unit %q", unit)
			}
		}
		if m := (grants.Match{Image: image}); m.Check() == nil {
			_, digest, named := strings.Cut(image, "@")
			if !named {
				digest = image
			}
			if hex, ok := strings.CutPrefix(digest,
				"sha256:"); !ok || len(hex) != 64 || strings.ContainsAny(image, " \n\x00") {
				t.Errorf("image %q", image)
			}
		}
	})
}
