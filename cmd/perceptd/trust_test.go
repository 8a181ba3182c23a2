package main

import (
	"bytes"
	endian "encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"perceptd/agent"
)

// extraGrant is what a user would like to have in the configuration.
const extraGrant = "[[grant]]\ncaller = { uid = 4711 }\nidentity = \"device\"\nresources = [\"https://vault.azure.net\"]\n"

func nobodyIn(uint32, []agent.Grant) string { return "" }

// layout is a configuration with a link in config.d, which leads into a folder of its own through another.
type layout struct{ root, conf, config, extra, file, link, behind, target, above string }

func newLayout(t *testing.T) layout {
	t.Helper()
	root := shortFolder(t)
	at := func(steps ...string) string { return filepath.Join(append([]string{root}, steps...)...) }
	l := layout{
		root: root, conf: at("etc"), config: at("etc", "config.toml"), extra: at("etc", "config.d"), file: at("etc", "config.d", "10.toml"),
		link: at("etc", "config.d", "20.toml"), above: at("opt"), behind: at("opt", "shared"), target: at("opt", "shared", "20.toml"),
	}
	var faults []error
	for _, folder := range []string{l.conf, l.extra, l.above, l.behind} {
		faults = append(faults, os.Mkdir(folder, 0o700), os.Chmod(folder, 0o755))
	}
	for path, text := range map[string]string{l.config: goodConfig, l.file: "# 10\n", l.target: "# 20\n"} {
		faults = append(faults, os.WriteFile(path, []byte(text), 0o600), os.Chmod(path, 0o644))
	}
	faults = append(faults, os.Symlink("shared", at("opt", "by")), os.Symlink("../../opt/by/./20.toml", l.link), os.Chmod(root, 0o755))
	if err := errors.Join(faults...); err != nil {
		t.Fatal(err)
	}
	return l
}

// load reads it as a process of that user that systemd has not started.
func (l layout) load(self int) (config, error) {
	return loadTrusted(l.config, &trust{self: self}, nobodyIn)
}

func TestTrustedFiles(t *testing.T) {
	t.Parallel()
	l := newLayout(t)
	c, err := l.load(os.Geteuid())
	if err != nil || len(c.warnings) != 0 || !slices.Equal(c.files, []string{l.config, l.file, l.link}) {
		t.Fatalf("%v %v %v", c.files, c.warnings, err)
	}
	elsewhere := filepath.Join(l.root, "config.d")
	if err := errors.Join(os.Rename(l.extra, elsewhere), os.Symlink(elsewhere, l.extra)); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Remove(filepath.Join(elsewhere, "20.toml")), os.Symlink(l.target, filepath.Join(elsewhere, "20.toml"))); err != nil {
		t.Fatal(err)
	}
	if c, err = l.load(os.Geteuid()); err != nil || len(c.files) != 3 {
		t.Errorf("config.d is a link: %v %v", c.files, err)
	}
}

// Each step on the way to what says who gets tokens is looked at: whoever could change one could grant itself tokens.
func TestOthersMayChangeNothing(t *testing.T) {
	t.Parallel()
	for name, of := range map[string]func(l layout) string{
		"config.toml": func(l layout) string { return l.config }, "its folder": func(l layout) string { return l.conf },
		"the folder above": func(l layout) string { return l.root }, "config.d": func(l layout) string { return l.extra },
		"a file there": func(l layout) string { return l.file }, "a link's target": func(l layout) string { return l.target },
		"its target's folder": func(l layout) string { return l.behind }, "the folder above that": func(l layout) string { return l.above },
	} {
		l := newLayout(t)
		path := of(l)
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		mode := info.Mode().Perm()
		if err := os.Chmod(path, mode|0o002); err != nil {
			t.Fatal(err)
		}
		want := fmt.Sprintf("%s: mode %04o lets others change who gets tokens (owner %s): chmod go-w %s", path, mode|0o002, userName(uint32(os.Geteuid())), path)
		if _, err := l.load(os.Geteuid()); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s that others may write: %v, want %s", name, err, want)
		}
		// What a group may write is worth a warning, unless somebody is in the group whom it matters of.
		if err := os.Chmod(path, mode|0o020); err != nil {
			t.Fatal(err)
		}
		c, err := l.load(os.Geteuid())
		warning := fmt.Sprintf("%s: mode %04o lets group ", path, mode|0o020)
		if err != nil || len(c.warnings) != 1 || !strings.HasPrefix(c.warnings[0], warning) || !strings.Contains(c.describe(), "warning: "+warning) {
			t.Errorf("%s that a group may write: %v %q", name, err, c.warnings)
		}
		_, err = loadTrusted(l.config, &trust{self: os.Geteuid()}, func(uint32, []agent.Grant) string { return "user eve" })
		if err == nil || !strings.Contains(err.Error(), warning) || !strings.Contains(err.Error(), ", and user eve is in it: chmod g-w "+path) {
			t.Errorf("%s that the group of a caller may write: %v", name, err)
		}
	}
}

