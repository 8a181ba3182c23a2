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

// mayImport is the layout: of our packages, each may import these. The reason is why no more.
var mayImport = map[string]struct {
	ours   []string
	reason string
}{
	"tokencache":           {nil, "the cache is pure: it is proved in virtual time, with nothing of the device in it"},
	"tokencache/staleness": {nil, "it is a test alone"},
	"agent": {[]string{"agent/api", "agent/grants", "tokencache"},
		"it puts cache, grants and audit together; who calls, and over what, is others' work"},
	"agent/grants": {[]string{"tokencache"}, "it decides by values alone, so that a table of values tests it"},
	"agent/api": {[]string{"tokencache"},
		"the wire contract names the enumerations of the cache by alias, and costs its importer nothing else"},
	"agent/source":  {[]string{"tokencache"}, "a source answers the cache and knows nobody who asks it"},
	"agent/tcppeer": {nil, "it looks who is there, and decides nothing"},
	"agent/room": {[]string{"agent/server/limit", "agent/tcppeer"},
		"it lets in whoever comes, and decides nothing else"},
	"agent/simulator": {[]string{"agent/room"},
		"the simulated back end must not share the mistakes of what it tests"},
	"agent/attest":  {[]string{"agent/grants", "agent/tcppeer"}, "it fills in a caller and decides nothing"},
	"agent/binding": {nil, "it says what the device is known by, and not what is done with it"},
	"agent/store": {[]string{"agent/binding", "agent/lock", "tokencache"},
		"it knows files; what is in force is decided elsewhere"},
	"agent/lives":        {nil, "it is a test alone"},
	"agent/server/limit": {nil, "it counts by keys; whom a connection is of is found out elsewhere"},
	"agent/server": {[]string{"agent", "agent/api", "agent/attest", "agent/grants", "agent/server/limit",
		"tokencache"}, "it reads the cache's values, and reaches the cache through the agent's grants only"},
	"agent/client": {[]string{"agent/api"}, "a module that imports the client must not link the daemon"},
	"agent/clock":  {[]string{"tokencache"}, "it only fills in a clock"},
	"agent/lock":   {nil, "it knows one folder, and not what is in it"},
	"agent/socket": {[]string{"agent/lock"}, "it makes sockets for whoever asks"},
	"systemd":      {nil, "it speaks to systemd for any daemon"},
	"cmd/perceptd": {[]string{"agent", "agent/api", "agent/binding", "agent/attest", "agent/clock", "agent/grants",
		"agent/store", "agent/lock",
		"agent/server", "agent/simulator", "agent/socket", "agent/source", "cmd/perceptd/config", "systemd", "tokencache"},
		"the daemon does not ask itself for tokens"},
	"cmd/perceptd/config": {[]string{"agent", "agent/attest", "agent/grants", "agent/simulator", "agent/source"},
		"it knows the file, and starts nothing"},
	"cmd/perceptd/e2e/attacks":    {nil, "it is a test alone"},
	"cmd/perceptd/e2e/bench":      {nil, "it is a test alone"},
	"cmd/perceptd/e2e/clients":    {nil, "it is a test alone"},
	"cmd/perceptd/e2e/containers": {nil, "it is a test alone"},
	"cmd/perceptd/e2e/daemon":     {nil, "it is a test alone"},
	"cmd/perceptd/e2e/soak":       {nil, "it is a test alone"},
	"tokencache/tokencachetest":   {[]string{"tokencache"}, "it is for tests alone, of any package"},
	"cmd/perceptd/e2e/harness": {[]string{"agent/api"},
		"it runs the programs and asks them as everybody does"},
	"agent/client/azcredential": {[]string{"agent/api", "agent/client"},
		"it is the client for those who have the Azure SDK already"},
	"agent/identityproxy": {[]string{"agent/api", "agent/client", "agent/room"},
		"it hands requests on, and decides nothing"},
	"cmd/perceptctl": {[]string{"agent/api", "agent/binding", "agent/client", "agent/clock", "agent/store",
		"agent/identityproxy", "agent/simulator", "cmd/perceptctl/term", "tokencache"}, "the tool talks to the daemon and is none itself"},
	"cmd/perceptctl/term": {nil, "it lays out text, whatever the text says"},
}

// testsMayImport holds the tests of some packages to the layout as well: beside what the package itself may import.
var testsMayImport = map[string][]string{
	"tokencache":           {"tokencache", "tokencache/tokencachetest", "agent/simulator"},
	"tokencache/staleness": {"tokencache", "tokencache/tokencachetest", "agent/simulator"},
}

// mustNotLink is what may not be in a package's build, its imports' imports included.
var mustNotLink = []struct{ pkg, bad, reason string }{
	{"tokencache", "net", "the cache knows no network"},
	{"tokencache", "go.uber.org/", "nor anybody else's library"},
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

// Every HTTP server of ours bounds what it reads.
func TestServersBoundHeads(t *testing.T) {
	t.Parallel()
	other := regexp.MustCompile(`\w+\.(Serve\([^)]|ServeTLS\(|ListenAndServe)`)
	servers := 0
	for _, p := range listed(t, "perceptd/...") {
		if p.ImportPath == "perceptd/agent/server/limit" {
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
