package attest

import (
	"context"
	"encoding/json"
	"fmt"
	"log"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"perceptd/agent/grants"
)

func TestMain(m *testing.M) {
	if role := os.Getenv("CALLER_TEST_ROLE"); role != "" {
		os.Exit(runHelper(role))
	}
	syscall.Umask(0o022) // other users' processes look into folders of tests
	log.SetOutput(&standardLog)
	goleak.VerifyTestMain(m)
}

// bothWays runs test with the kernel's handles on processes and without, as on kernels before 6.5.
func bothWays(t *testing.T, test func(t *testing.T, o Options)) {
	t.Helper()
	t.Run("pidfd", func(t *testing.T) {
		t.Parallel()
		if !hasPeerPidfd() {
			t.Skip("this kernel has no SO_PEERPIDFD (Linux 6.5)")
		}
		test(t, Options{})
	})
	t.Run("proc", func(t *testing.T) { t.Parallel(); test(t, Options{NoPidfd: true}) })
}

// fixture is a socket with a prover behind it, in front of a /proc that says what a test wants.
type fixture struct {
	*Attestor
	t    *testing.T
	proc string // its /proc; empty: the real one
	path string
	l    net.Listener
}

// newFixture has a /proc of its own, in which this process and the first are on the host.
func newFixture(t *testing.T, o Options) *fixture {
	t.Helper()
	s := &fixture{t: t, proc: newProc(t)}
	o.Proc = s.proc
	s.putProcess(1, "/init.scope")
	s.putProcess(os.Getpid(), "/")
	s.open(o)
	return s
}

// newProc returns a folder that is this process's own /proc by its name for it, and empty otherwise.
func newProc(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Symlink(strconv.Itoa(os.Getpid()), filepath.Join(dir, "self")); err != nil {
		t.Fatal(err)
	}
	return dir
}

func (f *fixture) open(o Options) {
	f.t.Helper()
	o.TrustOwnUser = true // the engine is this test's own
	f.Attestor = New(o)
	f.t.Cleanup(f.Close)
	f.path = filepath.Join(shortFolder(f.t), "s")
	l, err := net.Listen("unix", f.path)
	if err != nil {
		f.t.Fatal(err)
	}
	f.l = f.Listen(l)
	f.t.Cleanup(func() { f.l.Close() })
	_ = f.l.(*listener).pollQueue() // as a daemon does that has waited before
}

// ageCallers has the callers that wait be older than the last look at the queue, as nearly all are.
func (f *fixture) ageCallers() { f.l.(*listener).queueEmptyAt.Store(int64(sinceBoot() + 2*tick)) }

// putProcess writes the files of a process in the scene's /proc.
func (f *fixture) putProcess(pid int, cgroup string) {
	f.t.Helper()
	f.write(pid, "cgroup", inAllHierarchies(cgroup))
	f.write(pid, "statm", "100 10 10 1 0 10 0\n")
	f.write(pid, "stat", fmt.Sprintf("%d (x) S 1%s 5 0\n", pid, strings.Repeat(" 0", 17)))
	f.write(pid, "status", fmt.Sprintf("Name:\tx\nUid:\t%d\t%[1]d\t%[1]d\t%[1]d\nGid:\t0\t0\t0\t0\n", os.Getuid()))
}

func (f *fixture) write(pid int, file, text string) {
	f.t.Helper()
	dir := filepath.Join(f.proc, strconv.Itoa(pid))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		f.t.Fatal(err)
	}
	// In place: an open file stays that of the process.
	if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0o644); err != nil {
		f.t.Fatal(err)
	}
}

// accept returns the proof of the next connection, and the daemon's end of it.
func (f *fixture) accept(from Socket) (*Attestation, net.Conn) {
	f.t.Helper()
	conn, err := f.l.Accept()
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { conn.Close() })
	attestation, err := FromContext(f.NewContext(context.Background(), conn, from))
	if err != nil {
		f.t.Fatal(err)
	}
	return attestation, conn
}

// dial connects from this process and returns the proof, and both ends.
func (f *fixture) dial(from Socket) (attestation *Attestation, peer *net.UnixConn, conn net.Conn) {
	f.t.Helper()
	dialed, err := net.Dial("unix", f.path)
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { dialed.Close() })
	attestation, conn = f.accept(from)
	return attestation, dialed.(*net.UnixConn), conn
}

