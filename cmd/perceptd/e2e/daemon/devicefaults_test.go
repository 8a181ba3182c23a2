package daemon

import (
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"perceptd/agent/api"
	"perceptd/cmd/perceptd/e2e/harness"
)

// deviceFault is something that goes wrong on the device.
type deviceFault struct {
	name   string
	before func(t *testing.T, d *harness.Daemon) // the start; nil: nothing is wrong yet
	during func(t *testing.T, d *harness.Daemon) // while it runs; nil: nothing more
	after  func(t *testing.T, d *harness.Daemon) // it is over; nil: it never was for long
	says   string                                // in the status, or in the log
	lasts  bool                                  // until another start
}

// smallDisk has the state folder be a file system of its own, with room for some files.
func smallDisk(t *testing.T, d *harness.Daemon) {
	t.Helper()
	must(t, os.MkdirAll(d.StateDir(), 0o700))
	must(t, unix.Mount("none", d.StateDir(), "tmpfs", 0, "size=64k,mode=0700"))
	t.Cleanup(func() { _ = unix.Unmount(d.StateDir(), unix.MNT_DETACH) })
}

func fill(t *testing.T, d *harness.Daemon) {
	t.Helper()
	f, err := os.Create(filepath.Join(d.StateDir(), "filler"))
	must(t, err)
	defer f.Close()
	for err == nil {
		_, err = f.Write(make([]byte, 4096))
	}
}

func empty(t *testing.T, d *harness.Daemon) {
	t.Helper()
	must(t, os.Remove(filepath.Join(d.StateDir(), "filler")))
}

func remount(flags uintptr) func(*testing.T, *harness.Daemon) {
	return func(t *testing.T, d *harness.Daemon) {
		t.Helper()
		must(t, unix.Mount("none", d.StateDir(), "tmpfs", unix.MS_REMOUNT|flags, "size=64k"))
	}
}

// left has the file be there when the daemon starts, as somebody else or a fault has left it.
func left(text string) func(*testing.T, *harness.Daemon) {
	return func(t *testing.T, d *harness.Daemon) {
		t.Helper()
		must(t, os.MkdirAll(d.StateDir(), 0o700))
		must(t, os.WriteFile(d.SealedFile(), []byte(text), 0o600))
		// as each start leaves it
		must(t, os.WriteFile(recordFiles(d)[0], []byte(`{"version":3,"boot_id":"","generation":0,"changes":[]}`),
			0o600))
	}
}

// takeAway removes the state folder in one step, since files are written to it meanwhile.
func takeAway(t *testing.T, d *harness.Daemon) {
	t.Helper()
	gone := d.StateDir() + ".gone"
	must(t, os.Rename(d.StateDir(), gone))
	// a save may have begun in it
	harness.Until(t, "the state folder to be empty", d.Ended, func() bool { return os.RemoveAll(gone) == nil })
}

// obstruct has a folder with something in it stand where the sealed file is. A save may put that back meanwhile.
func obstruct(t *testing.T, d *harness.Daemon) {
	t.Helper()
	folder := d.SealedFile() + ".folder"
	must(t, os.MkdirAll(filepath.Join(folder, "x"), 0o700))
	harness.Until(t, "a folder to be in the file's place", d.Ended, func() bool {
		_ = os.Remove(d.SealedFile()) // it may not be there yet
		return os.Rename(folder, d.SealedFile()) == nil
	})
}

func deviceFaults() []deviceFault {
	const unsaved = "tokens are not saved, and lost at the next reboot"
	const unusable = "the kept tokens cannot be used and are fetched anew"
	return []deviceFault{
		{name: "the disk is full", before: smallDisk, during: fill, after: empty, says: unsaved},
		{name: "the disk is read-only",
			before: smallDisk, during: remount(unix.MS_RDONLY), after: remount(0), says: unsaved},
		{
			name: "the state folder is gone", says: unsaved,
			during: takeAway,
			after:  func(t *testing.T, d *harness.Daemon) { must(t, os.Mkdir(d.StateDir(), 0o700)) },
		},
		{
			name: "a file is in the state folder's place", says: unsaved,
			during: func(t *testing.T, d *harness.Daemon) {
				takeAway(t, d)
				must(t, os.WriteFile(d.StateDir(), nil, 0o600))
			},
			after: func(t *testing.T, d *harness.Daemon) {
				must(t, os.Remove(d.StateDir()))
				must(t, os.Mkdir(d.StateDir(), 0o700))
			},
		},
		{
			name: "a folder is in the file's place", says: unsaved, during: obstruct,
			after: func(t *testing.T, d *harness.Daemon) { must(t, os.RemoveAll(d.SealedFile())) },
		},
		{name: "the file is empty", before: left(""), says: unusable},
		{name: "the file is somebody else's text", before: left(strings.Repeat("nonsense ", 1000)), says: unusable},
		{name: "the file is of another release", before: left("percept-sealed\x00\x09" + strings.Repeat("x", 200)),
			says: unusable},
		{
			name: "the key is none", says: "tokens are not kept over a reboot", lasts: true,
			before: func(t *testing.T, d *harness.Daemon) {
				must(t, os.Remove(d.KeyFile()))
				must(t, os.WriteFile(d.KeyFile(), []byte("short"), 0o400))
			},
		},
	}
}

