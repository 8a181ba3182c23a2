package store

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"perceptd/agent/binding"
	"perceptd/tokencache"
)

var testKey = &Key{1, 2, 3, 31: 255}

func openTokens(t testing.TB, dir string) *Tokens {
	t.Helper()
	tokens, err := OpenTokens(folderAt(t, dir), testKey)
	if err != nil {
		t.Fatal(err)
	}
	return tokens
}

// tokensFile is where tokens are on the disk.
func tokensFile(tokens *Tokens) string { return tokens.folder.(Disk).path(tokensName) }

// small is a memory of one token.
func small() tokencache.Snapshot {
	return tokencache.Snapshot{BootID: "b", Wall: noon,
		Record: tokencache.Record{Instant: tokencache.Instant{BootID: "b"}}, Keys: []tokencache.SnapshotEntry{{
			Key: tokencache.Key{Resource: "r"}, Token: tokencache.Token{Text: tokencache.NewSecret(canary)}, Life: 1,
		}}}
}

// sealing returns the bytes of a sealed file.
func sealing(t testing.TB, m tokencache.Snapshot) []byte {
	t.Helper()
	text, err := openTokens(t, t.TempDir()).sealed(m)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func TestTokensRoundTrip(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "state")
	tokens := openTokens(t, dir)
	if m, err := tokens.Load(); m != nil || err != nil {
		t.Errorf("no file yet: %v, %v", m, err)
	}
	path := filepath.Join(dir, tokensName)
	var before []byte
	for range 2 {
		if err := tokens.Save(whole(1)); err != nil {
			t.Fatal(err)
		}
		if got, err := openTokens(t, dir).Load(); err != nil || !reflect.DeepEqual(*got, whole(1)) {
			t.Errorf("%v\ngot  %+v\nwant %+v", err, got, whole(1))
		}
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, clear := range []string{"canary", vault, "subscriptions", "token"} {
			if bytes.Contains(text, []byte(clear)) {
				t.Errorf("%s is in the file in the clear", clear)
			}
		}
		if nonce := text[len(tokens.head):][:12]; bytes.Equal(nonce, before) {
			t.Error("the same nonce twice")
		}
		before = text[len(tokens.head):][:12]
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	for range 2 {
		if err := tokens.folder.Remove(tokensName); err != nil {
			t.Error(err)
		}
	}
	if names := listing(t, dir); len(names) != 0 {
		t.Errorf("left: %q", names)
	}
}

// refuses checks that nothing of text is loaded, that it stays as it is, and what the error says.
func refuses(t *testing.T, tokens *Tokens, text []byte, name, says string) {
	t.Helper()
	if err := os.WriteFile(tokensFile(tokens), text, 0o600); err != nil {
		t.Fatal(err)
	}
	m, err := tokens.Load()
	if m != nil || err == nil || !strings.Contains(err.Error(), says) ||
		!strings.Contains(err.Error(), "fetched anew") {
		t.Fatalf("%s: %v, %v, want %q", name, m, err, says)
	}
	if strings.Contains(err.Error(), "canary") {
		t.Fatalf("%s: a token is told: %v", name, err)
	}
	if kept, err := os.ReadFile(tokensFile(tokens)); err != nil || !bytes.Equal(kept, text) {
		t.Fatalf("%s: what was there is lost: %v", name, err)
	}
}

// staysUnopened checks that nothing of text is loaded, and that it stays.
func staysUnopened(t *testing.T, tokens *Tokens, text []byte, kind binding.Kind) {
	t.Helper()
	if err := os.WriteFile(tokensFile(tokens), text, 0o600); err != nil {
		t.Fatal(err)
	}
	m, err := tokens.Load()
	if unopened, ok := errors.AsType[*UnopenedError](err); m != nil || !ok || unopened.Kind != kind ||
		unopened.Name != tokensName {
		t.Fatalf("bound to %v: %v, %v", kind, m, err)
	}
	if kept, err := os.ReadFile(tokensFile(tokens)); err != nil || !bytes.Equal(kept, text) {
		t.Fatalf("bound to %v: it did not stay: %v", kind, err)
	}
}

func TestEveryBitCounts(t *testing.T) {
	t.Parallel()
	sound, tokens := sealing(t, small()), openTokens(t, t.TempDir())
	for bit := range len(sound) * 8 {
		text := bytes.Clone(sound)
		text[bit/8] ^= 1 << (bit % 8)
		if at := len(sealedHead); bit/8 == at && binding.Kind(text[at]).Name() != "" {
			staysUnopened(t, tokens, text, binding.Kind(text[at]))
			continue
		}
		refuses(t, tokens, text, fmt.Sprint("bit ", bit), "it ")
	}
	for length := range sound {
		refuses(t, tokens, sound[:length], fmt.Sprint("length ", length), "it ")
	}
	if names := listing(t, filepath.Dir(tokensFile(tokens))); len(names) != 1 {
		t.Errorf("%q", names)
	}
	if err := os.WriteFile(tokensFile(tokens), sound, 0o600); err != nil {
		t.Fatal(err)
	}
	if m, err := tokens.Load(); err != nil || !reflect.DeepEqual(*m, small()) {
		t.Errorf("the sound one: %v, %v", m, err)
	}
}

func TestWhatIsNoCacheFile(t *testing.T) {
	t.Parallel()
	tokens := openTokens(t, t.TempDir())
	sound := sealing(t, small())
	other, err := OpenTokens(Disk(t.TempDir()), &Key{9})
	if err != nil {
		t.Fatal(err)
	}
	swapped, err := other.sealed(small())
	if err != nil {
		t.Fatal(err)
	}
	seal := func(text string) []byte {
		return append([]byte(tokens.head), tokens.seal(tokens.head).Seal(nil, nil, []byte(text),
			[]byte(tokens.head))...)
	}
	for _, row := range []struct {
		name string
		text []byte
		says string
	}{
		{"empty", nil, "no cache file"},
		{"zeros", make([]byte, 4096), "no cache file"},
		{"foreign", []byte(entry("", "")), "no cache file"},
		{"only a head", []byte(tokens.head), "another key or on another device, or changed"},
		{"half a head", []byte(sealedHead), "ends in its head"},
		{"of another key", swapped, "another key or on another device, or changed"},
		{"longer", append(bytes.Clone(sound), 0), "another key or on another device, or changed"},
		{"a later version", append([]byte(sealedMagic+"\x00\x03"), sound[len(sealedHead):]...),
			"not of version 1 or 2: another release"},
		{"an older version", append([]byte(sealedMagic+"\x00\x00"), sound[len(sealedHead):]...),
			"not of version 1 or 2: another release"},
		{"a version that it is not", append([]byte(formerHead), sound[len(tokens.head):]...),
			"another key or on another device, or changed"},
		{"a kind that is none", append([]byte(sealedHead+"\x09"), sound[len(tokens.head):]...), "another release"},
		{"a later document", seal(`{"version":4}`), "another release"},
		{"a foreign document", seal(`{"` + canary), "not JSON"},
		{"an unknown field", seal(`{"version":1,"` + canary + `":1}`), "not what perceptd writes"},
		{"huge", make([]byte, maxSealed+1), "larger than"},
	} {
		refuses(t, tokens, row.text, row.name, row.says)
	}
}

// An older file that somebody puts back loads: nothing in it is wrong.
func TestReplay(t *testing.T) {
	t.Parallel()
	tokens := openTokens(t, t.TempDir())
	if err := tokens.Save(whole(1)); err != nil {
		t.Fatal(err)
	}
	older, err := os.ReadFile(tokensFile(tokens))
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(tokens.Save(whole(2)), os.WriteFile(tokensFile(tokens), older, 0o600)); err != nil {
		t.Fatal(err)
	}
	if m, err := tokens.Load(); err != nil || !reflect.DeepEqual(*m, whole(1)) {
		t.Errorf("%v, %v", m, err)
	}
}

// inItsPlace is what may stand where a file of ours is to be.
var inItsPlace = []struct {
	name, says string
	put        func(path string, sound []byte) error
}{
	{"a link", "it is a link", func(path string, sound []byte) error {
		return errors.Join(os.WriteFile(path+".there", sound, 0o600), os.Symlink(path+".there", path))
	}},
	{"a directory", "not a regular file", func(path string, _ []byte) error { return os.Mkdir(path, 0o700) }},
	{"a pipe", "not a regular file", func(path string, _ []byte) error { return unix.Mkfifo(path, 0o600) }},
	{"a socket", "not a regular file", func(path string, _ []byte) error {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		return errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: path}), unix.Close(fd))
	}},
}

