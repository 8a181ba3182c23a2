package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// mayReadClocks has the files that read a clock of this process. Elsewhere clocks come as values, so that a simulated
// back end may run fast, and a test holds on every day. Test files are free to, but for those of folders in clockless.
var mayReadClocks = map[string]string{
	"tokencache/clock.go":                       "the clock of those that are given none",
	"tokencache/tokencachetest/clock.go":        "a test's virtual time",
	"tokencache/tokencachetest/source.go":       "a test's virtual time",
	"agent/clock/clock.go":                      "it reads the device's clocks for all",
	"agent/server/log.go":                       "the clock of those that are given none",
	"agent/iothub/hubtest/broker.go":            "the clock of those that are given none",
	"agent/iothub/link/link.go":                 "the clock of those that are given none",
	"agent/iothub/link/dial.go":                 "a deadline of a connection",
	"agent/iothub/link/session.go":              "how long a connection lasts, and when it is renewed",
	"agent/iothub/reporter.go":                  "when a report is due",
	"agent/simulator/backend.go":                "the clock of those that are given none",
	"agent/source/source.go":                    "the clock of those that are given none, and how long a fetch took",
	"agent/client/azcredential/azcredential.go": "a module's own clock, by which azcore judges expiry",
	"agent/store/folder.go":                     "the name of a file that is set aside",
	"agent/server/drain.go":                     "how long ago a connection came",
	"agent/server/limits.go": "requests and connections a second, and how long ago others were " +
		"turned away",
	"agent/server/caller.go":     "how long ago a process was looked up",
	"agent/server/limit/conn.go": "deadlines of a connection, and how long ago it came",
	"agent/server/limit/conns.go": "how long a connection waits for its place, or lingers, and since " +
		"when others were turned away",
	"agent/server/limit/fairlistener.go": "connections a second",
	"agent/server/limit/places.go":       "how long a connection is idle",
	"agent/server/limit/refusals.go":     "a deadline of a connection",
	"agent/server/limit/serve.go":        "a deadline of a connection",
	"agent/room/room.go":                 "how long a connection is idle",
	"cmd/perceptctl/exec_killed_test.go": "how long a process is waited for",
	"agent/server/handler.go":            "when an answer is due",
	"agent/server/watch.go":              "a deadline of a connection",
	"agent/attest/engine.go":             "how long ago the engine was asked",
	"agent/attest/attestation.go":        "how long ago a caller was looked at",
	"agent/tcppeer/tcppeer.go":           "how long ago the kernel's table was read",
	"agent/iothub/eventsender.go":        "how long events are apart",
	"agent/identityproxy/arc.go":         "how long a key is open",
	"agent/identityproxy/forward.go":     "how long perceptd was waited for",
	"systemd/journal.go":                 "a deadline of a connection",
	"systemd/notify.go":                  "a deadline of a connection",
	"cmd/fleetdemo/fleet.go":             "how long a fleet takes",
	"cmd/fleetdemo/show.go":              "how long a fleet takes",
	"cmd/fleetdemo/strain.go":            "whether this process comes late",
	"cmd/perceptd/e2e/harness/daemon.go": "how long a test waits for an answer",
	"cmd/perceptd/e2e/harness/engine.go": "how long an engine takes",
	"docs/modules/go/main.go":            "a module's own clock",
	"agent/iothub/hub.go":                "the clock that the times of its status are of",
	"agent/iothub/desired.go":            "when the twin was read, by that clock",
	"cmd/perceptd/hub.go":                "how long the hub is away",
	"cmd/perceptctl/exec_test.go":        "how long a process is waited for",
}

// clockless are the folders whose tests may not read a clock either.
var clockless = []string{"cmd/perceptctl/"}

func TestClocks(t *testing.T) {
	t.Parallel()
	const root = "../.."
	used := make(map[string]bool)
	err := filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		name, _ := filepath.Rel(root, path)
		isTest := strings.HasSuffix(name, "_test.go") &&
			!slices.ContainsFunc(clockless, func(folder string) bool { return strings.HasPrefix(name, folder) })
		if err != nil || entry.IsDir() || filepath.Ext(name) != ".go" || isTest {
			return err
		}
		files := token.NewFileSet()
		file, err := parser.ParseFile(files, path, nil, 0)
		if err != nil {
			return err
		}
		for _, at := range clockReads(file) {
			used[name] = true
			if mayReadClocks[name] == "" {
				t.Errorf("%v reads this process's clock: take the time as a value, or from the daemon's answer",
					files.Position(at))
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for name := range mayReadClocks {
		if !used[name] {
			t.Errorf("%s may read a clock, and does not", name)
		}
	}
}

// clockReads returns where a file names a function of package time that reads a clock, under whatever name it imports
// it.
func clockReads(file *ast.File) (found []token.Pos) {
	names := make(map[string]bool)
	for _, imported := range file.Imports {
		switch {
		case imported.Path.Value != `"time"`:
		case imported.Name == nil:
			names["time"] = true
		case imported.Name.Name == ".": // its functions have no package before them
			return []token.Pos{imported.Pos()}
		default:
			names[imported.Name.Name] = true
		}
	}
	ast.Inspect(file, func(n ast.Node) bool {
		if s, ok := n.(*ast.SelectorExpr); ok {
			pkg, _ := s.X.(*ast.Ident)
			if pkg != nil && names[pkg.Name] && slices.Contains([]string{"Now", "Since", "Until"}, s.Sel.Name) {
				found = append(found, s.Pos())
			}
		}
		return true
	})
	return found
}

func TestClockReadsAreFound(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]int{
		`import "time"; var a, b, c = time.Now, time.Since(x), time.Until`: 3,
		`import clock "time"; var a = clock.Now()`:                         1,
		`import . "time"; var a = Now()`:                                   1,
		`import "time"; var a, b = time.Unix(0, 0), x.Now()`:               0,
		`import time "perceptd/agent/clock"; var a = time.Now()`:           0,
	} {
		file, err := parser.ParseFile(token.NewFileSet(), "", "package p; "+text, 0)
		if err != nil {
			t.Fatal(err)
		}
		if got := len(clockReads(file)); got != want {
			t.Errorf("%s: %d, want %d", text, got, want)
		}
	}
}
