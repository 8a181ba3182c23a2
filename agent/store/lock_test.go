package store

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"perceptd/agent/lock"
)

// Two processes on one state folder would overwrite each other's record.
func TestLock(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "state")
	if err := errors.Join(os.Mkdir(dir, 0o700), os.Chmod(dir, 0o755)); err != nil {
		t.Fatal(err)
	}
	held, err := Lock(dir)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("others can open it, and so lock it: %v %v", info.Mode(), err)
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{dir, link} {
		_, err := Lock(path)
		var by lock.HeldError
		if !errors.As(err, &by) || by.Process != os.Getpid() {
			t.Fatalf("the second: %v", err)
		}
		want := "program store.test (process " + strconv.Itoa(os.Getpid()) + ") keeps its state in " + path +
			": stop it, or name other folders with --runtime-dir and --state-dir"
		if err.Error() != want {
			t.Errorf("%q, want %q", err, want)
		}
	}
	open(t, dir) // its own record is the holder's to open
	if err := held.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := Lock(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := again.Close(); err != nil {
		t.Error(err)
	}
}

func TestHoldRefuses(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file, open := filepath.Join(dir, "file"), filepath.Join(dir, "open")
	if err := errors.Join(os.WriteFile(file, nil, 0o600), os.Mkdir(open, 0o700), os.Chmod(open, 0o770)); err != nil {
		t.Fatal(err)
	}
	for path, says := range map[string]string{file: "is not a directory", open: "lets others write there",
		filepath.Join(dir, "no", "where"): "no such file"} {
		if _, err := Lock(path); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v", path, err)
		}
	}
}
