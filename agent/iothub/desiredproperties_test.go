package iothub

import (
	"bytes"
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/santhosh-tekuri/jsonschema/v6"
	"pgregory.net/rapid"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/grants"
)

// documents are values of percept, and how what is said against them begins; empty: nothing. What begins with "*" no
// schema can say.
var documents = map[string]struct{ percept, says string }{
	"nothing":     {`{}`, ""},
	"empty lists": {`{"policyChanges":[],"deny":[],"prefetch":[]}`, ""},
	"everything": {` {"policyChanges": [{"resource": "https://vault.azure.net", "identity": "vision",
		"at": "2026-11-28T08:00:00Z", "effect": "revoked", "note": "ticket 12"},
		{"allResources": true, "at": "2026-11-28T09:00:00.5+01:00", "effect": "granted", "note": ""}],
		"deny": [ {"module": "vision", "resource": "vault.azure.net", "note": "stolen"} , {"all": true},
		{"unit": "camera"}, {"unit": "camera@2.service"}, {"user": "1000"}, {"user": "edge"}, {"identity": "vision"}],
		"prefetch": [{"resource": "VAULT.azure.net/", "identity": "device"}, {"resource": "api://x"}],
		"logLevel": "debug"} `, ""},
	"all that is false": {`{"deny":[{"all":false,"module":"a"}],"policyChanges":[{"resource":"api://x",` +
		`"allResources":false,"at":"2026-11-28T08:00:00Z","effect":"changed"}]}`, ""},
	"an application": {`{"deny":[{"resource":"00000000-0000-0000-0000-00000000000a"}]}`, ""},
	"a scope":        {`{"deny":[{"resource":"vault.azure.net/.default"}]}`, ""},
	"escapes":        {`{"deny":[{"modul\u0065":"visio\u006e"}]}`, ""},
	"a list":         {`[]`, "percept: it is a list, and must be an object"},
	"a text":         {`"deny"`, "percept: it is a text, and must be an object"},
	"a number":       {`7`, "percept: it is a number, and must be an object"},
	"true":           {`true`, "percept: it is true, and must be an object"},
	"an unknown key": {`{"denied":[]}`, "percept.denied: there is no such key: it is one of policyChanges, " +
		"deny, prefetch and logLevel"},
	"another case":    {`{"Deny":[{"module":"vision"}]}`, "percept.Deny: there is no such key"},
	"a pasted secret": {`{"SharedAccessKey=c2VjcmV0":1}`, "percept.…: there is no such key"},
	"one of a rule": {`{"deny":[{"module":"a"},{"modul":"vision"}]}`,
		"percept.deny[1].modul: there is no such key: it is one of module, unit, user, identity, resource, all and " +
			"note"},
	"a rule's case": {`{"deny":[{"Module":"vision"}]}`, "percept.deny[0].Module: there is no such key"},
	"one of a change": {`{"policyChanges":[{"resource":"api://x","at":"2026-11-28T08:00:00Z","effect":"revoked",` +
		`"when":1}]}`, "percept.policyChanges[0].when: there is no such key"},
	"one of prefetch": {`{"prefetch":[{"uri":"api://x"}]}`,
		"percept.prefetch[0].uri: there is no such key: it is one of resource and identity"},
	"no list":             {`{"deny":{"module":"vision"}}`, "percept.deny: it is an object, and must be a list"},
	"a list that is null": {`{"deny":null}`, "percept.deny: it is null, and must be a list"},
	"a list of texts":     {`{"deny":["vision"]}`, "percept.deny[0]: it is a text, and must be an object"},
	"null in a list":      {`{"prefetch":[null]}`, "percept.prefetch[0]: it is null, and must be an object"},
	"a numbered module":   {`{"deny":[{"module":7}]}`, "percept.deny[0].module: it is a number, and must be a text"},
	"a numbered user":     {`{"deny":[{"user":1000}]}`, "percept.deny[0].user: it is a number, and must be a text"},
	"a null module": {`{"deny":[{"module":null,"identity":"device"}]}`,
		"percept.deny[0].module: it is null, and must be a text"},
	"an empty module": {`{"deny":[{"module":"","identity":"device"}]}`, "percept.deny[0].module: it is empty"},
	"a module's name": {`{"deny":[{"module":"a b"}]}`, "percept.deny[0].module: it must be letters"},
	"a socket": {`{"deny":[{"unit":"camera.socket"}]}`,
		"percept.deny[0].unit: it must be a systemd service"},
	"a template":         {`{"deny":[{"unit":"camera@"}]}`, "percept.deny[0].unit: it must be a systemd service"},
	"a user's name":      {`{"deny":[{"user":"a:b"}]}`, "percept.deny[0].user: it must be a user's name"},
	"no uid":             {`{"deny":[{"user":"4294967295"}]}`, "*percept.deny[0].user: it must be a user's name"},
	"an identity's name": {`{"deny":[{"identity":"ä"}]}`, "percept.deny[0].identity: it must be letters"},
	"no URI":             {`{"deny":[{"resource":"vault"}]}`, "percept.deny[0].resource: it must be an App ID URI"},
	"a path": {`{"prefetch":[{"resource":"/vault.azure.net"}]}`,
		"percept.prefetch[0].resource: it must be an App ID URI"},
	"a deep resource": {`{"prefetch":[{"resource":` + strings.Repeat("[", 200) + strings.Repeat("]", 200) + `}]}`,
		"percept.prefetch[0].resource: it is a list, and must be a text"},
	"a text for all": {`{"deny":[{"all":"true"}]}`, "percept.deny[0].all: it is a text, and must be true or " +
		"false"},
	"all and a module": {`{"deny":[{"all":true,"module":"vision"}]}`,
		"percept.deny[0].all: it denies all, and the rule names something besides"},
	"a rule of nobody": {`{"deny":[{}]}`, "percept.deny[0]: it names nothing"},
	"no all":           {`{"deny":[{"all":false}]}`, "percept.deny[0]: it names nothing"},
	"only a note":      {`{"deny":[{"module":"vision"},{"note":"n"}]}`, "percept.deny[1]: it names nothing"},
	"a long note": {`{"deny":[{"module":"vision","note":"` + strings.Repeat("x", 300) + `"}]}`,
		"percept.deny[0].note: it must be one line"},
	"a wide note": {`{"deny":[{"module":"vision","note":"` + strings.Repeat("ä", 200) + `"}]}`,
		"*percept.deny[0].note: it must be one line"},
	"a note of lines": {`{"deny":[{"module":"vision","note":"a\nb"}]}`,
		"percept.deny[0].note: it must be one line"},
	"too many rules": {`{"deny":[` + strings.Repeat(`{"module":"a"},`, api.MaxDenyRules) + `{"module":"a"}]}`,
		"percept.deny: it lists 65, and can list at most 64"},
	"too many changes": {`{"policyChanges":[` + strings.Repeat(`{},`, agent.MaxTwinChanges) + `{}]}`,
		"percept.policyChanges: it lists 101, and can list at most 100"},
	"too much prefetched": {`{"prefetch":[` + strings.Repeat(`{"resource":"a:b"},`, agent.MaxTwinPrefetch) +
		`{"resource":"a:b"}]}`, "percept.prefetch: it lists 65, and can list at most 64"},
	"a time in words": {`{"policyChanges":[{"resource":"api://x","at":"yesterday","effect":"revoked"}]}`,
		"percept.policyChanges[0].at: it must be a time"},
	"a time of a day": {`{"policyChanges":[{"resource":"api://x","at":"2026-11-28","effect":"revoked"}]}`,
		"percept.policyChanges[0].at: it must be a time"},
	"a time of no zone": {`{"policyChanges":[{"resource":"api://x","at":"2026-11-28T08:00:00","effect":"revoked"}]}`,
		"percept.policyChanges[0].at: it must be a time"},
	"a time of no day": {`{"policyChanges":[{"resource":"api://x","at":"2026-02-30T08:00:00Z","effect":"revoked"}]}`,
		"percept.policyChanges[0].at: it must be a time"},
	"a year": {`{"policyChanges":[{"resource":"api://x","at":"0001-01-01T00:00:00Z","effect":"revoked"}]}`,
		"percept.policyChanges[0].at: it must be a time"},
	"seconds": {`{"policyChanges":[{"resource":"api://x","at":1790000000,"effect":"revoked"}]}`,
		"percept.policyChanges[0].at: it is a number, and must be a text"},
	"no time": {`{"policyChanges":[{"resource":"api://x","effect":"revoked"}]}`,
		"percept.policyChanges[0].at: it is missing"},
	"an effect": {`{"policyChanges":[{"resource":"api://x","at":"2026-11-28T08:00:00Z","effect":"Revoked"}]}`,
		"percept.policyChanges[0].effect: it must be granted, revoked or changed"},
	"no effect": {`{"policyChanges":[{"resource":"api://x","at":"2026-11-28T08:00:00Z"}]}`,
		"percept.policyChanges[0].effect: it is missing"},
	"both": {`{"policyChanges":[{"resource":"api://x","allResources":true,"at":"2026-11-28T08:00:00Z",` +
		`"effect":"revoked"}]}`, "percept.policyChanges[0]: it must name a resource, or say allResources"},
	"neither": {`{"policyChanges":[{"at":"2026-11-28T08:00:00Z","effect":"revoked"}]}`,
		"percept.policyChanges[0]: it must name a resource, or say allResources"},
	"no resource":      {`{"prefetch":[{"identity":"device"}]}`, "percept.prefetch[0].resource: it is missing"},
	"a level":          {`{"logLevel":"loud"}`, "percept.logLevel: it must be debug, info, warn or error"},
	"an empty level":   {`{"logLevel":""}`, "percept.logLevel: it is empty"},
	"a level's number": {`{"logLevel":1e999}`, "percept.logLevel: it is a number, and must be a text"},
	"a key twice":      {`{"deny":[{"module":"a","module":"b"}]}`, "*percept.deny[0].module: it is there twice"},
	"a list twice":     {`{"deny":[],"logLevel":"info","deny":[]}`, "*percept.deny: it is there twice"},
	"no UTF-8":         {"{\"deny\":[{\"note\":\"\xff\",\"module\":\"a\"}]}", "*percept: it is not UTF-8"},
	"much white space": {`{` + strings.Repeat(" ", maxPercept) + `}`, "*percept: it has 65538 bytes, more than 65536"},
}

