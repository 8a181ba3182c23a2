package config

import (
	"slices"
	"strings"
	"testing"

	"perceptd/cmd/perceptd/e2e/harness"
)

const (
	anImage  = "sha256:6f1d9c0a6f1d9c0a6f1d9c0a6f1d9c0a6f1d9c0a6f1d9c0a6f1d9c0a6f1d9c0a"
	anyThing = "identity = \"device\"\nresources = [\"api://x\"]\n"
)

func grantTo(caller string) string { return "[[grant]]\ncaller = { " + caller + " }\n" + anyThing }

func TestCallersAreRead(t *testing.T) {
	t.Parallel()
	path := harness.WriteConfig(t, map[string]string{
		"config.toml": harness.GoodConfig + grantTo(`unit = "cam"`) + grantTo(`container_image = "cam@`+anImage+`"`) +
			grantTo(`group = "root"`) + grantTo("gid = 44") + `
[callers]
engine = "/run/user/engine.sock"
cgroup_parents = ["/machine.slice"]

[[module]]
name = "vision"
`,
		"config.d/10.toml": `[callers]
requests_per_second = 1000
young = "refuse"
cgroup_parents = ["/edge.slice"]

[[module]]
name = "speech"
container = "speech-2"

[[module]]
name = "plain"
require = "socket"
` + grantTo(`module = "other"`),
	})
	c, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	want := []module{
		{"other", requireContainer, "other"}, {"plain", requireSocket, ""}, {"speech", requireContainer,
			"speech-2"}, {"vision", requireContainer, "vision"},
	}
	if got := c.required(); !slices.Equal(got, want) {
		t.Errorf("modules %+v", got)
	}
	if !slices.Equal(c.Callers.engines(), []string{"/run/user/engine.sock"}) ||
		!slices.Equal(c.Callers.cgroupParents, []string{"/machine.slice", "/edge.slice"}) {
		t.Errorf("%+v", c.Callers)
	}
	if c.Callers.PerSecond != 1000 {
		t.Errorf("%d requests a second", c.Callers.PerSecond)
	}
	if !c.CallerRules().RefuseYoung {
		t.Error("the young are not refused")
	}
	grants := c.Rules.Grants
	if m := grants[1].Caller; m.Unit != "cam.service" || grants[1].Place != path+":17" {
		t.Errorf("%+v at %s", m, grants[1].Place)
	}
	if m := grants[3].Caller; m.GID == nil || *m.GID != 0 || m.Group != "root" {
		t.Errorf("%+v", m)
	}
	for _, part := range []string{
		"grant: unit cam.service may have", "grant: container image cam@sha256:6f", "grant: group root (gid 0) may",
		"grant: gid 44 may",
		"module other: on its socket, out of the container named other\n", "module speech: on its socket, out of the " +
			"container named speech-2\n",
		"module plain: whoever comes in on its socket\n", "container engine: /run/user/engine.sock\n",
		"below cgroup /machine.slice too\n", "1000 requests a second\n",
		"processes younger than 20 ms are asked to ask again, on kernels before 6.5; on others nobody's age counts\n",
	} {
		if !strings.Contains(c.Describe(), part) {
			t.Errorf("%q is missing in:\n%s", part, c.Describe())
		}
	}
}

