package limit

import (
	"errors"
	"io"
	"net"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// fakeConn is a connection of a user that tells whether it was closed.
type fakeConn struct {
	net.Conn
	user   uint32
	unit   string
	name   string
	closed bool
}

func (v *fakeConn) Close() error { v.closed = true; return nil }

// fakeKey is the user at first, and then what of it the fakeConn is.
func fakeKey(conn net.Conn, closely bool) Key {
	v := conn.(*fakeConn)
	if !closely {
		return Key{UID: v.user, Parent: true}
	}
	return Key{UID: v.user, Unit: v.unit}
}

// fakeListener is a listener at which connections come one by one.
type fakeListener struct {
	net.Listener
	come   chan *fakeConn
	broken chan error
	shut   chan struct{}
	close  func()
}

func newFakeListener() *fakeListener {
	g := &fakeListener{come: make(chan *fakeConn), broken: make(chan error), shut: make(chan struct{})}
	g.close = sync.OnceFunc(func() { close(g.shut) })
	return g
}

func (g *fakeListener) Accept() (net.Conn, error) {
	select {
	case v := <-g.come:
		return v, nil
	case err := <-g.broken:
		return nil, err
	case <-g.shut:
		return nil, net.ErrClosed
	}
}

func (g *fakeListener) Close() error { g.close(); return nil }

// arrive has connections come, and returns them when all have been seen to.
func (g *fakeListener) arrive(user uint32, names ...string) (all []*fakeConn) {
	for _, name := range names {
		v := &fakeConn{user: user, name: name}
		g.come <- v
		all = append(all, v)
	}
	synctest.Wait()
	return all
}

func (f *FairListener) names(of *testing.T, n int) (names []string) {
	of.Helper()
	for range n {
		conn, err := f.Accept()
		if err != nil {
			of.Fatal(err)
		}
		names = append(names, conn.(*fakeConn).name)
	}
	return names
}

// perSecond is the budget of new connections in these tests.
const perSecond = 5

// newFair returns a fair listener at which so many may wait.
func newFair(g *fakeListener, most, perSecond int) *FairListener {
	return NewFairListener(g, most, Admission{
		KeyOf: fakeKey, IsExempt: func(net.Conn) bool { return false }, Refuse: func(conn net.Conn) { conn.Close() },
		Rate: &Rate{PerSecond: perSecond, Burst: perSecond},
	})
}

func TestUsersTakeTurns(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		g := newFakeListener()
		fair := newFair(g, 50, perSecond)
		g.arrive(1, "a1", "a2", "a3")
		g.arrive(2, "b1")
		g.arrive(3, "c1", "c2")
		if got, want := fair.names(t, 6), []string{"a1", "b1", "c1", "a2", "c2", "a3"}; !slices.Equal(got, want) {
			t.Errorf("%q", got)
		}
		g.arrive(2, "b2")
		if got := fair.names(t, 1); got[0] != "b2" {
			t.Errorf("%q", got)
		}
		fair.Close()
		if _, err := fair.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
	})
}

// arriveFrom has connections of a user's unit come and be let in, and returns how many of them were closed.
func (g *fakeListener) arriveFrom(t *testing.T, fair *FairListener, user uint32, unit string, n int) (closed int) {
	t.Helper()
	for range n {
		v := &fakeConn{user: user, unit: unit}
		g.come <- v
		synctest.Wait()
		if v.closed {
			closed++
			continue
		}
		fair.names(t, 1)
	}
	return closed
}

// What one caller has beyond its budget is closed at once, and costs no other its place: not another user, nor another
// unit or process of the same user, which may be root.
func TestOnesOwnBudget(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		g := newFakeListener()
		fair := newFair(g, 50, perSecond)
		defer fair.Close()
		const budget = perSecond // of the user, and then of each of its units
		if closed := g.arriveFrom(t, fair, 0, "loops.service", 100); closed != 100-2*budget {
			t.Errorf("of a unit that connects in a loop %d of 100 are closed", closed)
		}
		for _, row := range []struct {
			user uint32
			unit string
		}{{0, "quiet.service"}, {0, ""}, {1, ""}, {1, "loops.service"}} {
			if closed := g.arriveFrom(t, fair, row.user, row.unit, budget); closed != 0 {
				t.Errorf("%d connections of user %d, unit %q are closed", closed, row.user, row.unit)
			}
		}
		if closed := g.arriveFrom(t, fair, 0, "loops.service", 1); closed != 1 {
			t.Error("who was let in counts no more")
		}
		time.Sleep(time.Second / perSecond)
		if closed := g.arriveFrom(t, fair, 0, "loops.service", 3); closed != 1 {
			t.Errorf("a fifth of a second later %d of 3 are closed", closed) // one of the user's budget, one of its own
		}
	})
}

func TestWhoWaitsIsBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		g := newFakeListener()
		fair := newFair(g, 32, 500)
		defer fair.Close()
		closed := 0
		for _, v := range g.arrive(1, make([]string, 40)...) {
			if v.closed {
				closed++
			}
		}
		if waiting := 40 - closed; waiting != fewWaiting+fair.perKey {
			t.Errorf("%d of one caller wait", waiting)
		}
		user := uint32(2)
		for ; fair.count < fair.most; user++ {
			if g.arrive(user, "one")[0].closed {
				t.Fatal("one of another user is closed")
			}
		}
		if g.arrive(user, "one more")[0].closed || fair.count != fair.most {
			t.Errorf("%d wait, and one of a caller with none is closed", fair.count)
		}
		fair.names(t, fair.most)
	})
}

// On a module's socket, and the admin socket, a caller has a budget as well, and what is beyond it is told, and
// counted.
func TestBudgetOfOneSocket(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		g, cs, refused := newFakeListener(), &Conns{places: places{capacity: modulesCapacity}}, 0
		l := &RateListener{g, Admission{
			KeyOf: fakeKey, IsExempt: func(net.Conn) bool { return false },
			Refuse: func(conn net.Conn) { refused++; cs.RecordOverBudget(Key{UID: conn.(*fakeConn).user}) },
			Rate:   &Rate{PerSecond: perSecond, Burst: perSecond},
		}}
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
		if len(accepted) != 2*perSecond+1 || refused != 20-2*perSecond { // of the user, and of its unit
			t.Errorf("%d are let in, %d refused", len(accepted), refused)
		}
		if u := cs.Usage(); u.TurnedAway != int64(refused) || u.Last.Holder.String() != "uid 1" ||
			cs.Trouble(time.Now()) !=
				"connections to the modules' sockets are turned away: uid 1 connects more often than it may" {
			t.Errorf("%+v, %s", u, cs.Trouble(time.Now()))
		}
		l.Close()
	})
}

// A service that connects many times at once, within its budget, keeps no connection of its user's other services out.
func TestBurstLeavesRoomForOthers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		g := newFakeListener()
		fair := newFair(g, 32, 500)
		defer fair.Close()
		comes := func(unit string) *fakeConn {
			v := &fakeConn{unit: unit, name: unit}
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
		if waiting != fewWaiting+fair.perKey {
			t.Errorf("%d of 40 wait", waiting)
		}
		for _, unit := range []string{"quiet.service", "", "other.service"} {
			if comes(unit).closed {
				t.Errorf("a connection of root's unit %q is closed", unit)
			}
		}
		fair.names(t, waiting+3)
	})
}

// When all who may wait do, a caller with fewer waiting gets the place of one that has more.
func TestFloodsMakeRoom(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		g := newFakeListener()
		fair := newFair(g, 8, perSecond)
		defer fair.Close()
		var floods []*fakeConn
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
		fair.names(t, 8)
	})
}

// A closed listener lets in whoever came before.
func TestTurnsAreKeptOnClose(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		g := newFakeListener()
		fair := newFair(g, 50, perSecond)
		g.arrive(1, "a1", "a2")
		fair.Close()
		if got := fair.names(t, 2); !slices.Equal(got, []string{"a1", "a2"}) {
			t.Errorf("%q", got)
		}
		for range 2 {
			if _, err := fair.Accept(); !errors.Is(err, net.ErrClosed) {
				t.Error(err)
			}
		}
	})
}

// An error comes after whoever came before it, once; and then it goes on, if somebody still wants it to.
func TestAcceptingFails(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		g := newFakeListener()
		fair := newFair(g, 50, perSecond)
		g.arrive(1, "a1")
		g.broken <- io.ErrUnexpectedEOF
		synctest.Wait()
		select {
		case g.come <- &fakeConn{}:
			t.Error("it goes on before anybody was told")
		default:
		}
		fair.names(t, 1)
		if _, err := fair.Accept(); err != io.ErrUnexpectedEOF {
			t.Error(err)
		}
		got := make(chan []string)
		go func() { got <- fair.names(t, 1) }()
		synctest.Wait()
		g.arrive(1, "a2")
		if names := <-got; names[0] != "a2" {
			t.Errorf("%q", names)
		}
		g.broken <- io.ErrUnexpectedEOF
		if _, err := fair.Accept(); err != io.ErrUnexpectedEOF {
			t.Error(err)
		}
		fair.Close() // as when nobody goes on after it: nothing is left running
		synctest.Wait()
		if _, err := fair.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("closed, it says %v: who takes that for one that passes accepts for ever", err)
		}
	})
}
