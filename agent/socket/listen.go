package socket

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

const (
	// backlog is cut to net.core.somaxconn by the kernel; a client beyond it waits or gets EAGAIN.
	backlog = 4096
	// longestName leaves room in a socket address (108 bytes) for /proc/self/fd/N/ and the temporary name.
	longestName = 64
)

// Listener is a listening socket that was made here. Use it as a net.Listener; the embedded listener's
// own address is the temporary path that it was bound to.
type Listener struct {
	*net.UnixListener

	path   string
	name   string
	folder *os.File    // where the socket is
	made   *os.File    // the socket's inode, held so that its number is not given to another
	left   atomic.Bool // Close leaves it at its path
	close  func() error
}

// Listen makes the socket name in folder, a path below the locked one ("" is the locked folder itself), and
// listens on it. Steps of folder are made where they
// are missing: the last one with mode 0755, those above it with 0700, so that nobody but root gets to the socket
// unless the last one is mounted elsewhere. mode is the socket's permissions;
// gid is its group, which the process must be a member of, or -1 to keep the process's own.
//
// A socket that nobody serves is replaced, and so is an empty folder, which a container engine makes where the socket
// itself is mounted and is not there yet. A socket that is served, or whose server cannot be told, is an error, and so
// is anything else. A folder that belongs to another user is a *ForeignError.
func (h *Dir) Listen(folder, name string, mode fs.FileMode, gid int) (*Listener, error) {
	path := filepath.Join(h.dir, folder, name)
	if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") || len(name) > longestName {
		return nil, fmt.Errorf("%q is no name for a socket: it takes 1 to %d bytes without a slash", name, longestName)
	}
	if folder != "" && !filepath.IsLocal(folder) {
		return nil, fmt.Errorf("%q is not below %s", folder, h.dir)
	}
	in, err := h.open(folder)
	if err != nil {
		return nil, err
	}
	if err := checkFree(in, name, path); err != nil {
		return nil, errors.Join(err, in.Close())
	}
	l, err := serve(in, name, mode, gid)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", path, err), in.Close())
	}
	l.path = path
	return l, nil
}

// Addr returns the socket's path.
func (l *Listener) Addr() net.Addr { return &net.UnixAddr{Net: "unix", Name: l.path} }

// FolderID tells a folder from all others, as long as it is there or something has it open or mounted.
type FolderID struct{ device, inode uint64 }

// Folder says which folder the socket is in: another one, by the same path, is not what a container has mounted.
func (l *Listener) Folder() FolderID {
	var st unix.Stat_t
	_ = unix.Fstat(int(l.folder.Fd()), &st) // cannot err: it is open
	return FolderID{uint64(st.Dev), st.Ino}
}

// Close stops listening and removes the socket, unless something else has taken its place or Leave was called. It may
// be called more than once.
func (l *Listener) Close() error { return l.close() }

func (l *Listener) remove() error {
	var err error
	if !l.left.Load() && same(l.folder, l.name, l.made) {
		err = unix.Unlinkat(int(l.folder.Fd()), l.name, 0)
	}
	return errors.Join(err, l.UnixListener.Close(), l.made.Close(), l.folder.Close())
}

// open walks from the locked folder down to folder step by step, following no link, making what is missing.
func (h *Dir) open(folder string) (*os.File, error) {
	at, path := h.folder, h.dir
	steps := strings.Split(filepath.Clean(folder), "/") // "." for the locked folder itself
	for i, step := range steps {
		path = filepath.Join(path, step)
		next, err := openStep(at, step, path, i < len(steps)-1)
		if at != h.folder {
			_ = at.Close() // only read from
		}
		if err != nil {
			return nil, err
		}
		at = next
	}
	return at, nil
}

// checkFree returns nil when name may be taken: it is not there, or is a socket that nobody serves, or an empty folder
// was, which is removed.
func checkFree(folder *os.File, name, path string) error {
	var st unix.Stat_t
	err := unix.Fstatat(int(folder.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR && unix.Unlinkat(int(folder.Fd()), name, unix.AT_REMOVEDIR) == nil {
		return nil
	}
	if st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		return fmt.Errorf("%s is there and is not a socket: look what it is and remove it", path)
	}
	switch err := probe(folder, name); {
	case err == nil, errors.Is(err, unix.EAGAIN): // EAGAIN: its queue is full, so it has one
		return fmt.Errorf("another perceptd is serving on %s: stop it, or name another folder with --runtime-dir", path)
	case errors.Is(err, unix.ECONNREFUSED):
		return nil
	default:
		return fmt.Errorf("whether anyone serves on %s cannot be told: %w: stop whoever made it, then remove it",
			path, err)
	}
}

func probe(folder *os.File, name string) error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Connect(fd, &unix.SockaddrUnix{Name: entry(folder, name)})
}

