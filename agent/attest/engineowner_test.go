package attest

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// otherUID is a user that the tests do not run as.
const otherUID = 4242

// chownToOther gives a file to another user. It does nothing if the tests do not run as root: their files are not
// root's in the first place.
func chownToOther(t *testing.T, path string) {
	t.Helper()
	if os.Geteuid() != 0 {
		return
	}
	if err := os.Lchown(path, otherUID, otherUID); err != nil {
		t.Fatal(err)
	}
}

// An engine is used only if it is root's and nobody else could have put its socket there.
func TestEngineOfAnotherUser(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name, want string
		spoil      func(t *testing.T, folder, socket string) (path string)
	}{
		{"its socket", "engine.sock belongs to user", func(t *testing.T, _, socket string) string {
			chownToOther(t, socket)
			return socket
		}},
		{"its folder", "belongs to user", func(t *testing.T, folder, socket string) string {
			chownToOther(t, folder)
			return socket
		}},
		{"a folder that anybody may write to", "may be written to by others", func(
			t *testing.T, folder, socket string,
		) string {
			chmod(t, folder, 0o777)
			return socket
		}},
		{"a folder that a group may write to", "may be written to by others", func(
			t *testing.T, folder, socket string,
		) string {
			if err := os.Chown(folder, -1, otherUID); err != nil {
				t.Skip("needs root, or that group")
			}
			chmod(t, folder, 0o775)
			return socket
		}},
		{"a link to it", "link belongs to user", func(t *testing.T, folder, socket string) string {
			link := filepath.Join(folder, "link")
			if err := os.Symlink(socket, link); err != nil {
				t.Fatal(err)
			}
			chownToOther(t, link)
			return link
		}},
		{"a link out of a folder that is theirs", "belongs to user", func(t *testing.T, folder, socket string) string {
			theirs := filepath.Join(folder, "theirs")
			if err := os.Mkdir(theirs, 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink("../engine.sock", filepath.Join(theirs, "link")); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink("theirs/link", filepath.Join(folder, "first")); err != nil {
				t.Fatal(err)
			}
			chownToOther(t, theirs)
			return filepath.Join(folder, "first")
		}},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			e := newFakeEngine(t)
			path := row.spoil(t, filepath.Dir(e.path), e.path)
			root := newTrustedOwners(false)
			if os.Geteuid() != 0 && strings.Contains(row.want, "written") {
				root = newTrustedOwners(true) // in place of root
			}
			err := root.checkPath(path)
			untrusted := new(untrustedError)
			if !errors.As(err, &untrusted) || os.Geteuid() == 0 && !strings.Contains(err.Error(), row.want) {
				t.Errorf("%v, want %q", err, row.want)
			}
			if _, err := dialEngine(context.Background(), path, root); err == nil {
				t.Error("it is asked all the same")
			}
			if e.questions() != 0 {
				t.Error("it was asked")
			}
		})
	}
}

// Callers and administrators learn why such an engine is not used.
func TestUntrustedEngineIsReported(t *testing.T) {
	t.Parallel()
	s, e := newEngineFixture(t, Options{})
	s.engine.trusted = trustedOwners{uids: []uint32{uint32(os.Geteuid()) + 1}}
	_, err := s.callerIn(containerA, Socket{Module: "vision"})
	checkDenied(t, "another's engine", err, "believed only if it is root's")
	var why *Error
	if !errors.As(err, &why) || !strings.Contains(why.Hint, "root's own engine") {
		t.Errorf("%+v", why)
	}
	limitations := s.Limitations(context.Background())
	last := limitations[len(limitations)-1]
	if !strings.Contains(last.Why, "believed only if it is root's") || !strings.Contains(last.Hint, "rootless") {
		t.Errorf("%+v", last)
	}
	if _, trouble := s.Engine(); !strings.Contains(trouble, "root's") {
		t.Errorf("trouble %q", trouble)
	}
	if e.questions() != 0 {
		t.Error("it was asked")
	}
}

// The socket may be root's while the process that listens is another user's.
func TestListenerOfAnotherUser(t *testing.T) {
	t.Parallel()
	e := newFakeEngine(t)
	conn, err := net.Dial("unix", e.path)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	own := uint32(os.Geteuid())
	if err := (trustedOwners{uids: []uint32{own}}).checkListener(conn.(*net.UnixConn)); err != nil {
		t.Error(err)
	}
	err = trustedOwners{uids: []uint32{own + 1}}.checkListener(conn.(*net.UnixConn))
	if untrusted := new(untrustedError); !errors.As(err, &untrusted) {
		t.Error("another's process is believed")
	}
}

func TestEnginePaths(t *testing.T) {
	t.Parallel()
	trusted := newTrustedOwners(true)
	e := newFakeEngine(t)
	folder := filepath.Dir(e.path)
	link := func(name, to string) string {
		path := filepath.Join(folder, name)
		if err := os.Symlink(to, path); err != nil {
			t.Fatal(err)
		}
		return path
	}
	link("up", ".")
	for _, path := range []string{
		e.path, link("absolute", e.path), link("relative", "engine.sock"),
		link("around", "up/../"+filepath.Base(folder)+"/./engine.sock"),
		folder + "/up/./up/../" + filepath.Base(folder) + "//engine.sock",
	} {
		if err := trusted.checkPath(path); err != nil {
			t.Errorf("%s: %v", path, err)
		}
	}
	err := trusted.checkPath(link("loop", "loop"))
	if err == nil || !strings.Contains(err.Error(), "more than 40 links") {
		t.Errorf("a loop: %v", err)
	}
	if err := trusted.checkPath(filepath.Join(folder, "nobody")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("none: %v", err)
	}
}

func chmod(t *testing.T, path string, mode os.FileMode) {
	t.Helper()
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}
