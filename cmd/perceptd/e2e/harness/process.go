// Package harness builds, starts and asks perceptd and perceptctl for tests, and stands in for whom they have to do
// with: the service manager, an SDK, a container engine, a peer that says too much. What it starts ends with the test.
package harness

import (
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Main is TestMain of each package that starts the programs.
func Main(m *testing.M) {
	if socket := os.Getenv(SDKVariable); socket != "" {
		os.Exit(askAsSDK(socket, os.Args[1:]))
	}
	// What others may write to is refused, and other users' processes look into folders of tests.
	syscall.Umask(0o022)
	status := m.Run()
	if built.dir != "" {
		_ = os.RemoveAll(built.dir)
	}
	os.Exit(status)
}

var built struct {
	once sync.Once
	dir  string
	err  error
}

// Binary returns the path of perceptd or perceptctl, built once for all tests of this run; perceptd
// under the race detector when they are. It is not in TMPDIR, which may be closed to the users that some tests become.
func Binary(t testing.TB, name string) string {
	t.Helper()
	built.once.Do(func() {
		if built.dir, built.err = os.MkdirTemp("/tmp", "perceptd-test-"); built.err != nil {
			return
		}
		// The tool is run often and has nothing to race with.
		tool := exec.Command("go", "build", "-o", built.dir, "perceptd/cmd/perceptctl")
		tool.Env = append(os.Environ(), "CGO_ENABLED=0")
		daemon := exec.Command("go", "build", "-race="+raceDetector(), "-o", built.dir, "perceptd/cmd/perceptd")
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

// WriteProgram writes a program or a script that the test then executes. It lets this process fork nothing while the
// file is open: until it executes a program of its own, the child would have the file open for writing too, and the
// kernel executes no such file ("text file busy").
func WriteProgram(path string, text []byte) error {
	syscall.ForkLock.RLock()
	err := os.WriteFile(path, text, 0o755)
	syscall.ForkLock.RUnlock()
	return errors.Join(err, os.Chmod(path, 0o755)) // whatever the umask: other users execute it too
}

// raceDetector says whether this test was built with it, as go build wants to be told.
func raceDetector() string {
	info, _ := debug.ReadBuildInfo()
	if info != nil {
		for _, s := range info.Settings {
			if s.Key == "-race" {
				return s.Value
			}
		}
	}
	return "false"
}

// The exit statuses of perceptd, as its --help tells them, but for 0.
const (
	ExitFailed = 1 // it could not start, or could not go on
)

// Process is a program under test: its output is kept, and it is stopped with the test.
type Process struct {
	Cmd    *exec.Cmd
	Ended  chan struct{}
	Output *os.File // the program itself writes to it: what it said before it answered is there by the answer
}

// NewProcess makes a process that is still to be started.
func NewProcess(t testing.TB) *Process {
	t.Helper()
	output, err := os.CreateTemp("", "perceptd-said-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = output.Close() })
	if err := os.Remove(output.Name()); err != nil { // the descriptor is enough
		t.Fatal(err)
	}
	return &Process{Ended: make(chan struct{}), Output: output}
}

// Text returns all that the process has said so far.
func (p *Process) Text() string {
	text, err := io.ReadAll(io.NewSectionReader(p.Output, 0, math.MaxInt64))
	if err != nil {
		return err.Error()
	}
	return string(text)
}

// Launch starts perceptd or perceptctl.
func Launch(t testing.TB, environment []string, name string, args ...string) *Process {
	t.Helper()
	return Begin(t, environment, exec.Command(Binary(t, name), args...))
}

// Begin starts a command with that environment and no more of this one than it needs.
func Begin(t testing.TB, environment []string, cmd *exec.Cmd) *Process {
	t.Helper()
	p := NewProcess(t)
	p.Cmd = cmd
	p.Cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "HOME=" + os.Getenv("HOME")}, environment...)
	p.Cmd.Stdout, p.Cmd.Stderr = p.Output, p.Output
	if err := p.Cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = p.Cmd.Wait()
		close(p.Ended)
	}()
	t.Cleanup(func() {
		_ = p.Cmd.Process.Kill()
		<-p.Ended
		if strings.Contains(p.Text(), "DATA RACE") {
			t.Errorf("%v has a data race", p.Cmd.Args)
		}
		if t.Failed() {
			t.Logf("%v said:\n%s", p.Cmd.Args, p.Text())
		}
	})
	return p
}

// Stop ends the process in order and returns its exit status.
func (p *Process) Stop(t testing.TB) int {
	t.Helper()
	if err := p.Cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	<-p.Ended
	return p.Cmd.ProcessState.ExitCode()
}

// Until polls for what another process does in its own time, at most for a minute.
func Until(t testing.TB, what string, ended <-chan struct{}, reached func() bool) {
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

// ValueOf returns the value of a variable of an environment; empty: it is not there.
func ValueOf(variables []string, name string) string {
	for _, v := range variables {
		if value, ok := strings.CutPrefix(v, name+"="); ok {
			return value
		}
	}
	return ""
}

// Must ends the test where there is an error.
func Must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
