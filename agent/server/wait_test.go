package server

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/attest"
	"perceptd/agent/server/limit"
	"perceptd/tokencache"
)

// recorder is the writer of an answer that is looked at while it is written, without a socket.
type recorder struct {
	mu     sync.Mutex // protects what follows
	header http.Header
	status int
	text   bytes.Buffer
	cuts   []time.Time // write deadlines that were set
	reads  []time.Time // read deadlines that were set
	takes  int         // writes that are taken; negative: all

	stuck chan struct{} // gives leave for one write; nil: none is needed
}

func newRecorder() *recorder { return &recorder{header: make(http.Header), takes: -1} }

func (r *recorder) Header() http.Header { return r.header }

func (r *recorder) WriteHeader(status int) { r.status = status }

func (r *recorder) Flush() {}

func (r *recorder) Write(p []byte) (int, error) {
	if r.stuck != nil {
		<-r.stuck
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.takes == 0 {
		return 0, os.ErrDeadlineExceeded
	}
	r.takes--
	return r.text.Write(p)
}

func (r *recorder) SetWriteDeadline(at time.Time) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cuts = append(r.cuts, at)
	return nil
}

func (r *recorder) SetReadDeadline(at time.Time) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.reads = append(r.reads, at)
	return nil
}

// deadlines returns those that were set.
func (r *recorder) deadlines() (reads, cuts []time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.reads), slices.Clone(r.cuts)
}

// take returns what was written since it was last called.
func (r *recorder) take() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	defer r.text.Reset()
	return r.text.String()
}

// bubble is a token socket's handler in virtual time.
type bubble struct {
	t      *testing.T
	agent  *agent.Agent
	server *Server
	hs     *http.Server
	proved context.Context
}

// inBubble runs test in virtual time, with a daemon on that back end.
func inBubble(t *testing.T, fetch fetchFunc, test func(*bubble)) {
	t.Helper()
	proved := provedContext(t)
	synctest.Test(t, func(t *testing.T) {
		a, err := agent.New(agent.Options{Fetch: fetch, Rules: rules()})
		if err != nil {
			t.Fatal(err)
		}
		defer a.Close()
		s := &Server{Agent: a, Callers: provingOnly()}
		test(&bubble{t: t, agent: a, server: s, hs: s.httpServer(onToken, attest.Socket{}), proved: proved})
	})
}

// begin lets a request in and returns at once. leave is the caller's going away; done is closed when the
// handler has returned.
func (b *bubble) begin(w http.ResponseWriter, target string) (leave context.CancelFunc, done chan struct{}) {
	ctx, cancel := context.WithCancel(b.proved)
	r := httptest.NewRequestWithContext(ctx, "GET", "/", nil)
	r.Host, r.RequestURI = "localhost", target
	done = make(chan struct{})
	go func() {
		defer close(done)
		b.hs.Handler.ServeHTTP(w, r)
	}()
	return cancel, done
}

func TestWaitEndsWithTheTokenAskedFor(t *testing.T) {
	t.Parallel()
	back := newRolling(0)
	inBubble(t, back.fetch, func(b *bubble) {
		back.roll("", 2*time.Hour)
		began := time.Now()
		target := v1Vault + "&wait=10m&issued_after=" + strconv.FormatInt(began.Unix(), 10)
		w := newRecorder()
		leave, done := b.begin(w, target)
		defer leave()
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		if got := w.take(); got != "" {
			b.t.Fatalf("answered at once: %s", got)
		}
		limits := Limits{}.orDefaults()
		want := began.Add(10*time.Minute + limits.Answer + transferTime)
		reads, cuts := w.deadlines()
		if len(cuts) != 1 || !cuts[0].Equal(want) || len(reads) != 1 || !reads[0].Equal(want) {
			b.t.Errorf("the connection is cut at %v and %v, want %v", cuts, reads, want)
		}
		back.roll("", 0)
		if _, err := b.agent.Refresh(context.Background(), "", "", true); err != nil {
			b.t.Fatal(err)
		}
		<-done
		token := decoded[api.Token](b.t, w.take())
		if token.Permissions.State != api.PermissionsCurrent || time.Since(began) > 3*time.Minute {
			b.t.Errorf("%+v after %v", token.Permissions, time.Since(began))
		}
	})
}

func TestWaitEndsInItsTime(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name, query string
		revoked     bool
		status      int
		code        api.Code
		retry       string
		took        time.Duration
	}{
		{"younger than there is, without a wait", "&issued_after=", false, 503, api.CodeNotYet, "300", 0},
		{"younger than there is", "&wait=90s&issued_after=", false, 503, api.CodeNotYet, "300", 90 * time.Second},
		{"withheld", "&wait=45", true, 403, api.CodeRevoked, "", 45 * time.Second},
		{"more life than there is", "&min_ttl=24h&wait=1m", false, 503, api.CodeShortLife, "2", time.Minute},
		{"no wait", "&min_ttl=24h&wait=0", false, 503, api.CodeShortLife, "2", 0},
		{"what is there", "&wait=10m", false, 200, "", "", 0},
	} {
		back := newRolling(0)
		inBubble(t, back.fetch, func(b *bubble) {
			back.roll("", 2*time.Hour)
			if test.revoked {
				changeOn(b.t, b.agent, tokencache.Revoked, time.Hour)
			}
			target := v1Vault + test.query
			if strings.HasSuffix(target, "=") {
				target += strconv.FormatInt(time.Now().Unix(), 10)
			}
			began := time.Now()
			got := b.server.answer(b.t, b.proved, onToken, "GET", target, "")
			if took := time.Since(began); got.status != test.status || took < test.took ||
				took > test.took+time.Second {
				b.t.Errorf("%s: %+v after %v", test.name, got, took)
			}
			if got.status == 200 {
				return
			}
			if got.field(b.t, "code") != string(test.code) || got.header.Get("Retry-After") != test.retry {
				b.t.Errorf("%s: %+v", test.name, got)
			}
			if counts := b.agent.Counts(); counts.Failed != 1 || b.server.failed.Load()+b.server.invalid.Load() != 0 {
				b.t.Errorf("%s: counted %+v", test.name, counts)
			}
		})
	}
}

