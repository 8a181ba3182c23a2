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
	syscall.Umask(0o022) // processes of other users read folders of tests
	log.SetOutput(&standardLog)
	goleak.VerifyTestMain(m)
}

// bothWays runs test with SO_PEERPIDFD and without it, as on kernels before 6.5.
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

// fixture is an Attestor with a socket, and with a /proc whose files a test writes.
type fixture struct {
	*Attestor
	t    *testing.T
	proc string // its /proc; empty: the real one

	cgroups string // its /sys/fs/cgroup, beside its /proc

	path string
	l    net.Listener
}

// newFixture returns a fixture with its own /proc, in which this process and process 1 run on the host.
func newFixture(t *testing.T, o Options) *fixture {
	t.Helper()
	s := &fixture{t: t, proc: newProc(t)}
	s.cgroups = t.TempDir()
	o.Proc, o.Cgroups = s.proc, s.cgroups
	s.putProcess(1, "/init.scope")
	s.putProcess(os.Getpid(), "/")
	s.open(o)
	return s
}

// newProc returns an empty folder whose "self" link names this process.
func newProc(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Symlink(strconv.Itoa(os.Getpid()), filepath.Join(dir, "self")); err != nil {
		t.Fatal(err)
	}
	return dir
}

// open makes the Attestor and its socket.
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
	_ = f.l.(*listener).pollQueue() // as in a daemon that has waited for connections
}

// ageCallers pretends that the queue was seen empty just now, so that the callers that wait are older than that, as
// nearly all callers are.
func (f *fixture) ageCallers() { f.l.(*listener).queueEmptyAt.Store(int64(sinceBoot() + 2*tick)) }

// putProcess writes the files of a process in the fixture's /proc, and makes its cgroup where its owner counts.
func (f *fixture) putProcess(pid int, cgroup string) {
	f.t.Helper()
	if strings.Contains(cgroup, splitLeaf) {
		f.putCgroup(cgroup, 0o755)
	}
	f.putProcessFiles(pid, cgroup)
}

// putProcessFiles writes the files of a process in the fixture's /proc.
func (f *fixture) putProcessFiles(pid int, cgroup string) {
	f.t.Helper()
	f.write(pid, "cgroup", inAllHierarchies(cgroup))
	f.write(pid, "statm", "100 10 10 1 0 10 0\n")
	f.write(pid, "stat", fmt.Sprintf("%d (x) S 1%s 5 0\n", pid, strings.Repeat(" 0", 17)))
	f.write(pid, "status", fmt.Sprintf("Name:\tx\nUid:\t%d\t%[1]d\t%[1]d\t%[1]d\nGid:\t0\t0\t0\t0\n", os.Getuid()))
}

// putCgroup makes a cgroup in the fixture's /sys/fs/cgroup, with that mode.
func (f *fixture) putCgroup(cgroup string, mode os.FileMode) {
	f.t.Helper()
	dir := filepath.Join(f.cgroups, "systemd", cgroup)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		f.t.Fatal(err)
	}
	if err := os.Chmod(dir, mode); err != nil {
		f.t.Fatal(err)
	}
}

func (f *fixture) write(pid int, file, text string) {
	f.t.Helper()
	dir := filepath.Join(f.proc, strconv.Itoa(pid))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		f.t.Fatal(err)
	}
	// Written in place, so that an open file stays the process's.
	if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0o644); err != nil {
		f.t.Fatal(err)
	}
}

// accept returns the attestation of the next connection, and the daemon's end of it.
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

// dial connects from this process and returns the attestation and both ends.
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

// callerIn attests this process on that socket. If the fixture has its own /proc, the process is in that cgroup.
func (f *fixture) callerIn(cgroup string, from Socket) (grants.Caller, error) {
	f.t.Helper()
	if f.proc != "" {
		f.putProcess(os.Getpid(), cgroup)
	}
	attestation, _, _ := f.dial(from)
	return attestation.Caller(context.Background())
}

// checkDenied checks that an attestation failed with an Error that contains want.
func checkDenied(t *testing.T, what string, err error, want string) {
	t.Helper()
	if err == nil {
		t.Errorf("%s: attested", what)
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

// shortFolder makes a folder for a test's sockets. A socket's path has at most 107 bytes, and TMPDIR, where t.TempDir
// is, may be longer.
func shortFolder(t testing.TB) string {
	t.Helper()
	folder, err := os.MkdirTemp("/tmp", "percept")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(folder) })
	return folder
}

// inspectAnswer is a fake engine's answer about a container: the parts of Docker's answer that are read.
type inspectAnswer struct {
	ID         string `json:"Id"`
	Name       string
	Image      string
	Pod        string `json:",omitempty"`
	State      map[string]any
	Config     map[string]any
	HostConfig map[string]any
}