// vaultAsSDK asks as SDKs do, who would like five minutes of life.
const vaultAsSDK = "/metadata/identity/oauth2/token?api-version=2018-02-01&resource="

// outcomeOf is what a caller gets.
func outcomeOf(t *testing.T, d *harness.Daemon) string {
	t.Helper()
	status, _, err := d.Get(d.Token(), vaultAsSDK+url.QueryEscape(harness.VaultURI))
	switch {
	case err != nil:
		return err.Error()
	case status == 200:
		return "token"
	}
	return fmt.Sprint(status)
}

// awaitRecorded has the record be kept, as each start does by itself. Its files are seen before the disk is known to
// have them, and what strikes the folder meanwhile has perceptd try that again only a minute later. A change that is
// acknowledged comes after it, and is withdrawn again.
func awaitRecorded(t *testing.T, d *harness.Daemon) {
	t.Helper()
	noted := harness.RecordChange(t, d, `{"all_resources":true,"effect":"granted"}`)
	if status, body, err := d.Ask(d.Admin(), "DELETE", api.PathPolicyChanges+"?id="+noted.ID, ""); status != 200 {
		t.Fatalf("%d %s %v", status, body, err)
	}
}

// suffer goes through a fault with one state of the cache, and returns what a caller gets meanwhile.
func (f deviceFault) suffer(t *testing.T, config string, environment []string, cold bool) string {
	t.Helper()
	d := harness.NewDaemon(t, config)
	d.GiveKey(t, d.KeyFile(), 'k')
	if f.before != nil {
		f.before(t, d)
	}
	d.Again(t, environment...)
	awaitRecorded(t, d)
	if !cold {
		d.Held(t)
	}
	if f.during != nil {
		f.during(t, d)
	}
	got := outcomeOf(t, d)
	d.Reload(t, config) // after which all is to be saved
	harness.Until(t, "what is wrong to be told: "+f.name, d.Ended, func() bool {
		return strings.Contains(strings.Join(d.Status(t).Trouble, "\n")+d.Text(), f.says)
	})
	if again := outcomeOf(t, d); again != got {
		t.Errorf("%s: %s, and %s when it had been told", f.name, got, again)
	}
	if f.after != nil {
		f.after(t, d)
		d.Reload(t, config)
	}
	harness.Until(t, "what was wrong to be over: "+f.name, d.Ended,
		func() bool { return f.lasts || len(d.Status(t).Trouble) == 0 })
	if after := outcomeOf(t, d); after != "token" {
		t.Errorf("%s: %s when it is over", f.name, after)
	}
	d.Stop(t)
	return got
}

// TestDeviceFaults goes through faults of the device, with each state of the cache. The table in docs/reliability.md is
// what comes of it.
func TestDeviceFaults(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("file systems are mounted: run it as root")
	}
	_, shortLived := harness.StartSimulator(t, "app-service", "--life", "3m")
	ordinary := harness.SimulatedFor()
	unasked := strings.Replace(ordinary, "prefetch = true", "", 1)
	expiring := strings.Replace(ordinary, `kind = "simulated"`,
		"kind = \"managed-identity\"\nendpoint = \"app-service\"", 1)
	var table strings.Builder
	table.WriteString("| the device | no token yet | a fresh token | less than 3 minutes left | the status or the " +
		"log says |\n|---|---|---|---|---|\n")
	for _, f := range deviceFaults() {
		fmt.Fprintf(&table, "| %s | %s | %s | %s | %s |\n", f.name,
			f.suffer(t, unasked, nil, true), f.suffer(t, ordinary, nil, false), f.suffer(t, expiring, shortLived,
				false), f.says)
	}
	wantTable(t, "device", table.String())
}

