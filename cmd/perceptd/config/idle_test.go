package config

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"

	"perceptd/agent/grants"
	"perceptd/agent/source"
	"perceptd/cmd/perceptd/e2e/harness"
)

const soundGrant = "[[grant]]\ncaller = { unit = \"camera\" }\nidentity = \"device\"\nresources = [\"api://x\"]\n"

// An element with a fault is idle in its place, and what is beside it is in force.
func TestIdleGrants(t *testing.T) {
	t.Parallel()
	broken := func(from, to string) string { return strings.Replace(soundGrant, from, to, 1) }
	camera := grants.Match{Unit: "camera.service"}
	for _, row := range []struct {
		name, text string
		want       grants.Grant
		why        string // the end of what the fault says
	}{
		{"resources of a wrong type", broken(`["api://x"]`, `"api://x"`),
			grants.Grant{Caller: camera, Identity: "device", AnyResource: true},
			`resources must be a list of texts, such as ["https://vault.azure.net"], and is a text`},
		{"one resource of a wrong type", broken(`["api://x"]`, `["api://x", 7]`),
			grants.Grant{Caller: camera, Identity: "device", Resources: []string{"api://x"}, AnyResource: true},
			"and a number is in it"},
		{"resources misspelt", broken("resources", "resource"),
			grants.Grant{Caller: camera, Identity: "device", AnyResource: true}, "identity, resources and prefetch"},
		{"a bad resource", broken("api://x", "x"),
			grants.Grant{Caller: camera, Identity: "device", Resources: []string{"x"}, AnyResource: true},
			"and no GUID"},
		{"prefetch of a wrong type", soundGrant + "prefetch = \"yes\"\n",
			grants.Grant{Caller: camera, Identity: "device", Resources: []string{"api://x"}},
			"prefetch must be true or false, without quotes, and is a text"},
		{"an identity that is not there", broken(`"device"`, `"devise"`),
			grants.Grant{Caller: camera, Identity: "devise", Resources: []string{"api://x"}},
			"which is not configured"},
		{"a caller misspelt", broken("caller", "callr"),
			grants.Grant{Unclear: grants.AllKinds, Identity: "device", Resources: []string{"api://x"},
				AnyResource: true}, "prefetch"},
		{"resources a second time, misspelt", soundGrant + "resource = [\"api://y\"]\n",
			grants.Grant{Caller: camera, Identity: "device", Resources: []string{"api://x"}, AnyResource: true},
			"prefetch"},
		{"an empty unit beside a uid", broken(`unit = "camera"`, `unit = "", uid = 1`),
			grants.Grant{Unclear: grants.Units | grants.Users, Identity: "device", Resources: []string{"api://x"}},
			"or take the line out"},
		{"a kind of caller misspelt", broken("unit", "unt"),
			grants.Grant{Unclear: grants.AllKinds, Identity: "device", Resources: []string{"api://x"}}, "prefetch"},
		{"a caller of a wrong type", broken(`"camera"`, "7"),
			grants.Grant{Unclear: grants.Units, Identity: "device", Resources: []string{"api://x"}}, "and is a number"},
		{"an unknown user", broken(`unit = "camera"`, `user = "nobody-of-that-name"`),
			grants.Grant{Unclear: grants.Users, Identity: "device", Resources: []string{"api://x"}}, "or name a uid"},
		{"an unknown group", broken(`unit = "camera"`, `group = "nobody-of-that-name"`),
			grants.Grant{Unclear: grants.Groups, Identity: "device", Resources: []string{"api://x"}}, "or name a gid"},
		{"a module and a user", broken(`unit = "camera"`, `module = "a", user = "nobody-of-that-name"`),
			grants.Grant{Unclear: grants.Modules | grants.Users, Identity: "device", Resources: []string{"api://x"}},
			"or name a uid"},
		{"a unit that is none", broken(`"camera"`, `"camera.timer"`),
			grants.Grant{Caller: grants.Match{Unit: "camera.timer"}, Unclear: grants.Units, Identity: "device",
				Resources: []string{"api://x"}}, "by the processes in them"},
		{"a grant of another name", broken("grant", "grnt"),
			grants.Grant{Caller: camera, Identity: "device", Resources: []string{"api://x"}}, "and [[module]]"},
		{"a name that says nothing", "[[proxy]]\nat = 7\n", grants.Grant{Unclear: grants.AllKinds, AnyResource: true},
			"and [[module]]"},
		{"a list of a grant's name", "[grant]\nresources = [\"api://x\"]\n",
			grants.Grant{Unclear: grants.AllKinds, Resources: []string{"api://x"}}, "there may be several"},
		{"a grant without its header", "[[identity]]\nname = \"new\"\nclient_id = \"" + exampleGUID + "\"\n" +
			strings.TrimPrefix(soundGrant, "[[grant]]\n"),
			grants.Grant{Caller: camera, Identity: "device", Resources: []string{"api://x"}},
			"unknown key identity.resources: [[identity]] has name, default, client_id, object_id and resource_id"},
	} {
		path := harness.WriteConfig(t, map[string]string{"config.toml": harness.SimulatedIdentities,
			"config.d/a.toml": row.text, "config.d/b.toml": grantTo(`unit = "another"`)})
		if strings.HasPrefix(row.text, "[grant]") { // which leaves room for no other
			path = harness.WriteConfig(t, map[string]string{"config.toml": harness.SimulatedIdentities,
				"config.d/a.toml": grantTo(`unit = "another"`), "config.d/b.toml": row.text})
		}
		r := Read(path)
		c := r.Config()
		if len(r.Faults) > 0 || len(c.Idle) == 0 {
			t.Errorf("%s: %v, %v", row.name, r.Faults, c.Idle)
			continue
		}
		isIdle := func(g grants.Grant) bool { return g.Fault != "" }
		i := slices.IndexFunc(c.Rules.Grants, isIdle)
		if i < 0 || len(c.Rules.Grants) != 2 || isIdle(c.Rules.Grants[1-i]) {
			t.Errorf("%s: grants %+v", row.name, c.Rules.Grants)
			continue
		}
		got := c.Rules.Grants[i]
		if !strings.HasSuffix(got.Fault, row.why) || got.Place == "" {
			t.Errorf("%s: at %s: %s", row.name, got.Place, got.Fault)
		}
		got.Fault, got.Place = "", ""
		if got.Caller.Subject() != row.want.Caller.Subject() || got.Unclear != row.want.Unclear ||
			got.Identity != row.want.Identity || got.AnyResource != row.want.AnyResource ||
			!slices.Equal(got.Resources, row.want.Resources) {
			t.Errorf("%s: %+v\nwant %+v", row.name, got, row.want)
		}
		if _, err := Load(path); err == nil {
			t.Errorf("%s: loaded all the same", row.name)
		}
	}
}

