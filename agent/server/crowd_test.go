package server

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"perceptd/agent"
	"perceptd/agent/api"
)

// ending is a connection's other side: it knows whether its reading end was shut.
type ending struct {
	net.Conn
	ended  bool
	answer bytes.Buffer
}

func (e *ending) CloseRead() error            { e.ended = true; return nil }
func (e *ending) Write(b []byte) (int, error) { return e.answer.Write(b) }

// comes has a connection of k come, at the phase that is wanted, and reports whether it got a place at once.
func (cr *crowd) comes(k quotaKey, at phase) (c *connection, placed bool) {
	c = &connection{Conn: new(ending), on: time.Now(), at: -1, key: k, crowd: cr}
	c.phase.Store(at)
	cr.enter(c, false)
	return c, c.at >= 0
}

// many has n of them come, and returns those that got a place.
func (cr *crowd) many(n int, k quotaKey, at phase) (placed []*connection) {
	for range n {
		if c, ok := cr.comes(k, at); ok {
			placed = append(placed, c)
		} else {
			cr.forget(c)
		}
	}
	return placed
}

func (c *connection) wasEnded() bool { return c.Conn.(*ending).ended }

func tokensRoom(l Limits) room { tokens, _, _, _ := l.orDefaults().rooms(); return tokens }

// A user has a quarter of all places, in whatever units it runs, proved or not; a unit has a quarter, whatever users it
// becomes; and none of its own takes all of a user's.
func TestWholesHaveOneCap(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name string
		keys []quotaKey
		want int
	}{
		{"one caller of a user", []quotaKey{{uid: 7}}, 14},
		{"all of a user", []quotaKey{{uid: 7}, {uid: 7, unit: "a.service"}, {uid: 7, unit: "b.service"}, {uid: 7, unproved: true}}, 16},
		{"all users of a unit", []quotaKey{{uid: 7, unit: "a.service"}, {uid: 8, unit: "a.service"}, {uid: 9, unit: "a.service"}}, 16},
		{"a unit of root's", []quotaKey{{unit: "a.service"}}, 16},
		{"two units of root's", []quotaKey{{unit: "a.service"}, {unit: "b.service"}}, 32},
		{"root", []quotaKey{{}}, 16},
		{"a container", []quotaKey{{container: "1f"}}, 16},
		{"users who are not known", []quotaKey{{uid: agent.NoID, unproved: true}}, 16},
	} {
		cr := crowd{room: tokensRoom(Limits{Connections: 64})}
		got := 0
		for _, k := range row.keys {
			got += len(cr.many(64, k, phaseBusy))
		}
		if got != row.want {
			t.Errorf("%s: %d places, want %d", row.name, got, row.want)
		}
	}
}

// Whatever everybody else has, and does with it, there is room for root's processes outside of units.
func TestRoomIsLeftForRoot(t *testing.T) {
	t.Parallel()
	cr := crowd{room: tokensRoom(Limits{Connections: 64})}
	all := 0
	for uid := range uint32(9) {
		all += len(cr.many(64, quotaKey{uid: 1000 + uid}, phaseBusy))
	}
	if want := 64 - 64/16; all != want {
		t.Errorf("users have %d places, want %d", all, want)
	}
	if got := len(cr.many(9, quotaKey{unit: "a.service"}, phaseBusy)); got != 0 {
		t.Errorf("a unit of root's gets %d of what is root's", got)
	}
	if got := len(cr.many(9, quotaKey{}, phaseBusy)); got != 64/16 {
		t.Errorf("root gets %d", got)
	}
}

