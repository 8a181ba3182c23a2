package server

import (
	"io"
	"net"
	"net/http"
	"os"
	"testing"

	"perceptd/agent"
)

// A user's connections beyond the limit are closed unanswered, and those of others are not.
func TestTooManyConnections(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	d.Limits.PerCaller = 2
	token, module := d.tokens(""), d.tokens("vision")
	var held []net.Conn
	for range ownSeats + 2 { // this process is the daemon too
		conn, err := net.Dial("unix", token)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if _, err := io.WriteString(conn, "GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		if n, err := conn.Read(make([]byte, 16)); n == 0 || err != nil {
			t.Fatalf("within the limit: %v", err)
		}
		held = append(held, conn)
	}
	third, err := net.Dial("unix", token)
	if err != nil {
		t.Fatal(err)
	}
	defer third.Close()
	if n, err := third.Read(make([]byte, 1)); n != 0 || err == nil {
		t.Errorf("a connection beyond the limit got %d bytes, %v", n, err)
	}
	if got := send(t, module, get("/healthz")); got.status != 200 {
		t.Errorf("the same user on a module's socket: %d", got.status)
	}
	held[0].Close()
	for { // the server sees the end in its own time
		conn, err := net.Dial("unix", token)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(conn, "GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
		n, _ := conn.Read(make([]byte, 16))
		conn.Close()
		if n > 0 {
			return
		}
	}
}

func TestCrowd(t *testing.T) {
	t.Parallel()
	var c crowd
	limits := Limits{Connections: 3, PerCaller: 2}
	pipe := func() net.Conn {
		a, b := net.Pipe()
		t.Cleanup(func() { _, _ = a.Close(), b.Close() })
		return a
	}
	one, two, three, four := pipe(), pipe(), pipe(), pipe()
	root, edge := agent.Caller{UID: 0}, agent.Caller{UID: 1000}
	for i, row := range []struct {
		conn net.Conn
		who  agent.Caller
		want bool
	}{
		{one, root, true}, {two, root, true}, {three, root, false}, {three, edge, true}, {four, edge, false},
	} {
		if got := c.admit(row.conn, row.who, false, limits); got != row.want {
			t.Errorf("row %d: %v", i, got)
		}
	}
	c.note(four, http.StateClosed) // never counted
	c.note(one, http.StateIdle)
	if c.admit(four, edge, false, limits) {
		t.Error("more than all together may have")
	}
	c.note(one, http.StateClosed)
	c.note(two, http.StateHijacked)
	c.note(three, http.StateClosed)
	if len(c.of) != 0 || len(c.each) != 0 {
		t.Errorf("left over: %v %v", c.of, c.each)
	}
}

// However many connections others have, the daemon gets to itself, and nobody else does by looking like it.
func TestCrowdLetsTheDaemonIn(t *testing.T) {
	t.Parallel()
	me := agent.Caller{UID: uint32(os.Geteuid()), PID: int32(os.Getpid())}
	sibling, impostor := me, me
	sibling.PID++
	impostor.UID++
	for _, row := range []struct {
		name   string
		limits Limits
		crowd  []agent.Caller
	}{
		{"a full house", Limits{Connections: 2, PerCaller: 2}, []agent.Caller{{UID: 1000}, {UID: 1001}}},
		{"its own user has its share", Limits{Connections: 9, PerCaller: 1}, []agent.Caller{sibling, impostor}},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			var c crowd
			admit := func(who agent.Caller) (net.Conn, bool) {
				conn := new(net.UnixConn)
				return conn, c.admit(conn, who, false, row.limits)
			}
			for _, who := range row.crowd {
				if _, ok := admit(who); !ok {
					t.Fatalf("%v is kept out", who)
				}
			}
			var own []net.Conn
			for range ownSeats {
				conn, ok := admit(me)
				if !ok {
					t.Fatal("the daemon is kept out")
				}
				own = append(own, conn)
				for _, who := range []agent.Caller{sibling, impostor} {
					if _, ok := admit(who); ok {
						t.Fatalf("%v is let in", who)
					}
				}
			}
			if _, ok := admit(me); ok {
				t.Error("the daemon is let in without end")
			}
			c.note(own[0], http.StateClosed)
			if _, ok := admit(me); !ok {
				t.Error("the daemon is kept out after one of its connections ended")
			}
		})
	}
}

// The daemon's own connections take nothing from what the others may have.
func TestCrowdCountsTheDaemonApart(t *testing.T) {
	t.Parallel()
	var c crowd
	limits := Limits{Connections: 2, PerCaller: 1}
	me := agent.Caller{UID: uint32(os.Geteuid()), PID: int32(os.Getpid())}
	for range ownSeats {
		if !c.admit(new(net.UnixConn), me, false, limits) {
			t.Fatal("the daemon is kept out")
		}
	}
	sibling := me
	sibling.PID++
	for _, who := range []agent.Caller{sibling, {UID: me.UID + 1}} {
		if !c.admit(new(net.UnixConn), who, false, limits) {
			t.Errorf("%v is kept out", who)
		}
	}
}

// On a module's socket whoever cannot be proved counts as one, whatever users it makes of itself: root in a container
// can be any.
func TestUnprovedOfAModuleShareASeat(t *testing.T) {
	t.Parallel()
	var c crowd
	limits := Limits{Connections: 9, PerCaller: 2}
	for uid, want := range []bool{true, true, false, false} {
		if got := c.admit(new(net.UnixConn), agent.Caller{Module: "vision", UID: uint32(uid)}, true, limits); got != want {
			t.Errorf("as user %d: %v", uid, got)
		}
	}
	for _, who := range []agent.Caller{{Module: "speech", UID: 0}, {UID: 0}} {
		if !c.admit(new(net.UnixConn), who, true, limits) {
			t.Errorf("%v is kept out", who)
		}
	}
	if !c.admit(new(net.UnixConn), agent.Caller{Module: "vision"}, false, limits) {
		t.Error("the module itself is kept out")
	}
}
