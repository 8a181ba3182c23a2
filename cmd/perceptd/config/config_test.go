package config

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"perceptd/agent/source"
	"perceptd/cmd/perceptd/e2e/harness"
)

func TestConfigIsRead(t *testing.T) {
	t.Parallel()
	path := harness.WriteConfig(t, map[string]string{
		"config.toml": harness.GoodConfig + `
[tokens]
sdk_life = "30m"
`,
		"config.d/20-speech.toml": `
[[identity]]
name = "speech"
object_id = "00000000-0000-0000-0000-00000000000a"
resource_id = "/subscriptions/s"

[[grant]]
caller = { module = "speech" }
identity = "speech"
resources = ["https://storage.azure.com"]

[[grant]]
caller = { user = "root" }
identity = "speech"
resources = ["https://storage.azure.com"]
`,
		"config.d/10-life.toml": "[tokens]\nsdk_life = \"20m\"\n",
		"config.d/notes.txt":    "not read",
	})
	c, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	if want := 20 * time.Minute; c.Rules.SDKLife != want {
		t.Errorf("sdk_life %v: the last file counts, want %v", c.Rules.SDKLife, want)
	}
	if c.Source != (Source{Kind: Simulated, Endpoint: source.Auto, Speed: 1, Rollover: "expiry"}) {
		t.Errorf("source %+v", c.Source)
	}
	if len(c.Files) != 3 || filepath.Base(c.Files[1]) != "10-life.toml" {
		t.Errorf("files %v", c.Files)
	}
	if len(c.Rules.Identities) != 3 || len(c.Rules.Grants) != 3 || !slices.Equal(c.Modules(), []string{"speech"}) {
		t.Errorf("rules %+v", c.Rules)
	}
	if m := c.Rules.Grants[2].Caller; m.User != "root" || m.UID == nil || *m.UID != 0 {
		t.Errorf("user root is %+v", m)
	}
	for _, part := range []string{"uid 4711 may have", "module speech", "user root (uid 0)", "at most 20m"} {
		if !strings.Contains(c.Describe(), part) {
			t.Errorf("%q is missing in:\n%s", part, c.Describe())
		}
	}
}

