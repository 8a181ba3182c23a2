package store

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Each cause has one mend, which does not name files that perceptd makes and removes by itself.
func TestRemedies(t *testing.T) {
	t.Parallel()
	const path = "/var/lib/percept/" + changesName
	me := runsAs(os.Geteuid())
	of := func(why error) error { return &fs.PathError{Op: "remove", Path: path + beingWritten, Err: why} }
	for _, row := range []struct {
		fault      FaultError
		says, mend string
	}{
		{FaultError{of(unix.EROFS), path, true}, path + " cannot be written: read-only file system",
			`mount -o remount,rw "$(findmnt -nT /var/lib/percept -o TARGET)"`},
		{FaultError{of(unix.ENOSPC), path, true}, path + " cannot be written: no space left on device",
			"make room on its file system: df /var/lib/percept"},
		{FaultError{of(unix.EDQUOT), path, true}, "quota", "make room"},
		{FaultError{of(unix.EACCES), path, true}, "permission denied", "as root: chown " + me +
			" /var/lib/percept && chmod 0700 /var/lib/percept"},
		{FaultError{of(unix.ENOENT), path, true}, "no such file",
			"/var/lib/percept is gone: systemctl restart perceptd makes it again"},
		{FaultError{of(unix.EACCES), path, false}, path + " cannot be read: permission denied", "as root: chown -R " +
			me + " /var/lib/percept && chmod -R u+rwX /var/lib/percept"},
		{FaultError{of(unix.EPERM), path, false}, "not permitted", "chown -R " + me + " /var/lib/percept"},
		{FaultError{of(unix.EIO), path, false}, "input/output error", "the disk fails: journalctl -k"},
		{FaultError{of(unix.EMFILE), path, false}, "too many open files", "no file descriptors are left"},
		{FaultError{of(unix.ENOTDIR), path, false}, "not a directory",
			"move what is in the place of /var/lib/percept away"},
		{FaultError{of(unix.ENOTEMPTY), path, true}, "directory not empty", "move what is in the way away: " + path +
			beingWritten},
		{FaultError{errors.New("odd"), path, false}, path + " cannot be read: odd", "ls -ld /var/lib/percept " + path},
	} {
		got, mend := row.fault.Error(), row.fault.Remedy()
		if !strings.Contains(got, row.says) || strings.Contains(got, beingWritten) ||
			!errors.Is(&row.fault, row.fault.Why) {
			t.Errorf("%q, want %q", got, row.says)
		}
		if !strings.Contains(mend, row.mend) || strings.Contains(mend, "--state-dir") {
			t.Errorf("%q: mend %q, want %q", got, mend, row.mend)
		}
	}
}

// chown takes no colon after a number that is no user's.
func TestRunsAs(t *testing.T) {
	t.Parallel()
	if got := runsAs(0); got != "root:" {
		t.Errorf("%q", got)
	}
	if got := runsAs(1234567); got != "1234567" {
		t.Errorf("%q", got)
	}
}

// A folder that is of no use says why, and the mend is of use as it stands.
func TestRemediesOfFolders(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	open, file := filepath.Join(dir, "open"), filepath.Join(dir, "file")
	if err := errors.Join(os.Mkdir(open, 0o700), os.Chmod(open, 0o770), os.WriteFile(file, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		open:                      "chmod go-w " + open,
		file:                      "move what is in the place of " + file + " away",
		filepath.Join(dir, "not"): "systemctl restart perceptd makes it again",
	} {
		err := Disk(path).Replace(changesName, []byte("x"))
		fault, known := errors.AsType[*FaultError](err)
		if !known || !strings.Contains(fault.Remedy(), want) {
			t.Errorf("%v: want %q", err, want)
		}
	}
	if err := os.Chmod(open, 0o700); err != nil { // as the mend has it
		t.Fatal(err)
	}
	if err := Disk(open).Replace(changesName, []byte("x")); err != nil {
		t.Error(err)
	}
	if _, err := Disk(dir).Read("none", othersMayChange, 1); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}
