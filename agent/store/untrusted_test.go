package store

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"testing"
	"time"

	"perceptd/tokencache"
)

// loosen are ways in which files come to be others' to change, such as chmod -R and a restore.
var loosen = map[string]func(path string) error{
	"the group may write": func(path string) error { return os.Chmod(path, 0o660) },
	"chmod -R 0770":       func(path string) error { return os.Chmod(path, 0o770) },
	"everybody may write": func(path string) error { return os.Chmod(path, 0o666) },
	"somebody else's":     func(path string) error { return os.Chown(path, 4242, 4242) },
	"somebody else's, 644": func(path string) error {
		return errors.Join(os.Chmod(path, 0o644), os.Chown(path, 4242, 4242))
	},
}

// eachLoose runs f for each way, with what makes a file loose.
func eachLoose(t *testing.T, f func(t *testing.T, loosen func(dir string, names ...string))) {
	t.Helper()
	for name, way := range loosen {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f(t, func(dir string, names ...string) {
				t.Helper()
				for _, name := range names {
					if err := way(filepath.Join(dir, name)); errors.Is(err, fs.ErrPermission) {
						t.Skip("only root can give a file away")
					} else if err != nil {
						t.Fatal(err)
					}
				}
			})
		})
	}
}

// A mode or an owner spoils nothing: what is on record stays there, nothing is moved aside, and the next save mends the
// files.
func TestLooseFilesAreRead(t *testing.T) {
	t.Parallel()
	eachLoose(t, func(t *testing.T, loosen func(dir string, names ...string)) {
		for _, names := range [][]string{{changesName, changesCopyName, tokensName}, {changesName}, {changesCopyName}} {
			dir := t.TempDir()
			r, tokens := open(t, dir), openTokens(t, dir)
			if err := errors.Join(r.Save(all()), tokens.Save(whole(1))); err != nil {
				t.Fatal(err)
			}
			before := listing(t, dir)
			loosen(dir, names...)
			b := Recover(r, tokens, nil, anybodys, BootID())
			strict := all() // in the file that nobody else could change, where there is one
			if len(names) > 1 {
				strict = *unordered(&strict)
			}
			if b.Record == nil || !reflect.DeepEqual(b.Record.Changes, strict.Changes) || b.Lost != nil ||
				b.Unread != nil {
				t.Fatalf("%q: %+v", names, b)
			}
			if b.Snapshot == nil || !reflect.DeepEqual(*b.Snapshot, whole(1)) || b.TokensFault != nil {
				t.Errorf("%q: tokens: %v, %v", names, b.Snapshot, b.TokensFault)
			}
			if len(names) > 1 { // it says neither how long the device was on, nor in which boot a change was noted
				strict.Lineage = b.Record.Lineage
			}
			if !reflect.DeepEqual(*b.Record, strict) || b.Record.Lineage == all().Lineage && len(names) > 1 ||
				!isLoose(b.RecordFault) {
				t.Errorf("%q: %+v, %v", names, b.Record, b.RecordFault)
			}
			if got := listing(t, dir); !slices.Equal(got, before) {
				t.Errorf("%q: %q, where there was %q", names, got, before)
			}
			if err := errors.Join(r.Save(*b.Record), tokens.Save(*b.Snapshot)); err != nil {
				t.Error(err)
			}
			if got, err := open(t, dir).Load(); err != nil || !reflect.DeepEqual(got, b.Record) ||
				!slices.Equal(listing(t, dir), before) {
				t.Errorf("%q: saved: %+v, %v, %q", names, got, err, listing(t, dir))
			}
		}
	})
}

// What others could have changed adds to what they could not, whatever generation it says it is of.
func TestLooseFileWithdrawsNothing(t *testing.T) {
	t.Parallel()
	eachLoose(t, func(t *testing.T, loosen func(dir string, names ...string)) {
		for _, name := range []string{changesName, changesCopyName} {
			dir := t.TempDir()
			forged := all()
			weaker := all().Changes[1]
			weaker.Effect, weaker.Moment = tokencache.Granted, 1
			forged.Generation, forged.Changes = maxGeneration, []tokencache.PolicyChange{{ID: "forged",
				AllIdentities: true, Effect: tokencache.Revoked, At: noon, RecordedAt: noon}, weaker}
			text, err := open(t, dir).encode(forged)
			if err := errors.Join(err, open(t, dir).Save(all()), os.WriteFile(filepath.Join(dir, name), text,
				0o600)); err != nil {
				t.Fatal(err)
			}
			loosen(dir, name)
			r := open(t, dir)
			got, err := r.Load()
			if got == nil || !isLoose(err) || len(got.Changes) != len(all().Changes)+1 ||
				got.Generation > all().Generation+1 {
				t.Fatalf("%s: %+v, %v", name, got, err)
			}
			for _, p := range got.Changes {
				if p.ID == weaker.ID && (p.Effect != tokencache.Revoked || p.Moment != all().Changes[1].Moment) {
					t.Errorf("%s: a revocation is weaker: %+v", name, p)
				}
			}
			if err := r.Save(*got); err != nil {
				t.Error(err)
			}
		}
	})
}

// A folder that others may write to is not changed: what is spoilt in it stays where it is, and so counts as lost at
// each start.
func TestNothingIsMovedInALooseFolder(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	r := open(t, dir)
	if err := errors.Join(os.WriteFile(filepath.Join(dir, changesCopyName), []byte("x"), 0o600),
		os.WriteFile(filepath.Join(dir, tokensName), []byte("x"), 0o600), os.Chmod(dir, 0o770)); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		tokens := openTokens(t, dir)
		if b := Recover(r, tokens, nil, anybodys, BootID()); b.Lost == nil || b.TokensFault == nil {
			t.Errorf("%+v", b)
		}
		if err := r.Save(all()); err == nil {
			t.Error("it was changed")
		}
		if err := tokens.Save(small()); err == nil {
			t.Error("the tokens were changed")
		}
	}
	if got := listing(t, dir); !slices.Equal(got, []string{changesCopyName, tokensName}) {
		t.Errorf("%q", got)
	}
	if err := errors.Join(os.Chmod(dir, 0o700), r.Save(all())); err != nil {
		t.Error(err)
	}
	if got, err := r.Load(); err != nil || !reflect.DeepEqual(got, new(all())) {
		t.Errorf("%+v, %v", got, err)
	}
}

// Where the only file that is left is spoilt, it is not moved aside before another is on the disk: without it a start
// would take itself for the first one.
func TestSpoiltFileStaysUntilAnotherIsThere(t *testing.T) {
	t.Parallel()
	for _, name := range []string{changesName, changesCopyName} {
		l := &limited{files: map[string][]byte{name: []byte("x")}}
		for range 2 {
			r := OpenPolicyChanges(l, uptime(time.Hour))
			if b := Recover(r, nil, nil, anybodys, BootID()); b.Lost == nil {
				t.Errorf("%s: %+v", name, b)
			}
			if err := r.Save(all()); !errors.Is(err, errCut) {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
}