func TestDesiredProperties(t *testing.T) {
	t.Parallel()
	expect := func(name, text, says string) {
		t.Helper()
		d, err := readDesired(json.RawMessage(text))
		switch {
		case says == "" && err != nil, says != "" && (err == nil || !strings.HasPrefix(err.Error(), says)):
			t.Errorf("%s: %v, want %q", name, err, says)
		case says != "" && (d.Deny != nil || d.PolicyChanges != nil || d.Prefetch != nil || d.LogLevel != ""):
			t.Errorf("%s is refused in part: %+v", name, d)
		}
	}
	for name, row := range documents {
		text := `{"another":{"Percept":[1,null]},"another":1,"$version":7,"percept":` + row.percept + `}`
		expect(name, text, strings.TrimPrefix(row.says, "*"))
	}
	const none = "the desired properties are no JSON object"
	for text, says := range map[string]string{
		`{}`: "", ` {"percept" : null } `: "", `{"$version":1}`: "", `{"Perceptron":{"deny":7}}`: "",
		`{"PERCEPT":{"deny":7}}`:             "PERCEPT: it is percept in another case",
		`{"Percept":null}`:                   "Percept: it is percept in another case",
		`{"percept":{},"perCept":{},"a":{}}`: "perCept: it is percept in another case",
		``:                                   none, `[]`: none, `null`: none, `{"percept":{}`: none,
		`{"percept":{}}{}`: none, "\xff": none, "{\"a\":\"\xff\"}": "",
		`{"percept":{},"a":1,"percept":{}}`: "percept: it is there twice",
		`{"a":"` + strings.Repeat("x", maxDesired) + `"}`: "the desired properties have " +
			"262152 bytes, more than 262144",
		strings.Repeat(`{"percept":`, 20_000) + "1" + strings.Repeat("}", 20_000): none,
	} {
		expect(fmt.Sprintf("%.40s", text), text, says)
	}
	d, err := readDesired(json.RawMessage(`{"percept":` + documents["everything"].percept + `}`))
	at := time.Date(2026, 11, 28, 8, 0, 0, 0, time.UTC)
	if err != nil || len(d.PolicyChanges) != 2 || len(d.Deny) != 7 || len(d.Prefetch) != 2 ||
		d.LogLevel != api.LogDebug {
		t.Fatalf("%+v %v", d, err)
	}
	d.PolicyChanges[0].At, d.PolicyChanges[1].At = d.PolicyChanges[0].At.UTC(), d.PolicyChanges[1].At.UTC()
	if want := (api.PolicyChangeRequest{Resource: "https://vault.azure.net", Identity: "vision", At: at,
		Effect: "revoked",
		Note:   "ticket 12"}); d.PolicyChanges[0] != want {
		t.Errorf("%+v", d.PolicyChanges[0])
	}
	if want := (api.PolicyChangeRequest{AllResources: true, At: at.Add(time.Second / 2),
		Effect: "granted"}); d.PolicyChanges[1] != want {
		t.Errorf("%+v", d.PolicyChanges[1])
	}
	if want := (api.DenyRequest{DenyTarget: api.DenyTarget{Module: "vision", Resource: "https://vault.azure.net"},
		Note: "stolen"}); d.Deny[0] != want {
		t.Errorf("%+v", d.Deny[0])
	}
	if want := (api.PrefetchRequest{Resource: "https://VAULT.azure.net/", Identity: "device"}); d.Prefetch[0] != want {
		t.Errorf("%+v", d.Prefetch[0])
	}
}

