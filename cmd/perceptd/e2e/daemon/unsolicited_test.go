package daemon

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"perceptd/agent/api"
	"perceptd/cmd/perceptd/e2e/harness"
)

// A back end, and a container engine, that say more than they are asked: the daemon prints none of it, with every
// library's own log asked for.
func TestUnsolicitedAnswers(t *testing.T) {
	t.Parallel()
	for name, said := range harness.Excesses {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := besideTalkers(t, said)
			tool := func(args ...string) *exec.Cmd {
				return exec.Command(harness.Binary(t, "perceptctl"),
					append([]string{"--socket", d.Token()}, args...)...)
			}
			var printed bytes.Buffer
			for range 3 {
				for _, args := range [][]string{
					{"token", "--resource", harness.VaultURI, "--identity", "vision",
						"--short"}, {"refresh"}, {"status"}, {"doctor"}, {"whoami"},
				} {
					out, _ := tool(args...).CombinedOutput()
					printed.Write(out)
				}
				_, body, err := d.Get(d.Admin(), api.PathStatus)
				if err != nil {
					t.Fatal(err)
				}
				printed.WriteString(body)
			}
			if said.First == "" && !strings.Contains(printed.String(), "sha256") { // its answer is good
				t.Errorf("no token came of it:\n%s", &printed)
			}
			if err := d.Cmd.Process.Signal(syscall.SIGQUIT); err != nil {
				t.Fatal(err)
			}
			<-d.Ended
			printed.WriteString(d.Text())
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
func besideTalkers(t *testing.T, said harness.Excess) *harness.Daemon {
	t.Helper()
	_, environment := harness.StartSimulator(t, "app-service")
	var real string
	front := harness.ListenOn(t, "tcp", "127.0.0.1:0")
	for i, variable := range environment {
		if value, ok := strings.CutPrefix(variable, "IDENTITY_ENDPOINT="); ok {
			address, path, _ := strings.Cut(strings.TrimPrefix(value, "http://"), "/")
			real = address
			environment[i] = "IDENTITY_ENDPOINT=http://" + front.Addr().String() + "/" + path
		}
	}
	harness.Talk(t, front, said, func(q *http.Request) []byte { return harness.PassOn(t, "tcp", real, q) })
	folder := harness.NewDaemon(t, "")
	engine := filepath.Join(folder.Dir, "engine.sock")
	harness.Talk(t, harness.ListenOn(t, "unix", engine), said, func(*http.Request) []byte {
		return []byte("HTTP/1.1 200 OK\r\nApi-Version: 1.41\r\nContent-Length: 2\r\n\r\nOK")
	})
	config := bothEnds("app-service") + fmt.Sprintf("\n[callers]\nengine = %q\n[[module]]\nname = \"camera\"\n", engine)
	return harness.LaunchDaemon(t, config, append(environment, "AZURE_SDK_GO_LOGGING=all", "GODEBUG=http2debug=2")...)
}

// A daemon that says more than it was asked: no verb prints any of it, nor does what runs under exec.
func TestUnsolicitedAnswersOfADaemon(t *testing.T) {
	t.Parallel()
	for name, said := range harness.Excesses {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			folder := harness.NewDaemon(t, "")
			for _, socket := range []string{folder.Token(), folder.Admin()} {
				harness.Talk(t, harness.ListenOn(t, "unix", socket), said, hostileAnswer)
			}
			run := func(environment []string, args ...string) string {
				p := harness.Begin(t, environment,
					exec.Command(harness.Binary(t, "perceptctl"),
						append([]string{"--socket", folder.Token(), "--timeout", "5s"}, args...)...))
				<-p.Ended
				return p.Text()
			}
			for _, args := range [][]string{
				{"token", "--resource", harness.VaultURI}, {"status"}, {"doctor"}, {"whoami"}, {"grants"}, {"grants",
					"check", "--uid", "7", "--resource", harness.VaultURI},
				{"refresh"}, {"reload"}, {"policy-changes"}, {"explain", harness.VaultURI}, {"timeline"}, {"watch",
					"--resource", harness.VaultURI}, {"env"},
				{"policy-changed", "--all-resources", "--all-identities", "--effect", "granted"}, {"version"},
			} {
				if text := run(nil, args...); strings.Contains(text, "canary") {
					t.Errorf("%v printed:\n%s", args, text)
				}
			}
			if said.First != "" {
				return // exec would try for 8 seconds, and SDKs longer
			}
			self, err := os.Executable()
			if err != nil {
				t.Fatal(err)
			}
			text := run([]string{harness.SDKVariable + "=" + harness.OverTCP}, "exec", "--",
				self, harness.VaultURI, "https://storage.azure.com")
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
		answer = api.Token{AccessToken: "a.b.c", TokenType: "Bearer",
			Resource: harness.VaultURI, ExpiresOn: time.Now().Add(time.Hour)}
	case api.PathAppServiceToken:
		answer = map[string]string{"access_token": "a.b.c", "token_type": "Bearer", "resource": harness.VaultURI,
			"expires_on": fmt.Sprint(time.Now().Add(time.Hour).Unix())}
	}
	body, err := json.Marshal(answer)
	if err != nil {
		panic(err)
	}
	return fmt.Appendf(nil, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s",
		len(body), body)
}
