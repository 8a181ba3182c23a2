package store

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"perceptd/agent/deny"
	"perceptd/tokencache"
)

func denied(generation uint64, modules ...string) deny.Record {
	r := deny.Record{Lineage: "one", Generation: generation, Rules: []deny.Rule{}}
	for _, name := range modules {
		r.Rules = append(r.Rules, deny.Rule{
			ID: "id-" + name, Target: deny.Target{Module: name}, Origin: deny.Local, Note: "why <&>",
			Since: time.Date(2026, 11, 28, 8, 0, 0, 0, time.UTC), By: "uid 0 (pid 7)",
		})
	}
	return r
}

// openDeny opens the deny rules in a folder as a start does.
func openDeny(t testing.TB, folder Folder) *DenyRules {
	t.Helper()
	changes := OpenPolicyChanges(folder, uptime(time.Hour))
	_, _ = changes.Load()
	return OpenDenyRules(changes)
}

func loadDeny(t testing.TB, folder Folder) (*deny.Record, error) {
	t.Helper()
	return openDeny(t, folder).Load()
}

func mustSaveDeny(t testing.TB, folder Folder, record deny.Record) {
	t.Helper()
	r := openDeny(t, folder)
	if _, err := r.Load(); err != nil {
		t.Fatal(err)
	}
	if err := r.Save(record); err != nil {
		t.Fatal(err)
	}
}

func isSpoilt(err error) bool {
	_, spoilt := errors.AsType[*SpoiltError](err)
	return spoilt
}

func TestDenyRulesAreKept(t *testing.T) {
	t.Parallel()
	folder := Disk(t.TempDir())
	if got, err := loadDeny(t, folder); got != nil || err != nil {
		t.Fatalf("a first start: %v, %v", got, err)
	}
	want := denied(3, "vision", "speech")
	want.Hub, want.Aside = "hub/edge", &deny.Aside{On: want.Rules[0].Since, By: "uid 0", Hubs: []string{"hub/edge"}}
	want.Lost = "it was"
	mustSaveDeny(t, folder, want)
	if got, err := loadDeny(t, folder); err != nil || !reflect.DeepEqual(*got, want) {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestSpoiltDenyRules(t *testing.T) {
	t.Parallel()
	spoil := map[string]func(path string) error{
		"half":    func(path string) error { return os.WriteFile(path, []byte(`{"version":1,`), 0o600) },
		"empty":   func(path string) error { return os.WriteFile(path, nil, 0o600) },
		"another": func(path string) error { return os.WriteFile(path, []byte(`{"version":1,"rules":[]}`), 0o600) },
		"a rule of nothing": func(path string) error {
			return os.WriteFile(path, []byte(`{"version":1,"lineage":"x","rules":[{"id":"a","origin":"local"}]}`),
				0o600)
		},
		"a folder":  func(path string) error { return errors.Join(os.Remove(path), os.Mkdir(path, 0o700)) },
		"not there": os.Remove,
	}
	for name, spoil := range spoil {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, files := range [][]string{{denyName}, {denyCopyName}, {denyName, denyCopyName}} {
				dir := t.TempDir()
				folder := Disk(dir)
				changes := OpenPolicyChanges(folder, uptime(time.Hour))
				r := OpenDenyRules(changes)
				want := denied(1, "vision")
				if err := errors.Join(r.Save(want), changes.Save(all())); err != nil {
					t.Fatal(err)
				}
				for _, file := range files {
					if err := spoil(filepath.Join(dir, file)); err != nil {
						t.Fatal(err)
					}
				}
				again := openDeny(t, folder)
				got, err := again.Load()
				if err == nil {
					t.Errorf("%v: nothing is wrong", files)
				}
				if len(files) == 2 {
					if got != nil || !isSpoilt(err) {
						t.Errorf("both: %v, %v", got, err)
					}
					if _, err := loadDeny(t, folder); !isSpoilt(err) {
						t.Errorf("at the next start: %v", err)
					}
				} else if got == nil || !reflect.DeepEqual(*got, want) {
					t.Errorf("%v: %+v, %v", files, got, err)
				}
				if err := again.Save(denied(2, "speech")); err != nil {
					t.Fatalf("%v: %v", files, err)
				}
				if got, err := loadDeny(t, folder); err != nil || !reflect.DeepEqual(*got, denied(2, "speech")) {
					t.Errorf("%v: then %+v, %v", files, got, err)
				}
			}
		})
	}
}

