package attest

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"unicode/utf8"
)

// standardLog is what libraries have written to the standard logger since TestMain.
var standardLog logBuffer

type logBuffer struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (q *logBuffer) Write(line []byte) (int, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.text.Write(line)
}

func (q *logBuffer) String() string {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.text.String()
}

// canary is text that must not appear in errors and logs.
const canary = "canary-4f1d2c7e9b"

// startRawEngine starts an engine that sends what talk writes on each connection, and returns its socket.
func startRawEngine(t *testing.T, talk func(conn net.Conn, questions *bufio.Reader)) string {
	t.Helper()
	path := filepath.Join(shortFolder(t), "engine.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	var talking sync.WaitGroup
	talking.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			talking.Go(func() {
				defer conn.Close()
				talk(conn, bufio.NewReader(conn))
				_, _ = io.Copy(io.Discard, conn) // until the client has read everything and closes it
			})
		}
	})
	t.Cleanup(func() { l.Close(); talking.Wait() })
	return path
}

func httpAnswer(body string) string {
	return fmt.Sprintf("HTTP/1.1 200 OK\r\nApi-Version: 1.41\r\nContent-Type: application/json\r\n"+
		"Content-Length: %d\r\n\r\n%s", len(body), body)
}

// What an engine sends beyond its answers is not printed, and no error quotes it.
func TestEngineSendsTooMuch(t *testing.T) {
	t.Parallel()
	about, err := json.Marshal(honestAnswer(idA, "vision", 2))
	if err != nil {
		t.Fatal(err)
	}
	asked := func(conn net.Conn, questions *bufio.Reader, answer string) {
		if q, err := http.ReadRequest(questions); err == nil {
			switch beside, is := strings.CutPrefix(answer, httpAnswer(string(about))); {
			case is && strings.HasSuffix(q.URL.Path, "/_ping"):
				answer = httpAnswer("OK") + beside
			case is && strings.Contains(q.URL.Path, "/images/"):
				answer = httpAnswer("{}") + beside
			}
			_, _ = io.WriteString(conn, answer)
		}
	}
	for _, row := range []struct {
		name string
		good bool
		talk func(conn net.Conn, questions *bufio.Reader)
	}{
		{"twice", true, func(conn net.Conn, questions *bufio.Reader) {
			asked(conn, questions, httpAnswer(string(about))+httpAnswer(canary))
		}},
		{"more than its length", true, func(conn net.Conn, questions *bufio.Reader) {
			asked(conn, questions, httpAnswer(string(about))+canary)
		}},
		{"no HTTP", false, func(conn net.Conn, questions *bufio.Reader) { asked(conn, questions, canary+"\r\n\r\n") }},
		{"a bad status", false, func(conn net.Conn, questions *bufio.Reader) {
			asked(conn, questions, "HTTP/1.1 "+canary+" OK\r\n\r\n")
		}},
		{"a bad header", false, func(conn net.Conn, questions *bufio.Reader) {
			asked(conn, questions, "HTTP/1.1 200 OK\r\n"+canary+"\r\n\r\n")
		}},
		{"a bad length", false, func(conn net.Conn, questions *bufio.Reader) {
			asked(conn, questions, "HTTP/1.1 200 OK\r\nContent-Length: "+canary+"\r\n\r\n")
		}},
		{"a bad encoding", false, func(conn net.Conn, questions *bufio.Reader) {
			asked(conn, questions, "HTTP/1.1 200 OK\r\nTransfer-Encoding: "+canary+"\r\n\r\n")
		}},
		{"a bad version", false, func(conn net.Conn, questions *bufio.Reader) {
			asked(conn, questions, "HTTP/1.1 200 OK\r\nApi-Version: "+canary+"\r\nContent-Length: 0\r\n\r\n")
		}},
		{"an error", false, func(conn net.Conn, questions *bufio.Reader) {
			asked(conn, questions, "HTTP/1.1 500 "+canary+"\r\n"+
				"Content-Type: application/json\r\nContent-Length: 0\r\n\r\n"+canary)
		}},
	} {
		t.Run(row.name, func(t *testing.T) { // a subtest, which waits until each connection has been closed
			s := newFixture(t, Options{})
			s.putProcess(2, containerA)
			path := startRawEngine(t, row.talk)
			s.SetRules(Rules{
				Engines: []string{path}, NeedsEngine: true,
				Modules: map[string]Requirement{"vision": {Container: "vision"}},
			})
			got, err := s.callerIn(containerA, Socket{})
			if (err == nil) != row.good {
				t.Errorf("%+v, %v", got, err)
			}
			said := fmt.Sprintf("%v %+v", err, s.Limitations(context.Background()))
			if _, trouble := s.Engine(); strings.Contains(said+trouble, canary) {
				t.Errorf("%s %s", said, trouble)
			}
		})
	}
	if text := standardLog.String(); strings.Contains(text, canary) {
		t.Errorf("printed: %s", text)
	}
}