func TestWhatStandsInThePlaceOfTokens(t *testing.T) {
	t.Parallel()
	sound := sealing(t, small())
	for _, row := range inItsPlace {
		tokens := openTokens(t, shortFolder(t))
		if err := row.put(tokensFile(tokens), sound); err != nil {
			t.Fatal(err)
		}
		m, err := tokens.Load()
		if m != nil || err == nil || !strings.Contains(err.Error(), row.says) {
			t.Errorf("%s: %v, %v", row.name, m, err)
		}
		if err := tokens.Save(whole(1)); err != nil {
			t.Errorf("%s: saving after it: %v", row.name, err)
		}
		if aside, _ := filepath.Glob(tokensFile(tokens) + unreadable + "*"); len(aside) != 1 {
			t.Errorf("%s: moved aside: %q", row.name, aside)
		}
		if m, err := tokens.Load(); err != nil || !reflect.DeepEqual(*m, whole(1)) {
			t.Errorf("%s: %v, %v", row.name, m, err)
		}
	}
}

// What the kernel does not let be read now may be read later: it is not moved aside.
func TestUnreadableNow(t *testing.T) {
	t.Parallel()
	tokens := openTokens(t, t.TempDir())
	long := &Tokens{folder: Disk(filepath.Join(t.TempDir(), strings.Repeat("n", 300))), head: tokens.head,
		seal: tokens.seal}
	if m, err := long.Load(); m != nil || !errors.Is(err, unix.ENAMETOOLONG) ||
		strings.Contains(err.Error(), "it is now") {
		t.Errorf("%v, %v", m, err)
	}
	if err := long.folder.Remove(tokensName); !errors.Is(err, unix.ENAMETOOLONG) {
		t.Error(err)
	}
	if err := long.Save(whole(1)); !errors.Is(err, unix.ENAMETOOLONG) {
		t.Error(err)
	}
}

