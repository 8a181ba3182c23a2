//go:build attacks

package attacks

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"perceptd/agent/api"
	"perceptd/cmd/perceptd/e2e/harness"
)

// The users of these tests. None of them need be in /etc/passwd.
const (
	daemonUser = 54300
	adminGroup = 54301 // percept-admin
	honestUser = 54310
	strayUser  = 54320 // the first of those without a grant
	ownUser    = 54330 // one with a grant
	adminUser  = 54340 // a member of percept-admin
)

const (
	memoryMax   = 256 << 20 // MemoryMax= of perceptd.service
	memoryBound = 128 << 20 // what all callers together may cause the daemon to have
	limitNoFile = 16384     // LimitNOFILE= of perceptd.service
	tasksMax    = 256       // TasksMax= of perceptd.service
)

// cgroup is one cgroup in every hierarchy that a test uses.
type cgroup struct{ dirs map[string]string } // by controller; "" is systemd's own

// stageNumber makes the names of cgroups differ.
var stageNumber atomic.Int64

// hierarchy returns where the root of a controller's hierarchy is mounted, on cgroups v1 and v2.
func hierarchy(controller string) string {
	places := []string{filepath.Join("/sys/fs/cgroup", controller)}
	if controller == "" {
		places = []string{"/sys/fs/cgroup/systemd", "/sys/fs/cgroup/unified"}
	}
	for _, place := range places {
		if _, err := os.Stat(filepath.Join(place, "cgroup.procs")); err == nil {
			return place
		}
	}
	return "/sys/fs/cgroup"
}

// makeCgroup makes a cgroup of that path with those controllers, and removes it when the test ends.
func makeCgroup(t *testing.T, path string, controllers ...string) cgroup {
	t.Helper()
	g := cgroup{dirs: make(map[string]string)}
	for _, controller := range append([]string{""}, controllers...) {
		root := hierarchy(controller)
		dir := root
		for _, step := range strings.Split(strings.Trim(path, "/"), "/") {
			if controller != "" && root == "/sys/fs/cgroup" { // v2: each step hands its controllers down
				must(t, os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+controller), 0))
			}
			dir = filepath.Join(dir, step)
			if err := os.Mkdir(dir, 0o755); err != nil && !os.IsExist(err) {
				t.Fatalf("the attacks need cgroups: %v", err)
			}
		}
		g.dirs[controller] = dir
		t.Cleanup(func() {
			for d := dir; d != root && os.Remove(d) == nil; d = filepath.Dir(d) {
			}
		})
	}
	return g
}

// procs are the files that a process enters the cgroup by.
func (g cgroup) procs() (files []string) {
	for _, dir := range g.dirs {
		files = append(files, filepath.Join(dir, "cgroup.procs"))
	}
	return files
}

// enter moves a process into the cgroup.
func (g cgroup) enter(t *testing.T, pid int) {
	t.Helper()
	for _, file := range g.procs() {
		must(t, os.WriteFile(file, []byte(strconv.Itoa(pid)), 0))
	}
}

// limit sets a limit by the name that cgroups v2 has for it, or else v1.
func (g cgroup) limit(t *testing.T, controller, v2, v1 string, value int) {
	t.Helper()
	for _, name := range []string{v2, v1} {
		file := filepath.Join(g.dirs[controller], name)
		if _, err := os.Stat(file); err == nil {
			must(t, os.WriteFile(file, []byte(strconv.Itoa(value)), 0))
			return
		}
	}
	t.Fatalf("%s has neither %s nor %s", g.dirs[controller], v2, v1)
}

// peak returns the most memory that the cgroup ever had, its sockets' and its kernel memory included.
func (g cgroup) peak(t *testing.T) int64 {
	t.Helper()
	for _, name := range []string{"memory.peak", "memory.max_usage_in_bytes"} {
		text, err := os.ReadFile(filepath.Join(g.dirs["memory"], name))
		if err == nil {
			n, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
			must(t, err)
			return n
		}
	}
	t.Fatal("the kernel does not say how much memory the daemon had (memory.peak, Linux 5.19)")
	return 0
}

// killed returns how often the kernel killed a process of the cgroup for its memory.
func (g cgroup) killed(t *testing.T) string {
	t.Helper()
	for _, name := range []string{"memory.events", "memory.oom_control"} {
		text, err := os.ReadFile(filepath.Join(g.dirs["memory"], name))
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(text)) {
			if n, ok := strings.CutPrefix(line, "oom_kill "); ok {
				return strings.TrimSpace(n)
			}
		}
	}
	t.Fatal("the kernel does not say whether it killed anything")
	return ""
}

