package tcppeer

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// table is what Linux shows on a little-endian device, as this test's is.
const table = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:9DBC 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 40001 1 0000000000000000 100 0 0 10 0
   1: 0100007F:C350 0100007F:9DBC 01 00000000:00000000 00:00000000 00000000  1000        0 40002 1 0000000000000000 20 4 30 10 -1
   2: 0100007F:9DBC 0100007F:C350 01 00000000:00000000 00:00000000 00000000   998        0 40003 1 0000000000000000 20 4 30 10 -1
   3: 0100007F:C351 0100007F:9DBC 06 00000000:00000000 03:00000F93 00000000     0        0 0 3 0000000000000000
   4: 0100007F:C352 0100007F:9DBC 04 00000000:00000000 00:00000000 00000000     0        0 0 1 0000000000000000 20 4 30 10 -1
   5: 0000000000000000FFFF00000100007F:C353 0000000000000000FFFF00000100007F:9DBC 01 00000000:00000000 00:00000000 00000000  1001        0 40004 1 0
   6: 00000000000000000000000001000000:C354 00000000000000000000000001000000:9DBC 01 00000000:00000000 00:00000000 00000000  1002        0 40005 1 0
`

func TestFindSocket(t *testing.T) {
	t.Parallel()
	v4, v6 := "127.0.0.1:40380", "[::1]:40380"
	for _, row := range []struct {
		name, local, remote string
		uid                 uint32
		found               bool
	}{
		{"the one that connected, not the one that accepted", "127.0.0.1:50000", v4, 1000, true},
		{"one that waits after its end has no user", "127.0.0.1:50001", v4, 0, false},
		{"one whose process has closed it has none", "127.0.0.1:50002", v4, 0, false},
		{"through a socket for IPv6", "127.0.0.1:50003", v4, 1001, true},
		{"IPv6", "[::1]:50004", v6, 1002, true},
		{"nobody", "127.0.0.1:50005", v4, 0, false},
		{"the same port to somebody else", "127.0.0.1:50000", "127.0.0.1:40381", 0, false},
	} {
		users := make(map[netip.AddrPort]uint32)
		err := findSockets(strings.NewReader(table), netip.MustParseAddrPort(row.remote), users)
		if uid, found := users[netip.MustParseAddrPort(row.local)]; uid != row.uid || found != row.found || err != nil {
			t.Errorf("%s: %d %v %v", row.name, uid, found, err)
		}
	}
	if err := findSockets(strings.NewReader(strings.Repeat("x", 2*tableBuffer)), netip.AddrPort{}, nil); err == nil {
		t.Error("a line without end is no error")
	}
}

// The kernel's own table, over both protocols; those who have connected meanwhile share one look.
func TestPeerUser(t *testing.T) {
	t.Parallel()
	for _, at := range []string{"127.0.0.1:0", "[::1]:0"} {
		plain, err := net.Listen("tcp", at)
		if err != nil {
			t.Logf("%s: %v", at, err)
			continue
		}
		defer plain.Close()
		l := Listen(plain, "/proc", NoUser)
		const stay = 3
		for range stay {
			conn, err := net.Dial("tcp", plain.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
		}
		gone, err := net.Dial("tcp", plain.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		left := gone.LocalAddr().String()
		if err := gone.Close(); err != nil {
			t.Fatal(err)
		}
		for range stay + 1 {
			accepted, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer accepted.Close()
			uid, err := User(accepted)
			switch {
			case accepted.RemoteAddr().String() == left:
				if !errors.Is(err, errNoSocket) || uid != NoUser {
					t.Errorf("%s: one that is gone is uid %d, %v", at, uid, err)
				}
			case err != nil || int(uid) != os.Getuid():
				t.Errorf("%s: %d %v", at, uid, err)
			}
		}
		if n := len(l.(*listener).ready); n != 0 {
			t.Errorf("%d connections came from nowhere", n)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("after it was closed: %v", err)
		}
	}
}

func TestPeerUserIsNotKnown(t *testing.T) {
	t.Parallel()
	near, far := net.Pipe()
	defer near.Close()
	defer far.Close()
	if uid, err := User(near); !errors.Is(err, errNotListened) || uid != NoUser {
		t.Errorf("%d %v", uid, err)
	}
	if at := AddressOf(near.RemoteAddr()); at.IsValid() {
		t.Errorf("a pipe's address is %v", at)
	}
	from := netip.MustParseAddrPort("127.0.0.1:50000")
	proc := t.TempDir()
	l := &listener{proc: proc, stranger: NoUser, at: netip.MustParseAddrPort("127.0.0.1:40380")}
	look := func() (uint32, error) {
		c := &peer{from: from, uid: NoUser}
		l.ready = []*peer{c}
		l.lookUp()
		return User(c)
	}
	if uid, err := look(); !errors.Is(err, errNoSocket) || uid != NoUser {
		t.Errorf("without a table: %d %v", uid, err)
	}
	if err := os.MkdirAll(proc+"/self/net/tcp", 0o755); err != nil {
		t.Fatal(err)
	}
	if uid, err := look(); err == nil || errors.Is(err, errNoSocket) || uid != NoUser {
		t.Errorf("a table that cannot be read: %d %v", uid, err)
	}
	if err := errors.Join(os.Remove(proc+"/self/net/tcp"),
		os.WriteFile(proc+"/self/net/tcp", []byte(table), 0o600)); err != nil {
		t.Fatal(err)
	}
	if uid, err := look(); err != nil || uid != 1000 {
		t.Errorf("%d %v", uid, err)
	}
	l.stranger = 1000
	if uid, err := look(); !errors.Is(err, errStranger) || uid != NoUser {
		t.Errorf("one of many: %d %v", uid, err)
	}
}

// What is no TCP cannot be looked for, and is not accepted.
func TestListenIsForTCP(t *testing.T) {
	t.Parallel()
	plain, err := net.Listen("unix", shortFolder(t)+"/s")
	if err != nil {
		t.Fatal(err)
	}
	l := Listen(plain, "/proc", NoUser)
	defer l.Close()
	conn, err := net.Dial("unix", plain.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if accepted, err := l.Accept(); !errors.Is(err, errNotTCP) || accepted != nil {
		t.Errorf("%v %v", accepted, err)
	}
}

// No line of a table makes it panic, and none is taken for a socket that has no inode or no whole address.
func FuzzReadSocket(f *testing.F) {
	for line := range strings.Lines(table) {
		f.Add(line)
	}
	f.Fuzz(func(t *testing.T, line string) {
		s, ok := readSocket(line)
		if ok && (!s.local.IsValid() || !s.remote.IsValid() || s.local.Addr().Is4In6()) {
			t.Errorf("%q: %+v", line, s)
		}
	})
}