// A wait moves the deadlines of its own request and of no other.
func TestOthersDoNotWaitLonger(t *testing.T) {
	t.Parallel()
	inBubble(t, hang, func(b *bubble) {
		slow := newRecorder()
		leave, done := b.begin(slow, v1Vault+"&identity=vision&wait=5m")
		began := time.Now()
		got := b.server.answer(b.t, b.proved, onToken, "GET", v1Vault, "")
		if took := time.Since(began); got.status != 503 || took > 10*time.Second {
			b.t.Errorf("without a wait: %+v after %v", got, took)
		}
		leave()
		<-done
		if took := time.Since(began); took > 10*time.Second {
			b.t.Errorf("a caller that has gone waits for %v", took)
		}
	})
}

// waiters returns the text of a request that waits, and of one that is answered as soon as it is let in.
func waiters() (long, short string) {
	target := v1Vault + "&issued_after=" + strconv.FormatInt(time.Now().Unix(), 10)
	return get(target + "&wait=10m"), get(target + "&wait=1ns")
}

// dial sends text on a connection of its own and does not wait for the answer.
func dial(t testing.TB, socket, text string) net.Conn {
	t.Helper()
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write([]byte(text)); err != nil {
		t.Fatal(err)
	}
	return conn
}

// come returns when s counts n requests.
func come(s *limit.Semaphore, n int) {
	for count(s) != n {
		runtime.Gosched()
	}
}

func TestWaitersAreBounded(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, newRolling(time.Hour).fetch)
	d.Limits.Waiting = 2
	socket, module := d.tokens(""), d.tokens("vision")
	long, short := waiters()
	one, two := dial(t, socket, long), dial(t, socket, long)
	defer one.Close()
	defer two.Close()
	come(&d.quotas().waiting, 2)
	got := send(t, socket, short)
	checkRefusal(t, "one too many", got, 429, api.CodeBusy)
	if got.header.Get("Retry-After") != "5" || got.problem(t).Title != "Too Many Requests" {
		t.Errorf("%+v", got)
	}
	if got := send(t, socket, get(v1Vault)); got.status != 200 {
		t.Errorf("a request that does not wait: %+v", got)
	}
	if got := send(t, module, short); got.status != 503 {
		t.Errorf("the module: %+v", got)
	}
	one.Close()
	come(&d.quotas().waiting, 1) // when the daemon has seen that
	if got := send(t, socket, short); got.status != 503 {
		t.Errorf("after one has gone: %+v", got)
	}
}

func TestWaitersAreToldThatTheDaemonGoesDown(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, newRolling(time.Hour).fetch)
	long, _ := waiters()
	conn := dial(t, d.tokens(""), long)
	defer conn.Close()
	come(&d.quotas().waiting, 1)
	if err := d.Shutdown(context.Background()); err != nil {
		t.Fatal(err)
	}
	got := exchangeOn(t, conn, "")
	checkRefusal(t, "going down", got, 503, api.CodeUnreachable)
	if !strings.Contains(got.problem(t).Detail, "going down") {
		t.Errorf("%+v", got)
	}
}

// A module whose socket goes away takes its waiting requests and its streams with it.
func TestWaitersOfAClosedListener(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, newRolling(time.Hour).fetch)
	l := d.listen("goes")
	done := make(chan error, 1)
	go func() { done <- d.ServeTokens(l, "vision") }()
	first := dial(t, l.Addr().String(), "")
	exchangeOn(t, first, get(v1Vault)) // so that the first event is of a token
	first.Close()
	long, _ := waiters()
	conn := dial(t, l.Addr().String(), long)
	defer conn.Close()
	come(&d.quotas().waiting, 1)
	s := d.watchAt(l.Addr().String(), watchVault)
	s.next(api.EventToken)
	l.Close()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if got := exchangeOn(t, conn, ""); got.status != 503 {
		t.Errorf("%+v", got)
	}
	s.next(api.EventEnded)
}

// The waiting of a caller that has gone ends on a real connection too, and its connection serves on after a
// wait.
func TestConnectionIsKeptAfterAWait(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, newRolling(time.Hour).fetch)
	conn, err := net.Dial("unix", d.tokens(""))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_, short := waiters()
	for range 2 {
		if got := exchangeOn(t, conn, short); got.status != 503 || got.closes {
			t.Fatalf("%+v", got)
		}
		if got := exchangeOn(t, conn, get(v1Vault)); got.status != 200 || got.closes {
			t.Fatalf("%+v", got)
		}
	}
}

func TestStayWithoutAConnection(t *testing.T) {
	t.Parallel()
	due := time.Now()
	req := &request{ctx: &lazyDeadline{Context: t.Context(), deadline: due}, w: httptest.NewRecorder()}
	req.extendDeadline(time.Minute)
	if at, _ := req.ctx.Deadline(); !at.Equal(due.Add(time.Minute)) {
		t.Error(fmt.Sprint(at))
	}
}
