// Package store keeps what perceptd knows over a restart and a reboot.
//
// The policy changes are in two files of the state folder (PolicyChanges), and so is the loopback listener's secret.
// The cache is in a sealed file (Tokens) and in memory that systemd holds by a descriptor (Handoff). Each file is
// replaced whole or not at all, whatever happens in between; no token's text is in one in the clear. What is spoilt is
// moved aside; what cannot be read now stays. Recover reads it all at a start. Its callers give Save the whole each
// time and call it once at a time.
package store

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

	"perceptd/agent/lock"
)

const (
	beingWritten = ".new"         // after a file's name: what is to take its place
	unreadable   = ".unreadable-" // after a file's name, and the time at which it was moved aside

	maxAside = 4 // files moved aside that are left there
)

// What a file's mode may not allow.
const (
	othersMayChange = 0o022
	othersMayRead   = 0o004
)

// Folder is where files are kept, each by its name: a directory of the device (Disk), or one in a simulation. In one
// that can be read and not written to, changes fail.
type Folder interface {
	// Read returns a plain file of at most so many bytes. Where another user owns it, or its mode has one of the
	// refused bits, it returns a *LooseError beside what is in it. Otherwise the error is fs.ErrNotExist where there is
	// no file, and a *SpoiltError where something else is in its place. Any other error says that it cannot be read
	// now, so that nobody knows what is there. Those of Disk are a *FaultError.
	Read(name string, refused fs.FileMode, most int) ([]byte, error)
	// Replace writes a file in the place of what was there. When it returns nil, the file outlives a power cut. When it
	// returns an error, what was there before does, or, where nothing else failed, one of both.
	Replace(name string, text []byte) error
	// Aside renames a file that is of no use, so that nothing is lost, and returns its new place.
	Aside(name string) (to string, err error)
	// Remove removes a file, if there is one.
	Remove(name string) error
}

// SpoiltError says that what is in a file's place was read whole, and is not what perceptd writes.
type SpoiltError struct {
	Name  string
	Why   error
	Aside string // where it was moved to; empty: it is where it was
	Stays error  // why it could not be moved aside; nil: it was, or nobody tried
}

func (e *SpoiltError) Error() string {
	switch {
	case e.Aside != "":
		return fmt.Sprintf("%s: %v; it is now %s", e.Name, e.Why, e.Aside)
	case e.Stays != nil:
		return fmt.Sprintf("%s: %v; it could not be moved aside, and stays: %v", e.Name, e.Why, e.Stays)
	}
	return fmt.Sprintf("%s: %v", e.Name, e.Why)
}

// Spoilt marks the error: other errors are about files that cannot be read now.
func (e *SpoiltError) Spoilt() bool { return true }

func (e *SpoiltError) Unwrap() error { return e.Why }

// LooseError says that other users could have changed a file, or read it. What is in it is whole.
type LooseError struct {
	Name string
	Why  error
}

func (e *LooseError) Error() string { return fmt.Sprintf("%s: %v", e.Name, e.Why) }

func (e *LooseError) Unwrap() error { return e.Why }

func isLoose(err error) bool {
	_, loose := errors.AsType[*LooseError](err)
	return loose
}

// moveAside moves aside a file that was found spoilt.
func moveAside(folder Folder, name string, why error) *SpoiltError {
	if spoilt, known := errors.AsType[*SpoiltError](why); known {
		name, why = spoilt.Name, spoilt.Why
	}
	e := &SpoiltError{Name: name, Why: why}
	e.Aside, e.Stays = folder.Aside(filepath.Base(name))
	return e
}

// Disk is a directory of the device, by its path. Only root and this process's user may write to it: where others may,
// it is read all the same, and not changed. Lock makes it. If it is gone later it is not made again, since it may come
// back.
type Disk string

var _ Folder = Disk("")

// folderID is which folder of the device one is; zero: that is not known, or it is none of the device.
type folderID struct{ device, inode uint64 }

// idOf returns which folder there is now.
func idOf(folder Folder) folderID {
	var st unix.Stat_t
	d, isDisk := folder.(Disk)
	if !isDisk || unix.Stat(string(d), &st) != nil {
		return folderID{}
	}
	return folderID{st.Dev, st.Ino}
}

func (d Disk) path(name string) string { return filepath.Join(string(d), name) }

// Read implements Folder. It neither follows a link nor waits for a pipe or a device in the file's place.
func (d Disk) Read(name string, refused fs.FileMode, most int) ([]byte, error) {
	text, err := read(d.path(name), refused, most)
	_, spoilt := errors.AsType[*SpoiltError](err)
	if err == nil || spoilt || isLoose(err) || errors.Is(err, fs.ErrNotExist) {
		return text, err
	}
	return nil, &FaultError{Why: err, path: d.path(name)}
}

// Replace implements Folder.
func (d Disk) Replace(name string, text []byte) error {
	if err := d.replace(name, text); err != nil {
		return &FaultError{Why: err, path: d.path(name), writes: true}
	}
	return nil
}

func (d Disk) replace(name string, text []byte) error {
	if err := shut(string(d)); err != nil {
		return err
	}
	temporary := d.path(name) + beingWritten
	if err := remove(temporary); err != nil { // which a crash has left
		return err
	}
	if err := writeNew(temporary, text); err != nil {
		_ = os.Remove(temporary) // a full disk has room again
		return err
	}
	if err := os.Rename(temporary, d.path(name)); err != nil {
		_ = os.Remove(temporary)
		return err
	}
	return syncDir(string(d))
}

