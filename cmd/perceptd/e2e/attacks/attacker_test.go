//go:build attacks

package attacks

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"perceptd/agent/client"
)

// ordersVariable makes the test binary an attacker, or an honest client, instead: it holds its orders.
const ordersVariable = "PERCEPTD_TEST_ORDERS"

func init() {
	if text := os.Getenv(ordersVariable); text != "" {
		os.Exit(obey(text))
	}
}

// orders are what a process under another user is to do.
type orders struct {
	Kind    string // a key of lives
	Network string // "unix" or "tcp"
	Address string
	Request string // a whole request, for the lives that send one; of slow bodies the path
	Width   int    // how many do it at once
}

// tally is what came of it.
type tally struct {
	Connected  int64         // connections made
	Unanswered int64         // of these, those that were closed with a whole request sent and nothing read
	Answers    map[int]int64 // by status
	NoRetry    int64         // answers with 429 and no Retry-After
	Failed     int64         // honest requests that were not answered with 200
	Fault      string        // the first of them
}

// attacker is a process that attacks, or asks honestly.
type attacker struct {
	orders
	stop    context.Context
	dialing chan struct{} // so that few threads wait in the kernel
	begun   sync.WaitGroup

	mu    sync.Mutex // protects what follows
	tally tally
}

// life is what one connection of an attacker does, until it is closed or the attack ends. It calls settled when the
// daemon has to bear it.
type life struct {
	live  func(a *attacker, conn net.Conn, settled func())
	pause time.Duration // before the next connection in its place
}

var lives = map[string]life{
	"idle":       {(*attacker).sayNothing, 2 * time.Second},
	"many lines": {(*attacker).sendManyLines, time.Second},
	"slow head":  {(*attacker).sendHeadSlowly, time.Second},
	"slow body":  {(*attacker).sendBodySlowly, time.Second},
	"ask":        {(*attacker).askOnce, time.Second},
	"unread":     {(*attacker).askAndReadNothing, time.Second},
	"pipeline":   {(*attacker).askManyAtOnce, 100 * time.Millisecond},
	"reconnect":  {(*attacker).askOnce, 0},
	"come, go":   {(*attacker).leaveAtOnce, 0},
	"honest":     {}, // see askHonestly
}

// obey is the whole life of such a process: it waits for the word, says when all have begun, and what came of it when
// its input ends.
func obey(text string) int {
	a := &attacker{dialing: make(chan struct{}, 16), tally: tally{Answers: make(map[int]int64)}}
	if err := json.Unmarshal([]byte(text), &a.orders); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	in := bufio.NewReader(os.Stdin)
	if _, err := in.ReadString('\n'); err != nil {
		return 1
	}
	var end context.CancelFunc
	a.stop, end = context.WithCancel(context.Background())
	if a.Kind == "honest" {
		go a.askHonestly()
	} else {
		for range a.Width {
			a.begun.Add(1)
			go a.live(lives[a.Kind], sync.OnceFunc(a.begun.Done))
		}
		go func() { a.begun.Wait(); fmt.Println("begun") }()
	}
	_, _ = io.Copy(io.Discard, in)
	end()
	a.mu.Lock()
	defer a.mu.Unlock()
	told, err := json.Marshal(a.tally)
	if err != nil {
		return 1
	}
	fmt.Printf("told %s\n", told)
	return 0
}

func (a *attacker) note(f func(*tally)) {
	a.mu.Lock()
	defer a.mu.Unlock()
	f(&a.tally)
}

// live has one connection after the other live that life.
func (a *attacker) live(of life, settled func()) {
	for a.stop.Err() == nil {
		conn := a.connect()
		if conn == nil {
			settled() // as much as it ever will
			return
		}
		of.live(a, conn, settled)
		_ = conn.Close()
		settled()
		select {
		case <-time.After(of.pause):
		case <-a.stop.Done():
		}
	}
}

// connect waits in the kernel where the queue is full; nil: the attack is over, or nobody listens.
func (a *attacker) connect() net.Conn {
	a.dialing <- struct{}{}
	defer func() { <-a.dialing }()
	conn, err := a.dial()
	if err != nil {
		return nil
	}
	a.note(func(t *tally) { t.Connected++ })
	return conn
}

func (a *attacker) dial() (net.Conn, error) {
	if a.Network == "unix" {
		return client.Dial(a.stop, a.Address)
	}
	return new(net.Dialer).DialContext(a.stop, a.Network, a.Address)
}

// send reports false when the connection is closed, or takes no more within ten seconds.
func send(conn net.Conn, text string) bool {
	_ = conn.SetWriteDeadline(time.Now().Add(10 * time.Second))
	_, err := io.WriteString(conn, text)
	return err == nil
}

// hear counts the answers on conn until it is closed. asked says that a whole request was sent on it.
func (a *attacker) hear(conn net.Conn, asked bool) {
	in := bufio.NewReaderSize(conn, 512)
	for heard := false; ; heard = true {
		answer, err := http.ReadResponse(in, nil)
		if err != nil {
			if asked && !heard && a.stop.Err() == nil {
				a.note(func(t *tally) { t.Unanswered++ })
			}
			return
		}
		a.note(func(t *tally) {
			t.Answers[answer.StatusCode]++
			if answer.StatusCode == http.StatusTooManyRequests && answer.Header.Get("Retry-After") == "" {
				t.NoRetry++
			}
		})
		if _, err := io.Copy(io.Discard, answer.Body); err != nil {
			return
		}
	}
}