// Calls use the API version that the engine reports, and a new one after the engine has been restarted with another.
func TestEngineVersions(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	version := "1.41"
	var asked []string
	about, err := json.Marshal(honestAnswer(idA, "vision", 2))
	if err != nil {
		t.Fatal(err)
	}
	path := startRawEngine(t, func(conn net.Conn, questions *bufio.Reader) {
		q, err := http.ReadRequest(questions)
		if err != nil {
			return
		}
		mu.Lock()
		defer mu.Unlock()
		asked = append(asked, q.URL.Path)
		switch {
		case q.URL.Path == "/_ping":
			_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nApi-Version: "+version+"\r\nContent-Length: 0\r\n\r\n")
		case !strings.HasPrefix(q.URL.Path, "/v"+version+"/"): // Docker 29 refuses versions before 1.44 like this
			_, _ = io.WriteString(conn, "HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
		case strings.Contains(q.URL.Path, "/images/"):
			_, _ = io.WriteString(conn, httpAnswer(`{"RepoDigests":null}`))
		default:
			_, _ = io.WriteString(conn, httpAnswer(string(about)))
		}
	})
	s := newFixture(t, Options{})
	s.putProcess(2, containerA)
	s.SetRules(Rules{Engines: []string{path}})
	call := func() error { _, err := s.callerIn(containerA, Socket{}); return err }
	if err := call(); err != nil {
		t.Fatal(err)
	}
	mu.Lock()
	version = "1.52"
	mu.Unlock()
	checkDenied(t, "another version", call(), "status 400")
	if err := call(); err != nil {
		t.Errorf("after the engine was asked which: %v", err)
	}
	mu.Lock()
	defer mu.Unlock()
	if last := asked[len(asked)-2]; last != "/v1.52/containers/"+idA+"/json" {
		t.Errorf("%q", asked)
	}
}

func TestDigestsOfImageAreBounded(t *testing.T) {
	t.Parallel()
	i := imageJSON{RepoDigests: []string{
		strings.Repeat("x", maxDigestLength+1), "registry.example/vision@sha256:" + idA,
	}}
	if names := i.digests(); len(names) != 1 {
		t.Errorf("%q", names)
	}
	for range 10 * maxDigestsOfImage {
		i.RepoDigests = append(i.RepoDigests, "x")
	}
	if names := i.digests(); len(names) != maxDigestsOfImage {
		t.Errorf("%d names", len(names))
	}
}

// FuzzEngineAnswer: whatever an engine sends, the part that is kept is bounded and no error repeats it.
func FuzzEngineAnswer(f *testing.F) {
	about, err := json.Marshal(honestAnswer(idA, canary, 2))
	if err != nil {
		f.Fatal(err)
	}
	podmans, err := json.Marshal(podmanAnswer(idA, canary, splitA, canary, 2))
	if err != nil {
		f.Fatal(err)
	}
	for _, seed := range []string{
		string(about), string(podmans), `{"Id":"` + canary + `"}`, `{"State":{"Pid":1e99}}`,
		`{"State":{"StartedAt":"` + canary + `"},"Config":{},"HostConfig":{}}`,
		`{"RepoDigests":["` + canary + `"]}`, `{"RepoDigests":[7]}`, `[[[`, `null`, canary,
	} {
		f.Add(httpAnswer(seed), seed)
		f.Add("HTTP/1.1 200 OK\r\nApi-Version: 1.41\r\n\r\n", seed)
	}
	f.Fuzz(func(t *testing.T, answer, body string) {
		for _, sent := range []string{answer, httpAnswer(body)} {
			client := &engineClient{path: "/run/docker.sock", version: "1.41", transport: cannedResponse(sent)}
			info, err := client.inspectContainer(context.Background(), idA)
			if err != nil && (strings.Contains(err.Error(), canary) || len(err.Error()) > 200) {
				t.Errorf("%v", err)
			}
			if err == nil && (len(info.Name) > maxNameLength || len(info.ID)+len(info.Image) > 500 ||
				info.Digest != "" && !imageID.MatchString(info.Digest)) {
				t.Errorf("%+v", info)
			}
			names, err := client.inspectImage(context.Background(), "sha256:"+idA)
			if err != nil && (strings.Contains(err.Error(), canary) || !utf8.ValidString(err.Error())) ||
				len(names) > maxDigestsOfImage {
				t.Errorf("%v %q", err, names)
			}
		}
	})
}

// cannedResponse is an http.RoundTripper that returns this response.
type cannedResponse string

func (s cannedResponse) RoundTrip(q *http.Request) (*http.Response, error) {
	return http.ReadResponse(bufio.NewReader(strings.NewReader(string(s))), q)
}