// Aside implements Folder. Of the files that were moved aside, the latest stay. Each is named by the time at which it
// was moved, or, where the clock is behind the name of the one before, by a moment just after that. So their names are
// in the order in which they were moved, whatever the clock says, and differ.
func (d Disk) Aside(name string) (string, error) {
	if err := shut(string(d)); err != nil {
		return "", err
	}
	before, err := d.movedAside(name)
	if err != nil {
		return "", err
	}
	now := time.Now().UTC()
	if n := len(before); n > 0 && !now.After(before[n-1]) {
		now = before[n-1].Add(time.Nanosecond)
	}
	path := d.path(name)
	to := asideName(path, now)
	if err := os.Rename(path, to); err != nil {
		return "", err
	}
	for _, at := range before[:max(0, len(before)+1-maxAside)] {
		_ = os.Remove(asideName(path, at)) // what stays only takes room
	}
	return to, nil
}

// asideTime is the form of that time in a name.
const asideTime = "20060102T150405.000000000Z"

func asideName(name string, at time.Time) string { return name + unreadable + at.Format(asideTime) }

// movedAside returns when the files of that name that are aside were moved, the earliest first. Files that others have
// named like them do not count.
func (d Disk) movedAside(name string) (all []time.Time, err error) {
	entries, err := os.ReadDir(string(d))
	if err != nil {
		return nil, err
	}
	for _, entry := range entries {
		told, ours := strings.CutPrefix(entry.Name(), name+unreadable)
		if at, err := time.Parse(asideTime, told); ours && err == nil {
			all = append(all, at)
		}
	}
	slices.SortFunc(all, time.Time.Compare)
	return all, nil
}

// Remove implements Folder.
func (d Disk) Remove(name string) error {
	if err := remove(d.path(name)); err != nil {
		return err
	}
	return syncDir(string(d))
}

// Lock locks dir, which is made if need be, for this process until what is returned is closed. Two processes would
// overwrite each other's files. The error names the process that holds dir already (lock.HeldError), or says why
// nothing can be kept in dir. Its files can be read all the same.
func Lock(dir string) (*lock.Folder, error) {
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	if err := shut(dir); err != nil && !errors.Is(err, unix.EROFS) { // one that is only read is held as well
		return nil, err
	}
	folder, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	held, err := lock.Take(folder)
	var by lock.HeldError
	if errors.As(err, &by) {
		by.Does = "keeps its state in " + dir
		return nil, by
	}
	return held, err
}

func ours(info fs.FileInfo) bool {
	st, ok := info.Sys().(*syscall.Stat_t)
	return ok && (st.Uid == 0 || int(st.Uid) == os.Geteuid())
}

// shut refuses a folder in which nothing can be kept, and closes it to everybody but root and this process's user.
func shut(dir string) error {
	info, err := os.Stat(dir)
	switch {
	case err != nil:
		return err
	case !info.IsDir():
		return &openError{dir + " is not a directory", moveAway(dir)}
	case !ours(info):
		return &openError{
			"the owner of " + dir + " is neither root nor the user that perceptd runs as",
			fmt.Sprintf("as root: chown %s %s", runsAs(os.Geteuid()), dir),
		}
	case info.Mode().Perm()&othersMayChange != 0:
		return &openError{
			fmt.Sprintf("mode %04o of %s lets others write there", info.Mode().Perm(), dir), "chmod go-w " + dir,
		}
	case info.Mode().Perm()&onlyForOurs != 0: // who can open it can lock it
		return os.Chmod(dir, 0o700)
	}
	return nil
}

// remove removes a file, if there is one.
func remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// read reads a plain file: see Folder.
func read(path string, refused fs.FileMode, most int) ([]byte, error) {
	spoilt := func(format string, args ...any) ([]byte, error) {
		return nil, &SpoiltError{Name: path, Why: fmt.Errorf(format, args...)}
	}
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	switch {
	case errors.Is(err, unix.ELOOP):
		return spoilt("it is a link")
	case errors.Is(err, unix.ENXIO): // a socket, or a device without its driver
		return spoilt("it is not a regular file")
	case err != nil:
		return nil, err
	}
	defer func() { _ = f.Close() }()
	info, err := f.Stat()
	switch {
	case err != nil:
		return nil, err
	case !info.Mode().IsRegular():
		return spoilt("it is not a regular file")
	case info.Size() > int64(most):
		return spoilt("it is larger than %d bytes", most)
	}
	text, err := io.ReadAll(io.LimitReader(f, int64(most)+1))
	switch {
	case err != nil:
		return nil, err
	case len(text) > most: // it has grown
		return spoilt("it is larger than %d bytes", most)
	}
	if why := loose(info, refused); why != nil {
		return text, &LooseError{Name: path, Why: why}
	}
	return text, nil
}

// loose returns what others than root and this process's user could do to a file; nil: nothing.
func loose(info fs.FileInfo, refused fs.FileMode) error {
	switch mode := info.Mode().Perm(); {
	case !ours(info):
		return errors.New("its owner is neither root nor the user that perceptd runs as")
	case mode&refused&othersMayChange != 0:
		return fmt.Errorf("its mode %04o lets others change it", mode)
	case mode&refused != 0:
		return fmt.Errorf("its mode %04o lets others read it", mode)
	}
	return nil
}

// writeNew writes a new file, and returns when it is on the disk.
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

// BootID returns the kernel's name for this boot; empty: not known.
func BootID() string {
	text, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(text))
}
