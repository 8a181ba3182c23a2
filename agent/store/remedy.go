package store

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// FaultError says that a file cannot be read now, or cannot be written, and what a person does about it.
type FaultError struct {
	Why    error
	path   string // of the file
	writes bool   // it was to be written, else to be read
}

func (e *FaultError) Error() string {
	done := "read"
	if e.writes {
		done = "written"
	}
	why := e.Why
	if of, ok := errors.AsType[*fs.PathError](why); ok { // which may be about a file that nobody has heard of
		why = of.Err
	}
	return fmt.Sprintf("%s cannot be %s: %v", e.path, done, why)
}

func (e *FaultError) Unwrap() error { return e.Why }

// Remedy says what a person does about it: one thing, for this cause.
func (e *FaultError) Remedy() string {
	folder := filepath.Dir(e.path)
	var open *openError
	switch {
	case errors.As(e.Why, &open):
		return open.mend
	case errors.Is(e.Why, unix.EROFS):
		return fmt.Sprintf(`the file system is mounted read-only: mount -o remount,rw "$(findmnt -nT %s -o TARGET)"; `+
			"where the kernel has done that, journalctl -k tells why", folder)
	case errors.Is(e.Why, unix.ENOSPC), errors.Is(e.Why, unix.EDQUOT):
		return "make room on its file system: df " + folder
	case errors.Is(e.Why, fs.ErrPermission) && e.writes:
		return fmt.Sprintf("as root: chown %s %s && chmod 0700 %s", runsAs(os.Geteuid()), folder, folder)
	case errors.Is(e.Why, fs.ErrPermission):
		return fmt.Sprintf("as root: chown -R %s %s && chmod -R u+rwX %s", runsAs(os.Geteuid()), folder, folder)
	case errors.Is(e.Why, unix.ENOTDIR):
		return moveAway(folder)
	case errors.Is(e.Why, fs.ErrNotExist):
		return folder + " is gone: systemctl restart perceptd makes it again"
	case errors.Is(e.Why, unix.EMFILE), errors.Is(e.Why, unix.ENFILE):
		return "no file descriptors are left: " +
			"see what takes them (ls /proc/$(pidof perceptd)/fd, sysctl fs.file-nr); it passes when there are some"
	case errors.Is(e.Why, unix.EIO):
		return "the disk fails: journalctl -k tells how; look at it with fsck, or have it replaced"
	}
	at := e.path
	if of, ok := errors.AsType[*fs.PathError](e.Why); ok { // it may be the file that is to take the other's place
		at = of.Path
	}
	if errors.Is(e.Why, unix.ENOTEMPTY) {
		return "move what is in the way away: " + at
	}
	return "look at what is there: ls -ld " + folder + " " + at
}

// openError says that a folder is of no use: others could write there, or it is not a folder.
type openError struct{ what, mend string }

func (e *openError) Error() string { return e.what }

func moveAway(folder string) string {
	return fmt.Sprintf("move what is in the place of %s away: systemctl restart perceptd makes the folder", folder)
}

// runsAs names a user and the user's group, where there is one, as chown takes them.
func runsAs(id int) string {
	number := strconv.Itoa(id)
	if u, err := user.LookupId(number); err == nil {
		return u.Username + ":"
	}
	return number
}
