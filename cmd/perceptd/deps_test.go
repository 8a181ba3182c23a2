package main

import (
	"bytes"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// pkg is what `go list -json` says of a package.
type pkg struct {
	ImportPath, Dir           string
	Imports, Deps             []string
	TestImports, XTestImports []string
	GoFiles                   []string
	Standard                  bool
}

// mayImport is the layout: which of our packages each may import, and why no others. The table in docs/architecture.md
// says the same.
var mayImport = map[string]struct {
	ours   []string
	reason string
}{
	"tokencache": {nil, "the cache is pure: tests prove it in virtual time, with nothing of the device in it"},
	"agent": {[]string{"agent/api", "agent/deny", "agent/grants", "tokencache"},
		"it puts cache, grants and audit together; who calls, and over what, other packages find out"},
	"agent/grants": {[]string{"tokencache"}, "it decides by values alone, so that a table of values tests it"},
	"agent/deny":   {[]string{"agent/grants", "tokencache"}, "it compares values, and neither reads nor writes anything"},
	"agent/api": {[]string{"agent/deny", "tokencache"},
		"the wire contract names values of the cache and of deny rules by alias, and costs its importers nothing else"},
	"agent/explain": {[]string{"agent/api", "tokencache"},
		"it puts a status in sentences, for the tool on the device and for direct methods from afar"},
	"agent/iothub": {[]string{"agent", "agent/api", "agent/explain", "agent/iothub/link", "tokencache"},
		"it joins the agent to the hub, and reaches the cache only through the agent"},
	"agent/source":  {[]string{"tokencache"}, "a source answers the cache, and does not know who asks"},
	"agent/tcppeer": {nil, "it looks up users, and decides nothing"},
	"agent/room": {[]string{"agent/server/limit", "agent/tcppeer"},
		"it decides who makes room, and nothing else"},
	"agent/simulator": {[]string{"agent/room"},
		"the simulated back end must not share the mistakes of what it tests"},
	"agent/attest":  {[]string{"agent/grants", "agent/tcppeer"}, "it fills in a caller, and decides nothing"},
	"agent/binding": {nil, "it says what the device is known by, and not what that is used for"},
	"agent/store": {[]string{"agent/binding", "agent/deny", "agent/lock", "tokencache"},
		"it knows files, and not what is in force"},
	"agent/server/limit": {nil, "it counts by keys; the server finds out which key a connection has"},
	"agent/server": {[]string{"agent", "agent/api", "agent/attest", "agent/grants", "agent/server/limit"},
		"it speaks HTTP, and reaches the cache only through the agent, which checks the grants"},
	"agent/client": {[]string{"agent/api"}, "a module that imports the client must not link the daemon"},
	"agent/client/azcredential": {[]string{"agent/api", "agent/client"},
		"it is the client for those who have the Azure SDK already"},
	"agent/identityproxy": {[]string{"agent/api", "agent/client", "agent/room"},
		"it passes requests on, and decides nothing"},
	"agent/clock":  {[]string{"tokencache"}, "it only fills in a clock"},
	"agent/lock":   {nil, "it knows a folder, and not what is in it"},
	"agent/socket": {[]string{"agent/lock"}, "it makes sockets, and does not know for whom"},
	"systemd":      {nil, "it speaks to systemd for any daemon"},
	"cmd/perceptd": {[]string{"agent", "agent/api", "agent/attest", "agent/binding", "agent/clock", "agent/explain",
		"agent/grants", "agent/iothub", "agent/iothub/link", "agent/lock", "agent/server", "agent/simulator",
		"agent/socket", "agent/source", "agent/store", "cmd/perceptd/config", "systemd", "tokencache"}, "the daemon does not ask itself for tokens"},
	"cmd/perceptd/config": {[]string{"agent", "agent/attest", "agent/grants", "agent/iothub/link", "agent/simulator",
		"agent/source"},
		"it knows the file, and starts nothing"},
	"cmd/perceptctl": {[]string{"agent/api", "agent/binding", "agent/client", "agent/clock", "agent/explain",
		"agent/identityproxy", "agent/lock", "agent/simulator", "agent/socket", "agent/store", "cmd/perceptctl/term",
		"tokencache"},
		"the tool talks to the daemon, and is not one"},
	"cmd/fleetdemo": {[]string{"agent", "agent/api", "agent/clock", "agent/grants", "agent/iothub", "agent/iothub/hubtest",
		"agent/iothub/link", "agent/simulator", "tokencache"},
		"it runs many agents in one process, which have neither sockets nor files"},
	"cmd/perceptctl/term": {nil, "it lays out text, whatever the text says"},

	"agent/iothub/link": {[]string{"agent/api"},
		"it keeps a device connected, and knows nothing of tokens"},
	"agent/iothub/hubtest":        {nil, "a hub for tests must not share the mistakes of what it tests"},
	"agent/lives":                 {nil, "it has tests only"},
	"cmd/perceptd/e2e/attacks":    {nil, "it has tests only"},
	"cmd/perceptd/e2e/bench":      {nil, "it has tests only"},
	"cmd/perceptd/e2e/clients":    {nil, "it has tests only"},
	"cmd/perceptd/e2e/containers": {nil, "it has tests only"},
	"cmd/perceptd/e2e/daemon":     {nil, "it has tests only"},
	"cmd/perceptd/e2e/hub":        {nil, "it has tests only"},
	"cmd/perceptd/e2e/soak":       {nil, "it has tests only"},
	"cmd/perceptd/e2e/harness":    {[]string{"agent/api"}, "it runs the programs, and asks them as others do"},
	"tokencache/staleness":        {nil, "it has tests only"},
	"tokencache/tokencachetest":   {[]string{"tokencache"}, "any package's tests may import it"},
}

// testsMayImport limits the tests of some packages too: to this, and to what the package itself may import.
var testsMayImport = map[string][]string{
	"tokencache":           {"tokencache", "tokencache/tokencachetest", "agent/simulator"},
	"tokencache/staleness": {"tokencache", "tokencache/tokencachetest", "agent/simulator"},
}

// mustNotLink says what a package must not link, directly or through what it imports.
var mustNotLink = []struct{ pkg, bad, reason string }{
	{"tokencache", "net", "the cache knows no network"},
	{"tokencache", "go.uber.org/", "the cache uses no library of others"},
	{"agent/client", "go.uber.org/", "the client is standard library only"},
	{"agent/client", "github.com/", "the client is standard library only"},
	{"agent/client", "golang.org/x/", "the client is standard library only"},
	{"agent/client/azcredential", "github.com/AzureAD/", "a module needs no other way to sign in"},
	{"agent/client/azcredential", "go.uber.org/", "a module that imports the client must not link the daemon"},
	{"agent/simulator", "github.com/", "the simulator must not share azidentity's view of the protocol"},
	{"cmd/perceptctl", "github.com/Azure/", "the tool is small, and mounted into containers"},
	{"cmd/perceptctl", "github.com/AzureAD/", "the tool is small, and mounted into containers"},
}

func TestLayout(t *testing.T) {
	t.Parallel()
	seen := make(map[string]bool)
	for _, p := range listed(t, "perceptd/...") {
		name := strings.TrimPrefix(p.ImportPath, "perceptd/")
		rule, known := mayImport[name]
		if !known {
			t.Errorf("%s is not in the layout: say in docs/architecture.md and here what its one job is", name)
			continue
		}
		seen[name] = true
		for _, imported := range p.Imports {
			if of, ours := strings.CutPrefix(imported, "perceptd/"); ours && !slices.Contains(rule.ours, of) {
				t.Errorf("%s imports %s: %s", name, of, rule.reason)
			}
		}
		for _, allowed := range rule.ours {
			if !slices.Contains(p.Imports, "perceptd/"+allowed) {
				t.Errorf("%s may import %s and does not: take that out of the layout", name, allowed)
			}
		}
		if tests, limited := testsMayImport[name]; limited {
			for _, imported := range slices.Concat(p.TestImports, p.XTestImports) {
				of, ours := strings.CutPrefix(imported, "perceptd/")
				if ours && of != name && !slices.Contains(rule.ours, of) && !slices.Contains(tests, of) {
					t.Errorf("the tests of %s import %s: %s", name, of, rule.reason)
				}
			}
		}
		for _, rule := range mustNotLink {
			for _, dep := range p.Deps {
				if rule.pkg == name && (dep == rule.bad ||
					strings.HasPrefix(dep, strings.TrimSuffix(rule.bad, "/")+"/")) {
					t.Errorf("%s links %s: %s", name, dep, rule.reason)
				}
			}
		}
		if n := packageComments(t, p); n != 1 {
			t.Errorf("%s has %d package comments, want one", name, n)
		}
	}
	for name := range mayImport {
		if !seen[name] {
			t.Errorf("%s is in the layout and nowhere else", name)
		}
	}
}

// The table in docs/architecture.md has each package once, with what it may import.
func TestLayoutIsDocumented(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../../docs/architecture.md")
	if err != nil {
		t.Fatal(err)
	}
	const everySuite = "cmd/perceptd/e2e/…" // one row for all suites that have tests only
	_, table, _ := strings.Cut(string(text), "\n| folder | its one job | may import of ours |\n|---|---|---|\n")
	table, _, _ = strings.Cut(table, "\n\n")
	code := regexp.MustCompile("`([^`]+)`")
	documented := make(map[string]bool)
	for _, row := range strings.Split(table, "\n") {
		cells := strings.Split(row, "|")
		if len(cells) != 5 {
			t.Fatalf("not a row of the table: %s", row)
		}
		name := strings.Trim(cells[1], " `")
		rule, known := mayImport[name]
		switch {
		case name == everySuite:
			continue
		case !known || documented[name]:
			t.Errorf("%s is documented and not in the layout, or documented twice", name)
		}
		documented[name] = true
		var imports []string
		for _, span := range code.FindAllStringSubmatch(cells[3], -1) {
			imports = append(imports, span[1])
		}
		slices.Sort(imports)
		if !slices.Equal(imports, slices.Sorted(slices.Values(rule.ours))) {
			t.Errorf("%s may import %q; docs/architecture.md says %q", name, rule.ours, imports)
		}
	}
	for name, rule := range mayImport {
		suite := strings.HasPrefix(name, strings.TrimSuffix(everySuite, "…")) && rule.ours == nil
		if !suite && !documented[name] {
			t.Errorf("%s is not in the table of docs/architecture.md", name)
		}
	}
}

// The cache links os, since fmt does; it does not use it.
func TestTheCacheIsPure(t *testing.T) {
	t.Parallel()
	for _, p := range listed(t, "perceptd/...") {
		if p.ImportPath != "perceptd/tokencache" {
			continue
		}
		for _, imported := range p.Imports {
			for _, bad := range []string{"os", "log", "log/slog", "syscall", "io", "io/fs"} {
				if imported == bad {
					t.Errorf("tokencache imports %s", bad)
				}
			}
		}
	}
}

// Every HTTP server of ours bounds what it reads. The hub that tests make serves them alone.
func TestServersBoundHeads(t *testing.T) {
	t.Parallel()
	other := regexp.MustCompile(`\w+\.(Serve\([^)]|ServeTLS\(|ListenAndServe)`)
	servers := 0
	for _, p := range listed(t, "perceptd/...") {
		if slices.Contains([]string{"perceptd/agent/server/limit", "perceptd/agent/iothub/hubtest"}, p.ImportPath) {
			continue
		}
		for _, file := range p.GoFiles {
			text, err := os.ReadFile(filepath.Join(p.Dir, file))
			if err != nil {
				t.Fatal(err)
			}
			for _, call := range other.FindAllString(string(text), -1) {
				if servers++; !strings.HasPrefix(call, "limit.") && !strings.HasPrefix(call, "room.") {
					t.Errorf("%s in %s: serve with limit.Serve", call, filepath.Join(p.ImportPath, file))
				}
			}
		}
	}
	if servers == 0 {
		t.Error("nothing serves")
	}
}

func TestNoReplacements(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../../go.mod")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(text), "replace ") {
		t.Error("go.mod replaces a module: whoever imports ours would build something else")
	}
}

func listed(t *testing.T, what ...string) []pkg {
	t.Helper()
	out, err := exec.Command("go",
		append([]string{"list", "-json=ImportPath,Dir,Imports,Deps,TestImports,XTestImports,GoFiles,Standard"},
			what...)...).Output()
	if err != nil {
		t.Fatal(err)
	}
	var all []pkg
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p pkg
		if err := d.Decode(&p); err == io.EOF {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
}

// packageComments counts the files of p in which a comment stands directly on the package clause.
func packageComments(t *testing.T, p pkg) int {
	t.Helper()
	n := 0
	for _, file := range p.GoFiles {
		text, err := os.ReadFile(filepath.Join(p.Dir, file))
		if err != nil {
			t.Fatal(err)
		}
		before, _, _ := strings.Cut("\n"+string(text), "\npackage ")
		lines := strings.Split(before, "\n")
		if last := lines[len(lines)-1]; strings.HasPrefix(last, "//") {
			n++
		}
	}
	return n
}
