package daemon

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"perceptd/agent/api"
	"perceptd/cmd/perceptd/e2e/harness"
)

// The names by which systemd keeps what the daemon stores with it. They are written out here since the version after
// has to know them again.
const (
	fdModule = "module-"
	fdCache  = "cache-"
)

func fdName(module string, inode uint64) string {
	return fmt.Sprintf("%s%s-%d", fdModule, module, inode)
}

// fdStore is a service manager that keeps descriptors, as systemd does: in order, several by one name, none twice.
type fdStore struct {
	path string

	mu   sync.Mutex // protects what follows
	kept []*os.File
}

func newFDStore(t *testing.T) *fdStore {
	t.Helper()
	s := &fdStore{path: filepath.Join(harness.ShortFolder(t), "n")}
	manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: s.path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	var reading sync.WaitGroup
	reading.Go(func() {
		for {
			message, control := make([]byte, 4096), make([]byte, 64)
			n, rights, _, _, err := manager.ReadMsgUnix(message, control)
			if err != nil {
				return
			}
			s.take(strings.Split(string(message[:n]), "\n"), control[:rights])
		}
	})
	t.Cleanup(func() {
		manager.Close()
		reading.Wait()
		s.clear()
	})
	return s
}

func (s *fdStore) take(assignments []string, control []byte) {
	name := ""
	for _, assignment := range assignments {
		if value, ok := strings.CutPrefix(assignment, "FDNAME="); ok {
			name = value
		}
	}
	switch assignments[0] {
	case "FDSTORE=1":
		messages, _ := unix.ParseSocketControlMessage(control)
		fds, _ := unix.ParseUnixRights(&messages[0])
		s.put(os.NewFile(uintptr(fds[0]), name))
	case "FDSTOREREMOVE=1":
		s.remove(func(file *os.File) bool { return file.Name() == name })
	}
}

func (s *fdStore) put(file *os.File) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, one := range s.kept {
		here, errHere := one.Stat()
		there, errThere := file.Stat()
		if errHere == nil && errThere == nil && os.SameFile(here, there) {
			file.Close()
			return
		}
	}
	s.kept = append(s.kept, file)
}

func (s *fdStore) remove(which func(*os.File) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.kept = slices.DeleteFunc(s.kept, func(file *os.File) bool {
		if !which(file) {
			return false
		}
		file.Close()
		return true
	})
}

// clear is what a stop of the service does.
func (s *fdStore) clear() { s.remove(func(*os.File) bool { return true }) }

// names lists the sockets that are kept.
func (s *fdStore) names() []string {
	return slices.DeleteFunc(s.all(), func(name string) bool { return strings.HasPrefix(name, fdCache) })
}

func (s *fdStore) all() (names []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, file := range s.kept {
		names = append(names, file.Name())
	}
	return names
}

// start starts a daemon with what is kept.
func (s *fdStore) start(t *testing.T, d *harness.Daemon, environment ...string) {
	t.Helper()
	c := exec.Command("/bin/sh", append([]string{"-c", `LISTEN_PID=$$ exec "$0" "$@"`, harness.Binary(t, "perceptd")},
		d.Arguments()...)...)
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []string
	for _, file := range s.kept {
		all = append(all, file.Name())
	}
	names := strings.Join(all, ":")
	c.ExtraFiles = slices.Clone(s.kept)
	d.Process = harness.Begin(t, append(environment, "NOTIFY_SOCKET="+s.path, "LISTEN_FDS="+strconv.Itoa(len(s.kept)),
		"LISTEN_FDNAMES="+names), c)
}

