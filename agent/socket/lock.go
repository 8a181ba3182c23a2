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
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// LockName is the lock file's name in the locked folder. The file outlives its daemon: removing it
// would let two daemons lock two files of the same name.
const LockName = "perceptd.lock"

// Held is a runtime folder that this process alone serves in, until Close or its end.
type Held struct {
	dir    string // for people; every call goes through folder
	folder *os.File
	lock   *os.File
}

// Lock makes this process the one daemon of the folder dir, which must be there, belong to root or to
// this user, and be writable by no one else unless it is sticky. The last step of dir may not be a link.
// The error names the process that holds the lock already.
func Lock(dir string) (*Held, error) {
	if dir == "" {
		return nil, errors.New("the runtime folder has no name: give one with --runtime-dir")
	}
	dir = filepath.Clean(dir) // a final slash would follow a link
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, folderError(dir, err)
	}
	folder := os.NewFile(uintptr(fd), dir)
	if err := checkFolder(fd, dir); err != nil {
		return nil, errors.Join(err, folder.Close())
	}
	lock, err := lockFile(fd, dir)
	if err != nil {
		return nil, errors.Join(err, folder.Close())
	}
	return &Held{dir: dir, folder: folder, lock: lock}, nil
}

// Close lets another daemon have the folder. Sockets made through h stay and are theirs to close, first.
// The lock is given up by name: a process that is being started by this one may hold the descriptor for a moment.
func (h *Held) Close() error {
	err := unix.Flock(int(h.lock.Fd()), unix.LOCK_UN)
	return errors.Join(err, h.lock.Close(), h.folder.Close())
}

func lockFile(folder int, dir string) (*os.File, error) {
	path := filepath.Join(dir, LockName)
	// Not readable by others, since whoever can open a file can lock it.
	fd, err := unix.Openat(folder, LockName, unix.O_RDWR|unix.O_CREAT|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0o600)
	if errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) {
		return nil, fmt.Errorf("%s: %w: start perceptd as the user that owns %s (under systemd `systemd-tmpfiles --create perceptd.conf` sets the owner), or name another folder with --runtime-dir", path, err, dir)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	file := os.NewFile(uintptr(fd), path)
	if err := takeLock(file); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return file, nil
}

// takeLock locks file and writes this process's ID into it, for the error of whoever comes next.
func takeLock(file *os.File) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(file.Fd()), &st); err != nil {
		return fmt.Errorf("%s: %w", file.Name(), err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Nlink != 1 || !ours(st.Uid) {
		return fmt.Errorf("%s is not a lock file of root or of this user: look what it is and remove it", file.Name())
	}
	err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return fmt.Errorf("another perceptd%s is serving in %s: stop it, or name another folder with --runtime-dir",
			holder(file), filepath.Dir(file.Name()))
	}
	if err != nil {
		return fmt.Errorf("lock %s: %w", file.Name(), err)
	}
	if err := file.Truncate(0); err != nil {
		return err
	}
	_, err = file.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	return err
}

// holder names the process that holds the lock, or is empty when the file does not say.
func holder(file *os.File) string {
	text, err := io.ReadAll(io.NewSectionReader(file, 0, 32))
	if err != nil {
		return ""
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil || pid <= 0 {
		return ""
	}
	return fmt.Sprintf(" (process %d)", pid)
}

// checkFolder refuses a folder in which someone else could put a socket of theirs in ours' place.
func checkFolder(fd int, path string) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if !ours(st.Uid) {
		return fmt.Errorf("%s belongs to user %d, neither root nor user %d who runs perceptd: start it as that user, or name another folder with --runtime-dir",
			path, st.Uid, os.Geteuid())
	}
	if st.Mode&0o022 != 0 && st.Mode&unix.S_ISVTX == 0 {
		return fmt.Errorf("others may write in %s (mode %04o): chmod go-w it, or name another folder with --runtime-dir",
			path, st.Mode&0o7777)
	}
	return nil
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
