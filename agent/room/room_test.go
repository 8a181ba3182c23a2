package room

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"testing"
	"time"

	"go.uber.org/goleak"

	"perceptd/agent/tcppeer"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// Whose connection leaves when there is one too many.
func TestLeaving(t *testing.T) {
	t.Parallel()
	at := func(seconds int) time.Time { return time.Unix(int64(seconds), 0) }
	for name, row := range map[string]struct {
		clients []client
		leaves  int // -1: nobody
	}{
		"nobody who has just connected": {[]client{{uid: 1, idleSince: at(9)},
			{uid: 1, known: true, idleSince: at(9)}}, -1},
		"a stranger who has":           {[]client{{uid: 1, idleSince: at(1)}, {uid: 2, idleSince: at(9)}}, 1},
		"who does not ask":             {[]client{{uid: 1, idleSince: at(9)}, {uid: 1, idleSince: at(8)}}, 1},
		"a known one who does not ask": {[]client{{uid: 1, known: true, idleSince: at(8)}}, 0},
		"no known one before all are heard": {[]client{{uid: 1, known: true, asked: true, idleSince: at(1)},
			{uid: 1, idleSince: at(9)}}, -1},
		"a stranger before one who may be": {[]client{{uid: 1, idleSince: at(1)}, {uid: 1, idleSince: at(1)},
			{uid: 2, idleSince: at(3)}}, 2},
		"nobody": {nil, -1},
		"who is a stranger": {[]client{{uid: 1, known: true, idleSince: at(1)},
			{uid: 2, asking: true, asked: true, idleSince: at(9)}, {uid: 1, known: true, idleSince: at(2)}}, 1},
		"the user with the most": {[]client{{uid: 1, idleSince: at(1)}, {uid: 2, idleSince: at(8)},
			{uid: 2, idleSince: at(9)}}, 1},
		"of whom strangers count": {[]client{{uid: 1, idleSince: at(3)},
			{uid: 1, known: true, idleSince: at(1)}, {uid: 1, known: true, idleSince: at(1)}, {uid: 2,
				idleSince: at(2)}}, 3},
		"the longest without a request": {[]client{{uid: 1, idleSince: at(3)}, {uid: 1, idleSince: at(2)},
			{uid: 1, idleSince: at(4)}}, 1},
		"users who are not known": {[]client{{uid: 1, idleSince: at(1)},
			{uid: tcppeer.NoUser, idleSince: at(3)}, {uid: tcppeer.NoUser, idleSince: at(4)}}, 1},
		"where all are known": {[]client{{uid: 1, known: true, idleSince: at(1)},
			{uid: 2, known: true, idleSince: at(5)}, {uid: 2, known: true, idleSince: at(4)}}, 2},
		"nobody who is being answered": {[]client{{uid: 1, known: true, asking: true, idleSince: at(1)},
			{uid: 1, known: true, idleSince: at(5)}}, 1},
		"nobody where all are": {[]client{{uid: 1, known: true, asking: true, idleSince: at(1)}}, -1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			clients, conns := make(map[net.Conn]*client), make([]net.Conn, len(row.clients))
			for i := range row.clients {
				conns[i] = new(net.TCPConn)
				row.clients[i].lookedUp = true
				clients[conns[i]] = &row.clients[i]
			}
			var want net.Conn
			if row.leaves >= 0 {
				want = conns[row.leaves]
			}
			if got, _ := chooseEvicted(clients, map[uint32]bool{1: true}, at(9)); got != want {
				t.Errorf("%+v leaves", clients[got])
			}
		})
	}
}

// serving serves a room for so many until the test ends. Requests for /known are a known one's, and wait for proceed.
func serving(t *testing.T, most int, isKnown func(uint32) bool) (r *Room, entered, proceed chan bool) {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r, entered, proceed = New(l, most, isKnown), make(chan bool), make(chan bool)
	server := &http.Server{ReadHeaderTimeout: time.Minute,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
			isKnown := q.URL.Path == "/known"
			r.Asks(q.Context(), isKnown)
			if isKnown {
				entered <- true
				<-proceed
			}
			uid, err := r.User(q)
			fmt.Fprintf(w, "%d %v", uid, err)
		})}
	ended := make(chan error, 1)
	go func() { ended <- r.Serve(server) }()
	t.Cleanup(func() { _ = server.Close(); <-ended })
	return r, entered, proceed
}

// ask sends a request and returns its answer's body; what is empty is no answer.
func ask(conn net.Conn, path string) string {
	_, _ = io.WriteString(conn, "GET "+path+" HTTP/1.1\r\nHost: x\r\n\r\n")
	answer, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return ""
	}
	body, _ := io.ReadAll(answer.Body)
	return string(body)
}

// idle waits until the room has noted that the answer on conn has left, which the one at its other end may have before
// that.
func idle(r *Room, conn net.Conn) {
	r.mu.Lock()
	defer r.mu.Unlock()
	isAnswered := func() bool {
		for there, c := range r.clients {
			if there.RemoteAddr().String() == conn.LocalAddr().String() {
				return c.asked && !c.asking
			}
		}
		return true // it has left
	}
	for !isAnswered() {
		r.changed.Wait()
	}
}

