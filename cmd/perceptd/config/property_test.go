package config

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"perceptd/agent/grants"
)

// writtenElement is a table of a configuration as a person writes it.
type writtenElement struct {
	header string
	lines  []string // "key = value"
}

func (e writtenElement) String() string { return e.header + "\n" + strings.Join(e.lines, "\n") + "\n" }

var (
	someIdentities = []string{"device", "vision", "speech"}
	someResources  = []string{"https://vault.azure.net", "https://storage.azure.com", "api://x"}
	someImages     = []string{anImage, strings.Replace(anImage, "6f", "7a", 1)}
)

func guid(i int) string { return fmt.Sprintf("00000000-0000-0000-0000-%012d", i) }

// drawSound draws a configuration without a fault.
func drawSound(t *rapid.T) []writtenElement {
	var all []writtenElement
	isDefault := rapid.IntRange(-1, len(someIdentities)-1).Draw(t, "default")
	for i, name := range someIdentities {
		e := writtenElement{"[[identity]]", []string{fmt.Sprintf("name = %q", name)}}
		if i > 0 {
			e.lines = append(e.lines, fmt.Sprintf("client_id = %q", guid(i)))
		}
		if i == isDefault {
			e.lines = append(e.lines, "default = true")
		}
		all = append(all, e)
	}
	callers := []string{
		`module = "cam"`, `module = "mic"`, `unit = "camera"`, `unit = "other"`, "uid = 1", "uid = 2", "gid = 1",
		"gid = 2",
		fmt.Sprintf("container_image = %q", someImages[0]), fmt.Sprintf("container_image = %q", someImages[1]),
		`user = "root"`, `group = "root"`,
	}
	for i := range rapid.IntRange(1, 6).Draw(t, "grants") {
		resources := rapid.SliceOfNDistinct(rapid.SampledFrom(someResources), 1, 3, rapid.ID[string]).
			Draw(t, fmt.Sprint("resources ", i))
		all = append(all, writtenElement{"[[grant]]", []string{
			"caller = { " + rapid.SampledFrom(callers).Draw(t, fmt.Sprint("caller ", i)) + " }",
			fmt.Sprintf("identity = %q", rapid.SampledFrom(someIdentities).Draw(t, fmt.Sprint("identity ", i))),
			`resources = ["` + strings.Join(resources, `", "`) + `"]`,
		}})
	}
	for _, name := range []string{"cam", "mic"} {
		if how := rapid.SampledFrom([]string{"", `container = "box"`, `require = "socket"`}).Draw(t, name); how != "" {
			all = append(all, writtenElement{"[[module]]", []string{fmt.Sprintf("name = %q", name), how}})
		}
	}
	for _, e := range []writtenElement{
		{"[[resource]]", []string{`uri = "api://x"`, `alternates = ["https://vault.azure.net"]`}},
		{"[callers]", []string{`engine = "/run/engine.sock"`, `cgroup_parents = ["/machine.slice"]`,
			`young = "refuse"`}},
		{"[callers]", []string{`engine = "auto"`, "requests_per_second = 50"}},
		{"[tokens]", []string{`sdk_life = "30m"`, `spread = "20m"`, `lost_record = "withhold"`}},
		{"[loopback]", []string{`address = "127.0.0.1:40380"`}},
		{"[source]", []string{`kind = "simulated"`, `endpoint = "imds"`}},
	} {
		isThere := slices.ContainsFunc(all, func(other writtenElement) bool { return other.header == e.header })
		if !isThere && rapid.Bool().Draw(t, e.header) {
			all = append(all, e)
		}
	}
	return all
}

// breakOne returns the elements with one of them broken, and which.
func breakOne(t *rapid.T, sound []writtenElement) (broken []writtenElement, index int) {
	broken = slices.Clone(sound)
	index = rapid.IntRange(0, len(sound)-1).Draw(t, "element")
	e := &broken[index]
	e.lines = slices.Clone(e.lines)
	line := rapid.IntRange(0, len(e.lines)-1).Draw(t, "line")
	key, value, _ := strings.Cut(e.lines[line], " = ")
	slip := func(word string) string {
		at := rapid.IntRange(0, len(word)-1).Draw(t, "letter")
		if rapid.Bool().Draw(t, "left out") {
			return word[:at] + word[at+1:]
		}
		return word[:at] + word[at:at+1] + word[at:]
	}
	inCaller := strings.HasPrefix(value, "{ ")
	switch rapid.SampledFrom([]string{
		"key", "type", "value", "value", "missing", "table", "unknown table", "twice", "no header", "brackets",
	}).Draw(t, "break") {
	case "key":
		inner, of, _ := strings.Cut(strings.TrimPrefix(value, "{ "), " = ")
		if inCaller && rapid.Bool().Draw(t, "inside") {
			e.lines[line] = key + " = { " + slip(inner) + " = " + of
			break
		}
		e.lines[line] = slip(key) + " = " + value
	case "type":
		e.lines[line] = key + " = " + rapid.SampledFrom([]string{"7", `"x"`, "[7]", "{}", "true", "[]", "1979-05-27"}).
			Draw(t, "value")
	case "value":
		bad := []string{`"a b"`, `"/x/../y"`, `["x"]`, `"1"`}
		if inCaller {
			bad = badCallers(value)
		}
		e.lines[line] = key + " = " + rapid.SampledFrom(bad).Draw(t, "value")
	case "missing":
		e.lines = slices.Delete(e.lines, line, line+1)
	case "table":
		open := strings.TrimRight(e.header, "]")
		name := strings.TrimLeft(open, "[")
		e.header = open[:len(open)-len(name)] + slip(name) + e.header[len(open):]
	case "unknown table":
		e.header = "[whatever]"
	case "twice":
		other := rapid.SampledFrom(sound).Draw(t, "other")
		e.lines[0] = other.lines[0]
	case "no header":
		e.header = ""
	case "brackets":
		e.header = strings.NewReplacer("[[", "[", "]]", "]", "[", "[[", "]", "]]").Replace(e.header)
	}
	return broken, index
}

