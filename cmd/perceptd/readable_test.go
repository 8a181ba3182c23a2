package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

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
		"the owner, though others may more":      {nil, ours(0o477), 4},
		"a member, though others may more":       {nil, member(0o647), 4},
		"another":                                {nil, other(0o764), 4},
		"another, nothing":                       {nil, other(0o770), 0},
		"a named user":                           {list([3]uint32{1, 6, none}, [3]uint32{2, 5, 11}, [3]uint32{4, 0, none}, [3]uint32{16, 7, none}, [3]uint32{32, 0, none}), member(0o670), 5},
		"a named user whom the mask leaves less": {list([3]uint32{2, 5, 11}, [3]uint32{4, 0, none}, [3]uint32{16, 1, none}), other(0o617), 1},
		"another named user":                     {list([3]uint32{2, 7, 12}, [3]uint32{4, 0, none}, [3]uint32{16, 7, none}), other(0o674), 4},
		"a named group":                          {list([3]uint32{4, 0, none}, [3]uint32{8, 4, 13}, [3]uint32{16, 7, none}), other(0o670), 4},
		"a group that may nothing":               {list([3]uint32{4, 0, none}, [3]uint32{8, 4, 14}, [3]uint32{16, 7, none}), member(0o677), 0},
		"the owner, with a list":                 {list([3]uint32{2, 7, 11}, [3]uint32{16, 7, none}), ours(0o470), 4},
		"cut off":                                {list([3]uint32{4, 7, none})[:9], other(0o670), 0},
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
		"as it should be":                {func(l layout) string { return l.config }, 0o644, nil, ""},
		"root's alone":                   {func(l layout) string { return l.config }, 0o600, nil, "cannot read it"},
		"the group's":                    {func(l layout) string { return l.config }, 0o640, []uint32{own}, ""},
		"another group's":                {func(l layout) string { return l.config }, 0o640, []uint32{own + 1}, "cannot read it"},
		"one in config.d":                {func(l layout) string { return l.file }, 0o600, nil, "cannot read it"},
		"a link's target":                {func(l layout) string { return l.target }, 0o600, nil, "cannot read it"},
		"its folder":                     {func(l layout) string { return l.conf }, 0o700, nil, "cannot look into it"},
		"the folder of a link's target":  {func(l layout) string { return l.behind }, 0o700, nil, "cannot look into it"},
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
			if err != nil || len(c.files) != 3 {
				t.Errorf("%s: %v %v", name, c.files, err)
			}
			continue
		}
		mend := "chmod 644 "
		if strings.Contains(row.says, "look") {
			mend = "chmod 755 "
		}
		owner, group := userName(uint32(os.Geteuid())), groupName(own)
		want := fmt.Sprintf("%s: permission denied: user service %s (owner %s, group %s, mode %04o): %s%s", path, row.says, owner, group, row.mode, mend, path)
		if !errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", name, err, want)
		}
	}
}

// withService runs perceptd on a device that has the service's user.
func withService(t *testing.T, args ...string) (said string, status int) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: the device gets another /etc/passwd")
	}
	text, err := os.ReadFile("/etc/passwd")
	if err != nil {
		t.Fatal(err)
	}
	text = append([]byte(serviceUser+":x:4711:4712::/:/bin/false\n"), text...)
	passwd := filepath.Join(t.TempDir(), "passwd")
	if err := os.WriteFile(passwd, text, 0o644); err != nil {
		t.Fatal(err)
	}
	c := exec.Command("/bin/sh", append([]string{"-c", `mount --bind "$0" /etc/passwd && exec "$@"`, passwd, binary(t, "perceptd")}, args...)...)
	c.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	out, _ := c.CombinedOutput()
	return string(out), c.ProcessState.ExitCode()
}

// Root's --check finds what the daemon will find, which is another user, and says for whom it looked.
func TestCheckIsForTheService(t *testing.T) {
	t.Parallel()
	config := write(t, map[string]string{"config.toml": goodConfig, "config.d/10.toml": ""})
	const by = "user percept, whom perceptd.service runs as"
	if said, status := withService(t, "--check", "--config", config); status != exitOK || !strings.Contains(said, "checked for "+by+"\n") {
		t.Errorf("as it should be: %d %s", status, said)
	}
	extra := filepath.Join(filepath.Dir(config), "config.d")
	if err := os.Chmod(extra, 0o775); err != nil {
		t.Fatal(err)
	}
	if said, status := withService(t, "--check", "--config", config); status != exitOK || !strings.Contains(said, "warning: "+extra+": mode 0775 lets group root ") {
		t.Errorf("open to root's group: %d %s", status, said)
	}
	if err := os.Chown(extra, 0, 4712); err != nil {
		t.Fatal(err)
	}
	if said, status := withService(t, "--check", "--config", config); status != exitConfig || !strings.Contains(said, "and the service's user percept is in it: chmod g-w "+extra) {
		t.Errorf("open to the service's group: %d %s", status, said)
	}
	if err := errors.Join(os.Chmod(extra, 0o755), os.Chmod(config, 0o600)); err != nil {
		t.Fatal(err)
	}
	said, status := withService(t, "--check", "--config", config)
	if status != exitConfig || !strings.HasPrefix(said, "perceptd: the configuration is not usable by "+by+":\n") || !strings.Contains(said, "chmod 644 "+config+"\n") {
		t.Errorf("root's alone: %d %s", status, said)
	}
}

// A daemon that may not read its configuration says what lets it.
func TestUnreadableConfiguration(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("needs root: another user is to read")
	}
	if err := os.Chmod(filepath.Dir(binary(t, "perceptd")), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		file, folder os.FileMode
		says         string
	}{{0o600, 0o755, "cannot read it (owner root, group root, mode 0600): chmod 644 "}, {0o644, 0o700, "cannot look into it (owner root, group root, mode 0700): chmod 755 "}} {
		config := write(t, map[string]string{"config.toml": goodConfig})
		if err := errors.Join(os.Chmod(config, row.file), os.Chmod(filepath.Dir(config), row.folder)); err != nil {
			t.Fatal(err)
		}
		c := exec.Command(binary(t, "perceptd"), "--check", "--config", config)
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		out, _ := c.CombinedOutput()
		if c.ProcessState.ExitCode() != exitConfig || !strings.Contains(string(out), row.says+filepath.Dir(config)) {
			t.Errorf("%s", out)
		}
	}
}
