package config

import (
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

	"perceptd/agent/grants"
	"perceptd/cmd/perceptd/e2e/harness"
)

func nobodyIn(uint32, []grants.Grant) string { return "" }

// layout is a configuration with a link in config.d, which leads into a folder of its own through another.
type layout struct{ root, conf, config, extra, file, link, behind, target, above string }

func newLayout(t *testing.T) layout {
	t.Helper()
	root := harness.ShortFolder(t)
	at := func(steps ...string) string { return filepath.Join(append([]string{root}, steps...)...) }
	l := layout{
		root: root, conf: at("etc"), config: at("etc", "config.toml"), extra: at("etc", "config.d"), file: at("etc",
			"config.d", "10.toml"),
		link: at("etc", "config.d", "20.toml"), above: at("opt"), behind: at("opt", "shared"), target: at("opt",
			"shared", "20.toml"),
	}
	var faults []error
	for _, folder := range []string{l.conf, l.extra, l.above, l.behind} {
		faults = append(faults, os.Mkdir(folder, 0o700), os.Chmod(folder, 0o755))
	}
	for path, text := range map[string]string{l.config: harness.GoodConfig, l.file: "# 10\n", l.target: "# 20\n"} {
		faults = append(faults, os.WriteFile(path, []byte(text), 0o600), os.Chmod(path, 0o644))
	}
	faults = append(faults, os.Symlink("shared", at("opt", "by")), os.Symlink("../../opt/by/./20.toml", l.link),
		os.Chmod(root, 0o755))
	if err := errors.Join(faults...); err != nil {
		t.Fatal(err)
	}
	return l
}

// load reads it as a process of that user that systemd has not started.
func (l layout) load(self int) (Config, error) {
	return loadTrusted(l.config, &trust{self: self}, nobodyIn)
}

func TestTrustedFiles(t *testing.T) {
	t.Parallel()
	l := newLayout(t)
	c, err := l.load(os.Geteuid())
	if err != nil || len(c.Warnings) != 0 || !slices.Equal(c.Files, []string{l.config, l.file, l.link}) {
		t.Fatalf("%v %v %v", c.Files, c.Warnings, err)
	}
	elsewhere := filepath.Join(l.root, "config.d")
	if err := errors.Join(os.Rename(l.extra, elsewhere), os.Symlink(elsewhere, l.extra)); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Remove(filepath.Join(elsewhere, "20.toml")),
		os.Symlink(l.target, filepath.Join(elsewhere, "20.toml"))); err != nil {
		t.Fatal(err)
	}
	if c, err = l.load(os.Geteuid()); err != nil || len(c.Files) != 3 {
		t.Errorf("config.d is a link: %v %v", c.Files, err)
	}
}

// Each step on the way to what says who gets tokens is looked at: whoever could change one could grant itself tokens.
func TestOthersMayChangeNothing(t *testing.T) {
	t.Parallel()
	for name, of := range map[string]func(l layout) string{
		"config.toml": func(l layout) string { return l.config }, "its folder": func(l layout) string { return l.conf },
		"the folder above":      func(l layout) string { return l.root },
		"config.d":              func(l layout) string { return l.extra },
		"a file there":          func(l layout) string { return l.file },
		"a link's target":       func(l layout) string { return l.target },
		"its target's folder":   func(l layout) string { return l.behind },
		"the folder above that": func(l layout) string { return l.above },
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
		want := fmt.Sprintf("%s: mode %04o lets others change who gets tokens (owner %s): chmod go-w %s", path,
			mode|0o002, userName(uint32(os.Geteuid())), path)
		if _, err := l.load(os.Geteuid()); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s that others may write: %v, want %s", name, err, want)
		}
		// What a group may write is worth a warning, unless somebody is in the group whom it matters of.
		if err := os.Chmod(path, mode|0o020); err != nil {
			t.Fatal(err)
		}
		c, err := l.load(os.Geteuid())
		warning := fmt.Sprintf("%s: mode %04o lets group ", path, mode|0o020)
		if err != nil || len(c.Warnings) != 1 || !strings.HasPrefix(c.Warnings[0], warning) ||
			!strings.Contains(c.Describe(), "warning: "+warning) {
			t.Errorf("%s that a group may write: %v %q", name, err, c.Warnings)
		}
		_, err = loadTrusted(l.config, &trust{self: os.Geteuid()},
			func(uint32, []grants.Grant) string { return "user eve" })
		if err == nil || !strings.Contains(err.Error(), warning) ||
			!strings.Contains(err.Error(), ", and user eve is in it: chmod g-w "+path) {
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
	if c, err := l.load(os.Geteuid()); err != nil || len(c.Warnings) != 0 {
		t.Errorf("on the way: %v %q", err, c.Warnings)
	}
	if err := os.Chmod(l.extra, 0o777|os.ModeSticky); err != nil {
		t.Fatal(err)
	}
	if _, err := l.load(os.Geteuid()); err == nil ||
		!strings.Contains(err.Error(), l.extra+": mode 1777 lets others change who gets tokens") {
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
			if _, err := l.load(self); err == nil ||
				!strings.Contains(err.Error(), path+": its owner, user 4711 (mode ") ||
				!strings.Contains(err.Error(), "chown root "+path) {
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
	for target, says := range map[string]string{"missing.toml": l.link + ": a link to nothing, since missing.toml is " +
		"not there: put it there, or remove the link", "10.toml/x": "not a directory",
		"../config.d": "not a regular file", "../../../../../../../../../../dev/null": "/dev/null: mode 0666 lets " +
			"others"} {
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
	if _, err := l.load(os.Geteuid()); err == nil ||
		!strings.Contains(err.Error(), l.extra+": a link to nothing, since elsewhere is not there") {
		t.Errorf("%v", err)
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
		by   grants.Match
		want string
	}{
		{uint32(os.Getegid()), grants.Match{Module: "m"}, "perceptd itself"},
		{strange, grants.Match{GID: &gid, Group: "g"}, "the caller of the grant for group g"},
		{strange, grants.Match{UID: &uid}, ""},
		{strange, grants.Match{Unit: "a.service"}, ""},
		{strange, grants.Match{UID: &gid}, ""}, // nobody knows that user
	} {
		if got := memberOf(row.gid, []grants.Grant{{Caller: row.by}}); !strings.HasPrefix(got, row.want) ||
			(got == "") != (row.want == "") {
			t.Errorf("group %d, %v: %q, want %q", row.gid, row.by, got, row.want)
		}
	}
	if err == nil && account.Uid != "" && !slices.Contains(groupsOf(uid), uint32(primary)) {
		t.Errorf("user %s is not in its own group: %v", account.Uid, groupsOf(uid))
	}
}