// A table with a fault comes to what hands out the least.
func TestIdleTables(t *testing.T) {
	t.Parallel()
	load := func(text string, extra ...string) Config {
		files := map[string]string{"config.toml": harness.SimulatedIdentities + soundGrant, "config.d/a.toml": text}
		for _, more := range extra {
			files["config.d/b.toml"] = more
		}
		return Read(harness.WriteConfig(t, files)).Config()
	}
	strict := func(c Config) bool {
		return c.Callers.engines() == nil && c.Callers.parents() == nil && c.Callers.RefuseYoung()
	}
	for _, row := range []struct {
		name, text string
		element    string
		is         func(Config) bool
	}{
		{"a source's kind", "[source]\nkind = \"simulatd\"\n", "[source]",
			func(c Config) bool { return c.Source.Fault != "" && c.Source.Kind == ManagedIdentity }},
		{"a source misspelt", "[sorce]\nendpoint = \"imds\"\n", "[sorce]",
			func(c Config) bool { return c.Source.Fault != "" && c.Source.Endpoint == source.Auto }},
		{"a key of a source", "[source]\nendpont = \"imds\"\n", "[source]",
			func(c Config) bool { return c.Source.Fault != "" }},
		{"an engine", "[callers]\nengine = \"docker\"\nyoung = \"accept\"\n", "[callers]",
			func(c Config) bool { return c.Callers.engines() == nil && !c.Callers.RefuseYoung() }},
		{"a cgroup parent", "[callers]\ncgroup_parents = [\"/a\", \"b\"]\n", "[callers]",
			func(c Config) bool { return c.Callers.parents() == nil && len(c.Callers.engines()) > 0 }},
		{"young", "[callers]\nyoung = 7\n", "[callers]",
			func(c Config) bool { return c.Callers.RefuseYoung() && len(c.Callers.engines()) > 0 }},
		{"an unknown key of callers", "[callers]\nyong = \"accept\"\n", "[callers]", strict},
		{"an unknown key of callers beside sound ones", "[callers]\nyong = \"accept\"\nengine = \"/run/e.sock\"\n",
			"[callers]", func(c Config) bool {
				return slices.Equal(c.Callers.engines(), []string{"/run/e.sock"}) && c.Callers.RefuseYoung()
			}},
		{"callers misspelt", "[caller]\nengine = \"/run/e.sock\"\n", "[caller]", strict},
		{"requests", "[callers]\nrequests_per_second = 0\n", "[callers]",
			func(c Config) bool { return c.Callers.PerSecond == defaultPerSecond }},
		{"sdk_life", "[tokens]\nsdk_life = 50\nspread = \"1m\"\n", "[tokens]",
			func(c Config) bool { return c.Rules.SDKLife == strictSDKLife && c.Rules.Spread != strictSpread }},
		{"an sdk_life out of bounds", "[tokens]\nsdk_life = \"48h\"\n", "[tokens]",
			func(c Config) bool { return c.Rules.SDKLife == strictSDKLife }},
		{"spread", "[tokens]\nspread = \"1\"\n", "[tokens]",
			func(c Config) bool { return c.Rules.Spread == strictSpread && c.Rules.SDKLife == 0 }},
		{"lost_record", "[tokens]\nlost_record = \"drop\"\n", "[tokens]",
			func(c Config) bool { return c.Rules.WithholdLost }},
		{"an unknown key of tokens", "[tokens]\nlost = \"withhold\"\n", "[tokens]", func(c Config) bool {
			return c.Rules.WithholdLost && c.Rules.Spread == strictSpread && c.Rules.SDKLife == strictSDKLife
		}},
		{"loopback", "[loopback]\naddress = \"0.0.0.0:1\"\n", "[loopback]",
			func(c Config) bool { return !c.Loopback.Address.IsValid() }},
		{"loopback misspelt in part", "[loopback]\naddress = \"127.0.0.1:40380\"\nport = 1\n", "[loopback]",
			func(c Config) bool { return !c.Loopback.Address.IsValid() }},
		{"iothub", "[iothub]\ncredential = \"iothub\"\nevents = 7\n", "[iothub]",
			func(c Config) bool { return !c.IoTHub.Configured() }},
		{"an identity that may be the default", "[[identity]]\nname = \"b\"\ndefault = \"yes\"\n", "identity 3",
			func(c Config) bool {
				return !slices.ContainsFunc(c.Rules.Identities, func(i grants.Identity) bool {
					return i.Default && i.Fault == ""
				})
			}},
		{"an identity misspelt", "[[identty]]\nname = \"b\"\ndefault = true\n", "[identty]",
			func(c Config) bool {
				return len(c.Rules.Identities) == 3 && c.Rules.Identities[2].Name == "b" &&
					c.Rules.Identities[2].Fault != ""
			}},
		{"a resource", "[[resource]]\nuri = \"api://x\"\nalternates = [\"api://y\"]\nalso = 1\n", "resource 1",
			func(c Config) bool { return len(c.Rules.Alternates) == 0 && len(c.Rules.IdleAlternates) == 1 }},
		{"a resource that is not understood", "[[resource]]\nuri = \"api://x\"\nalternate = [\"api://y\"]\n",
			"resource 1",
			func(c Config) bool { return len(c.Rules.Alternates) == 0 && c.Rules.AnyAlternate }},
		{"a module", "[[module]]\nname = \"cam\"\nrequire = \"soket\"\n" + grantTo(`module = "cam"`), "module 1",
			func(c Config) bool {
				return len(c.Modules()) == 0 && slices.Equal(c.Rules.IdleContainers, []string{"cam"}) &&
					!c.Rules.AnyContainerIdle && len(c.CallerRules().Modules) == 0
			}},
		{"a module's container", "[[module]]\nname = \"cam\"\ncontainr = \"camera-2\"\n", "module 1",
			func(c Config) bool { return len(c.Modules()) == 0 && c.Rules.AnyContainerIdle }},
		{"a module's name", "[[module]]\nnam = \"cam\"\ncontainer = \"camera-2\"\n" + grantTo(`module = "cam"`),
			"module 1",
			func(c Config) bool { return len(c.Modules()) == 0 && c.Rules.AnyContainerIdle }},
		{"a module misspelt", "[[modul]]\nname = \"cam\"\ncontainer = \"camera-2\"\n" + grantTo(`module = "cam"`),
			"[modul]",
			func(c Config) bool {
				return len(c.Modules()) == 0 && slices.Equal(c.Rules.IdleContainers, []string{"cam", "camera-2"})
			}},
		{"a module twice", "[[module]]\nname = \"cam\"\n[[module]]\nname = \"cam\"\ncontainer = \"b\"\n", "module 2",
			func(c Config) bool {
				return len(c.Modules()) == 0 && slices.Equal(c.Rules.IdleContainers, []string{"cam", "b"})
			}},
		{"a module beside a sound one", "[[module]]\nname = \"cam\"\nrequire = 7\n[[module]]\nname = \"mic\"\n",
			"module 1",
			func(c Config) bool { return slices.Equal(c.Modules(), []string{"mic"}) }},
		{"a module that can never be proved", "[callers]\nengine = \"none\"\n[[module]]\nname = \"cam\"\n",
			"module \"cam\"",
			func(c Config) bool { return len(c.Modules()) == 0 }},
		{"a value outside of its table", "engine = \"none\"\n", "[engine]", strict},
	} {
		c := load(row.text)
		if !row.is(c) || !slices.ContainsFunc(c.Idle, func(i Idle) bool { return i.Element == row.element }) {
			t.Errorf("%s: %+v\n%v", row.name, c, c.Idle)
		}
		if c.Rules.Grants[0].Fault != "" {
			t.Errorf("%s: the grant beside it is idle: %s", row.name, c.Rules.Grants[0].Fault)
		}
	}
	stricter := load("[callers]\nrequests_per_second = 5\n", "[callers]\nyonug = \"refuse\"\n")
	if stricter.Callers.PerSecond != 5 {
		t.Errorf("a fault elsewhere makes a limit looser: %d", stricter.Callers.PerSecond)
	}
	later := load("[callers]\nyoung = \"no\"\n", "[callers]\nyoung = \"accept\"\n")
	if later.Callers.RefuseYoung() || len(later.Idle) != 1 {
		t.Errorf("a value of a later file: %+v, %v", later.Callers, later.Idle)
	}
}

