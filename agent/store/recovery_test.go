package store

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"perceptd/agent/binding"
	"perceptd/tokencache"
)

// Whatever becomes of one of the record's two files, the other has all that was acknowledged.
func TestEitherFileOfTheRecord(t *testing.T) {
	t.Parallel()
	for _, name := range []string{changesName, changesCopyName} {
		for what, spoil := range map[string]func(path string) error{
			"gone":         os.Remove,
			"empty":        func(path string) error { return os.WriteFile(path, nil, 0o600) },
			"zeros":        func(path string) error { return os.WriteFile(path, make([]byte, 4096), 0o600) },
			"half":         func(path string) error { return os.Truncate(path, 100) },
			"wrong mode":   func(path string) error { return os.Chmod(path, 0o666) },
			"a folder":     func(path string) error { return errors.Join(os.Remove(path), os.Mkdir(path, 0o700)) },
			"a former one": func(path string) error { return os.WriteFile(path, former(t), 0o600) },
		} {
			dir := t.TempDir()
			r := open(t, dir)
			if err := errors.Join(r.Save(first(1)), r.Save(all()), spoil(filepath.Join(dir, name))); err != nil {
				t.Fatal(err)
			}
			b := Recover(open(t, dir), nil, nil, anybodys, BootID())
			if !reflect.DeepEqual(b.Record, new(all())) || b.Lost != nil || b.Unread != nil {
				t.Errorf("%s is %s: %+v", name, what, b)
			}
			if b.RecordFault == nil {
				t.Errorf("%s is %s: %v", name, what, b.RecordFault)
			}
			if err := r.Save(first(2)); err != nil {
				t.Errorf("%s is %s: %v", name, what, err)
			}
			for _, other := range []string{changesName, changesCopyName} {
				if text, err := os.ReadFile(filepath.Join(dir, other)); err != nil ||
					!strings.Contains(string(text), "00000002") || strings.Contains(string(text), "00000003") {
					t.Errorf("%s is %s, then saved: %s, %v", name, what, text, err)
				}
			}
		}
	}
}

