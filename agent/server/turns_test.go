package server

import (
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"perceptd/agent"
	"perceptd/agent/attest"
)

// visitor is a connection of a user that tells whether it was closed.
type visitor struct {
	net.Conn
	user   uint32
	unit   string
	name   string
	closed bool
}

func (v *visitor) Close() error { v.closed = true; return nil }

// visitorsKey is the user at first, and then what of it the visitor is.
func visitorsKey(conn net.Conn, closely bool) quotaKey {
	v := conn.(*visitor)
	if !closely {
		return quotaKey{uid: v.user, whole: true}
	}
	return quotaKey{uid: v.user, unit: v.unit}
}

// gate is a listener at which visitors come one by one.
type gate struct {
	net.Listener
	come   chan *visitor
	broken chan error
	shut   chan struct{}
	close  func()
}

func newGate() *gate {
	g := &gate{come: make(chan *visitor), broken: make(chan error), shut: make(chan struct{})}
	g.close = sync.OnceFunc(func() { close(g.shut) })
	return g
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

func (g *gate) Close() error { g.close(); return nil }

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
	return takeTurns(g, visitorsKey, func(conn net.Conn) { conn.Close() }, Limits{Connections: connections, PerSecond: 1, Burst: 1})
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

// arriveFrom has visitors of a user's unit come and be let in, and returns how many of them were closed.
func (g *gate) arriveFrom(t *testing.T, turns *turns, user uint32, unit string, n int) (closed int) {
	t.Helper()
	for range n {
		v := &visitor{user: user, unit: unit}
		g.come <- v
		synctest.Wait()
		if v.closed {
			closed++
			continue
		}
		turns.names(t, 1)
	}
	return closed
}

// What one caller has beyond its budget is closed at once, and costs no other its place: not another user, nor another unit
// or process of the same user, which may be root.
func TestOnesOwnBudget(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		turns := someTurns(g, 100)
		defer turns.Close()
		const budget = busyCallers // of the user, and then of each of its units
		if closed := g.arriveFrom(t, turns, 0, "loops.service", 100); closed != 100-2*budget {
			t.Errorf("of a unit that connects in a loop %d of 100 are closed", closed)
		}
		for _, row := range []struct {
			user uint32
			unit string
		}{{0, "quiet.service"}, {0, ""}, {1, ""}, {1, "loops.service"}} {
			if closed := g.arriveFrom(t, turns, row.user, row.unit, budget); closed != 0 {
				t.Errorf("%d connections of user %d, unit %q are closed", closed, row.user, row.unit)
			}
		}
		if closed := g.arriveFrom(t, turns, 0, "loops.service", 1); closed != 1 {
			t.Error("who was let in counts no more")
		}
		time.Sleep(time.Second / busyCallers)
		if closed := g.arriveFrom(t, turns, 0, "loops.service", 3); closed != 1 {
			t.Errorf("a fifth of a second later %d of 3 are closed", closed) // one of the user's budget, one of its own
		}
	})
}

func TestWhoWaitsIsBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		turns := takeTurns(g, visitorsKey, func(conn net.Conn) { conn.Close() }, Limits{Connections: 64, PerSecond: 100, Burst: 100})
		defer turns.Close()
		closed := 0
		for _, v := range g.arrive(1, make([]string, 40)...) {
			if v.closed {
				closed++
			}
		}
		if waiting := 40 - closed; waiting != fewWaiting+turns.per {
			t.Errorf("%d of one caller wait", waiting)
		}
		user := uint32(2)
		for ; turns.count < turns.most; user++ {
			if g.arrive(user, "one")[0].closed {
				t.Fatal("one of another user is closed")
			}
		}
		if g.arrive(user, "one more")[0].closed || turns.count != turns.most {
			t.Errorf("%d wait, and one of a caller with none is closed", turns.count)
		}
		turns.names(t, turns.most)
	})
}