// Every fault of a file is named at once, each with its line.
func TestEveryFaultAtOnce(t *testing.T) {
	t.Parallel()
	path := harness.WriteConfig(t, map[string]string{"config.toml": `[source]
kind = 7
speed = "fast"

[[identity]]
name = "device"
client_id = 7
object_id = "x"

[[grant]]
caller = { user = "nobody-of-that-name", group = 7 }
identity = "robot"
resources = ["vault", 7]
prefetch = "yes"
also = 1
`})
	_, err := Load(path)
	if err == nil {
		t.Fatal("loaded")
	}
	got := strings.ReplaceAll(err.Error(), path+":", "")
	want := `2: source.kind must be a text in quotes, such as "managed-identity", and is a number
3: source.speed must be a number, without quotes, and is a text
7: identity 1: client_id must be a text in quotes, such as "6f1d9c0a-0000-0000-0000-000000000000", and is a number
13: grant 1: resources must be a list of texts, such as ["https://vault.azure.net"], and a number is in it
14: grant 1: prefetch must be true or false, without quotes, and is a text
15: unknown key grant.also: [[grant]] has caller (by module, unit, container_image, user, uid, group or gid), ` +
		`identity, resources and prefetch
11: grant 1: caller.group must be a text in quotes, such as "root", and is a number
11: user "nobody-of-that-name" is not known on this device: create it (useradd --system ` +
		`nobody-of-that-name), or name a uid
5: identity "device": object_id "x" is no GUID
10: the grant for nobody names identity "robot", which is not configured
10: the grant for nobody: resource "vault" is no App ID URI (such as https://vault.azure.net) and no GUID`
	for _, line := range strings.Split(want, "\n") {
		if !slices.Contains(strings.Split(got, "\n"), line) {
			t.Errorf("missing: %s", line)
		}
	}
	if strings.Count(got, "\n") != strings.Count(want, "\n") {
		t.Errorf("got\n%s", got)
	}
}

