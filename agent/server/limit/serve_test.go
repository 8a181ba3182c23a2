package limit

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// serving answers on a Unix socket and on a TCP port until the test ends.
func serving(t *testing.T, server *http.Server) (addresses []net.Addr) {
	t.Helper()
	unix, err := net.Listen("unix", filepath.Join(shortFolder(t), "socket"))
	if err != nil {
		t.Fatal(err)
	}
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	t.Cleanup(serving.Wait)
	for _, l := range []net.Listener{unix, tcp} {
		on := &http.Server{Handler: server.Handler, ReadHeaderTimeout: time.Minute, ConnContext: server.ConnContext,
			ConnState: server.ConnState}
		serving.Go(func() { _ = Serve(on, l) })
		t.Cleanup(func() { _ = on.Close() })
		addresses = append(addresses, l.Addr())
	}
	return addresses
}

// connect returns a connection that is closed when the test ends.
func connect(t *testing.T, to net.Addr) net.Conn {
	t.Helper()
	conn, err := net.Dial(to.Network(), to.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// isRefused checks an answer for what it is to be beyond the bounds.
func isRefused(t *testing.T, answer *http.Response) {
	t.Helper()
	var body struct {
		Error, Error_description, Message string
		StatusCode                        int
	}
	err := json.NewDecoder(answer.Body).Decode(&body)
	if err != nil || answer.StatusCode != 431 || !answer.Close || body.StatusCode != 431 ||
		body.Error != "invalid_request" ||
		body.Message != body.Error_description || !strings.Contains(body.Message, "64 header lines and 16384 bytes") {
		t.Errorf("%d %+v %v", answer.StatusCode, body, err)
	}
}

// A request beyond the bounds gets 431 and the end of the connection, whether it is the first on it, a later one, or
// sent along with others, which are answered before. What is within the bounds is answered as ever.
func TestRefusal(t *testing.T) {
	t.Parallel()
	full := get + manyLines(HeadLines-1)
	rows := map[string]struct {
		stream string
		good   int // requests that are answered
	}{
		"lines":             {full + "b:\n\r\n", 0},
		"lines without end": {full + manyLines(3000), 0},
		"bytes":             {get + "X: " + strings.Repeat("x", HeadBytes) + "\r\n\r\n", 0},
		"a request line":    {"GET /" + strings.Repeat("x", 2*HeadBytes), 0},
		"many bytes":        {get + "X: " + strings.Repeat("x", mostDropped+HeadBytes-4096), 0},
		"after good ones":   {strings.Repeat(full+"\r\n", 3) + full + "b:\n", 3},
		"after a body": {"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 400\r\n\r\n" +
			manyLines(100) + full + "b:\n", 1},
		"after a short one": {"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\naa:\n" + full + "b:\n", 1},
	}
	addresses := serving(t, &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		fmt.Fprint(w, len(body), err)
	})})
	for name, row := range rows {
		for _, at := range addresses {
			for _, pieces := range []bool{false, true} {
				t.Run(fmt.Sprint(name, at.Network(), pieces), func(t *testing.T) {
					t.Parallel()
					conn := connect(t, at)
					go func() {
						for rest := row.stream; rest != ""; {
							n := len(rest)
							if pieces {
								n = min(n, 700)
							}
							if _, err := io.WriteString(conn, rest[:n]); err != nil {
								return
							}
							rest = rest[n:]
						}
					}()
					answers := bufio.NewReader(conn)
					for i := range row.good {
						answer, err := http.ReadResponse(answers, nil)
						if err != nil {
							t.Fatal(err)
						}
						if text, err := io.ReadAll(answer.Body); answer.StatusCode != 200 ||
							!strings.HasSuffix(string(text), "<nil>") || err != nil {
							t.Errorf("request %d: %d %s %v", i, answer.StatusCode, text, err)
						}
					}
					answer, err := http.ReadResponse(answers, nil)
					if err != nil {
						t.Fatal(err)
					}
					isRefused(t, answer)
					if rest, _ := io.ReadAll(answers); len(rest) > 0 {
						t.Errorf("after that %q", rest)
					}
				})
			}
		}
	}
}