func TestTokensDirectory(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	left := filepath.Join(dir, tokensName+beingWritten)
	if err := errors.Join(os.WriteFile(left, []byte("half"), 0o600), openTokens(t, dir).Save(whole(1))); err != nil {
		t.Fatal(err)
	}
	if names := listing(t, dir); len(names) != 1 {
		t.Errorf("%q", names)
	}
	if err := os.Chmod(dir, 0o722); err != nil {
		t.Fatal(err)
	}
	if m, err := openTokens(t, dir).Load(); err != nil || !reflect.DeepEqual(*m, whole(1)) {
		t.Errorf("what others may change in a folder is not read: %v, %v", m, err)
	}
	if err := openTokens(t, dir).Save(whole(2)); err == nil || !strings.Contains(err.Error(), "mode 0722") {
		t.Error(err)
	}
	bad := whole(1)
	bad.BootID = "\n"
	if err := openTokens(t, t.TempDir()).Save(bad); err == nil || !strings.Contains(err.Error(), "boot_id") {
		t.Error(err)
	}
}

// A full disk, and one that is read-only, cost what is new and never what is there.
func TestTokensOnABadDisk(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=16k,mode=0700"); err != nil {
		t.Skipf("needs root and the right to mount a small disk: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	tokens := openTokens(t, dir)
	if err := tokens.Save(whole(1)); err != nil {
		t.Fatal(err)
	}
	holds := func(when string, n int) {
		t.Helper()
		if m, err := tokens.Load(); err != nil || !reflect.DeepEqual(*m, whole(n)) {
			t.Errorf("%s: %v, %v", when, m, err)
		}
	}
	ballast := filepath.Join(dir, "ballast")
	_ = os.WriteFile(ballast, make([]byte, 1<<20), 0o600) // as much as goes
	if err := tokens.Save(whole(2)); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("on a full disk: %v", err)
	}
	holds("on a full disk", 1)
	if err := errors.Join(os.Remove(ballast), tokens.Save(whole(2))); err != nil {
		t.Errorf("with room again: %v", err)
	}
	holds("with room again", 2)
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	if err := tokens.Save(whole(3)); !errors.Is(err, unix.EROFS) {
		t.Errorf("on a disk that is read-only: %v", err)
	}
	if err := tokens.folder.Remove(tokensName); !errors.Is(err, unix.EROFS) {
		t.Errorf("removed there: %v", err)
	}
	holds("on a disk that is read-only", 2)
}