// sayNothing holds a connection for as long as it may.
func (a *attacker) sayNothing(conn net.Conn, settled func()) {
	settled()
	_, _ = conn.Read(make([]byte, 1))
}

// manyLines is a head of 3,716 lines of which each is a header of its own, without the line that ends it.
var manyLines = sync.OnceValue(func() string {
	const letters = "abcdefghijklmnopqrstuvwxyz0123456789!#$%&'*+-.^_`|~" // no two are one in another case
	var head strings.Builder
	head.WriteString("GET /v1/token HTTP/1.1\r\n")
	for i := range 3716 {
		if i >= len(letters)*len(letters) {
			head.WriteByte('x')
		}
		head.Write([]byte{letters[i/len(letters)%len(letters)], letters[i%len(letters)], ':', '\n'})
	}
	return head.String()
})

func (a *attacker) sendManyLines(conn net.Conn, settled func()) {
	if !send(conn, manyLines()) {
		return
	}
	closed := make(chan struct{})
	go func() { defer close(closed); a.hear(conn, false) }()
	for isUnread(conn) {
		select {
		case <-time.After(10 * time.Millisecond):
		case <-closed:
			return
		case <-a.stop.Done():
			return
		}
	}
	settled()
	<-closed
}

// isUnread reports whether the other end of a Unix socket has not read all that was sent.
func isUnread(conn net.Conn) bool {
	raw, err := conn.(syscall.Conn).SyscallConn()
	if err != nil {
		return false
	}
	left := 0
	return raw.Control(func(fd uintptr) { left, _ = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) }) == nil && left > 0
}

// slowly sends a byte ten times a second, for as long as it may.
func (a *attacker) slowly(conn net.Conn, text string) {
	go a.hear(conn, false)
	for i := range len(text) {
		select {
		case <-time.After(100 * time.Millisecond):
		case <-a.stop.Done():
			return
		}
		if !send(conn, text[i:i+1]) {
			return
		}
	}
}

func (a *attacker) sendHeadSlowly(conn net.Conn, settled func()) {
	if send(conn, "GET / HTTP/1.1\r\n") {
		settled()
		a.slowly(conn, "Host: localhost\r\nX-Slow: "+strings.Repeat("x", 1000))
	}
}

func (a *attacker) sendBodySlowly(conn net.Conn, settled func()) {
	if send(conn, "POST "+cmp.Or(a.Request,
		"/v1/rejected")+" HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "+
		"2000\r\n\r\n{") {
		settled()
		a.slowly(conn, strings.Repeat(" ", 1999))
	}
}

// askOnce sends the request and hears what comes, be it a stream.
func (a *attacker) askOnce(conn net.Conn, settled func()) {
	if send(conn, a.Request) {
		settled()
		a.hear(conn, true)
	}
}

// askAndReadNothing asks for as long as anything is taken from it, and takes nothing.
func (a *attacker) askAndReadNothing(conn net.Conn, settled func()) {
	settled()
	for a.stop.Err() == nil && send(conn, a.Request) {
	}
}

func (a *attacker) askManyAtOnce(conn net.Conn, settled func()) {
	if send(conn, strings.Repeat(a.Request, 50)) {
		settled()
		_ = conn.SetReadDeadline(time.Now().Add(10 * time.Second))
		a.hear(conn, true)
	}
}

func (a *attacker) leaveAtOnce(_ net.Conn, settled func()) { settled() }

// honestTimeout is what every client is promised: an answer within 10 seconds; and a busy machine's share.
const honestTimeout = 30 * time.Second

// askHonestly asks on a new connection and on one that it keeps, in turn, and says after each two how many were
// answered.
func (a *attacker) askHonestly() {
	var kept net.Conn
	var in *bufio.Reader
	for answered := new(atomic.Int64); a.stop.Err() == nil; time.Sleep(5 * time.Millisecond) {
		conn, err := a.dial()
		if err == nil {
			err = askFor200(conn, bufio.NewReader(conn), a.Request)
			conn.Close()
		}
		a.count(answered, "a new connection", err)
		if kept == nil {
			if kept, err = a.dial(); err != nil {
				kept = nil
				a.count(answered, "a connection to keep", err)
				continue
			}
			in = bufio.NewReader(kept)
		}
		err = askFor200(kept, in, a.Request)
		a.count(answered, "a kept connection", err)
		if err != nil {
			kept.Close()
			kept = nil
		}
		fmt.Println("answered", answered.Load())
	}
}

func (a *attacker) count(answered *atomic.Int64, how string, err error) {
	answered.Add(1)
	if err == nil || a.stop.Err() != nil {
		return
	}
	a.note(func(t *tally) {
		if t.Failed++; t.Fault == "" {
			t.Fault = fmt.Sprintf("request %d, on %s: %v", answered.Load(), how, err)
		}
	})
	time.Sleep(20 * time.Millisecond)
}

func askFor200(conn net.Conn, in *bufio.Reader, request string) error {
	_ = conn.SetDeadline(time.Now().Add(honestTimeout))
	if _, err := io.WriteString(conn, request); err != nil {
		return err
	}
	answer, err := http.ReadResponse(in, nil)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	if err == nil && answer.StatusCode != http.StatusOK {
		err = fmt.Errorf("status %d: %.200s", answer.StatusCode, body)
	}
	return err
}
