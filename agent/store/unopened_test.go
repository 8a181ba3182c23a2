package store

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"perceptd/agent/binding"
	"perceptd/tokencache"
)

// revoked is a memory of one token that was taken then, with a copy of the record that a revocation is on.
func revoked(on time.Duration) tokencache.Snapshot {
	m := small()
	m.On = on
	m.Record.Lineage, m.Record.Generation = "l", uint64(on)
	m.Record.Changes = []tokencache.PolicyChange{{ID: fmt.Sprint("noted-", int64(on)), AllIdentities: true, At: noon,
		RecordedAt: noon, Effect: tokencache.Revoked}}
	m.OnRecord = 1
	m.Keys[0].Withheld = []string{m.Record.Changes[0].ID}
	return m
}

// boots starts on a device that is known by that, and returns what it begins with.
func boots(t *testing.T, dir string, known ...binding.Binding) (Recovery, *Tokens) {
	t.Helper()
	tokens := knownBy(t, dir, known...)
	return Recover(open(t, dir), tokens, nil, anybodys, "b"), tokens
}

// copiesOf returns the IDs of the changes that copies have.
func copiesOf(b Recovery) (ids []string) {
	for _, m := range b.Copies {
		for _, p := range m.Record.Changes {
			ids = append(ids, p.ID)
		}
	}
	return ids
}

func setAside(t *testing.T, dir string) (names []string) {
	t.Helper()
	for _, name := range listing(t, dir) {
		if strings.Contains(name, ".un") {
			names = append(names, name)
		}
	}
	return names
}

// What the device is known by cannot be read at one start, or at some: the tokens' file stays as it is. What is saved
// meanwhile loses nothing of it, and the next start that can open it has all of both. Then it goes.
func TestDeviceIsNotKnownAtOneStart(t *testing.T) {
	t.Parallel()
	for name, meanwhile := range map[string][]bool{ // whether each start that cannot open it saves
		"nothing is saved":      {false},
		"saved":                 {true},
		"saved, three starts":   {true, true, true},
		"saved at the last one": {false, false, true},
	} {
		for which, known := range map[string][]binding.Binding{"by less": {machine}, "by nothing": nil} {
			t.Run(name+", "+which, func(t *testing.T) {
				t.Parallel()
				dir := t.TempDir()
				if err := errors.Join(open(t, dir).Save(all()), knownBy(t, dir, product,
					machine).Save(revoked(1))); err != nil {
					t.Fatal(err)
				}
				path := filepath.Join(dir, tokensName)
				sealed, err := os.ReadFile(path)
				if err != nil {
					t.Fatal(err)
				}
				saved := 0
				for i, saves := range meanwhile {
					b, tokens := boots(t, dir, known...)
					unopened, ok := errors.AsType[*UnopenedError](b.TokensFault)
					if !ok || unopened.Kind != binding.ProductUUID || b.Record == nil || b.Lost != nil ||
						len(b.Copies) != min(1, saved) {
						t.Errorf("start %d: %v, %d copies, lost %v", i, b.TokensFault, len(b.Copies), b.Lost)
					}
					if text, err := os.ReadFile(path); saved == 0 && !bytes.Equal(text, sealed) {
						t.Errorf("start %d: it did not stay: %v, %q", i, err, listing(t, dir))
					}
					if !saves {
						continue
					}
					for range 2 {
						saved++
						if err := tokens.Save(revoked(time.Duration(10 + i))); err != nil {
							t.Error(err)
						}
					}
					if text, err := os.ReadFile(filepath.Join(dir, unopenedName(binding.ProductUUID, 1))); err != nil ||
						!bytes.Equal(text, sealed) {
						t.Errorf("start %d: it was not kept: %v, %q", i, err, listing(t, dir))
					}
				}
				b, tokens := boots(t, dir, product, machine)
				newest := time.Duration(1)
				if saved > 0 {
					newest = time.Duration(10 + len(meanwhile) - 1)
				}
				ids := strings.Join(copiesOf(b), " ")
				if b.TokensFault != nil || b.Snapshot == nil || b.Snapshot.On != newest ||
					!strings.Contains(ids, "noted-1") || !strings.Contains(ids, fmt.Sprint("noted-", int64(newest))) {
					t.Errorf("known again: %v, %v, copies of %q", b.TokensFault, b.Snapshot, ids)
				}
				if err := tokens.Save(revoked(99)); err != nil {
					t.Error(err)
				}
				if left := setAside(t, dir); len(left) != 0 {
					t.Errorf("left: %q", left)
				}
				if b, _ := boots(t, dir, product); b.TokensFault != nil || b.Snapshot == nil || b.Snapshot.On != 99 {
					t.Errorf("at last: %v, %v", b.TokensFault, b.Snapshot)
				}
			})
		}
	}
}