// badCallers returns callers of the same kind that no grant can have.
func badCallers(caller string) []string {
	for _, row := range []struct {
		kind string
		bad  []string
	}{
		{"module", []string{`{ module = "a b" }`, `{ module = 7 }`, `{ module = "cam", uid = 1 }`}},
		{"unit", []string{`{ unit = "a.timer" }`, `{ unit = [] }`, `{ unit = "camera", gid = 1 }`}},
		{"container_image", []string{`{ container_image = "cam:2" }`, `{ container_image = true }`}},
		{"u", []string{`{ user = "nobody-of-that-name" }`, `{ uid = -1 }`, `{ uid = "1" }`,
			`{ user = "root", uid = 1 }`}},
	} {
		if strings.HasPrefix(caller, "{ "+row.kind) {
			return row.bad
		}
	}
	return []string{`{ group = "nobody-of-that-name" }`, `{ gid = 4294967296 }`, `{ group = 7 }`}
}

func configOf(elements []writtenElement) (Config, string, bool) {
	var text strings.Builder
	for _, e := range elements {
		fmt.Fprintln(&text, e)
	}
	file := File{"/etc/percept/config.toml", []byte(text.String())}
	if _, err := parse(file); err != nil {
		return Config{}, text.String(), false
	}
	return Reading{Files: []File{file}}.Config(), text.String(), true
}

// situation is where a process runs, and which socket it connects to.
type situation struct {
	socket, container, image, unit string
	uid, gid                       uint32
}

// caller returns what the process is proved to be under a configuration; nil: it is refused.
func (s situation) caller(c Config) *grants.Caller {
	rules := c.CallerRules()
	caller := &grants.Caller{UID: s.uid, GID: s.gid, Unit: s.unit}
	if s.container != "" {
		if rules.Engines == nil {
			return nil
		}
		caller.Container = &grants.Container{Name: s.container, Digest: s.image}
		caller.Unit = ""
	}
	if s.socket == "" {
		return caller
	}
	required, hasSocket := rules.Modules[s.socket]
	if !hasSocket || required.Container != "" && required.Container != s.container {
		return nil
	}
	caller.Module = s.socket
	return caller
}

func situations() (all []situation) {
	for _, socket := range []string{"", "cam", "mic"} {
		for _, container := range []string{"", "cam", "mic", "box", "lone"} {
			for id := range uint32(3) {
				for _, unit := range []string{"", "camera.service", "other.service"} {
					if container != "" && unit != "" {
						continue
					}
					all = append(all, situation{socket, container, someImages[id%2], unit, id, (id + 1) % 3})
				}
			}
		}
	}
	return all
}

func requests() (all []grants.Request) {
	for _, resource := range append([]string{"api://another"}, someResources...) {
		all = append(all, grants.Request{Resource: resource})
		for i, identity := range someIdentities {
			all = append(all, grants.Request{Resource: resource, Identity: identity},
				grants.Request{Resource: resource, ClientID: guid(i)})
		}
	}
	return all
}

// answer is the token that a request is answered with, and those that may stand in for it; empty: none.
func answer(a *grants.Authorizer, caller *grants.Caller, r grants.Request) (token string, alternates []string) {
	if caller == nil {
		return "", nil
	}
	one, denial := a.Authorize(caller, r)
	if denial != nil {
		return "", nil
	}
	return fmt.Sprint(one.Identity.Selector(), " for ", r.Resource), a.AlternatesFor(caller, one.Identity, r.Resource)
}