// recordFault is what became of the state while the daemon was not running, or under it, after a revocation.
type recordFault struct {
	name   string
	before func(t *testing.T, d *harness.Daemon) // the first start; nil: nothing
	strike func(t *testing.T, d *harness.Daemon)
	over   func(t *testing.T, d *harness.Daemon) // ends the fault; nil: it is what perceptd makes of it
	says   string                                // the status, or the log
	lost   bool
}

func recordFiles(d *harness.Daemon) []string {
	return []string{filepath.Join(d.StateDir(), "policy-changes.json"),
		filepath.Join(d.StateDir(), "policy-changes.copy.json")}
}

// chmodAll gives each file of the state another mode.
func chmodAll(t *testing.T, d *harness.Daemon, mode os.FileMode) {
	t.Helper()
	for _, path := range append(recordFiles(d), d.SealedFile()) {
		must(t, os.Chmod(path, mode))
	}
}

// eachFile does f to each of the record's two files.
func eachFile(f func(path string) error) func(*testing.T, *harness.Daemon) {
	return func(t *testing.T, d *harness.Daemon) {
		t.Helper()
		for _, path := range recordFiles(d) {
			must(t, f(path))
		}
	}
}

func zero(path string) error { return os.WriteFile(path, make([]byte, 4096), 0o600) }

// unread has each read of the file fail with EIO, as a bad block does: it is covered by this process's memory, which
// has nothing at 0.
func unread(path string) error {
	return unix.Mount(fmt.Sprintf("/proc/%d/mem", os.Getpid()), path, "", unix.MS_BIND, "")
}

func uncover(path string) error { return unix.Unmount(path, unix.MNT_DETACH) }

func recordFaults() []recordFault {
	const unkept = "policy changes are not kept on the disk"
	mode := func(mode os.FileMode) func(*testing.T, *harness.Daemon) {
		return func(t *testing.T, d *harness.Daemon) { must(t, os.Chmod(d.StateDir(), mode)) }
	}
	return []recordFault{
		{name: "the disk is read-only",
			before: smallDisk, strike: remount(unix.MS_RDONLY), over: remount(0), says: unkept},
		{name: "the disk is full", before: smallDisk, strike: fill, over: empty, says: unkept},
		{name: "a group may write to the state folder (mode 0770)",
			strike: mode(0o770), over: mode(0o700), says: unkept},
		{name: "a group may write to the folder and to all that is in it (chmod -R 0770)", says: unkept,
			strike: func(t *testing.T, d *harness.Daemon) {
				chmodAll(t, d, 0o770)
				mode(0o770)(t,
					d)
			}, over: mode(0o700)},
		{name: "everybody may write to its files", says: "others could have changed a file of the policy changes",
			strike: func(t *testing.T, d *harness.Daemon) { chmodAll(t, d, 0o666) }},
		{name: "its files are another user's, as after a restore",
			says: "others could have changed a file of the policy changes",
			strike: func(t *testing.T, d *harness.Daemon) {
				chmodAll(t, d, 0o644)
				for _, path := range append(recordFiles(d), d.SealedFile()) {
					must(t, os.Chown(path, 4242, 4242))
				}
			}},
		{name: "the record's first file is deleted",
			strike: func(t *testing.T, d *harness.Daemon) { must(t, os.Remove(recordFiles(d)[0])) }},
		{name: "one file of the record is all zeros",
			strike: func(t *testing.T, d *harness.Daemon) { must(t, zero(recordFiles(d)[0])) },
			says:   "one of the two files of the policy changes cannot be used, the other is in force"},
		{name: "both files of the record are deleted", strike: eachFile(os.Remove),
			says: "was gone: its copy beside the tokens is in force"},
		{name: "both are all zeros", strike: eachFile(zero),
			says: "could not be read: its copy beside the tokens is in force"},
		{name: "both cannot be read (EIO)", strike: eachFile(unread), over: eachFile(uncover),
			says: "the record of policy changes cannot be read now"},
		{name: "both cannot be read, and the tokens are deleted",
			says: "the record of policy changes cannot be read now", lost: true,
			strike: func(t *testing.T, d *harness.Daemon) {
				eachFile(unread)(t, d)
				must(t, os.Remove(d.SealedFile()))
			}, over: eachFile(uncover)},
		{name: "both are all zeros, and the tokens are deleted", says: "the record of policy changes is lost",
			lost: true,
			strike: func(t *testing.T, d *harness.Daemon) {
				eachFile(zero)(t, d)
				must(t, os.Remove(d.SealedFile()))
			}},
	}
}

