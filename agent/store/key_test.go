package store

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The first key that is anywhere is the key, and one that is no key hides those after it.
func TestFirstKey(t *testing.T) {
	t.Parallel()
	folder := t.TempDir()
	write := func(name string, size int) string {
		path := filepath.Join(folder, name)
		if err := os.WriteFile(path, []byte(strings.Repeat("k", size)), 0o400); err != nil {
			t.Fatal(err)
		}
		return path
	}
	none, key, odd := filepath.Join(folder, "none"), write("key", 32), write("odd", 7)
	for _, row := range []struct {
		places []string
		found  bool
		absent bool
	}{
		{[]string{none, key}, true, false},
		{[]string{none, none, key, odd}, true, false},
		{[]string{none, odd, key}, false, false},
		{[]string{none, none}, false, true},
	} {
		got, place, err := firstKey(row.places)
		if (got != nil) != row.found || row.found && place != key || errors.Is(err, fs.ErrNotExist) != row.absent ||
			(err == nil) != row.found {
			t.Errorf("%q: found %t in %q, %v", row.places, got != nil, place, err)
		}
	}
}

func TestKeyThatIsNotOpened(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "cache-key")
	if err := unopenedKey(path, filepath.Join(t.TempDir(), "waiting")); err != nil {
		t.Error(err)
	}
	if err := os.WriteFile(path+".cred", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := unopenedKey(path, filepath.Join(t.TempDir(), "waiting")); err == nil || !strings.HasSuffix(err.Error(),
		"cache-key.cred, was not opened: systemctl status perceptd-cache-key tells why") {
		t.Error(err)
	}
}

// A key's own folder is looked at, and those of systemd are not. Without a key anywhere none was made.
func TestFindKey(t *testing.T) {
	t.Parallel()
	folder := t.TempDir()
	path := filepath.Join(folder, "cache-key")
	if key, err := FindKey(path, folder, nil); key != nil || err != nil {
		t.Errorf("%v, %v", key, err)
	}
	if err := os.WriteFile(path, []byte(strings.Repeat("k", 32)), 0o400); err != nil {
		t.Fatal(err)
	}
	open := errors.New("anybody can write there")
	for _, why := range []error{nil, open} {
		var asked string
		key, err := FindKey(path, "", func(folder string) error { asked = folder; return why })
		if !errors.Is(err, why) || (key != nil) != (why == nil) || asked != folder {
			t.Errorf("%v: %t, %v of %q", why, key != nil, err, asked)
		}
	}
	if err := os.WriteFile(filepath.Join(folder, keyCredential), []byte(strings.Repeat("c", 32)), 0o400); err != nil {
		t.Fatal(err)
	}
	if key, err := FindKey(path, folder, nil); err != nil || key[0] != 'c' {
		t.Errorf("the credential is not taken first: %v", err)
	}
}
