package main

import (
	"bytes"
	"path/filepath"
	"strings"
	"testing"

	"perceptd/cmd/perceptd/config"
	"perceptd/cmd/perceptd/e2e/harness"
)

// What --check says is what an administrator decides by.
func TestCheck(t *testing.T) {
	t.Parallel()
	path := harness.WriteConfig(t, map[string]string{
		"config.toml": harness.GoodConfig,
		"config.d/50.toml": "[source]\nendpoint = \"imds\"\n\n[[grant]]\ncaller = { module = \"vision\" }\nidentity " +
			"= \"vision\"\nresources = [\"api://x\", \"api://y\"]\n",
	})
	var out, errs bytes.Buffer
	status := run(t.Context(), []string{"--check", "--config", path}, &out, &errs)
	want := "configuration is fine: " + path + ", " + filepath.Join(filepath.Dir(path), "config.d/50.toml") + `
source: simulated, endpoint imds
identity device: system-assigned
identity vision: client_id 00000000-0000-0000-0000-000000000001
grant: uid 4711 may have tokens of device for https://vault.azure.net
grant: module vision may have tokens of vision for api://x, api://y
module vision: on its socket, out of the container named vision
container engine: auto, the first that is there of /run/docker.sock, /run/podman.sock, /run/podman/podman.sock
SDKs are told a life of at most 35m0s
a policy change takes up to 10m0s to reach new tokens
`
	if status != exitOK || out.String() != want || errs.String() != "" {
		t.Errorf("status %d\n%s%s\nwant\n%s", status, &out, &errs, want)
	}
	none := harness.WriteConfig(t, map[string]string{"config.toml": "[[identity]]\nname = \"device\"\n"})
	out.Reset()
	if status := run(t.Context(), []string{"--check", "--config", none}, &out, &errs); status != exitOK ||
		!strings.Contains(out.String(), "no grants: every caller is denied\n") {
		t.Errorf("status %d\n%s", status, &out)
	}
}

// A start that finds faults says no less than --check, which says what comes of them.
func TestCheckFaults(t *testing.T) {
	t.Parallel()
	const faulty = "[[grant]]\ncaller = { user = \"nobody-of-that-name\" }\nidentity = \"device\"\n" +
		"resources = \"api://x\"\n"
	const missing = "DIR/config.toml: not there: write one, as /usr/share/perceptd/config.example.toml shows it; " +
		"perceptd --check --config DIR/config.toml finds its faults"
	for _, row := range []struct {
		name  string
		files map[string]string
		want  string // with DIR for the folder
	}{
		{"an element", map[string]string{"config.toml": harness.GoodConfig, "config.d/a.toml": faulty},
			`perceptd: the configuration is not usable:
DIR/config.d/a.toml:2: user "nobody-of-that-name" is not known on this device: create it (useradd --system nobody-of-that-name), or name a uid
DIR/config.d/a.toml:4: grant 2: resources must be a list of texts, such as ["https://vault.azure.net"], and is a text
a reload refuses all of it, and what was removed from it stays in force
after a restart the rest is in force, and these are idle:
  grant 2 (DIR/config.d/a.toml:2)
`},
		{"a file", map[string]string{"config.toml": harness.GoodConfig, "config.d/a.toml": "[x\n",
			"config.d/b.conf": ""},
			`perceptd: the configuration is not usable:
DIR/config.d/a.toml:1:3: expected ']' to close table name
a reload refuses all of it, and what was removed from it stays in force
after a restart the configuration that was last in force goes on, as root keeps it; ` +
				`without such a copy no caller gets a token
warning: DIR/config.d/b.conf: not read, since its name does not end in .toml: rename it if it is to count
`},
		{"the main file", map[string]string{"config.d/a.toml": harness.GoodConfig},
			`perceptd: the configuration is not usable:
` + missing + `
after a restart only what is in config.d is in force
`},
		{"all files", map[string]string{"config.d/a.conf": ""},
			`perceptd: the configuration is not usable:
` + missing + `
a reload refuses all of it, and what was removed from it stays in force
after a restart no caller gets a token
warning: DIR/config.d/a.conf: not read, since its name does not end in .toml: rename it if it is to count
`},
	} {
		path := harness.WriteConfig(t, row.files)
		var out, errs bytes.Buffer
		status := run(t.Context(), []string{"--check", "--config", path}, &out, &errs)
		got := strings.ReplaceAll(errs.String(), filepath.Dir(path), "DIR")
		if status != exitFailed || out.Len() > 0 || got != row.want {
			t.Errorf("%s: status %d\n%s%s\nwant\n%s", row.name, status, &out, got, row.want)
		}
	}
}