func TestReadKey(t *testing.T) {
	t.Parallel()
	raw := bytes.Repeat([]byte{7}, 32)
	for _, mode := range []fs.FileMode{0o400, 0o440, 0o600, 0o640} {
		path := filepath.Join(t.TempDir(), "key")
		if err := errors.Join(os.WriteFile(path, raw, 0o600), os.Chmod(path, mode)); err != nil {
			t.Fatal(err)
		}
		if key, err := ReadKey(path); err != nil || !bytes.Equal(key[:], raw) {
			t.Errorf("%04o: %v", mode, err)
		}
	}
	rows := inItsPlace
	for length, says := range map[int]string{0: "0 bytes", 31: "31 bytes", 33: "larger than 32", 64: "larger than 32"} {
		rows = append(rows, struct {
			name, says string
			put        func(path string, sound []byte) error
		}{fmt.Sprint(length), says, func(path string, _ []byte) error {
			return os.WriteFile(path, bytes.Repeat([]byte("k"), length), 0o600)
		}})
	}
	for name, never := range map[string]byte{"zeros": 0x00, "erased flash": 0xff} {
		rows = append(rows, struct {
			name, says string
			put        func(path string, sound []byte) error
		}{name, "never filled", func(path string, _ []byte) error {
			return os.WriteFile(path, bytes.Repeat([]byte{never}, 32), 0o600)
		}})
	}
	for _, row := range rows {
		path := filepath.Join(shortFolder(t), "key")
		if err := row.put(path, raw); errors.Is(err, fs.ErrPermission) {
			t.Logf("%s: left out, since only root can give a file away", row.name)
			continue
		} else if err != nil {
			t.Fatal(err)
		}
		_, err := ReadKey(path)
		if err == nil || !strings.Contains(err.Error(), row.says) || !strings.Contains(err.Error(),
			"perceptctl cache-key make --replace") {
			t.Errorf("%s: %v", row.name, err)
		}
	}
	path := filepath.Join(t.TempDir(), "key")
	if _, err := ReadKey(path); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "32 random bytes") {
		t.Error(err)
	}
	if err := errors.Join(os.WriteFile(path, raw, 0o600), os.Chmod(path, 0o604)); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadKey(path); err == nil || !strings.Contains(err.Error(), "lets others read it") {
		t.Error(err)
	}
	if _, err := ReadKey(path + strings.Repeat("n", 300)); !errors.Is(err, unix.ENAMETOOLONG) ||
		strings.Contains(err.Error(), "random bytes") {
		t.Error(err)
	}
	if _, err := read("/proc/self/status", othersMayChange, 10); err == nil ||
		!strings.Contains(err.Error(), "larger than 10") {
		t.Errorf("a file that is longer than it says: %v", err)
	}
}