func inodeOf(t *testing.T, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

// A module's clients wait through a restart and a crash of the daemon, on the same socket.
func TestModuleSocketsAreKept(t *testing.T) {
	t.Parallel()
	harness.Binary(t, "perceptd")
	store := newFDStore(t)
	d := harness.NewDaemon(t, harness.SimulatedFor("vision", "gone"))
	store.start(t, d)
	d.AwaitHealth(t)
	inode := inodeOf(t, d.Module("vision"))
	harness.Until(t, "both sockets to be stored", d.Ended, func() bool { return len(store.names()) == 2 })
	for _, end := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		if err := d.Cmd.Process.Signal(end); err != nil {
			t.Fatal(err)
		}
		<-d.Ended
		conn, err := net.Dial("unix", d.Module("vision"))
		if err != nil {
			t.Fatalf("nobody can wait after %v: %v", end, err)
		}
		conn.Close()
		answered := make(chan int)
		go func() {
			status, _, _ := d.Get(d.Module("vision"), harness.VaultToken)
			answered <- status
		}()
		if end == syscall.SIGKILL { // meanwhile the configuration has lost one
			d.Rewrite(t, harness.SimulatedFor("vision"))
		}
		store.start(t, d)
		if got := <-answered; got != 200 {
			t.Errorf("who waited after %v got %d", end, got)
		}
		d.AwaitHealth(t)
		if inodeOf(t, d.Module("vision")) != inode {
			t.Errorf("another socket after %v", end)
		}
	}
	harness.Until(t, "the other one to be discarded", d.Ended, func() bool { return len(store.names()) == 1 })
	if _, err := os.Lstat(d.Module("gone")); err == nil {
		t.Error("the socket of the module that was removed is still there")
	}

	// What was stored is of no use when something else is at its path.
	d.Stop(t)
	if err := os.Remove(d.Module("vision")); err != nil {
		t.Fatal(err)
	}
	store.start(t, d)
	d.AwaitHealth(t)
	if status, _, err := d.Get(d.Module("vision"), harness.VaultToken); status != 200 {
		t.Errorf("made anew: %d %v", status, err)
	}
	harness.Until(t, "the new one to be stored in the old one's place", d.Ended, func() bool {
		names := store.names()
		return len(names) == 1 && names[0] == fdName("vision", inodeOf(t, d.Module("vision")))
	})
	if !strings.Contains(d.Text(), "a stored socket is of no use any more") {
		t.Error("the log does not say so")
	}
}

