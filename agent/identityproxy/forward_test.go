package identityproxy

import (
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"perceptd/agent/api"
)

// piped is a perceptd at the other end of pipes: each connection gets what the next entry says, the last one over and
// over. Nil: nobody is there.
type piped struct {
	answers []func(net.Conn)

	mu    sync.Mutex
	dials int
}

func (p *piped) dial(context.Context, string, string) (net.Conn, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	answer := p.answers[min(p.dials, len(p.answers)-1)]
	p.dials++
	if answer == nil {
		return nil, &net.OpError{Op: "dial", Net: "unix", Err: syscall.ECONNREFUSED}
	}
	ours, theirs := net.Pipe()
	go func() {
		defer theirs.Close()
		_, _ = theirs.Read(make([]byte, 4096))
		answer(theirs)
	}()
	return ours, nil
}

func says(text string) func(net.Conn) {
	return func(c net.Conn) { _, _ = io.WriteString(c, text) }
}

var (
	works  = says("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
	hangs  = func(c net.Conn) { _, _ = c.Read(make([]byte, 1)) }
	leaves = says("HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}")
	asks   = says(
		"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 20\r\n\r\n{\"code\":\"ask_again\"}")
	again = func(c net.Conn) {
		asks(c)
		_, _ = c.Read(make([]byte, 4096))
		works(c)
	}
	refuses = says("HTTP/1.1 503 Service Unavailable\r\nRetry-After: 2\r\nContent-Length: 2\r\n\r\n{}")
)

// A perceptd that comes late, ends, or is started anew is noticed by nobody for 8 seconds; SDKs are then told to try
// again.
func TestPerceptdAway(t *testing.T) {
	t.Parallel()
	nobody := func(n int) []func(net.Conn) { return make([]func(net.Conn), n) }
	rows := map[string]struct {
		answers []func(net.Conn)
		status  int
		detail  string
		took    time.Duration // at least; 0: nothing
	}{
		"there":        {[]func(net.Conn){works}, 200, "", 0},
		"later":        {append(nobody(10), works), 200, "", 3 * time.Second},
		"never":        {nobody(1), 503, "connection refused", 7 * time.Second},
		"ends at once": {[]func(net.Conn){says(""), works}, 200, "", 20 * time.Millisecond},
		"no HTTP": {[]func(net.Conn){says("canary-4f1d2c7e9b\r\n\r\n")}, 503, "is not HTTP",
			7 * time.Second},
		"ends in its answer": {[]func(net.Conn){says("HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"),
			works}, 200, "", 20 * time.Millisecond},
		"is just ending":           {[]func(net.Conn){leaves, works}, 200, "", 20 * time.Millisecond},
		"is just ending, for good": {[]func(net.Conn){leaves}, 503, "just ending", 7 * time.Second},
		"asks to be asked again":   {[]func(net.Conn){again, nil}, 200, "", 20 * time.Millisecond},
		"asks, and goes":           {[]func(net.Conn){asks, works}, 200, "", 20 * time.Millisecond},
		"asks for good": {[]func(net.Conn){asks}, 503, "cannot tell who is calling yet",
			7 * time.Second},
		"refuses": {[]func(net.Conn){refuses}, 503, "", 0},
		"hangs":   {[]func(net.Conn){hangs}, 503, "deadline exceeded", answerTimeout},
		"another program, with a page": {[]func(net.Conn){says("HTTP/1.1 403 Forbidden\r\nContent-Length: " +
			"25\r\n\r\n<html>canary-4f1d2c7e9b\r\n")}, 503, "is not perceptd", 7 * time.Second},
		"another program, with nothing": {[]func(net.Conn){says(
			"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")}, 503, "is not perceptd", 7 * time.Second},
		"another program, which switches protocols": {[]func(net.Conn){says("HTTP/1.1 101 Switching Protocols\r\n" +
			"Connection: Upgrade\r\nUpgrade: x\r\n\r\n")}, 503, "is not perceptd", 7 * time.Second},
		"another program, with a redirect, and perceptd": {[]func(net.Conn){says(
			"HTTP/1.1 302 Found\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n"), works}, 200, "", 20 * time.Millisecond},
		"refuses for good": {[]func(net.Conn){says("HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\n{}")}, 403, "",
			0},
		"talks too much": {[]func(net.Conn){says("HTTP/1.1 200 OK\r\n\r\n" + strings.Repeat("x", maxBody+1))}, 503,
			"more than", 7 * time.Second},
	}
	for name, row := range rows {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				p := &piped{answers: row.answers}
				r := &Proxy{socket: &http.Transport{DialContext: p.dial}}
				defer r.socket.CloseIdleConnections()
				begun := time.Now()
				given, no := r.forward(httptest.NewRequest("GET", "/msi/token?resource=r", nil),
					api.PathAppServiceToken, "X-Identity-Header", "exec")
				if no != nil {
					given = no.reply()
				}
				if took := time.Since(begun); given.status != row.status || took < row.took ||
					took > row.took+2*time.Second {
					t.Errorf("status %d after %v", given.status, took)
				}
				if strings.Contains(string(given.body), "canary") {
					t.Errorf("what perceptd sent is quoted: %s", given.body)
				}
				if row.detail != "" && (no == nil || !strings.Contains(no.detail, row.detail) ||
					given.header["Retry-After"] != "2" ||
					!strings.Contains(string(given.body), `"statusCode":503`)) {
					t.Errorf("%+v", given)
				}
			})
		})
	}
}

// Whoever has gone is not asked for any more.
func TestCallerGone(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := &piped{answers: []func(net.Conn){nil}}
		r := &Proxy{socket: &http.Transport{DialContext: p.dial}}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		begun := time.Now()
		_, no := r.forward(httptest.NewRequestWithContext(ctx, "GET", "/msi/token", nil), api.PathAppServiceToken,
			"X-Identity-Header", "exec")
		if took := time.Since(begun); no == nil || took > 2*time.Second {
			t.Errorf("%v after %v", no, took)
		}
	})
}

// A key is good for a minute.
func TestKeysEnd(t *testing.T) {
	t.Parallel()
	folder := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		k, err := newKeys(folder)
		if err != nil {
			t.Fatal(err)
		}
		defer k.close()
		if _, err := k.issue(); err != nil {
			t.Fatal(err)
		}
		text := k.open[0].secret
		time.Sleep(keyLifetime)
		if k.redeem(text) {
			t.Error("an old key was taken")
		}
		if _, err := k.issue(); err != nil || len(k.open) != 1 {
			t.Errorf("%d keys, %v", len(k.open), err)
		}
		if !k.redeem(k.open[0].secret) || k.redeem(text) {
			t.Error("a new key was not taken")
		}
	})
}