// Reading is fit for any text: it never panics, a fault is in the file that has it, and what a start leaves idle is
// what a reload refuses.
func FuzzReading(f *testing.F) {
	f.Add([]byte(harness.GoodConfig))
	f.Add([]byte("\ufeff[source]\r\nkind = “x”\r\n\x1a"))
	f.Add([]byte("grant = [1, {caller = 7}]\n[[module]]\nname.x = 1\n[identity]\n"))
	f.Add([]byte("[[grant]]\ncaller.unit = \"a\"\n[grant.caller]\n[[a.b]]\n[[a.b.c]]\n[a.b.c.d]\ne = [[{f = 1}]]\n"))
	f.Add([]byte("\"gr\\u0061nt\" = [{}]\n\"\" = {\"\" = 1}\n[callers]\nyong = 1979-05-27\n[tokens.spread]\n"))
	f.Add([]byte("identity.name = 1\n[[resource]]\nuri = \"api://x\"\nalternates = []\n[[resource]]\n" +
		"uri = \"api://x\"\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		file := File{"/etc/percept/config.toml", text}
		if _, err := parse(file); err != nil {
			if !strings.HasPrefix(err.Error(), file.Path+":") {
				t.Errorf("a fault without its file: %v", err)
			}
			return
		}
		c := Reading{Files: []File{file}}.Config()
		strict := c.faults.err(true)
		if (len(c.Idle) > 0) != (strict != nil) {
			t.Errorf("idle %v, refused for %v", c.Idle, strict)
		}
		lines := strings.Count(string(text), "\n") + 1
		for _, idle := range c.Idle {
			var line int
			rest, isOfFile := strings.CutPrefix(idle.Place, file.Path)
			_, err := fmt.Sscanf(rest, ":%d", &line)
			if !isOfFile || rest != "" && (err != nil || line < 1 || line > lines) {
				t.Errorf("%v: of %d lines", idle, lines)
			}
			if idle.Why == "" || idle.Element == "" {
				t.Errorf("it says nothing: %+v", idle)
			}
		}
		grants.NewAuthorizer(c.Rules.Rules)
		if c.Modules(); len(c.Idle) == 0 && !strings.HasPrefix(c.Describe(), "configuration is fine: ") {
			t.Error("nothing to say of a configuration without a fault")
		}
	})
}