// A module's socket comes and goes with the configuration, and its folder stays, so that a container that has it
// mounted all the while finds the socket again: also over restarts, and whatever the module has put there.
func TestModuleFoldersStay(t *testing.T) {
	t.Parallel()
	d := harness.LaunchDaemon(t, harness.SimulatedFor("vision", "speech"))
	if err := os.WriteFile(filepath.Join(filepath.Dir(d.Module("speech")), "its own"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	mounted := mount(t, filepath.Dir(d.Module("vision")))
	reload := func(modules ...string) {
		t.Helper()
		status, body := d.Reload(t, harness.SimulatedFor(modules...))
		if status != 200 || strings.Contains(body, "removed") {
			t.Fatalf("%d %s", status, body)
		}
	}
	serves := func(when string) {
		t.Helper()
		for _, socket := range []string{mounted, d.Module("speech")} {
			if status, _, err := d.Get(socket, harness.VaultToken); status != 200 {
				t.Errorf("%s: %s: %d %v", when, socket, status, err)
			}
		}
	}
	without := func(when string) {
		t.Helper()
		for _, module := range []string{"vision", "speech"} {
			if _, err := os.Lstat(d.Module(module)); err == nil {
				t.Errorf("%s: module %s has its socket still", when, module)
			}
		}
		if trouble := d.Status(t).Trouble; len(trouble) != 0 {
			t.Errorf("%s: %q", when, trouble)
		}
	}
	reload("other")
	without("taken out")
	reload("vision", "speech")
	serves("put back")
	if err := d.Cmd.Process.Kill(); err != nil { // which leaves its sockets
		t.Fatal(err)
	}
	<-d.Ended
	d.Rewrite(t, harness.SimulatedFor("other"))
	d.Again(t)
	without("taken out while no daemon ran")
	reload("vision", "speech")
	serves("put back after a restart")
}

// Where a module's folder itself was removed, its container is left on the old one, and the reload that makes another
// says so, once.
func TestRemovedModuleFolder(t *testing.T) {
	t.Parallel()
	harness.Binary(t, "perceptd")
	store := newFDStore(t)
	d := harness.NewDaemon(t, harness.SimulatedFor("vision"))
	store.start(t, d)
	d.AwaitHealth(t)
	says := func(when string, want bool) {
		t.Helper()
		status, body := d.Reload(t, harness.SimulatedFor("vision"))
		if status != 200 || strings.Contains(body, "folder of module vision was removed") != want {
			t.Errorf("%s: %d %s", when, status, body)
		}
		if status, _, err := d.Get(d.Module("vision"), harness.VaultToken); status != 200 {
			t.Errorf("%s: %d %v", when, status, err)
		}
	}
	remove := func() {
		t.Helper()
		mount(t, filepath.Dir(d.Module("vision")))
		if err := os.RemoveAll(filepath.Dir(d.Module("vision"))); err != nil {
			t.Fatal(err)
		}
	}
	says("as it was", false)
	remove()
	says("removed while the daemon runs", true)
	says("said already", false)
	harness.Until(t, "the socket to be stored", d.Ended, func() bool {
		return slices.Equal(store.names(), []string{fdName("vision", inodeOf(t, d.Module("vision")))})
	})
	d.Stop(t)
	remove()
	store.start(t, d)
	d.AwaitHealth(t)
	says("removed while no daemon ran", true)
}

// mount opens a folder as a container has it mounted, whatever becomes of its path, and returns the path of the
// module's socket in it.
func mount(t *testing.T, folder string) string {
	t.Helper()
	held, err := os.Open(folder)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = held.Close() })
	return fmt.Sprintf("/proc/self/fd/%d/%s", held.Fd(), api.TokenSocketName)
}

// A store that is full costs a module what it is there for and nothing else, and is told of.
func TestFullStore(t *testing.T) {
	t.Parallel()
	harness.Binary(t, "perceptd")
	store := newFDStore(t)
	d := harness.NewDaemon(t, harness.SimulatedFor("a", "b", "c"))
	store.start(t, d, "FDSTORE=5")
	d.AwaitHealth(t)
	for _, module := range []string{"a", "b", "c"} {
		if status, _, err := d.Get(d.Module(module), harness.VaultToken); status != 200 {
			t.Errorf("module %s: %d %v", module, status, err)
		}
	}
	trouble := strings.Join(d.Status(t).Trouble, "\n")
	for _, part := range []string{"module b and 1 more: the socket is not kept through a restart",
		"systemd keeps 1 sockets", "FileDescriptorStoreMax="} {
		if !strings.Contains(trouble, part) {
			t.Errorf("trouble %q says nothing of %q", trouble, part)
		}
	}
	if names := store.names(); len(names) != 1 || names[0] != fdName("a", inodeOf(t, d.Module("a"))) {
		t.Errorf("stored %q", names)
	}
	if status := d.Stop(t); status != 0 {
		t.Errorf("exit status %d", status)
	}
	if conn, err := net.Dial("unix", d.Module("a")); err != nil {
		t.Errorf("nobody can wait: %v", err)
	} else {
		conn.Close()
	}
	if _, err := os.Lstat(d.Module("b")); err == nil {
		t.Error("a socket that is not kept is left where nobody will answer")
	}

	// What a module that was removed has left is another's.
	store.start(t, d, "FDSTORE=5")
	d.AwaitHealth(t)
	if status, body := d.Reload(t, harness.SimulatedFor("b")); status != 200 {
		t.Fatal(body)
	}
	if trouble := d.Status(t).Trouble; len(trouble) != 0 {
		t.Errorf("trouble %q", trouble)
	}
	harness.Until(t, "b to be stored", d.Ended, func() bool {
		return slices.Equal(store.names(), []string{fdName("b", inodeOf(t, d.Module("b")))})
	})
}

