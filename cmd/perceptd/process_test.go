package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"

	"perceptd/agent/api"
	"perceptd/cmd/perceptd/e2e/perceptdtest"
)

// sdkVariable makes the test binary an SDK's client instead: what it holds is the socket to ask on, or overTCP.
// azidentity's environment and cache belong to a process, so both ends need one of their own.
const sdkVariable = "PERCEPTD_TEST_SDK"

// overTCP has that client be as it comes, and go by its environment alone.
const overTCP = "tcp"

func TestMain(m *testing.M) {
	if socket := os.Getenv(sdkVariable); socket != "" {
		os.Exit(askAsSDK(socket, os.Args[1:]))
	}
	syscall.Umask(0o022) // what others may write to is refused, and other users' processes look into folders of tests
	status := m.Run()
	if dir := builtIn(); dir != "" {
		_ = os.RemoveAll(dir)
	}
	os.Exit(status)
}

// askAsSDK gets tokens through the real azidentity over a Unix socket and prints them, one a line. Each
// argument is a resource and, for a user-assigned identity, the kind of ID and the ID.
func askAsSDK(socket string, args []string) int {
	var dialer net.Dialer
	client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return dialer.DialContext(ctx, "unix", socket)
	}}}
	if socket == overTCP {
		client = http.DefaultClient
	}
	for _, arg := range args {
		token, err := sdkToken(client, strings.Fields(arg))
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		fmt.Println(token)
	}
	return 0
}

func sdkToken(client *http.Client, ask []string) (string, error) {
	options := azidentity.ManagedIdentityCredentialOptions{ClientOptions: azcore.ClientOptions{Transport: client}}
	if len(ask) == 3 {
		switch ask[1] {
		case "client_id":
			options.ID = azidentity.ClientID(ask[2])
		case "object_id":
			options.ID = azidentity.ObjectID(ask[2])
		case "resource_id":
			options.ID = azidentity.ResourceID(ask[2])
		}
	}
	credential, err := azidentity.NewManagedIdentityCredential(&options)
	if err != nil {
		return "", err
	}
	token, err := credential.GetToken(context.Background(), policy.TokenRequestOptions{Scopes: []string{ask[0] + "/.default"}})
	return token.Token, err
}

var built struct {
	once sync.Once
	dir  string
	err  error
}

func builtIn() string { return built.dir }

// binary returns the path of perceptd or perceptctl, built once for all tests of this run; perceptd
// under the race detector when they are. It is not in TMPDIR, which may be closed to the users that some tests become.
func binary(t testing.TB, name string) string {
	t.Helper()
	built.once.Do(func() {
		if built.dir, built.err = os.MkdirTemp("/tmp", "perceptd-test-"); built.err != nil {
			return
		}
		// The tool is run often and has nothing to race with.
		tool := exec.Command("go", "build", "-o", built.dir, "perceptd/cmd/perceptctl")
		tool.Env = append(os.Environ(), "CGO_ENABLED=0")
		daemon := exec.Command("go", "build", "-race="+cmp.Or(recorded("-race"), "false"), "-o", built.dir, "perceptd/cmd/perceptd")
		for _, build := range []*exec.Cmd{tool, daemon} {
			if out, err := build.CombinedOutput(); err != nil {
				built.err = fmt.Errorf("%v: %w: %s", build.Args, err, out)
				return
			}
		}
	})
	if built.err != nil {
		t.Fatal(built.err)
	}
	return filepath.Join(built.dir, name)
}

// process is a program under test: its output is kept, and it is stopped with the test.
type process struct {
	cmd    *exec.Cmd
	ended  chan struct{}
	output *os.File // the program itself writes to it: what it said before it answered is there by the answer
}

func newProcess(t testing.TB) *process {
	t.Helper()
	output, err := os.CreateTemp("", "perceptd-said-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = output.Close() })
	if err := os.Remove(output.Name()); err != nil { // the descriptor is enough
		t.Fatal(err)
	}
	return &process{ended: make(chan struct{}), output: output}
}

func (p *process) text() string {
	text, err := io.ReadAll(io.NewSectionReader(p.output, 0, math.MaxInt64))
	if err != nil {
		return err.Error()
	}
	return string(text)
}

func launch(t testing.TB, environment []string, name string, args ...string) *process {
	t.Helper()
	return begin(t, environment, exec.Command(binary(t, name), args...))
}

// begin starts a command with that environment and no more of this one than it needs.
func begin(t testing.TB, environment []string, cmd *exec.Cmd) *process {
	t.Helper()
	p := newProcess(t)
	p.cmd = cmd
	p.cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "HOME=" + os.Getenv("HOME")}, environment...)
	p.cmd.Stdout, p.cmd.Stderr = p.output, p.output
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = p.cmd.Wait()
		close(p.ended)
	}()
	t.Cleanup(func() {
		_ = p.cmd.Process.Kill()
		<-p.ended
		if strings.Contains(p.text(), "DATA RACE") {
			t.Errorf("%v has a data race", p.cmd.Args)
		}
		if t.Failed() {
			t.Logf("%v said:\n%s", p.cmd.Args, p.text())
		}
	})
	return p
}

// stop ends the process in order and returns its exit status.
func (p *process) stop(t testing.TB) int {
	t.Helper()
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	<-p.ended
	return p.cmd.ProcessState.ExitCode()
}

