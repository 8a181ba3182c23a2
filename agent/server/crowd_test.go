package server

import (
	"io"
	"net"
	"net/http"
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
	for range 2 {
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
		if got := c.admit(row.conn, row.who, limits); got != row.want {
			t.Errorf("row %d: %v", i, got)
		}
	}
	c.note(four, http.StateClosed) // never counted
	c.note(one, http.StateIdle)
	if c.admit(four, edge, limits) {
		t.Error("more than all together may have")
	}
	c.note(one, http.StateClosed)
	c.note(two, http.StateHijacked)
	c.note(three, http.StateClosed)
	if len(c.of) != 0 || len(c.each) != 0 {
		t.Errorf("left over: %v %v", c.of, c.each)
	}
}
