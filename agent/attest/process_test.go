package attest

import (
	"os"
	"path/filepath"
	"perceptd/agent/grants"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestParseStartTime(t *testing.T) {
	t.Parallel()
	own, err := kernel{proc: "/proc"}.readFile(int32(os.Getpid()), "stat")
	if err != nil {
		t.Fatal(err)
	}
	if got, err := parseStartTime(own); err != nil || got <= 0 || got > sinceBoot() {
		t.Errorf("this process has started at %v of %v, %v", got, sinceBoot(), err)
	}
	fields := " S 1" + strings.Repeat(" 0", 17)
	for _, row := range []struct {
		name, stat string
		want       time.Duration
		wrong      bool
	}{
		{"usual", "7 (cat)" + fields + " 250 0 0\n", 2500 * time.Millisecond, false},
		{"a name with parentheses and numbers",
			"7 (x) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 1 9)" + fields + " 250 0\n",
			2500 * time.Millisecond, false},
		{"a name with a line in it", "7 (a\nb) R)" + fields + " 1 0\n", tick, false},
		{"no name", "7 cat" + fields + " 250\n", 0, true},
		{"short", "7 (cat)" + fields, 0, true},
		{"negative", "7 (cat)" + fields + " -1\n", 0, true},
		{"too long", "7 (cat)" + fields + " 9223372036854775807\n", 0, true},
		{"no number", "7 (cat)" + fields + " x\n", 0, true},
		{"nothing", "", 0, true},
	} {
		got, err := parseStartTime(row.stat)
		if got != row.want || (err != nil) != row.wrong {
			t.Errorf("%s: %v, %v", row.name, got, err)
		}
	}
}

func FuzzParseStartTime(f *testing.F) {
	f.Add("7 (cat) S 1" + strings.Repeat(" 0", 17) + " 250 0 0\n")
	f.Add("7 (a) b) S 1" + strings.Repeat(" 0", 17) + " 9223372036854775807")
	f.Fuzz(func(t *testing.T, stat string) {
		if got, err := parseStartTime(stat); err == nil && (got < 0 || got%tick != 0) {
			t.Errorf("%q: %v", stat, got)
		}
	})
}

func TestRunsAs(t *testing.T) {
	t.Parallel()
	const status = "Name:\tUid:\t7\nUmask:\t0022\nUid:\t1000\t1001\t1002\t1003\nGid:\t5\t5\t5\t5\n"
	for uid, want := range map[uint32]bool{
		1000: true, 1001: true, 1002: true, 1003: true, 7: false, 5: false, 100: false,
	} {
		if got := runsAs(status, uid); got != want {
			t.Errorf("uid %d: %v", uid, got)
		}
	}
	if runsAs("", 0) || runsAs("Uid:\n", 0) {
		t.Error("nobody runs as root")
	}
}

func TestIsInChildNamespace(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		status      string
		want, wrong bool
	}{
		{"Name:\tx\nNStgid:\t7\nNSpid:\t7\nNSpgid:\t7\t1\n", false, false},
		{"Name:\tx\nNStgid:\t7\t1\nNSpid:\t7\t1\n", true, false},
		{"Name:\tx\nNSpid:\t7\t12\t1\n", true, false},
		{"Name:\tNSpid:\t7\nNSpid:\t7\t1\n", true, false},
		{"Name:\tNSpid:\t7\t1\nNSpid:\t7\n", false, false},
		{"Name:\tx\nNSpid:\n", false, true},
		{"Name:\tx\nNSpid:", false, true},
		{"Name:\tx\n", false, false}, // a kernel without pid namespaces
	} {
		if got, err := isInChildNamespace(row.status); got != row.want || (err != nil) != row.wrong {
			t.Errorf("%q: %v, %v", row.status, got, err)
		}
	}
}

func FuzzIsInChildNamespace(f *testing.F) {
	f.Add("Name:\tx\nNSpid:\t7\t1\n")
	f.Add("Name:\tNSpid:\t1\t1\nNSpid:\t7\n")
	f.Fuzz(func(t *testing.T, status string) {
		if many, err := isInChildNamespace(status); many && (err != nil || !strings.Contains(status, "NSpid:")) {
			t.Errorf("%q: %v", status, err)
		}
	})
}

func FuzzRunsAs(f *testing.F) {
	f.Add("Name:\tx\nUid:\t1000\t1001\t1002\t1003\n", uint32(1000))
	f.Fuzz(func(t *testing.T, status string, uid uint32) {
		if runsAs(status, uid) && !strings.Contains(status, "Uid:") {
			t.Errorf("%q runs as %d", status, uid)
		}
	})
}

