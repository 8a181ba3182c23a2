package daemon

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"perceptd/agent/api"
	"perceptd/agent/store"
	"perceptd/cmd/perceptd/e2e/harness"
	"perceptd/tokencache"
)

// What the service manager hands the daemon may be anything: root can put it there, and so can a fault.

// files are the descriptors that are kept.
func (s *fdStore) files() []*os.File {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.kept)
}

// hold has s keep those, as nobody would store them.
func (s *fdStore) hold(files []*os.File) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.kept = slices.Clone(files)
}

// memfd makes memory with that text, or of that size where there is none, and seals it.
func memfd(t *testing.T, name string, text []byte, size int64, seals int) *os.File {
	t.Helper()
	fd, err := unix.MemfdCreate("hostile", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	must(t, err)
	file := os.NewFile(uintptr(fd), name)
	if text != nil {
		_, err = file.Write(text)
	} else {
		err = file.Truncate(size)
	}
	must(t, err)
	if seals != 0 {
		_, err = unix.FcntlInt(file.Fd(), unix.F_ADD_SEALS, seals)
		must(t, err)
	}
	return file
}

// textOf reads memory that the daemon has had kept, which may be of the kind that only a mapping shows.
func textOf(t *testing.T, file *os.File) []byte {
	t.Helper()
	info, err := file.Stat()
	must(t, err)
	there, err := unix.Mmap(int(file.Fd()), 0, int(info.Size()), unix.PROT_READ, unix.MAP_SHARED)
	must(t, err)
	text := slices.Clone(there)
	must(t, unix.Munmap(there))
	return text
}

// opened returns a file by another name than its own.
func opened(t *testing.T, name, path string, flags int) *os.File {
	t.Helper()
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
	must(t, err)
	return os.NewFile(uintptr(fd), name)
}

// listening returns a listening socket by that name.
func listening(t *testing.T, name, network, address string) *os.File {
	t.Helper()
	l, err := net.Listen(network, address)
	must(t, err)
	defer l.Close()
	if ul, ok := l.(*net.UnixListener); ok {
		ul.SetUnlinkOnClose(false)
	}
	file, err := l.(interface{ File() (*os.File, error) }).File()
	must(t, err)
	return renamed(t, file, name)
}

const everySeal = unix.F_SEAL_WRITE | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_SEAL

// hostile are descriptors of every kind that is of no use. carried is what the daemon itself would have had kept.
func hostile(t *testing.T, carried []byte) []*os.File {
	t.Helper()
	read, write, err := os.Pipe()
	must(t, err)
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	must(t, err)
	datagram, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	must(t, err)
	event, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	must(t, err)
	file := filepath.Join(t.TempDir(), "file")
	must(t, os.WriteFile(file, carried, 0o600))
	fifo := filepath.Join(t.TempDir(), "fifo")
	must(t, unix.Mkfifo(fifo, 0o600))
	spoilt := slices.Clone(carried)
	spoilt[len(spoilt)-1] ^= 1
	sockets := harness.ShortFolder(t)
	return []*os.File{
		memfd(t, fdCache+"1", carried, 0, 0), // anybody who has it may change it while it is read
		memfd(t, fdCache+"2", carried, 0, unix.F_SEAL_WRITE|unix.F_SEAL_GROW),
		memfd(t, fdCache+"3", nil, 4<<30, everySeal),
		memfd(t, fdCache+"4", nil, 1<<62, everySeal),
		memfd(t, fdCache+"5", nil, 0, everySeal),
		memfd(t, fdCache+"6", nil, 16<<20, everySeal),
		memfd(t, fdCache+"7", spoilt, 0, everySeal),
		memfd(t, fdCache+"8", carried[:len(carried)/2], 0, everySeal),
		renamed(t, read, fdCache+"9"), renamed(t, write, fdCache+"10"),
		opened(t, fdCache+"11", t.TempDir(), unix.O_RDONLY|unix.O_DIRECTORY),
		opened(t, fdCache+"12", "/dev/zero", unix.O_RDONLY), opened(t, fdCache+"13", "/dev/full", unix.O_RDWR),
		opened(t, fdCache+"14", file, unix.O_RDONLY), opened(t, fdCache+"15", file, unix.O_PATH),
		opened(t, fdCache+"16", fifo, unix.O_RDWR), opened(t, fdCache+"17", "/proc/self/mem", unix.O_RDONLY),
		os.NewFile(uintptr(event), fdCache+"18"), os.NewFile(uintptr(pair[0]), fdCache+"19"),
		listening(t, fdCache+"20", "tcp", "127.0.0.1:0"),

		memfd(t, fdCache+"1", carried, 0, everySeal), // a name that was there before
		memfd(t, fdCache+"x", carried, 0, everySeal), memfd(t, fdCache+"-1", carried, 0, everySeal),
		memfd(t, fdCache+strings.Repeat("9", 240), carried, 0, everySeal),
		memfd(t, "cache", carried, 0, everySeal), memfd(t, "x", carried, 0, everySeal),
		memfd(t, "\x1b[2Jx", carried, 0, everySeal), memfd(t, "\x01\x07", carried, 0, everySeal), memfd(t, "a b\nc",
			carried, 0, everySeal),
		memfd(t, strings.Repeat("n", 300), carried, 0, everySeal),

		listening(t, fdModule+"vision-1", "unix", filepath.Join(sockets, "1")),
		listening(t, fdModule+"vision-1", "unix", filepath.Join(sockets, "2")),
		listening(t, fdModule+"../x-1", "unix", filepath.Join(sockets, "3")), listening(t, fdModule+"vision-2", "tcp",
			"127.0.0.1:0"),
		os.NewFile(uintptr(pair[1]), fdModule+"vision-3"), os.NewFile(uintptr(datagram), fdModule+"vision-4"),
		memfd(t, fdModule+"vision-5", carried, 0, everySeal), opened(t, fdModule+"vision-6", "/dev/zero",
			unix.O_RDONLY),
	}
}

// TestHostileDescriptors: whatever is handed to the daemon beside its sockets, it serves, takes nothing from it, reads
// little of it, and keeps none of it open.
func TestHostileDescriptors(t *testing.T) {
	t.Parallel()
	store := newFDStore(t)
	d := harness.NewDaemon(t, harness.SimulatedFor("vision"))
	store.start(t, d)
	d.AwaitHealth(t)
	before := d.Held(t)
	harness.Until(t, "the cache to be stored", d.Ended, func() bool { return len(store.all()) == 2 })
	must(t, d.Cmd.Process.Kill())
	<-d.Ended
	var carried []byte
	for _, file := range store.files() {
		if strings.HasPrefix(file.Name(), fdCache) {
			carried = textOf(t, file)
		}
	}
	store.clear()

	for name, given := range map[string][]*os.File{
		"all of them": hostile(t, carried),
		"what the daemon itself would have written, sealed": {memfd(t, fdCache+"1", carried, 0, everySeal)},
	} {
		// The last one's socket goes with it: a listener that the store still had would be one that is served.
		store.hold(given)
		store.start(t, d)
		d.AwaitHealth(t)
		if len(given) == 1 { // or the others would show nothing
			d.MustBeSame(t, name, before)
			harness.Until(t, "its socket to be stored", d.Ended, func() bool { return len(store.names()) == 1 })
			d.Stop(t)
			store.clear()
			continue
		}
		if now := d.Held(t); now.Fetches != 1 {
			t.Errorf("%s: %d fetches: something of it was believed", name, now.Fetches)
		}
		if status, body, err := d.Get(d.Module("vision"), harness.VaultToken); status != 200 {
			t.Errorf("%s: the module got %d %s %v", name, status, body, err)
		}
		harness.Until(t, "the store to hold what is of use", d.Ended, func() bool {
			all := store.all()
			return slices.Contains(all, fdName("vision", inodeOf(t, d.Module("vision")))) &&
				!slices.Contains(all, fdCache+"1") && !slices.Contains(all, "x") &&
				!slices.Contains(all, fdModule+"vision-1")
		})
		if left := stillOpen(t, d, given); len(left) > 0 {
			t.Errorf("%s: still open: %q", name, left)
		}
		if n := residentBytes(t, d); n > 256<<20 { // MemoryMax=, which a race detector's share fits into as well
			t.Errorf("%s: it has had %d MB", name, n>>20)
		}
		if strings.ContainsFunc(strings.ReplaceAll(strings.ReplaceAll(d.Text(), "\n", ""), "\t", ""),
			func(r rune) bool { return r < ' ' || r == 0x7f }) {
			t.Errorf("%s: the log has control characters", name)
		}
		d.Stop(t)
		store.clear()
	}
}

// stillOpen lists the files of given that the daemon has open.
func stillOpen(t *testing.T, d *harness.Daemon, given []*os.File) (names []string) {
	t.Helper()
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", d.Cmd.Process.Pid))
	must(t, err)
	for _, file := range given {
		info, err := file.Stat()
		if err != nil || file.Name() == fdCache+"18" { // every eventfd is the same file
			continue
		}
		for _, fd := range fds {
			if there, err := os.Stat(fd); err == nil && os.SameFile(info, there) &&
				info.Mode().Type()&os.ModeDevice == 0 {
				names = append(names, file.Name())
			}
		}
	}
	return names
}

// residentBytes is the most memory that the daemon has had.
func residentBytes(t *testing.T, d *harness.Daemon) (bytes int64) {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", d.Cmd.Process.Pid))
	must(t, err)
	for line := range strings.Lines(string(text)) {
		if n, found := strings.CutPrefix(line, "VmHWM:"); found {
			_, err := fmt.Sscanf(n, "%d", &bytes)
			must(t, err)
		}
	}
	return bytes << 10
}

// TestHostileSockets: a descriptor in the place of one of the two sockets that are always there ends the start, and
// says which it is and what to do.
func TestHostileSockets(t *testing.T) {
	t.Parallel()
	read, write, err := os.Pipe()
	must(t, err)
	defer write.Close()
	for _, row := range []struct {
		name  string
		given []*os.File
		says  string
	}{
		{"a pipe", []*os.File{renamed(t, read, "token")}, "descriptor 3 (token): not a socket"},
		{"TCP", []*os.File{listening(t, "admin", "tcp", "127.0.0.1:0")}, "descriptor 3 (admin): not a Unix socket"},
		{"two by one name", []*os.File{
			listening(t, "token", "unix", filepath.Join(harness.ShortFolder(t), "1")), listening(t, "token", "unix",
				filepath.Join(harness.ShortFolder(t), "2")),
		}, `descriptor 4 is a second socket named "token"`},
	} {
		store := newFDStore(t)
		store.hold(row.given)
		d := harness.NewDaemon(t, harness.SimulatedFor())
		store.start(t, d)
		<-d.Ended
		if d.Cmd.ProcessState.ExitCode() != harness.ExitFailed || !strings.Contains(d.Text(), row.says) {
			t.Errorf("%s: ended with %d", row.name, d.Cmd.ProcessState.ExitCode())
		}
	}
	for names, says := range map[string]string{"": "does not name", "a:b": "does not name", "a::b": "does not name"} {
		d := harness.NewDaemon(t, harness.SimulatedFor())
		c := exec.Command("/bin/sh", append([]string{"-c", `LISTEN_PID=$$ exec "$0" "$@"`,
			harness.Binary(t, "perceptd")}, d.Arguments()...)...)
		c.ExtraFiles = []*os.File{os.Stdin, os.Stdin, os.Stdin}
		d.Process = harness.Begin(t, []string{"LISTEN_FDS=3", "LISTEN_FDNAMES=" + names}, c)
		<-d.Ended
		if d.Cmd.ProcessState.ExitCode() != harness.ExitFailed || !strings.Contains(d.Text(), says) {
			t.Errorf("names %q: ended with %d", names, d.Cmd.ProcessState.ExitCode())
		}
	}
}

// TestDeafServiceManager: a notify socket that is gone, is something else, or is never read keeps nobody from a token,
// holds up neither start nor stop for long, and loses no readiness.
func TestDeafServiceManager(t *testing.T) {
	t.Parallel()
	var modules []string
	for i := range 40 { // each of whose sockets is to be stored
		modules = append(modules, fmt.Sprintf("m%d", i))
	}
	for name, manager := range map[string]func(path string) io.Closer{
		"absent":        func(string) io.Closer { return nil },
		"a file":        func(path string) io.Closer { must(t, os.WriteFile(path, nil, 0o600)); return nil },
		"a folder":      func(path string) io.Closer { must(t, os.Mkdir(path, 0o700)); return nil },
		"a stream":      func(path string) io.Closer { return listening(t, "n", "unix", path) },
		"full, unread":  func(path string) io.Closer { return fullSocket(t, path) },
		"read too late": func(path string) io.Closer { return fullSocket(t, path) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(harness.ShortFolder(t), "n")
			held := manager(path)
			if held != nil {
				defer held.Close()
			}
			d := harness.NewDaemon(t, harness.SimulatedFor(modules...))
			d.Process = harness.Launch(t, []string{"NOTIFY_SOCKET=" + path}, "perceptd", d.Arguments()...)
			d.AwaitHealth(t)
			if status, body, err := d.Get(d.Module("m39"), harness.VaultToken); status != 200 {
				t.Errorf("%d %s %v", status, body, err)
			}
			if late, ok := held.(*net.UnixConn); ok && name == "read too late" {
				harness.Until(t, "it to be told that the daemon is ready", d.Ended,
					func() bool { return hears(t, late, "READY=1") })
			}
			if status, body := d.Reload(t, harness.SimulatedFor(modules[:1]...)); status != 200 {
				t.Errorf("reload: %d %s", status, body)
			}
			if status := d.Stop(t); status != 0 {
				t.Errorf("it ended with %d", status)
			}
		})
	}
}