// What others could have changed denies what is in it, and counts as lost where nothing else is left.
func TestLooseDenyRules(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		loose, gone []string
		lost        bool
	}{
		{[]string{denyName}, nil, false},
		{[]string{denyCopyName}, nil, false},
		{[]string{denyName, denyCopyName}, nil, true},
		{[]string{denyName}, []string{denyCopyName}, true},
		{[]string{denyCopyName}, []string{denyName}, true},
	} {
		dir := t.TempDir()
		mustSaveDeny(t, Disk(dir), denied(1, "vision"))
		for _, name := range row.loose {
			if err := os.Chmod(filepath.Join(dir, name), 0o666); err != nil {
				t.Fatal(err)
			}
		}
		for _, name := range row.gone {
			if err := os.Remove(filepath.Join(dir, name)); err != nil {
				t.Fatal(err)
			}
		}
		r := openDeny(t, Disk(dir))
		got, err := r.Load()
		if got == nil || err == nil || len(got.Rules) != 1 || (got.Lost != "") != row.lost {
			t.Fatalf("%+v: %+v, %v", row, got, err)
		}
		if err := r.Save(*got); err != nil {
			t.Fatal(err)
		}
		if again, err := loadDeny(t, Disk(dir)); err != nil || !again.Equal(*got) {
			t.Errorf("%+v: then %+v, %v", row, again, err)
		}
	}
}

// The kept tokens note that there are deny rules, too: for a start at which both records are gone.
func TestTokensNoteDenyRules(t *testing.T) {
	t.Parallel()
	for _, noted := range []bool{false, true} {
		m := small()
		m.DenyRules = noted
		text, err := encodeSnapshot(m)
		if err != nil {
			t.Fatal(err)
		}
		again, err := decodeSnapshot(text)
		if err != nil {
			t.Fatal(err)
		}
		changes := OpenPolicyChanges(Disk(t.TempDir()), uptime(time.Hour))
		Recover(changes, nil, []tokencache.Snapshot{*again}, func(*tokencache.Snapshot) bool { return true }, "b")
		got, err := OpenDenyRules(changes).Load()
		if got != nil || isSpoilt(err) != noted {
			t.Errorf("noted %v: %v, %v", noted, got, err)
		}
	}
}

// What cannot be read now is not lost, and is not overwritten.
func TestUnreadDenyRules(t *testing.T) {
	t.Parallel()
	folder := &faulty{Disk: Disk(t.TempDir())}
	mustSaveDeny(t, folder, denied(1, "vision"))
	r := openDeny(t, folder)
	folder.read = unix.EIO
	if got, err := r.Load(); got != nil || err == nil || isSpoilt(err) {
		t.Fatalf("%v, %v", got, err)
	}
	if err := r.Save(denied(2)); err == nil {
		t.Error("it was overwritten")
	}
	folder.read = nil
	if got, err := r.Load(); err != nil || !reflect.DeepEqual(*got, denied(1, "vision")) {
		t.Errorf("%v, %v", got, err)
	}
	if err := r.Save(denied(2)); err != nil {
		t.Error(err)
	}
}

// faulty is a folder that fails, or in which a process is killed after so many steps.
type faulty struct {
	Disk
	read, write error
	steps       int // until it is killed; 0: it is not
	killed      bool
}

var errKilled = errors.New("killed")

func (f *faulty) Read(name string, refused fs.FileMode, most int) ([]byte, error) {
	if f.read != nil {
		return nil, f.read
	}
	return f.Disk.Read(name, refused, most)
}

// step returns why nothing happens any more.
func (f *faulty) step() error {
	if f.killed {
		return errKilled
	}
	if f.steps--; f.steps == 0 {
		f.killed = true
		return errKilled
	}
	return f.write
}

// Replace is killed before it writes, while it does, or after.
func (f *faulty) Replace(name string, text []byte) error {
	if err := f.step(); err != nil {
		return err
	}
	if err := f.step(); err != nil {
		return errors.Join(err, os.WriteFile(f.path(name)+beingWritten, text[:len(text)/2], 0o600))
	}
	return errors.Join(f.Disk.Replace(name, text), f.step())
}

func (f *faulty) Aside(name string) (string, error) {
	if err := f.step(); err != nil {
		return "", err
	}
	return f.Disk.Aside(name)
}

