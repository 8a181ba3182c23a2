package attest

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// Descriptors that a caller sends are dropped by the kernel.
func TestSentDescriptorsAreDropped(t *testing.T) {
	t.Parallel()
	s := newFixture(t, Options{})
	_, peer, conn := s.dial(Socket{})
	own, err := os.Create(filepath.Join(t.TempDir(), "own")) // no other test opens it
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	raw, err := peer.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	before := openTo(t, own.Name())
	var sent error
	if err := raw.Control(func(fd uintptr) {
		sent = unix.Sendmsg(int(fd), []byte("x"), unix.UnixRights(int(own.Fd()), int(own.Fd())), nil, 0)
	}); err != nil || sent != nil {
		t.Fatal(err, sent)
	}
	if n, err := conn.Read(make([]byte, 8)); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	if after := openTo(t, own.Name()); after > before {
		t.Errorf("%d descriptors came in", after-before)
	}
}

// openTo counts this process's descriptors of a file.
func openTo(t *testing.T, path string) (n int) {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		if to, err := os.Readlink("/proc/self/fd/" + entry.Name()); err == nil && to == path {
			n++
		}
	}
	return n
}

func TestReadEnds(t *testing.T) {
	t.Parallel()
	s := newFixture(t, Options{})
	_, peer, conn := s.dial(Socket{})
	if n, err := conn.Read(nil); n != 0 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	peer.Close()
	if _, err := conn.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("%v", err)
	}
	conn.Close()
	if _, err := conn.Read(make([]byte, 1)); err == nil || err == io.EOF {
		t.Errorf("%v", err)
	}
}

// Reading a connection that its peer resets returns an error and does not panic.
func TestReadOfAReset(t *testing.T) {
	t.Parallel()
	s := newFixture(t, Options{})
	_, peer, conn := s.dial(Socket{})
	if _, err := conn.Write([]byte("unread")); err != nil {
		t.Fatal(err)
	}
	peer.Close()
	if n, err := conn.Read(make([]byte, 1)); n != 0 || !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("%d, %v", n, err)
	}
}

func TestAcceptEnds(t *testing.T) {
	t.Parallel()
	s := newFixture(t, Options{NoPidfd: true})
	s.l.Close()
	if conn, err := s.l.Accept(); err == nil || conn != nil {
		t.Errorf("%v, %v", conn, err)
	}
}

// Once the kernel reports writers, data without a writer counts as another process's.
func TestUnknownWriters(t *testing.T) {
	t.Parallel()
	mark := unix.UnixCredentials(&unix.Ucred{Pid: int32(os.Getpid())})
	for _, row := range []struct {
		name   string
		writes [][]byte
		want   int32
	}{
		{"the peer", [][]byte{mark, mark}, 0},
		{"before it was asked for", [][]byte{nil, nil, mark}, 0},
		{"after it was told", [][]byte{mark, nil}, -1},
		{"nonsense after it was told", [][]byte{mark, []byte("nonsense that is as long as that")}, -1},
		{"another", [][]byte{unix.UnixCredentials(&unix.Ucred{Pid: 1})}, 1},
		{"another after the peer", [][]byte{mark, unix.UnixCredentials(&unix.Ucred{Pid: 1}), mark}, 1},
		{"descriptors in their place", [][]byte{mark, unix.UnixRights(5)}, -1},
	} {
		c := new(connection)
		c.peerPID.Store(int32(os.Getpid()))
		for _, control := range row.writes {
			c.recordWriter(control)
		}
		if got := c.foreignPID.Load(); got != row.want {
			t.Errorf("%s: %d, want %d", row.name, got, row.want)
		}
	}
}