// What is said of a document shows none of its values, since it goes to the log and to the hub.
func TestFaultsShowNoValues(t *testing.T) {
	t.Parallel()
	const secret = "SharedAccessKey=c2VjcmV0"
	for _, percept := range []string{
		`{"` + secret + `":1}`, `"` + secret + `"`, `{"logLevel":"` + secret + `"}`, `{"deny":["` + secret + `"]}`,
		`{"deny":[{"module":"` + secret + `"}]}`, `{"deny":[{"unit":"` + secret + `"}]}`,
		`{"deny":[{"user":": ` + secret + `"}]}`, `{"deny":[{"identity":"` + secret + `"}]}`,
		`{"deny":[{"resource":"` + secret + `"}]}`, `{"deny":[{"` + secret + `":"` + secret + `"}]}`,
		`{"deny":[{"module":"a","note":"\n` + secret + `"}]}`, `{"prefetch":[{"resource":"` + secret + `"}]}`,
		`{"policyChanges":[{"allResources":true,"effect":"revoked","at":"` + secret + `"}]}`,
		`{"policyChanges":[{"allResources":true,"effect":"` + secret + `","at":"2026-11-28T08:00:00Z"}]}`,
	} {
		_, err := readDesired(json.RawMessage(`{"percept":` + percept + `}`))
		if err == nil || strings.Contains(err.Error(), "c2VjcmV0") || len(err.Error()) > 256 {
			t.Errorf("%s: %v", percept, err)
		}
	}
}