// flaky is a disk whose reads of the tokens fail, or whose n-th write from now on does.
type flaky struct {
	Disk
	reads error
	n     int
}

func (f *flaky) Read(name string, refused fs.FileMode, most int) ([]byte, error) {
	if f.reads != nil && strings.HasPrefix(name, tokensName) {
		return nil, &FaultError{Why: f.reads, path: f.path(name)}
	}
	return f.Disk.Read(name, refused, most)
}

func (f *flaky) Replace(name string, text []byte) error {
	if f.n--; f.n == 0 {
		return &FaultError{Why: unix.ENOSPC, path: f.path(name), writes: true}
	}
	return f.Disk.Replace(name, text)
}

// What could not be read at a start is not overwritten before it can be, and is kept then: it may have what nothing
// else has.
func TestUnreadTokensAreNotOverwritten(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := knownBy(t, dir, product).Save(revoked(1)); err != nil {
		t.Fatal(err)
	}
	disk := &flaky{Disk: Disk(dir), reads: unix.EMFILE}
	tokens, err := OpenTokens(disk, testKey, product)
	if err != nil {
		t.Fatal(err)
	}
	if m, err := tokens.Load(); m != nil || !errors.Is(err, unix.EMFILE) {
		t.Errorf("%v, %v", m, err)
	}
	for range 2 {
		err := tokens.Save(revoked(2))
		var told interface{ Remedy() string }
		if !errors.Is(err, unix.EMFILE) || !errors.As(err, &told) || !strings.Contains(told.Remedy(), "descriptors") {
			t.Errorf("saved over it: %v", err)
		}
	}
	disk.reads = nil
	if err := tokens.Save(revoked(3)); err != nil {
		t.Error(err)
	}
	b, _ := boots(t, dir, product)
	if ids := strings.Join(copiesOf(b), " "); b.Snapshot == nil || b.Snapshot.On != 3 || ids != "noted-3 noted-1" {
		t.Errorf("%v, copies of %q", b.Snapshot, ids)
	}
	if err := os.Remove(filepath.Join(dir, tokensName)); err != nil { // it is gone when it can be read
		t.Fatal(err)
	}
	tokens.unopened = true
	if err := tokens.Save(revoked(4)); err != nil {
		t.Error(err)
	}
	if err := os.WriteFile(filepath.Join(dir, tokensName), []byte("x"), 0o600); err != nil { // or spoilt
		t.Fatal(err)
	}
	tokens.unopened = true
	if err := tokens.Save(revoked(5)); err != nil || len(setAside(t, dir)) != 2 {
		t.Errorf("%v, %q", err, setAside(t, dir))
	}
}

// A crash or a full disk at either step of such a save loses nothing.
func TestCrashWhileUnopenedIsKept(t *testing.T) {
	t.Parallel()
	for step := 1; step <= 2; step++ {
		dir := t.TempDir()
		if err := knownBy(t, dir, product).Save(revoked(1)); err != nil {
			t.Fatal(err)
		}
		tokens, err := OpenTokens(&flaky{Disk: Disk(dir), n: step}, testKey, machine)
		if err != nil {
			t.Fatal(err)
		}
		if m, err := tokens.Load(); m != nil || err == nil {
			t.Errorf("%v, %v", m, err)
		}
		if err := tokens.Save(revoked(2)); !errors.Is(err, unix.ENOSPC) {
			t.Errorf("step %d: %v", step, err)
		}
		b, _ := boots(t, dir, product, machine)
		if b.TokensFault != nil || b.Snapshot == nil || b.Snapshot.On != 1 {
			t.Errorf("step %d: %v, %v", step, b.TokensFault, b.Snapshot)
		}
		if err := tokens.Save(revoked(3)); err != nil { // there is room again
			t.Errorf("step %d: %v", step, err)
		}
		if b, _ := boots(t, dir, product, machine); b.TokensFault != nil || b.Snapshot == nil || b.Snapshot.On != 3 ||
			len(b.Copies) != 2 {
			t.Errorf("step %d, with room: %v, %v, %d copies", step, b.TokensFault, b.Snapshot, len(b.Copies))
		}
	}
}

