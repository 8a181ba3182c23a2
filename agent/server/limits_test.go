package server

import (
	"context"
	"io"
	"net"
	"net/http/httptest"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"perceptd/agent/api"
	"perceptd/agent/grants"
	"perceptd/agent/server/limit"
	"perceptd/tokencache"
)

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

// The daemon knows itself, and nobody else by looking like it.
func TestDaemonKnowsItself(t *testing.T) {
	t.Parallel()
	me := grants.Caller{UID: uint32(os.Geteuid()), PID: int32(os.Getpid())}
	sibling, impostor := me, me
	sibling.PID++
	impostor.UID++
	if !isOwnProcess(me) || isOwnProcess(sibling) || isOwnProcess(impostor) {
		t.Error("the daemon does not know itself")
	}
}

// full returns a daemon on whose socket of all local services this process has all of its two places: it has taken
// those that the daemon has for itself before.
func full(t *testing.T, text string, place time.Duration, changed func()) (d *daemon, socket string, held []net.Conn) {
	t.Helper()
	d = newDaemon(t, fetchDay)
	d.Limits.Connections, d.Limits.PerCaller, d.Limits.Place = 32, 2, place
	d.ConnectionsChanged = changed
	socket = d.tokens("")
	for range limit.OwnPlaces {
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
	for {
		if u := d.quotas().tokens.Usage(); u.Idle == u.Open {
			return
		}
		runtime.Gosched()
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
	me := keyOf(&grants.Caller{UID: uint32(os.Getuid())}, grants.NoID, false).String()
	status := decoded[api.Status](t, send(t, d.admin(), get(api.PathStatus)).body)
	if i := slices.IndexFunc(status.Trouble,
		func(s string) bool {
			return strings.Contains(s,
				"are turned away")
		}); i < 0 || !strings.Contains(status.Trouble[i], "holds 2") {
		t.Errorf("trouble: %q", status.Trouble)
	}
	tokens := status.Connections[0]
	if tokens.Listener != "token socket" || tokens.Open < 2 || tokens.Limit != 32 || tokens.TurnedAway != 1 ||
		tokens.Holds != 2 || !tokens.TurnedAwayOn.Equal(noon) {
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
	for range limit.OwnPlaces {
		d.kept(socket, get(api.PathHealth))
	}
	lingering := func() int { return d.quotas().tokens.Usage().Lingering }
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

// openConns dials that many connections, sends text on each, and returns when each has a place or one in the line.
func (d *daemon) openConns(t *testing.T, network, address, text string, conns *limit.Conns, n int) (all []net.Conn) {
	t.Helper()
	for range n {
		conn, err := net.Dial(network, address)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		if _, err := io.WriteString(conn, text); err != nil {
			t.Fatal(err)
		}
		all = append(all, conn)
	}
	for there := 0; there < n; {
		there = conns.Usage().Open
		time.Sleep(time.Millisecond) // and not at full speed, on the same processor
	}
	return all
}

// A user may have 64 connections on the loopback listener. A hundred calls at once, as of an SDK without a pool, are
// all answered: those that find no place wait for one.
func TestLoopbackHundredAtOnce(t *testing.T) {
	t.Parallel()
	let := make(chan struct{})
	d := newDaemon(t, func(ctx context.Context, k tokencache.Key) (tokencache.Fetched, error) {
		select {
		case <-let:
		case <-ctx.Done():
		}
		return fetchDay(ctx, k)
	})
	d.Limits = Limits{Place: time.Hour, Answer: time.Hour}
	at, secrets := d.loopbackListener()
	conns := d.quotas().loopback
	text := asks(appVault, at, "Connection: close", secretLine(secrets.Header(grants.Match{Module: "vision"})))
	all := d.openConns(t, "tcp", at, text, conns, 100)
	if waits := conns.Usage().Waiting; waits != 36 {
		t.Errorf("%d wait", waits)
	}
	close(let)
	var asking sync.WaitGroup
	for _, conn := range all {
		asking.Go(func() {
			if got := exchangeOn(t, conn, ""); got.status != 200 {
				t.Errorf("%+v", got)
			}
		})
	}
	asking.Wait()
}

// refusedAtLast asks on a connection for which there is no place, and says no more, which ends its wait as its time
// does: so the wait may be long, and no busy machine makes it end before the request has come, or before another's
// place is free.
func refusedAtLast(t testing.TB, conn net.Conn, text string) reply {
	t.Helper()
	if _, err := io.WriteString(conn, text); err != nil {
		t.Fatal(err)
	}
	if err := conn.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	return exchangeOn(t, conn, "")
}

// Who finds no place there is told so; a kept connection that is idle makes room.
func TestLoopbackCrowd(t *testing.T) {
	t.Parallel()
	let := make(chan struct{})
	d := newDaemon(t, func(ctx context.Context, k tokencache.Key) (tokencache.Fetched, error) {
		select {
		case <-let:
		case <-ctx.Done():
		}
		return fetchDay(ctx, k)
	})
	d.Limits = Limits{LoopbackPerUser: 2, Place: time.Hour, Answer: time.Hour}
	at, secrets := d.loopbackListener()
	text := asks(appVault, at, secretLine(secrets.Header(grants.Match{Module: "vision"})))
	held := d.openConns(t, "tcp", at, text, d.quotas().loopback, 2)
	conn, err := net.Dial("tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	got := refusedAtLast(t, conn, text)
	if got.status != 429 || got.header.Get("Retry-After") != "1" || !got.closes ||
		!strings.Contains(got.body, "all 2 connections") {
		t.Errorf("one too many: %+v", got)
	}
	close(let)
	for _, conn := range held {
		if got := exchangeOn(t, conn, ""); got.status != 200 {
			t.Errorf("%+v", got)
		}
	}
	for range 3 { // the two are kept, and idle
		if got := sendTCP(t, at, text); got.status != 200 {
			t.Errorf("beside idle ones: %+v", got)
		}
	}
}

// Who finds no place, and none in the line, is answered on every listener: at once, whatever it has sent.
func TestNoPlaceIsAnswered(t *testing.T) {
	t.Parallel()
	d, socket, _ := full(t, get("/v1/watch?resource="+vault), 1<<40, nil)
	waits, err := net.Dial("unix", socket) // the line has a place for one
	if err != nil {
		t.Fatal(err)
	}
	defer waits.Close()
	for d.quotas().tokens.Usage().Waiting == 0 {
		time.Sleep(time.Millisecond)
	}
	for _, text := range []string{get(v1Vault), get(imdsVault, metadata), get(appVault, appHeader), "GET /half"} {
		got := send(t, socket, text)
		if got.status != 429 || got.header.Get("Retry-After") != "1" || !got.closes ||
			got.field(t, "statusCode") != 429.0 || got.field(t, "code") != string(api.CodeBusy) {
			t.Errorf("%.20q: %+v", text, got)
		}
	}
	if away := d.quotas().tokens.Usage().TurnedAway; away != 4 {
		t.Errorf("%d were turned away", away)
	}
}

// Who waits in line for its time and has not asked is told so as well.
func TestSilentOneInLineIsAnswered(t *testing.T) {
	t.Parallel()
	_, socket, _ := full(t, get("/v1/watch?resource="+vault), 1, nil)
	if got := send(t, socket, "GET /half"); got.status != 429 || !got.closes {
		t.Errorf("%+v", got)
	}
}

// A user that asks 300 times at once on the loopback listener, where it has 64 places and 64 in the line, has 300
// answers.
func TestLoopbackCallsAtOnce(t *testing.T) {
	t.Parallel()
	const calls = 300
	let := make(chan struct{})
	d := newDaemon(t, func(ctx context.Context, k tokencache.Key) (tokencache.Fetched, error) {
		select {
		case <-let:
		case <-ctx.Done():
		}
		return fetchDay(ctx, k)
	})
	d.Limits = Limits{Place: 1 << 40, Answer: 1 << 40}
	at, secrets := d.loopbackListener()
	text := asks(appVault, at, "Connection: close", secretLine(secrets.Header(grants.Match{Module: "vision"})))
	var all []net.Conn
	for range calls {
		conn, err := net.Dial("tcp", at)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		all = append(all, conn)
	}
	for d.quotas().loopback.Usage().TurnedAway < calls-128 {
		time.Sleep(time.Millisecond)
	}
	var asking sync.WaitGroup
	status := make([]int, calls)
	for i, conn := range all { // they ask only now: what was refused before can still send
		if _, err := io.WriteString(conn, text); err != nil {
			t.Error(err)
		}
		asking.Go(func() { status[i] = exchangeOn(t, conn, "").status })
	}
	close(let)
	asking.Wait()
	slices.Sort(status)
	if status[0] != 200 || status[127] != 200 || status[128] != 429 || status[calls-1] != 429 {
		t.Errorf("%v", status)
	}
}

// What comes beyond the budget of new connections is answered, up to a number for each user; and then closed.
func TestBeyondTheBudgetIsAnswered(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	d.Limits = Limits{PerSecond: 1, Burst: 3}
	l := d.Callers.Listen(d.listen("s"))
	defer l.Close()
	defer d.quotas().tokens.Close()
	refuse := d.refuseEarly(d.quotas().tokens, d.newKeyOf())
	for i := range 5 {
		client, err := net.Dial("unix", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		conn, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		refuse(conn)
		text, err := io.ReadAll(client)
		if isAnswered := strings.HasPrefix(string(text), "HTTP/1.1 429 "); isAnswered != (i < 3) || err != nil {
			t.Errorf("%d: %q %v", i, text, err)
		}
	}
}

// connOf returns a connection of a user's that has a place, or waits for one.
func connOf(conns *limit.Conns, uid uint32) *limit.Conn {
	c := limit.NewConn(new(net.UnixConn), time.Second)
	conns.Acquire(c, limit.Key{UID: uid}, false)
	return c
}

// The admin socket has so many connections, of which one user has a part. Those of the token sockets are counted apart.
func TestAdminConnections(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	d.Limits = Limits{AdminConnections: 8, AdminPerUser: 2, Place: time.Hour}
	admin, open := d.admin(), d.tokens("")
	for range 20 { // all of them idle
		if _, got := d.kept(admin, get(api.PathStatus)); got.status != 200 {
			t.Fatalf("%+v", got)
		}
	}
	if u := d.quotas().admin.Usage(); u.Open+u.Own > 2+limit.OwnPlaces {
		t.Errorf("%d connections are held", u.Open+u.Own)
	}
	if got := send(t, open, get(v1Vault)); got.status != 200 {
		t.Errorf("on the token socket: %+v", got)
	}
}

// So many requests are under way on the admin socket at once, half of them of one user; root is heard beside all
// others, and the daemon's look at its health is never held up.
func TestAdminRequestsAtOnce(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	d.Limits = Limits{AdminRequests: 8}
	of := func(uid uint32) *request { return &request{conn: connOf(d.quotas().admin, uid)} }
	for i, row := range []struct {
		uid, times uint32
		want       int
	}{{1000, 9, 4}, {1001, 9, 2}, {1002, 9, 0}, {0, 9, 2}} {
		got := 0
		for range row.times {
			if e := d.administer(of(row.uid)); e == nil {
				got++
			} else if e.status != 429 || e.retryAfter != time.Second {
				t.Errorf("%+v", e)
			}
		}
		if got != row.want {
			t.Errorf("row %d: %d of user %d, want %d", i, got, row.uid, row.want)
		}
	}
	admin := d.admin()
	if got := send(t, admin, get(api.PathStatus)); got.status != 429 {
		t.Errorf("one more: %+v", got)
	}
	if got := send(t, admin, get(api.PathHealth)); got.status != 200 {
		t.Errorf("health: %+v", got)
	}
}

// overdraw leaves k's budget of requests as after a quarter of an hour of asking. Nothing may be served yet.
func (d *daemon) overdraw(k limit.Key) {
	r := &d.quotas().requests
	r.PerSecond, r.Burst, r.MaxWait = 1, 1, time.Hour
	for range 1000 {
		r.Reserve(k, time.Now())
	}
	r.MaxWait = rateTimeout
}

// spend makes a budget of so many requests a second of which k has used up what may come at once. Nothing may be served
// yet.
func (d *daemon) spend(k limit.Key, perSecond int) {
	q := d.quotas()
	q.requests = limit.Rate{PerSecond: perSecond, Burst: 1, MaxWait: rateTimeout}
	q.requests.Reserve(k, time.Now())
}

// A caller that asks too often waits for its turn, is then told so, on every path; others, and the daemon's
// look at itself, are not kept waiting.
func TestFloodIsHeldBack(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	d.Limits.PerSecond, d.Limits.Burst = 1, 1
	d.overdraw(limit.Key{UID: uint32(os.Getuid())})
	socket, module := d.tokens(""), d.tokens("vision")
	var all sync.WaitGroup
	for _, text := range []string{get(imdsVault, metadata), get(v1Vault), get("/nowhere"), get(api.PathWhoAmI)} {
		all.Go(func() {
			got := send(t, socket, text)
			if got.status != 429 || got.header.Get("Retry-After") == "" ||
				got.field(t, "code") != string(api.CodeBusy) {
				t.Errorf("%.30q: %+v", text, got)
			}
		})
	}
	if got := send(t, module, get(v1Vault)); got.status != 200 {
		t.Errorf("another caller: %+v", got)
	}
	if got := send(t, socket, get(api.PathHealth)); got.status != 200 {
		t.Errorf("the daemon itself: %+v", got)
	}
	if got := send(t, d.admin(), get(api.PathStatus)); got.status != 200 {
		t.Errorf("an administrator: %+v", got)
	}
	all.Wait()
	d = newDaemon(t, fetchDay)
	d.spend(limit.Key{UID: uint32(os.Getuid())}, 10)
	if got := send(t, d.tokens(""), get(v1Vault)); got.status != 200 {
		t.Errorf("who waited for its turn: %+v", got)
	}
}

// Nobody waits for a turn while the daemon goes down, or after the caller has gone.
func TestWaitingForATurnEnds(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	down := make(chan struct{})
	close(down)
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	d.overdraw(limit.Key{})
	req := &request{conn: new(limit.Conn), stopping: down, http: httptest.NewRequest("GET", "/", nil)}
	if e := d.awaitTurn(req); e == nil || e.status != 429 {
		t.Errorf("going down: %+v", e)
	}
	d.spend(limit.Key{}, 2)
	if e := d.awaitTurn(req); e != nil {
		t.Errorf("going down, with a turn to come: %+v", e)
	}
	d.overdraw(limit.Key{})
	req = &request{conn: new(limit.Conn), http: httptest.NewRequest("GET", "/", nil).WithContext(gone)}
	if e := d.awaitTurn(req); e == nil || e.status != 429 {
		t.Errorf("gone: %+v", e)
	}
}
