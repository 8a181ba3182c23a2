package store

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"perceptd/agent/lock"
	"perceptd/tokencache"
)

const (
	newName = changesName + beingWritten
	aside   = changesName + unreadable
)

const vault = "https://vault.azure.net"

var noon = time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)

func uptime(d time.Duration) func() time.Duration { return func() time.Duration { return d } }

func open(t testing.TB, dir string) *PolicyChanges {
	t.Helper()
	return OpenPolicyChanges(folderAt(t, dir), uptime(time.Hour))
}

// folderAt is the folder at dir, which is made if it can be.
func folderAt(t testing.TB, dir string) Disk {
	t.Helper()
	if held, err := Lock(dir); err == nil {
		t.Cleanup(func() { _ = held.Close() })
	}
	return Disk(dir)
}

func all() tokencache.Record {
	return tokencache.Record{Instant: taken(), Lineage: "l", Origins: []tokencache.Origin{{Lineage: "k",
		Generation: 6}}, Generation: 7, Changes: []tokencache.PolicyChange{
		{ID: "00000001", AllIdentities: true, At: noon, Effect: tokencache.Changed,
			RecordedAt: noon.Add(time.Nanosecond)},
		{ID: "00000002", Resource: vault, At: noon.Add(-time.Hour), Effect: tokencache.Revoked, Note: `"über" <b> & \`,
			RecordedAt: noon,
			Moment:     40 * time.Hour, By: 41 * time.Hour, Vouched: true, Checked: true, Unplaced: true,
			NotLater: noon.Add(time.Hour), Issuer: tokencache.Window{Earliest: noon.Add(-time.Hour),
				Latest: noon.Add(-time.Minute)}},
		{ID: "00000003", Selector: tokencache.Selector{Kind: tokencache.ClientID, ID: "c"}, Resource: vault, At: noon,
			Effect: tokencache.Granted, RecordedAt: noon},
		{ID: "00000004", Selector: tokencache.Selector{Kind: tokencache.ObjectID, ID: "o"}, At: noon,
			Effect: tokencache.Unknown, RecordedAt: noon},
		{ID: "00000005", Selector: tokencache.Selector{Kind: tokencache.ResourceID, ID: "/subscriptions/s"}, At: noon,
			Effect: tokencache.Changed, RecordedAt: noon, Joined: 2},
	}}
}

// first is the record of the first n of all, which is newer.
func first(n int) tokencache.Record {
	return tokencache.Record{Instant: taken(), Generation: 8, Changes: all().Changes[:n]}
}

func taken() tokencache.Instant {
	return tokencache.Instant{On: 41 * time.Hour, Boot: time.Hour, BootID: BootID()}
}

func TestRoundTrip(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "state")
	r := open(t, dir)
	if got, err := r.Load(); got != nil || err != nil {
		t.Errorf("no file yet: %v, %v", got, err)
	}
	for _, want := range []tokencache.Record{all(), {Instant: taken(), Generation: 1 << 62,
		Changes: []tokencache.PolicyChange{}}, first(2)} {
		if err := r.Save(want); err != nil {
			t.Fatal(err)
		}
		if got, err := open(t, dir).Load(); err != nil || !reflect.DeepEqual(got, &want) {
			t.Errorf("%v\ngot  %+v\nwant %+v", err, got, want)
		}
	}
	for path, mode := range map[string]fs.FileMode{dir: 0o700 | fs.ModeDir, filepath.Join(dir, changesName): 0o600} {
		if info, err := os.Stat(path); err != nil || info.Mode() != mode {
			t.Errorf("%s: %v, %v", path, info.Mode(), err)
		}
	}
}

// What a crash leaves behind neither harms nor stays.
func TestCrashes(t *testing.T) {
	t.Parallel()
	for name, leave := range map[string]func(path string) error{
		"half a file":  func(path string) error { return os.WriteFile(path, []byte(`{"version":1,`), 0o600) },
		"empty":        func(path string) error { return os.WriteFile(path, nil, 0o600) },
		"a link":       func(path string) error { return os.Symlink("/nonexistent/elsewhere", path) },
		"not readable": func(path string) error { return os.WriteFile(path, nil, 0) },
	} {
		dir := t.TempDir()
		if err := open(t, dir).Save(all()); err != nil {
			t.Fatal(err)
		}
		left := filepath.Join(dir, newName)
		if err := leave(left); err != nil {
			t.Fatal(err)
		}
		r := open(t, dir)
		if got, err := r.Load(); err != nil || !reflect.DeepEqual(got, new(all())) {
			t.Errorf("%s: %v, %v", name, got, err)
		}
		if err := r.Save(first(1)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if names := listing(t, dir); !slices.Equal(names, []string{changesCopyName, changesName}) {
			t.Errorf("%s: %q", name, names)
		}
	}
}

func listing(t testing.TB, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		names = append(names, entry.Name())
	}
	return names
}

// entry is a sound file with one change, of which a part is replaced.
func entry(old, replacement string) string {
	const sound = `{"version":1,"boot_id":"b","changes":[{"id":"0a","selector":{"kind":"client_id","id":"c"},` +
		`"resource":"api://x",` +
		`"at":"2026-11-23T12:00:00Z","effect":"revoked","note":"n","noted_on":"2026-11-23T12:00:00Z","at_boot_ns":5}]}`
	return strings.Replace(sound, old, replacement, 1)
}

func TestWhatCannotBeRead(t *testing.T) {
	t.Parallel()
	many := strings.Repeat(`{},`, tokencache.MaxChanges)
	for _, row := range []struct{ name, text, says string }{
		{"sound", entry("", ""), ""},
		{"empty", "", "not JSON"},
		{"half", `{"version":1,"changes":[`, "not JSON"},
		{"zeros", strings.Repeat("\x00", 512), "not JSON"},
		{"another version", entry(`"version":1`, `"version":4`), "another release"},
		{"no version", `{}`, "another release"},
		{"an unknown key", entry(`"note"`, `"notes"`), "unknown field"},
		{"more behind", entry("", "") + " {}", "not JSON"},
		{"version 0", entry(`"version":1`, `"version":0`), "another release"},
		{"a lineage of two lines", entry(`"version":1`, `"version":2,"lineage":"a\nb"`), "its lineage"},
		{"a generation below 0", entry(`"version":1`, `"version":2,"generation":-1`), "cannot unmarshal"},
		{"a generation that nothing comes after", entry(`"version":1`, `"version":2,"generation":18446744073709551615`),
			"its generation"},
		{"another type", entry(`"0a"`, `1`), "cannot unmarshal"},
		{"too many", `{"version":1,"boot_id":"b","changes":[` + many + `{}]}`, "more than 512"},
		{"no ID", entry(`"0a"`, `""`), "its id is none"},
		{"a long ID", entry(`0a`, strings.Repeat("a", 65)), "its id is none"},
		{"the same ID", entry(`[{`, `[`+strings.TrimSuffix(strings.SplitN(entry("", ""), "[", 2)[1], "]}")+`,{`),
			"that of another"},
		{"a resource with a line end", entry(`api://x`, `api://x\n`), "its resource is none"},
		{"a long resource", entry(`api://x`, strings.Repeat("a", 513)), "its resource is none"},
		{"a note that cannot be printed", entry(`"n"`, `"\u001b[2J"`), "its note"},
		{"a long note", entry(`"n"`, `"`+strings.Repeat("a", 257)+`"`), "its note"},
		{"an unknown effect", entry(`revoked`, `no effect`), "its effect"},
		{"an early time", entry(`2026`, `1969`), "its times"},
		{"a late time", entry(`"noted_on":"2026`, `"noted_on":"2200`), "its times"},
		{"no time", entry(`"2026-11-23T12:00:00Z"`, `"noon"`), "parsing time"},
		{"before the boot", entry(`5}`, `-5}`), "at_boot_ns"},
		{"an unknown selector", entry(`client_id`, `unknown selector`), "its selector"},
		{"a selector of nobody", entry(`"id":"c"`, `"id":""`), "its selector"},
		{"an empty selector", entry(`{"kind":"client_id","id":"c"}`, `{}`), "its selector"},
		{"a selector without a kind", entry(`"kind":"client_id","id":"c"`, `"id":""`), "its selector"},
		{"a selector whose kind is null", entry(`{"kind":"client_id","id":"c"}`, `{"kind":null}`), "its selector"},
		{"an unknown field of a selector", entry(`"id":"c"`, `"id":"c","name":"n"`), "unknown field"},
		{"the device's own with an ID", entry(`client_id`, `system-assigned`), "its selector"},
		{"a long boot ID", entry(`"b"`, `"`+strings.Repeat("b", 65)+`"`), "boot_id"},
		{"large", entry("", strings.Repeat(" ", maxChangesFile)), "larger than"},
	} {
		dir := t.TempDir()
		path := filepath.Join(dir, changesName)
		if err := os.WriteFile(path, []byte(row.text), 0o600); err != nil {
			t.Fatal(err)
		}
		r := open(t, dir)
		_, err := r.Load()
		if row.says == "" {
			names := listing(t, dir)
			if err != nil || len(names) != 1 {
				t.Errorf("%s: %v, %q", row.name, err, names)
			}
			continue
		}
		if err == nil || !strings.Contains(err.Error(), row.says) || !strings.Contains(err.Error(), changesName+": ") {
			t.Errorf("%s: %v, want %q", row.name, err, row.says)
			continue
		}
		if names := listing(t, dir); len(names) != 1 || names[0] != changesName {
			t.Errorf("%s: the next start would find %q alone", row.name, names)
		}
		if err := r.Save(all()); err != nil {
			t.Errorf("%s: %v", row.name, err)
		}
		names := slices.DeleteFunc(listing(t, dir), func(name string) bool { return !strings.HasPrefix(name, aside) })
		if len(names) != 1 {
			t.Errorf("%s: %q is aside", row.name, names)
			continue
		}
		if kept, err := os.ReadFile(filepath.Join(dir, names[0])); err != nil || string(kept) != row.text {
			t.Errorf("%s: what was there is lost: %v", row.name, err)
		}
	}
}

func TestWhatStandsInItsPlace(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name, says string
		put        func(path string) error
	}{
		{"a link", "it is a link", func(path string) error { return os.Symlink("/etc/passwd", path) }},
		{"a directory", "not a regular file", func(path string) error { return os.Mkdir(path, 0o700) }},
		{"a pipe", "not a regular file", func(path string) error { return unix.Mkfifo(path, 0o600) }},
	} {
		dir := t.TempDir()
		if err := row.put(filepath.Join(dir, changesName)); err != nil {
			t.Fatal(err)
		}
		r := open(t, dir)
		if _, err := r.Load(); err == nil || !strings.Contains(err.Error(), row.says) {
			t.Errorf("%s: %v", row.name, err)
		}
		if err := r.Save(all()); err != nil {
			t.Errorf("%s: saving after it: %v", row.name, err)
		}
		if got, err := r.Load(); err != nil || len(got.Changes) != len(all().Changes) {
			t.Errorf("%s: %v, %v", row.name, got, err)
		}
	}
}

func TestFewAreLeftAside(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	r := open(t, dir)
	for i := range 2 * maxAside {
		if err := os.WriteFile(filepath.Join(dir, changesName), fmt.Append(nil, i), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := r.Load(); err == nil {
			t.Error("a number was taken for a record")
		}
		if err := r.Save(all()); err != nil {
			t.Error(err)
		}
	}
	names := slices.DeleteFunc(listing(t, dir), func(name string) bool { return !strings.HasPrefix(name, aside) })
	if len(names) != maxAside {
		t.Fatalf("%q", names)
	}
	if text, err := os.ReadFile(filepath.Join(dir, names[maxAside-1])); err != nil ||
		string(text) != fmt.Sprint(2*maxAside-1) {
		t.Errorf("the last one holds %q, %v", text, err)
	}
}

// Of those that are left the last is the one that was moved last, whatever the clock says, and none takes another's
// place.
func TestLatestAreLeftAside(t *testing.T) {
	t.Parallel()
	for name, before := range map[string][]string{
		"by a clock that is behind":         {"20261101", "20261102", "20261103", "20261104"},
		"by one that is right":              {"19991101", "19991102", "19991103", "19991104"},
		"once by a clock that was ahead":    {"19991102", "19991103", "19991104", "20991101"},
		"with one that has the same moment": {"20000101"},
	} {
		dir := t.TempDir()
		for i, day := range before {
			if err := os.WriteFile(filepath.Join(dir, aside+day+"T000000.000000000Z"), fmt.Append(nil, i-len(before)),
				0o600); err != nil {
				t.Fatal(err)
			}
		}
		theirs := aside + "by-hand" // which nobody removes
		if err := os.WriteFile(filepath.Join(dir, theirs), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		synctest.Test(t, func(t *testing.T) { // in which the clock stands at the beginning of 2000
			for n := range 2 * maxAside {
				if err := os.WriteFile(filepath.Join(dir, changesName), fmt.Append(nil, n), 0o600); err != nil {
					t.Fatal(err)
				}
				to, err := Disk(dir).Aside(changesName)
				if text, unread := os.ReadFile(to); err != nil || unread != nil || string(text) != fmt.Sprint(n) {
					t.Errorf("%s: number %d is not %s: %q, %v, %v", name, n, to, text, err, unread)
				}
				var left, want []string
				for _, at := range listing(t, dir) {
					if text, err := os.ReadFile(filepath.Join(dir, at)); err != nil {
						t.Error(err)
					} else if at != theirs {
						left = append(left, string(text))
					}
				}
				for i := max(-len(before), n+1-maxAside); i <= n; i++ {
					want = append(want, fmt.Sprint(i))
				}
				if !slices.Equal(left, want) {
					t.Errorf("%s: left after number %d: %q, want %q", name, n, left, want)
				}
			}
		})
		if _, err := os.Stat(filepath.Join(dir, theirs)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// What could not be read again is not written.
func TestWhatIsNotKept(t *testing.T) {
	t.Parallel()
	r := open(t, t.TempDir())
	if err := r.Save(all()); err != nil {
		t.Fatal(err)
	}
	late := all()
	late.Changes[0].At = noon.AddDate(400, 0, 0)
	many := make([]tokencache.PolicyChange, tokencache.MaxChanges)
	for i := range many {
		many[i] = tokencache.PolicyChange{
			ID: fmt.Sprintf("%064d", i), Selector: tokencache.Selector{Kind: tokencache.ResourceID,
				ID: strings.Repeat(`"`, maxSelector)},
			Resource: strings.Repeat(`"`, maxResource), Effect: tokencache.Changed, At: noon, RecordedAt: noon,
		}
	}
	for says, record := range map[string]tokencache.Record{
		"its lineage": {Lineage: strings.Repeat("l", maxID+1)}, "its times": late, "would be larger": {Changes: many},
		"its generation":     {Generation: 1<<62 + 1},
		"its origins":        {Origins: make([]tokencache.Origin, tokencache.MaxOrigins+1)},
		"one of its origins": {Origins: make([]tokencache.Origin, 1)},
	} {
		if err := r.Save(record); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v", says, err)
		}
	}
	if got, err := r.Load(); err != nil || !reflect.DeepEqual(got, new(all())) {
		t.Errorf("what was there is lost: %v, %v", got, err)
	}
}

// A strange time of the issuer's, which a back end told, is not known; it costs neither the change nor the others.
func TestStrangeTimesOfTheIssuerAreNotKnown(t *testing.T) {
	t.Parallel()
	for _, strange := range []time.Time{noon.AddDate(-57, 0, 0), noon.AddDate(174, 0, 0), noon.AddDate(9000, 0, 0)} {
		told, want, m := all(), all(), whole(1)
		told.Changes[1].NotLater, told.Changes[1].Issuer.Latest, told.Changes[0].Issuer.Earliest = strange, strange,
			strange
		want.Changes[1].NotLater, want.Changes[1].Issuer.Latest = time.Time{}, time.Time{}
		r := open(t, t.TempDir())
		if err := r.Save(told); err != nil {
			t.Fatalf("%v: %v", strange, err)
		}
		if got, err := r.Load(); err != nil || !reflect.DeepEqual(*got, want) {
			t.Errorf("%v: %v, %+v", strange, err, got)
		}
		m.Record.Changes[0].Issuer.Latest, m.Tombstones[0].ExpiresOn = strange, strange
		text, err := encodeSnapshot(m)
		if err != nil {
			t.Fatalf("%v: %v", strange, err)
		}
		if got, err := decodeSnapshot(text); err != nil || len(got.Record.Changes) != len(m.Record.Changes) ||
			len(got.Tombstones) != len(m.Tombstones) {
			t.Errorf("%v: %v, the copy of the record is lost, or what is known of a token", strange, err)
		}
	}
}

// As many changes as there may be, all as large as they may be, fit.
func TestFullRecord(t *testing.T) {
	t.Parallel()
	full := make([]tokencache.PolicyChange, tokencache.MaxChanges)
	for i := range full {
		full[i] = tokencache.PolicyChange{
			ID: fmt.Sprintf("%08x", i), Selector: tokencache.Selector{Kind: tokencache.ResourceID,
				ID: "/subscriptions/" + strings.Repeat("s", 300)},
			Resource: "api://" + strings.Repeat("r", 500), Note: strings.Repeat(`"`, maxNote),
			Effect: tokencache.Changed, At: noon, RecordedAt: noon,
			Vouched: true, Moment: 1000 * time.Hour, By: 1000 * time.Hour,
			Issuer: tokencache.Window{Earliest: noon, Latest: noon}, Joined: 1000,
		}
	}
	r := open(t, t.TempDir())
	if err := r.Save(tokencache.Record{Changes: full}); err != nil {
		t.Fatal(err)
	}
	if got, err := r.Load(); err != nil || !reflect.DeepEqual(got.Changes, full) {
		t.Errorf("%v, %v", got, err)
	}
}

func TestStateDirectory(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	shared := filepath.Join(dir, "shared")
	given := filepath.Join(dir, "given")
	blocked := filepath.Join(dir, "blocked")
	if err := errors.Join(os.WriteFile(file, nil, 0o600), os.Mkdir(shared, 0o700), os.Chmod(shared, 0o777),
		os.Mkdir(given, 0o700),
		os.MkdirAll(filepath.Join(blocked, newName, "x"), 0o700)); err != nil {
		t.Fatal(err)
	}
	rows := map[string]string{
		file:                                "not a directory",
		filepath.Join(dir, "a", "b"):        "no such file",
		filepath.Join(file, "b"):            "not a directory",
		shared:                              "mode 0777",
		blocked:                             "not empty",
		"":                                  "no such file",
		filepath.Join(dir, "a\x00b", "etc"): "invalid argument",
	}
	if os.Chown(given, 4242, 4242) == nil {
		rows[given] = "owner"
	}
	for path, says := range rows {
		if err := open(t, path).Save(all()); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%q: %v, want %q", path, err, says)
		}
	}
}

// Whatever step fails, what was there before is still there.
func TestFailingSteps(t *testing.T) {
	t.Parallel()
	for name, spoil := range map[string]func(dir string) error{
		"no temporary file": func(dir string) error {
			return os.MkdirAll(filepath.Join(dir, newName, "x"), 0o700)
		},
		"no place": func(dir string) error { return os.RemoveAll(dir) },
		"a file in the folder's place": func(dir string) error {
			return errors.Join(os.RemoveAll(dir), os.WriteFile(dir, nil, 0o600))
		},
		"a folder in the place": func(dir string) error {
			return errors.Join(os.Remove(filepath.Join(dir, changesName)),
				os.MkdirAll(filepath.Join(dir, changesName, "x"), 0o700))
		},
	} {
		dir := filepath.Join(t.TempDir(), "state")
		r := open(t, dir)
		if err := errors.Join(r.Save(all()), spoil(dir)); err != nil {
			t.Fatal(err)
		}
		if err := r.Save(first(1)); err == nil {
			t.Errorf("%s: saved", name)
		}
	}
	if err := syncDir("/nonexistent"); err == nil {
		t.Error("synced a folder that is not there")
	}
	if err := moveAside(Disk("/nonexistent"), "x", errors.New("why")); err.Stays == nil ||
		!strings.Contains(err.Error(), "could not be moved aside") {
		t.Error(err)
	}
}

// A full disk costs the new record, never the old one, and heals when there is room.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=16k,mode=0700"); err != nil {
		t.Skipf("needs root and the right to mount a small disk: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	r := open(t, dir)
	if err := r.Save(all()); err != nil {
		t.Fatal(err)
	}
	ballast := filepath.Join(dir, "ballast")
	_ = os.WriteFile(ballast, make([]byte, 1<<20), 0o600) // as much as goes
	if err := r.Save(first(1)); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("on a full disk: %v", err)
	}
	if got, err := r.Load(); err != nil || !reflect.DeepEqual(got, new(all())) {
		t.Errorf("what was there is lost: %v, %v", got, err)
	}
	if err := errors.Join(os.Remove(ballast), r.Save(first(1))); err != nil {
		t.Errorf("with room again: %v", err)
	}
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	if err := r.Save(all()); !errors.Is(err, unix.EROFS) {
		t.Errorf("on a disk that is read-only: %v", err)
	}
	if got, err := open(t, dir).Load(); err != nil || !reflect.DeepEqual(got, new(first(1))) {
		t.Errorf("a record that can be read and not written is not read: %v, %v", got, err)
	}
	var by lock.HeldError // by this test: it came as far as the lock
	if _, err := Lock(dir); !errors.As(err, &by) {
		t.Errorf("a folder that can be read and not written to cannot be held: %v", err)
	}
}

func FuzzDecode(f *testing.F) {
	r := &PolicyChanges{boot: uptime(time.Hour), id: "b"}
	text, err := r.encode(all())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add([]byte(entry("", "")))
	f.Add([]byte(entry(`[{`, `[{},{`)))
	f.Add([]byte(`{"version":1,"changes":null}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		record, err := r.decode(text)
		if err != nil {
			return
		}
		if len(record.Changes) > tokencache.MaxChanges {
			t.Fatalf("%d changes", len(record.Changes))
		}
		again, err := r.encode(*record)
		if err != nil {
			t.Fatalf("read, and not to be written: %v", err)
		}
		same, err := r.decode(again)
		if err != nil {
			t.Fatalf("written, and not to be read: %v\n%s", err, again)
		}
		if twice, err := r.encode(*same); err != nil || !bytes.Equal(again, twice) {
			t.Errorf("%v: another time it is another record:\n%s\n%s", err, again, twice)
		}
	})
}

// Files of the release before, in which there were no generations, are read as of generation 0.
func TestVersionBefore(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, changesName), []byte(entry("", "")), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := open(t, dir).Load()
	if err != nil || got.Generation != 0 || len(got.Changes) != 1 || got.Changes[0].ID != "0a" ||
		got.Changes[0].Vouched || got.Changes[0].Moment != 0 || got.Changes[0].Effect != tokencache.Revoked {
		t.Errorf("the record: %+v, %v", got, err)
	}
	change := `{"id":"0a","at":"2026-11-23T12:00:00Z","effect":"revoked","noted_on":"2026-11-23T12:00:00Z"}`
	for changes, want := range map[string]int{`,"changes":[` + change + `]`: 1, "": 0} {
		text := `{"version":1,"source":"s","boot_id":"b","boot_ns":5,"wall":"2026-11-23T12:00:00Z",` +
			`"synchronised":true,` +
			`"keys":[{"key":{"selector":{"kind":"client_id","id":"c"},"resource":"r"},"token":{"text":"t"},` +
			`"nominal_ns":1,"deadline_ns":9,` +
			`"life_ns":1,"born_ns":1,"received_ns":1,"shown_ns":1,"answered_ns":1,"claims":{}}],"rollovers":[]` +
			changes + `}`
		f := sealedly(t, frame([]byte(text)))
		m, err := ReadMemfd(f)
		if err != nil || len(m.Keys) != 1 || m.Record.Generation != 0 || len(m.Record.Changes) != want {
			t.Errorf("the memory: %+v, %v", m, err)
		}
	}
}
