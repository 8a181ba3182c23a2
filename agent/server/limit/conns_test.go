package limit

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// ending is a connection's other side: it knows whether its reading end was shut.
type ending struct {
	net.Conn
	ended  bool
	answer bytes.Buffer
}

func (e *ending) CloseRead() error { e.ended = true; return nil }

func (e *ending) Write(b []byte) (int, error) { return e.answer.Write(b) }

// capacity64 is what a token socket with 64 connections may have.
var capacity64 = Capacity{
	Name: "token socket", Total: 64, PerParent: 16, PerKey: 14, ForRoot: 4,
	Line: 4, LinePerParent: 1, LineTimeout: time.Second, Refused: 24,
}

// modulesCapacity is what all modules' sockets may have.
var modulesCapacity = Capacity{
	Name: "modules' sockets", Total: 512, PerModule: true, Line: 64, LinePerParent: 8, LineTimeout: time.Second,
	Refused: 64,
}

// comes has a connection of k come, at the phase that is wanted, and reports whether it got a place at once.
func (cs *Conns) comes(k Key, at phase) (c *Conn, placed bool) {
	c = &Conn{Conn: new(ending), acceptedAt: time.Now(), at: -1, key: k, conns: cs}
	c.phase.Store(at)
	cs.acquire(c, false)
	return c, c.at >= 0
}

// many has n of them come, and returns those that got a place.
func (cs *Conns) many(n int, k Key, at phase) (placed []*Conn) {
	for range n {
		if c, ok := cs.comes(k, at); ok {
			placed = append(placed, c)
		} else {
			cs.Release(c)
		}
	}
	return placed
}

func (c *Conn) wasEnded() bool { return c.Conn.(*ending).ended }

// A user has a quarter of all places, in whatever units it runs, proved or not; a unit has a quarter, whatever users it
// becomes; and none of its own takes all of a user's.
func TestWholesHaveOneCap(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name string
		keys []Key
		want int
	}{
		{"one caller of a user", []Key{{UID: 7}}, 14},
		{"all of a user", []Key{{UID: 7}, {UID: 7, Unit: "a.service"}, {UID: 7, Unit: "b.service"},
			{UID: 7, Unattested: true}}, 16},
		{"all users of a unit", []Key{{UID: 7, Unit: "a.service"}, {UID: 8, Unit: "a.service"},
			{UID: 9, Unit: "a.service"}}, 16},
		{"a unit of root's", []Key{{Unit: "a.service"}}, 16},
		{"two units of root's", []Key{{Unit: "a.service"}, {Unit: "b.service"}}, 32},
		{"root", []Key{{}}, 16},
		{"a container", []Key{{Container: "1f"}}, 16},
		{"users who are not known", []Key{{UID: NoUID, Unattested: true}}, 16},
	} {
		cs := Conns{places: places{capacity: capacity64}}
		got := 0
		for _, k := range row.keys {
			got += len(cs.many(64, k, phaseBusy))
		}
		if got != row.want {
			t.Errorf("%s: %d places, want %d", row.name, got, row.want)
		}
	}
}

// Whatever everybody else has, and does with it, there is room for root's processes outside of units.
func TestRoomIsLeftForRoot(t *testing.T) {
	t.Parallel()
	cs := Conns{places: places{capacity: capacity64}}
	all := 0
	for uid := range uint32(9) {
		all += len(cs.many(64, Key{UID: 1000 + uid}, phaseBusy))
	}
	if want := 64 - 64/16; all != want {
		t.Errorf("users have %d places, want %d", all, want)
	}
	if got := len(cs.many(9, Key{Unit: "a.service"}, phaseBusy)); got != 0 {
		t.Errorf("a unit of root's gets %d of what is root's", got)
	}
	if got := len(cs.many(9, Key{}, phaseBusy)); got != 64/16 {
		t.Errorf("root gets %d", got)
	}
}