// callerIn returns who this process, in that cgroup if the scene has a /proc of its own, is proved to be on that socket.
func (f *fixture) callerIn(cgroup string, from Socket) (grants.Caller, error) {
	f.t.Helper()
	if f.proc != "" {
		f.putProcess(os.Getpid(), cgroup)
	}
	attestation, _, _ := f.dial(from)
	return attestation.Caller(context.Background())
}

// checkDenied checks that a proof failed, and that what it says contains want.
func checkDenied(t *testing.T, what string, err error, want string) {
	t.Helper()
	if err == nil {
		t.Errorf("%s: proved", what)
		return
	}
	if e := new(Error); !asError(err, &e) || !strings.Contains(e.Error(), want) {
		t.Errorf("%s: %v, want %q", what, err, want)
	}
}

func asError(err error, into **Error) bool {
	e, ok := err.(*Error)
	if ok {
		*into = e
	}
	return ok
}

// inspectAnswer is what a fake engine answers about a container: the parts of Docker's answer that are read.
type inspectAnswer struct {
	ID         string `json:"Id"`
	Name       string
	Image      string
	State      map[string]any
	Config     map[string]any
	HostConfig map[string]any
}

// honestAnswer is what an engine says of a container that runs, with its first process in that pid.
func honestAnswer(id, name string, pid int) inspectAnswer {
	return inspectAnswer{
		ID: id, Name: "/" + name, Image: "sha256:" + idB,
		State:      map[string]any{"Running": true, "Pid": pid, "StartedAt": "2026-11-23T08:00:00.5Z"},
		Config:     map[string]any{"Image": "vision:1", "Labels": map[string]string{}},
		HostConfig: map[string]any{"CgroupParent": "", "PidMode": ""},
	}
}

// fakeEngine answers like a container engine on a real socket.
type fakeEngine struct {
	path string

	mu       sync.Mutex
	asked    int
	handlers map[string]http.HandlerFunc // by container ID or image
}

func newFakeEngine(t testing.TB) *fakeEngine {
	t.Helper()
	e := &fakeEngine{path: filepath.Join(shortFolder(t), "engine.sock"), handlers: make(map[string]http.HandlerFunc)}
	l, err := net.Listen("unix", e.path)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: e}
	done := make(chan struct{})
	go func() { defer close(done); _ = server.Serve(l) }()
	t.Cleanup(func() { server.Close(); <-done })
	e.answer("sha256:"+idB, map[string]any{"Id": "sha256:" + idB, "RepoDigests": []string{"registry.example/vision@sha256:" + idA}})
	return e
}

// answer has the engine say that of a container or image.
func (e *fakeEngine) answer(about string, value any) {
	e.serve(about, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(value)
	})
}

func (e *fakeEngine) serve(about string, handler http.HandlerFunc) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.handlers[about] = handler
}

func (e *fakeEngine) questions() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.asked
}

func (e *fakeEngine) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if strings.HasSuffix(r.URL.Path, "/_ping") {
		e.mu.Lock()
		ping := e.handlers["ping"]
		e.mu.Unlock()
		if ping != nil {
			ping(w, r)
			return
		}
		w.Header().Set("Api-Version", "1.41")
		return
	}
	parts := strings.Split(r.URL.Path, "/") // "", "v1.41", "containers", ID, "json"
	e.mu.Lock()
	e.asked++
	var handler http.HandlerFunc
	if len(parts) == 5 && parts[1] == "v1.41" {
		handler = e.handlers[parts[3]]
	}
	e.mu.Unlock()
	if handler == nil {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusNotFound)
		_, _ = w.Write([]byte(`{"message":"No such container"}`))
		return
	}
	handler(w, r)
}

// quickEnd has a process under the race detector not wait a second before it ends.
const quickEnd = "GORACE=atexit_sleep_ms=0"

// helper is another process, which plays a role that play knows.
type helper struct {
	t    *testing.T
	cmd  *exec.Cmd
	wire *net.UnixConn // by which it is told what to do, and hands over descriptors
}

// start starts an actor that connects to the scene's socket and hands its end over. Each change is made to how it is started.
func (f *fixture) start(role string, changes ...func(*exec.Cmd)) *helper {
	f.t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		f.t.Fatal(err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "ours"), os.NewFile(uintptr(pair[1]), "theirs")
	defer ours.Close()
	defer theirs.Close()
	wire, err := net.FileConn(ours)
	if err != nil {
		f.t.Fatal(err)
	}
	a := &helper{t: f.t, cmd: exec.Command("/proc/self/exe"), wire: wire.(*net.UnixConn)}
	a.cmd.Env = append(os.Environ(), quickEnd, "CALLER_TEST_ROLE="+role, "CALLER_TEST_SOCKET="+f.path)
	a.cmd.ExtraFiles = []*os.File{theirs}
	a.cmd.Stderr = os.Stderr
	for _, change := range changes {
		change(a.cmd)
	}
	if err := a.cmd.Start(); err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(a.end)
	return a
}