// A request that waits for its answer gets it, whatever is sent after it on the same connection.
func TestAnswerUnderWay(t *testing.T) {
	t.Parallel()
	entered, proceed := make(chan bool, 2), make(chan bool)
	addresses := serving(t, &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		entered <- true
		select {
		case <-proceed:
		case <-r.Context().Done():
		}
		fmt.Fprint(w, r.Context().Err())
	})})
	for _, at := range addresses {
		conn := connect(t, at)
		if _, err := io.WriteString(conn, get+"\r\n"); err != nil {
			t.Fatal(err)
		}
		<-entered
		if _, err := io.WriteString(conn, get+manyLines(1000)); err != nil {
			t.Fatal(err)
		}
		proceed <- true
		answers := bufio.NewReader(conn)
		answer, err := http.ReadResponse(answers, nil)
		if err != nil {
			t.Fatal(err)
		}
		if text, err := io.ReadAll(answer.Body); answer.StatusCode != 200 || string(text) != "<nil>" || err != nil {
			t.Errorf("%d %s %v", answer.StatusCode, text, err)
		}
		if answer, err = http.ReadResponse(answers, nil); err != nil {
			t.Fatal(err)
		}
		isRefused(t, answer)
	}
}

// A body in chunks counts as head. The handler that reads it learns at once that it ends here; and where the next
// request begins cannot be told, so that one beyond the bounds ends the connection unanswered.
func TestBodyInChunks(t *testing.T) {
	t.Parallel()
	addresses := serving(t, &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, err := io.ReadAll(r.Body); err != nil {
			w.WriteHeader(http.StatusBadRequest)
		}
	})})
	for _, at := range addresses {
		const chunked = "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
		conn := connect(t, at)
		if _, err := io.WriteString(conn, chunked+"190\r\n"+manyLines(100)+"\r\n0\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		answer, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil || answer.StatusCode != http.StatusBadRequest || !answer.Close {
			t.Errorf("%+v %v", answer, err)
		}
		conn = connect(t, at)
		if _, err := io.WriteString(conn, chunked+"4\r\naa:\n\r\n0\r\n\r\n"+get+manyLines(100)); err != nil {
			t.Fatal(err)
		}
		if text, _ := io.ReadAll(conn); !strings.HasPrefix(string(text), "HTTP/1.1 200 ") ||
			strings.Count(string(text), "HTTP/1.1 ") != 1 {
			t.Errorf("%s", text)
		}
	}
}

// The server's hooks see the listener's own connections.
func TestHooksSeeTheListenersConnections(t *testing.T) {
	t.Parallel()
	var context_, state atomic.Int32
	addresses := serving(t, &http.Server{
		Handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}),
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			if _, ok := c.(*net.TCPConn); ok {
				context_.Add(1)
			}
			return ctx
		},
		ConnState: func(c net.Conn, s http.ConnState) {
			if _, ok := c.(*net.TCPConn); ok && s == http.StateActive {
				state.Add(1)
			}
		},
	})
	conn := connect(t, addresses[1])
	_, _ = io.WriteString(conn, get+"\r\n")
	if answer, err := http.ReadResponse(bufio.NewReader(conn), nil); err != nil || answer.StatusCode != 200 ||
		context_.Load() != 1 || state.Load() != 1 {
		t.Errorf("%v %v, %d and %d calls", answer, err, context_.Load(), state.Load())
	}
}

// What a connection with an endless head takes: 3,716 lines in 16 KB took 0.6 MB. It is measured with nothing beside
// it.
func TestMemoryOfAConnection(t *testing.T) {
	const connections, most = 200, 40 << 10
	addresses := serving(t, &http.Server{Handler: http.NotFoundHandler()})
	conns := make([]net.Conn, connections)
	for i := range conns {
		conns[i] = connect(t, addresses[0])
	}
	before := inUse()
	for _, conn := range conns {
		if _, err := io.WriteString(conn, get+manyLines(3700)); err != nil {
			t.Fatal(err)
		}
	}
	for _, conn := range conns { // which are read by the time that they are refused, and held
		answer, err := http.ReadResponse(bufio.NewReaderSize(conn, 16), nil)
		if err != nil {
			t.Fatal(err)
		}
		answer.Body.Close()
	}
	if took := (inUse() - before) / connections; took > most {
		t.Errorf("%d bytes a connection", took)
	}
}

func inUse() int {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int(m.HeapInuse + m.StackInuse)
}
