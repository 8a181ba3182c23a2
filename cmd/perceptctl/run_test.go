package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"perceptd/agent/api"
	"perceptd/agent/simulator"
	"perceptd/cmd/perceptctl/term"
	"perceptd/cmd/perceptd/e2e/harness"
)

// startDaemon runs a fake daemon for tests that are not transcripts.
func startDaemon(t *testing.T) *fakeDaemon {
	t.Helper()
	d := newFakeDaemon(harness.ShortFolder(t))
	t.Cleanup(d.close)
	if err := d.start(); err != nil {
		t.Fatal(err)
	}
	return d
}

// environ points perceptctl at d.
func (d *fakeDaemon) environ(more ...string) []string {
	return append(more, api.SocketVariable+"="+d.client.Socket)
}

// afterRequests cancels once n requests came in.
func (d *fakeDaemon) afterRequests(n int, cancel context.CancelFunc) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.asked = func() {
		if n--; n == 0 {
			cancel()
		}
	}
}

const wellStatus = `{"version":"1.2.3","now":"2026-11-23T12:00:00Z","started_on":"2026-11-23T11:00:00Z","ready":true,
	"source":{"kind":"managed-identity","endpoint":"arc"},"config":{"loaded_on":"2026-11-23T11:00:00Z"},
	"tokens":[{"identity":"device","resource":"https://vault.azure.net","state":"fresh","expires_in":7}]}`

func TestWatchAppendsAwayFromATerminal(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	d.answer(api.PathStatus, fakeAnswer{status: 200, body: wellStatus})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	d.afterRequests(3, cancel)
	var stdout, stderr bytes.Buffer
	code := run(ctx, []string{"status", "--watch", "--every", "1ms"}, nil, &stdout, &stderr, d.environ())
	if code != exitOK || stderr.Len() > 0 {
		t.Errorf("exit status %d, %s", code, &stderr)
	}
	// The third was asked for when the watch ended; whether it is still shown is chance.
	pictures := strings.Split(stdout.String(), strings.Repeat("-", term.DefaultWidth)+"\n")
	if len(pictures) < 2 || pictures[0] != pictures[1] ||
		!strings.HasPrefix(pictures[0], "perceptd  1.2.3, ready, up 1h\n") {
		t.Errorf("output:\n%s", &stdout)
	}
}

func TestWatchJSONIsALineEach(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	d.answer(api.PathStatus, fakeAnswer{status: 200, body: wellStatus})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	d.afterRequests(2, cancel)
	var stdout, stderr bytes.Buffer
	code := run(ctx, []string{"status", "--watch", "--json", "--every", "1ms"}, nil, &stdout, &stderr, d.environ())
	if code != exitOK || stderr.Len() > 0 {
		t.Errorf("exit status %d, %s", code, &stderr)
	}
	for line := range strings.Lines(stdout.String()) {
		if !strings.HasPrefix(line, `{"version":"1.2.3",`) {
			t.Errorf("line %q", line)
		}
	}
	if stdout.Len() == 0 {
		t.Error("no line")
	}
}

// TestWatchOutlivesTheDaemon has a daemon that refuses, as one that restarts may.
func TestWatchOutlivesTheDaemon(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		flag   string
		stream func(stdout, stderr *bytes.Buffer) *bytes.Buffer
	}{
		{"--json=false", func(stdout, _ *bytes.Buffer) *bytes.Buffer { return stdout }},
		{"--json=true", func(_, stderr *bytes.Buffer) *bytes.Buffer { return stderr }},
	} {
		t.Run(test.flag, func(t *testing.T) {
			t.Parallel()
			d := startDaemon(t)
			d.answer(api.PathStatus, fakeAnswer{status: 503, body: `{"detail":"going down","code":"unreachable"}`})
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			d.afterRequests(3, cancel)
			var stdout, stderr bytes.Buffer
			code := run(ctx, []string{"status", "--watch", "--every", "1ms", test.flag}, nil, &stdout, &stderr,
				d.environ())
			if text := test.stream(&stdout, &stderr).String(); code != exitOK ||
				strings.Count(text, "perceptctl: going down\nhint: ") < 2 {
				t.Errorf("exit status %d, output:\n%s", code, text)
			}
		})
	}
}

