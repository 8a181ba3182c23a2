package source

import (
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"perceptd/tokencache"
)

func fileExists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func writeKey(t *testing.T, path, key string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(key), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestChallenge(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	writeKey(t, at("good.key"), canary)
	writeKey(t, at("full.key"), strings.Repeat("k", arcKeyBytes))
	writeKey(t, at("large.key"), strings.Repeat(canary, arcKeyBytes))
	writeKey(t, at("empty.key"), "")
	writeKey(t, at("line.key"), canary+"\n")
	writeKey(t, at("blank.key"), " "+canary)
	writeKey(t, at("control.key"), canary+"\x00")
	writeKey(t, at("good.txt"), canary)
	if err := os.Symlink(at("good.key"), at("link.key")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(at("folder.key"), 0o700); err != nil {
		t.Fatal(err)
	}
	writeKey(t, at("folder.key/inner.key"), canary)
	if err := unix.Mkfifo(at("pipe.key"), 0o600); err != nil {
		t.Fatal(err)
	}
	const stray = "does not name a .key file in "
	for _, test := range []struct {
		header string
		words  string // empty: accepted
	}{
		{"Basic realm=" + at("good.key"), ""},
		{"Basic realm=" + at("full.key"), ""},
		{"Basic realm=" + at("large.key"), "is larger than 4096 bytes"},
		{"Basic realm=" + at("empty.key"), "is empty"},
		{"Basic realm=" + at("line.key"), "line end"},
		{"Basic realm=" + at("blank.key"), "line end"},
		{"Basic realm=" + at("control.key"), "line end"},
		{"Basic realm=" + at("link.key"), "is not a regular file"},
		{"Basic realm=" + at("folder.key"), "is not a regular file"},
		{"Basic realm=" + at("pipe.key"), "is not a regular file"},
		{"Basic realm=" + at("none.key"), "does not exist"},
		{"Basic realm=" + at("good.txt"), stray},
		{"Basic realm=" + at("folder.key/inner.key"), stray},
		{"Basic realm=" + dir + "/./good.key", stray},
		{"Basic realm=" + dir + "//good.key", stray},
		{"Basic realm=" + dir + "/../" + filepath.Base(dir) + "/good.key", stray},
		{"Basic realm=" + dir + "/.key", stray},
		{"Basic realm=/etc/" + canary + ".key", stray},
		{"Basic realm=good.key", stray},
		{`Basic realm="` + at("good.key") + `"`, stray},
		{"Basic realm=" + at("good.key") + ", Basic realm=" + at("good.key"), stray},
		{"Basic realm=" + at("a b.key"), stray},
		{"Basic realm=" + at("a=b.key"), stray},
		{"Basic realm=" + at("a\x7fb.key"), stray},
		{"Basic realm=" + at(strings.Repeat("a", 256)+".key"), stray},
		{"basic realm=" + at("good.key"), stray},
		{"Bearer realm=" + at("good.key"), stray},
		{canary, stray},
		{"", stray},
	} {
		key, failed := readChallenge([]string{test.header}, dir)
		switch {
		case test.words == "" && (failed != nil || key.IsZero()):
			t.Errorf("%q: refused: %v", test.header, failed)
		case test.words != "" && failed == nil:
			t.Errorf("%q: accepted", test.header)
		case test.words != "":
			wantFailure(t, failed, tokencache.Malformed, test.words)
		}
		noCanary(t, key)
	}
	for _, headers := range [][]string{nil, {"Basic realm=" + at("good.key"), "Basic realm=" + at("good.key")}} {
		_, failed := readChallenge(headers, dir)
		wantFailure(t, failed, tokencache.Malformed, stray)
	}
}

func TestKeyFileOfAnotherUser(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "secret.key")
	writeKey(t, path, canary)
	if err := os.Chmod(path, 0); err != nil {
		t.Fatal(err)
	}
	done := make(chan *tokencache.FetchError)
	go func() {
		// Root may read everything: this thread looks at files as nobody, and ends with its goroutine.
		runtime.LockOSThread()
		if err := unix.Setfsuid(65534); err != nil {
			t.Error(err)
		}
		_, failed := readChallenge([]string{"Basic realm=" + path}, dir)
		done <- failed
	}()
	wantFailure(t, <-done, tokencache.Refused,
		path+" may not be read: add the user that perceptd runs as to the group himds")
}

func FuzzKeyPath(f *testing.F) {
	for _, seed := range []string{"", "Basic realm=" + arcKeyDir + "/a.key", "Basic realm=" + arcKeyDir + "/../a.key",
		`Basic realm="x"`} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, header string) {
		path, ok := keyPath([]string{header}, arcKeyDir)
		if !ok {
			return
		}
		name, inside := strings.CutPrefix(path, arcKeyDir+"/")
		if !inside || strings.Contains(name, "/") || !strings.HasSuffix(name, ".key") || !headerSafe(path) {
			t.Errorf("%q leads to %q", header, path)
		}
		// azidentity cuts the header in its own way and must come to the same file.
		if parts := strings.Split(header, "Basic realm="); len(parts) != 2 || parts[1] != path {
			t.Errorf("%q is another file to azidentity than %q", header, path)
		}
	})
}