// In a sticky folder such as /tmp nobody can replace what is another's, but anybody can add a file.
func TestStickyFolders(t *testing.T) {
	t.Parallel()
	l := newLayout(t)
	if err := errors.Join(os.Chmod(l.root, 0o777|os.ModeSticky), os.Chmod(l.behind, 0o777|os.ModeSticky)); err != nil {
		t.Fatal(err)
	}
	if c, err := l.load(os.Geteuid()); err != nil || len(c.warnings) != 0 {
		t.Errorf("on the way: %v %q", err, c.warnings)
	}
	if err := os.Chmod(l.extra, 0o777|os.ModeSticky); err != nil {
		t.Fatal(err)
	}
	if _, err := l.load(os.Geteuid()); err == nil || !strings.Contains(err.Error(), l.extra+": mode 1777 lets others change who gets tokens") {
		t.Errorf("config.d: %v", err)
	}
}

func TestOwnersOfTheConfiguration(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		return // only root can give files away
	}
	for name, of := range map[string]func(l layout) string{
		"config.toml": func(l layout) string { return l.config }, "its folder": func(l layout) string { return l.conf },
		"config.d": func(l layout) string { return l.extra }, "a file there": func(l layout) string { return l.file },
		"a link": func(l layout) string { return l.link }, "a link's target": func(l layout) string { return l.target },
		"its target's folder": func(l layout) string { return l.behind },
	} {
		l := newLayout(t)
		path := of(l)
		if err := os.Lchown(path, 4711, -1); err != nil {
			t.Fatal(err)
		}
		for _, self := range []int{0, 4712} {
			if _, err := l.load(self); err == nil || !strings.Contains(err.Error(), path+": its owner, user 4711 (mode ") || !strings.Contains(err.Error(), "chown root "+path) {
				t.Errorf("%s is another user's: %v", name, err)
			}
		}
		if _, err := l.load(4711); err != nil { // by hand: root's or that user's
			t.Errorf("%s is the user's own: %v", name, err)
		}
	}
}

func TestLinksWithoutEnd(t *testing.T) {
	t.Parallel()
	l := newLayout(t)
	if err := errors.Join(os.Remove(l.link), os.Symlink("20.toml", l.link)); err != nil {
		t.Fatal(err)
	}
	if _, err := l.load(os.Geteuid()); !errors.Is(err, unix.ELOOP) {
		t.Errorf("%v", err)
	}
	for target, says := range map[string]string{"missing.toml": l.link + ": a link to nothing, since missing.toml is not there: put it there, or remove the link", "10.toml/x": "not a directory", "../config.d": "not a regular file", "../../../../../../../../../../dev/null": "/dev/null: mode 0666 lets others"} {
		if err := errors.Join(os.Remove(l.link), os.Symlink(target, l.link)); err != nil {
			t.Fatal(err)
		}
		if _, err := l.load(os.Geteuid()); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("a link to %s: %v, want %s", target, err, says)
		}
	}
}

// A config.d that leads nowhere is not the same as none: what should stand there would be missing.
func TestFolderThatLeadsNowhere(t *testing.T) {
	t.Parallel()
	l := newLayout(t)
	if err := errors.Join(os.RemoveAll(l.extra), os.Symlink("elsewhere", l.extra)); err != nil {
		t.Fatal(err)
	}
	if _, err := l.load(os.Geteuid()); err == nil || !strings.Contains(err.Error(), l.extra+": a link to nothing, since elsewhere is not there") {
		t.Errorf("%v", err)
	}
}

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
		"no list":                       {nil, nil, []uint32{7}},
		"a user":                        {list([3]uint32{1, 6, none}, [3]uint32{2, 6, 11}, [3]uint32{2, 4, 12}, [3]uint32{4, 4, none}, [3]uint32{16, 6, none}, [3]uint32{32, 4, none}), []uint32{11}, nil},
		"groups":                        {list([3]uint32{1, 6, none}, [3]uint32{4, 6, none}, [3]uint32{8, 7, 13}, [3]uint32{8, 5, 14}, [3]uint32{16, 7, none}), nil, []uint32{7, 13}},
		"a mask that takes the writing": {list([3]uint32{2, 6, 11}, [3]uint32{4, 6, none}, [3]uint32{8, 6, 13}, [3]uint32{16, 4, none}), nil, nil},
		"cut off":                       {list([3]uint32{2, 6, 11}, [3]uint32{8, 6, 13})[:13], []uint32{11}, nil},
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
	if _, err := l.load(os.Geteuid()); err == nil || !strings.Contains(err.Error(), l.file+": an access control list lets user 4711 change who gets tokens") {
		t.Errorf("a user by an access control list: %v", err)
	}
	if err := unix.Setxattr(l.file, "system.posix_acl_access", entries([3]uint32{8, 6, 4712}), 0); err != nil {
		t.Fatal(err)
	}
	if c, err := l.load(os.Geteuid()); err != nil || len(c.warnings) != 1 || !strings.Contains(c.warnings[0], "lets group 4712 ") {
		t.Errorf("a group by an access control list: %v %q", err, c.warnings)
	}
}

