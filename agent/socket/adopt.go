package socket

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Inode is the number of the socket in its file system. As long as any descriptor of the socket is open, no other
// gets it.
func (l *Listener) Inode() (uint64, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(l.made.Fd()), &st); err != nil {
		return 0, err
	}
	return st.Ino, nil
}

// Adopt takes up a socket that an earlier process had made with Listen, by its listener, which was kept open meanwhile,
// and its Inode. It takes over inner, also with an error, and then leaves what is at the path alone: something else
// than that socket.
func (h *Dir) Adopt(folder, name string, inner *net.UnixListener, inode uint64) (*Listener, error) {
	inner.SetUnlinkOnClose(false)
	l, err := h.adopt(folder, name, inner, inode)
	if err != nil {
		return nil, errors.Join(err, inner.Close())
	}
	return l, nil
}

func (h *Dir) adopt(folder, name string, inner *net.UnixListener, inode uint64) (*Listener, error) {
	path := filepath.Join(h.dir, folder, name)
	if name == "" || strings.ContainsAny(name, "/\x00") || folder == "" || !filepath.IsLocal(folder) {
		return nil, fmt.Errorf("%s is no path of a socket below %s", path, h.dir)
	}
	in, err := h.open(folder)
	if err != nil {
		return nil, err
	}
	made, err := openMade(in, name)
	if err == nil {
		var there unix.Stat_t
		if err = unix.Fstat(int(made.Fd()), &there); err == nil &&
			(there.Mode&unix.S_IFMT != unix.S_IFSOCK || there.Ino != inode) {
			err = errors.New("something else is in the socket's place")
		}
		if err != nil {
			err = errors.Join(err, made.Close())
		}
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", path, err), in.Close())
	}
	l := &Listener{UnixListener: inner, path: path, name: name, folder: in, made: made}
	l.close = sync.OnceValue(l.remove)
	return l, nil
}

// Leave has Close leave the socket at its path, for the process that will adopt it.
func (l *Listener) Leave() { l.left.Store(true) }

// RemoveDead removes the socket name from a folder below the locked one, when nobody serves it; the folder stays, since
// a container may have it mounted. What is not there is no error.
func (h *Dir) RemoveDead(folder, name string) error {
	path := filepath.Join(h.dir, folder)
	if folder == "" || !filepath.IsLocal(folder) {
		return fmt.Errorf("%q is not below %s", folder, h.dir)
	}
	in, err := h.find(folder)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	defer in.Close()
	for _, left := range []string{name, temporaryOf(name)} {
		var st unix.Stat_t
		err := unix.Fstatat(int(in.Fd()), left, &st, unix.AT_SYMLINK_NOFOLLOW)
		if errors.Is(err, unix.ENOENT) || err == nil && st.Mode&unix.S_IFMT != unix.S_IFSOCK {
			continue
		}
		if err == nil {
			err = checkFree(in, left, filepath.Join(path, left))
		}
		if err == nil {
			err = unix.Unlinkat(int(in.Fd()), left, 0)
		}
		if err != nil {
			return fmt.Errorf("remove %s: %w", filepath.Join(path, left), err)
		}
	}
	return nil
}

// Foreign lists the folders in one below the locked folder in which this process cannot make sockets, as Listen would
// say by a *ForeignError.
func (h *Dir) Foreign(folder string) (names []string) {
	all, _ := h.Folders(folder) // what cannot be listed is told of by Listen
	for _, name := range all {
		in, err := h.find(filepath.Join(folder, name))
		if err == nil {
			err = errors.Join(checkOwn(int(in.Fd()), name), in.Close())
		}
		if _, isForeign := errors.AsType[*ForeignError](err); isForeign || errors.Is(err, unix.EACCES) {
			names = append(names, name)
		}
	}
	return names
}

// Folders lists the folders in one below the locked folder, in the order of their names. There are none where it is not
// there.
func (h *Dir) Folders(folder string) ([]string, error) {
	in, err := h.find(folder)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer in.Close()
	entries, err := in.ReadDir(-1)
	var names []string
	for _, entry := range entries {
		if entry.IsDir() {
			names = append(names, entry.Name())
		}
	}
	slices.Sort(names)
	return names, err
}

// find walks from the locked folder down to folder as open does, and makes and changes nothing.
func (h *Dir) find(folder string) (*os.File, error) {
	at := h.folder
	for _, step := range strings.Split(filepath.Clean(folder), "/") {
		fd, err := unix.Openat(int(at.Fd()), step, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if at != h.folder {
			_ = at.Close() // only read from
		}
		if err != nil {
			return nil, os.NewSyscallError("open "+folder, err)
		}
		at = os.NewFile(uintptr(fd), folder)
	}
	return at, nil
}
