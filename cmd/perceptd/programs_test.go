package main

import (
	"bytes"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// The place that writes programs for tests, while nothing is forked.
const writesPrograms = "cmd/perceptd/e2e/harness/process.go"

// A program that a test writes in another way is busy at times when the test starts it.
func TestProgramsAreWrittenByTheHarness(t *testing.T) {
	t.Parallel()
	const root = "../.."
	harnessWrites := false
	err := filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		name, _ := filepath.Rel(root, path)
		isTest := strings.HasSuffix(name, "_test.go") || filepath.Ext(name) == ".txtar" ||
			filepath.Dir(name) == filepath.Dir(writesPrograms)
		if err != nil || entry.IsDir() || !isTest {
			return err
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for _, line := range programWrites(t, name, text) {
			if name == writesPrograms {
				harnessWrites = true
			} else {
				t.Errorf("%s:%d makes a program: use harness.WriteProgram", name, line)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if !harnessWrites {
		t.Errorf("%s writes no program", writesPrograms)
	}
}

var madeExecutable = regexp.MustCompile(`(?m)^chmod [0-7]*[1357]`)

// programWrites returns the lines on which a Go file writes a file that may be executed, and is not empty, or on which
// a transcript gives one that mode.
func programWrites(t *testing.T, name string, text []byte) (lines []int) {
	t.Helper()
	if filepath.Ext(name) == ".txtar" {
		for _, at := range madeExecutable.FindAllIndex(text, -1) {
			lines = append(lines, 1+bytes.Count(text[:at[0]], []byte("\n")))
		}
		return lines
	}
	files := token.NewFileSet()
	file, err := parser.ParseFile(files, name, text, 0)
	if err != nil {
		t.Fatal(err)
	}
	ast.Inspect(file, func(n ast.Node) bool {
		c, ok := n.(*ast.CallExpr)
		if !ok || len(c.Args) < 3 {
			return true
		}
		called, _ := c.Fun.(*ast.SelectorExpr)
		writes := called != nil && (called.Sel.Name == "WriteFile" || called.Sel.Name == "OpenFile")
		text, _ := c.Args[1].(*ast.Ident)
		if writes && (text == nil || text.Name != "nil") && mayBeExecuted(c.Args[2]) {
			lines = append(lines, files.Position(c.Pos()).Line)
		}
		return true
	})
	return lines
}

// mayBeExecuted says whether a number in a mode lets anybody execute the file.
func mayBeExecuted(mode ast.Expr) (may bool) {
	ast.Inspect(mode, func(n ast.Node) bool {
		if literal, ok := n.(*ast.BasicLit); ok {
			bits, err := strconv.ParseUint(literal.Value, 0, 32)
			may = may || err == nil && bits&0o111 != 0
		}
		return true
	})
	return may
}

func TestProgramWritesAreFound(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name, text string
		want       int
	}{
		{"a.go", `os.WriteFile(path, text, 0o755)`, 1},
		{"a.go", `errors.Join(os.WriteFile(path, text, 0644), os.WriteFile(path, text, 0711|os.ModeSetuid))`, 1},
		{"a.go", `os.OpenFile(path, os.O_CREATE, 0o700)`, 1},
		{"a.go", `errors.Join(os.WriteFile(path, text, 0o644), os.MkdirAll(path, 0o755), os.Chmod(path, 0o755))`, 0},
		{"a.go", `os.WriteFile(path, nil, 0o755)`, 0},
		{"a.txtar", "stdout x\nchmod 755 bin/x\nchmod 644 x\n", 1},
	} {
		text := row.text
		if filepath.Ext(row.name) == ".go" {
			text = "package p; var _ = " + text
		}
		if got := programWrites(t, row.name, []byte(text)); len(got) != row.want {
			t.Errorf("%s: on lines %d, want %d", row.text, got, row.want)
		}
	}
}