// Of several faults the first in deny is named, since that one keeps something going, and the others are counted.
func TestFaultsOfDenyComeFirst(t *testing.T) {
	t.Parallel()
	const badChange = `"policyChanges":[{"allResources":true,"effect":"revoked"}]`
	for percept, want := range map[string]string{
		`{` + badChange + `,"deny":[{"module":"a"},{"module":7}]}`: "percept.deny[1].module: it is a number, and " +
			"must be a text; and 1 fault besides",
		`{"logLevel":7,"prefetch":7,"unknown":7,"deny":[{"modul":"a"},{"module":"a"},{}]}`: "percept.deny[0].modul: " +
			"there is no such key: it is one of module, unit, user, identity, resource, all and note; " +
			"and 4 faults besides",
		`{` + badChange + `,"Deny":[{"module":"a"}]}`: "percept.Deny: there is no such key: it is one of " +
			"policyChanges, deny, prefetch and logLevel; and 1 fault besides",
		`{` + badChange + `}`: "percept.policyChanges[0].at: it is missing: write when it happened, such as " +
			"2026-11-28T08:00:00Z",
	} {
		if _, err := readDesired(json.RawMessage(`{"percept":` + percept + `}`)); err == nil || err.Error() != want {
			t.Errorf("%s: %v, want %s", percept, err, want)
		}
	}
}