func dial(t *testing.T, r *Room) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp4", r.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// Who comes gets in, whoever is there: strangers leave, then known ones between two requests. Where all are being
// answered, the next one waits.
func TestRoom(t *testing.T) {
	t.Parallel()
	r, entered, proceed := serving(t, 2, nil)
	me := fmt.Sprintf("%d <nil>", os.Getuid())
	first, second := dial(t, r), dial(t, r)
	if got := ask(first, "/"); got != me {
		t.Errorf("the first: %q", got)
	}
	idle(r, first) // so that it is idle for longer than the second
	if got := ask(second, "/"); got != me {
		t.Errorf("the second: %q", got)
	}
	third := dial(t, r)
	if got := ask(third, "/"); got != me {
		t.Errorf("the third: %q", got)
	}
	if n, err := first.Read(make([]byte, 1)); n != 0 || err == nil {
		t.Error("the first is still there")
	}
	answers := make(chan string)
	for _, conn := range []net.Conn{second, third} {
		go func() { answers <- ask(conn, "/known") }()
		<-entered
	}
	fourth := dial(t, r)
	go func() { answers <- ask(fourth, "/") }()
	proceed <- true // one of the two is between requests from then on, and leaves
	for range 2 {
		if got := <-answers; got != me {
			t.Errorf("%q", got)
		}
	}
	proceed <- true
	if got := <-answers; got != me {
		t.Errorf("%q", got)
	}
}

// A known one's connection stays while strangers come and go, and all of a known user's are.
func TestKnownOnes(t *testing.T) {
	t.Parallel()
	r, entered, proceed := serving(t, 2, nil)
	known := dial(t, r)
	answer := make(chan string)
	go func() { answer <- ask(known, "/known") }()
	<-entered
	proceed <- true
	<-answer
	for range 5 {
		if ask(dial(t, r), "/") == "" {
			t.Fatal("a stranger gets no answer")
		}
	}
	if ask(known, "/") == "" {
		t.Error("the known one has left")
	}
	r, _, _ = serving(t, 2, func(uid uint32) bool { return int(uid) == os.Getuid() })
	for range 3 {
		if ask(dial(t, r), "/") == "" {
			t.Fatal("a known one gets no answer")
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	n := 0
	for _, c := range r.clients {
		if c.known {
			n++
		}
	}
	if n != 1 { // the last was not looked at
		t.Errorf("%d are known", n)
	}
}

// calls opens that many connections at once, asks on each for what is a known one's, and returns where their answers
// come in.
func calls(t *testing.T, r *Room, n int) <-chan *http.Response {
	t.Helper()
	answers := make(chan *http.Response, n)
	for range n {
		conn := dial(t, r)
		go func() {
			_, _ = io.WriteString(conn, "GET /known HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
			answer, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				t.Error(err)
			}
			answers <- answer
		}()
	}
	return answers
}

// A user that asks more at once than there is room for drives out none of its own: the rest wait, and get in as others
// leave.
func TestCallsAtOnceWait(t *testing.T) {
	t.Parallel()
	r, entered, proceed := serving(t, 4, nil)
	r.timeout = time.Hour
	answers := calls(t, r, 16)
	for range 4 {
		<-entered
	}
	for i := range 16 {
		proceed <- true
		if answer := <-answers; answer == nil || answer.StatusCode != 200 {
			t.Errorf("%d: %v", i, answer)
		}
		if i < 12 {
			<-entered
		}
	}
}

// When nobody leaves they are told so.
func TestCallsAtOnceAreRefused(t *testing.T) {
	t.Parallel()
	r, entered, proceed := serving(t, 4, nil)
	r.timeout = time.Millisecond
	first := calls(t, r, 4)
	for range 4 {
		<-entered
	}
	rest := calls(t, r, 8) // as many as may be on their way out
	for range 8 {
		answer := <-rest
		if answer == nil || answer.StatusCode != 429 || answer.Header.Get("Retry-After") != "1" || !answer.Close {
			t.Errorf("%v", answer)
		}
	}
	for range 4 {
		proceed <- true
		if answer := <-first; answer == nil || answer.StatusCode != 200 {
			t.Errorf("%v", answer)
		}
	}
}

// A room that is closed lets nobody wait.
func TestClosedRoom(t *testing.T) {
	t.Parallel()
	r, entered, proceed := serving(t, 1, nil)
	conn := dial(t, r)
	answer := make(chan string)
	go func() { answer <- ask(conn, "/known") }()
	<-entered
	waits := dial(t, r)
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	if n, err := waits.Read(make([]byte, 1)); n != 0 || err == nil {
		t.Error("one is let in")
	}
	proceed <- true
	if got := <-answer; got == "" {
		t.Error("no answer to who was there")
	}
}