// former is the text of an older generation of all.
func former(t *testing.T) []byte {
	t.Helper()
	r := all()
	r.Generation, r.Changes = r.Generation-1, r.Changes[:1]
	text, err := open(t, t.TempDir()).encode(r)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func anybodys(*tokencache.Snapshot) bool { return true }

// Of two files of different lineages neither is newer: nothing of either is lost.
func TestFilesOfTwoRecords(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	theirs := first(1)
	theirs.Lineage, theirs.Generation, theirs.Changes[0].ID = "another", 99, "theirs"
	text, err := open(t, dir).encode(theirs)
	if err := errors.Join(err, open(t, dir).Save(all()), os.WriteFile(filepath.Join(dir, changesCopyName), text,
		0o600)); err != nil {
		t.Fatal(err)
	}
	got, err := open(t, dir).Load()
	if err != nil || got.Lineage == "l" || !got.IsNewer(all()) || !got.IsNewer(theirs) ||
		len(got.Changes) != len(all().Changes)+1 {
		t.Errorf("%+v, %v", got, err)
	}
}

// A change that both have under one ID may have taken in another in one of them: it stands for all of that.
func TestFilesOfTwoRecordsWithOneJoined(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	ours, theirs := first(1), first(1)
	theirs.Lineage = "another"
	p := &theirs.Changes[0]
	p.Joined, p.AllIdentities, p.Selector, p.Resource = 1, true, tokencache.Selector{}, ""
	text, err := open(t, dir).encode(theirs)
	if err := errors.Join(err, open(t, dir).Save(ours), os.WriteFile(filepath.Join(dir, changesCopyName), text,
		0o600)); err != nil {
		t.Fatal(err)
	}
	got, err := open(t, dir).Load()
	if err != nil || got.Generation != ours.Generation+1 || len(got.Changes) != 1 ||
		!got.Changes[0].StandsFor(theirs.Changes[0]) || !got.Changes[0].StandsFor(ours.Changes[0]) {
		t.Errorf("%+v, %v", got, err)
	}
}

// A file that was begun from what the other has is the newer one: what it lacks was withdrawn, or is over.
func TestFileBegunFromTheOther(t *testing.T) {
	t.Parallel()
	for _, inCopy := range []bool{false, true} {
		dir := t.TempDir()
		before, begun := all(), first(1).WithLineage("another", all())
		if inCopy {
			before, begun = begun, before
		}
		text, err := open(t, dir).encode(begun)
		if err := errors.Join(err, open(t, dir).Save(before), os.WriteFile(filepath.Join(dir, changesCopyName), text,
			0o600)); err != nil {
			t.Fatal(err)
		}
		got, err := open(t, dir).Load()
		if err == nil || !strings.Contains(err.Error(), "is older than") || got.Lineage != "another" ||
			len(got.Changes) != 1 {
			t.Errorf("in the copy %v: %+v, %v", inCopy, got, err)
		}
	}
}

// Nor is anything lost where the two have more than there is room for in one: whoever loads them makes it fit.
func TestFilesOfTwoFullRecords(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	full := func(lineage string) tokencache.Record {
		r := all()
		r.Lineage, r.Changes = lineage, nil
		for i := range tokencache.MaxChanges {
			r.Changes = append(r.Changes, tokencache.PolicyChange{
				ID: fmt.Sprint(lineage, i), AllIdentities: true, Effect: tokencache.Revoked, At: noon, RecordedAt: noon,
			})
		}
		return r
	}
	text, err := open(t, dir).encode(full("theirs"))
	if err := errors.Join(err, open(t, dir).Save(full("ours")), os.WriteFile(filepath.Join(dir, changesCopyName), text,
		0o600)); err != nil {
		t.Fatal(err)
	}
	if got, err := open(t, dir).Load(); err != nil || len(got.Changes) != 2*tokencache.MaxChanges {
		t.Errorf("%d changes, %v", len(got.Changes), err)
	}
}

// limited is a folder with a disk that fails at its nth change from now on, and what a power cut leaves of it.
type limited struct {
	files map[string][]byte
	left  int // changes that still reach the disk
}

var errCut = errors.New("the power is cut")

func (l *limited) Read(name string, _ os.FileMode, _ int) ([]byte, error) {
	text, there := l.files[name]
	if !there {
		return nil, os.ErrNotExist
	}
	return text, nil
}

func (l *limited) Replace(name string, text []byte) error {
	if l.left--; l.left < 0 {
		return errCut
	}
	l.files[name] = text
	return nil
}

func (l *limited) Aside(name string) (string, error) { return name, l.Remove(name) }

func (l *limited) Remove(name string) error {
	delete(l.files, name)
	return nil
}

// A power cut after any step of a save leaves the older generation or the newer one, whole, and one of them even if the
// file that was written last is spoilt by it.
func TestPowerCutAtEveryStep(t *testing.T) {
	t.Parallel()
	newer := all()
	newer.Generation++
	newer.Changes = newer.Changes[:2]
	for steps := range 3 {
		for _, spoils := range []string{"", changesName, changesCopyName} {
			l := &limited{files: make(map[string][]byte), left: 2}
			if err := OpenPolicyChanges(l, uptime(time.Hour)).Save(all()); err != nil {
				t.Fatal(err)
			}
			l.left = steps
			err := OpenPolicyChanges(l, uptime(time.Hour)).Save(newer)
			if (err == nil) != (steps == 2) {
				t.Fatalf("%d steps: %v", steps, err)
			}
			if spoils != "" {
				l.files[spoils] = make([]byte, 100)
			}
			got, _ := OpenPolicyChanges(l, uptime(time.Hour)).Load()
			if isNew := reflect.DeepEqual(got, &newer); !isNew && !reflect.DeepEqual(got, new(all())) || steps == 2 &&
				!isNew {
				t.Errorf("%d steps, %q spoilt: %+v", steps, spoils, got)
			}
		}
	}
}

// refusing is a folder whose files of these names cannot be read now.
type refusing struct {
	Disk
	names []string
}

func (u *refusing) Read(name string, refused os.FileMode, most int) ([]byte, error) {
	if slices.Contains(u.names, name) {
		return nil, &os.PathError{Op: "read", Path: name, Err: os.ErrPermission}
	}
	return u.Disk.Read(name, refused, most)
}

// What cannot be read now is kept apart from what is spoilt and from what is not there, and is not written over.
func TestUnreadIsNotLost(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name     string
		unread   []string
		gone     []string
		spoilt   []string
		read     bool
		isUnread bool
		isLost   bool
		saves    bool
	}{
		{name: "both are read", read: true, saves: true},
		{name: "one is read", unread: []string{changesName}, read: true, saves: true},
		{name: "the copy is read", unread: []string{changesCopyName}, read: true, saves: true},
		{name: "neither is read", unread: []string{changesName, changesCopyName}, isUnread: true},
		{name: "one is gone, the other not read", unread: []string{changesCopyName}, gone: []string{changesName},
			isUnread: true},
		{name: "one is spoilt, the other not read", unread: []string{changesCopyName}, spoilt: []string{changesName},
			isUnread: true},
		{name: "both are spoilt", spoilt: []string{changesName, changesCopyName}, isLost: true, saves: true},
		{name: "one is spoilt, the other gone", spoilt: []string{changesCopyName}, gone: []string{changesName},
			isLost: true, saves: true},
		{name: "both are gone", gone: []string{changesName, changesCopyName}, saves: true},
	} {
		u := &refusing{Disk: Disk(t.TempDir())}
		if err := OpenPolicyChanges(u, uptime(time.Hour)).Save(all()); err != nil {
			t.Fatal(err)
		}
		for _, name := range row.gone {
			_ = u.Remove(name)
		}
		for _, name := range row.spoilt {
			if err := os.WriteFile(u.path(name), []byte("nonsense"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		u.names = row.unread
		r := OpenPolicyChanges(u, uptime(time.Hour))
		b := Recover(r, nil, nil, anybodys, BootID())
		if (b.Record != nil) != row.read || (b.Unread != nil) != row.isUnread || (b.Lost != nil) != row.isLost {
			t.Errorf("%s: %+v", row.name, b)
		}
		if err := r.Save(first(1)); (err == nil) != row.saves {
			t.Errorf("%s: saving: %v", row.name, err)
		}
		u.names = nil
		if row.isUnread {
			if got, err := r.Load(); got == nil || !reflect.DeepEqual(got, new(all())) {
				t.Errorf("%s: and now: %+v, %v", row.name, got, err)
			}
			if err := r.Save(first(1)); err != nil {
				t.Errorf("%s: saving when it was read: %v", row.name, err)
			}
		}
	}
}

// Of what systemd kept and what the file has, tokens are taken from the newer by on-time, policy changes from both;
// another source's tokens are nobody's, and the policy changes beside them are.
func TestStartReadsAll(t *testing.T) {
	t.Parallel()
	at := func(source string, on time.Duration) tokencache.Snapshot {
		m := whole(1)
		m.Source, m.On, m.Record.On = source, on, on
		return m
	}
	here := func(boot, began time.Duration) tokencache.Snapshot {
		m := at("s", began+boot)
		m.BootID, m.Boot = "another boot", boot
		return m
	}
	for _, row := range []struct {
		name    string
		saved   *tokencache.Snapshot
		carried []tokencache.Snapshot
		want    time.Duration // of the memory; 0: none
		on      time.Duration
	}{
		{name: "nothing"},
		{name: "the file alone", saved: new(at("s", 50*time.Hour)), want: 50 * time.Hour, on: 50 * time.Hour},
		{name: "what systemd kept is newer", saved: new(at("s", 50*time.Hour)),
			carried: []tokencache.Snapshot{at("s", 51*time.Hour)}, want: 51 * time.Hour, on: 51 * time.Hour},
		{name: "the file is newer", saved: new(at("s", 52*time.Hour)),
			carried: []tokencache.Snapshot{at("s", 51*time.Hour)}, want: 52 * time.Hour, on: 52 * time.Hour},
		{name: "another source's is newer", saved: new(at("s", 50*time.Hour)),
			carried: []tokencache.Snapshot{at("t", 51*time.Hour)}, want: 50 * time.Hour, on: 51 * time.Hour},
		{name: "another source's alone", carried: []tokencache.Snapshot{at("t", 51*time.Hour)}, on: 51 * time.Hour},
		{name: "systemd kept this boot's, which did not know of the file", saved: new(at("s", 50*time.Hour)),
			carried: []tokencache.Snapshot{here(time.Minute, 0)}, want: time.Minute, on: 50 * time.Hour},
		{
			name: "systemd kept this boot's, before and after it knew of the file", saved: new(at("s", 50*time.Hour)),
			carried: []tokencache.Snapshot{here(2*time.Minute, 0), here(time.Minute, 50*time.Hour)},
			want:    2 * time.Minute, on: 50 * time.Hour,
		},
	} {
		dir := t.TempDir()
		tokens := openTokens(t, dir)
		if row.saved != nil {
			if err := tokens.Save(*row.saved); err != nil {
				t.Fatal(err)
			}
		}
		b := Recover(open(t, dir), tokens, row.carried, func(m *tokencache.Snapshot) bool { return m.Source == "s" },
			"another boot")
		var got time.Duration
		if b.Snapshot != nil {
			got = b.Snapshot.On
		}
		copies := len(row.carried)
		if row.saved != nil {
			copies++
		}
		if got != row.want || b.On != row.on || len(b.Copies) != copies {
			t.Errorf("%s: of %v, on %v, %d copies", row.name, got, b.On, len(b.Copies))
		}
	}
}

// A copy of the record that there is no room for leaves the marks on the tokens, and how many changes there were.
func TestMarksWithoutACopy(t *testing.T) {
	t.Parallel()
	m := whole(1)
	m.Record.Changes[0].Note = strings.Repeat("n", maxNote+1)
	tokens := openTokens(t, t.TempDir())
	if err := tokens.Save(m); err != nil {
		t.Fatal(err)
	}
	got, err := tokens.Load()
	if err != nil || len(got.Record.Changes) != 0 || got.OnRecord != 2 ||
		!slices.Equal(got.Keys[0].Withheld, []string{"a1", "gone"}) {
		t.Errorf("%+v, %v", got, err)
	}
	if got.Record.Generation != m.Record.Generation || got.Record.Lineage != m.Record.Lineage {
		t.Errorf("of which record the marks are is lost: %+v", got.Record)
	}
}

// A record that is gone beside a file of tokens was there, whatever became of that file.
func TestTokensWithoutARecord(t *testing.T) {
	t.Parallel()
	for name, row := range map[string]struct {
		spoil  func(path string) error
		key    *Key // nil: there is none
		reads  error
		unread bool
	}{
		"one byte is another": {spoil: func(path string) error { return changeByte(path, 100) }, key: testKey},
		"empty":               {spoil: func(path string) error { return os.Truncate(path, 0) }, key: testKey},
		"of another key":      {key: &Key{9}},
		"no key":              {},
		"put aside, and no key": {spoil: func(path string) error {
			return os.Rename(path, filepath.Join(filepath.Dir(path), unopenedName(binding.Serial, 1)))
		}},
		"not to be read now":         {key: testKey, reads: unix.EACCES, unread: true},
		"no descriptors, and no key": {reads: unix.EMFILE},
		"put aside, not to be read": {spoil: func(path string) error {
			return os.Rename(path, filepath.Join(filepath.Dir(path), unopenedName(binding.Serial, 1)))
		}, key: testKey, reads: unix.EIO, unread: true},
	} {
		dir := t.TempDir()
		if err := openTokens(t, dir).Save(revoked(1)); err != nil {
			t.Fatal(err)
		}
		if row.spoil != nil {
			if err := row.spoil(filepath.Join(dir, tokensName)); err != nil {
				t.Fatal(err)
			}
		}
		disk := &flaky{Disk: Disk(dir), reads: row.reads}
		var tokens *Tokens
		if row.key != nil {
			var err error
			if tokens, err = OpenTokens(disk, row.key); err != nil {
				t.Fatal(err)
			}
		}
		b := Recover(OpenPolicyChanges(disk, uptime(time.Hour)), tokens, nil, anybodys, "b")
		if b.Record != nil || (b.Unread != nil) != row.unread || (b.Lost != nil) == row.unread ||
			(b.UnreadTokens != nil) != row.unread {
			t.Errorf("%s: lost %v, unread %v, tokens %v", name, b.Lost, b.Unread, b.UnreadTokens)
		}
		if _, spoilt := errors.AsType[*SpoiltError](b.Unread); spoilt {
			t.Errorf("%s: that is never read: %v", name, b.Unread)
		}
	}
	if b := Recover(open(t, t.TempDir()), nil, nil, anybodys, "b"); b.Lost != nil || b.Unread != nil {
		t.Errorf("a first start: %+v", b)
	}
}

func changeByte(path string, at int) error {
	text, err := os.ReadFile(path)
	if err == nil {
		text[at] ^= 1
		err = os.WriteFile(path, text, 0o600)
	}
	return err
}

// A file of tokens that is spoilt is what tells a start that it is not the first one, where the record is gone: it does
// so until what is saved is on the disk, whichever step of that a full disk or a power cut ends at. Then it is moved
// aside.
func TestSpoiltTokensStayUntilOthersAreSaved(t *testing.T) {
	t.Parallel()
	own, other := unopenedName(binding.None, 1), unopenedName(binding.Serial, 1)
	for name, spoilt := range map[string][]string{
		"the file":                    {tokensName},
		"one that was put aside":      {own},
		"the file and one put aside":  {tokensName, own},
		"the file and another aside":  {tokensName, other},
		"all":                         {tokensName, own, other},
		"another that was put aside":  {other},
		"two that were put aside":     {own, other},
		"the file, not read at first": {tokensName},
	} {
		for steps := range 4 {
			l := &limited{files: make(map[string][]byte), left: steps}
			for _, name := range spoilt {
				l.files[name] = make([]byte, 512)
			}
			saved := false
			for n := range 2 {
				disk := &unreadOnce{limited: l}
				if n == 0 && strings.HasSuffix(name, "not read at first") {
					disk.left = 1
				}
				tokens := sealedIn(t, disk)
				b := Recover(OpenPolicyChanges(l, uptime(time.Hour)), tokens, nil, anybodys, "b")
				if b.Lost == nil && b.Unread == nil && len(b.Copies) == 0 {
					t.Errorf("%s, %d steps, start %d: a first start", name, steps, n+1)
				}
				saved = tokens.Save(revoked(1)) == nil || saved
			}
			b := Recover(OpenPolicyChanges(l, uptime(time.Hour)), sealedIn(t, l), nil, anybodys, "b")
			if b.Lost == nil && (len(b.Copies) == 0 || b.Copies[0].Record.Changes[0].ID != "noted-1") {
				t.Errorf("%s, %d steps: then a first start: %+v", name, steps, b)
			}
			if saved && (b.TokensFault != nil || b.Snapshot == nil || len(l.files) != 1) {
				t.Errorf("%s, %d steps, saved: %+v, %d files", name, steps, b, len(l.files))
			}
			if steps == 3 && !saved {
				t.Errorf("%s: it is not saved", name)
			}
		}
	}
}

// noRoom is a folder in which nothing can be opened while there are no descriptors: to rename needs none.
type noRoom struct {
	*limited
	out bool
}

func (n *noRoom) Read(name string, refused os.FileMode, most int) ([]byte, error) {
	if n.out {
		return nil, unix.EMFILE
	}
	return n.limited.Read(name, refused, most)
}

func (n *noRoom) Replace(name string, text []byte) error {
	if n.out {
		return unix.EMFILE
	}
	return n.limited.Replace(name, text)
}

// What cannot be read now is not known to be there: the file that is spoilt is not moved aside for it. Nor is anything
// written over it.
func TestSpoiltTokensStayWhereNothingCanBeRead(t *testing.T) {
	t.Parallel()
	own := unopenedName(binding.None, 1)
	for name, spoilt := range map[string][]string{"the file": {tokensName},
		"the file and one put aside": {tokensName, own}} {
		disk := &noRoom{limited: &limited{files: make(map[string][]byte), left: 9}}
		for _, name := range spoilt {
			disk.files[name] = make([]byte, 512)
		}
		tokens := sealedIn(t, disk)
		if b := Recover(OpenPolicyChanges(disk, uptime(time.Hour)), tokens, nil, anybodys, "b"); b.Lost == nil {
			t.Fatalf("%s: a first start", name)
		}
		disk.out = true
		if err := tokens.Save(revoked(1)); !errors.Is(err, unix.EMFILE) {
			t.Errorf("%s: %v", name, err)
		}
		disk.out = false
		if len(disk.files) != len(spoilt) {
			t.Errorf("%s: moved aside for nothing: %d files are left", name, len(disk.files))
		}
		if b := Recover(OpenPolicyChanges(disk, uptime(time.Hour)), sealedIn(t, disk), nil, anybodys,
			"b"); b.Lost == nil {
			t.Errorf("%s: then a first start", name)
		}
		if err := tokens.Save(revoked(1)); err != nil || len(disk.files) != 1 {
			t.Errorf("%s: with descriptors: %v, %d files", name, err, len(disk.files))
		}
	}
}

// A file beside the spoilt one that cannot be read is not written over to make way for others.
func TestSpoiltTokensMakeWayOverNothingUnread(t *testing.T) {
	t.Parallel()
	dir, own := t.TempDir(), unopenedName(binding.None, 1)
	if err := errors.Join(knownBy(t, dir).Save(revoked(1)), os.Rename(filepath.Join(dir, tokensName),
		filepath.Join(dir, own)),
		os.WriteFile(filepath.Join(dir, tokensName), make([]byte, 512), 0o600)); err != nil {
		t.Fatal(err)
	}
	disk := &refusing{Disk: Disk(dir), names: []string{own}}
	tokens := sealedIn(t, disk)
	if b := Recover(OpenPolicyChanges(disk, uptime(time.Hour)), tokens, nil, anybodys, "b"); b.UnreadTokens == nil {
		t.Fatalf("%+v", b)
	}
	if err := tokens.Save(revoked(2)); err != nil {
		t.Fatal(err)
	}
	b, _ := boots(t, dir)
	if ids := strings.Join(copiesOf(b), " "); ids != "noted-2 noted-1" {
		t.Errorf("what is known at last: %q of %q", ids, listing(t, dir))
	}
}

func sealedIn(t *testing.T, folder Folder) *Tokens {
	t.Helper()
	tokens, err := OpenTokens(folder, testKey)
	if err != nil {
		t.Fatal(err)
	}
	return tokens
}

// unreadOnce is a folder whose tokens' file cannot be read the first so many times.
type unreadOnce struct {
	*limited
	left int
}

func (u *unreadOnce) Read(name string, refused os.FileMode, most int) ([]byte, error) {
	if name == tokensName && u.left > 0 {
		u.left--
		return nil, unix.EIO
	}
	return u.limited.Read(name, refused, most)
}
