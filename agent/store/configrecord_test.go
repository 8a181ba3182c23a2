package store

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"
)

func TestConfigRecord(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	folder := Disk(dir)
	if r, err := LoadConfigRecord(folder); r != nil || !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("of nothing: %+v %v", r, err)
	}
	want := ConfigRecord{SHA256: "ab", Files: []string{"/a", "/b"}, Since: time.Unix(1, 0).UTC(), Gone: []string{"/b"}}
	for range 2 {
		if err := want.Save(folder); err != nil {
			t.Fatal(err)
		}
		if got, err := LoadConfigRecord(folder); err != nil || !reflect.DeepEqual(*got, want) {
			t.Errorf("%+v %v", got, err)
		}
	}
	path := filepath.Join(dir, configRecordName)
	if err := os.Chmod(path, 0o666); err != nil {
		t.Fatal(err)
	}
	if got, err := LoadConfigRecord(folder); got == nil || !isLoose(err) {
		t.Errorf("one that others can change: %+v %v", got, err)
	}
	for _, spoilt := range []string{"", "{}", "nonsense", `{"sha256": 1}`} {
		if err := os.WriteFile(path, []byte(spoilt), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := LoadConfigRecord(folder); got != nil || err == nil {
			t.Errorf("%q: %+v", spoilt, got)
		}
	}
}

// Where a record cannot be written, the one from before is not left: with it a former configuration would go on.
func TestConfigRecordNotWritten(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := (ConfigRecord{SHA256: "before"}).Save(Disk(dir)); err != nil {
		t.Fatal(err)
	}
	full := fullDisk{Disk(dir)}
	if err := (ConfigRecord{SHA256: "after"}).Save(full); err == nil {
		t.Error("it was written")
	}
	if r, err := LoadConfigRecord(full); r != nil || !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%+v %v", r, err)
	}
}

// fullDisk is a folder that nothing can be written into.
type fullDisk struct{ Disk }

func (fullDisk) Replace(string, []byte) error { return errors.New("no space left on device") }

func FuzzConfigRecord(f *testing.F) {
	f.Add([]byte(`{"sha256":"ab","files":["/a"],"since":"2026-01-01T00:00:00Z","gone":["/b"]}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, configRecordName), text, 0o600); err != nil {
			t.Fatal(err)
		}
		if r, err := LoadConfigRecord(Disk(dir)); (r == nil) == (err == nil) {
			t.Errorf("%+v %v", r, err)
		}
	})
}
