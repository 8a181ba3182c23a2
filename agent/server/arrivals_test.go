package server

import (
	"context"
	"net"
	"testing"

	"perceptd/agent/api"
)

// arrived connects and returns when the server has accepted n connections of this socket's.
func arrived(t *testing.T, d *daemon, socket string, n int) net.Conn {
	t.Helper()
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	for {
		d.crowd.mu.Lock()
		there := len(d.crowd.of)
		d.crowd.mu.Unlock()
		if there >= n {
			return conn
		}
	}
}

// Who has connected before the daemon goes down, and asks a moment later, is answered; who says nothing is not waited
// for.
func TestAcceptedConnectionsAreHeard(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	socket := d.tokens("")
	asks := arrived(t, d, socket, 1)
	silent := arrived(t, d, socket, 2)
	down := make(chan error, 1)
	go func() { down <- d.Shutdown(context.Background()) }()
	for { // until nobody accepts any more
		conn, err := net.Dial("unix", socket)
		if err != nil {
			break
		}
		conn.Close()
	}
	if got := exchangeOn(t, asks, get(api.PathHealth)); got.status != 200 {
		t.Errorf("%+v", got)
	}
	if err := <-down; err != nil {
		t.Error(err)
	}
	if n, err := silent.Read(make([]byte, 1)); n != 0 || err == nil {
		t.Errorf("%d bytes, %v", n, err)
	}
}

func TestWaitingForArrivalsEnds(t *testing.T) {
	t.Parallel()
	var a arrivals
	ctx, cancel := context.WithCancel(context.Background())
	a.add(ctx, new(net.UnixConn))
	cancel()
	a.wait(ctx)
	heardIn(context.Background()) // a context of no connection
}