// A record that is gone where a file of tokens cannot be opened is lost, and this is no first start: the file may have
// a copy of it.
func TestRecordIsGoneAndItsCopyUnopened(t *testing.T) {
	t.Parallel()
	for name, known := range map[string][]binding.Binding{"by less": {machine}, "by nothing": nil} {
		dir := t.TempDir()
		if err := knownBy(t, dir, product).Save(revoked(1)); err != nil {
			t.Fatal(err)
		}
		b, tokens := boots(t, dir, known...)
		if b.Record != nil || b.Lost == nil || b.Unread != nil || len(b.Copies) != 0 {
			t.Errorf("%s: lost %v, %+v", name, b.Lost, b.Record)
		}
		// The file is put aside, and stays.
		if err := errors.Join(tokens.Save(small()), tokens.folder.Remove(tokensName)); err != nil {
			t.Error(err)
		}
		if b, _ := boots(t, dir, known...); b.Lost == nil {
			t.Errorf("%s, put aside: a first start", name)
		}
	}
	dir := t.TempDir()
	if err := knownBy(t, dir, product).Save(revoked(1)); err != nil {
		t.Fatal(err)
	}
	another := binding.Binding{Kind: binding.ProductUUID, ID: [32]byte{9}}
	if b, _ := boots(t, dir, another); b.Lost == nil || b.TokensFault == nil { // a first start has no tokens
		t.Errorf("of another device: %v, %v", b.Lost, b.TokensFault)
	}
	if b, _ := boots(t, t.TempDir(), product); b.Lost != nil || b.TokensFault != nil {
		t.Errorf("a first start: %v, %v", b.Lost, b.TokensFault)
	}
}