// stage is a daemon as its unit runs it, which others attack: an ordinary user's process with the unit's limits, in a
// memory cgroup of the unit's size.
type stage struct {
	*harness.Daemon
	t        *testing.T
	memory   cgroup
	self     string // this test binary, where every user may run it
	name     string
	loopback string // the loopback listener's address

	mu       sync.Mutex // protects what follows
	statuses []string   // what the service manager was told
}

// theAttacked is a configuration with a module of its own socket, and grants for the honest user, for one that is not,
// and for the daemon's.
func theAttacked(loopback string) string {
	text := `[source]
kind = "simulated"

[[identity]]
name = "device"
default = true

[[module]]
name = "vision"
require = "socket"

[[module]]
name = "speech"
require = "socket"
`
	for _, who := range []string{`module = "vision"`, `module = "speech"`, fmt.Sprint("uid = ", honestUser),
		fmt.Sprint("uid = ", ownUser)} {
		text += fmt.Sprintf("\n[[grant]]\ncaller = { %s }\nidentity = \"device\"\nresources = [%q]\nprefetch = true\n",
			who, harness.VaultURI)
	}
	return harness.WithLoopback(text, loopback)
}

// newStage starts a daemon, and returns when it serves.
func newStage(t *testing.T) *stage {
	t.Helper()
	if os.Getuid() != 0 {
		t.Fatal("the attackers are other users: run make test-attacks as root")
	}
	s := &stage{t: t, name: fmt.Sprintf("percepttest-%d-%d", os.Getpid(), stageNumber.Add(1)),
		loopback: harness.FreeAddress(t)}
	dir := harness.ShortFolder(t)
	must(t, os.Chmod(dir, 0o755))
	s.self = filepath.Join(dir, "test")
	copyProgram(t, "/proc/self/exe", s.self)
	program := filepath.Join(dir, "perceptd")
	copyProgram(t, harness.Binary(t, "perceptd"), program)

	s.Daemon = &harness.Daemon{Dir: filepath.Join(dir, "run"), Config: filepath.Join(dir, "config.toml")}
	must(t, os.WriteFile(s.Config, []byte(theAttacked(s.loopback)), 0o644))
	s.makeFolders()
	s.memory = makeCgroup(t, "/system.slice/"+s.name+".service", "memory", "pids")
	s.memory.limit(t, "memory", "memory.max", "memory.limit_in_bytes", memoryMax)
	s.memory.limit(t, "memory", "memory.swap.max", "memory.swappiness", 0)
	s.memory.limit(t, "pids", "pids.max", "pids.max", tasksMax)

	// As perceptd.service has it: a user without capabilities, whose sockets systemd has made.
	script := fmt.Sprintf(`for f in %s; do echo $$ >"$f" || exit 1; done; ulimit -c 0; ulimit -n %d || exit 1
LISTEN_PID=$$ exec setpriv --reuid=%d --regid=%[3]d --clear-groups --inh-caps=-all --bounding-set=-all --no-new-privs "$0" "$@"`,
		strings.Join(s.memory.procs(), " "), limitNoFile, daemonUser)
	c := exec.Command("/bin/sh", append([]string{"-c", script, program}, s.arguments()...)...)
	c.ExtraFiles = []*os.File{s.listen(s.Token(), 0o666, 0, 0), s.listen(s.Admin(), 0o660, daemonUser, adminGroup)}
	s.Process = harness.Begin(t, []string{"LISTEN_FDS=2", "LISTEN_FDNAMES=token:admin", "NOTIFY_SOCKET=" + s.manager()},
		c)
	s.AwaitHealth(t)
	s.awaitTokens()
	return s
}

// arguments leaves the cache's key out, and has the log as it is shipped.
func (s *stage) arguments() []string {
	return []string{"--config", s.Config, "--runtime-dir", s.Dir, "--state-dir",
		filepath.Join(filepath.Dir(s.Dir), "state")}
}

func copyProgram(t *testing.T, from, to string) {
	t.Helper()
	text, err := os.ReadFile(from)
	must(t, err)
	must(t, harness.WriteProgram(to, text))
}