// Who comes when all places are taken gets that of the caller with most whose connection has been idle the longest; and
// a caller at its own limit gets its own. No other state is idle.
func TestLongestIdleGoes(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		cs := Conns{places: places{capacity: capacity64}}
		var busiest []*Conn
		for uid := range uint32(3) {
			busiest = append(busiest, cs.many(12, Key{UID: 1000 + uid}, phaseBusy)...)
		}
		greedy := cs.many(12, Key{UID: 7}, phaseBusy)
		greedy = append(greedy, cs.many(4, Key{UID: 7, Unit: "a.service"}, phaseBusy)...)
		others := cs.many(8, Key{UID: 8}, phaseBusy)
		if n := len(cs.placed); n != 60 {
			t.Fatalf("%d places are taken", n)
		}
		rest := func(all ...*Conn) {
			for _, c := range all {
				time.Sleep(time.Second)
				c.setIdle()
			}
		}
		rest(others[0], greedy[3], greedy[1])
		newcomer := Key{UID: 9}
		for i, want := range []*Conn{greedy[3], greedy[1]} { // and not that of others, though it is idle for longer
			if _, placed := cs.comes(newcomer, phaseBusy); !placed || !want.wasEnded() || others[0].wasEnded() {
				t.Fatalf("newcomer %d: placed %v", i, placed)
			}
		}
		third, placed := cs.comes(newcomer, phaseBusy)
		if !placed || !others[0].wasEnded() {
			t.Error("the only idle one keeps its place, whose caller has more")
		}
		third.setIdle()
		if _, placed := cs.comes(Key{UID: 9, Unit: "b.service"}, phaseBusy); !placed || !third.wasEnded() {
			t.Error("a caller does not get the place of its own that is idle")
		}
		for _, at := range []phase{phaseReading, phaseBusy} {
			for _, c := range greedy {
				c.phase.CompareAndSwap(phaseBusy, at)
			}
			if c, placed := cs.comes(Key{UID: 10}, phaseBusy); placed {
				t.Errorf("at %d somebody's place is taken", at)
			} else {
				cs.Release(c)
			}
			for _, c := range greedy {
				c.phase.CompareAndSwap(at, phaseBusy)
			}
		}
		greedy[5].acceptedAt = time.Now()
		greedy[5].phase.Store(phaseSilent)
		c, placed := cs.comes(Key{UID: 10}, phaseBusy)
		if cs.Release(c); placed {
			t.Error("one that has just come loses its place")
		}
		time.Sleep(SilenceTimeout)
		if _, placed := cs.comes(Key{UID: 10}, phaseBusy); !placed || !greedy[5].wasEnded() {
			t.Error("one that says nothing keeps its place")
		}
		if slices.ContainsFunc(busiest, (*Conn).wasEnded) {
			t.Error("one with a request has lost its place")
		}
	})
}

// A caller that has no more than the newcomer keeps what it has.
func TestEqualsTakeNothingFromEachOther(t *testing.T) {
	t.Parallel()
	cs := Conns{places: places{capacity: Capacity{Total: 4, PerParent: 4, PerKey: 4}}}
	for uid := range uint32(4) {
		cs.many(1, Key{UID: 1000 + uid}, phaseIdle)
	}
	if _, placed := cs.comes(Key{UID: 7}, phaseBusy); !placed {
		t.Error("who has nothing gets no place of those who have one")
	}
	if _, placed := cs.comes(Key{UID: 7}, phaseBusy); placed {
		t.Error("who has one gets that of another who has one")
	}
}

// Each module has a part of its own; the fewer there are, the larger.
func TestModulesHaveRoomOfTheirOwn(t *testing.T) {
	t.Parallel()
	for modules, want := range map[int]int{1: 128, 4: 128, 8: 64, 64: 8, 256: 2} {
		cs := Conns{places: places{capacity: modulesCapacity}}
		cs.modules.Store(int32(modules))
		for i := range modules {
			if got := len(cs.many(200, Key{Module: fmt.Sprint("m", i)}, phaseBusy)); got != want {
				t.Fatalf("of %d modules one has %d places, want %d", modules, got, want)
			}
		}
		if len(cs.placed) > 512 {
			t.Errorf("%d modules have %d connections", modules, len(cs.placed))
		}
	}
	cs := Conns{places: places{capacity: modulesCapacity}}
	cs.modules.Store(1)
	if got := len(cs.many(200, Key{Module: "m", Unattested: true}, phaseBusy)); got != 64 {
		t.Errorf("those who cannot be proved have %d places", got)
	}
	if got := len(cs.many(200, Key{Module: "m"}, phaseBusy)); got != 64 {
		t.Errorf("the module has %d places beside those who cannot be proved", got)
	}
}

// However many connections others have, the daemon gets to itself, and nobody else does by looking like it; and its own
// connections take nothing from what the others may have.
func TestCrowdLetsTheDaemonIn(t *testing.T) {
	t.Parallel()
	cs := Conns{places: places{capacity: Capacity{Total: 2, PerParent: 2, PerKey: 2}}}
	var own []*Conn
	for i := range OwnPlaces + 1 {
		c := &Conn{Conn: new(ending), at: -1, conns: &cs, key: Key{UID: 7}}
		cs.acquire(c, true)
		if i < OwnPlaces && !c.isOwn || i == OwnPlaces && (c.isOwn || c.at < 0) {
			t.Errorf("connection %d: own %v, place %d", i, c.isOwn, c.at)
		}
		own = append(own, c)
	}
	if got := len(cs.many(2, Key{UID: 8}, phaseBusy)); got != 1 {
		t.Errorf("others get %d places", got)
	}
	cs.Release(own[0])
	c := &Conn{Conn: new(ending), at: -1, conns: &cs}
	if cs.acquire(c, true); !c.isOwn {
		t.Error("the daemon is kept out after one of its connections ended")
	}
}