// Keys of percept's that stand beside it are named, in every case.
func TestStrayKeys(t *testing.T) {
	t.Parallel()
	for text, want := range map[string][]string{
		`{"percept":{"deny":[]},"other":1}`: nil, `{}`: nil, `[]`: nil, `{`: nil, "": nil, ` {"denied":[]} `: nil,
		`{"deny":[{"module":"vision"}]}`: {"deny: it stands beside percept, where it means nothing to perceptd: move " +
			"it to " +
			"percept.deny"},
		`{"LogLevel":"debug","percept":{},"policychanges":[],"prefetch":7}`: {
			"LogLevel: it stands beside percept, where it means nothing to perceptd: move it to percept.logLevel",
			"policychanges: it stands beside percept, where it means nothing to perceptd: move it to " +
				"percept.policyChanges",
			"prefetch: it stands beside percept, where it means nothing to perceptd: move it to percept.prefetch"},
	} {
		if got := strayKeys(json.RawMessage(text)); !slices.Equal(got, want) {
			t.Errorf("%s: %q", text, got)
		}
	}
}

// Rules that are sound are found among what is not, and rules that are not are not guessed at.
func TestSoundDeny(t *testing.T) {
	t.Parallel()
	vision, all := api.DenyTarget{Module: "vision"}, api.DenyTarget{All: true}
	for percept, want := range map[string][]api.DenyTarget{
		`{"deny":[{"module":"vision"}]}`:                                            {vision},
		`{"deny":[{"module":"vision"},{"modul":"a"},7,{"all":true},{"module":""}]}`: {vision, all},
		`{"deny":[{"module":"vision","all":true},{"module":"vision","user":7}]}`:    nil,
		`{"logLevel":"loud","denied":1,"deny":[{"module":"vision"}]}`:               {vision},
		`{"deny":[{"module":"vision"}],"deny":[{"all":true}]}`:                      {vision},
		`{"policyChanges":7,"deny":[{"module":"vision","note":"\n"},{"all":true}]}`: {vision, all},
		"{\"deny\":[{\"module\":\"vision\"},{\"all\":true,\"note\":\"\xff\"}]}":     {vision, all},
		`{"deny":null}`: nil, `{"deny":[]}`: nil, `{"deny":{"all":true}}`: nil, `[]`: nil, `null`: nil,
		`{"Deny":[{"all":true}]}`: nil,
		`{"deny":[` + strings.Repeat(`{"all":true},`, api.MaxDenyRules) +
			`{"module":"vision"}]}`: append(slices.Repeat([]api.DenyTarget{all}, api.MaxDenyRules), vision),
	} {
		var targets []api.DenyTarget
		for _, r := range soundDeny(json.RawMessage(`{"percept":` + percept + `}`)) {
			targets = append(targets, r.DenyTarget)
		}
		if !slices.Equal(targets, want) {
			t.Errorf("%.80s: %+v", percept, targets)
		}
	}
	if sound := soundDeny(json.RawMessage(`{"percept":{"deny":[{"all":true}]}`)); sound != nil {
		t.Errorf("of what is no JSON: %+v", sound)
	}
}