// One broken element of a configuration gives nobody what the configuration would not give without the break, takes
// from nobody what it has nothing to do with, and is found by a reload.
func TestOneBrokenElement(t *testing.T) {
	t.Parallel()
	everywhere, asked := situations(), requests()
	rapid.Check(t, func(t *rapid.T) {
		sound := drawSound(t)
		whole, text, _ := configOf(sound)
		if len(whole.Idle) > 0 {
			t.Fatalf("a configuration without a break has a fault: %v\n%s", whole.Idle, text)
		}
		elements, index := breakOne(t, sound)
		broken, text, isTOML := configOf(elements)
		if !isTOML || len(broken.faults.all) == 0 {
			return // the last configuration goes on; or it is another one without a fault
		}
		if len(broken.Idle) == 0 || broken.faults.err(true) == nil {
			t.Fatalf("nothing is idle: %v\n%s", broken.faults.all, text)
		}
		now, was := grants.NewAuthorizer(broken.Rules.Rules), grants.NewAuthorizer(whole.Rules.Rules)
		elsewhere := untouched(sound[index], elements[index])
		for _, s := range everywhere {
			for _, r := range asked {
				before, stand := answer(was, s.caller(whole), r)
				after, stands := answer(now, s.caller(broken), r)
				if after != "" && after != before {
					t.Fatalf("%+v asks %+v: gets %s, would get %q\n%s\n%v", s, r, after, before, text, broken.Idle)
				}
				for _, alternate := range stands {
					if after != "" && !slices.Contains(stand, alternate) {
						t.Fatalf("%+v asks %+v: %s may stand in\n%s", s, r, alternate, text)
					}
				}
				if before != "" && after == "" && elsewhere(was, s.caller(whole), r) {
					t.Fatalf("%+v asks %+v: gets nothing, would get %s\n%s\n%v", s, r, before, text, broken.Idle)
				}
			}
		}
		checkSettings(t, whole, broken, text)
	})
}

// checkSettings holds what is no grant: each setting is as it was, or stricter.
func checkSettings(t *rapid.T, whole, broken Config, text string) {
	was, now := whole.Rules, broken.Rules
	switch {
	case now.SDKLifeOrDefault() > was.SDKLifeOrDefault(), now.SpreadOrDefault() < was.SpreadOrDefault(),
		was.WithholdLost && !now.WithholdLost:
		t.Fatalf("tokens: %+v, were %+v\n%s", now, was, text)
	case broken.Source.Fault == "" && broken.Source != whole.Source:
		t.Fatalf("source: %+v, was %+v\n%s", broken.Source, whole.Source, text)
	case broken.Callers.engines() != nil && !slices.Equal(broken.Callers.engines(), whole.Callers.engines()),
		len(broken.Callers.parents()) > len(whole.Callers.parents()),
		whole.Callers.RefuseYoung() && !broken.Callers.RefuseYoung():
		t.Fatalf("callers: %+v, were %+v\n%s", broken.Callers, whole.Callers, text)
	case broken.Loopback.Address.IsValid() && broken.Loopback.Address != whole.Loopback.Address:
		t.Fatalf("loopback: %v, was %v\n%s", broken.Loopback.Address, whole.Loopback.Address, text)
	}
}

// untouched returns whether a request has nothing to do with what was broken, so that it is answered as before.
func untouched(sound, broken writtenElement) func(*grants.Authorizer, *grants.Caller, grants.Request) bool {
	isNamed := sound.header == broken.header
	for _, line := range broken.lines { // what stands here for want of another header
		key, _, _ := strings.Cut(line, " = ")
		kind, stray := strayKeys[key]
		isNamed = isNamed && (!stray || strings.Contains(sound.header, kind))
	}
	switch {
	case isNamed && slices.Contains([]string{"[tokens]", "[loopback]", "[source]", "[[resource]]"}, sound.header):
		return func(*grants.Authorizer, *grants.Caller, grants.Request) bool { return true }
	case isNamed && sound.header == "[callers]":
		return func(_ *grants.Authorizer, caller *grants.Caller, _ grants.Request) bool {
			return caller.Container == nil
		}
	case isNamed && sound.header == "[[grant]]" && len(broken.lines) > 0 && sound.lines[0] == broken.lines[0]:
		return func(a *grants.Authorizer, caller *grants.Caller, r grants.Request) bool {
			c, _, _ := configOf([]writtenElement{sound})
			mine := c.Rules.Grants[0].Caller
			return !slices.ContainsFunc(a.GrantsFor(caller), func(g grants.Ref) bool { return g.Caller.IsSame(mine) })
		}
	case isNamed && sound.header == "[[identity]]":
		name := strings.Trim(strings.TrimPrefix(sound.lines[0], "name = "), `"`)
		return func(a *grants.Authorizer, caller *grants.Caller, r grants.Request) bool {
			one, _ := a.Authorize(caller, r)
			return r.Identity != "" && one.Identity.Name != name && !isTwin(broken, one.Identity)
		}
	}
	return func(*grants.Authorizer, *grants.Caller, grants.Request) bool { return false }
}

// isTwin reports whether a broken identity has the name or the ID of another one, which is then idle as well.
func isTwin(broken writtenElement, other *grants.Identity) bool {
	text := broken.String()
	return strings.Contains(text, fmt.Sprintf("%q", other.Name)) || other.ClientID == "" &&
		!strings.Contains(text, "\nclient_id = \"0") || other.ClientID != "" && strings.Contains(text, other.ClientID)
}
