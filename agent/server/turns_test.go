package server

import (
	"errors"
	"io"
	"net"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// visitor is a connection of a user that tells whether it was closed.
type visitor struct {
	net.Conn
	user   uint32
	name   string
	closed bool
}

func (v *visitor) Close() error { v.closed = true; return nil }

func visitorsUser(conn net.Conn) uint32 { return conn.(*visitor).user }

// gate is a listener at which visitors come one by one.
type gate struct {
	net.Listener
	come   chan *visitor
	broken chan error
	shut   chan struct{}
}

func newGate() *gate {
	return &gate{come: make(chan *visitor), broken: make(chan error), shut: make(chan struct{})}
}

func (g *gate) Accept() (net.Conn, error) {
	select {
	case v := <-g.come:
		return v, nil
	case err := <-g.broken:
		return nil, err
	case <-g.shut:
		return nil, net.ErrClosed
	}
}

func (g *gate) Close() error { close(g.shut); return nil }

// arrive has visitors come, and returns them when all have been seen to.
func (g *gate) arrive(user uint32, names ...string) (all []*visitor) {
	for _, name := range names {
		v := &visitor{user: user, name: name}
		g.come <- v
		all = append(all, v)
	}
	synctest.Wait()
	return all
}

func (t *turns) names(of *testing.T, n int) (names []string) {
	of.Helper()
	for range n {
		conn, err := t.Accept()
		if err != nil {
			of.Fatal(err)
		}
		names = append(names, conn.(*visitor).name)
	}
	return names
}

func someTurns(g *gate, connections int) *turns {
	return takeTurns(g, visitorsUser, Limits{Connections: connections, PerSecond: 1, Burst: 1})
}

func TestUsersTakeTurns(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		turns := someTurns(g, 100)
		g.arrive(1, "a1", "a2", "a3")
		g.arrive(2, "b1")
		g.arrive(3, "c1", "c2")
		if got, want := turns.names(t, 6), []string{"a1", "b1", "c1", "a2", "c2", "a3"}; !slices.Equal(got, want) {
			t.Errorf("%q", got)
		}
		g.arrive(2, "b2")
		if got := turns.names(t, 1); got[0] != "b2" {
			t.Errorf("%q", got)
		}
		turns.Close()
		if _, err := turns.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
	})
}

// What one user has beyond his budget is closed at once, and costs no other his place.
func TestOnesOwnBudget(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		turns := someTurns(g, 100)
		defer turns.Close()
		first := g.arrive(1, "a1", "a2", "a3", "a4", "a5", "a6")
		other := g.arrive(2, "b1")
		if first[4].closed || !first[5].closed || other[0].closed {
			t.Errorf("closed: %v %v %v", first[4].closed, first[5].closed, other[0].closed)
		}
		turns.names(t, 6)
		if v := g.arrive(1, "a7"); !v[0].closed {
			t.Error("who was let in counts no more")
		}
		time.Sleep(time.Second / busyCallers)
		if v := g.arrive(1, "a8", "a9"); v[0].closed || !v[1].closed {
			t.Error("not one more after a fifth of a second")
		}
	})
}

func TestWhoWaitsIsBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		turns := someTurns(g, 4)
		defer turns.Close()
		g.arrive(1, "a1")
		g.arrive(2, "b1")
		if v := g.arrive(3, "c1"); !v[0].closed {
			t.Error("more than half of the connections wait")
		}
		turns.names(t, 1)
		if v := g.arrive(3, "c2"); v[0].closed {
			t.Error("no room when one has gone in")
		}
		turns.names(t, 2)
	})
}

// A closed listener lets in whoever came before.
func TestTurnsAreKeptOnClose(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		turns := someTurns(g, 100)
		g.arrive(1, "a1", "a2")
		turns.Close()
		if got := turns.names(t, 2); !slices.Equal(got, []string{"a1", "a2"}) {
			t.Errorf("%q", got)
		}
		for range 2 {
			if _, err := turns.Accept(); !errors.Is(err, net.ErrClosed) {
				t.Error(err)
			}
		}
	})
}

// An error comes after whoever came before it, once; and then it goes on, if somebody still wants it to.
func TestAcceptingFails(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		turns := someTurns(g, 100)
		g.arrive(1, "a1")
		g.broken <- io.ErrUnexpectedEOF
		synctest.Wait()
		select {
		case g.come <- &visitor{}:
			t.Error("it goes on before anybody was told")
		default:
		}
		turns.names(t, 1)
		if _, err := turns.Accept(); err != io.ErrUnexpectedEOF {
			t.Error(err)
		}
		got := make(chan []string)
		go func() { got <- turns.names(t, 1) }()
		synctest.Wait()
		g.arrive(1, "a2")
		if names := <-got; names[0] != "a2" {
			t.Errorf("%q", names)
		}
		g.broken <- io.ErrUnexpectedEOF
		if _, err := turns.Accept(); err != io.ErrUnexpectedEOF {
			t.Error(err)
		}
		turns.Close() // as when nobody goes on after it: nothing is left running
	})
}