func TestMemberOf(t *testing.T) {
	t.Parallel()
	account, err := user.LookupId(strconv.Itoa(os.Geteuid()))
	if err != nil {
		account = &user.User{Gid: strconv.Itoa(os.Getegid())}
	}
	primary, err := strconv.ParseUint(account.Gid, 10, 32)
	if err != nil {
		t.Fatal(err)
	}
	const strange = 4_000_000_017
	uid, gid := uint32(os.Geteuid()), uint32(strange)
	for _, row := range []struct {
		gid  uint32
		by   agent.Match
		want string
	}{
		{uint32(os.Getegid()), agent.Match{Module: "m"}, "perceptd itself"},
		{strange, agent.Match{GID: &gid, Group: "g"}, "the caller of the grant for group g"},
		{strange, agent.Match{UID: &uid}, ""},
		{strange, agent.Match{Unit: "a.service"}, ""},
		{strange, agent.Match{UID: &gid}, ""}, // nobody knows that user
	} {
		if got := memberOf(row.gid, []agent.Grant{{Caller: row.by}}); !strings.HasPrefix(got, row.want) || (got == "") != (row.want == "") {
			t.Errorf("group %d, %v: %q, want %q", row.gid, row.by, got, row.want)
		}
	}
	if err == nil && account.Uid != "" && !slices.Contains(groupsOf(uid), uint32(primary)) {
		t.Errorf("user %s is not in its own group: %v", account.Uid, groupsOf(uid))
	}
}

// What a user puts in an open config.d is never in force, and the status says whose fault the refusal is.
func TestOpenConfiguration(t *testing.T) {
	t.Parallel()
	d := launchDaemon(t, simulatedFor())
	extra := filepath.Join(filepath.Dir(d.config), "config.d")
	path := filepath.Join(extra, "mine.toml")
	if err := errors.Join(os.Mkdir(extra, 0o700), os.Chmod(extra, 0o777), os.WriteFile(path, []byte(extraGrant), 0o600), os.Chmod(path, 0o644)); err != nil {
		t.Fatal(err)
	}
	if status, body := d.reload(t, simulatedFor()); status == 200 || !strings.Contains(body, "config.d: mode 0777 lets others change who gets tokens") {
		t.Errorf("%d %s", status, body)
	}
	if _, err := os.Stat(path); err != nil || strings.Contains(strings.Join(d.status(t).Config.Files, " "), "mine.toml") {
		t.Errorf("in force: %v %v", d.status(t).Config.Files, err)
	}
	var out, errs bytes.Buffer
	if status := run(t.Context(), []string{"--check", "--config", d.config}, &out, &errs); status != exitConfig || !strings.Contains(errs.String(), "config.d: mode 0777") {
		t.Errorf("--check: %d %s", status, errs.String())
	}
	if os.Getuid() != 0 {
		return // only root can give a folder to a group that it is not in
	}
	if err := errors.Join(os.Chown(extra, 0, 4712), os.Chmod(extra, 0o775)); err != nil {
		t.Fatal(err)
	}
	if status, body := d.reload(t, simulatedFor()); status != 200 {
		t.Errorf("%d %s", status, body)
	}
	warning := extra + ": mode 0775 lets group 4712 change who gets tokens"
	if status, body := d.reload(t, simulatedFor()); status != 200 || !strings.Contains(body, `"warnings":["`+warning) {
		t.Errorf("%d %s", status, body)
	}
	if trouble := strings.Join(d.status(t).Trouble, "\n"); !strings.Contains(trouble, warning) || !strings.Contains(d.text(), warning) {
		t.Errorf("trouble %q", trouble)
	}
	d.rewrite(t, simulatedFor()+strings.Replace(extraGrant, "uid = 4711", "gid = 4712", 1))
	if status, body, _ := d.ask(d.admin(), "POST", "/v1/reload", ""); status == 200 || !strings.Contains(body, "the caller of the grant for gid 4712 is in it") {
		t.Errorf("the group of a caller may write: %d %s", status, body)
	}
	// What stood in the earlier configuration's warnings is now the fault, and is told once.
	if trouble := d.status(t).Trouble; len(trouble) != 1 || !strings.Contains(trouble[0], "the last reload changed nothing") {
		t.Errorf("trouble %q", trouble)
	}
}

// A key in a folder where others could put theirs is none, which costs nobody a token.
func TestOpenFolderOfTheKey(t *testing.T) {
	t.Parallel()
	d := newFolder(t, simulatedFor())
	open := filepath.Join(d.dir, "open")
	key := filepath.Join(open, "cache-key")
	if err := errors.Join(os.Mkdir(open, 0o700), os.Chmod(open, 0o777), os.WriteFile(key, bytes.Repeat([]byte("k"), 32), 0o600)); err != nil {
		t.Fatal(err)
	}
	d.process = launch(t, nil, "perceptd", append(d.arguments(), "--cache-key", key)...)
	d.awaitHealth(t)
	if trouble := d.status(t).Trouble; len(trouble) != 1 || !strings.Contains(trouble[0], open+": mode 0777 lets others change the key of the kept tokens") {
		t.Errorf("trouble %q", trouble)
	}
	if status, _, err := d.get(d.token(), vaultToken); err != nil || status != 200 {
		t.Errorf("%d %v", status, err)
	}
}
