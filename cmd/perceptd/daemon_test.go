package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"perceptd/agent/simulator"
	"perceptd/cmd/perceptd/config"
	"perceptd/cmd/perceptd/e2e/harness"
)

// inside is the whole program in this process, where what it leaves behind can be seen. A simulated
// source sets the environment, which belongs to the process: these tests are not parallel.
type inside struct {
	*harness.Daemon
	cancel context.CancelFunc
	exit   int // the exit status, once ended
}

// runInside starts the program. It looks for what is left behind when the test is over.
func runInside(t *testing.T, config string) *inside {
	t.Helper()
	return runInsideIn(t, harness.NewDaemon(t, config))
}

func runInsideIn(t *testing.T, folder *harness.Daemon) *inside {
	t.Helper()
	before := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, before) })
	for _, name := range identityVariables {
		t.Setenv(name, "") // puts back what was there before
	}
	d := &inside{Daemon: folder}
	d.Process = harness.NewProcess(t)
	var ctx context.Context
	ctx, d.cancel = context.WithCancel(t.Context())
	go func() {
		defer close(d.Ended)
		d.exit = run(ctx, d.Arguments(), io.Discard, d.Output)
	}()
	t.Cleanup(func() { d.end() })
	return d
}

// end stops the program and returns its exit status.
func (d *inside) end() int {
	d.cancel()
	<-d.Ended
	return d.exit
}

func TestInside(t *testing.T) {
	for _, row := range []struct{ form, source string }{
		{"app-service", ""},
		{"imds", "endpoint = \"imds\"\nrollover = \"half-life\"\n"},
		{"arc", "endpoint = \"arc\"\nspeed = 60.0\n"},
	} {
		t.Run(row.form, func(t *testing.T) {
			if row.form == "arc" && os.Getuid() != 0 {
				t.Skip("needs root: azidentity takes Arc's key files from /var/opt/azcmagent/tokens only")
			}
			testInside(t, row.form, func(modules ...string) string {
				return strings.Replace(harness.SimulatedFor(modules...), "[source]\n", "[source]\n"+row.source, 1)
			})
		})
	}
}

