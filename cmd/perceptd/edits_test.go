package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"perceptd/cmd/perceptd/config"
	"perceptd/cmd/perceptd/e2e/harness"
)

// edited has what says when files were edited, which were read last as they are at path.
func edited(path string) *edits {
	e := &edits{}
	e.read(config.Read(path), stampOf(path))
	return e
}

// Files are read beside the caller that asks, which does not wait, and one reading runs at a time. What says the same
// is not edited then.
func TestEditsAreReadBeside(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		path := harness.WriteConfig(t, map[string]string{"config.toml": harness.GoodConfig})
		e := edited(path)
		if on := e.since(path, time.Now()); !on.IsZero() {
			t.Errorf("edited on %v", on)
		}
		if err := os.Chtimes(path, time.Time{}, time.Unix(2e9, 0)); err != nil {
			t.Fatal(err)
		}
		if on := e.since(path, time.Now()); on.IsZero() {
			t.Error("what is not read yet does not count as edited")
		}
		synctest.Wait()
		if on := e.since(path, time.Now()); !on.IsZero() {
			t.Errorf("a file that says the same was edited on %v", on)
		}
		full := "[[grant]]\n" + strings.Repeat("#", 1<<20)
		if err := os.WriteFile(path, []byte(full), 0o644); err != nil {
			t.Fatal(err)
		}
		e.looking = true // as while a file system hangs
		if on := e.since(path, time.Now()); !on.IsZero() {
			t.Errorf("edited on %v: two read at once", on)
		}
		e.looking = false
		for range 2 {
			if on := e.since(path, time.Now()); on.IsZero() {
				t.Error("the edit is not seen")
			}
			synctest.Wait()
		}
	})
}

// What a start would find otherwise is an edit, though no file's time says so: it was made when it is noticed.
func TestEditsWithoutTime(t *testing.T) {
	t.Parallel()
	noticed := time.Unix(1, 0)
	for name, edit := range map[string]func(path string) error{
		"removed":            os.Remove,
		"mode of the folder": func(path string) error { return os.Chmod(filepath.Dir(path), 0o777) },
		"moved away":         func(path string) error { return os.Rename(path, path+".old") },
		"folder moved away": func(path string) error {
			folder := filepath.Dir(path)
			return os.Rename(folder, folder+".old")
		},
	} {
		synctest.Test(t, func(t *testing.T) {
			path := harness.WriteConfig(t, map[string]string{"etc/config.toml": harness.GoodConfig})
			path = filepath.Join(filepath.Dir(path), "etc", "config.toml")
			e := edited(path)
			if err := edit(path); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				if on := e.since(path, noticed); !on.Equal(noticed) {
					t.Errorf("%s: edited on %v", name, on)
				}
				synctest.Wait()
			}
		})
	}
	synctest.Test(t, func(t *testing.T) {
		path := harness.WriteConfig(t, map[string]string{"config.toml": harness.GoodConfig})
		e := edited(path)
		if err := os.Chmod(path, 0o666); err != nil { // which a start refuses
			t.Fatal(err)
		}
		for range 2 {
			if e.since(path, noticed).IsZero() {
				t.Error("a file that others may write to by now was not edited")
			}
			synctest.Wait()
		}
	})
}
