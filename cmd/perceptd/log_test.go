package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"log"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
)

// A library's line is told of, with who wrote it, and not repeated; and libraries cannot fill the journal.
func TestLibrariesAreNotQuoted(t *testing.T) {
	t.Parallel()
	const canary = "canary-4f1d2c7e9b"
	core, told := observer.New(zapcore.DebugLevel)
	l := newLibraries(zap.New(core))
	log.New(l, canary, log.Lshortfile).Printf("Unsolicited response starting with %q", canary)
	slog.New(slog.NewTextHandler(l, nil)).Warn(canary, canary, canary)
	for range 1000 {
		log.New(l, "", 0).Print(canary)
	}
	lines := told.All()
	if len(lines) != 5 || l.leftOut != 997 {
		t.Fatalf("%d lines, %d left out", len(lines), l.leftOut)
	}
	for _, line := range lines {
		text, err := zapcore.NewJSONEncoder(zap.NewProductionEncoderConfig()).EncodeEntry(line.Entry, line.Context)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(text.String(), canary) ||
			line.ContextMap()["function"] != "perceptd/cmd/perceptd.TestLibrariesAreNotQuoted" {
			t.Errorf("%s", text)
		}
	}
}

// voices are the packages outside of Go's own that can write to standard output or error past the standard logger,
// which is filtered, and why they write nothing there that was sent to the program.
var voices = map[string]string{
	"github.com/Azure/azure-sdk-for-go/sdk/internal/log": "off, whatever AZURE_SDK_GO_LOGGING says: silenceLibraries",
	"github.com/coreos/go-systemd/v22/journal":           "its Send, which is not used, names fields",
	"github.com/pkg/browser": "of signing in with a browser, which managed identities do " +
		"not",
	"github.com/spf13/cobra":  "perceptctl sets its output",
	"github.com/spf13/pflag":  "perceptctl sets its output",
	"go.uber.org/zap":         "newLog says where its own errors go",
	"perceptd/cmd/perceptctl": "its output is its work; the standard logger is off",
	"perceptd/cmd/perceptd":   "the log, and the filter of libraries",
	"perceptd/systemd":        "the log, where the journal does not take it",
}

func TestVoices(t *testing.T) {
	t.Parallel()
	unheard := make(map[string]bool)
	for name := range voices {
		unheard[name] = true
	}
	for _, p := range linked(t) {
		if p.Standard {
			continue // the standard logger and slog, which are filtered; and the runtime, when the process dies
		}
		for _, file := range p.GoFiles {
			parsed, err := parser.ParseFile(token.NewFileSet(), filepath.Join(p.Dir, file), nil,
				parser.SkipObjectResolution)
			if err != nil {
				t.Fatal(err)
			}
			if what := voiceIn(parsed); what != "" {
				if voices[p.ImportPath] == "" {
					t.Errorf("%s, %s: %s: may it write what was sent to the program? Judge it, and add it to voices",
						p.ImportPath, file, what)
				}
				delete(unheard, p.ImportPath)
			}
			if strings.HasPrefix(p.ImportPath, "perceptd/") && hasBareServer(parsed) {
				t.Errorf("%s, %s: an http.Server without an ErrorLog writes what it is sent to the standard logger",
					p.ImportPath, file)
			}
		}
	}
	for name := range unheard {
		t.Errorf("%s is among the voices and says nothing", name)
	}
}

// linked returns every package that is linked into one of the two programs.
func linked(t *testing.T) []pkg {
	t.Helper()
	return listed(t, "-deps", "perceptd/cmd/perceptd", "perceptd/cmd/perceptctl")
}

// outputs are the standard streams, and what would take the standard logger away from the filter.
var outputs = []string{"os.Stdout", "os.Stderr", "log.SetOutput", "slog.SetDefault", "log.Default"}

// voiceIn returns by what a file could write to standard output or error, or "".
func voiceIn(file *ast.File) (what string) {
	ast.Inspect(file, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.SelectorExpr:
			if of, ok := n.X.(*ast.Ident); ok && slices.Contains(outputs, of.Name+"."+n.Sel.Name) {
				what = of.Name + "." + n.Sel.Name
			}
		case *ast.CallExpr:
			if f, ok := n.Fun.(*ast.Ident); ok && (f.Name == "println" || f.Name == "print") {
				what = f.Name
			}
		}
		return true
	})
	return what
}

// hasBareServer reports whether a file makes an http.Server without an ErrorLog.
func hasBareServer(file *ast.File) (bare bool) {
	ast.Inspect(file, func(n ast.Node) bool {
		made, ok := n.(*ast.CompositeLit)
		if !ok {
			return true
		}
		kind, ok := made.Type.(*ast.SelectorExpr)
		if !ok || kind.Sel.Name != "Server" {
			return true
		}
		if of, ok := kind.X.(*ast.Ident); ok && of.Name == "http" {
			bare = bare || !slices.ContainsFunc(made.Elts, func(e ast.Expr) bool {
				pair, ok := e.(*ast.KeyValueExpr)
				return ok && pair.Key.(*ast.Ident).Name == "ErrorLog"
			})
		}
		return true
	})
	return bare
}