// fullSocket is a notify socket that takes no message more.
func fullSocket(t *testing.T, path string) *net.UnixConn {
	t.Helper()
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	must(t, err)
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	must(t, err)
	defer unix.Close(fd)
	must(t, unix.Connect(fd, &unix.SockaddrUnix{Name: path}))
	for err == nil {
		_, err = unix.Write(fd, []byte("full"))
	}
	if err != unix.EAGAIN {
		t.Fatal(err)
	}
	return l
}

// hears reads what there is, and reports whether text was among it.
func hears(t *testing.T, l *net.UnixConn, text string) (found bool) {
	t.Helper()
	raw, err := l.SyscallConn()
	must(t, err)
	must(t, raw.Control(func(fd uintptr) {
		for message := make([]byte, 4096); ; {
			n, _, err := unix.Recvfrom(int(fd), message, unix.MSG_DONTWAIT)
			if err != nil {
				return
			}
			found = found || strings.Contains(string(message[:n]), text)
		}
	}))
	return found
}

// TestSocketOfAnotherDaemon: what leads to a second daemon that lives is taken from it by no path, and what is left of
// one that was killed is.
func TestSocketOfAnotherDaemon(t *testing.T) {
	t.Parallel()
	other := harness.NewDaemon(t, harness.SimulatedFor("vision"))
	store := newFDStore(t)
	store.start(t, other)
	other.AwaitHealth(t)
	harness.Until(t, "its socket to be stored", other.Ended, func() bool { return len(store.names()) == 1 })
	stillAnswers := func(when string) {
		t.Helper()
		for _, socket := range []string{other.Token(), other.Module("vision")} {
			if status, body, err := other.Get(socket, harness.VaultToken); status != 200 {
				t.Errorf("%s: the other answers %d %s %v at %s", when, status, body, err, socket)
			}
		}
	}

	// Its own folder.
	second := harness.Launch(t, nil, "perceptd", append(other.Arguments(), "--state-dir", t.TempDir())...)
	<-second.Ended
	if status := second.Cmd.ProcessState.ExitCode(); status != harness.ExitFailed ||
		!strings.Contains(second.Text(), fmt.Sprint(other.Cmd.Process.Pid)) {
		t.Errorf("a second daemon in the folder ended with %d", status)
	}
	stillAnswers("a second daemon in the folder")

	// Its token socket in another's folder.
	d := harness.NewDaemon(t, harness.SimulatedFor("vision"))
	must(t, os.Link(other.Token(), d.Token()))
	d.Process = harness.Launch(t, nil, "perceptd", d.Arguments()...)
	<-d.Ended
	if status := d.Cmd.ProcessState.ExitCode(); status != harness.ExitFailed || !strings.Contains(d.Text(), d.Token()) {
		t.Errorf("a daemon in whose folder the other serves ended with %d", status)
	}
	stillAnswers("a daemon in whose folder it serves")
	must(t, os.Remove(d.Token()))

	// Its module's socket in another's folder: that module's trouble alone.
	must(t, os.MkdirAll(filepath.Dir(d.Module("vision")), 0o700))
	_ = os.Remove(d.Module("vision"))
	must(t, os.Link(other.Module("vision"), d.Module("vision")))
	d.Again(t)
	if trouble := strings.Join(d.Status(t).Trouble, "\n"); !strings.Contains(trouble, "module vision has no socket") {
		t.Errorf("trouble %q", trouble)
	}
	if status, body, err := d.Get(d.Token(), harness.VaultToken); status != 200 {
		t.Errorf("users get %d %s %v", status, body, err)
	}
	stillAnswers("a daemon whose module's folder it serves in")
	d.Stop(t)
	if inodeOf(t, d.Module("vision")) != inodeOf(t, other.Module("vision")) {
		t.Error("the link to the other's socket was taken away")
	}
	must(t, os.Remove(d.Module("vision")))

	// Its listener among the descriptors that are kept for another.
	thief := newFDStore(t)
	for _, file := range store.files() {
		if strings.HasPrefix(file.Name(), fdModule) {
			fd, err := unix.FcntlInt(file.Fd(), unix.F_DUPFD_CLOEXEC, 0)
			must(t, err)
			thief.put(os.NewFile(uintptr(fd), file.Name()))
		}
	}
	thief.start(t, d)
	d.AwaitHealth(t)
	if inodeOf(t, d.Module("vision")) == inodeOf(t, other.Module("vision")) {
		t.Error("the daemon serves on the other's socket")
	}
	if left := stillOpen(t, d, store.files()); len(left) > 0 {
		t.Errorf("still open: %q", left)
	}
	stillAnswers("a daemon that was handed its listener")
	d.Stop(t)

	// Killed, it leaves sockets that nobody serves.
	must(t, other.Cmd.Process.Kill())
	<-other.Ended
	store.clear()
	other.Again(t)
	stillAnswers("after its end")
}

