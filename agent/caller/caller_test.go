package caller

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"perceptd/agent"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// connected returns the daemon's end of a connection over a real Unix socket.
func connected(t *testing.T) net.Conn {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	peer, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { peer.Close() })
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func TestProveTellsThePeer(t *testing.T) {
	t.Parallel()
	for _, module := range []string{"", "vision"} {
		got, err := Prove(connected(t), Socket{Module: module})
		if err != nil {
			t.Fatal(err)
		}
		want := agent.Caller{
			Module: module,
			UID:    uint32(os.Getuid()), GID: uint32(os.Getgid()), PID: int32(os.Getpid()),
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("module %q: got %+v, want %+v", module, got, want)
		}
	}
}

func TestProveRefusesWhatIsUnclear(t *testing.T) {
	t.Parallel()
	pipe, other := net.Pipe()
	defer pipe.Close()
	defer other.Close()
	closed := connected(t)
	closed.Close()
	for _, test := range []struct {
		name, want string
		conn       net.Conn
	}{
		{"no Unix socket", "not come in on a Unix socket", pipe},
		{"no connection", "not come in on a Unix socket", nil},
		{"zero connection", "no descriptor", &net.UnixConn{}},
		{"closed", "does not tell the peer's credentials", closed},
	} {
		got, err := Prove(test.conn, Socket{Module: "vision"})
		if err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: error %v, want %q", test.name, err, test.want)
		}
		if !reflect.DeepEqual(got, agent.Caller{}) {
			t.Errorf("%s: caller %+v beside the error", test.name, got)
		}
	}
}

func TestPlausible(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name, want string
		caller     agent.Caller
	}{
		{"a user", "", agent.Caller{UID: 1000, GID: 1000, PID: 7}},
		{"root", "", agent.Caller{PID: 1}},
		{"outside the pid namespace, looking like root", "pid namespace", agent.Caller{}},
		{"outside the pid namespace, on a module's socket", "pid namespace", agent.Caller{Module: "vision", UID: 1000, GID: 1000}},
		{"a negative pid", "pid namespace", agent.Caller{UID: 1000, GID: 1000, PID: -1}},
		{"no uid", "no uid", agent.Caller{UID: noID, GID: 1000, PID: 7}},
		{"no gid", "no uid or gid", agent.Caller{UID: 1000, GID: noID, PID: 7}},
	} {
		err := plausible(test.caller)
		if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: error %v, want %q", test.name, err, test.want)
		}
	}
}

func TestListeningSocketHasNoPeer(t *testing.T) {
	t.Parallel()
	// A datagram socket that nobody connected has no peer to tell of: the kernel says pid 0, uid -1.
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "d"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if got, err := Prove(conn, Socket{}); err == nil {
		t.Errorf("a socket without a peer is %+v", got)
	}
}

func TestContextCarriesTheProof(t *testing.T) {
	t.Parallel()
	ctx, err := NewContext(context.Background(), connected(t), Socket{Module: "vision"})
	if err != nil {
		t.Fatal(err)
	}
	got, err := FromContext(ctx)
	if err != nil || got.Module != "vision" || got.UID != uint32(os.Getuid()) {
		t.Errorf("got %+v, %v", got, err)
	}
}

func TestContextFailsClosed(t *testing.T) {
	t.Parallel()
	if got, err := FromContext(context.Background()); err == nil {
		t.Errorf("a context without a proof has caller %+v", got)
	}
	pipe, other := net.Pipe()
	defer pipe.Close()
	defer other.Close()
	ctx, err := NewContext(context.Background(), pipe, Socket{Module: "vision"})
	if err == nil {
		t.Error("NewContext hides that the proof failed")
	}
	if got, err := FromContext(ctx); err == nil || !reflect.DeepEqual(got, agent.Caller{}) {
		t.Errorf("got %+v, %v after a proof that failed", got, err)
	}
}