// brokenWriter is a standard output that cannot be written to.
type brokenWriter struct{}

func (brokenWriter) Write([]byte) (int, error) { return 0, errors.New("broken pipe") }

func TestOutputThatCannotBeWritten(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	d.answer(api.PathStatus, fakeAnswer{status: 200, body: wellStatus})
	d.answer(api.PathToken, fakeAnswer{status: 200, body: `{"access_token":"` + canary + `"}`})
	d.answer(api.PathRefresh, fakeAnswer{status: 200, body: `{}`})
	d.answer(api.PathReload, fakeAnswer{status: 200, body: `{}`})
	d.answer(api.PathPolicyChanges, fakeAnswer{status: 200, body: `{}`})
	d.answer(api.PathWatch, fakeAnswer{status: 200, body: "event: expired\ndata: {}\n\n"})
	for _, line := range []string{
		"status", "status --json", "status --watch", "status --watch --json",
		"token --resource r", "token --resource r --json", "token --resource r --short",
		"refresh", "refresh --json", "reload", "version", "simulate",
		"timeline", "explain https://vault.azure.net", "explain https://vault.azure.net --json",
		"policy-changed r --effect granted", "policy-changed r --effect granted --json",
		"policy-changes", "policy-changes --json", "policy-changes withdraw a", "watch r", "watch r --json",
		"cache-key show --file absent", "cache-key make --dry-run --file absent", "cache-key show --file run_test.go",
	} {
		t.Run(line, func(t *testing.T) {
			t.Parallel()
			var stderr bytes.Buffer
			code := run(t.Context(), strings.Fields(line), nil, brokenWriter{}, &stderr, d.environ())
			if code != exitError || stderr.String() != "perceptctl: broken pipe\n" {
				t.Errorf("exit status %d, %s", code, &stderr)
			}
		})
	}
}

func TestInterrupted(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	d.answer(api.PathToken, fakeAnswer{hangs: true})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	d.afterRequests(1, cancel)
	var stdout, stderr bytes.Buffer
	// Waiting on without end: the interruption is all that ends it.
	code := run(ctx, []string{"token", "--resource", "r", "--timeout", "0"}, nil, &stdout, &stderr, d.environ())
	if code != exitInterrupted || stderr.String() != "perceptctl: interrupted\n" || stdout.Len() > 0 {
		t.Errorf("exit status %d, %s%s", code, &stdout, &stderr)
	}
}

// cancelWriter cancels at the first write.
type cancelWriter struct {
	written bytes.Buffer
	cancel  context.CancelFunc
}

func (w *cancelWriter) Write(p []byte) (int, error) {
	defer w.cancel()
	return w.written.Write(p)
}

// TestWatchEndsWithCtrlC has a stream that stays open, beyond the time for its first line.
func TestWatchEndsWithCtrlC(t *testing.T) {
	t.Parallel()
	for _, timeout := range []string{"1m", "0"} {
		d := startDaemon(t)
		d.answer(api.PathWatch, fakeAnswer{status: 200, stays: true,
			body: "event: token\ndata: " +
				"{\"token_sha256\":\"0123\",\"expires_on\":\"2031-01-01T00:00:00Z\"," +
				"\"permissions\":{\"standing\":\"current\"}}\n\n"})
		ctx, cancel := context.WithCancel(t.Context())
		stdout := cancelWriter{cancel: cancel}
		var stderr bytes.Buffer
		code := run(ctx, []string{"watch", "r", "--timeout", timeout}, nil, &stdout, &stderr, d.environ("TZ=UTC"))
		if code != exitOK || stderr.Len() > 0 || !strings.HasSuffix(stdout.written.String(),
			"  token        0123 until 2031-01-01 00:00, current\n") {
			t.Errorf("exit status %d, %s%s", code, &stdout.written, &stderr)
		}
	}
}

