// Package socket makes the daemon's Unix sockets where systemd did not: the modules' always, all of
// them when the daemon is started by hand.
//
// It guarantees that no socket is taken from a process that still serves it, that a client finds at the
// path either the old socket or the new one with its final mode and group, and that nothing but a socket
// is ever replaced and nothing but what was made here is ever removed. No link is followed below the
// locked folder or in its last step, no socket is abstract, and neither the process's umask nor the
// length of the path matters.
//
// The caller locks the runtime folder once, listens through the lock, and keeps the lock for as long
// as it serves: it is what tells two daemons apart while neither has a socket yet.
package socket

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"perceptd/agent/lock"
)

// olderLock is the lock file of versions that did not lock a folder yet. It is not made any more.
const olderLock = "perceptd.lock"

// Dir is a runtime folder that this process alone serves in, until Close or its end.
type Dir struct {
	dir    string // for people; every call goes through folder
	folder *os.File
	lock   *lock.Folder
	older  *lock.Folder // nil: an earlier version was never here
}

// Lock makes this process the one daemon of the folder dir, which must be there, belong to root or to
// this user, and be writable by no one else unless it is sticky. The last step of dir may not be a link.
// What is locked is the folder private in it, which is made where it is missing and shut to all other users: dir
// itself is open to everybody. The error names the process that holds the lock already.
func Lock(dir, private string) (*Dir, error) {
	if dir == "" {
		return nil, errors.New("the runtime folder has no name: give one with --runtime-dir")
	}
	dir = filepath.Clean(dir) // a final slash would follow a link
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, folderError(dir, err)
	}
	h := &Dir{dir: dir, folder: os.NewFile(uintptr(fd), dir)}
	if err := h.take(private); err != nil {
		return nil, errors.Join(err, h.Close())
	}
	return h, nil
}

// Close lets another daemon have the folder. Sockets made through h stay and are theirs to close, first.
func (h *Dir) Close() error {
	return errors.Join(h.older.Close(), h.lock.Close(), h.folder.Close())
}

func (h *Dir) take(private string) (err error) {
	if err := checkFolder(int(h.folder.Fd()), h.dir); err != nil {
		return err
	}
	shut, err := openStep(h.folder, private, filepath.Join(h.dir, private), true)
	if errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) || errors.Is(err, unix.EROFS) {
		return fmt.Errorf("%w: `systemd-tmpfiles --create perceptd.conf` makes it for perceptd.service; "+
			"to start perceptd by hand, name another folder with --runtime-dir", err)
	}
	if err != nil {
		return err
	}
	if h.lock, err = lock.Take(shut); err != nil {
		return h.heldError(err)
	}
	h.older, err = lockOlder(h.folder)
	return h.heldError(err)
}

// openStep opens one folder, made if need be. A private one is for this user and root alone, also when it
// was there before with a wider mode.
func openStep(at *os.File, step, path string, private bool) (*os.File, error) {
	err := unix.Mkdirat(int(at.Fd()), step, 0o700)
	made := err == nil
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return nil, folderError(path, err)
	}
	fd, err := unix.Openat(int(at.Fd()), step, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	var st unix.Stat_t
	if errors.Is(err, unix.EACCES) && !private &&
		unix.Fstatat(int(at.Fd()), step, &st, unix.AT_SYMLINK_NOFOLLOW) == nil && int(st.Uid) != os.Geteuid() {
		return nil, &ForeignError{Path: path, User: st.Uid}
	}
	if err != nil {
		return nil, folderError(path, err)
	}
	next := os.NewFile(uintptr(fd), path)
	if !private && step != "." {
		err = checkOwn(fd, path)
	} else {
		err = nil
	}
	if err == nil {
		err = checkFolder(fd, path)
	}
	if err != nil {
		return nil, errors.Join(err, next.Close())
	}
	switch {
	case private:
		err = next.Chmod(0o700)
	case made && step != ".":
		err = next.Chmod(0o755)
	default:
		err = nil
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s: nobody else may get there, and its mode cannot be changed: %w",
			path, err), next.Close())
	}
	return next, nil
}

// heldError says in a lock.HeldError what the other daemon does.
func (h *Dir) heldError(err error) error {
	var by lock.HeldError
	if errors.As(err, &by) {
		by.Does = "is serving in " + h.dir
		return by
	}
	return err
}

// lockOlder takes the lock of an earlier version where there is one, so that such a daemon does not serve beside this
// one. What that version would not have made, or another user could lock, is no lock.
func lockOlder(folder *os.File) (*lock.Folder, error) {
	fd, err := unix.Openat(int(folder.Fd()), olderLock, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil
	}
	file := os.NewFile(uintptr(fd), filepath.Join(folder.Name(), olderLock))
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFREG || st.Nlink != 1 || !ours(st.Uid) ||
		st.Mode&0o077 != 0 {
		return nil, file.Close()
	}
	return lock.TakeFile(file)
}

// checkFolder refuses a folder in which someone else could put a socket of theirs in ours' place.
func checkFolder(fd int, path string) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if !ours(st.Uid) {
		return fmt.Errorf("%s belongs to user %d, neither root nor user %d who runs perceptd: start it as that user, "+
			"or name another folder with --runtime-dir",
			path, st.Uid, os.Geteuid())
	}
	if st.Mode&0o022 != 0 && st.Mode&unix.S_ISVTX == 0 {
		return fmt.Errorf(
			"others may write in %s (mode %04o): chmod go-w it, or name another folder with --runtime-dir",
			path, st.Mode&0o7777)
	}
	return nil
}

// ForeignError reports that a socket's folder belongs to another user, so that no socket can be made in it.
type ForeignError struct {
	Path string
	User uint32
}

func (e *ForeignError) Error() string {
	return fmt.Sprintf("%s belongs to user %d and not to user %d who runs perceptd, as when a container engine has "+
		"made it for a container that was started before perceptd", e.Path, e.User, os.Geteuid())
}

// checkOwn refuses a socket's folder in which this process may not make the socket.
func checkOwn(fd int, path string) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if int(st.Uid) == os.Geteuid() || st.Uid == 0 && unix.Faccessat(fd, ".", unix.W_OK, 0) == nil {
		return nil
	}
	return &ForeignError{Path: path, User: st.Uid}
}

func ours(uid uint32) bool { return uid == 0 || int(uid) == os.Geteuid() }

func folderError(path string, err error) error {
	switch {
	case errors.Is(err, unix.ENOENT):
		return fmt.Errorf("%s: %w: make it with mode 0755, or name another folder with --runtime-dir", path, err)
	case errors.Is(err, unix.ELOOP), errors.Is(err, unix.ENOTDIR):
		return fmt.Errorf("%s is not a folder, or is a link, which is not followed here: name the folder itself", path)
	}
	return fmt.Errorf("%s: %w", path, err)
}
