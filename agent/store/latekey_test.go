package store

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"perceptd/agent/binding"
)

// Until the key is there, nothing that is kept is read, saved or touched; then all of it is read, once, also what
// starts before could not open.
func TestTokensAwaitTheirKey(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	_, bound := boots(t, dir, product)
	if err := bound.Save(revoked(time.Hour)); err != nil {
		t.Fatal(err)
	}
	if _, unbound := boots(t, dir); unbound.Save(revoked(2*time.Hour)) != nil {
		t.Fatal("not saved")
	}
	kept := contents(t, dir)
	away := errors.New("the TPM is locked out")
	var key *Key
	tokens := AwaitTokens(Disk(dir), func() (*Key, []binding.Binding, error) {
		if key == nil {
			return nil, nil, away
		}
		return key, []binding.Binding{product}, nil
	})
	b := Recover(open(t, dir), tokens, nil, anybodys, "b")
	if b.UnreadTokens != away || len(b.Copies) > 0 || b.Snapshot != nil {
		t.Errorf("%+v", b)
	}
	for range 2 {
		if all, err := tokens.LoadAgain(); len(all) > 0 || err != away {
			t.Errorf("%d, %v", len(all), err)
		}
		if err := tokens.Save(revoked(3 * time.Hour)); err != away {
			t.Errorf("saved: %v", err)
		}
	}
	if now := contents(t, dir); !slices.Equal(now, kept) {
		t.Errorf("%q, were %q", now, kept)
	}
	key = testKey
	all, err := tokens.LoadAgain()
	if len(all) != 2 || err != nil {
		t.Errorf("%d, %v", len(all), err)
	}
	if again, err := tokens.LoadAgain(); len(again) > 0 || err != nil {
		t.Errorf("%d again, %v", len(again), err)
	}
	if err := tokens.Save(revoked(3 * time.Hour)); err != nil {
		t.Error(err)
	}
	if aside := setAside(t, dir); len(aside) > 0 {
		t.Errorf("left: %q", aside)
	}
}

// A key that comes and is another one opens nothing, and what it does not open is moved aside, not written over.
func TestAnotherKeyComesLate(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if _, tokens := boots(t, dir); tokens.Save(revoked(time.Hour)) != nil {
		t.Fatal("not saved")
	}
	sealed, err := os.ReadFile(filepath.Join(dir, tokensName))
	if err != nil {
		t.Fatal(err)
	}
	isHere := false
	tokens := AwaitTokens(Disk(dir), func() (*Key, []binding.Binding, error) {
		if !isHere {
			return nil, nil, errors.New("away")
		}
		return &Key{1}, nil, nil
	})
	_ = Recover(open(t, dir), tokens, nil, anybodys, "b")
	isHere = true
	if all, err := tokens.LoadAgain(); len(all) > 0 || err != nil {
		t.Errorf("%d, %v", len(all), err)
	}
	if err := tokens.Save(revoked(2 * time.Hour)); err != nil {
		t.Fatal(err)
	}
	aside := setAside(t, dir)
	if len(aside) != 1 {
		t.Fatalf("%q", aside)
	}
	if now, err := os.ReadFile(filepath.Join(dir, aside[0])); err != nil || string(now) != string(sealed) {
		t.Errorf("%s is another: %v", aside[0], err)
	}
}

// What the service that opens the key says is told in a line, and with it what to do; without a word of it the service
// is to be asked.
func TestWhyAKeyIsNotOpen(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"the TPM is locked out\n":             "the TPM is locked out",
		"one\ntwo\n":                          "one",
		"":                                    "",
		strings.Repeat("a", longestWhy*2):     strings.Repeat("a", longestWhy),
		strings.Repeat("ä", longestWhy):       strings.Repeat("ä", longestWhy/2),
		"a" + strings.Repeat("ä", longestWhy): "a" + strings.Repeat("ä", longestWhy/2-1),
	} {
		folder := t.TempDir()
		path, waiting := filepath.Join(folder, "key"), filepath.Join(folder, "waiting")
		for _, file := range []string{path + ".cred", waiting} {
			if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		err := unopenedKey(path, waiting)
		var unopened *UnopenedKeyError
		if !errors.As(err, &unopened) || unopened.waiting != want {
			t.Fatalf("%q: %v, want %q", text, err, want)
		}
		if waits := strings.HasPrefix(unopened.Remedy(), "wait: "); waits != (want != "") ||
			!strings.HasSuffix(err.Error(), want) {
			t.Errorf("%q: %v; %s", text, err, unopened.Remedy())
		}
	}
}

// contents returns the names of dir's files with what is in them, in order.
func contents(t *testing.T, dir string) (all []string) {
	t.Helper()
	for _, name := range listing(t, dir) {
		text, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, name+"\n"+string(text))
	}
	return all
}