// daemonProcess is a running perceptd with its folder.
type daemonProcess struct {
	*process
	dir, config string
}

func launchDaemon(t testing.TB, config string, environment ...string) *daemonProcess {
	t.Helper()
	d := newFolder(t, config)
	d.process = launch(t, environment, "perceptd", d.arguments()...)
	d.awaitHealth(t)
	return d
}

// newFolder makes the folder of a daemon that is not started yet.
func newFolder(t testing.TB, config string) *daemonProcess {
	t.Helper()
	return &daemonProcess{dir: perceptdtest.ShortFolder(t), config: perceptdtest.WriteConfig(t, map[string]string{"config.toml": config})}
}

func (d *daemonProcess) arguments() []string {
	return []string{"--config", d.config, "--runtime-dir", d.dir, "--state-dir", filepath.Join(d.dir, "state"),
		"--cache-key", d.keyFile(), "--log-level", "debug"}
}

func (d *daemonProcess) awaitHealth(t testing.TB) {
	t.Helper()
	until(t, "the daemon", d.ended, func() bool {
		status, _, err := d.get(d.admin(), api.PathHealth)
		return err == nil && status == 200
	})
}

// rewrite replaces the configuration file.
func (d *daemonProcess) rewrite(t testing.TB, config string) {
	t.Helper()
	if err := os.WriteFile(d.config, []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}
}

// reload replaces the configuration file and has it read.
func (d *daemonProcess) reload(t testing.TB, config string) (status int, body string) {
	t.Helper()
	d.rewrite(t, config)
	status, body, err := d.ask(d.admin(), "POST", api.PathReload, "")
	if err != nil {
		t.Fatal(err)
	}
	return status, body
}

func (d *daemonProcess) keyFile() string { return filepath.Join(d.dir, "cache-key") }
func (d *daemonProcess) token() string   { return filepath.Join(d.dir, api.TokenSocketName) }
func (d *daemonProcess) admin() string   { return filepath.Join(d.dir, api.AdminSocketName) }
func (d *daemonProcess) module(name string) string {
	return filepath.Join(d.dir, api.ModulesDirName, name, api.TokenSocketName)
}

// until polls for what another process does in its own time, at most for a minute.
func until(t testing.TB, what string, ended <-chan struct{}, reached func() bool) {
	t.Helper()
	limit := time.After(time.Minute)
	for !reached() {
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ended:
			t.Fatalf("the process ended before %s", what)
		case <-limit:
			t.Fatalf("waited a minute for %s", what)
		}
	}
}

// get asks on a socket in a connection of its own.
func (d *daemonProcess) get(socket, path string) (status int, body string, err error) {
	return d.ask(socket, "GET", path, "")
}

func (d *daemonProcess) ask(socket, method, path, body string) (int, string, error) {
	response, text, err := d.exchange(socket, method, path, body)
	if err != nil {
		return 0, "", err
	}
	return response.StatusCode, text, nil
}

// exchange is ask, for whoever wants to see the answer's header too.
func (d *daemonProcess) exchange(socket, method, path, body string) (*http.Response, string, error) {
	conn, err := net.Dial("unix", socket)
	if err != nil {
		return nil, "", err
	}
	defer conn.Close()
	// What every client is promised: an answer within 10 seconds, whatever the back end does.
	if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return nil, "", err
	}
	fmt.Fprintf(conn, "%s %s HTTP/1.1\r\nHost: localhost\r\nMetadata: true\r\nX-IDENTITY-HEADER: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s",
		method, path, len(body), body)
	response, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return nil, "", err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	return response, string(text), err
}

func (d *daemonProcess) status(t testing.TB) api.Status {
	t.Helper()
	_, body, err := d.get(d.admin(), api.PathStatus)
	if err != nil {
		t.Fatal(err)
	}
	var s api.Status
	if err := json.Unmarshal([]byte(body), &s); err != nil {
		t.Fatalf("%v: %s", err, body)
	}
	return s
}

// claims returns what a token says of itself.
func claims(t testing.TB, token string) map[string]any {
	t.Helper()
	parts := strings.Split(strings.TrimSpace(token), ".")
	if len(parts) != 3 {
		t.Fatalf("no JWT of three parts: %d", len(parts))
	}
	text, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		t.Fatal(err)
	}
	var c map[string]any
	if err := json.Unmarshal(text, &c); err != nil {
		t.Fatal(err)
	}
	return c
}

// startSimulator runs `perceptctl simulate` and returns the variables that point azidentity at it.
func startSimulator(t testing.TB, form string, args ...string) (*process, []string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "env")
	p := launch(t, nil, "perceptctl", append([]string{"simulate", "--form", form, "--env-file", file}, args...)...)
	var text []byte
	until(t, "the simulator", p.ended, func() bool {
		var err error
		text, err = os.ReadFile(file)
		return err == nil
	})
	var environment []string
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(strings.TrimPrefix(line, "export "))
		if name, value, ok := strings.Cut(line, "="); ok {
			environment = append(environment, name+"="+strings.Trim(value, `'"`))
		}
	}
	return p, environment
}

// simulatorDo steers a running simulator.
func simulatorDo(t testing.TB, environment []string, args ...string) {
	t.Helper()
	c := exec.Command(binary(t, "perceptctl"), append([]string{"simulate"}, args...)...)
	c.Env = environment
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", args, err, out)
	}
}
