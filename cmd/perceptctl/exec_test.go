package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"perceptd/cmd/perceptd/e2e/harness"
)

// Variables that make the test binary another program: perceptctl itself, or a command that tells of its signals.
const (
	asTool    = "PERCEPTCTL_TEST_TOOL"
	asCommand = "PERCEPTCTL_TEST_COMMAND"
)

// tellSignals prints each signal that it gets, and ends with status 3 at SIGTERM, or when nobody is told any more.
func tellSignals() {
	hangup := signal.Ignored(syscall.SIGHUP)
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM, syscall.SIGUSR1, syscall.SIGUSR2,
		syscall.SIGWINCH, syscall.SIGCONT, syscall.Signal(40))
	if !hangup {
		signal.Notify(signals, syscall.SIGHUP)
	}
	fmt.Println("ready", os.Getpid(), hangup)
	for s := range signals {
		if _, err := fmt.Println(s); err != nil || s == syscall.SIGTERM {
			os.Exit(3)
		}
	}
}

// executing returns `perceptctl exec` with arguments, by the test binary.
func executing(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, append([]string{"--socket", "nowhere", "exec"}, args...)...)
	cmd.Env = append(os.Environ(), asTool+"=1")
	return cmd
}

func TestExecStatus(t *testing.T) {
	t.Parallel()
	folder := t.TempDir()
	plain, odd, orphan := filepath.Join(folder, "plain"), filepath.Join(folder, "odd"), filepath.Join(folder, "orphan")
	if err := errors.Join(os.WriteFile(plain, []byte("x"), 0o644), harness.WriteProgram(odd, []byte("\x00\x01")),
		harness.WriteProgram(orphan, []byte("#!/nowhere/sh\n"))); err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		args   []string
		status int
		says   string
	}{
		{[]string{"--", "true"}, 0, ""},
		{[]string{"sh", "-c", "exit 7"}, 7, ""},
		{[]string{"--", "sh", "-c", "exit 255"}, 255, ""},
		{[]string{"--", "sh", "-c", "kill -KILL $$"}, 137, ""},
		{[]string{"--", "sh", "-c", "kill -TERM $$"}, 143, ""},
		{[]string{"--", "no-such-command"}, 127, `perceptctl: cannot run "no-such-command": there is no such command`},
		{[]string{"--", folder + "/none"}, 127, "there is no such command"},
		{[]string{"--", plain + "/none"}, 127, "there is no such command"},
		{[]string{"--", folder}, 126, "it is a folder"},
		{[]string{"--", plain}, 126, "permission denied"},
		{[]string{"--", odd}, 126, "exec format error"},
		{[]string{"--", orphan}, 126, "its interpreter is missing"},
		{nil, 2, "requires at least 1 arg"},
		{[]string{"--nonsense", "true"}, 2, "unknown flag: --nonsense"},
	} {
		t.Run(strings.Join(row.args, " "), func(t *testing.T) {
			t.Parallel()
			out, err := executing(t, row.args...).CombinedOutput()
			status := 0
			if ended := (*exec.ExitError)(nil); errors.As(err, &ended) {
				status = ended.ExitCode()
			}
			if status != row.status || !strings.Contains(string(out), row.says) || row.says == "" && len(out) != 0 {
				t.Errorf("status %d: %s", status, out)
			}
		})
	}
}