// What is nested deeply costs no more than its length.
func TestDeepNesting(t *testing.T) {
	t.Parallel()
	for _, text := range []string{
		strings.Repeat("a.", 2000) + "a = 1\n", "a = " + strings.Repeat("[", 2000) + strings.Repeat("]", 2000),
	} {
		w, err := parse(File{"f", []byte(text)})
		if err != nil || len(w.places) > 100 {
			t.Errorf("%d places, %v", len(w.places), err)
		}
	}
}

// Each place is that of its key in the file, whatever stands before it.
func FuzzPlaces(f *testing.F) {
	f.Add("# a comment\n\n[x]\ny = \"\"\"\n\n\"\"\"\n", uint8(0))
	f.Add("[[grant]]\nresources = [\n1,\n2]\n", uint8(1))
	f.Add("a = 1\r\nb = [ {c = 1}, # d\n{ e = '''\n'''} ]\n", uint8(2))
	f.Fuzz(func(t *testing.T, before string, which uint8) {
		marks := []string{"[[identity]]\nmark = 1", "[[grant]]\ncaller = { mark = 1 }", "[marked]\nmark = 1"}
		paths := [][]string{{"identity", "0", "mark"}, {"grant", "0", "caller", "mark"}, {"marked", "mark"}}
		i := int(which) % len(marks)
		text := before + "\n" + marks[i]
		w, err := parse(File{"f", []byte(text)})
		if err != nil {
			return
		}
		if list, isList := w.keys[paths[i][0]].([]any); isList {
			paths[i][1] = strconv.Itoa(len(list) - 1)
		}
		want := fmt.Sprintf("f:%d", strings.Count(text, "\n")+1)
		if got := w.place(strings.Join(paths[i], separator)); got != want {
			t.Errorf("%q: %s, want %s", text, got, want)
		}
	})
}

// An ID that is written and empty, as of a template whose variable was not set, is a fault: without the line the
// identity would be the system-assigned one.
func TestEmptyIDIsAFault(t *testing.T) {
	t.Parallel()
	for _, key := range []string{"client_id", "object_id", "resource_id"} {
		path := harness.WriteConfig(t, map[string]string{
			"config.toml": "[[identity]]\nname = \"vision\"\n" + key + " = \"\"\n"})
		c := Read(path).Config()
		if len(c.Rules.Identities) != 1 || !strings.Contains(c.Rules.Identities[0].Fault, key+" is empty") {
			t.Errorf("%s: %v", key, c.Rules.Identities)
		}
		if _, err := Load(path); err == nil || !strings.Contains(err.Error(), key+" is empty") {
			t.Errorf("%s: %v", key, err)
		}
	}
}