func TestConfigFaults(t *testing.T) {
	t.Parallel()
	for _, row := range []struct{ name, text, want string }{
		{"syntax", "[source\n", "config.toml:1:8: "},
		{"type", "[[identity]]\nname = 7\n",
			`config.toml:2: identity 1: name must be a text in quotes, such as "device", and is a number`},
		{"type of a whole table", "grant = 3\n",
			"config.toml:1: grant 1: write it with two brackets, [[grant]]: there may be several"},
		{"one bracket", "[[identity]]\nname = \"a\"\n\n[grant]\nidentity = \"a\"\n",
			"config.toml:4: grant 1: write it with two brackets, [[grant]]: there may be several"},
		{"a caller of no grant", "[[identity]]\nname = \"a\"\n\n[grant.caller]\nuid = 1\n",
			"config.toml:4: grant 1: write it with two brackets, [[grant]]: there may be several"},
		{"uid below 0", "[[grant]]\ncaller = { uid = -1 }\n",
			"config.toml:2: grant 1: caller.uid is -1: it must be between 0 and 4294967294"},
		{"uid above all", "[[grant]]\ncaller = { uid = 4294967296 }\n",
			"config.toml:2: grant 1: caller.uid is 4294967296: it must be between 0 and"},
		{"unknown table", "[sources]\n", "config.toml:1: unknown key sources: the tables are"},
		{"unknown key of source", "[source]\nkidn = \"x\"\n",
			"config.toml:2: unknown key source.kidn: [source] has kind"},
		{"unknown key of tokens", "[tokens]\nlife = \"1h\"\n",
			"config.toml:2: unknown key tokens.life: [tokens] has sdk_life"},
		{"unknown key of identity", harness.GoodConfig + "[[identity]]\nclientid = \"x\"\n",
			"config.toml:18: unknown key identity.clientid: [[identity]] has name"},
		{"unknown key of grant", harness.GoodConfig + "[[grant]]\nresource = \"x\"\n",
			"config.toml:18: unknown key grant.resource: [[grant]] has caller (by module, unit, container_image, " +
				"user, uid, group or gid)"},
		{"unknown kind of caller", harness.GoodConfig + "[[grant]]\ncaller = { pod = \"x\" }\n",
			"config.toml:18: unknown key grant.caller.pod: [[grant]] has caller (by module, unit, container_image, " +
				"user, uid, group or gid)"},
		{"no duration", "[tokens]\nsdk_life = \"soon\"\n",
			`config.toml:2: tokens.sdk_life is "soon": write a duration in quotes, such as "50m" or "1h30m"`},
		{"duration without a unit", "[tokens]\nsdk_life = \"5\"\n",
			`config.toml:2: tokens.sdk_life is "5": write a duration`},
		{"number as a duration", "\n[tokens]\nsdk_life = 5\n",
			`config.toml:3: tokens.sdk_life is 5: write a duration in quotes, such as "50m" or "1h30m"`},
		{"fraction as a duration", "tokens = { sdk_life = 5.5 }\n",
			"config.toml:1: tokens.sdk_life is 5.5: write a duration"},
		{"time of day as a duration", "[tokens]\nsdk_life = 00:50:00\n",
			"config.toml:2: tokens.sdk_life is 00:50:00: write a duration"},
		{"list as a duration", "[tokens]\nsdk_life = [\"50m\"]\n",
			"config.toml:2: tokens.sdk_life is [50m]: write a duration"},
		{"table as a duration", "[tokens]\nsdk_life = {}\n",
			"config.toml:2: tokens.sdk_life is map[]: write a duration"},
		{"table of its own as a duration", "[tokens.sdk_life]\nlife = 5\n",
			"config.toml:1: tokens.sdk_life is map[life:5]: write a duration"},
		{"kind", "[source]\nkind = \"magic\"\n",
			`config.toml:2: source.kind is "magic": it must be "managed-identity" or "simulated"`},
		{"endpoint", "[source]\nendpoint = \"moon\"\n",
			`config.toml:2: source.endpoint is "moon": it must be auto, arc, app-service or imds`},
		{"speed of the real one", "[source]\nspeed = 2.0\n",
			`config.toml:2: source.speed, source.rollover and source.spread are for source.kind = "simulated" only`},
		{"rollover of the real one", "[source]\nrollover = \"jittered\"\n",
			`config.toml:2: source.speed, source.rollover and source.spread are for source.kind = "simulated" only`},
		{"speed", "[source]\nkind = \"simulated\"\nspeed = 0.5\n",
			"config.toml:3: source.speed is 0.5: it must be between 1 and 100000"},
		{"speed that is no number", "[source]\nkind = \"simulated\"\nspeed = nan\n",
			"config.toml:3: source.speed is NaN"},
		{"speed without end", "source = { kind = \"simulated\", speed = inf }\n",
			"config.toml:1: source.speed is +Inf"},
		{"rollover", "[source]\nkind = \"simulated\"\nrollover = \"never\"\n", "config.toml:3: source.rollover: "},
		{"no such user",
			harness.GoodConfig + "[[grant]]\ncaller = { user = \"nobody-of-that-name\" }\nidentity = " +
				"\"device\"\nresources = [\"api://x\"]\n", "config.toml:18: user \"nobody-of-that-name\" is not known"},
		{"user and uid",
			harness.GoodConfig + "[[grant]]\ncaller = { user = \"root\", uid = 1 }\nidentity = \"device\"\nresources " +
				"= [\"api://x\"]\n", "config.toml:18: a grant's caller is exactly one"},
		{"rule of an identity",
			"[[identity]]\nname = \"device\"\n\n[[identity]]\nname = \"device\"\nclient_id = \"x\"\n",
			`config.toml:4: identity "device" is there twice`},
		{"second fault of the same",
			"[[identity]]\nname = \"device\"\n\n[[identity]]\nname = \"device\"\nclient_id = \"x\"\n",
			`config.toml:4: identity "device": client_id "x" is no GUID`},
		{"rule of a grant",
			harness.GoodConfig + "\n[[grant]]\ncaller = { uid = 1 }\nidentity = \"robot\"\nresources = [\"api://x\"]\n",
			`config.toml:18: the grant for uid 1 names identity "robot"`},
		{"inline table", "identity = [\n  { name = \"a\" },\n\n  { name = \"a b\" }]\n",
			`config.toml:4: identity name "a b"`},
		{"empty inline table", "identity = [{}]\n", `config.toml:1: identity name ""`},
		{"rule of the life", harness.GoodConfig + "[tokens]\nsdk_life = \"1m\"\n",
			"config.toml:18: sdk_life is 1m0s: it must be between 20m0s and 24h"},
		{"fault of the source and of a rule", "[source]\nkind = \"magic\"\n[[identity]]\nname = \"a b\"\n",
			`config.toml:3: identity name "a b"`},
		{"loopback for all", "[loopback]\naddress = \"0.0.0.0:40380\"\n",
			`config.toml:2: loopback.address is "0.0.0.0:40380": it must be 127.0.0.1 or [::1], a colon, and a port`},
		{"loopback for all of IPv6", "[loopback]\naddress = \"[::]:40380\"\n",
			`config.toml:2: loopback.address is "[::]:40380": it must be`},
		{"loopback by a name", "[loopback]\naddress = \"localhost:40380\"\n",
			`config.toml:2: loopback.address is "localhost:40380": it must be`},
		{"another loopback address", "[loopback]\naddress = \"127.0.0.2:40380\"\n",
			`config.toml:2: loopback.address is "127.0.0.2:40380": it must be`},
		{"loopback in another guise", "[loopback]\naddress = \"[::ffff:127.0.0.1]:40380\"\n",
			"config.toml:2: loopback.address is "},
		{"loopback with a zone", "[loopback]\naddress = \"[::1%lo]:40380\"\n", "config.toml:2: loopback.address is "},
		{"loopback on port 0", "[loopback]\naddress = \"127.0.0.1:0\"\n", "config.toml:2: loopback.address is "},
		{"loopback on no port", "[loopback]\naddress = \"127.0.0.1\"\n", "config.toml:2: loopback.address is "},
		{"loopback on a port above all", "[loopback]\naddress = \"127.0.0.1:65536\"\n",
			"config.toml:2: loopback.address is "},
		{"loopback nowhere", "[loopback]\naddress = \"\"\n", `config.toml:2: loopback.address is "": it must be`},
		{"loopback without an address", "\n[loopback]\n",
			`config.toml:2: [loopback] has no address: write address = "127.0.0.1:40380"`},
		{"unknown key of loopback", "[loopback]\nport = 1\n",
			"config.toml:2: unknown key loopback.port: [loopback] has address"},
		{"empty", "", "config.toml: nothing is in it, as after a power cut"},
		{"no identity", "[callers]\n", "config.toml: no [[identity]] is configured"},
	} {
		path := harness.WriteConfig(t, map[string]string{"config.toml": row.text})
		_, err := Load(path)
		if err == nil || !strings.Contains(err.Error(), row.want) {
			t.Errorf("%s: %v\nwant %s", row.name, err, row.want)
		}
	}
}