// TestManyModules: with more modules than systemd keeps sockets of, as the unit is shipped, all are served and the
// status names those beyond. A restart costs these, and only these, the requests that come meanwhile: their sockets are
// made anew in the same folders. Each takes three descriptors.
func TestManyModules(t *testing.T) {
	t.Parallel()
	harness.Binary(t, "perceptd")
	const modules, kept = 260, 252 // 256 places, of which 4 are for the cache's hand-over
	var names []string
	for i := range modules {
		names = append(names, fmt.Sprintf("m%03d", i))
	}
	store := newFDStore(t)
	d := harness.NewDaemon(t, harness.SimulatedFor(names[0]))
	descriptors := func() int {
		entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", d.Cmd.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	store.start(t, d)
	d.AwaitHealth(t)
	few := descriptors()
	if status, body := d.Reload(t, harness.SimulatedFor(names...)); status != 200 {
		t.Fatal(body)
	}
	// Connections come and go beside them.
	if each := float64(descriptors()-few) / (modules - 1); each < 2.9 || each > 3.1 {
		t.Errorf("a module takes %.2f descriptors", each)
	}
	sockets := func() (kept []string) {
		harness.Until(t, "the sockets to be stored", d.Ended, func() bool {
			kept = kept[:0]
			for _, name := range store.names() {
				if strings.HasPrefix(name, fdModule) {
					kept = append(kept, name)
				}
			}
			return len(kept) >= 252 // and no more, which is looked at below
		})
		return kept
	}
	serves := func(when string) {
		t.Helper()
		for _, name := range names {
			if status, body, err := d.Get(d.Module(name), harness.VaultToken); status != 200 {
				t.Fatalf("%s: %s: %d %s %v", when, name, status, body, err)
			}
		}
		trouble := strings.Join(d.Status(t).Trouble, "\n")
		for _, part := range []string{"module m252 and 7 more: the socket is not kept through a restart",
			"systemd keeps 252 sockets", "FileDescriptorStoreMax="} {
			if !strings.Contains(trouble, part) {
				t.Errorf("%s: trouble %q says nothing of %q", when, trouble, part)
			}
		}
		if n := len(sockets()); n != kept {
			t.Errorf("%s: %d are stored", when, n)
		}
	}
	serves("at first")
	folder := inodeOf(t, filepath.Dir(d.Module("m259")))
	if status := d.Stop(t); status != 0 {
		t.Errorf("exit status %d", status)
	}
	for name, waits := range map[string]bool{"m000": true, "m251": true, "m252": false, "m259": false} {
		conn, err := net.Dial("unix", d.Module(name))
		if (err == nil) != waits {
			t.Errorf("who asks for %s while perceptd restarts: %v", name, err)
		}
		if err == nil {
			conn.Close()
		}
	}
	store.start(t, d)
	d.AwaitHealth(t)
	serves("after a restart")
	if inodeOf(t, filepath.Dir(d.Module("m259"))) != folder {
		t.Error("the folder of a module that is not kept is another")
	}
}

// After a stop, which empties the store, the sockets at the paths are nobody's and are replaced.
func TestEmptiedStore(t *testing.T) {
	t.Parallel()
	harness.Binary(t, "perceptd")
	store := newFDStore(t)
	d := harness.NewDaemon(t, harness.SimulatedFor("vision", "gone"))
	store.start(t, d)
	d.AwaitHealth(t)
	harness.Until(t, "both sockets to be stored", d.Ended, func() bool { return len(store.names()) == 2 })
	folder := inodeOf(t, filepath.Dir(d.Module("vision")))
	d.Stop(t)
	store.clear()
	if conn, err := net.Dial("unix", d.Module("vision")); err == nil {
		conn.Close()
		t.Error("somebody listens on the socket of a daemon that was stopped")
	}
	d.Rewrite(t, harness.SimulatedFor("vision", "new"))
	store.start(t, d)
	d.AwaitHealth(t)
	for _, module := range []string{"vision", "new"} {
		if status, _, err := d.Get(d.Module(module), harness.VaultToken); status != 200 {
			t.Errorf("module %s: %d %v", module, status, err)
		}
	}
	if inodeOf(t, filepath.Dir(d.Module("vision"))) != folder {
		t.Error("a module's folder is another: what has it mounted sees nothing any more")
	}
	if _, err := os.Lstat(d.Module("gone")); err == nil {
		t.Error("the socket of the module that was removed is still there")
	}
	harness.Until(t, "the new ones to be stored", d.Ended, func() bool { return len(store.names()) == 2 })
}

// What is of no use does not stay in the store, where it would take up room at every start.
func TestUselessInStore(t *testing.T) {
	t.Parallel()
	harness.Binary(t, "perceptd")
	store := newFDStore(t)
	d := harness.NewDaemon(t, harness.SimulatedFor("vision"))
	store.start(t, d)
	d.AwaitHealth(t)
	harness.Until(t, "the socket to be stored", d.Ended, func() bool { return len(store.names()) == 1 })
	d.Stop(t)
	inode := inodeOf(t, d.Module("vision"))
	for _, name := range []string{"module-x", "module-other-7", fdName("vision", inode), "module-../../vision-7"} {
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(harness.ShortFolder(t), "s"), Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		file, err := l.File()
		l.Close()
		if err != nil {
			t.Fatal(err)
		}
		store.put(renamed(t, file, name))
	}
	for _, name := range []string{"module-null-7", "later"} {
		null, err := os.Open(os.DevNull)
		if err != nil {
			t.Fatal(err)
		}
		store.put(renamed(t, null, name))
	}
	store.start(t, d)
	d.AwaitHealth(t)
	if status, _, err := d.Get(d.Module("vision"), harness.VaultToken); status != 200 {
		t.Errorf("%d %v", status, err)
	}
	if inodeOf(t, d.Module("vision")) != inode {
		t.Error("the socket is another")
	}
	harness.Until(t, "the one of use to be alone in the store", d.Ended, func() bool {
		return slices.Equal(store.names(), []string{fdName("vision", inode)})
	})
}

// renamed is file by the name that it is stored by.
func renamed(t *testing.T, file *os.File, name string) *os.File {
	t.Helper()
	defer file.Close()
	fd, err := unix.FcntlInt(file.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return os.NewFile(uintptr(fd), name)
}

// Nobody who connects anew for each request notices that the daemon is restarted.
func TestRestartsFailNobody(t *testing.T) {
	t.Parallel()
	harness.Binary(t, "perceptd")
	store := newFDStore(t)
	d := harness.NewDaemon(t, harness.SimulatedFor("vision"))
	store.start(t, d)
	d.AwaitHealth(t)
	harness.Until(t, "the socket to be stored", d.Ended, func() bool { return len(store.names()) == 1 })

	var asking sync.WaitGroup
	var answered atomic.Int64
	enough, failed := make(chan struct{}), make(chan string, 1)
	path := d.Module("vision")
	ask := d.Get
	for range 4 {
		asking.Go(func() {
			for {
				select {
				case <-enough:
					return
				default:
				}
				status, body, err := ask(path, harness.VaultToken)
				if status == 200 {
					answered.Add(1)
					continue
				}
				select {
				case failed <- fmt.Sprintf("%d %s %v", status, body, err):
				default:
				}
			}
		})
	}
	for range 10 {
		if err := d.Cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		<-d.Ended
		store.start(t, d)
		before := answered.Load()
		harness.Until(t, "more answers", d.Ended, func() bool { return answered.Load() > before+20 })
	}
	close(enough)
	asking.Wait()
	select {
	case what := <-failed:
		t.Errorf("a request failed: %s", what)
	default:
	}
}