// A process's name, which it chooses itself, does not add lines to the files that are read of it.
func TestForgedName(t *testing.T) {
	t.Parallel()
	k := kernel{proc: "/proc"}
	s := &fixture{t: t}
	s.open(Options{})
	a := s.start("forged")
	a.done()
	stat, err := k.readFile(int32(a.cmd.Process.Pid), "stat")
	if err != nil || !strings.Contains(stat, "(x) 1 1 1") {
		t.Fatalf("%q, %v", stat, err)
	}
	if got, err := parseStartTime(stat); err != nil || got > sinceBoot() || got == 0 {
		t.Errorf("%v, %v", got, err)
	}
	status, err := k.readFile(int32(a.cmd.Process.Pid), "status")
	if err != nil || runsAs(status, 4242) {
		t.Errorf("%q, %v", status, err)
	}
}

func TestManyGroups(t *testing.T) {
	t.Parallel()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[0])
	defer unix.Close(pair[1])
	if _, err := peerGroups(pair[0]); err != nil {
		t.Error(err)
	}
	if _, err := peerGroups(-1); err == nil {
		t.Error("no socket has groups")
	}
	if os.Getuid() != 0 {
		t.Skip("taking more groups needs root")
	}
	s := &fixture{t: t}
	s.open(Options{})
	a := s.start("grouped")
	a.done()
	attestation, _ := s.accept(Socket{})
	if seen, err := attestation.Unconfirmed(); err != nil || len(seen.Groups) != 100 || seen.Groups[99] != 1099 {
		t.Errorf("%+v, %v", seen.Groups, err)
	}
}

func TestCheckCredentials(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name, want string
		peer       unix.Ucred
	}{
		{"a user", "", unix.Ucred{Uid: 1000, Gid: 1000, Pid: 7}},
		{"root", "", unix.Ucred{Pid: 1}},
		{"outside the pid namespace, looking like root", "pid namespace", unix.Ucred{}},
		{"outside the pid namespace", "pid namespace", unix.Ucred{Uid: 1000, Gid: 1000}},
		{"a negative pid", "pid namespace", unix.Ucred{Uid: 1000, Gid: 1000, Pid: -1}},
		{"no uid", "no uid", unix.Ucred{Uid: grants.NoID, Gid: 1000, Pid: 7}},
		{"no gid", "no uid or gid", unix.Ucred{Uid: 1000, Gid: grants.NoID, Pid: 7}},
	} {
		err := kernel{overflow: overflowIDs{grants.NoID, grants.NoID}}.checkCredentials(&row.peer)
		if (err == nil) != (row.want == "") || err != nil && !strings.Contains(err.Error(), row.want) {
			t.Errorf("%s: error %v, want %q", row.name, err, row.want)
		}
	}
}

// In a user namespace all users that are not mapped look like nobody. They are not taken for the user nobody.
func TestOverflowIDs(t *testing.T) {
	t.Parallel()
	const whole, part = "0 0 4294967295\n", "0 0 1\n988 988 1\n"
	for _, row := range []struct {
		name, uids, gids, overflow string
		want                       overflowIDs
	}{
		{"the device itself", whole, whole, "", overflowIDs{grants.NoID, grants.NoID}},
		{"a user namespace", part, part, "", overflowIDs{65534, 65534}},
		{"another overflow", part, part, "65533\n", overflowIDs{65533, 65533}},
		{"no number", part, part, "many\n", overflowIDs{65534, 65534}},
		{"groups alone", whole, part, "", overflowIDs{grants.NoID, 65534}},
		{"maps that cannot be read", "", "", "", overflowIDs{65534, 65534}},
	} {
		proc := t.TempDir()
		for file, text := range map[string]string{
			"self/uid_map": row.uids, "self/gid_map": row.gids,
			"sys/kernel/overflowuid": row.overflow, "sys/kernel/overflowgid": row.overflow,
		} {
			if text == "" {
				continue
			}
			if err := os.MkdirAll(filepath.Join(proc, filepath.Dir(file)), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(proc, file), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		k := kernel{proc: proc}
		k.overflow = k.readOverflowIDs()
		if k.overflow != row.want {
			t.Errorf("%s: %+v, want %+v", row.name, k.overflow, row.want)
		}
		for _, peer := range []unix.Ucred{
			{Uid: row.want.uid, Gid: 988, Pid: 7}, {Uid: 988, Gid: row.want.gid, Pid: 7},
		} {
			if err := k.checkCredentials(&peer); err == nil {
				t.Errorf("%s: %+v is let pass", row.name, peer)
			}
		}
		if err := k.checkCredentials(&unix.Ucred{Uid: 988, Gid: 988, Pid: 7}); err != nil {
			t.Errorf("%s: %v", row.name, err)
		}
	}
}