// A command is found by PATH, past what cannot be run, which is told of where there is nothing else.
func TestExecPath(t *testing.T) {
	t.Parallel()
	folder := t.TempDir()
	if err := os.WriteFile(folder+"/true", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for path, status := range map[string]int{folder + ":/usr/bin:/bin": 0, folder: 126, "": 127, "/nowhere": 127} {
		cmd := executing(t, "--", "true")
		cmd.Env = append(cmd.Env, "PATH="+path)
		if _ = cmd.Run(); cmd.ProcessState.ExitCode() != status {
			t.Errorf("PATH=%s: status %d", path, cmd.ProcessState.ExitCode())
		}
	}
}

// A folder of PATH that may not be looked into, as /root/bin for most, is passed by as one that has no such command is.
func TestExecPathBeyondAClosedFolder(t *testing.T) {
	t.Parallel()
	folder := harness.ShortFolder(t) // not in TMPDIR, which may be closed to that user
	closed, loop := folder+"/closed", folder+"/loop"
	if err := errors.Join(os.Mkdir(closed, 0o700), os.WriteFile(folder+"/plain", nil, 0o644),
		os.Symlink(loop, loop), os.Chmod(closed, 0), os.Chmod(folder, 0o755)); err != nil {
		t.Fatal(err)
	}
	tried := make(chan struct{})
	go func() {
		defer close(tried)
		runtime.LockOSThread() // it ends with this goroutine, whose rights to files are another user's from here on
		if os.Getuid() == 0 {
			const nobody = 65534
			_, _, _ = syscall.RawSyscall(syscall.SYS_SETFSUID, nobody, 0, 0)
		}
		for _, row := range []struct {
			name, path string
			status     int
			says       string
		}{
			{"true", closed, exitNotFound, closed + "/true: permission denied"},
			{"true", loop, exitNotFound, "too many levels of symbolic links"},
			{"true", closed + ":/usr/bin:/bin", 0, ""},
			{"plain", closed + ":" + folder, exitCannot, "permission denied"},
			{closed + "/true", "", exitCannot, "permission denied"},
		} {
			_, err := lookPath(row.name, []string{"PATH=" + row.path})
			if exitStatus(err) != row.status || !strings.Contains(fmt.Sprint(err), row.says) {
				t.Errorf("%s in %s: status %d, %v", row.name, row.path, exitStatus(err), err)
			}
		}
	}()
	<-tried
}

// The tests of signals hold where this process was started to ignore some and has no terminal, as by setsid nohup.
func TestExecTestsUnderNohup(t *testing.T) {
	t.Parallel()
	self, _ := os.Executable()
	out, err := exec.Command("setsid", "--wait", "sh", "-c",
		`trap "" HUP INT QUIT TERM; exec "$0" -test.run '^TestExec(PassesSignalsOn|OnATerminal|LeavesIgnoredSignals)$'`,
		self).CombinedOutput()
	if err != nil || !strings.HasPrefix(string(out), "PASS\n") {
		t.Errorf("%v: %s", err, out)
	}
}

// started is a command of exec's that tells of its signals.
type started struct {
	*exec.Cmd
	lines *bufio.Scanner
	first []string
}

func startTelling(t *testing.T, cmd *exec.Cmd) *started {
	t.Helper()
	cmd.Env = append(cmd.Env, asCommand+"=1")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	s := &started{Cmd: cmd, lines: bufio.NewScanner(out)}
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	s.first = strings.Fields(s.line())
	if len(s.first) != 3 || s.first[0] != "ready" {
		t.Fatalf("the command says %q", s.first)
	}
	return s
}

func (s *started) line() string {
	s.lines.Scan()
	return strings.TrimSpace(s.lines.Text())
}

func (s *started) told(t *testing.T, sent os.Signal) {
	t.Helper()
	if err := s.Process.Signal(sent); err != nil {
		t.Fatal(err)
	}
	if got := s.line(); got != sent.String() {
		t.Errorf("sent %v, the command got %q", sent, got)
	}
}

func TestExecPassesSignalsOn(t *testing.T) {
	t.Parallel()
	self, _ := os.Executable()
	s := startTelling(t, executing(t, "--", self))
	for _, sent := range []syscall.Signal{syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGUSR1,
		syscall.SIGUSR2, syscall.SIGWINCH, 40, syscall.SIGTERM} {
		s.told(t, sent)
	}
	if _ = s.Wait(); s.ProcessState.ExitCode() != 3 {
		t.Errorf("%v", s.ProcessState)
	}
}

// What this process was started to ignore, as by nohup, the command ignores as well.
func TestExecLeavesIgnoredSignals(t *testing.T) {
	t.Parallel()
	self, _ := os.Executable()
	inner := executing(t, "--", self)
	outer := exec.Command("sh", append([]string{"-c", `trap "" HUP; exec "$0" "$@"`}, inner.Args...)...)
	outer.Env = inner.Env
	s := startTelling(t, outer)
	if s.first[2] != "true" {
		t.Error("the command does not ignore SIGHUP")
	}
	if err := s.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	s.told(t, syscall.SIGTERM)
	_ = s.Wait()
}

// A key on a terminal tells the command once, and what the command does on it decides: under a shell, and as a
// container's first process.
func TestExecOnATerminal(t *testing.T) {
	t.Parallel()
	keys, s := atKeyboard(t, "exec")
	press(t, keys, s)
	command, err := strconv.Atoi(s.first[1])
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(command, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if got := s.line(); got != "terminated" {
		t.Errorf("at the end: %q", got)
	}
	if _ = s.Wait(); s.ProcessState.ExitCode() != 3 {
		t.Errorf("%v", s.ProcessState)
	}
	if os.Getuid() == 0 { // a process namespace needs root
		keys, s = atKeyboard(t, "exec unshare --pid --fork --kill-child setsid --ctty")
		press(t, keys, s)
	}
}

// atKeyboard starts exec on a terminal of its own, with what stands before it on the command line, and returns what
// types there.
func atKeyboard(t *testing.T, before string) (io.Writer, *started) {
	t.Helper()
	self, _ := os.Executable()
	inner := executing(t, "--", self)
	line := before
	for _, arg := range inner.Args {
		line += " " + shellQuoted(arg)
	}
	outer := exec.Command("script", "-qec", line, "/dev/null")
	outer.Env = append(inner.Env, "SHELL=/bin/sh")
	keys, err := outer.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	return keys, startTelling(t, outer)
}

func press(t *testing.T, keys io.Writer, s *started) {
	t.Helper()
	for _, row := range []struct{ key, want string }{{"\x03", "interrupt"}, {"\x1c", "quit"}, {"\x03", "interrupt"}} {
		if _, err := io.WriteString(keys, row.key); err != nil {
			t.Fatal(err)
		}
		// the terminal echoes the key before it
		if got := s.line(); !strings.HasSuffix(got, row.want) || strings.Count(got, row.want) != 1 {
			t.Errorf("%q: the command got %q", row.key, got)
		}
	}
}

// As the first process of a container it gets signals too, and no child that lost its parent stays as a zombie.
func TestExecAsFirstProcess(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("a process namespace needs root")
	}
	runtime.LockOSThread() // the child is killed when the thread ends that began it
	defer runtime.UnlockOSThread()
	cmd := executing(t, "--", "sh", "-c",
		"for i in 1 2 3 4 5; do (true & true & true &) ; done; echo ready; read line; exit 9")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID, Pdeathsig: syscall.SIGKILL}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
		t.Fatalf("%q %v", line, err)
	}
	for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		children := childrenOf(t, cmd.Process.Pid)
		if len(children) == 1 {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("children %v are left", children)
		}
	}
	if _, err := io.WriteString(in, "\n"); err != nil {
		t.Fatal(err)
	}
	if _ = cmd.Wait(); cmd.ProcessState.ExitCode() != 9 {
		t.Errorf("%v", cmd.ProcessState)
	}

	self, _ := os.Executable()
	cmd = executing(t, "--", self)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID}
	s := startTelling(t, cmd)
	s.told(t, syscall.SIGUSR1)
	s.told(t, syscall.SIGTERM)
	if _ = s.Wait(); s.ProcessState.ExitCode() != 3 {
		t.Errorf("%v", s.ProcessState)
	}
}

