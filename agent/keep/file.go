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

// BootID returns the kernel's name for this boot; empty: not known.
func BootID() string {
	text, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(text))
}

// prepare makes dir if need be, which is shut to everybody but root and this process's user, and removes
// what a crash left of a file of that name.
func prepare(dir, name string) error {
	if err := makeFolder(dir); err != nil {
		return err
	}
	return remove(filepath.Join(dir, name+beingWritten))
}

func makeFolder(dir string) error {
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	info, err := os.Stat(dir)
	switch {
	case err != nil:
		return err
	case !info.IsDir():
		return fmt.Errorf("%s is not a directory", dir)
	case !ours(info):
		return fmt.Errorf("the owner of %s is neither root nor the user that perceptd runs as", dir)
	case info.Mode().Perm()&othersMayChange != 0:
		return fmt.Errorf("mode %04o of %s lets others write there: chmod go-w %s", info.Mode().Perm(), dir, dir)
	case info.Mode().Perm()&onlyForOurs != 0: // who can open it can lock it
		if err := os.Chmod(dir, 0o700); err != nil {
			return err
		}
	}
	if err := unix.Faccessat(unix.AT_FDCWD, dir, unix.W_OK|unix.X_OK, unix.AT_EACCESS); err != nil {
		return &fs.PathError{Op: "write to", Path: dir, Err: err}
	}
	return nil
}

// Hold has this process alone keep its state in dir, which is made if need be, until it closes what is returned. Two
// processes would overwrite each other's files. The error names the process that holds dir already (lock.HeldError), or
// says why dir is of no use; nothing is kept in it then.
func Hold(dir string) (*lock.Folder, error) {
	if err := makeFolder(dir); err != nil {
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

// remove removes what may be there.
func remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// read reads a plain file of ours of at most so many bytes, whose mode has none of the bits refused,
// whatever stands in its place: a link, a pipe or a device is neither followed nor waited for. An
// fs.PathError is the kernel's refusal to read, and any other error is about what is there.
func read(path string, refused fs.FileMode, most int) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	switch {
	case errors.Is(err, unix.ELOOP):
		return nil, errors.New("it is a link")
	case errors.Is(err, unix.ENXIO):
		return nil, errors.New("it is not a regular file") // a socket, or a device without its driver
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
	case info.Mode().Perm()&refused&othersMayChange != 0:
		return nil, fmt.Errorf("its mode %04o lets others change it", info.Mode().Perm())
	case info.Mode().Perm()&refused != 0:
		return nil, fmt.Errorf("its mode %04o lets others read it", info.Mode().Perm())
	case info.Size() > int64(most):
		return nil, fmt.Errorf("it is larger than %d bytes", most)
	}
	text, err := io.ReadAll(io.LimitReader(f, int64(most)+1))
	switch {
	case err != nil:
		return nil, err
	case len(text) > most: // it has grown
		return nil, fmt.Errorf("it is larger than %d bytes", most)
	}
	return text, nil
}

// moveAside renames a file that cannot be read, so that nothing is lost, and returns what to tell people.
func moveAside(path string, why error) error {
	to := path + unreadable + time.Now().UTC().Format("20060102T150405.000000000Z")
	if err := os.Rename(path, to); err != nil {
		return fmt.Errorf("%s: %w; it could not be moved aside: %w", path, why, err)
	}
	older, err := filepath.Glob(path + unreadable + "*")
	if err == nil && len(older) > maxAside {
		slices.Sort(older)
		for _, name := range older[:len(older)-maxAside] {
			_ = os.Remove(name) // what stays only takes room
		}
	}
	return fmt.Errorf("%s: %w; it is now %s", path, why, to)
}

// replace puts a file on the disk in the place of what was there. When it returns nil it outlives a power
// cut; with an error, what was there before does, or, where only the folder could not be synced, one of both.
func replace(path string, text []byte) error {
	temporary := path + beingWritten
	if err := remove(temporary); err != nil {
		return err
	}
	if err := writeNew(temporary, text); err != nil {
		_ = os.Remove(temporary) // a full disk has room again
		return err
	}
	if err := os.Rename(temporary, path); err != nil {
		_ = os.Remove(temporary)
		return err
	}
	return syncDir(filepath.Dir(path))
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
