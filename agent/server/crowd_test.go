package server

import (
	"io"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/server/limit"
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
	me := agent.Caller{UID: uint32(os.Geteuid()), PID: int32(os.Getpid())}
	sibling, impostor := me, me
	sibling.PID++
	impostor.UID++
	if !isOwn(me) || isOwn(sibling) || isOwn(impostor) {
		t.Error("the daemon does not know itself")
	}
}

// full returns a daemon on whose socket of all local services this process has all of its two places: it has taken those
// that the daemon has for itself before.
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