func TestConfigFiles(t *testing.T) {
	t.Parallel()
	path := harness.WriteConfig(t, map[string]string{"config.toml": harness.GoodConfig})
	if err := os.Chmod(path, 0o666); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(path); err == nil ||
		!strings.Contains(err.Error(), "mode 0666 lets others change who gets tokens (owner ") {
		t.Errorf("writable by others: %v", err)
	}
	if _, err := Load(filepath.Join(t.TempDir(), "config.toml")); err == nil ||
		!strings.Contains(err.Error(), "not there: write one") {
		t.Errorf("missing: %v", err)
	}
	if _, err := Load(harness.WriteConfig(t,
		map[string]string{"config.toml": strings.Repeat("#",
			maxFile+1)})); err == nil || !strings.Contains(err.Error(), "larger than") {
		t.Errorf("large: %v", err)
	}
	if _, err := Load(t.TempDir()); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("folder: %v", err)
	}
	if os.Getuid() == 0 {
		foreign := harness.WriteConfig(t, map[string]string{"config.toml": harness.GoodConfig})
		if err := os.Chown(foreign, 4711, -1); err != nil {
			t.Fatal(err)
		}
		if _, err := Load(foreign); err == nil ||
			!strings.Contains(err.Error(),
				"config.toml: its owner, user 4711 (mode 0644), could change who gets tokens: chown root ") {
			t.Errorf("another user's: %v", err)
		}
	}
	pipe := harness.WriteConfig(t, map[string]string{"config.toml": harness.GoodConfig, "config.d/a.txt": ""})
	if err := syscall.Mkfifo(filepath.Join(filepath.Dir(pipe), "config.d", "a.toml"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(pipe); err == nil || !strings.Contains(err.Error(), "a.toml: not a regular file") {
		t.Errorf("a named pipe, which nobody writes to: %v", err)
	}
	if _, err := Load(harness.WriteConfig(t, map[string]string{"config.toml": harness.GoodConfig,
		"config.d": ""})); err == nil || !strings.Contains(err.Error(), "config.d: not a directory") {
		t.Errorf("config.d is a file: %v", err)
	}
	if _, err := Load(harness.WriteConfig(t, map[string]string{"config.toml/x": ""})); err == nil ||
		!strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("folder in the file's place: %v", err)
	}
	odd := harness.WriteConfig(t, map[string]string{"a[b]*/config.toml": harness.GoodConfig,
		"a[b]*/config.d/x.toml": "[x]\n"})
	if _, err := Load(filepath.Join(filepath.Dir(odd), "a[b]*", "config.toml")); err == nil ||
		!strings.Contains(err.Error(), "x.toml:1") {
		t.Errorf("a folder whose name is a pattern: %v", err)
	}
	split := harness.WriteConfig(t, map[string]string{"config.toml": harness.GoodConfig + "\n",
		"config.d/a.toml": "[source]\nspeed = 5.0\n"})
	if c, err := Load(split); err != nil || c.Source.Speed != 5 {
		t.Errorf("a source in two files: %+v, %v", c.Source, err)
	}
	both := harness.WriteConfig(t, map[string]string{"config.toml": harness.GoodConfig, "config.d/a.toml": "[x]\n",
		"config.d/b.toml": "[y]\n"})
	if _, err := Load(both); err == nil || !strings.Contains(err.Error(), "a.toml:1") ||
		!strings.Contains(err.Error(), "b.toml:1") {
		t.Errorf("two bad files, both named: %v", err)
	}
}