// Who comes when all places are taken gets that of the caller with most whose connection has been idle the longest; and a
// caller at its own limit gets its own. No other state is idle.
func TestLongestIdleGoes(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		cr := crowd{room: tokensRoom(Limits{Connections: 64})}
		var busiest []*connection
		for uid := range uint32(3) {
			busiest = append(busiest, cr.many(12, quotaKey{uid: 1000 + uid}, phaseBusy)...)
		}
		greedy := cr.many(12, quotaKey{uid: 7}, phaseBusy)
		greedy = append(greedy, cr.many(4, quotaKey{uid: 7, unit: "a.service"}, phaseBusy)...)
		others := cr.many(8, quotaKey{uid: 8}, phaseBusy)
		if n := len(cr.placed); n != 60 {
			t.Fatalf("%d places are taken", n)
		}
		rest := func(all ...*connection) {
			for _, c := range all {
				time.Sleep(time.Second)
				c.rest()
			}
		}
		rest(others[0], greedy[3], greedy[1])
		newcomer := quotaKey{uid: 9}
		for i, want := range []*connection{greedy[3], greedy[1]} { // and not that of others, though it is idle for longer
			if _, placed := cr.comes(newcomer, phaseBusy); !placed || !want.wasEnded() || others[0].wasEnded() {
				t.Fatalf("newcomer %d: placed %v", i, placed)
			}
		}
		third, placed := cr.comes(newcomer, phaseBusy)
		if !placed || !others[0].wasEnded() {
			t.Error("the only idle one keeps its place, whose caller has more")
		}
		third.rest()
		if _, placed := cr.comes(quotaKey{uid: 9, unit: "b.service"}, phaseBusy); !placed || !third.wasEnded() {
			t.Error("a caller does not get the place of its own that is idle")
		}
		for _, at := range []phase{phaseReading, phaseBusy} {
			for _, c := range greedy {
				c.phase.CompareAndSwap(phaseBusy, at)
			}
			if c, placed := cr.comes(quotaKey{uid: 10}, phaseBusy); placed {
				t.Errorf("at %d somebody's place is taken", at)
			} else {
				cr.forget(c)
			}
			for _, c := range greedy {
				c.phase.CompareAndSwap(at, phaseBusy)
			}
		}
		greedy[5].on = time.Now()
		greedy[5].phase.Store(phaseSilent)
		c, placed := cr.comes(quotaKey{uid: 10}, phaseBusy)
		if cr.forget(c); placed {
			t.Error("one that has just come loses its place")
		}
		time.Sleep(hearing)
		if _, placed := cr.comes(quotaKey{uid: 10}, phaseBusy); !placed || !greedy[5].wasEnded() {
			t.Error("one that says nothing keeps its place")
		}
		if slices.ContainsFunc(busiest, (*connection).wasEnded) {
			t.Error("one with a request has lost its place")
		}
	})
}

// A caller that has no more than the newcomer keeps what it has.
func TestEqualsTakeNothingFromEachOther(t *testing.T) {
	t.Parallel()
	cr := crowd{room: room{all: 4, perWhole: 4, share: 4}}
	for uid := range uint32(4) {
		cr.many(1, quotaKey{uid: 1000 + uid}, phaseIdle)
	}
	if _, placed := cr.comes(quotaKey{uid: 7}, phaseBusy); !placed {
		t.Error("who has nothing gets no place of those who have one")
	}
	if _, placed := cr.comes(quotaKey{uid: 7}, phaseBusy); placed {
		t.Error("who has one gets that of another who has one")
	}
}

// Each module has a part of its own; the fewer there are, the larger.
func TestModulesHaveRoomOfTheirOwn(t *testing.T) {
	t.Parallel()
	for modules, want := range map[int]int{1: 128, 4: 128, 8: 64, 64: 8, 256: 2} {
		_, of, _, _ := Limits{}.orDefaults().rooms()
		cr := crowd{room: of}
		cr.modules.Store(int32(modules))
		for i := range modules {
			if got := len(cr.many(200, quotaKey{module: fmt.Sprint("m", i)}, phaseBusy)); got != want {
				t.Fatalf("of %d modules one has %d places, want %d", modules, got, want)
			}
		}
		if len(cr.placed) > 512 {
			t.Errorf("%d modules have %d connections", modules, len(cr.placed))
		}
	}
	_, of, _, _ := Limits{}.orDefaults().rooms()
	cr := crowd{room: of}
	cr.modules.Store(1)
	if got := len(cr.many(200, quotaKey{module: "m", unproved: true}, phaseBusy)); got != 64 {
		t.Errorf("those who cannot be proved have %d places", got)
	}
	if got := len(cr.many(200, quotaKey{module: "m"}, phaseBusy)); got != 64 {
		t.Errorf("the module has %d places beside those who cannot be proved", got)
	}
}

