package config

import (
	endian "encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// list is an access control list as the kernel stores it: tag, permissions and ID of each entry.
func list(entries ...[3]uint32) []byte {
	text := endian.LittleEndian.AppendUint32(nil, 2)
	for _, e := range entries {
		text = endian.LittleEndian.AppendUint16(text, uint16(e[0]))
		text = endian.LittleEndian.AppendUint16(text, uint16(e[1]))
		text = endian.LittleEndian.AppendUint32(text, e[2])
	}
	return text
}

func TestWriters(t *testing.T) {
	t.Parallel()
	const none = 1<<32 - 1
	for name, row := range map[string]struct {
		list          []byte
		users, groups []uint32
	}{
		"no list": {nil, nil, []uint32{7}},
		"a user": {list([3]uint32{1, 6, none}, [3]uint32{2, 6, 11}, [3]uint32{2, 4, 12},
			[3]uint32{4, 4, none}, [3]uint32{16, 6, none}, [3]uint32{32, 4, none}), []uint32{11}, nil},
		"groups": {list([3]uint32{1, 6, none}, [3]uint32{4, 6, none}, [3]uint32{8, 7, 13},
			[3]uint32{8, 5, 14}, [3]uint32{16, 7, none}), nil, []uint32{7, 13}},
		"a mask that takes the writing": {list([3]uint32{2, 6, 11}, [3]uint32{4, 6, none}, [3]uint32{8, 6, 13},
			[3]uint32{16, 4, none}), nil, nil},
		"cut off": {list([3]uint32{2, 6, 11}, [3]uint32{8, 6, 13})[:13], []uint32{11}, nil},
	} {
		if users, groups := writers(row.list, 7); !slices.Equal(users, row.users) || !slices.Equal(groups, row.groups) {
			t.Errorf("%s: users %v, groups %v", name, users, groups)
		}
	}
}

func TestAccessLists(t *testing.T) {
	t.Parallel()
	l := newLayout(t)
	const none = 1<<32 - 1
	entries := func(more [3]uint32) []byte {
		all := [][3]uint32{{1, 6, none}, more, {4, 4, none}, {16, 6, none}, {32, 4, none}}
		slices.SortFunc(all, func(a, b [3]uint32) int { return int(a[0]) - int(b[0]) })
		return list(all...)
	}
	err := unix.Setxattr(l.file, "system.posix_acl_access", entries([3]uint32{2, 6, 4711}), 0)
	if errors.Is(err, unix.EOPNOTSUPP) {
		return // nor can anybody else set one there
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.load(os.Geteuid()); err == nil ||
		!strings.Contains(err.Error(), l.file+": an access control list lets user 4711 change who gets tokens") {
		t.Errorf("a user by an access control list: %v", err)
	}
	if err := unix.Setxattr(l.file, "system.posix_acl_access", entries([3]uint32{8, 6, 4712}), 0); err != nil {
		t.Fatal(err)
	}
	if c, err := l.load(os.Geteuid()); err != nil || len(c.Warnings) != 1 ||
		!strings.Contains(c.Warnings[0], "lets group 4712 ") {
		t.Errorf("a group by an access control list: %v %q", err, c.Warnings)
	}
}

func TestMay(t *testing.T) {
	t.Parallel()
	const none = 1<<32 - 1
	r := &reader{name: "service", uid: 11, groups: []uint32{7, 13}}
	ours := func(mode uint32) unix.Stat_t { return unix.Stat_t{Uid: 11, Gid: 7, Mode: mode} }
	member := func(mode uint32) unix.Stat_t { return unix.Stat_t{Uid: 1, Gid: 7, Mode: mode} }
	other := func(mode uint32) unix.Stat_t { return unix.Stat_t{Uid: 1, Gid: 8, Mode: mode} }
	for name, row := range map[string]struct {
		list []byte
		st   unix.Stat_t
		want uint16
	}{
		"the owner, though others may more": {nil, ours(0o477), 4},
		"a member, though others may more":  {nil, member(0o647), 4},
		"another":                           {nil, other(0o764), 4},
		"another, nothing":                  {nil, other(0o770), 0},
		"a named user": {list([3]uint32{1, 6, none}, [3]uint32{2, 5, 11},
			[3]uint32{4, 0, none}, [3]uint32{16, 7, none}, [3]uint32{32, 0, none}), member(0o670), 5},
		"a named user whom the mask leaves less": {list([3]uint32{2, 5, 11}, [3]uint32{4, 0, none},
			[3]uint32{16, 1, none}), other(0o617), 1},
		"another named user": {list([3]uint32{2, 7, 12}, [3]uint32{4, 0, none},
			[3]uint32{16, 7, none}), other(0o674), 4},
		"a named group": {list([3]uint32{4, 0, none}, [3]uint32{8, 4, 13},
			[3]uint32{16, 7, none}), other(0o670), 4},
		"a group that may nothing": {list([3]uint32{4, 0, none}, [3]uint32{8, 4, 14},
			[3]uint32{16, 7, none}), member(0o677), 0},
		"the owner, with a list": {list([3]uint32{2, 7, 11}, [3]uint32{16, 7, none}), ours(0o470), 4},
		"cut off":                {list([3]uint32{4, 7, none})[:9], other(0o670), 0},
	} {
		if got := r.may(row.list, row.st); got != row.want {
			t.Errorf("%s: %o, want %o", name, got, row.want)
		}
	}
}

// What the service's user cannot read is found by another who can, with what mends it.
func TestReadableByTheService(t *testing.T) {
	t.Parallel()
	own := uint32(os.Getegid())
	for name, row := range map[string]struct {
		of     func(l layout) string
		mode   os.FileMode
		groups []uint32
		says   string // beside the path; empty: it is readable
	}{
		"as it should be": {func(l layout) string { return l.config }, 0o644, nil, ""},
		"root's alone":    {func(l layout) string { return l.config }, 0o600, nil, "cannot read it"},
		"the group's":     {func(l layout) string { return l.config }, 0o640, []uint32{own}, ""},
		"another group's": {func(l layout) string { return l.config }, 0o640, []uint32{own + 1},
			"cannot read it"},
		"one in config.d": {func(l layout) string { return l.file }, 0o600, nil, "cannot read it"},
		"a link's target": {func(l layout) string { return l.target }, 0o600, nil, "cannot read it"},
		"its folder":      {func(l layout) string { return l.conf }, 0o700, nil, "cannot look into it"},
		"the folder of a link's target": {func(l layout) string { return l.behind }, 0o700, nil,
			"cannot look into it"},
		"config.d, which can be passed":  {func(l layout) string { return l.extra }, 0o711, nil, "cannot look into it"},
		"a folder that need not be read": {func(l layout) string { return l.conf }, 0o711, nil, ""},
	} {
		l := newLayout(t)
		path := row.of(l)
		if err := os.Chmod(path, row.mode); err != nil {
			t.Fatal(err)
		}
		service := &reader{name: "service", uid: 4_000_000_017, groups: row.groups}
		c, err := loadTrusted(l.config, &trust{self: os.Geteuid(), reader: service}, nobodyIn)
		if row.says == "" {
			if err != nil || len(c.Files) != 3 {
				t.Errorf("%s: %v %v", name, c.Files, err)
			}
			continue
		}
		mend := "chmod 644 "
		if strings.Contains(row.says, "look") {
			mend = "chmod 755 "
		}
		owner, group := userName(uint32(os.Geteuid())), groupName(own)
		want := fmt.Sprintf("%s: permission denied: user service %s (owner %s, group %s, mode %04o): %s%s", path,
			row.says, owner, group, row.mode, mend, path)
		if !errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", name, err, want)
		}
	}
}
