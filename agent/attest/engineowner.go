package attest

import (
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// trustedOwners are the users whose engine is believed. An engine says who is a container: only a user who can become any
// caller anyway may run it.
type trustedOwners struct {
	uids []uint32
	gids []uint32 // whose members may write to a folder on the way to the socket
}

// newTrustedOwners returns root, and with byHand the user of this process as well.
func newTrustedOwners(byHand bool) trustedOwners {
	if byHand {
		return trustedOwners{uids: []uint32{0, uint32(os.Geteuid())}, gids: []uint32{0, uint32(os.Getegid())}}
	}
	return trustedOwners{uids: []uint32{0}, gids: []uint32{0}}
}

// untrustedError is an engine of a user whose word counts for nothing.
type untrustedError struct{ text string }

func (e *untrustedError) Error() string { return e.text }

func (o trustedOwners) untrusted(what string, uid uint32) error {
	return &untrustedError{fmt.Sprintf("%s belongs to user %d: a container engine is believed only if it is root's", what, uid)}
}

// maxLinks is as many as the kernel follows in one path.
const maxLinks = 40

// checkPath returns nil if only these users could have put the socket there: it is theirs, and so are the folders and links
// on the way to it, which nobody else may write to. path is absolute.
func (o trustedOwners) checkPath(path string) error {
	dir, rest := "/", splitPath(path)
	if _, err := o.checkFile(dir); err != nil {
		return err
	}
	for links := 0; len(rest) > 0; {
		next := filepath.Join(dir, rest[0]) // of a path without links: ".." is the folder above
		mode, err := o.checkFile(next)
		if err != nil {
			return err
		}
		if mode.Type() != fs.ModeSymlink {
			dir, rest = next, rest[1:]
			continue
		}
		target, err := os.Readlink(next)
		if err != nil {
			return err
		}
		if links++; links > maxLinks {
			return fmt.Errorf("%s leads through more than %d links", path, maxLinks)
		}
		if filepath.IsAbs(target) {
			dir = "/"
		}
		rest = append(splitPath(target), rest[1:]...)
	}
	return nil
}

func splitPath(path string) []string {
	return strings.FieldsFunc(path, func(r rune) bool { return r == '/' })
}

// checkFile returns what kind of file it is, and no error if it is these users' and, where it is a folder, others can put
// nothing in the place of what is there.
func (o trustedOwners) checkFile(path string) (fs.FileMode, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return 0, err
	}
	stat := info.Sys().(*syscall.Stat_t)
	if !slices.Contains(o.uids, stat.Uid) {
		return 0, o.untrusted(path, stat.Uid)
	}
	const byGroup, byOthers = 0o020, 0o002
	open := info.Mode()&byOthers != 0 || info.Mode()&byGroup != 0 && !slices.Contains(o.gids, stat.Gid)
	if info.IsDir() && open && info.Mode()&fs.ModeSticky == 0 {
		return 0, &untrustedError{fmt.Sprintf("%s may be written to by others than root (%v): they could put an engine of their own there", path, info.Mode())}
	}
	return info.Mode(), nil
}

// checkListener returns nil if the process that listens at the other end was one of these users' when it began to.
func (o trustedOwners) checkListener(conn *net.UnixConn) error {
	var peer *unix.Ucred
	raw, err := conn.SyscallConn()
	if err == nil {
		controlErr := raw.Control(func(fd uintptr) { peer, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
		if err == nil {
			err = controlErr
		}
	}
	if err != nil {
		return fmt.Errorf("whose process listens there cannot be told: %w", err)
	}
	if !slices.Contains(o.uids, peer.Uid) {
		return o.untrusted("the process that listens at "+conn.RemoteAddr().String(), peer.Uid)
	}
	return nil
}