func testInside(t *testing.T, form string, configure func(modules ...string) string) {
	manager, told := harness.ListenAsSystemd(t)
	t.Setenv("NOTIFY_SOCKET", manager)
	t.Setenv("WATCHDOG_USEC", "100000")
	d := runInside(t, configure("vision"))
	d.AwaitHealth(t)
	harness.AwaitMessages(t, told, "READY=1", "STATUS=SIMULATED; 2 identities", "WATCHDOG=1")
	if got := d.Status(t); !got.Simulated || got.Source.Kind != config.Simulated || got.Source.Endpoint != form {
		t.Errorf("status %+v", got)
	}
	for socket, identity := range map[string]string{d.Token(): "device", d.Module("vision"): "vision"} {
		if status, body, err := d.Get(socket, harness.VaultToken); status != 200 ||
			!strings.Contains(body, `"identity":"`+identity+`"`) {
			t.Errorf("%s: %d %s %v", socket, status, body, err)
		}
	}
	d.Rewrite(t, configure("speech"))
	if err := syscall.Kill(os.Getpid(), syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	harness.Until(t, "the reload by signal", d.Ended, func() bool {
		status, _, _ := d.Get(d.Module("speech"), harness.VaultToken)
		return status == 200
	})
	harness.AwaitMessages(t, told, "RELOADING=1\nMONOTONIC_USEC=", "READY=1")
	if status, body := d.Reload(t, configure()+"[x]\n"); status != 422 ||
		!strings.Contains(body, "unknown key x") || !strings.Contains(body, removals) {
		t.Errorf("a bad configuration: %d %s", status, body)
	}
	if status, body := d.Reload(t, configure()+"[tokens]\nsdk_life = \"30m\"\n"); status != 200 ||
		!strings.Contains(body, "sdk_life is 30m0s, was 35m0s") {
		t.Errorf("another life: %d %s", status, body)
	}
	extra := filepath.Join(filepath.Dir(d.Config), "config.d")
	if err := errors.Join(os.Mkdir(extra, 0o755),
		os.WriteFile(filepath.Join(extra, "a.toml"), nil, 0o644)); err != nil {
		t.Fatal(err)
	}
	if status, body := d.Reload(t, configure()); status != 200 || !strings.Contains(body, "a.toml, was "+d.Config+`"`) {
		t.Errorf("another file: %d %s", status, body)
	}
	if got := d.end(); got != exitOK {
		t.Errorf("exit status %d", got)
	}
	harness.AwaitMessages(t, told, "STOPPING=1")
	for _, part := range []string{"SIMULATED back end", "the context ended", "stopped"} {
		if !strings.Contains(d.Text(), part) {
			t.Errorf("the log says nothing of %q", part)
		}
	}
}

// What keeps the daemon from starting is told, and it leaves nothing behind.
func TestInsideRefusals(t *testing.T) {
	for _, row := range []struct {
		name, says string
		spoil      func(t *testing.T, d *harness.Daemon)
	}{
		{"descriptors that are none", "perceptd: LISTEN_FDS=\"many\" is no number of descriptors",
			func(t *testing.T, _ *harness.Daemon) {
				t.Setenv("LISTEN_PID", strconv.Itoa(os.Getpid()))
				t.Setenv("LISTEN_FDS", "many")
			}},
		{"a folder that others may write in", "perceptd: others may write in ", func(t *testing.T, d *harness.Daemon) {
			if err := os.Chmod(d.Dir, 0o777); err != nil {
				t.Fatal(err)
			}
		}},
		{"the token socket's place is taken", "token.sock is there and is not a socket",
			func(t *testing.T, d *harness.Daemon) {
				if err := os.MkdirAll(d.Token()+"/its own", 0o755); err != nil {
					t.Fatal(err)
				}
			}},
		{"the admin socket's place is taken", "admin.sock is there and is not a socket",
			func(t *testing.T, d *harness.Daemon) {
				if err := os.MkdirAll(d.Admin()+"/its own", 0o755); err != nil {
					t.Fatal(err)
				}
			}},
	} {
		t.Run(row.name, func(t *testing.T) {
			before := harness.NewDaemon(t, harness.SimulatedFor("vision"))
			row.spoil(t, before)
			d := runInsideIn(t, before)
			<-d.Ended
			if d.exit != exitFailed || !strings.Contains(d.Text(), row.says) {
				t.Errorf("exit status %d\n%s", d.exit, d.Text())
			}
			if info, err := os.Lstat(d.Token()); err == nil && info.Mode().Type() == os.ModeSocket {
				t.Error("a socket is left where nobody answers")
			}
		})
	}
}

// A configuration with faults keeps nothing down: who has a sound grant is served, or each request says that none is in
// force; and a reload of what was mended heals it.
func TestInsideConfigFaults(t *testing.T) {
	good := harness.SimulatedFor("vision")
	for name, row := range map[string]struct {
		spoil  func(d *harness.Daemon, extra string) error
		status int
		says   string
	}{
		"a typo in a grant": {func(_ *harness.Daemon, extra string) error {
			return os.WriteFile(extra, []byte("[[grant]]\ncaller = { user = \"no-such-user\" }\n"), 0o644)
		}, 200, "is idle: "},
		"a file that cannot be parsed": {func(_ *harness.Daemon, extra string) error {
			return os.WriteFile(extra, []byte("[[grant\n"), 0o644)
		}, 503, "perceptd was started by hand, and has no copy"},
		"no file": {func(d *harness.Daemon, _ string) error {
			return os.Remove(d.Config)
		}, 503, "is not there: put it back, or write one"},
		"no main file": {func(d *harness.Daemon, extra string) error {
			grant := fmt.Sprintf("[[grant]]\ncaller = { uid = %d }\nidentity = \"device\"\n"+
				"resources = [\"https://vault.azure.net\"]\n", os.Getuid())
			return errors.Join(os.Remove(d.Config), os.WriteFile(extra, []byte(grant), 0o644))
		}, 403, "config.toml is not there, and what needs it is idle: put it back, then: perceptctl reload"},
	} {
		t.Run(name, func(t *testing.T) {
			folder := harness.NewDaemon(t, good)
			extra := filepath.Join(filepath.Dir(folder.Config), "config.d", "50.toml")
			if err := errors.Join(os.Mkdir(filepath.Dir(extra), 0o755), row.spoil(folder, extra)); err != nil {
				t.Fatal(err)
			}
			d := runInsideIn(t, folder)
			d.AwaitHealth(t)
			if status, body, err := d.Get(d.Token(), harness.VaultToken); status != row.status {
				t.Errorf("%d %s %v", status, body, err)
			}
			if trouble := strings.Join(d.Status(t).Trouble, "\n"); !strings.Contains(trouble, row.says) {
				t.Errorf("%q is not said: %s", row.says, trouble)
			}
			if strings.HasPrefix(name, "no ") {
				return // a simulated source begins with the process
			}
			if err := os.Remove(extra); err != nil {
				t.Fatal(err)
			}
			if s := d.Status(t); s.Config.EditedOn.IsZero() {
				t.Error("the edit is not seen")
			}
			if status, body := d.Reload(t, good); status != 200 {
				t.Errorf("%d %s", status, body)
			}
			for _, socket := range []string{d.Token(), d.Module("vision")} {
				if status, body, err := d.Get(socket, harness.VaultToken); status != 200 {
					t.Errorf("mended: %d %s %v", status, body, err)
				}
			}
			if s := d.Status(t); len(s.Trouble) > 0 || !s.Config.EditedOn.IsZero() {
				t.Errorf("mended: %+v %q", s.Config, s.Trouble)
			}
		})
	}
}

// A source that is not there keeps nothing down: each request is answered with the reason, and a reload that names
// another one heals it.
func TestInsideWithoutSource(t *testing.T) {
	const rest = `
[[identity]]
name = "device"

[[grant]]
caller = { uid = %d }
identity = "device"
resources = ["https://vault.azure.net"]
`
	granted := fmt.Sprintf(rest, os.Getuid())
	for _, source := range []string{"endpoint = \"app-service\"", "endpoint = 5"} {
		d := runInside(t, "[source]\n"+source+"\n"+granted)
		d.AwaitHealth(t)
		status, body, err := d.Get(d.Token(), harness.VaultToken)
		if status != 503 || !strings.Contains(body, "source") {
			t.Errorf("%s: %d %s %v", source, status, body, err)
		}
		if s := d.Status(t); !strings.Contains(strings.Join(s.Trouble, "\n"), "no token can be fetched: ") {
			t.Errorf("%s: trouble %q", source, s.Trouble)
		}
		if status, body := d.Reload(t, "[source]\nendpoint = \"imds\"\n"+granted); status != 200 {
			t.Errorf("%s: %d %s", source, status, body)
		}
		if s := d.Status(t); s.Source.Endpoint != "imds" ||
			strings.Contains(strings.Join(s.Trouble, "\n"), "no token can be fetched: ") {
			t.Errorf("%s: %+v %q", source, s.Source, s.Trouble)
		}
		d.end()
	}
}

// With auto an endpoint that comes after the start is used, as long as the one of before has given no token. After that
// none is.
func TestInsideAutoFollows(t *testing.T) {
	t.Setenv("AZURE_POD_IDENTITY_AUTHORITY_HOST", "http://127.0.0.1:1")
	config := fmt.Sprintf("[[identity]]\nname = \"device\"\n\n[[grant]]\ncaller = { uid = %d }\n"+
		"identity = \"device\"\nresources = [\"https://vault.azure.net\", \"https://storage.azure.com\"]\n",
		os.Getuid())
	d := runInside(t, config)
	d.AwaitHealth(t)
	if status, body, err := d.Get(d.Token(), harness.VaultToken); status != 503 {
		t.Fatalf("%d %s %v", status, body, err)
	}
	if got := d.Status(t).Source.Endpoint; got != "imds" {
		t.Errorf("at the start: %s", got)
	}
	server, err := simulator.Start(t.Context(), simulator.ServerOptions{Listen: "127.0.0.1:0",
		Form: simulator.FormAppService, Backend: simulator.New(simulator.Options{Now: time.Now})})
	if err != nil {
		t.Fatal(err)
	}
	for _, variable := range server.Environment() {
		if name, value, _ := strings.Cut(variable, "="); strings.HasPrefix(name, "IDENTITY_") {
			t.Setenv(name, value)
		}
	}
	if status, body := d.Reload(t, config); status != 200 {
		t.Fatalf("%d %s", status, body)
	}
	harness.Until(t, "a token of what came later", d.Ended, func() bool {
		status, _, _ := d.Get(d.Token(), harness.VaultToken)
		return status == 200
	})
	if got := d.Status(t).Source.Endpoint; got != "app-service" {
		t.Errorf("after it: %s", got)
	}
	t.Setenv("IDENTITY_HEADER", "")
	_, _, _ = d.Get(d.Token(), strings.Replace(harness.VaultToken, "vault.azure.net", "storage.azure.com", 1))
	if got := d.Status(t).Source.Endpoint; got != "app-service" {
		t.Errorf("a source that has given a token was left for %s", got)
	}
	d.end()
	_ = server.Close(context.Background())
}

// What systemd says wrongly of itself is told and is no reason not to serve.
func TestInsideWithoutSystemd(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "not/absolute")
	t.Setenv("WATCHDOG_USEC", "soon")
	d := runInside(t, harness.SimulatedFor())
	d.AwaitHealth(t)
	if got := d.end(); got != exitOK {
		t.Errorf("exit status %d", got)
	}
	for _, part := range []string{"systemd cannot be told of readiness and status",
		"systemd's watchdog cannot be fed"} {
		if !strings.Contains(d.Text(), part) {
			t.Errorf("%q is missing in:\n%s", part, d.Text())
		}
	}
}