// TestCacheKeyInterrupted has a TPM that is not waited for any more.
func TestCacheKeyInterrupted(t *testing.T) {
	t.Parallel()
	folder := t.TempDir()
	if err := harness.WriteProgram(filepath.Join(folder, "systemd-creds"),
		[]byte("#!/bin/sh\nexec /bin/sleep 600\n")); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var stdout, stderr bytes.Buffer
	file := filepath.Join(folder, "key")
	code := run(ctx, []string{"cache-key", "make", "--file", file}, nil, &stdout, &stderr, []string{"PATH=" + folder})
	if code != exitInterrupted || stderr.String() != "perceptctl: interrupted\n" || stdout.Len() > 0 {
		t.Errorf("exit status %d, %s%s", code, &stdout, &stderr)
	}
	if left, err := filepath.Glob(file + "*"); err != nil || left != nil {
		t.Errorf("left behind: %q (%v)", left, err)
	}
}

// The daemon gets to its configuration beside the key, whatever umask the administrator's shell has.
func TestCacheKeyWhateverTheUmask(t *testing.T) {
	t.Parallel()
	tool, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	folder := t.TempDir()
	file := filepath.Join(folder, "etc", "percept", "cache-key")
	c := exec.Command("/bin/sh", "-c", `umask 077; exec "$0" cache-key make --with file --group "$1" --file "$2"`, tool,
		groupOfThis(t), file)
	c.Env = []string{asTool + "=1", "PATH="}
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	for path, want := range map[string]fs.FileMode{filepath.Dir(filepath.Dir(file)): 0o755, filepath.Dir(file): 0o755,
		file: 0o640} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: %v, %v, want %v", path, info.Mode(), err, want)
		}
	}
	if err := os.Chmod(filepath.Dir(file), 0o711); err != nil {
		t.Fatal(err)
	}
	if err := makeFolder(filepath.Dir(file)); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(filepath.Dir(file)); err != nil || info.Mode().Perm() != 0o711 {
		t.Errorf("a folder that was there: %v, %v", info.Mode(), err)
	}
}

func groupOfThis(t *testing.T) string {
	t.Helper()
	group, err := user.LookupGroupId(strconv.Itoa(os.Getgid()))
	if err != nil {
		t.Fatal(err)
	}
	return group.Name
}

// TestDoctorInterrupted has doctor wait for sockets and a check when Ctrl-C comes: it claims nothing of what it did not
// see.
func TestDoctorInterrupted(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	for _, path := range []string{api.PathWhoAmI, api.PathStatus} {
		d.answer(path, fakeAnswer{hangs: true})
	}
	folder := t.TempDir()
	// Not by this process, whose other children may hold the file open when it is to be run.
	write := exec.Command("/bin/sh", "-c", `printf '#!/bin/sh\nexec /bin/sleep 600\n' >"$0" && chmod 755 "$0"`,
		filepath.Join(folder, "perceptd"))
	if out, err := write.CombinedOutput(); err != nil {
		t.Fatal(err, string(out))
	}
	for _, form := range []string{"--json=false", "--json=true"} {
		ctx, cancel := context.WithCancel(t.Context())
		d.afterRequests(2, cancel)
		var stdout, stderr bytes.Buffer
		code := run(ctx, []string{"doctor", form}, nil, &stdout, &stderr, d.environ("PATH="+folder))
		if code != exitInterrupted || stderr.String() != "perceptctl: interrupted\n" {
			t.Errorf("exit status %d, %s", code, &stderr)
		}
		text := stdout.String()
		if !strings.Contains(text, "it was not checked: interrupted") || strings.Contains(text, "no fault") ||
			strings.Contains(text, "nothing needs") {
			t.Errorf("output:\n%s", text)
		}
		cancel()
	}
}

func TestDoctorWaitsForSeconds(t *testing.T) {
	t.Parallel()
	for timeout, want := range map[time.Duration]time.Duration{0: probeTimeout, time.Minute: probeTimeout,
		time.Second: time.Second} {
		if got := (&app{timeout: timeout}).probeTimeout(); got != want || want > 5*time.Second {
			t.Errorf("--timeout %v: %v, want %v", timeout, got, want)
		}
	}
}