// When all connections are gone nothing of them is left.
func TestCrowdForgets(t *testing.T) {
	t.Parallel()
	cs := Conns{places: places{capacity: capacity64}}
	var all []*Conn
	for uid := range uint32(20) {
		for range 20 {
			c, _ := cs.comes(Key{UID: uid, Unit: "a.service"}, phaseIdle)
			all = append(all, c)
		}
	}
	for _, c := range all {
		cs.Release(c)
	}
	if len(cs.placed)+len(cs.waiting)+len(cs.tallies)+cs.own+cs.root+int(cs.line.Load()) != 0 {
		t.Errorf("left over: %+v", cs.tallies)
	}
}

// A request that was on its way when its connection was to end is read, and can be answered; a later one is refused
// before anything of it is sent, so that the client may ask again. So it is on TCP, but that the kernel takes what
// comes later.
func TestRequestOnItsWayIsRead(t *testing.T) {
	t.Parallel()
	for _, network := range []string{"unix", "tcp"} {
		address := "127.0.0.1:0"
		if network == "unix" {
			address = shortFolder(t) + "/s"
		}
		l, err := net.Listen(network, address)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		client, err := net.Dial(network, l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		conn, err := Listener{l, time.Second}.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		c, cs := conn.(*Conn), new(Conns)
		c.conns = cs
		c.counted = cs.countedFor(c.key)
		cs.add(c)
		c.Begin()
		if c.yield(time.Now()) {
			t.Errorf("%s: with a request under way it is ended", network)
		}
		c.setIdle()
		if _, err := io.WriteString(client, "GET "); err != nil {
			t.Fatal(err)
		}
		if c.yield(time.Now()) || c.canYield(c.phase.Load(), time.Now()) {
			t.Errorf("%s: with a request on its way it gives its place up, or may be asked for it again", network)
		}
		text, err := io.ReadAll(c)
		if string(text) != "GET " || err != nil {
			t.Errorf("%s: %q, %v", network, text, err)
		}
		cs.remove(c) // as if it had been read at the very moment
		if c.Begin() {
			t.Errorf("%s: it may bring another request", network)
		}
		if len(cs.placed) != 1 || c.top().placed != 1 || cs.tallies[c.key] != c.counted[0].tally {
			t.Errorf("%s: it is answered without a place", network)
		}
		if _, err := io.WriteString(client, "GET "); network == "unix" && err == nil {
			t.Errorf("%s: the client may write", network)
		}
		if _, err := io.WriteString(c, "answer"); err != nil {
			t.Errorf("%s: %v", network, err)
		}
		if n, err := client.Read(make([]byte, 6)); n != 6 || err != nil {
			t.Errorf("%s: the answer does not arrive: %v", network, err)
		}
	}
}

// A line is as long as is said, for each and for all; the first to come gets the first place; and who has waited for
// long enough and said nothing is ended.
func TestLine(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		cs := Conns{places: places{capacity: Capacity{Total: 3, PerParent: 2, PerKey: 2, Line: 3, LinePerParent: 2,
			LineTimeout: time.Second}}}
		user := func(uid uint32) Key { return Key{UID: uid} }
		held := append(cs.many(2, user(1), phaseBusy), cs.many(1, user(2), phaseBusy)...)
		var line []*Conn
		for i, row := range []struct {
			of   uint32
			want bool
		}{{1, true}, {1, true}, {1, false}, {3, true}, {4, false}} {
			c, placed := cs.comes(user(row.of), phaseSilent)
			if placed || c.inLine.Load() != row.want {
				t.Errorf("%d, of user %d: has a place %v, waits %v", i, row.of, placed, c.inLine.Load())
			}
			if row.want {
				line = append(line, c)
			}
		}
		if cs.turnedAways.count != 2 {
			t.Errorf("%d were turned away", cs.turnedAways.count)
		}
		has := func() (all []bool) {
			for _, c := range line {
				all = append(all, c.at >= 0)
			}
			return all
		}
		cs.Release(held[2])
		if got := has(); !slices.Equal(got, []bool{false, false, true}) {
			t.Errorf("when another's place is free: %v", got)
		}
		cs.Idle(held[0])
		if got := has(); !slices.Equal(got, []bool{true, false, true}) || !held[0].wasEnded() {
			t.Errorf("when one of its own is idle: %v", got)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if !line[1].wasEnded() || line[0].wasEnded() || line[2].wasEnded() {
			t.Error("who has waited its time and said nothing")
		}
		cs.Release(held[1])
		if got := has(); got[1] {
			t.Error("a place is given to who is being refused")
		}
		for _, c := range append(line, held[0]) {
			cs.Release(c)
		}
		if len(cs.placed)+len(cs.waiting)+len(cs.tallies) != 0 {
			t.Errorf("left over: %d, %d, %v", len(cs.placed), len(cs.waiting), cs.tallies)
		}
	})
}

