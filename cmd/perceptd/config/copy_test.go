package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// kept is a device's folder for root's copy, where this test's user stands in for root.
func kept(t *testing.T, machine string) Kept {
	t.Helper()
	k := Kept{Folder: t.TempDir(), machine: filepath.Join(t.TempDir(), "machine-id"), owner: os.Geteuid()}
	if err := os.WriteFile(k.machine, []byte(strings.Repeat(machine, 32)+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	return k
}

// onDisk is a configuration of two files on the disk.
func onDisk(t *testing.T) (path, extra string, r Reading) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "config.toml")
	extra = filepath.Join(filepath.Dir(path), "config.d", "a.toml")
	for name, text := range map[string]string{path: "[[identity]]\nname = \"device\"\n", extra: "# nothing\n"} {
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if r = Read(path); len(r.Faults) > 0 || len(r.Files) != 2 {
		t.Fatalf("%+v", r)
	}
	return path, extra, r
}

func TestCopyGoesOn(t *testing.T) {
	t.Parallel()
	k := kept(t, "a")
	path, extra, r := onDisk(t)
	sum := Sum(r.Files)
	if _, _, err := k.Last(path, sum, nil); err == nil || !strings.Contains(err.Error(), "there is no copy") {
		t.Errorf("of nothing: %v", err)
	}
	for _, want := range []bool{true, false} {
		if written, err := k.Keep(r, sum); err != nil || written != want {
			t.Errorf("%v %v", written, err)
		}
	}
	if err := os.WriteFile(path, []byte("[[grant"), 0o644); err != nil {
		t.Fatal(err)
	}
	last, gone, err := k.Last(path, sum, nil)
	if err != nil || len(gone) > 0 || Sum(last.Files) != sum || len(last.Config().Rules.Identities) != 1 {
		t.Errorf("%+v %q %v", last, gone, err)
	}
	if _, err := k.Keep(Read(path), sum); err == nil {
		t.Error("files with a fault are kept")
	}
	// A file that was taken away does not go on, and does not come back as it was.
	if err := os.Remove(extra); err != nil {
		t.Fatal(err)
	}
	last, gone, err = k.Last(path, sum, nil)
	if err != nil || len(gone) != 1 || gone[0] != extra || len(last.Files) != 1 {
		t.Errorf("%+v %q %v", last, gone, err)
	}
	if err := os.WriteFile(extra, []byte("# another\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if last, again, err := k.Last(path, sum, gone); err != nil || len(again) != 1 || len(last.Files) != 1 {
		t.Errorf("%+v %q %v", last, again, err)
	}
}

// Only what was in force last is kept, and only a copy of it goes on, on the device and for the path that it is of.
func TestCopyIsRefused(t *testing.T) {
	t.Parallel()
	path, _, r := onDisk(t)
	sum := Sum(r.Files)
	other := strings.Repeat("0", 64)
	if _, err := kept(t, "a").Keep(r, other); err == nil {
		t.Error("files that are not in force were kept")
	}
	for says, spoil := range map[string]func(k *Kept, path, sum *string){
		"of another device":                      func(k *Kept, _, _ *string) { k.machine = kept(t, "b").machine },
		"the copy of the last one is of " + path: func(_ *Kept, path, _ *string) { *path += "x" },
		"not of the one last in force":           func(_ *Kept, _, sum *string) { *sum = other },
		"the last one is spoilt": func(k *Kept, _, _ *string) {
			_ = os.WriteFile(filepath.Join(k.Folder, copyName), []byte("{"), 0o640)
		},
		"lets others change which configuration goes on": func(k *Kept, _, _ *string) {
			_ = os.Chmod(filepath.Join(k.Folder, copyName), 0o666)
		},
		"a group may write there": func(k *Kept, _, _ *string) { _ = os.Chmod(k.Folder, 0o770) },
		"has no ID of this device": func(k *Kept, _, _ *string) {
			_ = os.WriteFile(k.machine, []byte("uninitialized\n"), 0o644)
		},
	} {
		k, at, of := kept(t, "a"), path, sum
		if _, err := k.Keep(r, sum); err != nil {
			t.Fatal(err)
		}
		spoil(&k, &at, &of)
		last, _, err := k.Last(at, of, nil)
		if err == nil || !strings.Contains(err.Error(), says) || len(last.Files) > 0 {
			t.Errorf("%q is not said: %v %+v", says, err, last)
		}
	}
	if os.Getuid() != 0 {
		return // only root can give a file away
	}
	k := kept(t, "a")
	if _, err := k.Keep(r, sum); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(filepath.Join(k.Folder, copyName), 4711, -1); err != nil {
		t.Fatal(err)
	}
	if _, _, err := k.Last(path, sum, nil); err == nil || !strings.Contains(err.Error(), "its owner, user 4711") {
		t.Errorf("a copy that the daemon wrote: %v", err)
	}
}

// A copy whose text was changed is none, whatever it says of itself.
func TestCopyIsWhole(t *testing.T) {
	t.Parallel()
	k := kept(t, "a")
	path, _, r := onDisk(t)
	sum := Sum(r.Files)
	if _, err := k.Keep(r, sum); err != nil {
		t.Fatal(err)
	}
	at := filepath.Join(k.Folder, copyName)
	text, err := os.ReadFile(at)
	if err != nil {
		t.Fatal(err)
	}
	r.Files[0].Text = []byte("[[identity]]\nname = \"others\"\n")
	if _, err := k.Keep(r, Sum(r.Files)); err != nil {
		t.Fatal(err)
	}
	changed, err := os.ReadFile(at)
	if err != nil {
		t.Fatal(err)
	}
	forged := strings.Replace(string(changed), Sum(r.Files), sum, 1)
	if forged == string(text) {
		t.Fatal("nothing was changed")
	}
	if err := os.WriteFile(at, []byte(forged), 0o640); err != nil {
		t.Fatal(err)
	}
	if _, _, err := k.Last(path, sum, nil); err == nil {
		t.Error("a changed copy goes on")
	}
}

// A configuration that says nothing is kept in the place of none: neither that of no files nor that of comments alone.
func TestCopyStays(t *testing.T) {
	t.Parallel()
	k := kept(t, "a")
	path, extra, r := onDisk(t)
	sum := Sum(r.Files)
	if _, err := k.Keep(r, sum); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	for _, files := range []int{1, 0} {
		r := Read(path)
		if written, err := k.Keep(r, Sum(r.Files)); written || err != nil || len(r.Files) != files || !r.Missing {
			t.Errorf("%+v: %v %v", r, written, err)
		}
		if last, _, err := k.Last(path, sum, nil); err != nil {
			t.Errorf("the copy is not that of before: %+v %v", last, err)
		}
		_ = os.Remove(extra)
	}
	_, _, err := k.Last(path, Sum(nil), nil)
	if err == nil || !strings.Contains(err.Error(), "none was in force last") {
		t.Errorf("after none: %v", err)
	}
}

// A link on the way to the files that leads nowhere, as before a partition is mounted, is a fault, and takes no file of
// the last configuration away.
func TestLinkedFolderIsNotMounted(t *testing.T) {
	t.Parallel()
	k := kept(t, "a")
	at, _, _ := onDisk(t)
	folder := filepath.Join(t.TempDir(), "percept")
	if err := os.Symlink(filepath.Dir(at), folder); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(folder, "config.toml")
	r := Read(path)
	sum := Sum(r.Files)
	if _, err := k.Keep(r, sum); err != nil || len(r.Files) != 2 {
		t.Fatal(r, err)
	}
	if err := os.Rename(filepath.Dir(at), filepath.Dir(at)+".away"); err != nil {
		t.Fatal(err)
	}
	away := Read(path)
	if away.Missing || len(away.Faults) != 1 ||
		!strings.Contains(away.Faults[0].Error(), folder+": a link to nothing") {
		t.Errorf("%+v", away)
	}
	if _, err := k.Keep(away, Sum(away.Files)); err == nil {
		t.Error("the copy was replaced")
	}
	if last, gone, err := k.Last(path, sum, nil); err != nil || len(gone) > 0 || len(last.Files) != 2 {
		t.Errorf("%+v %q %v", last, gone, err)
	}
}

func FuzzCopy(f *testing.F) {
	f.Add([]byte(`{"machine":"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa","path":"/c","sha256":"00",` +
		`"files":[{"Path":"/c","Text":""}]}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		k := kept(t, "a")
		if err := os.WriteFile(filepath.Join(k.Folder, copyName), text, 0o640); err != nil {
			t.Fatal(err)
		}
		if last, _, err := k.Last("/c", "00", nil); err == nil {
			t.Errorf("%+v has no such sum", last)
		}
	})
}
