package socket

import (
	"net"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// handedOver returns a duplicate of l's listener, as it comes out of systemd's store, and its inode.
func handedOver(t *testing.T, l *Listener) (*net.UnixListener, uint64) {
	t.Helper()
	inode, err := l.Inode()
	if err != nil {
		t.Fatal(err)
	}
	file, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	again, err := net.FileListener(file)
	if err != nil {
		t.Fatal(err)
	}
	return again.(*net.UnixListener), inode
}

func TestAdopt(t *testing.T) {
	t.Parallel()
	h := locked(t, folder(t))
	first := listen(t, h, "modules/vision", "token.sock")
	path := first.Addr().String()
	inner, inode := handedOver(t, first)
	first.Leave()
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	waiting, err := net.Dial("unix", path) // between the two
	if err != nil {
		t.Fatal(err)
	}
	waiting.Close()
	second, err := h.Adopt("modules/vision", "token.sock", inner, inode)
	if err != nil {
		t.Fatal(err)
	}
	if conn, err := second.Accept(); err != nil {
		t.Error(err)
	} else {
		conn.Close()
	}
	talks(t, second, path)
	if again, err := second.Inode(); err != nil || again != inode {
		t.Errorf("inode %d, %v, was %d", again, err, inode)
	}
	if err := second.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); err == nil {
		t.Error("an adopted socket stays after Close")
	}
}

func TestAdoptRefuses(t *testing.T) {
	t.Parallel()
	for name, spoil := range map[string]func(t *testing.T, path string){
		"no such file or directory":               func(t *testing.T, path string) {},
		"something else is in the socket's place": stale,
		"something else": func(t *testing.T, path string) {
			if err := os.Symlink("/etc/passwd", path); err != nil {
				t.Fatal(err)
			}
		},
	} {
		h := locked(t, folder(t))
		l := listen(t, h, "modules/vision", "token.sock")
		path := l.Addr().String()
		inner, inode := handedOver(t, l)
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		spoil(t, path)
		_, err := h.Adopt("modules/vision", "token.sock", inner, inode)
		wantError(t, err, name)
		if _, err := inner.Accept(); err == nil {
			t.Errorf("%s: the listener was left open", name)
		}
	}
	h := locked(t, folder(t))
	l := listen(t, h, "modules/vision", "token.sock")
	for _, in := range []string{"", "../x", "/etc", "modules/none/none"} {
		inner, inode := handedOver(t, l)
		if _, err := h.Adopt(in, "token.sock", inner, inode); err == nil {
			t.Errorf("adopted in %q", in)
		}
	}
	inner, inode := handedOver(t, l)
	if _, err := h.Adopt("modules/vision", "../vision/token.sock", inner, inode); err == nil {
		t.Error("adopted by a name with a slash")
	}
}

func TestRemoveDead(t *testing.T) {
	t.Parallel()
	dir := folder(t)
	h := locked(t, dir)
	if got, err := h.Folders("modules"); len(got) != 0 || err != nil {
		t.Errorf("before any: %v, %v", got, err)
	}
	served := listen(t, h, "modules/served", "token.sock")
	listen(t, h, "modules/empty", "token.sock").Close()
	for _, name := range []string{"dead", "full", "odd"} {
		if err := os.Mkdir(filepath.Join(dir, "modules", name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	stale(t, filepath.Join(dir, "modules/dead/token.sock"))
	stale(t, filepath.Join(dir, "modules/dead/.token.sock.new"))
	for _, path := range []string{"modules/full/its own", "modules/odd/token.sock", "modules/file"} {
		if err := os.WriteFile(filepath.Join(dir, path), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	outside := folder(t)
	stale(t, filepath.Join(outside, "token.sock"))
	if err := os.Symlink(outside, filepath.Join(dir, "modules", "link")); err != nil {
		t.Fatal(err)
	}
	all := []string{"dead", "empty", "full", "odd", "served"}
	if got, err := h.Folders("modules"); err != nil || !slices.Equal(got, all) {
		t.Errorf("%v, %v", got, err)
	}
	for name, want := range map[string]string{
		"modules/empty": "", "modules/dead": "", "modules/none": "", "none/none": "", "modules/full": "",
		"modules/odd":    "",
		"modules/served": "another perceptd is serving",
		"modules/link":   "modules/link", "modules/file": "not a directory", "../x": "is not below", "": "is not below",
	} {
		err := h.RemoveDead(name, "token.sock")
		if want != "" {
			wantError(t, err, want)
		} else if err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if conn, err := served.Accept(); err != nil { // RemoveDead's look at whether anybody serves
		t.Error(err)
	} else {
		conn.Close()
	}
	talks(t, served, served.Addr().String())
	if got, err := h.Folders("modules"); err != nil || !slices.Equal(got, all) {
		t.Errorf("left: %v, %v", got, err)
	}
	if _, err := h.Folders("modules/link"); err == nil {
		t.Error("a link was listed")
	}
	for path, there := range map[string]bool{
		"modules/full/its own": true, "modules/odd/token.sock": true, "modules/served/token.sock": true,
		"modules/dead/token.sock": false, "modules/dead/.token.sock.new": false,
	} {
		if (unix.Access(filepath.Join(dir, path), unix.F_OK) == nil) != there {
			t.Errorf("%s is there: %v", path, !there)
		}
	}
	if unix.Access(filepath.Join(outside, "token.sock"), unix.F_OK) != nil {
		t.Error("a link was followed")
	}
}