// serve binds to a temporary name, gives the socket its mode and group, listens, and renames it over name.
func serve(folder *os.File, name string, mode fs.FileMode, gid int) (*Listener, error) {
	temporary := temporaryOf(name)
	err := unix.Unlinkat(int(folder.Fd()), temporary, 0)
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return nil, fmt.Errorf("remove %s: %w", temporary, err)
	}
	inner, made, err := bind(folder, temporary, mode, gid)
	if err != nil {
		return nil, err
	}
	l := &Listener{UnixListener: inner, name: temporary, folder: folder, made: made}
	l.close = sync.OnceValue(l.remove)
	if err := unix.Renameat(int(folder.Fd()), temporary, int(folder.Fd()), name); err != nil {
		abandoned := errors.Join(unix.Unlinkat(int(folder.Fd()), temporary, 0), inner.Close(), made.Close())
		return nil, errors.Join(fmt.Errorf("rename %s: %w", temporary, err), abandoned)
	}
	l.name = name
	return l, nil
}

// temporaryOf is where a socket is until it has its mode and group. It is fixed: whoever holds the lock is the only one
// to use it.
func temporaryOf(name string) string { return "." + name + ".new" }

func bind(folder *os.File, name string, mode fs.FileMode, gid int) (*net.UnixListener, *os.File, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socket", err)
	}
	file := os.NewFile(uintptr(fd), name)
	defer file.Close() // FileListener duplicates it
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: entry(folder, name)}); err != nil {
		return nil, nil, bindError(err)
	}
	made, err := permit(folder, name, mode, gid)
	if err == nil {
		if err = unix.Listen(fd, backlog); err == nil {
			var l net.Listener
			if l, err = net.FileListener(file); err == nil {
				return l.(*net.UnixListener), made, nil
			}
		}
		_ = made.Close() // a handle only
	}
	return nil, nil, errors.Join(err, unix.Unlinkat(int(folder.Fd()), name, 0))
}

// permit sets the socket's mode and group and returns a handle on its inode. All of it goes through the
// handle: whoever may write in a module's folder could put a link in the socket's place meanwhile.
func permit(folder *os.File, name string, mode fs.FileMode, gid int) (*os.File, error) {
	made, err := openMade(folder, name)
	if err != nil {
		return nil, err
	}
	fd := int(made.Fd())
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, errors.Join(err, made.Close())
	}
	if st.Mode&unix.S_IFMT != unix.S_IFSOCK || int(st.Uid) != os.Geteuid() {
		return nil, errors.Join(errors.New("something else took the new socket's place while it was made"),
			made.Close())
	}
	if gid >= 0 {
		if err := unix.Fchownat(fd, "", -1, gid, unix.AT_EMPTY_PATH); err != nil {
			return nil, errors.Join(fmt.Errorf(
				"give it to group %d: %w: run perceptd as root or as a member of that group", gid, err), made.Close())
		}
	}
	// fchmod refuses such a handle (EBADF), its entry in /proc does not; the group goes first, since a
	// change of it may take mode bits away.
	if err := unix.Chmod("/proc/self/fd/"+strconv.Itoa(fd), uint32(mode.Perm())); err != nil {
		return nil, errors.Join(os.NewSyscallError("chmod", err), made.Close())
	}
	return made, nil
}

// openMade returns a handle on what is at name, and follows no link.
func openMade(folder *os.File, name string) (*os.File, error) {
	fd, err := unix.Openat(int(folder.Fd()), name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("open", err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// same reports whether name in folder is the inode that made is a handle of.
func same(folder *os.File, name string, made *os.File) bool {
	var there, held unix.Stat_t
	return unix.Fstatat(int(folder.Fd()), name, &there, unix.AT_SYMLINK_NOFOLLOW) == nil &&
		unix.Fstat(int(made.Fd()), &held) == nil &&
		there.Dev == held.Dev && there.Ino == held.Ino
}

// entry is the path of name in folder that fits a socket address, however deep the folder is.
func entry(folder *os.File, name string) string {
	return "/proc/self/fd/" + strconv.Itoa(int(folder.Fd())) + "/" + name
}

func bindError(err error) error {
	if errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("bind: %w: is /proc mounted?", err)
	}
	if errors.Is(err, unix.EACCES) || errors.Is(err, unix.EROFS) {
		return fmt.Errorf("bind: %w: start perceptd through systemd, or name another folder with --runtime-dir", err)
	}
	return os.NewSyscallError("bind", err)
}