// However many connections others have, the daemon gets to itself, and nobody else does by looking like it; and its own
// connections take nothing from what the others may have.
func TestCrowdLetsTheDaemonIn(t *testing.T) {
	t.Parallel()
	me := agent.Caller{UID: uint32(os.Geteuid()), PID: int32(os.Getpid())}
	sibling, impostor := me, me
	sibling.PID++
	impostor.UID++
	if !isOwn(me) || isOwn(sibling) || isOwn(impostor) {
		t.Error("the daemon does not know itself")
	}
	cr := crowd{room: room{all: 2, perWhole: 2, share: 2}}
	var own []*connection
	for i := range ownPlaces + 1 {
		c := &connection{Conn: new(ending), at: -1, crowd: &cr, key: quotaKey{uid: 7}}
		cr.enter(c, true)
		if i < ownPlaces && !c.isOwn || i == ownPlaces && (c.isOwn || c.at < 0) {
			t.Errorf("connection %d: own %v, place %d", i, c.isOwn, c.at)
		}
		own = append(own, c)
	}
	if got := len(cr.many(2, quotaKey{uid: 8}, phaseBusy)); got != 1 {
		t.Errorf("others get %d places", got)
	}
	cr.forget(own[0])
	c := &connection{Conn: new(ending), at: -1, crowd: &cr}
	if cr.enter(c, true); !c.isOwn {
		t.Error("the daemon is kept out after one of its connections ended")
	}
}

// When all connections are gone nothing of them is left.
func TestCrowdForgets(t *testing.T) {
	t.Parallel()
	cr := crowd{room: tokensRoom(Limits{Connections: 64})}
	var all []*connection
	for uid := range uint32(20) {
		for range 20 {
			c, _ := cr.comes(quotaKey{uid: uid, unit: "a.service"}, phaseIdle)
			all = append(all, c)
		}
	}
	for _, c := range all {
		cr.forget(c)
	}
	if len(cr.placed)+len(cr.line)+len(cr.tallies)+cr.own+cr.root+int(cr.waiting.Load()) != 0 {
		t.Errorf("left over: %+v", cr.tallies)
	}
}

// kept dials and asks, and returns the connection with its answer.
func (d *daemon) kept(socket, text string) (net.Conn, reply) {
	d.t.Helper()
	conn, err := net.Dial("unix", socket)
	if err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(func() { conn.Close() })
	return conn, exchangeOn(d.t, conn, text)
}

// full returns a daemon on whose socket of all local services this process has all of its two places: it has taken those
// that the daemon has for itself before.
func full(t *testing.T, text string, place time.Duration, changed func()) (d *daemon, socket string, held []net.Conn) {
	t.Helper()
	d = newDaemon(t, fetchDay)
	d.Limits.Connections, d.Limits.PerCaller, d.Limits.Place = 32, 2, place
	d.CrowdChanged = changed
	socket = d.tokens("")
	for range ownPlaces {
		d.kept(socket, get(api.PathHealth))
	}
	for range 2 {
		conn, _ := net.Dial("unix", socket)
		t.Cleanup(func() { conn.Close() })
		if _, err := io.WriteString(conn, text); err != nil {
			t.Fatal(err)
		}
		if n, err := conn.Read(make([]byte, 4096)); n == 0 || err != nil {
			t.Fatalf("within the limit: %v", err)
		}
		held = append(held, conn)
	}
	return d, socket, held
}

// rests returns when every connection is idle.
func (d *daemon) rests() {
	cr := d.crowdOf(onToken, "")
	busy := func(c *connection) bool { return c.phase.Load() != phaseIdle }
	for some := true; some; runtime.Gosched() {
		cr.mu.Lock()
		some = slices.ContainsFunc(cr.placed, busy)
		cr.mu.Unlock()
	}
}