func TestCallerFaults(t *testing.T) {
	t.Parallel()
	const module = harness.GoodConfig + "[[module]]\n"
	const none = "[callers]\nengine = \"none\"\n"
	for _, row := range []struct{ name, text, want string }{
		{"unknown key of callers", harness.GoodConfig + "[callers]\nengin = \"x\"\n",
			"config.toml:18: unknown key callers.engin: [callers] has engine, cgroup_parents, requests_per_second " +
				"and young"},
		{"unknown key of module", module + "nam = \"x\"\n",
			"config.toml:18: unknown key module.nam: [[module]] has name, require and container"},
		{"one bracket", harness.GoodConfig + "[module]\nname = \"x\"\n",
			"config.toml:17: module 1: write it with two brackets, [[module]]: there may be several"},
		{"engine", harness.GoodConfig + "[callers]\nengine = \"docker\"\n",
			`config.toml:18: callers.engine is "docker": it must be "auto", "none" or the absolute path`},
		{"engine that climbs", harness.GoodConfig + "[callers]\nengine = \"/run/../x\"\n",
			"config.toml:18: callers.engine"},
		{"cgroup parent", harness.GoodConfig + "[callers]\ncgroup_parents = [\"edge.slice\"]\n",
			`config.toml:18: callers.cgroup_parents has "edge.slice": it must be the whole path`},
		{"root as a parent", harness.GoodConfig + "[callers]\ncgroup_parents = [\"/\"]\n",
			"config.toml:18: callers.cgroup_parents"},
		{"young", harness.GoodConfig + "[callers]\nyoung = \"deny\"\n",
			`config.toml:18: callers.young is "deny": it must be "accept" or "refuse"`},
		{"no requests", harness.GoodConfig + "[callers]\nrequests_per_second = 0\n",
			"config.toml:18: callers.requests_per_second is 0: it must be between 1 and 1000000"},
		{"module without a name", module, `config.toml:17: module name ""`},
		{"module's name", module + "name = \"../x\"\n", `config.toml:17: module name "../x"`},
		{"module twice", module + "name = \"a\"\n\n[[module]]\nname = \"a\"\n",
			`config.toml:20: module "a" is there twice`},
		{"require", module + "name = \"a\"\nrequire = \"trust\"\n",
			`config.toml:17: module "a": require is "trust": it must be "socket+container" or "socket"`},
		{"container with no effect", module + "name = \"a\"\nrequire = \"socket\"\ncontainer = \"b\"\n",
			"config.toml:17: module \"a\": container has no effect"},
		{"container's name", module + "name = \"a\"\ncontainer = \"/b\"\n",
			"config.toml:17: module \"a\": container \"/b\" is no container's name"},
		{"no engine, and nothing chosen", module + "name = \"a\"\n" + none,
			`config.toml:17: with callers.engine = "none" nobody can tell which container is module "a": choose ` +
				`require = "socket"`},
		{"no engine, and a container wanted", module + "name = \"a\"\nrequire = \"socket+container\"\n" + none,
			`config.toml:17: with callers.engine = "none"`},
		{"no engine, a module of a grant alone", harness.GoodConfig + grantTo(`module = "a"`) + none,
			`config.toml:17: with callers.engine = "none" nobody can tell which container is module "a"`},
		{"no engine, an image", harness.GoodConfig + grantTo(`container_image = "`+anImage+`"`) + none,
			`config.toml:17: with callers.engine = "none" nobody can tell which image`},
		{"tag", harness.GoodConfig + grantTo(`container_image = "cam:2"`),
			`config.toml:17: container_image "cam:2" is a tag, and tags move`},
		{"scope", harness.GoodConfig + grantTo(`unit = "x.scope"`), `config.toml:17: unit "x.scope" is no service`},
		{"no such group", harness.GoodConfig + grantTo(`group = "nobody-of-that-name"`),
			`config.toml:18: group "nobody-of-that-name" is not known`},
		{"group and gid", harness.GoodConfig + grantTo(`group = "root", gid = 0`),
			"config.toml:18: a grant's caller is exactly one of module, unit, container_image, user, uid, group and " +
				"gid"},
		{"unit and uid", harness.GoodConfig + grantTo(`unit = "a", uid = 0`),
			"config.toml:17: a grant's caller is exactly one"},
	} {
		_, err := Load(harness.WriteConfig(t, map[string]string{"config.toml": row.text}))
		if err == nil || !strings.Contains(err.Error(), row.want) {
			t.Errorf("%s: %v\nwant %s", row.name, err, row.want)
		}
	}
	chosen := harness.WriteConfig(t, map[string]string{"config.toml": module + "name = \"a\"\nrequire = \"socket\"\n" +
		grantTo(`module = "a"`) + none})
	c, err := Load(chosen)
	if err != nil || c.Callers.engines() != nil ||
		!strings.Contains(c.Describe(),
			"container engine: none, every caller in a container is denied on the token socket\n") {
		t.Errorf("chosen: %v\n%s", err, c.Describe())
	}
}

func TestCallerChanges(t *testing.T) {
	t.Parallel()
	load := func(text string) Config {
		c, err := Load(harness.WriteConfig(t, map[string]string{"config.toml": harness.GoodConfig + text}))
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	before := load("[[module]]\nname = \"a\"\n")
	after := load("[[module]]\nname = \"a\"\nrequire = \"socket\"\n[[module]]\nname = \"b\"\n[callers]\nengine = " +
		"\"/x\"\ncgroup_parents = [\"/y\"]\nyoung = \"refuse\"\nrequests_per_second = 7\n")
	want := []string{
		"module a: require socket, was socket+container (container a)",
		"container engine is /x, was auto",
		"containers' cgroups beside the engines' own: /y, were none",
		`young is "refuse", was "accept"`,
		"requests_per_second is 7 from the next start on, until then 200",
	}
	if got := after.callerChanges(before); !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
	if got := after.callerChanges(after); len(got) != 0 {
		t.Errorf("%q", got)
	}
}
