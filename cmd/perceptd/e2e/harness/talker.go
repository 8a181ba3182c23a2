package harness

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"sync"
	"testing"
)

// beside is what nobody asked for: it may not be in anything that the programs print. It looks like a token, which it
// may be.
const beside = "eyJ0eXAiOiJKV1QifQ.canary-4f1d2c7e9b.xyz"

// Excess is how a server says more than it should.
type Excess struct{ First, After string }

// Excesses are the ways to do so, by name.
var Excesses = map[string]Excess{
	"twice": {After: fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s",
		len(beside), beside)},
	"more":        {After: beside},
	"unasked":     {First: "HTTP/1.1 200 OK\r\n" + beside + "\r\n\r\n"},
	"unasked raw": {First: beside + "\r\n\r\n"},
}

// Talk accepts connections, and answers each request on them by answer and with an excess, until the other end closes:
// it has then seen all there is.
func Talk(t *testing.T, l net.Listener, said Excess, answer func(*http.Request) []byte) {
	t.Helper()
	var talking sync.WaitGroup
	t.Cleanup(func() { l.Close(); talking.Wait() })
	talking.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			talking.Go(func() {
				defer conn.Close()
				_, _ = io.WriteString(conn, said.First)
				for requests := bufio.NewReader(conn); ; {
					q, err := http.ReadRequest(requests)
					if err != nil {
						return
					}
					body, _ := io.ReadAll(q.Body)
					q.Body = io.NopCloser(bytes.NewReader(body))
					_, _ = conn.Write(append(answer(q), said.After...))
				}
			})
		}
	})
}

// ListenOn listens on an address, which Talk then serves.
func ListenOn(t *testing.T, network, address string) net.Listener {
	t.Helper()
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// PassOn asks another server and returns its answer as it is on the wire, but for its end.
func PassOn(t *testing.T, network, address string, q *http.Request) []byte {
	conn, err := net.Dial(network, address)
	if err != nil {
		t.Error(err)
		return nil
	}
	defer conn.Close()
	if err := q.Write(conn); err != nil {
		t.Error(err)
		return nil
	}
	answer, err := http.ReadResponse(bufio.NewReader(conn), q)
	if err != nil {
		t.Error(err)
		return nil
	}
	answer.Close = false // so that a client would keep the connection
	answer.Header.Del("Connection")
	wire, err := httputil.DumpResponse(answer, true)
	if err != nil {
		t.Error(err)
	}
	return wire
}