// makeFolders makes the runtime folder as perceptd.tmpfiles.conf says, and the state folder as the unit does.
func (s *stage) makeFolders() {
	s.t.Helper()
	text, err := os.ReadFile("../../../../systemd/perceptd.tmpfiles.conf")
	must(s.t, err)
	for line := range strings.Lines(string(text)) {
		field := strings.Fields(line)
		if len(field) < 5 || field[0] != "d" || !strings.HasPrefix(field[1], api.RuntimeDir) {
			continue
		}
		dir := s.Dir + strings.TrimPrefix(field[1], api.RuntimeDir)
		mode, err := strconv.ParseUint(field[2], 8, 12)
		must(s.t, err)
		must(s.t, os.Mkdir(dir, os.FileMode(mode)))
		owner := 0
		if field[3] == "percept" {
			owner = daemonUser
		}
		must(s.t, os.Chown(dir, owner, owner))
		must(s.t, os.Chmod(dir, os.FileMode(mode)))
	}
	if _, err := os.Stat(filepath.Join(s.Dir, api.ModulesDirName)); err != nil {
		s.t.Fatalf("perceptd.tmpfiles.conf makes no folder for modules: %v", err)
	}
	state := filepath.Join(filepath.Dir(s.Dir), "state")
	must(s.t, os.Mkdir(state, 0o700))
	must(s.t, os.Chown(state, daemonUser, daemonUser))
}

// listen makes a socket as a socket unit does.
func (s *stage) listen(path string, mode os.FileMode, user, group int) *os.File {
	s.t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	must(s.t, err)
	l.SetUnlinkOnClose(false)
	defer l.Close()
	must(s.t, os.Chown(path, user, group))
	must(s.t, os.Chmod(path, mode))
	file, err := l.File()
	must(s.t, err)
	s.t.Cleanup(func() { file.Close() })
	return file
}

// manager is a service manager that reads what it is told, and returns its socket's path.
func (s *stage) manager() string {
	s.t.Helper()
	path := filepath.Join(filepath.Dir(s.Dir), "notify")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	must(s.t, err)
	must(s.t, os.Chmod(path, 0o666))
	var reading sync.WaitGroup
	reading.Go(func() {
		for message := make([]byte, 4096); ; {
			n, _, _, _, err := l.ReadMsgUnix(message, make([]byte, 64))
			if err != nil {
				return
			}
			for line := range strings.Lines(string(message[:n])) {
				if text, ok := strings.CutPrefix(line, "STATUS="); ok {
					s.mu.Lock()
					s.statuses = append(s.statuses, strings.TrimSpace(text))
					s.mu.Unlock()
				}
			}
		}
	})
	s.t.Cleanup(func() { l.Close(); reading.Wait() })
	return path
}

func (s *stage) lastStatus() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.Join(s.statuses[max(0, len(s.statuses)-1):], "")
}

// awaitTokens waits until the back end has given what is prefetched, so that no flood is what it waits for.
func (s *stage) awaitTokens() {
	s.t.Helper()
	harness.Until(s.t, "the token", s.Ended, func() bool {
		tokens := s.Status(s.t).Tokens
		return len(tokens) == 1 && tokens[0].ExpiresIn > 0
	})
}

// descriptors returns how many the daemon has; 0 when it has ended.
func (s *stage) descriptors() int {
	there, _ := os.ReadDir(filepath.Join("/proc", strconv.Itoa(s.Cmd.Process.Pid), "fd"))
	return len(there)
}

// isAlive reports whether the process that was started is still there.
func (s *stage) isAlive() bool {
	select {
	case <-s.Ended:
		return false
	default:
		return true
	}
}

// troop is a process of another user that attacks or asks.
type troop struct {
	t        *testing.T
	who      string
	cmd      *exec.Cmd
	in       io.WriteCloser
	begun    chan struct{}
	ended    chan struct{}
	answered atomic.Int64 // of honest requests
	told     tally
	once     sync.Once
}

// soldier says who a troop is and where it stands.
type soldier struct {
	uid    uint32
	groups []uint32
	cgroup string // empty: a session of the user's
}

func (who soldier) place() string {
	if who.cgroup != "" {
		return who.cgroup
	}
	return fmt.Sprintf("/user.slice/user-%d.slice/session-1.scope", who.uid)
}

// send starts a process of that user, in its cgroup, with its orders, and returns when it has begun to obey them.
func (s *stage) send(who soldier, what orders) *troop {
	s.t.Helper()
	return dispatch(s.t, s.self, who, what)
}

