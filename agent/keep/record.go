// Package keep has what perceptd knows outlive a restart and a reboot, in files of the state directory.
//
// It keeps the policy changes on record. Each file is replaced whole or not at all, whatever happens in
// between; no token text is in it. What cannot be read is never written over: it is moved aside, and the
// error says where to. The caller gives Save the whole record each time and calls it once at a time.
package keep

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"perceptd/tokencache"
)

const (
	fileName = "policy-changes.json"
	newName  = fileName + ".new"         // what is being written
	aside    = fileName + ".unreadable-" // and the time at which it was moved

	maxFile  = 1 << 20 // bytes
	maxAside = 4       // files moved aside that are left there
)

// Record is the policy changes on the disk.
type Record struct {
	dir  string
	boot func() time.Duration
	id   string // of this boot; empty: not known
}

// Open returns the record in dir, which is made if need be, and which nobody but root and this process's
// user may write to. boot tells the time since the device booted, as tokencache.Clock does.
func Open(dir string, boot func() time.Duration) (*Record, error) {
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	info, err := os.Stat(dir)
	switch {
	case err != nil:
		return nil, err
	case !info.IsDir():
		return nil, fmt.Errorf("%s is not a directory", dir)
	case !ours(info):
		return nil, fmt.Errorf("the owner of %s is neither root nor the user that perceptd runs as", dir)
	case info.Mode().Perm()&0o022 != 0:
		return nil, fmt.Errorf("mode %04o of %s lets others write there: chmod go-w %s", info.Mode().Perm(), dir, dir)
	}
	if err := unix.Faccessat(unix.AT_FDCWD, dir, unix.W_OK|unix.X_OK, unix.AT_EACCESS); err != nil {
		return nil, &fs.PathError{Op: "write to", Path: dir, Err: err}
	}
	if err := os.Remove(filepath.Join(dir, newName)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	return &Record{dir: dir, boot: boot, id: bootID()}, nil
}

// bootID returns the kernel's name for this boot. Without one, no change keeps its anchor.
func bootID() string {
	text, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(text))
}

func ours(info fs.FileInfo) bool {
	st, ok := info.Sys().(*syscall.Stat_t)
	return ok && (st.Uid == 0 || int(st.Uid) == os.Geteuid())
}

// Load returns the policy changes on record; none when there is no file. A file that cannot be read is
// moved aside, and the error says what is wrong with it and where it is now.
func (r *Record) Load() ([]tokencache.PolicyChange, error) {
	path := filepath.Join(r.dir, fileName)
	text, err := read(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var changes []tokencache.PolicyChange
	if err == nil {
		changes, err = r.decode(text)
	}
	if err != nil {
		return nil, r.moveAside(path, err)
	}
	return changes, nil
}

// read reads a plain file of ours, whatever stands in its place: a link, a pipe or a device is neither
// followed nor waited for.
func read(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	switch {
	case errors.Is(err, unix.ELOOP):
		return nil, errors.New("it is a link")
	case err != nil:
		return nil, err
	}
	defer func() { _ = f.Close() }()
	info, err := f.Stat()
	switch {
	case err != nil:
		return nil, err
	case !info.Mode().IsRegular():
		return nil, errors.New("it is not a regular file")
	case !ours(info):
		return nil, errors.New("its owner is neither root nor the user that perceptd runs as")
	case info.Mode().Perm()&0o022 != 0:
		return nil, fmt.Errorf("its mode %04o lets others change it", info.Mode().Perm())
	}
	text, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	switch {
	case err != nil:
		return nil, err
	case len(text) > maxFile:
		return nil, fmt.Errorf("it is larger than %d bytes", maxFile)
	}
	return text, nil
}

// moveAside renames a file that cannot be read, so that nothing is lost, and returns what to tell people.
func (r *Record) moveAside(path string, why error) error {
	to := filepath.Join(r.dir, aside+time.Now().UTC().Format("20060102T150405.000000000Z"))
	if err := os.Rename(path, to); err != nil {
		return fmt.Errorf("%s: %w; it could not be moved aside: %w", path, why, err)
	}
	older, err := filepath.Glob(filepath.Join(r.dir, aside+"*"))
	if err == nil && len(older) > maxAside {
		slices.Sort(older)
		for _, name := range older[:len(older)-maxAside] {
			_ = os.Remove(name) // what stays only takes room
		}
	}
	return fmt.Errorf("%s: %w; it is now %s", path, why, to)
}

// Save puts changes on the disk in the place of what was there. When it returns nil they outlive a power
// cut; with an error, what was there before does.
func (r *Record) Save(changes []tokencache.PolicyChange) error {
	text, err := r.encode(changes)
	if err != nil {
		return err
	}
	temporary := filepath.Join(r.dir, newName)
	if err := os.Remove(temporary); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := writeNew(temporary, text); err != nil {
		_ = os.Remove(temporary) // a full disk has room again
		return err
	}
	if err := os.Rename(temporary, filepath.Join(r.dir, fileName)); err != nil {
		_ = os.Remove(temporary)
		return err
	}
	return syncDir(r.dir)
}

// writeNew writes a file that is not there yet, to the disk itself.
func writeNew(path string, text []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

func syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