// Each fault is told with the file and the line that it stands in, however the file before is written.
func TestConfigPlaces(t *testing.T) {
	t.Parallel()
	path := harness.WriteConfig(t, map[string]string{
		"config.toml": `identity = [{ name = "device" }]
grant = [
  { caller = { uid = 1 }, identity = "device", resources = ["api://x"] },

  { caller = { uid = 2 }, identity = "device", resources = ["nothing"] },
]
tokens.sdk_life = "1h"

[source]
# a comment
kind = "magic"
`,
		"config.d/10.toml": "\n[[identity]]\nname = \"device\"\n",
		"config.d/20.toml": "[tokens]\nsdk_life = \"25h\"\n\n\n[[grant]]\ncaller = { user = \"nobody-of-that-name\" " +
			"}\nidentity = \"robot\"\nresources = [\"api://x\"]\n",
		"config.d/30.toml": "# nothing\n",
	})
	_, err := Load(path)
	if err == nil {
		t.Fatal("accepted")
	}
	var got []string
	for line := range strings.Lines(err.Error()) {
		got = append(got, strings.TrimPrefix(strings.TrimSpace(line), filepath.Dir(path)+"/"))
	}
	want := []string{
		`config.d/20.toml:6: user "nobody-of-that-name" is not known on this device: create it (useradd ` +
			`--system nobody-of-that-name), or name a uid`,
		`config.toml:11: source.kind is "magic": it must be "managed-identity" or "simulated"`,
		`config.d/10.toml:2: identity "device" is there twice`,
		`config.toml:1: identity "device" is there twice`,
		`config.d/10.toml:2: identities "device" and "device" are both the system-assigned one, which a device has ` +
			`once: give one of them a client_id, object_id or resource_id`,
		`config.toml:1: identities "device" and "device" are both the system-assigned one, which a device has once: ` +
			`give one of them a client_id, object_id or resource_id`,
		`config.toml:5: the grant for uid 2: resource "nothing" is no App ID URI (such as https://vault.azure.net) ` +
			`and no GUID`,
		`config.d/20.toml:2: sdk_life is 25h0m0s: it must be between 20m0s and 24h`,
		`config.d/20.toml:5: the grant for nobody names identity "robot", which is not configured`,
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func FuzzConfig(f *testing.F) {
	f.Add(harness.GoodConfig)
	f.Add("[tokens]\nsdk_life = 5\n")
	f.Add("[tokens]\nsdk_life = \"1h\"\n[[grant]]\ncaller = { user = \"root\" }\n")
	f.Add("identity = [{ name = \"a\" }]\n\n[[grant.caller]]\n")
	f.Add("[source]\nkind = \"simulated\"\nspeed = inf\n")
	f.Add("[tokens]\nspread = \"0s\"\n[[resource]]\nuri = \"api://x\"\nalternates = [\"api://y\"]\n")
	f.Add("source = { kind = 'simulated' } # x\r\nidentity = [ # x\n {name='a'}, {\n " +
		"name='b'}]\n[[grant]]\n[grant.caller]\nuid=1\n")
	f.Add("identity.name = 1\n[[source.x]]\n\"iden\\u0074ity\" = [[{}]]\n")
	f.Fuzz(func(t *testing.T, text string) {
		c, err := Load(harness.WriteConfig(t, map[string]string{"config.toml": text}))
		if err != nil {
			if strings.TrimSpace(err.Error()) == "" {
				t.Error("an error that says nothing")
			}
			return
		}
		if err := c.Rules.Validate(); err != nil {
			t.Errorf("accepted, and not valid: %v", err)
		}
		if !strings.HasPrefix(c.Describe(), "configuration is fine: ") {
			t.Error("accepted, and nothing to say of it")
		}
	})
}