// twinSchema is docs/twin.schema.json, as a validator reads it that has nothing to do with the code.
func twinSchema(t testing.TB) *jsonschema.Schema {
	t.Helper()
	c := jsonschema.NewCompiler()
	c.DefaultDraft(jsonschema.Draft2020)
	c.AssertFormat()
	s, err := c.Compile("../../docs/twin.schema.json")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// against returns what the schema has against a value of percept.
func against(s *jsonschema.Schema, percept string) error {
	value, err := jsonschema.UnmarshalJSON(strings.NewReader(percept))
	if err != nil {
		return err
	}
	return s.Validate(value)
}

// The schema in docs takes what the code takes, and refuses what the code refuses, but for what no schema can say.
func TestTwinSchema(t *testing.T) {
	t.Parallel()
	s := twinSchema(t)
	for name, row := range documents {
		fault := against(s, strings.ToValidUTF8(row.percept, "\ufffd"))
		if refused := row.says != "" && row.says[0] != '*'; (fault != nil) != refused {
			t.Errorf("%s: the schema says %v, the code %q", name, fault, row.says)
		}
	}
}

// The page shows a document that code and schema take, with each key, and an acknowledgement with a reason that there
// is.
func TestDocumentedDesiredProperties(t *testing.T) {
	t.Parallel()
	blocks := strings.Split(section(t, "## Desired properties"), "```json\n")
	if len(blocks) != 3 {
		t.Fatalf("the section shows %d documents", len(blocks)-1)
	}
	text, _, _ := strings.Cut(blocks[1], "```")
	d, err := readDesired(json.RawMessage(text))
	if err != nil || d.Deny == nil || d.PolicyChanges == nil || d.Prefetch == nil || d.LogLevel == "" {
		t.Errorf("%+v %v", d, err)
	}
	percept, _ := perceptIn(json.RawMessage(text))
	if fault := against(twinSchema(t), string(percept)); fault != nil {
		t.Error(fault)
	}
	_, err = readDesired(json.RawMessage(`{"percept":{"deny":[{"all":true},{"unit":7}]}}`))
	if !strings.Contains(blocks[2], fmt.Sprintf(`"reason": %q`, err)) {
		t.Errorf("the page has another reason than %v", err)
	}
	for key, most := range map[string]int{"deny": api.MaxDenyRules, "policyChanges": agent.MaxTwinChanges,
		"prefetch": agent.MaxTwinPrefetch} {
		if !regexp.MustCompile(fmt.Sprintf("\n\\| `%s` \\|.* \\| %d \\|\n", key, most)).MatchString(blocks[1]) {
			t.Errorf("the table does not say that there can be %d of %s", most, key)
		}
	}
}

// drawn draws a value of percept which is nearly right: what is wrong with it is wrong in few places.
func drawn(t *rapid.T) string {
	wrong := rapid.SampledFrom([]string{`null`, `7`, `""`, `[]`, `{}`, `true`, `"x y"`, `"\u0000"`, `"a:b"`, `"é"`})
	value := func(right ...string) string {
		if rapid.IntRange(0, 19).Draw(t, "wrong") == 0 {
			return wrong.Draw(t, "value")
		}
		return rapid.SampledFrom(right).Draw(t, "value")
	}
	name := func() string { return value(`"vision"`, `"a.b-c_d"`, `"9"`, `"`+strings.Repeat("x", 64)+`"`, `"-a"`) }
	resource := func() string {
		return value(`"vault.azure.net"`, `"https://vault.azure.net/"`, `"api://x"`, `"a.b:7"`, `"vault"`, `"/a.b"`,
			`".a"`,
			`"00000000-0000-0000-0000-00000000000a"`, `"00000000-0000-0000-0000-00000000000a/.default"`, `"a<b.c"`,
			`"x/.default"`)
	}
	fields := map[string]func() string{
		"module": name, "identity": name, "resource": resource,
		"unit": func() string {
			return value(`"camera"`, `"camera.service"`, `"c@1"`, `"c@"`, `"a.timer"`, `".a"`, `"a/b"`)
		},
		"user":         func() string { return value(`"edge"`, `"1000"`, `"a@b"`, `"a:b"`) },
		"all":          func() string { return value(`true`, `false`) },
		"allResources": func() string { return value(`true`, `false`) },
		"note":         func() string { return value(`"n"`, `""`, `"two words"`, `"\n"`) },
		"effect":       func() string { return value(`"granted"`, `"revoked"`, `"changed"`, `"GRANTED"`) },
		"at": func() string {
			return value(`"2026-11-28T08:00:00Z"`, `"1970-01-01T00:00:00Z"`, `"2199-12-31T23:00:00.25-00:30"`,
				`"2026-11-28t08:00:00z"`,
				`"2026-11-28T08:00:60Z"`, `"2026-11-28T24:00:00Z"`, `"1969-12-31T00:00:00Z"`, `"2026-11-31T08:00:00Z"`,
				`"2026-11-28T08:00:00,5Z"`)
		},
		"logLevel": func() string { return value(`"debug"`, `"info"`, `"warn"`, `"error"`, `"Info"`) },
		"other":    func() string { return "1" },
	}
	object := func(must []string, may ...string) string {
		keys := slices.Clone(must)
		for _, key := range may {
			if rapid.IntRange(0, 2).Draw(t, key) == 0 {
				keys = append(keys, key)
			}
		}
		if rapid.IntRange(0, 49).Draw(t, "odd") == 0 {
			keys = append(keys[:len(keys)/2], "other")
		}
		var parts []string
		for _, key := range keys {
			parts = append(parts, fmt.Sprintf("%q:%s", key, fields[key]()))
		}
		return "{" + strings.Join(parts, ",") + "}"
	}
	list := func(of func() string) func() string {
		return func() string {
			var parts []string
			for range rapid.IntRange(0, 2).Draw(t, "length") {
				parts = append(parts, of())
			}
			return "[" + strings.Join(parts, ",") + "]"
		}
	}
	fields["deny"] = list(func() string {
		return object(nil, "module", "unit", "user", "identity", "resource", "all",
			"note")
	})
	fields["policyChanges"] = list(func() string {
		return object([]string{"at", "effect"}, "resource", "allResources", "identity", "note")
	})
	fields["prefetch"] = list(func() string { return object([]string{"resource"}, "identity") })
	return object(nil, "deny", "policyChanges", "prefetch", "logLevel")
}

// So it is for documents that nobody thought of.
func TestTwinSchemaAtRandom(t *testing.T) {
	t.Parallel()
	s := twinSchema(t)
	taken := 0
	rapid.Check(t, func(t *rapid.T) {
		percept := drawn(t)
		_, err := readDesired(json.RawMessage(`{"percept":` + percept + `}`))
		if fault := against(s, percept); (fault == nil) != (err == nil) {
			t.Errorf("%s: the schema says %v, the code %v", percept, fault, err)
		}
		if err == nil {
			taken++
		}
	})
	if taken == 0 {
		t.Error("nothing that was drawn is taken")
	}
}

func FuzzDesiredProperties(f *testing.F) {
	for _, row := range documents {
		f.Add([]byte(`{"percept":` + row.percept + `}`))
	}
	s := twinSchema(f)
	f.Fuzz(func(t *testing.T, text []byte) {
		d, err := readDesired(text)
		sound := soundDeny(text)
		if err != nil {
			return
		}
		if !slices.Equal(sound, d.Deny) {
			t.Errorf("%s: sound are %+v of %+v", text, sound, d.Deny)
		}
		for _, r := range d.Deny {
			if agent.CheckDeny(r) != nil {
				t.Errorf("a rule that is none: %+v", r)
			}
		}
		if err := agent.CheckTwinChanges(d.PolicyChanges); err != nil {
			t.Error(err)
		}
		for _, p := range d.Prefetch {
			if err := grants.CheckResource(p.Resource); err != nil {
				t.Error(err)
			}
		}
		// What the code takes the schema takes.
		if percept, _ := perceptIn(text); percept != nil {
			if fault := against(s, string(percept)); fault != nil {
				t.Errorf("%s: the schema says %v", bytes.TrimSpace(percept), fault)
			}
		}
	})
}