// Who has all of its connections busy is told so, in words, and it is known whose fault it was; a module
// has its room all the same.
func TestTooManyConnections(t *testing.T) {
	t.Parallel()
	changed := make(chan struct{}, 1)
	d, socket, held := full(t, get("/v1/watch?resource="+vault), 200*time.Millisecond, func() {
		select {
		case changed <- struct{}{}:
		default:
		}
	})
	got := send(t, socket, get(v1Vault))
	if got.status != 429 || got.header.Get("Retry-After") != "1" || !got.closes || got.problem(t).Code != api.CodeBusy {
		t.Errorf("one too many: %+v", got)
	}
	if got := send(t, d.tokens("vision"), get(v1Vault)); got.status != 200 {
		t.Errorf("on a module's socket: %+v", got)
	}
	<-changed
	me := keyOf(&agent.Caller{UID: uint32(os.Getuid())}, agent.NoID, false).String()
	status := decoded[api.Status](t, send(t, d.admin(), get(api.PathStatus)).body)
	if i := slices.IndexFunc(status.Trouble, func(s string) bool { return strings.Contains(s, "are turned away") }); i < 0 || !strings.Contains(status.Trouble[i], "holds 2") {
		t.Errorf("trouble: %q", status.Trouble)
	}
	tokens := status.Connections[0]
	if tokens.Listener != "token socket" || tokens.Open < 2 || tokens.Limit != 32 || tokens.TurnedAway != 1 || tokens.Holds != 2 || tokens.TurnedAwayOn == nil || !tokens.TurnedAwayOn.Equal(noon) {
		t.Errorf("%+v (this is %s)", tokens, me)
	}
	if n := strings.Count(d.log.String(), "connections are turned away"); n != 1 {
		t.Errorf("the log says it %d times", n)
	}
	for _, conn := range held { // a stream is never idle
		_ = conn.SetReadDeadline(time.Now())
		if _, err := conn.Read(make([]byte, 1)); !os.IsTimeout(err) {
			t.Errorf("a stream was cut: %v", err)
		}
	}
}

// Who waits for a place gets it when a request of its own is done, and its connection is kept no longer.
func TestPlaceIsGivenOn(t *testing.T) {
	t.Parallel()
	_, socket, held := full(t, get("/v1/watch?resource="+vault), time.Hour, nil)
	waits, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer waits.Close()
	if _, err := io.WriteString(waits, get(v1Vault)); err != nil {
		t.Fatal(err)
	}
	held[0].Close()
	if got := exchangeOn(t, waits, ""); got.status != 200 {
		t.Errorf("%+v", got)
	}
}

// An idle connection makes room at once. Its client finds it closed, with nothing lost.
func TestIdleConnectionMakesRoom(t *testing.T) {
	t.Parallel()
	d, socket, held := full(t, get(api.PathHealth), time.Hour, nil)
	d.rests()
	for range 6 {
		if _, got := d.kept(socket, get(v1Vault)); got.status != 200 {
			t.Errorf("%+v", got)
		}
	}
	for _, conn := range held {
		if n, err := conn.Read(make([]byte, 1)); n != 0 || err != io.EOF {
			t.Errorf("%d bytes, %v", n, err)
		}
	}
}

// An idle connection whose client has not read its answer makes no room: the kernel would keep that all the same.
func TestUnreadIdleConnectionMakesNoRoom(t *testing.T) {
	t.Parallel()
	d, socket, held := full(t, get(api.PathHealth), time.Hour, nil)
	if _, err := io.WriteString(held[0], get(v1Vault)); err != nil {
		t.Fatal(err)
	}
	if n, err := held[0].Read(make([]byte, 1)); n != 1 || err != nil { // so that it is answered
		t.Fatal(err)
	}
	d.rests()
	for range 6 {
		if _, got := d.kept(socket, get(v1Vault)); got.status != 200 {
			t.Errorf("%+v", got)
		}
	}
	if n, err := held[1].Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Errorf("who has read all keeps its place: %d bytes, %v", n, err)
	}
	if _, err := held[0].Read(make([]byte, 4096)); err != nil { // the rest of it
		t.Error(err)
	}
	if got := exchangeOn(t, held[0], get(v1Vault)); got.status != 200 {
		t.Errorf("who has not read its answer: %+v", got)
	}
}

