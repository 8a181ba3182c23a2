package config

import (
	"fmt"
	"os/user"
	"regexp"
	"strconv"
)

// usual is a name that useradd takes as it is, and a shell as well.
var usual = regexp.MustCompile(`^[a-z_][a-z0-9_-]*$`)

// making names the command that makes a user or group of a usual name, in brackets; empty: the name is not one.
func making(program, name string) string {
	if !usual.MatchString(name) {
		return ""
	}
	return " (" + program + " --system " + name + ")"
}

func uidOf(name string) (uint32, error) {
	account, err := user.Lookup(name)
	if err != nil {
		return 0, fmt.Errorf("user %q is not known on this device: create it%s, or name a uid", name,
			making("useradd", name))
	}
	uid, err := strconv.ParseUint(account.Uid, 10, 32)
	if err != nil {
		return 0, fmt.Errorf("user %q has uid %q, which is no number", name, account.Uid)
	}
	return uint32(uid), nil
}

func gidOf(name string) (uint32, error) {
	group, err := user.LookupGroup(name)
	if err != nil {
		return 0, fmt.Errorf("group %q is not known on this device: create it%s, or name a gid", name,
			making("groupadd", name))
	}
	gid, err := strconv.ParseUint(group.Gid, 10, 32)
	if err != nil {
		return 0, fmt.Errorf("group %q has gid %q, which is no number", name, group.Gid)
	}
	return uint32(gid), nil
}

// groupsOf returns the groups of a user, by the device's own files; none of one that is not there.
func groupsOf(uid uint32) (groups []uint32) {
	account, err := user.LookupId(strconv.FormatUint(uint64(uid), 10))
	if err != nil {
		return nil
	}
	all, _ := account.GroupIds()
	for _, text := range append(all, account.Gid) {
		if gid, err := strconv.ParseUint(text, 10, 32); err == nil {
			groups = append(groups, uint32(gid))
		}
	}
	return groups
}

func userName(uid uint32) string {
	id := strconv.FormatUint(uint64(uid), 10)
	if account, err := user.LookupId(id); err == nil {
		return account.Username
	}
	return id
}

func groupName(gid uint32) string {
	id := strconv.FormatUint(uint64(gid), 10)
	if group, err := user.LookupGroupId(id); err == nil {
		return group.Name
	}
	return id
}