// An endpoint that this device does not have is a warning: a start serves without it, and tries again.
func TestCheckEndpoint(t *testing.T) {
	t.Parallel()
	path := harness.WriteConfig(t, map[string]string{
		"config.toml": "[source]\nendpoint = \"app-service\"\n[[identity]]\nname = \"device\"\n", "config.d/x.TOML": "",
	})
	var out, errs bytes.Buffer
	status := run(t.Context(), []string{"--check", "--config", path}, &out, &errs)
	if status != exitOK || !strings.Contains(out.String(), "warning: source managed-identity: endpoint app-service "+
		"cannot be used, azidentity chooses ") || !strings.Contains(out.String(), "x.TOML: not read, since its name") {
		t.Errorf("status %d\n%s%s", status, &out, &errs)
	}
}

func TestCommandLine(t *testing.T) {
	t.Parallel()
	good := harness.WriteConfig(t, map[string]string{"config.toml": harness.GoodConfig})
	bad := harness.WriteConfig(t, map[string]string{"config.toml": "[x]\n"})
	for _, row := range []struct {
		args      []string
		status    int
		out, errs string
	}{
		{[]string{"--version"}, exitOK, "perceptd development", ""},
		{[]string{"--help"}, exitOK, "usage: perceptd", ""},
		{[]string{"--what"}, exitUsage, "", "perceptd: flag provided but not defined: -what\n\nperceptd hands"},
		{[]string{"extra"}, exitUsage, "", `unexpected argument "extra"`},
		{[]string{"--check", "--config", good}, exitOK, "configuration is fine: ", ""},
		{[]string{"--check", "--config", bad}, exitFailed, "", "unknown key x"},
		{[]string{"--config", good, "--log-level", "loud"}, exitUsage, "", "it must be debug, info, warn or error"},
		{[]string{"--config", good, "--runtime-dir", "/nonexistent"}, exitFailed, "",
			"/nonexistent: no such file or directory"},
	} {
		var out, errs bytes.Buffer
		status := run(t.Context(), row.args, &out, &errs)
		if status != row.status || !strings.Contains(out.String(), row.out) ||
			!strings.Contains(errs.String(), row.errs) {
			t.Errorf("%v: status %d, want %d\n%s%s", row.args, status, row.status, &out, &errs)
		}
	}
}

func TestStateDirectory(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		environment, source string
		args                []string
		want                string
		passing             bool
	}{
		{"", config.ManagedIdentity, nil, "/var/lib/percept", false},
		{"", config.ManagedIdentity, []string{"--runtime-dir", "/run/percept/"}, "/var/lib/percept", false},
		{"/var/lib/one:/var/lib/two", config.ManagedIdentity, nil, "/var/lib/one", false},
		{"/var/lib/one", config.Simulated, []string{"--runtime-dir", "/tmp/run"}, "/var/lib/one", false},
		{"/var/lib/one", config.Simulated, []string{"--state-dir", "/elsewhere"}, "/elsewhere", false},
		{"", config.ManagedIdentity, []string{"--runtime-dir", "/tmp/run/"}, "/tmp/run-state", true},
		{"", config.Simulated, nil, "/run/percept-state", true},
		{"", config.Simulated, []string{"--runtime-dir", "run"}, "run-state", true},
		{"", config.Simulated, []string{"--runtime-dir", "run", "--state-dir", "state"}, "state", false},
	} {
		var errs bytes.Buffer
		f, err := parseFlags(row.args, &errs)
		if err != nil {
			t.Fatal(err)
		}
		if f.placeState(row.source, row.environment); f.stateDir != row.want || f.passing != row.passing {
			t.Errorf("%+v: %q %v, want %q", row, f.stateDir, f.passing, row.want)
		}
	}
}
