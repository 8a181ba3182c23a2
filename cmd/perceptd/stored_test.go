package main

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"perceptd/agent/api"
	"perceptd/cmd/perceptd/e2e/perceptdtest"
)

// fdStore is a service manager that keeps descriptors, as systemd does: in order, several by one name, none twice.
type fdStore struct {
	path string

	mu   sync.Mutex // protects what follows
	kept []*os.File
}

func newFDStore(t *testing.T) *fdStore {
	t.Helper()
	s := &fdStore{path: filepath.Join(perceptdtest.ShortFolder(t), "n")}
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
	return slices.DeleteFunc(s.all(), func(name string) bool { return strings.HasPrefix(name, storedCache) })
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
func (s *fdStore) start(t *testing.T, d *daemonProcess, environment ...string) {
	t.Helper()
	c := exec.Command("/bin/sh", append([]string{"-c", `LISTEN_PID=$$ exec "$0" "$@"`, binary(t, "perceptd")}, d.arguments()...)...)
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []string
	for _, file := range s.kept {
		all = append(all, file.Name())
	}
	names := strings.Join(all, ":")
	c.ExtraFiles = slices.Clone(s.kept)
	d.process = begin(t, append(environment, "NOTIFY_SOCKET="+s.path, "LISTEN_FDS="+strconv.Itoa(len(s.kept)), "LISTEN_FDNAMES="+names), c)
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
	binary(t, "perceptd")
	store := newFDStore(t)
	d := newFolder(t, simulatedFor("vision", "gone"))
	store.start(t, d)
	d.awaitHealth(t)
	inode := inodeOf(t, d.module("vision"))
	until(t, "both sockets to be stored", d.ended, func() bool { return len(store.names()) == 2 })
	for _, end := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		if err := d.cmd.Process.Signal(end); err != nil {
			t.Fatal(err)
		}
		<-d.ended
		conn, err := net.Dial("unix", d.module("vision"))
		if err != nil {
			t.Fatalf("nobody can wait after %v: %v", end, err)
		}
		conn.Close()
		answered := make(chan int)
		go func() {
			status, _, _ := d.get(d.module("vision"), vaultToken)
			answered <- status
		}()
		if end == syscall.SIGKILL { // meanwhile the configuration has lost one
			d.rewrite(t, simulatedFor("vision"))
		}
		store.start(t, d)
		if got := <-answered; got != 200 {
			t.Errorf("who waited after %v got %d", end, got)
		}
		d.awaitHealth(t)
		if inodeOf(t, d.module("vision")) != inode {
			t.Errorf("another socket after %v", end)
		}
	}
	until(t, "the other one to be discarded", d.ended, func() bool { return len(store.names()) == 1 })
	if _, err := os.Lstat(filepath.Dir(d.module("gone"))); err == nil {
		t.Error("the folder of the module that was removed is still there")
	}

	// What was stored is of no use when something else is at its path.
	d.stop(t)
	if err := os.Remove(d.module("vision")); err != nil {
		t.Fatal(err)
	}
	store.start(t, d)
	d.awaitHealth(t)
	if status, _, err := d.get(d.module("vision"), vaultToken); status != 200 {
		t.Errorf("made anew: %d %v", status, err)
	}
	until(t, "the new one to be stored in the old one's place", d.ended, func() bool {
		names := store.names()
		return len(names) == 1 && names[0] == storedName("vision", inodeOf(t, d.module("vision")))
	})
	if !strings.Contains(d.text(), "a stored socket is of no use any more") {
		t.Error("the log does not say so")
	}
}

// A module's folder comes and goes with the configuration.
func TestModuleFoldersComeAndGo(t *testing.T) {
	t.Parallel()
	d := launchDaemon(t, simulatedFor("vision", "speech"))
	if err := os.WriteFile(filepath.Join(filepath.Dir(d.module("speech")), "its own"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if status, body := d.reload(t, simulatedFor("other")); status != 200 {
		t.Fatal(body)
	}
	for module, there := range map[string]bool{"vision": false, "speech": true, "other": true} {
		if _, err := os.Lstat(filepath.Dir(d.module(module))); (err == nil) != there {
			t.Errorf("module %s: %v", module, err)
		}
	}
	if _, err := os.Lstat(d.module("speech")); err == nil {
		t.Error("a module that was removed has its socket still")
	}
	if !strings.Contains(d.text(), "the folder of a module that was removed stays") {
		t.Error("the log does not say why a folder stays")
	}
	if status, body := d.reload(t, simulatedFor("vision", "speech")); status != 200 {
		t.Fatal(body)
	}
	for _, module := range []string{"vision", "speech"} {
		if status, _, err := d.get(d.module(module), vaultToken); status != 200 {
			t.Errorf("module %s: %d %v", module, status, err)
		}
	}
	// One that was removed while no daemon ran goes with the next start.
	if err := d.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-d.ended
	d.rewrite(t, simulatedFor("speech"))
	d.process = launch(t, nil, "perceptd", d.arguments()...)
	d.awaitHealth(t)
	if _, err := os.Lstat(filepath.Join(d.dir, api.ModulesDirName, "vision")); err == nil {
		t.Error("the folder of a module that was removed meanwhile is still there")
	}
}