// Killed at whatever step of a save, with both files sound or one of them spoilt: the next start has the record from
// before or the new one, whole, and never none.
func TestDenyRulesKilledAtEveryStep(t *testing.T) {
	t.Parallel()
	before, after := denied(1, "vision"), denied(2, "vision", "speech")
	for _, spoilt := range []string{"", denyName, denyCopyName} {
		olds, news := 0, 0
		for step := 1; ; step++ {
			dir := t.TempDir()
			mustSaveDeny(t, Disk(dir), before)
			if spoilt != "" {
				if err := os.WriteFile(filepath.Join(dir, spoilt), []byte("{"), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			folder := &faulty{Disk: Disk(dir), steps: step}
			r := openDeny(t, folder)
			_, _ = r.Load()
			err := r.Save(after)
			got, loadErr := loadDeny(t, Disk(dir))
			switch {
			case got == nil:
				t.Fatalf("%q spoilt, step %d: the record is lost: %v", spoilt, step, loadErr)
			case reflect.DeepEqual(*got, before) && err != nil:
				olds++
			case reflect.DeepEqual(*got, after):
				news++
			default:
				t.Fatalf("%q spoilt, step %d: %+v, %v", spoilt, step, got, err)
			}
			if !folder.killed {
				break
			}
		}
		if olds == 0 || news < 2 {
			t.Errorf("%q spoilt: %d times the older, %d times the newer", spoilt, olds, news)
		}
	}
}

func TestDenyRulesOnAFullDisk(t *testing.T) {
	t.Parallel()
	folder := &faulty{Disk: Disk(t.TempDir())}
	mustSaveDeny(t, folder, denied(1, "vision"))
	r := openDeny(t, folder)
	folder.write = unix.ENOSPC
	if err := r.Save(denied(2)); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("%v", err)
	}
	if got, err := loadDeny(t, folder); err != nil || !reflect.DeepEqual(*got, denied(1, "vision")) {
		t.Errorf("%v, %v", got, err)
	}
	folder.write = nil
	if err := r.Save(denied(2)); err != nil {
		t.Error(err)
	}
}

// A record that is too large, or that could not be read again, is not written.
func TestDenyRulesThatAreNotWritten(t *testing.T) {
	t.Parallel()
	r := openDeny(t, Disk(t.TempDir()))
	for name, record := range map[string]deny.Record{
		"no lineage": {}, "no ID": {Lineage: "x", Rules: []deny.Rule{{Target: deny.Target{All: true},
			Origin: deny.Twin}}},
	} {
		if err := r.Save(record); err == nil {
			t.Errorf("%s: it was written", name)
		}
	}
}

// What systemd holds is the latest record, also where it does not take one.
func TestDenyRulesAreHandedOver(t *testing.T) {
	t.Parallel()
	held := make(map[string]*os.File)
	var refuse error
	open := func() *DenyHandoff {
		return &DenyHandoff{Handoff: Handoff{
			Store: func(name string, fd int) error {
				if refuse != nil {
					return refuse
				}
				copied, err := unix.Dup(fd)
				held[name] = os.NewFile(uintptr(copied), name)
				return err
			},
			Discard: func(name string) error {
				_ = held[name].Close()
				delete(held, name)
				return nil
			},
		}}
	}
	take := func(h *DenyHandoff) []deny.Record {
		return h.Take(held, func(name string, why error) { t.Errorf("%s: %v", name, why) })
	}
	h := open()
	for n := range uint64(3) {
		if err := h.Save(denied(n, fmt.Sprint("m", n))); err != nil {
			t.Fatal(err)
		}
	}
	next := open()
	if all := take(next); len(all) != 1 || !reflect.DeepEqual(all[0], denied(2, "m2")) {
		t.Fatalf("%+v", all)
	}
	if err := next.Save(denied(3)); err != nil || len(held) != 1 {
		t.Fatalf("%v: %v", held, err)
	}
	last := open()
	if all := take(last); len(all) != 1 || !reflect.DeepEqual(all[0], denied(3)) {
		t.Fatalf("%+v", all)
	}
	refuse = unix.EAGAIN
	if err := last.Save(denied(4, "x")); err == nil || len(held) != 0 {
		t.Errorf("%v; %d older ones are held", err, len(held))
	}
}

func FuzzDenyRules(f *testing.F) {
	text, err := encodeDeny(denied(1, "vision"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add([]byte(`{"version":1,"lineage":"x","rules":null}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		record, err := decodeDeny(text)
		if err != nil {
			return
		}
		again, err := encodeDeny(*record)
		if err != nil {
			t.Fatalf("what was read cannot be written: %v", err)
		}
		if twice, err := decodeDeny(again); err != nil || !twice.Equal(*record) {
			t.Fatalf("%v: %+v is read again as %+v", err, record, twice)
		}
	})
}

// A file that cannot be replaced does not keep the other from being written.
func TestOneFileOfDenyRulesIsWritten(t *testing.T) {
	t.Parallel()
	for _, name := range []string{denyName, denyCopyName} {
		for _, at := range []string{name, name + beingWritten} {
			dir := t.TempDir()
			r := openDeny(t, Disk(dir))
			if err := os.MkdirAll(filepath.Join(dir, at, "x"), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := r.Save(denied(1, "vision")); err == nil {
				t.Errorf("%s is a folder, and nothing is said", at)
			}
			if got, err := openDeny(t, Disk(dir)).Load(); got == nil || len(got.Rules) != 1 {
				t.Errorf("%s is a folder, and the other file has %+v, %v", at, got, err)
			}
		}
	}
}

// The record of policy changes notes which record of deny rules was there last, and a file that others could have
// changed says nothing of it.
func TestPolicyChangesNoteTheDenyRecord(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	changes := OpenPolicyChanges(Disk(dir), uptime(time.Hour))
	must(os.Chmod(dir, 0o700))
	record := denied(3, "vision")
	must(OpenDenyRules(changes).Save(record))
	must(changes.Save(tokencache.Record{Lineage: "c", Generation: 1}))
	again := OpenPolicyChanges(Disk(dir), uptime(time.Hour))
	if _, err := again.Load(); err != nil || again.DenyRecord() != record.Origin() {
		t.Errorf("%+v, %v", again.DenyRecord(), err)
	}
	for _, name := range []string{changesName, changesCopyName} {
		must(os.Chmod(filepath.Join(dir, name), 0o622))
	}
	loose := OpenPolicyChanges(Disk(dir), uptime(time.Hour))
	_, _ = loose.Load()
	if of := loose.DenyRecord(); of != (tokencache.Origin{}) {
		t.Errorf("files that others could have changed say %+v", of)
	}
}

// A folder that takes the place of the one that was read is read before anything is written there, and an empty one is
// no loss.
func TestDenyRulesOfAnotherFolder(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "state")
	exchange := func() {
		t.Helper()
		_ = os.RemoveAll(dir + ".old")
		if err := errors.Join(os.Rename(dir, dir+".old"), os.Mkdir(dir, 0o700)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	r := openDeny(t, Disk(dir))
	if _, err := r.Load(); err != nil {
		t.Fatal(err)
	}
	if _, isOther, err := r.LoadOther(); isOther || err != nil {
		t.Errorf("the same folder: %v, %v", isOther, err)
	}
	if err := r.Save(denied(1, "a")); err != nil {
		t.Fatal(err)
	}
	exchange()
	if record, isOther, err := r.LoadOther(); record != nil || !isOther || err != nil {
		t.Errorf("an empty folder: %+v, %v, %v", record, isOther, err)
	}
	exchange()
	mustSaveDeny(t, Disk(dir), denied(1, "vision"))
	if record, isOther, err := r.LoadOther(); record == nil || record.Rules[0].Module != "vision" || !isOther ||
		err != nil {
		t.Errorf("another record: %+v, %v, %v", record, isOther, err)
	}
	if _, isOther, _ := r.LoadOther(); isOther {
		t.Error("it is another one still")
	}
	exchange()
	for _, name := range []string{denyName, denyCopyName} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if record, isOther, err := r.LoadOther(); record != nil || !isOther || !isSpoilt(err) {
		t.Errorf("spoilt files: %+v, %v, %v", record, isOther, err)
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if _, isOther, err := r.LoadOther(); isOther || err != nil {
		t.Errorf("no folder: %v, %v", isOther, err)
	}
}

// Where a spoilt file goes is said with the folder, and is so before it is moved and after.
func TestSpoiltDenyRulesAreFound(t *testing.T) {
	t.Parallel()
	folder := Disk(t.TempDir())
	for _, name := range []string{denyName, denyCopyName} {
		if err := folder.Replace(name, []byte("spoilt")); err != nil {
			t.Fatal(err)
		}
	}
	r := openDeny(t, folder)
	_, err := r.Load()
	if err == nil {
		t.Fatal("a spoilt file was read")
	}
	at := strings.LastIndex(err.Error(), " kept as ")
	pattern := strings.TrimPrefix(err.Error()[max(at, 0):], " kept as ")
	if want := filepath.Join(string(folder), denyName+unreadable) + "*"; pattern != want {
		t.Errorf("%v", err)
	}
	if before, _ := filepath.Glob(pattern); before != nil {
		t.Errorf("%v", before)
	}
	if err := r.Save(deny.Record{Lineage: "a", Generation: 1}); err != nil {
		t.Fatal(err)
	}
	if after, _ := filepath.Glob(pattern); len(after) != 1 {
		t.Errorf("%v", after)
	}
}