func dispatch(t *testing.T, program string, who soldier, what orders) *troop {
	t.Helper()
	text, err := json.Marshal(what)
	must(t, err)
	c := exec.Command(program)
	c.Env = []string{ordersVariable + "=" + string(text), "GOGC=400"}
	c.Dir = "/"
	c.Stderr = os.Stderr
	c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: who.uid, Gid: who.uid,
		Groups: who.groups}}
	in, err := c.StdinPipe()
	must(t, err)
	out, err := c.StdoutPipe()
	must(t, err)
	tr := &troop{t: t, who: fmt.Sprintf("%s by uid %d", what.Kind, who.uid), cmd: c, in: in, begun: make(chan struct{}),
		ended: make(chan struct{})}
	group := makeCgroup(t, who.place())
	must(t, c.Start())
	t.Cleanup(func() { // before the cgroup is removed
		_ = c.Process.Kill()
		<-tr.ended
	})
	go tr.listen(out)
	group.enter(t, c.Process.Pid)
	if what.Kind != "honest" { // a busy machine is no part of what is tried
		must(t, syscall.Setpriority(syscall.PRIO_PROCESS, c.Process.Pid, 10))
	}
	_, err = io.WriteString(in, "go\n")
	must(t, err)
	return tr
}

func (tr *troop) listen(out io.Reader) {
	defer close(tr.ended)
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		switch word, rest, _ := strings.Cut(lines.Text(), " "); word {
		case "begun":
			close(tr.begun)
		case "answered":
			n, _ := strconv.ParseInt(rest, 10, 64)
			tr.answered.Store(n)
		case "told":
			_ = json.Unmarshal([]byte(rest), &tr.told)
		}
	}
	_ = tr.cmd.Wait()
}

// recall ends the troop and returns what came of it.
func (tr *troop) recall() tally {
	tr.once.Do(func() { _ = tr.in.Close() })
	<-tr.ended
	return tr.told
}

// audience are honest callers, who ask all the time.
type audience struct {
	s   *stage
	all map[string]*troop
}

// honest has a user, a module on its own socket and an administrator ask all the time.
func (s *stage) honest() *audience {
	s.t.Helper()
	ask := "GET " + harness.VaultToken + " HTTP/1.1\r\nHost: localhost\r\n\r\n"
	look := "GET " + api.PathStatus + " HTTP/1.1\r\nHost: localhost\r\n\r\n"
	return &audience{s, map[string]*troop{
		"an honest user": s.send(soldier{uid: honestUser}, orders{Kind: "honest", Network: "unix",
			Address: s.Token(), Request: ask}),
		"an honest module": s.send(soldier{uid: 0}, orders{Kind: "honest", Network: "unix", Address: s.Module("speech"),
			Request: ask}),
		"an honest admin": s.send(soldier{uid: honestUser + 1, groups: []uint32{adminGroup}},
			orders{Kind: "honest", Network: "unix", Address: s.Admin(), Request: look}),
	}}
}

// rounds waits until each of them has had that many answers, of whatever kind.
func (a *audience) rounds(n int64) {
	a.s.t.Helper()
	for name, tr := range a.all {
		from := tr.answered.Load()
		harness.Until(a.s.t, fmt.Sprintf("%d answers to %s", n, name), tr.ended,
			func() bool { return tr.answered.Load() >= from+n || !a.s.isAlive() })
	}
}

// judge ends them, and says whose requests were not answered.
func (a *audience) judge() (answered int64) {
	a.s.t.Helper()
	for name, tr := range a.all {
		told := tr.recall()
		answered += tr.answered.Load()
		if told.Failed > 0 {
			a.s.t.Errorf("%s: %d of %d requests got no 200: %s", name, told.Failed, tr.answered.Load(), told.Fault)
		}
	}
	return answered
}

// peakResident is the most memory that a process has had by itself, in bytes.
func peakResident(t *testing.T, pid int) int64 {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	must(t, err)
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			n, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
			must(t, err)
			return n << 10
		}
	}
	t.Fatalf("process %d has no VmHWM", pid)
	return 0
}

// awaitBegun waits until every connection of the troop has been made and used, or the attacked has ended.
func (tr *troop) awaitBegun(attacked <-chan struct{}) {
	tr.t.Helper()
	select {
	case <-tr.begun:
	case <-attacked:
	case <-tr.ended:
		tr.t.Errorf("%s has ended before its attack began", tr.who)
	case <-time.After(time.Minute):
		tr.t.Errorf("%s has not begun after a minute", tr.who)
	}
}
