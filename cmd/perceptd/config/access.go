package config

import (
	endian "encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"
)

// accessList returns a file's access control list as the kernel stores it; nil: it has none.
func accessList(there *os.File) ([]byte, error) {
	list := make([]byte, 64<<10) // the most that the kernel keeps
	n, err := unix.Getxattr("/proc/self/fd/"+strconv.Itoa(int(there.Fd())), "system.posix_acl_access", list)
	switch {
	case errors.Is(err, unix.ENODATA), errors.Is(err, unix.EOPNOTSUPP):
		return nil, nil
	case err != nil:
		return nil, err
	}
	return list[:n], nil
}

// What the entries of an access control list are for (linux/posix_acl.h).
const (
	aclUser        = 0x02
	aclOwningGroup = 0x04
	aclGroup       = 0x08
	aclMask        = 0x10
	aclWrite       = 2
)

// writers returns which named users and which groups a list lets write: without a list the owning group, for which the
// mode has a bit then.
func writers(list []byte, owningGroup uint32) (users, groups []uint32) {
	const head, size = 4, 8
	if len(list) < head {
		return nil, []uint32{owningGroup}
	}
	mask := uint16(aclWrite)
	for rest := list[head:]; len(rest) >= size; rest = rest[size:] {
		if endian.LittleEndian.Uint16(rest) == aclMask {
			mask = endian.LittleEndian.Uint16(rest[2:])
		}
	}
	for rest := list[head:]; len(rest) >= size; rest = rest[size:] {
		if endian.LittleEndian.Uint16(rest[2:])&mask&aclWrite == 0 {
			continue
		}
		switch id := endian.LittleEndian.Uint32(rest[4:]); endian.LittleEndian.Uint16(rest) {
		case aclUser:
			users = append(users, id)
		case aclOwningGroup:
			groups = append(groups, owningGroup)
		case aclGroup:
			groups = append(groups, id)
		}
	}
	return users, groups
}

// serviceUser is whom perceptd.service runs as.
const serviceUser = "percept"

// reader is a user who is to read the configuration, while another looks whether it can.
type reader struct {
	name   string
	uid    uint32
	groups []uint32
}

// serviceReader returns the service's user; nil: the device has none.
func serviceReader() *reader {
	account, err := user.Lookup(serviceUser)
	if err != nil {
		return nil
	}
	uid, err := strconv.ParseUint(account.Uid, 10, 32)
	if err != nil {
		return nil
	}
	return &reader{name: serviceUser, uid: uint32(uid), groups: groupsOf(uint32(uid))}
}

func (r *reader) isIn(gid uint32) bool { return slices.Contains(r.groups, gid) }

// What a mode or an entry of an access control list lets do.
const (
	mayRead   = 4
	maySearch = 1
)

// checkAccess refuses a file that r cannot read, and a folder that r cannot go through. A nil reader can all.
func (r *reader) checkAccess(there *os.File, st unix.Stat_t, secret bool) error {
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return r.check(there, st, maySearch, secret)
	case unix.S_IFREG:
		return r.check(there, st, mayRead, secret)
	}
	return nil
}

// checkListing refuses a folder that r cannot list.
func (r *reader) checkListing(folder *os.File, st unix.Stat_t) error {
	return r.check(folder, st, mayRead|maySearch, false)
}

func (r *reader) check(there *os.File, st unix.Stat_t, need uint16, secret bool) error {
	if r == nil || r.uid == 0 {
		return nil
	}
	list, err := accessList(there)
	if err != nil {
		return fmt.Errorf("%s: its access control list cannot be read: %w", there.Name(), err)
	}
	if r.may(list, st)&need == need {
		return nil
	}
	return unreadable(there.Name(), st, r.name, r.groups, secret)
}

// may returns what a file's mode and list let r do, as the kernel decides it (acl(5)): by the first that is about r of
// the owner, a named user, the groups, and the others.
func (r *reader) may(list []byte, st unix.Stat_t) uint16 {
	mode := uint16(st.Mode)
	if r.uid == st.Uid {
		return mode >> 6 & 7
	}
	const head, size = 4, 8
	if len(list) < head {
		if r.isIn(st.Gid) {
			return mode >> 3 & 7
		}
		return mode & 7
	}
	mask := mode >> 3 & 7 // with a list the group's bits are its mask
	isMember, byGroup := false, uint16(0)
	for rest := list[head:]; len(rest) >= size; rest = rest[size:] {
		lets, id := endian.LittleEndian.Uint16(rest[2:]), endian.LittleEndian.Uint32(rest[4:])
		switch tag := endian.LittleEndian.Uint16(rest); {
		case tag == aclUser && id == r.uid:
			return lets & mask
		case tag == aclOwningGroup && r.isIn(st.Gid), tag == aclGroup && r.isIn(id):
			isMember, byGroup = true, byGroup|lets
		}
	}
	if isMember {
		return byGroup & mask
	}
	return mode & 7
}

// unreadable says what keeps a user from a file or folder, and what lets it in; of a secret, without letting others in:
// by the first of its groups, which is its own.
func unreadable(path string, st unix.Stat_t, who string, groups []uint32, secret bool) error {
	cannot, mend := "read it", "chmod 644 "+path
	switch {
	case st.Mode&unix.S_IFMT == unix.S_IFDIR:
		cannot, mend = "look into it", "chmod 755 "+path
	case secret:
		group := "GROUP"
		if len(groups) > 0 {
			group = groupName(groups[0])
		}
		mend = fmt.Sprintf("have systemd give it as a credential, or let a group of user %s read it: chgrp %s %s && "+
			"chmod 640 %s", who, group, path, path)
	}
	return fmt.Errorf("%s: %w: user %s cannot %s (owner %s, group %s, mode %04o): %s",
		path, fs.ErrPermission, who, cannot, userName(st.Uid), groupName(st.Gid), st.Mode&0o7777, mend)
}