// honestAnswer is the answer about a running container whose first process is pid.
func honestAnswer(id, name string, pid int) inspectAnswer {
	return inspectAnswer{
		ID: id, Name: "/" + name, Image: "sha256:" + idB,
		State:      map[string]any{"Running": true, "Pid": pid, "StartedAt": "2026-11-23T08:00:00.5Z"},
		Config:     map[string]any{"Image": "vision:1", "Labels": map[string]string{}},
		HostConfig: map[string]any{"CgroupParent": "", "PidMode": ""},
	}
}

// podmanAnswer is honestAnswer by Podman's own API, about a container in that cgroup and pod.
func podmanAnswer(id, name, cgroup, pod string, pid int) inspectAnswer {
	answer := honestAnswer(id, name, pid)
	answer.Name, answer.Image, answer.Pod = name, idB, pod
	answer.State["CgroupPath"], answer.HostConfig["PidMode"] = cgroup, "private"
	return answer
}

// fakeEngine is a container engine on a real socket.
type fakeEngine struct {
	path string

	mu       sync.Mutex
	libpod   string // the version of Podman's own API; empty: it is Docker
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
	e.answer("sha256:"+idB, map[string]any{
		"Id": "sha256:" + idB, "RepoDigests": []string{"registry.example/vision@sha256:" + idA},
	})
	return e
}

// answer makes the engine return value for a container or image.
func (e *fakeEngine) answer(about string, value any) {
	e.serve(about, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(value)
	})
}

// become makes the engine Podman with that version of its own API.
func (e *fakeEngine) become(libpod string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.libpod = libpod
}

// serve makes the engine answer calls about a container or image with handler.
func (e *fakeEngine) serve(about string, handler http.HandlerFunc) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.handlers[about] = handler
}

// slow makes the engine answer when release is closed. asked receives a value for each call.
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

// questions returns how many calls the engine has received, without pings.
func (e *fakeEngine) questions() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.asked
}

func (e *fakeEngine) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	e.mu.Lock()
	ping, libpod := e.handlers["ping"], e.libpod
	e.mu.Unlock()
	if strings.HasSuffix(r.URL.Path, "/_ping") {
		if ping != nil {
			ping(w, r)
			return
		}
		w.Header().Set("Api-Version", "1.41")
		if libpod != "" {
			w.Header().Set("Libpod-Api-Version", libpod)
		}
		return
	}
	asked := strings.Replace(r.URL.Path, "/v"+libpod+"/libpod/containers/", "/v1.41/containers/", 1)
	parts := strings.Split(asked, "/") // "", "v1.41", "containers", ID, "json"
	if asked == r.URL.Path && libpod != "" && strings.Contains(asked, "/containers/") {
		parts = nil // in Docker's API Podman does not name a container's cgroup
	}
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

// quickEnd lets a process under the race detector end without a delay of a second.
const quickEnd = "GORACE=atexit_sleep_ms=0"

// helper is another process, which runs runHelper.
type helper struct {
	t    *testing.T
	cmd  *exec.Cmd
	wire *net.UnixConn // carries commands to it, and descriptors back
}

// start starts a helper that connects to the fixture's socket and sends back its end. changes are applied to its
// command.
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

// do sends the helper a command.
func (h *helper) do(cue byte) {
	h.t.Helper()
	if _, err := h.wire.Write([]byte{cue}); err != nil {
		h.t.Fatal(err)
	}
}

// done waits until the helper has executed a command, and returns the connection that it sends back, if any.
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

// end ends the helper and waits until it is gone.
func (h *helper) end() {
	h.wire.Close()
	_ = h.cmd.Wait() // fails if it was called before
}

// runHelper is the main function of a helper. It connects and sends back its end. Then it executes commands: "w"
// writes on the connection, "x" executes this program again, and "s" executes the one in CALLER_TEST_SETUID. It ends
// when its wire is closed.
func runHelper(role string) int {
	if role == "idle" { // until its input ends
		_, _ = os.Stdin.Read(make([]byte, 1))
		return 0
	}
	switch role {
	case "forged":
		comm := fmt.Sprintf("/proc/self/task/%d/comm", os.Getpid())
		if err := os.WriteFile(comm, []byte("x) 1 1 1\nUid:\t4242"), 0); err != nil {
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
	if role == "connected" { // the program that it was before left it the connection
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
			env := append([]string{"CALLER_TEST_ROLE=connected"}, os.Environ()...) // the first one of a name counts
			_ = unix.Exec(program, []string{"victim"}, env)
			return 1
		}
		if _, err := wire.WriteString("d"); err != nil {
			return 0
		}
	}
}
