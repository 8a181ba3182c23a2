package main

import (
	"bytes"
	"go/scanner"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"
)

// widest is how many columns a line of Go may have, with four for a tab.
const widest = 120

// stillWide are the beginnings of files with lines from before this was checked, which wait for other work on them.
var stillWide = []string{
	"agent/audit.go", "agent/deny/list.go", "agent/deny/list_test.go", "agent/denykeep.go",
	"tokencache/policychange.go", "cmd/perceptctl/errors.go", "cmd/perceptctl/watch.go", "cmd/perceptd/deps_test.go",
	"systemd/system_callers_test.go", "systemd/system_starts_test.go", "systemd/units_test.go",
	"docs/modules/go/main.go",
}

// TestLinesFit shows that no line of Go is so long that a reader has to scroll. A raw string of several lines is what
// something else is to read, and stays as it is.
func TestLinesFit(t *testing.T) {
	t.Parallel()
	const root = "../.."
	read := 0
	err := filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case entry.IsDir() && (entry.Name() == "bin" || entry.Name() == ".git"):
			return fs.SkipDir
		case entry.IsDir() || filepath.Ext(path) != ".go":
			return nil
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		read++
		name, _ := filepath.Rel(root, path)
		if slices.ContainsFunc(stillWide, func(of string) bool { return strings.HasPrefix(name, of) }) {
			return nil
		}
		for _, line := range tooLong(text) {
			t.Errorf("%s:%d: over %d columns", name, line, widest)
		}
		return nil
	})
	if err != nil || read == 0 {
		t.Fatal(read, err)
	}
}

// tooLong returns the numbers of the lines that do not fit.
func tooLong(text []byte) (numbers []int) {
	var raw map[int]bool
	for i, line := range bytes.Split(text, []byte("\n")) {
		if utf8.RuneCount(line)+3*bytes.Count(line, []byte("\t")) <= widest {
			continue
		}
		if raw == nil {
			raw = rawLines(text)
		}
		if !raw[i+1] {
			numbers = append(numbers, i+1)
		}
	}
	return numbers
}

// rawLines returns the numbers of the lines on which raw strings of several lines are.
func rawLines(text []byte) map[int]bool {
	files := token.NewFileSet()
	file := files.AddFile("", files.Base(), len(text))
	var s scanner.Scanner
	s.Init(file, text, nil, 0)
	raw := make(map[int]bool)
	for {
		at, kind, literal := s.Scan()
		switch {
		case kind == token.EOF:
			return raw
		case kind == token.STRING && literal[0] == '`' && strings.Contains(literal, "\n"):
			first := file.Line(at)
			for i := range strings.Count(literal, "\n") + 1 {
				raw[first+i] = true
			}
		}
	}
}

func TestTooLong(t *testing.T) {
	t.Parallel()
	fits, long := strings.Repeat("x", widest-3), strings.Repeat("ä", widest-2)
	for text, want := range map[string]int{
		"// " + fits: 0, "// " + long: 1, "\t// " + strings.Repeat("x", widest-7): 0,
		"\t// " + strings.Repeat("x", widest-6): 1, "var x = `\n" + long + "xx`": 0, "var x = `" + long + "`": 1,
		"// `\n// " + long + "\n// `": 1,
	} {
		if got := tooLong([]byte("package p\n\n" + text + "\n")); len(got) != want {
			t.Errorf("%d lines of %q are too long, want %d", len(got), text, want)
		}
	}
}