// do gives the actor its cue.
func (h *helper) do(cue byte) {
	h.t.Helper()
	if _, err := h.wire.Write([]byte{cue}); err != nil {
		h.t.Fatal(err)
	}
}

// done waits for the actor to have done something, and returns the connection that it hands over, if any.
func (h *helper) done() net.Conn {
	h.t.Helper()
	control := make([]byte, 64)
	_, n, _, _, err := h.wire.ReadMsgUnix(make([]byte, 1), control)
	if err != nil {
		h.t.Fatal(err)
	}
	if n == 0 {
		return nil
	}
	messages, err := unix.ParseSocketControlMessage(control[:n])
	if err != nil {
		h.t.Fatal(err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		h.t.Fatal(err)
	}
	file := os.NewFile(uintptr(fds[0]), "handed over")
	defer file.Close()
	conn, err := net.FileConn(file)
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { conn.Close() })
	return conn
}

// end ends the actor and waits until nothing is left of it.
func (h *helper) end() {
	h.wire.Close()
	_ = h.cmd.Wait() // twice is an error, which nobody minds
}

// runHelper is an actor's life. It connects, hands its end over, writes when it is told to ("w"), turns into another
// program ("x"), or one that runs as its owner ("s"), and ends with its wire.
func runHelper(role string) int {
	if role == "idle" { // until its input ends
		_, _ = os.Stdin.Read(make([]byte, 1))
		return 0
	}
	switch role {
	case "forged":
		if err := os.WriteFile(fmt.Sprintf("/proc/self/task/%d/comm", os.Getpid()), []byte("x) 1 1 1\nUid:\t4242"), 0); err != nil {
			return 1
		}
	case "grouped":
		groups := make([]int, 100)
		for i := range groups {
			groups[i] = 1000 + i
		}
		if err := syscall.Setgroups(groups); err != nil { // of every thread
			return 1
		}
	}
	wire := os.NewFile(3, "wire")
	var conn *os.File
	if role == "connected" { // what it was before has left it the connection
		conn = os.NewFile(4, "connection")
	} else {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
		if err != nil {
			return 1
		}
		if err := unix.Connect(fd, &unix.SockaddrUnix{Name: os.Getenv("CALLER_TEST_SOCKET")}); err != nil {
			return 1
		}
		conn = os.NewFile(uintptr(fd), "connection")
		if err := unix.Sendmsg(3, []byte{'c'}, unix.UnixRights(fd), nil, 0); err != nil {
			return 1
		}
	}
	for {
		cue := make([]byte, 1)
		if n, err := wire.Read(cue); n == 0 || err != nil {
			return 0
		}
		switch cue[0] {
		case 'w':
			if _, err := conn.WriteString("x"); err != nil {
				return 1
			}
		case 'x', 's':
			program := "/proc/self/exe"
			if cue[0] == 's' {
				program = os.Getenv("CALLER_TEST_SETUID")
			}
			if err := unix.Dup3(int(conn.Fd()), 4, 0); err != nil && conn.Fd() != 4 {
				return 1
			}
			_, _ = unix.FcntlInt(3, unix.F_SETFD, 0)
			_, _ = unix.FcntlInt(4, unix.F_SETFD, 0)
			env := append([]string{"CALLER_TEST_ROLE=connected"}, os.Environ()...) // the first counts
			_ = unix.Exec(program, []string{"victim"}, env)
			return 1
		}
		if _, err := wire.WriteString("d"); err != nil {
			return 0
		}
	}
}

// slow has an engine answer when it is told to; asked tells of each question.
func (e *fakeEngine) slow(about string, value any) (asked, release chan struct{}) {
	asked, release = make(chan struct{}, 8), make(chan struct{})
	e.serve(about, func(w http.ResponseWriter, r *http.Request) {
		asked <- struct{}{}
		select {
		case <-release:
			w.Header().Set("Content-Type", "application/json")
			_ = json.NewEncoder(w).Encode(value)
		case <-r.Context().Done():
		}
	})
	return asked, release
}

// shortFolder makes a folder for a test's sockets, whose paths may have 107 bytes: TMPDIR, where t.TempDir is, may be longer than that.
func shortFolder(t testing.TB) string {
	t.Helper()
	folder, err := os.MkdirTemp("/tmp", "percept")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(folder) })
	return folder
}
