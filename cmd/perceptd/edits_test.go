package main

import (
	"os"
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
		if on := e.since(path); !on.IsZero() {
			t.Errorf("edited on %v", on)
		}
		if err := os.Chtimes(path, time.Time{}, time.Unix(2e9, 0)); err != nil {
			t.Fatal(err)
		}
		if on := e.since(path); on.IsZero() {
			t.Error("what is not read yet does not count as edited")
		}
		synctest.Wait()
		if on := e.since(path); !on.IsZero() {
			t.Errorf("a file that says the same was edited on %v", on)
		}
		full := "[[grant]]\n" + strings.Repeat("#", 1<<20)
		if err := os.WriteFile(path, []byte(full), 0o644); err != nil {
			t.Fatal(err)
		}
		e.looking = true // as while a file system hangs
		if on := e.since(path); !on.IsZero() {
			t.Errorf("edited on %v: two read at once", on)
		}
		e.looking = false
		for range 2 {
			if on := e.since(path); on.IsZero() {
				t.Error("the edit is not seen")
			}
			synctest.Wait()
		}
	})
}
