package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// What an editor does to the file while a person looks at the question stays: nothing is written over it.
func TestGrantsFileIsNotWrittenOver(t *testing.T) {
	t.Parallel()
	const before, edited = "# before\n", "# edited\n"
	for _, row := range []struct {
		name        string
		before, now string // empty: there is no file
	}{
		{"edited", before, edited}, {"made", "", edited}, {"removed", before, ""},
	} {
		f := grantsFile{path: filepath.Join(t.TempDir(), "config.d", "50-grants.toml")}
		if err := os.Mkdir(filepath.Dir(f.path), 0o755); err != nil {
			t.Fatal(err)
		}
		edit(t, f.path, row.before)
		if err := f.open(); err != nil {
			t.Fatal(err)
		}
		edit(t, f.path, row.now)
		err := f.write("[[grant]]\n")
		f.close()
		if now, _ := os.ReadFile(f.path); err == nil || string(now) != row.now ||
			!strings.HasSuffix(err.Error(), "50-grants.toml was changed meanwhile: nothing was written") {
			t.Errorf("%s: %v, and the file is %q", row.name, err, now)
		}
	}
}

// A configuration that perceptd refuses is undone, unless an editor has written the file since.
func TestUndoLeavesAnEditedFile(t *testing.T) {
	t.Parallel()
	for _, before := range []string{"", "# before\n"} {
		for _, edited := range []string{"", "# edited\n"} {
			f := grantsFile{path: filepath.Join(t.TempDir(), "config.d", "50-grants.toml")}
			if err := os.Mkdir(filepath.Dir(f.path), 0o755); err != nil {
				t.Fatal(err)
			}
			edit(t, f.path, before)
			if err := f.open(); err != nil {
				t.Fatal(err)
			}
			if err := f.write("[[grant]]\n"); err != nil {
				t.Fatal(err)
			}
			want := before
			if edited != "" {
				edit(t, f.path, edited)
				want = edited
			}
			err := f.undo()
			f.close()
			if now, _ := os.ReadFile(f.path); string(now) != want || (err != nil) != (edited != "") {
				t.Errorf("before %q, edited %q: %v, and the file is %q", before, edited, err, now)
			}
		}
	}
}

// edit makes a file's content text, as an editor does: in a file of its own. Empty: the file goes.
func edit(t *testing.T, path, text string) {
	t.Helper()
	err := os.RemoveAll(path)
	if err == nil && text != "" {
		err = os.WriteFile(path, []byte(text), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}