// outcomeOfRevoked asks for the token that was revoked, and tells what comes.
func outcomeOfRevoked(t *testing.T, d *harness.Daemon) string {
	t.Helper()
	status, body, err := d.Get(d.Token(), harness.VaultToken)
	switch {
	case err != nil:
		return err.Error()
	case status == 403 && strings.Contains(body, string(api.CodeRevoked)):
		return "withheld"
	case status == 200 && strings.Contains(body, `"uncertain"`):
		return "served as uncertain"
	}
	return fmt.Sprint(status)
}

// suffer has a revocation acknowledged, strikes, and starts the daemon again. It returns what becomes of the token
// then, and what when the fault is over.
func (f recordFault) suffer(t *testing.T, config string, killed bool) (during, after string) {
	t.Helper()
	d := harness.NewDaemon(t, config)
	d.GiveKey(t, d.KeyFile(), 'k')
	if f.before != nil {
		f.before(t, d)
	}
	d.Again(t)
	d.Held(t)
	var before os.FileInfo
	harness.Until(t, "the tokens to be kept", d.Ended, func() (kept bool) {
		info, err := os.Stat(d.SealedFile())
		before = info
		return err == nil
	})
	harness.RecordChange(t, d, `{"resource":"`+harness.VaultURI+`","effect":"revoked"}`)
	harness.Until(t, "the mark to be kept", d.Ended, func() bool {
		after, err := os.Stat(d.SealedFile())
		return err == nil && after.ModTime().After(before.ModTime())
	})
	if killed { // under the running daemon, which has no time to mend anything
		f.strike(t, d)
		_ = d.Cmd.Process.Kill()
		<-d.Ended
	} else {
		d.Stop(t)
		f.strike(t, d)
	}
	if f.over != nil {
		t.Cleanup(func() { _ = uncover(recordFiles(d)[0]); _ = uncover(recordFiles(d)[1]) })
	}
	d.Again(t)
	during = outcomeOfRevoked(t, d)
	harness.Until(t, "what is wrong to be told: "+f.name, d.Ended, func() bool {
		return strings.Contains(strings.Join(d.Status(t).Trouble, "\n")+d.Text(), f.says)
	})
	if f.over != nil {
		f.over(t, d)
	}
	if f.says == "the record of policy changes cannot be read now" {
		harness.Until(t, "the record to be read: "+f.name, d.Ended,
			func() bool { return len(d.Status(t).Trouble) == 0 })
	}
	after = outcomeOfRevoked(t, d)
	d.Stop(t)
	return during, after
}

// TestRevocationsOnAFaultyDevice strikes the state after a revocation was acknowledged: the token stays withheld, over
// a stop and over a crash. The table in docs/reliability.md is what comes of it.
func TestRevocationsOnAFaultyDevice(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("file systems are mounted: run it as root")
	}
	var table strings.Builder
	table.WriteString(
		"| after a revocation | the token is | when that is over | the status or the log says |\n|---|---|---|---|\n")
	for _, f := range recordFaults() {
		during, after := f.suffer(t, harness.SimulatedFor(), false)
		if d, a := f.suffer(t, harness.SimulatedFor(), true); d != during || a != after {
			t.Errorf("%s: over a crash it is %s, then %s; over a stop %s, then %s", f.name, d, a, during, after)
		}
		if !f.lost && (during != "withheld" || after != "withheld") {
			t.Errorf("%s: the token that was revoked is %s, then %s", f.name, during, after)
		}
		fmt.Fprintf(&table, "| %s | %s | %s | %s |\n", f.name, during, after, f.says)
	}
	wantTable(t, "record", table.String())
}

// wantTable compares a table with the one that stands between the markers of that name in docs/reliability.md, or puts
// it there when FAULT_MATRIX_DOCS is set.
func wantTable(t *testing.T, name, table string) {
	t.Helper()
	const path = "../../../../docs/reliability.md"
	text, err := os.ReadFile(path)
	must(t, err)
	begin, end := "<!-- "+name+": begin -->\n", "<!-- "+name+": end -->"
	before, rest, found := strings.Cut(string(text), begin)
	there, after, closed := strings.Cut(rest, end)
	write := os.Getenv("FAULT_MATRIX_DOCS") != ""
	switch {
	case !found || !closed:
		t.Fatalf("%s has no markers for the table %q", path, name)
	case write:
		must(t, os.WriteFile(path, []byte(before+begin+table+end+after), 0o644))
		fmt.Printf("\n%s\n", table)
	case there != table:
		t.Errorf("%s tells of other outcomes than these: make fault-matrix brings it up to date\n%s", path, table)
	}
}