func TestKeyIsNotPrinted(t *testing.T) {
	t.Parallel()
	key := &Key{}
	copy(key[:], "canary-4f1d-canary-4f1d-canary-4")
	tokens, err := OpenTokens(Disk(t.TempDir()), key)
	if err != nil {
		t.Fatal(err)
	}
	type hidden struct{ tokens *Tokens }
	var printed strings.Builder
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d"} {
		for _, value := range []any{*key, key, []any{key}, []Key{*key}, struct{ K Key }{*key}, hidden{tokens}, tokens} {
			fmt.Fprintf(&printed, verb, value)
		}
	}
	asJSON, err := json.Marshal(map[string]any{"k": key, "v": *key})
	if err != nil {
		t.Fatal(err)
	}
	binary, _ := key.MarshalBinary()
	printed.Write(append(asJSON, binary...))
	printed.WriteString(key.String() + key.GoString())
	leaks := []string{"canary", fmt.Sprintf("%x", "canary"), fmt.Sprintf("%X", "canary"), "99 97 110 97 114",
		"0x63, 0x61"}
	for _, leak := range leaks {
		if strings.Contains(printed.String(), leak) {
			t.Errorf("the key was printed: %s", printed.String())
		}
	}
}

func FuzzUnseal(f *testing.F) {
	tokens := openTokens(f, f.TempDir())
	for _, m := range []tokencache.Snapshot{small(), whole(1)} {
		f.Add(sealing(f, m), false)
		text, err := encodeSnapshot(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(text, true)
	}
	f.Add([]byte(tokens.head), false)
	f.Add([]byte(formerHead), false)
	f.Fuzz(func(t *testing.T, text []byte, seal bool) {
		if seal { // what is in a file whose seal holds
			text = append([]byte(tokens.head), tokens.seal(tokens.head).Seal(nil, nil, text, []byte(tokens.head))...)
		}
		m, _, err := tokens.unseal(text)
		switch {
		case err != nil && m != nil:
			t.Fatal("an error, and a memory")
		case err != nil:
			return
		case !seal && !reflect.DeepEqual(*m, small()) && !reflect.DeepEqual(*m, whole(1)):
			t.Fatal("a seal was made without the key")
		}
		if _, err := tokens.sealed(*m); err != nil {
			t.Fatalf("read, and not to be written: %v", err)
		}
	})
}

// What a cache knows goes through the file and through a descriptor, and the next one serves from it.
func TestNextCache(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		fetches := 0
		options := tokencache.Options{BootID: "b", Fetch: func(context.Context, tokencache.Key) (tokencache.Fetched,
			error) {
			fetches++
			now := time.Now()
			text := tokencache.NewSecret(fmt.Sprint(canary, fetches))
			claims := tokencache.Claims{IssuedAt: now.Add(-5 * time.Minute), Groups: []string{fmt.Sprint("g", fetches)}}
			return tokencache.Fetched{Token: tokencache.Token{Text: text, ExpiresOn: now.Add(time.Hour),
				Claims: claims}, Left: time.Hour}, nil
		}}
		key := tokencache.Key{Resource: vault}
		get := func(c *tokencache.Cache) string {
			answer, err := c.Get(t.Context(), key, tokencache.Need{})
			if err != nil {
				t.Fatal(err)
			}
			return answer.Token.Text.Reveal()
		}
		first := tokencache.New(options)
		for range 10 { // several tokens, and what was learnt from them
			get(first)
			time.Sleep(30 * time.Minute)
		}
		want := get(first)
		m := first.Snapshot()
		first.Close()
		if len(m.Keys) != 1 || len(m.Rollovers) == 0 || m.Keys[0].Before == nil {
			t.Fatalf("too little to tell: %+v", m)
		}
		tokens := openTokens(t, dir)
		if err := tokens.Save(m); err != nil {
			t.Fatal(err)
		}
		f, err := WriteMemfd(m)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = f.Close() }()
		before := fetches
		for what, load := range map[string]func() (*tokencache.Snapshot, error){
			"file": tokens.Load, "descriptor": func() (*tokencache.Snapshot, error) { return ReadMemfd(f) },
		} {
			if options.Snapshot, err = load(); err != nil {
				t.Fatal(err)
			}
			if len(options.Snapshot.Rollovers) != len(m.Rollovers) ||
				len(options.Snapshot.Keys[0].Rollovers) != len(m.Keys[0].Rollovers) {
				t.Errorf("%s: what was learnt is lost", what)
			}
			next := tokencache.New(options)
			if got := get(next); got != want || fetches != before {
				t.Errorf("%s: another token, or fetched: %d and %d times", what, before, fetches)
			}
			next.Close()
		}
	})
}