func childrenOf(t *testing.T, pid int) (all []string) {
	t.Helper()
	lists, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, list := range lists {
		text, err := os.ReadFile(list)
		if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, syscall.ESRCH) { // a thread that has ended
			t.Fatal(err)
		}
		all = append(all, strings.Fields(string(text))...)
	}
	return all
}

func TestExecEnvironment(t *testing.T) {
	t.Parallel()
	given := []string{
		"HOME=/root", "AZURE_CLIENT_ID=id", "IDENTITY_ENDPOINT=elsewhere", "IDENTITY_HEADER=other", "MSI_ENDPOINT=x",
		"MSI_SECRET=x",
		"IDENTITY_SERVER_THUMBPRINT=x", "IMDS_ENDPOINT=x", "AZURE_FEDERATED_TOKEN_FILE=x", "AZURE_CLIENT_SECRET=x",
		"no_proxy=corp.example,localhost", "HTTPS_PROXY=http://proxy", "odd",
	}
	want := []string{
		"HOME=/root", "AZURE_CLIENT_ID=id", "HTTPS_PROXY=http://proxy", "odd", "IDENTITY_ENDPOINT=ours",
		"IDENTITY_HEADER=secret",
		"NO_PROXY=corp.example,localhost,127.0.0.1,::1", "no_proxy=corp.example,localhost,127.0.0.1,::1",
	}
	if got := environment(given, []string{"IDENTITY_ENDPOINT=ours", "IDENTITY_HEADER=secret"}); !slices.Equal(got,
		want) {
		t.Errorf("%q", got)
	}
}