// cover mounts a folder, or a file, over a path until uncover.
func cover(t *testing.T, over, path string) (uncover func()) {
	t.Helper()
	must(t, unix.Mount(over, path, "", unix.MS_BIND, ""))
	lift := func() { _ = unix.Unmount(path, unix.MNT_DETACH) }
	t.Cleanup(lift)
	return lift
}

// TestBindMounts: what is mounted over the daemon's folders and sockets while it runs, over restart, crash and stop, is
// not touched; nobody else is hurt; and with the mount gone all is as it was, tokens and policy changes as well.
func TestBindMounts(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("folders are mounted: run it as root")
	}
	for _, row := range []struct {
		name string
		path func(d *harness.Daemon) string
		file bool // not a folder
	}{
		{"the runtime folder", func(d *harness.Daemon) string { return d.Dir }, false},
		{"the token socket", (*harness.Daemon).Token, true},
		{"the admin socket", (*harness.Daemon).Admin, true},
		{"the modules' folders",
			func(d *harness.Daemon) string { return filepath.Join(d.Dir, api.ModulesDirName) }, false},
		{"a module's folder", func(d *harness.Daemon) string { return filepath.Dir(d.Module("vision")) }, false},
		{"a module's socket", func(d *harness.Daemon) string { return d.Module("vision") }, true},
		{"the state folder", (*harness.Daemon).StateDir, false},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			for _, end := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
				testBindMount(t, end, row.path, row.file)
			}
		})
	}
}

