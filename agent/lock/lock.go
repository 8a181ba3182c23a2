// Package lock has one process at a time use a folder.
//
// The lock is an advisory one (flock) on the folder itself. Whoever can open a folder, if only to read, can lock it, so
// that a folder is locked here only after it was shut to every other user.
package lock

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"unicode"

	"golang.org/x/sys/unix"
)

// HeldError reports that another process holds the lock, and what to do.
type HeldError struct {
	Process int    // its ID; 0: not known
	Program string // what it runs, by the name that it goes by (/proc/PID/comm); empty: not known
	Does    string // what it does with the folder, such as "is serving in /run/percept"; empty: "holds the lock"
}

func (e HeldError) Error() string {
	return e.Holder() + ": stop it, or name other folders with --runtime-dir and --state-dir"
}

// Holder says which process holds the lock, and what it does.
func (e HeldError) Holder() string {
	who := "another process"
	switch e.Program {
	case "":
	case "perceptd":
		who = "another perceptd"
	default:
		who = "program " + e.Program
	}
	if e.Process != 0 {
		who += fmt.Sprintf(" (process %d)", e.Process)
	}
	return who + " " + cmp.Or(e.Does, "holds the lock")
}

// Folder is a folder that this process alone uses, until Close or its end.
type Folder struct {
	file *os.File
}

// Take locks an open folder, which must be root's or this user's, and makes its mode 0700 first where others may open
// it. It takes folder over, also with an error, which is a HeldError when another process holds the lock.
func Take(folder *os.File) (*Folder, error) {
	err := shut(folder)
	if err == nil {
		err = flock(folder)
	}
	if err != nil {
		return nil, errors.Join(err, folder.Close())
	}
	return &Folder{file: folder}, nil
}

// TakeFile locks a file or folder as it is, which an earlier version locked, and takes it over as Take does.
func TakeFile(file *os.File) (*Folder, error) {
	if err := flock(file); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return &Folder{file: file}, nil
}

// Close lets another process have the folder. The lock is given up by name: a process that is being started by this one
// may hold the descriptor for a moment. A nil Folder is no lock, and closed already.
func (f *Folder) Close() error {
	if f == nil {
		return nil
	}
	return errors.Join(unix.Flock(int(f.file.Fd()), unix.LOCK_UN), f.file.Close())
}

// shut keeps every other user from opening the folder.
func shut(folder *os.File) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(folder.Fd()), &st); err != nil {
		return &fs.PathError{Op: "stat", Path: folder.Name(), Err: err}
	}
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFDIR:
		return fmt.Errorf("%s is not a folder", folder.Name())
	case st.Uid != 0 && int(st.Uid) != os.Geteuid():
		return fmt.Errorf("%s belongs to user %d, neither root nor user %d who runs perceptd",
			folder.Name(), st.Uid, os.Geteuid())
	case st.Mode&0o077 == 0:
		return nil
	}
	// An ACL goes with it: the group's bits are its mask.
	if err := unix.Fchmod(int(folder.Fd()), 0o700); err != nil {
		return fmt.Errorf("%s: mode %04o lets others open it, and cannot be changed: %w",
			folder.Name(), st.Mode&0o7777, err)
	}
	return nil
}

func flock(file *os.File) error {
	err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		process := holder(file)
		return HeldError{Process: process, Program: programOf(process)}
	}
	if err != nil {
		return &fs.PathError{Op: "lock", Path: file.Name(), Err: err}
	}
	return nil
}

// holder looks the process that locked file up in the kernel's list; 0: not there, as on file systems whose device has
// two numbers.
func holder(file *os.File) int {
	var st unix.Stat_t
	locks, err := os.ReadFile("/proc/locks")
	if err != nil || unix.Fstat(int(file.Fd()), &st) != nil {
		return 0
	}
	return findHolder(string(locks), fmt.Sprintf("%02x:%02x:%d",
		unix.Major(uint64(st.Dev)), unix.Minor(uint64(st.Dev)), st.Ino))
}

// programOf returns the name that a process goes by, without what could garble a line; empty: it is not known.
func programOf(process int) string {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", process))
	if err != nil {
		return ""
	}
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, strings.TrimSuffix(string(text), "\n"))
}

// findHolder reads lines such as "1: FLOCK  ADVISORY  WRITE 1234 00:1a:5678 0 EOF". Those who wait have an arrow more.
func findHolder(locks, inode string) int {
	for line := range strings.Lines(locks) {
		words := strings.Fields(line)
		if len(words) != 8 || words[1] != "FLOCK" || words[5] != inode {
			continue
		}
		if pid, err := strconv.Atoi(words[4]); err == nil && pid > 0 {
			return pid
		}
	}
	return 0
}
