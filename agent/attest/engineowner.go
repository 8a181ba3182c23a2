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

// trustedOwners are the users and groups that may own a container engine. The engine decides which container a caller
// is attested as, so only a user who could become any caller anyway may run it.
type trustedOwners struct {
	uids []uint32
	gids []uint32 // whose members may write to a folder on the path of the socket
}

// newTrustedOwners returns root, and with trustOwnUser the user of this process too.
func newTrustedOwners(trustOwnUser bool) trustedOwners {
	if trustOwnUser {
		return trustedOwners{uids: []uint32{0, uint32(os.Geteuid())}, gids: []uint32{0, uint32(os.Getegid())}}
	}
	return trustedOwners{uids: []uint32{0}, gids: []uint32{0}}
}

// untrustedError says that an engine, or the path of its socket, is under the control of another user.
type untrustedError struct{ text string }

func (e *untrustedError) Error() string { return e.text }

// untrusted returns the error about a file or process of an untrusted user.
func (o trustedOwners) untrusted(what string, uid uint32) error {
	return &untrustedError{
		fmt.Sprintf("%s belongs to user %d: a container engine is believed only if it is root's", what, uid),
	}
}

// maxLinks is how many symbolic links the kernel follows in one path.
const maxLinks = 40

// checkPath returns nil if only trusted users could have put the socket at path, which is absolute: they own the
// socket and every folder and link on the way to it, and nobody else may write to these folders.
func (o trustedOwners) checkPath(path string) error {
	dir, rest := "/", splitPath(path)
	if _, err := o.checkFile(dir); err != nil {
		return err
	}
	for links := 0; len(rest) > 0; {
		next := filepath.Join(dir, rest[0]) // dir has no links in it, so ".." is the folder above
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

// splitPath returns the segments of a path.
func splitPath(path string) []string {
	return strings.FieldsFunc(path, func(r rune) bool { return r == '/' })
}

// checkFile returns the mode of a file. It returns an error unless the file belongs to a trusted user and, if it is a
// folder, other users cannot replace its entries.
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
		return 0, &untrustedError{
			fmt.Sprintf("%s may be written to by others than root (%v): they could put an engine of their own there",
				path, info.Mode()),
		}
	}
	return info.Mode(), nil
}

// checkListener returns nil if the process that listens at the other end belonged to a trusted user when it began to
// listen.
func (o trustedOwners) checkListener(conn *net.UnixConn) error {
	var peer *unix.Ucred
	raw, err := conn.SyscallConn()
	if err == nil {
		controlErr := raw.Control(func(fd uintptr) {
			peer, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		})
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