// TestRevocationOutlivesItsRecord: whatever becomes of the record of policy changes over a crash, the token that
// systemd has held is withheld as before, the log tells of it once, and the record is whole again.
func TestRevocationOutlivesItsRecord(t *testing.T) {
	t.Parallel()
	const oneOfTwo = "one of the two files of the policy changes cannot be used, the other is in force"
	for _, row := range []struct {
		name   string
		asRoot bool                                  // folders are mounted
		begin  func(t *testing.T, d *harness.Daemon) // before the start; nil: nothing is done
		before func(t *testing.T, d *harness.Daemon) // the revocation
		status int                                   // of the revocation
		// the crash; old is the record from before the revocation
		after func(t *testing.T, d *harness.Daemon, old string)
		says  string
	}{
		{
			name: "a folder is mounted over it", asRoot: true, status: 200, says: "the record of policy changes was " +
				"gone",
			after: func(t *testing.T, d *harness.Daemon, _ string) { cover(t, t.TempDir(), d.StateDir()) },
		},
		{
			name: "it is removed", status: 200, says: oneOfTwo,
			after: func(t *testing.T, d *harness.Daemon, _ string) { must(t, os.Remove(d.RecordFile())) },
		},
		{
			name: "an older one is mounted over it", asRoot: true, status: 200, says: "the record of policy changes " +
				"was older",
			after: func(t *testing.T, d *harness.Daemon, old string) {
				folder := t.TempDir()
				must(t, os.WriteFile(filepath.Join(folder, filepath.Base(d.RecordFile())), []byte(old), 0o600))
				cover(t, folder, d.StateDir())
			},
		},
		{
			name: "an older one is restored from a backup", status: 200, says: oneOfTwo,
			after: func(t *testing.T, d *harness.Daemon, old string) {
				must(t, os.WriteFile(d.RecordFile(), []byte(old), 0o600))
			},
		},
		{
			name: "it is torn", status: 200, says: oneOfTwo,
			after: func(t *testing.T, d *harness.Daemon, old string) {
				must(t, os.WriteFile(d.RecordFile(), []byte(old[:len(old)/2]), 0o600))
			},
		},
		{
			name: "the disk was full", asRoot: true, begin: smallDisk, before: fill, status: 507,
			says:  "the record of policy changes was older",
			after: func(t *testing.T, d *harness.Daemon, _ string) { empty(t, d) },
		},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			if row.asRoot && os.Getuid() != 0 {
				t.Skip("folders are mounted: run it as root")
			}
			store := newFDStore(t)
			d := harness.NewDaemon(t, harness.SimulatedFor())
			if row.begin != nil {
				row.begin(t, d)
			}
			store.start(t, d)
			d.AwaitHealth(t)
			d.Held(t)
			harness.Until(t, "the cache to be stored", d.Ended, func() bool { return len(store.all()) == 1 })
			report := func(effect tokencache.Effect, want int) {
				t.Helper()
				status, body, err := d.Ask(d.Admin(), "POST", api.PathPolicyChanges,
					`{"all_resources":true,"effect":"`+string(effect)+`"}`)
				if status != want {
					t.Fatalf("%d %s %v", status, body, err)
				}
				harness.Until(t, "the change to be stored", d.Ended, func() bool { return store.hasChange(effect) })
			}
			report("granted", 200)
			old, err := os.ReadFile(d.RecordFile())
			must(t, err)
			if row.before != nil {
				row.before(t, d)
			}
			report("revoked", row.status)
			must(t, d.Cmd.Process.Kill())
			<-d.Ended
			row.after(t, d, string(old))
			store.start(t, d)
			d.AwaitHealth(t)
			if status, body, err := d.Get(d.Token(), harness.VaultToken); status != 403 ||
				!strings.Contains(body, string(api.CodeRevoked)) {
				t.Errorf("a token from before the revocation: %d %.300s %v", status, body, err)
			}
			if n := strings.Count(d.Text(), row.says); n != 1 {
				t.Errorf("the log tells of it %d times", n)
			}
			harness.Until(t, "the record to be whole", d.Ended, func() bool {
				text, err := os.ReadFile(d.RecordFile())
				return err == nil && strings.Contains(string(text), `"revoked"`)
			})
		})
	}
}