func TestCacheKeyIsRoots(t *testing.T) {
	t.Parallel()
	err := needsRoot(&fs.PathError{Op: "open", Path: "/etc/percept/cache-key.cred", Err: fs.ErrPermission})
	if hint := (&app{}).hint(err); hint != "the cache's key is root's business: run it with sudo" ||
		!errors.Is(err, fs.ErrPermission) {
		t.Errorf("%v, hint %q", err, hint)
	}
}

// TestSimulate runs the verb from its first line to Ctrl-C, in each form.
func TestSimulate(t *testing.T) {
	t.Parallel()
	for form, variables := range map[string][]string{
		"imds":        {"AZURE_POD_IDENTITY_AUTHORITY_HOST", simulatorVariable, simulator.ClockVariable},
		"arc":         {"IDENTITY_ENDPOINT", "IMDS_ENDPOINT", simulatorVariable, simulator.ClockVariable},
		"app-service": {"IDENTITY_ENDPOINT", "IDENTITY_HEADER", simulatorVariable, simulator.ClockVariable},
	} {
		t.Run(form, func(t *testing.T) {
			t.Parallel()
			folder := t.TempDir()
			envFile := filepath.Join(folder, "env")
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			reader, stdout := io.Pipe()
			var stderr bytes.Buffer
			var code int
			var running sync.WaitGroup
			running.Go(func() {
				defer stdout.Close()
				code = run(ctx, []string{"simulate", "--form", form, "--speed", "60", "--fault", "throttle",
					"--arc-key-dir", filepath.Join(folder, "keys"),
					"--env-file", envFile}, nil, stdout, &stderr, nil)
			})
			var lines []string
			scanner := bufio.NewScanner(reader)
			for len(lines) < 6+len(variables)-1 && scanner.Scan() {
				lines = append(lines, scanner.Text())
			}
			written, err := os.ReadFile(envFile)
			if err != nil {
				t.Error(err)
			}
			cancel()
			if scanner.Scan() {
				t.Errorf("a line too many: %q", scanner.Text())
			}
			running.Wait()
			if code != exitOK || stderr.Len() > 0 {
				t.Fatalf("exit status %d, %s", code, &stderr)
			}
			if lines[0] != "SIMULATED: this back end's tokens open nothing" ||
				!strings.HasPrefix(lines[1], "listening on http://127.0.0.1:") ||
				lines[2] != "every user here gets its tokens; the user that runs it and root can steer it" {
				t.Errorf("output:\n%s", strings.Join(lines, "\n"))
			}
			for i, name := range variables {
				line, exported := strings.CutPrefix(lines[5+i], "export ")
				if !exported || !strings.HasPrefix(line, name+"=") ||
					!strings.Contains(string(written), "\n"+line+"\n") {
					t.Errorf("line %q for %s, file:\n%s", lines[5+i], name, written)
				}
			}
			left, err := os.ReadDir(folder)
			if err != nil || len(left) > 0 {
				t.Errorf("left behind: %v (%v)", left, err)
			}
		})
	}
}

// TestSteeringSomethingElse has a server on loopback that is no simulated back end.
func TestSteeringSomethingElse(t *testing.T) {
	t.Parallel()
	for _, status := range []int{200, 404} {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(status)
			_, _ = io.WriteString(w, "<html>")
		}))
		var stdout, stderr bytes.Buffer
		code := run(t.Context(), []string{"simulate", "state", "--at", server.URL}, nil, &stdout, &stderr, nil)
		server.Close()
		if code != exitError || !strings.HasSuffix(stderr.String(), " is no simulated back end\n") {
			t.Errorf("exit status %d, %s", code, &stderr)
		}
	}
}

func TestSteeringInterrupted(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	server := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		cancel()
		<-r.Context().Done()
	}))
	defer server.Close()
	var stdout, stderr bytes.Buffer
	code := run(ctx, []string{"simulate", "state", "--at", server.URL}, nil, &stdout, &stderr, nil)
	if code != exitInterrupted {
		t.Errorf("exit status %d, %s", code, &stderr)
	}
}