// On a module's socket, and the admin socket, a caller has a budget as well, and what is beyond it is told, and counted.
func TestBudgetOfOneSocket(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		g, cr, refused := newGate(), &crowd{room: room{name: "modules' sockets"}}, 0
		l := &budgeted{Listener: g, budget: Limits{PerSecond: 1, Burst: 1}.arrivals(),
			from:   visitorsKey,
			refuse: func(conn net.Conn) { refused++; cr.missed(quotaKey{uid: conn.(*visitor).user}) },
		}
		accepted := make(chan net.Conn, 100)
		go func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				accepted <- conn
			}
		}()
		g.arrive(1, make([]string, 20)...)
		g.arrive(2, "other")
		if len(accepted) != 2*busyCallers+1 || refused != 20-2*busyCallers { // of the user, and of its unit
			t.Errorf("%d are let in, %d refused", len(accepted), refused)
		}
		if s := cr.status(); s.TurnedAway != int64(refused) || s.HeldBy != "uid 1" || cr.trouble(time.Now()) !=
			"connections to the modules' sockets are turned away: uid 1 connects more often than it may" {
			t.Errorf("%+v, %s", s, cr.trouble(time.Now()))
		}
		l.Close()
	})
}

// A service that connects many times at once, within its budget, keeps no connection of its user's other services out.
func TestBurstLeavesRoomForOthers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		turns := takeTurns(g, visitorsKey, func(conn net.Conn) { conn.Close() }, Limits{Connections: 64, PerSecond: 100, Burst: 100})
		defer turns.Close()
		comes := func(unit string) *visitor {
			v := &visitor{unit: unit, name: unit}
			g.come <- v
			synctest.Wait()
			return v
		}
		waiting := 0
		for range 40 {
			if !comes("bursts.service").closed {
				waiting++
			}
		}
		if waiting != fewWaiting+turns.per {
			t.Errorf("%d of 40 wait", waiting)
		}
		for _, unit := range []string{"quiet.service", "", "other.service"} {
			if comes(unit).closed {
				t.Errorf("a connection of root's unit %q is closed", unit)
			}
		}
		turns.names(t, waiting+3)
	})
}

// When all who may wait do, a caller with fewer waiting gets the place of one that has more.
func TestFloodsMakeRoom(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		turns := someTurns(g, 16)
		defer turns.Close()
		var floods []*visitor
		for user := range uint32(4) {
			floods = append(floods, g.arrive(user, "first", "second")...)
		}
		if v := g.arrive(9, "honest"); v[0].closed {
			t.Error("others' floods leave no room for one connection")
		}
		if v := g.arrive(9, "as many as others"); !v[0].closed {
			t.Error("a caller drives out one that has no more waiting than it would have")
		}
		closed := 0
		for _, v := range floods {
			if v.closed {
				closed++
			}
			if v.closed && v.name == "first" {
				t.Error("one that came earlier was closed")
			}
		}
		if closed != 1 {
			t.Errorf("%d were closed for one", closed)
		}
		turns.names(t, 8)
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
		synctest.Wait()
		if _, err := turns.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("closed, it says %v: who takes that for one that passes accepts for ever", err)
		}
	})
}

// On a real socket a process is found to be of its user, and closely of what it runs in.
func TestWhence(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	l := d.Callers.Listen(d.listen("s"))
	defer l.Close()
	client, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	me := uint32(os.Getuid())
	whence := d.whence()
	if got := whence(conn, false); got != (quotaKey{uid: me, whole: true}) {
		t.Errorf("%+v", got)
	}
	who, owner := d.Callers.Whence(conn)
	want := keyOf(&who, owner, false)
	if who.UID != me || int(who.PID) != os.Getpid() {
		t.Errorf("%+v", who)
	}
	for range 2 {
		if got := whence(conn, true); got != want {
			t.Errorf("%+v, want %+v", got, want)
		}
	}
	if who, owner := d.Callers.Whence(client); who.UID != agent.NoID || owner != agent.NoID || attest.ProcessOf(client) != 0 {
		t.Errorf("of a connection that no listener of the prover's accepted: %+v %d", who, owner)
	}
}