// hasChange reports whether the cache that is kept last has a policy change of that effect.
func (s *fdStore) hasChange(effect tokencache.Effect) bool {
	s.mu.Lock() // else it may be closed meanwhile
	defer s.mu.Unlock()
	if len(s.kept) != 1 {
		return false // the older is about to go
	}
	memory, err := store.ReadMemfd(s.kept[0])
	return err == nil && slices.ContainsFunc(memory.Record.Changes,
		func(p tokencache.PolicyChange) bool { return p.Effect == effect })
}

// servesOrEnds waits for one of the two, and reports whether the daemon serves.
func servesOrEnds(d *harness.Daemon) bool {
	for {
		select {
		case <-d.Ended:
			return false
		case <-time.After(10 * time.Millisecond):
			if status, _, err := d.Get(d.Admin(), api.PathHealth); err == nil && status == 200 {
				return true
			}
		}
	}
}

func testBindMount(t *testing.T, end syscall.Signal, path func(*harness.Daemon) string, file bool) {
	t.Helper()
	d, before := startKeeping(t, harness.SimulatedFor("vision"))
	if status, body, err := d.Ask(d.Admin(), "POST", api.PathPolicyChanges,
		`{"all_resources":true,"effect":"granted"}`); status/100 != 2 {
		t.Fatalf("%d %s %v", status, body, err)
	}
	harness.Until(t, "the tokens to be on the disk", d.Ended,
		func() bool { _, err := os.Stat(d.SealedFile()); return err == nil })

	over := t.TempDir()
	mark := filepath.Join(over, "mark")
	must(t, os.WriteFile(mark, []byte("theirs"), 0o600))
	uncover := cover(t, map[bool]string{true: mark, false: over}[file], path(d))
	must(t, d.Cmd.Process.Signal(end))
	<-d.Ended
	if end == syscall.SIGTERM && d.Cmd.ProcessState.ExitCode() != 0 {
		t.Errorf("it ended with %d", d.Cmd.ProcessState.ExitCode())
	}
	// Started over it, it serves, or says why it does not.
	d.Process = harness.Launch(t, nil, "perceptd", d.Arguments()...)
	serves := servesOrEnds(d)
	if !serves && !strings.Contains(d.Text(), path(d)) {
		t.Errorf("it neither serves nor names what is in its way")
	}
	if text, err := os.ReadFile(mark); err != nil || string(text) != "theirs" {
		t.Errorf("what was mounted was changed: %q %v", text, err)
	}
	if serves {
		must(t, d.Cmd.Process.Signal(end))
		<-d.Ended
	}
	uncover()
	d.Again(t)
	d.MustBeSame(t, "with the mount gone", before)
	if changes := d.Status(t).Changes; len(changes) != 1 {
		t.Errorf("%d policy changes are on record, one was", len(changes))
	}
	if status, body, err := d.Get(d.Module("vision"), harness.VaultToken); status != 200 {
		t.Errorf("the module gets %d %s %v", status, body, err)
	}
	d.Stop(t)
}