// Nobody waits in line while the daemon goes down, or after the caller has gone.
func TestWaitingInLineEnds(t *testing.T) {
	t.Parallel()
	cs := Conns{places: places{capacity: Capacity{Total: 1, PerParent: 1, PerKey: 1, Line: 2, LinePerParent: 2,
		LineTimeout: time.Hour}}}
	cs.many(1, Key{UID: 1}, phaseBusy)
	c, _ := cs.comes(Key{UID: 1}, phaseBusy)
	defer cs.Release(c)
	stopped := make(chan struct{})
	close(stopped)
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if err := c.Await(t.Context(), stopped); err != ErrStopped {
		t.Errorf("going down: %v", err)
	}
	var away *TurnedAway
	if err := c.Await(gone, nil); !errors.As(err, &away) {
		t.Errorf("gone: %v", err)
	}
}

// A connection that made room, and whose client leaves unread what net/http says to the rest of what it had sent,
// counts again for its caller until that is read.
func TestUnreadRefusalAfterMakingRoomCounts(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("unix", shortFolder(t)+"/s")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	cs := &Conns{places: places{capacity: capacity64}}
	defer cs.Close()
	open := func() (*Conn, net.Conn) {
		client, err := net.Dial("unix", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { client.Close() })
		accepted, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		c := &Conn{Conn: accepted, acceptedAt: time.Now(), at: -1, key: Key{UID: 7}, conns: cs}
		if !cs.acquire(c, false) {
			t.Fatal("there is not even a line")
		}
		c.phase.Store(phaseBusy)
		return c, client
	}
	first, client := open()
	most := first.counted[0].most
	for len(cs.placed) < most {
		open()
	}
	waits, _ := open()
	cs.Idle(first) // it is idle, with the rest of what was sent in net/http's own buffer
	if first.at >= 0 || waits.at < 0 {
		t.Fatal("it has made no room")
	}
	if _, err := first.Write([]byte("HTTP/1.1 400 Bad Request\r\n\r\n")); err != nil {
		t.Fatal(err)
	}
	_ = first.Close()
	cs.Release(first)
	cs.mu.Lock() // from now on a timer looks whether it was read
	if len(cs.placed) != most+1 || waits.top().placed != most+1 {
		t.Errorf("%d connections are counted of %d that are open", len(cs.placed), most+1)
	}
	cs.mu.Unlock()
	client.Close()
	for open := most + 1; open > most; {
		time.Sleep(time.Millisecond)
		cs.mu.Lock()
		open = len(cs.placed)
		cs.mu.Unlock()
	}
}

// What was asked for on a connection that was refused in that very moment does not come about: its client asks again.
func TestRefusedInLineAsksForNothing(t *testing.T) {
	t.Parallel()
	cs := &Conns{places: places{capacity: capacity64}}
	c := &Conn{Conn: new(ending), acceptedAt: time.Now(), at: -1, key: Key{UID: 7}, conns: cs}
	c.counted = cs.countedFor(c.key)
	if !cs.enqueueLocked(c) {
		t.Fatal("there is no line")
	}
	defer c.lineTimer.Stop()
	c.wrote.Store(true) // nothing more is written on it
	cs.expire(c)
	if c.Begin() {
		t.Error("it may bring another request")
	}
	if err := c.Await(t.Context(), nil); err != ErrRefused || len(cs.placed) != 0 {
		t.Errorf("%v, %d placed", err, len(cs.placed))
	}
}

// The admin socket has so many connections and no more, of which one user has a quarter; root has room whatever the
// others do, and so has the daemon's check of itself.
func TestPlacesOfTheAdminSocket(t *testing.T) {
	t.Parallel()
	cs := Conns{places: places{capacity: Capacity{
		Name: "admin socket", Total: 64, PerParent: 16, PerKey: 16, ForRoot: 16,
		Line: 16, LinePerParent: 4, LineTimeout: time.Second, Refused: 32,
	}}}
	if got := len(cs.many(12_281, Key{UID: 1000}, phaseBusy)); got != 16 {
		t.Errorf("one user has %d", got)
	}
	for uid := range uint32(9) {
		cs.many(100, Key{UID: 1001 + uid}, phaseBusy)
	}
	if got := len(cs.placed); got != 48 {
		t.Errorf("all users have %d", got)
	}
	if got := len(cs.many(100, Key{}, phaseBusy)); got != 16 {
		t.Errorf("root has %d", got)
	}
	for range OwnPlaces {
		c := &Conn{Conn: new(ending), at: -1, conns: &cs}
		if cs.acquire(c, true); !c.isOwn {
			t.Error("the daemon's check of itself is kept out")
		}
	}
}