// A request that was on its way when its connection was to end is read, and can be answered; a later one is refused before
// anything of it is sent, so that the client may ask again. So it is on TCP, but that the kernel takes what comes later.
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
		conn, err := connections{l, time.Second}.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		c, cr := conn.(*connection), new(crowd)
		c.crowd = cr
		c.counted = cr.countedFor(c.key)
		cr.place(c)
		c.begin()
		if c.leave(time.Now()) {
			t.Errorf("%s: with a request under way it is ended", network)
		}
		c.rest()
		if _, err := io.WriteString(client, "GET "); err != nil {
			t.Fatal(err)
		}
		if c.leave(time.Now()) || c.isIdle(c.phase.Load(), time.Now()) {
			t.Errorf("%s: with a request on its way it gives its place up, or may be asked for it again", network)
		}
		text, err := io.ReadAll(c)
		if string(text) != "GET " || err != nil {
			t.Errorf("%s: %q, %v", network, text, err)
		}
		cr.remove(c) // as if it had been read at the very moment
		if c.begin() {
			t.Errorf("%s: it may bring another request", network)
		}
		if len(cr.placed) != 1 || c.whole().placed != 1 || cr.tallies[c.key] != c.counted[0].tally {
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

// Whoever cannot be proved keeps no connection, not even who may ask why.
func TestUnprovedKeepNoConnection(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	socket := d.tokens("unknown") // which module nobody has configured
	for _, target := range []string{v1Vault, api.PathWhoAmI, "/nowhere"} {
		if got := send(t, socket, get(target)); !got.closes {
			t.Errorf("%s: %+v", target, got)
		}
	}
}

// Who leaves answers unread has no more of them than connections, whoever ends those, and be it net/http that answers
// what is not a request; who reads has its place back.
func TestUnreadAnswersKeepTheirPlace(t *testing.T) {
	t.Parallel()
	for name, row := range map[string]struct {
		text   string
		status int
	}{
		"a token":            {get(v1Vault, "Connection: close"), 200},
		"no host":            {"GET /v1/token HTTP/1.1\r\n\r\n", 400},
		"an unknown coding":  {get(v1Vault, "Transfer-Encoding: x"), 501},
		"an unknown version": {"GET /v1/token HTTP/9.9\r\nHost: localhost\r\n\r\n", 505},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			testUnread(t, row.text, row.status)
		})
	}
}

func testUnread(t *testing.T, text string, status int) {
	d := newDaemon(t, fetchDay)
	d.Limits.Connections, d.Limits.PerCaller, d.Limits.Place = 32, 2, time.Hour
	socket := d.tokens("")
	for range ownPlaces {
		d.kept(socket, get(api.PathHealth))
	}
	cr := d.crowdOf(onToken, "")
	lingering := func() int {
		cr.mu.Lock()
		defer cr.mu.Unlock()
		return len(cr.lingering)
	}
	dial := func() net.Conn {
		conn, err := net.Dial("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return conn
	}
	ask := func(text string) net.Conn {
		conn := dial()
		if _, err := io.WriteString(conn, text); err != nil {
			t.Fatal(err)
		}
		return conn
	}
	first, second := ask(text), ask(text)
	for lingering() < 2 {
		time.Sleep(time.Millisecond)
	}
	if got := refusedAtLast(t, dial(), get(v1Vault, "Connection: close")); got.status != 429 {
		t.Errorf("a third: %+v", got)
	}
	if got := exchangeOn(t, first, ""); got.status != status || !got.closes {
		t.Errorf("the first: %+v", got)
	}
	for lingering() > 1 {
		time.Sleep(time.Millisecond)
	}
	if got := exchangeOn(t, ask(get(v1Vault, "Connection: close")), ""); got.status != 200 {
		t.Errorf("a fourth: %+v", got)
	}
	second.Close()
	for lingering() > 0 {
		time.Sleep(time.Millisecond)
	}
}