// What is read again comes once, as soon as it can be read, though there is more that still cannot be: then nothing
// else has it, and a save between loses none of the rest.
func TestUnreadTokensComeOneByOne(t *testing.T) {
	t.Parallel()
	aside := unopenedName(product.Kind, 1)
	for name, row := range map[string]struct {
		known []binding.Binding // when the later file was sealed, while the earlier was not open
		first string            // what can be read first
		saves bool              // then something is saved before it is read again
	}{
		"the file first":                    {known: []binding.Binding{machine}, first: tokensName},
		"the file first, then a save":       {known: []binding.Binding{machine}, first: tokensName, saves: true},
		"the one put aside first":           {known: []binding.Binding{machine}, first: aside},
		"of one kind, the file first":       {known: []binding.Binding{product}, first: tokensName},
		"of one kind, the file, then saved": {known: []binding.Binding{product}, first: tokensName, saves: true},
		"of one kind, the other first":      {known: []binding.Binding{product}, first: aside},
	} {
		dir := t.TempDir()
		if err := errors.Join(knownBy(t, dir, product).Save(revoked(1)),
			os.Rename(filepath.Join(dir, tokensName), filepath.Join(dir, aside)),
			knownBy(t, dir, row.known...).Save(revoked(2))); err != nil {
			t.Fatal(err)
		}
		disk := &refusing{Disk: Disk(dir), names: []string{tokensName, aside}}
		tokens, err := OpenTokens(disk, testKey, product, machine)
		if err != nil {
			t.Fatal(err)
		}
		if b := Recover(open(t, dir), tokens, nil, anybodys, "b"); b.UnreadTokens == nil || len(b.Copies) != 0 {
			t.Fatalf("%s: %+v", name, b)
		}
		read := func(want error) (ids []string) {
			all, err := tokens.LoadAgain()
			if !errors.Is(err, want) {
				t.Errorf("%s: %v, want %v", name, err, want)
			}
			return copiesOf(Recovery{Copies: all})
		}
		if ids := read(os.ErrPermission); len(ids) != 0 {
			t.Errorf("%s: %q", name, ids)
		}
		disk.names = slices.DeleteFunc(disk.names, func(name string) bool { return name == row.first })
		if row.saves {
			if err := tokens.Save(revoked(3)); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		ids := read(os.ErrPermission)
		if row.first == tokensName {
			if err := tokens.Save(revoked(4)); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		if len(ids) != 1 {
			t.Errorf("%s: read %q", name, ids)
		}
		ids = append(ids, read(os.ErrPermission)...)
		disk.names = nil
		ids = append(ids, read(nil)...)
		slices.Sort(ids)
		if !slices.Equal(ids, []string{"noted-1", "noted-2"}) {
			t.Errorf("%s: read in the end: %q", name, ids)
		}
		if ids := read(nil); len(ids) != 0 {
			t.Errorf("%s: again %q", name, ids)
		}
		if err := tokens.Save(revoked(5)); err != nil || !slices.Equal(listing(t, dir), []string{tokensName}) {
			t.Errorf("%s: %v, %q", name, err, listing(t, dir))
		}
	}
}

// What was put aside, and could not be read since, is not written over by what is put aside later.
func TestPutAsideAndNeverRead(t *testing.T) {
	t.Parallel()
	dir, aside := t.TempDir(), unopenedName(product.Kind, 1)
	if err := errors.Join(knownBy(t, dir, product).Save(revoked(1)), os.Rename(filepath.Join(dir, tokensName),
		filepath.Join(dir, aside))); err != nil {
		t.Fatal(err)
	}
	tokens, err := OpenTokens(&refusing{Disk: Disk(dir), names: []string{aside}}, testKey, product)
	if err != nil {
		t.Fatal(err)
	}
	if b := Recover(open(t, dir), tokens, nil, anybodys, "b"); b.UnreadTokens == nil {
		t.Fatal(b)
	}
	if err := tokens.Save(revoked(2)); err != nil { // who writes it could open what is aside, and has not read it
		t.Fatal(err)
	}
	_, tokens = boots(t, dir) // nothing tells the device
	if err := tokens.Save(revoked(3)); err != nil {
		t.Fatal(err)
	}
	b, tokens := boots(t, dir, product)
	ids := copiesOf(b)
	slices.Sort(ids)
	if !slices.Equal(ids, []string{"noted-1", "noted-2", "noted-3"}) {
		t.Errorf("what is known at last: %q", ids)
	}
	if err := tokens.Save(revoked(4)); err != nil || !slices.Equal(listing(t, dir), []string{tokensName}) {
		t.Errorf("%v, %q", err, listing(t, dir))
	}
}

// So much is put aside and no more. Then nothing is saved, and the error says what to do, until there is room: one is
// removed, or found spoilt.
func TestFewArePutAside(t *testing.T) {
	t.Parallel()
	for name, makeRoom := range map[string]func(path string) error{
		"removed": os.Remove, "spoilt": func(path string) error { return os.WriteFile(path, []byte("x"), 0o600) },
	} {
		dir := t.TempDir()
		var want []string
		for n := range maxUnopened + 1 {
			if err := knownBy(t, dir, product).Save(revoked(time.Duration(n))); err != nil {
				t.Fatal(err)
			}
			if n < maxUnopened {
				if err := os.Rename(filepath.Join(dir, tokensName), filepath.Join(dir,
					unopenedName(product.Kind, n+1))); err != nil {
					t.Fatal(err)
				}
			}
			want = append(want, fmt.Sprint("noted-", n))
		}
		for range 2 {
			_, tokens := boots(t, dir)
			if err := tokens.Save(revoked(99)); err == nil || !strings.Contains(err.Error(),
				"remove those of another device") || !strings.Contains(err.Error(), unopenedName(product.Kind, 1)) {
				t.Errorf("saved: %v", err)
			}
			if len(listing(t, dir)) != maxUnopened+1 {
				t.Errorf("%q", listing(t, dir))
			}
		}
		b, _ := boots(t, dir, product)
		ids := copiesOf(b)
		slices.Sort(ids)
		if !slices.Equal(ids, want) {
			t.Errorf("known again: %q, want %q", ids, want)
		}
		if err := makeRoom(filepath.Join(dir, unopenedName(product.Kind, 2))); err != nil {
			t.Fatal(err)
		}
		_, tokens := boots(t, dir)
		if err := tokens.Save(revoked(99)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		b, tokens = boots(t, dir, product)
		if len(b.Copies) != maxUnopened+1 {
			t.Errorf("%s, known again: %q", name, copiesOf(b))
		}
		if err := tokens.Save(revoked(100)); err != nil {
			t.Error(err)
		}
		if left := slices.DeleteFunc(setAside(t, dir), func(name string) bool {
			return strings.Contains(name, unreadable)
		}); len(left) != 0 {
			t.Errorf("%s, known again: %q", name, left)
		}
	}
}

// unwritable is a disk that has no room for the tokens' file.
type unwritable struct{ Disk }

func (u unwritable) Replace(name string, text []byte) error {
	if name == tokensName {
		return unix.ENOSPC
	}
	return u.Disk.Replace(name, text)
}

// Starts that come no further than that put one file aside, and not one each; and where neither it nor the tokens' file
// can be read for a while, what both have is read once.
func TestOneIsPutAsideOnce(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := knownBy(t, dir, product).Save(revoked(1)); err != nil {
		t.Fatal(err)
	}
	for n := range 2 {
		tokens, err := OpenTokens(unwritable{Disk(dir)}, testKey, machine)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := tokens.Load(); err == nil {
			t.Error("opened")
		}
		if err := tokens.Save(revoked(2)); !errors.Is(err, unix.ENOSPC) {
			t.Errorf("start %d: %v", n, err)
		}
		if names := setAside(t, dir); !slices.Equal(names, []string{unopenedName(product.Kind, 1)}) {
			t.Errorf("start %d: %q", n, names)
		}
	}
	disk := &refusing{Disk: Disk(dir), names: []string{tokensName, unopenedName(product.Kind, 1)}}
	tokens, err := OpenTokens(disk, testKey, product)
	if err != nil {
		t.Fatal(err)
	}
	if b := Recover(open(t, dir), tokens, nil, anybodys, "b"); b.UnreadTokens == nil || len(b.Copies) != 0 {
		t.Fatalf("%+v", b)
	}
	disk.names = nil
	if err := tokens.Save(revoked(3)); err != nil {
		t.Error(err)
	}
	if all, err := tokens.LoadAgain(); err != nil || len(all) != 1 || all[0].On != 1 {
		t.Errorf("read again: %v, %v", all, err)
	}
	if err := tokens.Save(revoked(4)); err != nil || !slices.Equal(listing(t, dir), []string{tokensName}) {
		t.Errorf("%v, %q", err, listing(t, dir))
	}
}

// What this process has opened is not written over either by what it could not read at first: until its save is through
// nothing else on the disk has it.
func TestOpenedStaysUntilSaved(t *testing.T) {
	t.Parallel()
	for step := 1; step <= 2; step++ {
		dir := t.TempDir()
		if err := errors.Join(knownBy(t, dir, product).Save(revoked(1)),
			os.Rename(filepath.Join(dir, tokensName), filepath.Join(dir, unopenedName(product.Kind, 1))),
			knownBy(t, dir, product).Save(revoked(2))); err != nil {
			t.Fatal(err)
		}
		refuses := &refusing{Disk: Disk(dir), names: []string{tokensName}}
		tokens, err := OpenTokens(refuses, testKey, product)
		if err != nil {
			t.Fatal(err)
		}
		if b := Recover(open(t, dir), tokens, nil, anybodys, "b"); b.UnreadTokens == nil || len(b.Copies) != 1 {
			t.Fatalf("%+v", b)
		}
		tokens.folder = &flaky{Disk: Disk(dir), n: step}
		if err := tokens.Save(revoked(3)); !errors.Is(err, unix.ENOSPC) {
			t.Errorf("step %d: %v", step, err)
		}
		b, _ := boots(t, dir, product)
		ids := copiesOf(b)
		slices.Sort(ids)
		if ids = slices.Compact(ids); !slices.Equal(ids, []string{"noted-1", "noted-2"}) {
			t.Errorf("step %d: what is known at last: %q", step, ids)
		}
	}
}
