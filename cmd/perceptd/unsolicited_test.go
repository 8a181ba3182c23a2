package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"perceptd/agent/api"
	"perceptd/cmd/perceptd/e2e/perceptdtest"
)

// beside is what nobody asked for: it may not be in anything that the programs print. It looks like a token, which it may be.
const beside = "eyJ0eXAiOiJKV1QifQ.canary-4f1d2c7e9b.xyz"

// excess is how a server says more than it should.
type excess struct{ first, after string }

// excesses are the ways to do so, by name.
var excesses = map[string]excess{
	"twice":       {after: fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", len(beside), beside)},
	"more":        {after: beside},
	"unasked":     {first: "HTTP/1.1 200 OK\r\n" + beside + "\r\n\r\n"},
	"unasked raw": {first: beside + "\r\n\r\n"},
}

// talk accepts connections, and answers each request on them by answer and with an excess, until the other end closes: it has
// then seen all there is.
func talk(t *testing.T, l net.Listener, said excess, answer func(*http.Request) []byte) {
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
				_, _ = io.WriteString(conn, said.first)
				for requests := bufio.NewReader(conn); ; {
					q, err := http.ReadRequest(requests)
					if err != nil {
						return
					}
					body, _ := io.ReadAll(q.Body)
					q.Body = io.NopCloser(bytes.NewReader(body))
					_, _ = conn.Write(append(answer(q), said.after...))
				}
			})
		}
	})
}

func listenOn(t *testing.T, network, address string) net.Listener {
	t.Helper()
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// A back end, and a container engine, that say more than they are asked: the daemon prints none of it, with every library's
// own log asked for.
func TestUnsolicitedAnswers(t *testing.T) {
	t.Parallel()
	for name, said := range excesses {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := besideTalkers(t, said)
			tool := func(args ...string) *exec.Cmd {
				return exec.Command(binary(t, "perceptctl"), append([]string{"--socket", d.token()}, args...)...)
			}
			var printed bytes.Buffer
			for range 3 {
				for _, args := range [][]string{
					{"token", "--resource", perceptdtest.VaultURI, "--identity", "vision", "--short"}, {"refresh"}, {"status"}, {"doctor"}, {"whoami"},
				} {
					out, _ := tool(args...).CombinedOutput()
					printed.Write(out)
				}
				_, body, err := d.get(d.admin(), api.PathStatus)
				if err != nil {
					t.Fatal(err)
				}
				printed.WriteString(body)
			}
			if said.first == "" && !strings.Contains(printed.String(), "sha256") { // its answer is good
				t.Errorf("no token came of it:\n%s", &printed)
			}
			if err := d.cmd.Process.Signal(syscall.SIGQUIT); err != nil {
				t.Fatal(err)
			}
			<-d.ended
			printed.WriteString(d.text())
			if !strings.Contains(printed.String(), "goroutine ") {
				t.Error("no stacks: this test sees less than it should")
			}
			if strings.Contains(printed.String(), "canary") {
				t.Errorf("printed:\n%s", &printed)
			}
		})
	}
}

// besideTalkers starts a daemon whose back end and container engine say too much.
func besideTalkers(t *testing.T, said excess) *daemonProcess {
	t.Helper()
	_, environment := startSimulator(t, "app-service")
	var real string
	front := listenOn(t, "tcp", "127.0.0.1:0")
	for i, variable := range environment {
		if value, ok := strings.CutPrefix(variable, "IDENTITY_ENDPOINT="); ok {
			address, path, _ := strings.Cut(strings.TrimPrefix(value, "http://"), "/")
			real = address
			environment[i] = "IDENTITY_ENDPOINT=http://" + front.Addr().String() + "/" + path
		}
	}
	talk(t, front, said, func(q *http.Request) []byte { return passOn(t, "tcp", real, q) })
	folder := newFolder(t, "")
	engine := filepath.Join(folder.dir, "engine.sock")
	talk(t, listenOn(t, "unix", engine), said, func(*http.Request) []byte {
		return []byte("HTTP/1.1 200 OK\r\nApi-Version: 1.41\r\nContent-Length: 2\r\n\r\nOK")
	})
	config := bothEnds("app-service") + fmt.Sprintf("\n[callers]\nengine = %q\n[[module]]\nname = \"camera\"\n", engine)
	return launchDaemon(t, config, append(environment, "AZURE_SDK_GO_LOGGING=all", "GODEBUG=http2debug=2")...)
}

// passOn asks another server and returns its answer as it is on the wire, but for its end.
func passOn(t *testing.T, network, address string, q *http.Request) []byte {
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

// A daemon that says more than it was asked: no verb prints any of it, nor does what runs under exec.
func TestUnsolicitedAnswersOfADaemon(t *testing.T) {
	t.Parallel()
	for name, said := range excesses {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			folder := newFolder(t, "")
			for _, socket := range []string{folder.token(), folder.admin()} {
				talk(t, listenOn(t, "unix", socket), said, hostileAnswer)
			}
			run := func(environment []string, args ...string) string {
				p := begin(t, environment, exec.Command(binary(t, "perceptctl"), append([]string{"--socket", folder.token(), "--timeout", "5s"}, args...)...))
				<-p.ended
				return p.text()
			}
			for _, args := range [][]string{
				{"token", "--resource", perceptdtest.VaultURI}, {"status"}, {"doctor"}, {"whoami"}, {"grants"}, {"grants", "check", "--uid", "7", "--resource", perceptdtest.VaultURI},
				{"refresh"}, {"reload"}, {"policy-changes"}, {"explain", perceptdtest.VaultURI}, {"timeline"}, {"watch", "--resource", perceptdtest.VaultURI}, {"env"},
				{"policy-changed", "--all-resources", "--all-identities", "--effect", "granted"}, {"version"},
			} {
				if text := run(nil, args...); strings.Contains(text, "canary") {
					t.Errorf("%v printed:\n%s", args, text)
				}
			}
			if said.first != "" {
				return // exec would try for 8 seconds, and SDKs longer
			}
			self, err := os.Executable()
			if err != nil {
				t.Fatal(err)
			}
			text := run([]string{sdkVariable + "=" + overTCP}, "exec", "--", self, perceptdtest.VaultURI, "https://storage.azure.com")
			if strings.Contains(text, "canary") || strings.Count(text, "a.b.c") != 2 {
				t.Errorf("exec printed:\n%s", text)
			}
		})
	}
}

// hostileAnswer is as little as each verb is content with.
func hostileAnswer(q *http.Request) []byte {
	var answer any = struct{}{}
	switch q.URL.Path {
	case api.PathToken:
		answer = api.Token{AccessToken: "a.b.c", TokenType: "Bearer", Resource: perceptdtest.VaultURI, ExpiresOn: time.Now().Add(time.Hour).Unix()}
	case api.PathAppServiceToken:
		answer = map[string]string{"access_token": "a.b.c", "token_type": "Bearer", "resource": perceptdtest.VaultURI,
			"expires_on": fmt.Sprint(time.Now().Add(time.Hour).Unix())}
	}
	body, err := json.Marshal(answer)
	if err != nil {
		panic(err)
	}
	return fmt.Appendf(nil, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
}
