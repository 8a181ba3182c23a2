package store

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestLoopbackRootStays(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "state")
	first, err := LoopbackSecret(folderAt(t, dir))
	if err != nil || *first == (Key{}) {
		t.Fatalf("%v", err)
	}
	info, err := os.Stat(filepath.Join(dir, loopbackSecretName))
	if err != nil || info.Mode().Perm() != 0o600 || info.Size() != 32 {
		t.Errorf("%v %v", info, err)
	}
	again, err := LoopbackSecret(folderAt(t, dir))
	if err != nil || *again != *first {
		t.Errorf("it is another, or %v", err)
	}
	other, err := LoopbackSecret(Disk(t.TempDir()))
	if err != nil || *other == *first {
		t.Errorf("two devices have the same, or %v", err)
	}
}

// What cannot be used is moved aside, with a word, and another takes its place.
func TestLoopbackRootThatIsSpoilt(t *testing.T) {
	t.Parallel()
	const good = "0123456789abcdef0123456789abcdef"
	for _, row := range []struct {
		name, text string
		mode       os.FileMode
		why        string
	}{
		{"short", "0123", 0o600, "4 bytes"},
		{"empty", "", 0o600, "0 bytes"},
		{"long", good + "0", 0o600, "larger than 32 bytes"},
		{"zeros", strings.Repeat("\x00", 32), 0o600, "all zeros"},
		{"others may read", good, 0o604, "lets others read"},
		{"a group may read", good, 0o640, "lets others read"},
		{"others may write", good, 0o602, "lets others change"},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			path := filepath.Join(dir, loopbackSecretName)
			if err := os.WriteFile(path, []byte(row.text), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(path, row.mode); err != nil {
				t.Fatal(err)
			}
			made, err := LoopbackSecret(folderAt(t, dir))
			if made == nil || err == nil || !strings.Contains(err.Error(), row.why) ||
				strings.Contains(err.Error(), good) {
				t.Fatalf("%v", err)
			}
			if string(made[:]) == good {
				t.Error("the spoilt one is used")
			}
			if aside, _ := filepath.Glob(path + unreadable + "*"); len(aside) != 1 {
				t.Errorf("moved aside: %v", aside)
			}
			if again, err := LoopbackSecret(folderAt(t, dir)); err != nil || *again != *made {
				t.Errorf("the new one does not stay: %v", err)
			}
		})
	}
}

// stuck is a folder in which nothing can be moved aside.
type stuck struct{ Disk }

func (stuck) Aside(string) (string, error) { return "", os.ErrPermission }

// One that cannot be moved aside stays, as it is told.
func TestLoopbackRootThatStays(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, loopbackSecretName)
	if err := os.WriteFile(path, []byte("0123"), 0o600); err != nil {
		t.Fatal(err)
	}
	if root, err := LoopbackSecret(stuck{Disk(dir)}); root != nil || err == nil ||
		!strings.Contains(err.Error(), "could not be moved aside, and stays") {
		t.Errorf("%v", err)
	}
	if text, err := os.ReadFile(path); string(text) != "0123" {
		t.Errorf("it is written over: %q, %v", text, err)
	}
}

// A link is not followed, wherever it leads.
func TestLoopbackRootIsNoLink(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	elsewhere := filepath.Join(t.TempDir(), "x")
	if err := os.WriteFile(elsewhere, []byte("0123456789abcdef0123456789abcdef"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(elsewhere, filepath.Join(dir, loopbackSecretName)); err != nil {
		t.Fatal(err)
	}
	made, err := LoopbackSecret(folderAt(t, dir))
	if made == nil || err == nil || !strings.Contains(err.Error(), "it is a link") {
		t.Fatalf("%v", err)
	}
	if text, err := os.ReadFile(elsewhere); err != nil || string(text) != "0123456789abcdef0123456789abcdef" {
		t.Errorf("what it led to was touched: %v", err)
	}
}

func TestLoopbackRootWithoutAPlace(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if root, err := LoopbackSecret(Disk(file)); root != nil || err == nil {
		t.Errorf("%v", err)
	}
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, loopbackSecretName), 0o700); err != nil {
		t.Fatal(err)
	}
	if root, err := LoopbackSecret(folderAt(t, dir)); root == nil || err == nil {
		t.Errorf("a folder in its place: %v", err)
	}
}
