package main

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
	"perceptd/cmd/perceptd/e2e/perceptdtest"
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
	sockets := perceptdtest.ShortFolder(t)
	return []*os.File{
		memfd(t, storedCache+"1", carried, 0, 0), // anybody who has it may change it while it is read
		memfd(t, storedCache+"2", carried, 0, unix.F_SEAL_WRITE|unix.F_SEAL_GROW),
		memfd(t, storedCache+"3", nil, 4<<30, everySeal),
		memfd(t, storedCache+"4", nil, 1<<62, everySeal),
		memfd(t, storedCache+"5", nil, 0, everySeal),
		memfd(t, storedCache+"6", nil, 16<<20, everySeal),
		memfd(t, storedCache+"7", spoilt, 0, everySeal),
		memfd(t, storedCache+"8", carried[:len(carried)/2], 0, everySeal),
		renamed(t, read, storedCache+"9"), renamed(t, write, storedCache+"10"),
		opened(t, storedCache+"11", t.TempDir(), unix.O_RDONLY|unix.O_DIRECTORY),
		opened(t, storedCache+"12", "/dev/zero", unix.O_RDONLY), opened(t, storedCache+"13", "/dev/full", unix.O_RDWR),
		opened(t, storedCache+"14", file, unix.O_RDONLY), opened(t, storedCache+"15", file, unix.O_PATH),
		opened(t, storedCache+"16", fifo, unix.O_RDWR), opened(t, storedCache+"17", "/proc/self/mem", unix.O_RDONLY),
		os.NewFile(uintptr(event), storedCache+"18"), os.NewFile(uintptr(pair[0]), storedCache+"19"),
		listening(t, storedCache+"20", "tcp", "127.0.0.1:0"),

		memfd(t, storedCache+"1", carried, 0, everySeal), // a name that was there before
		memfd(t, storedCache+"x", carried, 0, everySeal), memfd(t, storedCache+"-1", carried, 0, everySeal),
		memfd(t, storedCache+strings.Repeat("9", 240), carried, 0, everySeal),
		memfd(t, "cache", carried, 0, everySeal), memfd(t, "x", carried, 0, everySeal),
		memfd(t, "\x1b[2Jx", carried, 0, everySeal), memfd(t, "\x01\x07", carried, 0, everySeal), memfd(t, "a b\nc", carried, 0, everySeal),
		memfd(t, strings.Repeat("n", 300), carried, 0, everySeal),

		listening(t, storedModule+"vision-1", "unix", filepath.Join(sockets, "1")),
		listening(t, storedModule+"vision-1", "unix", filepath.Join(sockets, "2")),
		listening(t, storedModule+"../x-1", "unix", filepath.Join(sockets, "3")), listening(t, storedModule+"vision-2", "tcp", "127.0.0.1:0"),
		os.NewFile(uintptr(pair[1]), storedModule+"vision-3"), os.NewFile(uintptr(datagram), storedModule+"vision-4"),
		memfd(t, storedModule+"vision-5", carried, 0, everySeal), opened(t, storedModule+"vision-6", "/dev/zero", unix.O_RDONLY),
	}
}

// TestHostileDescriptors: whatever is handed to the daemon beside its sockets, it serves, takes nothing from it, reads
// little of it, and keeps none of it open.
func TestHostileDescriptors(t *testing.T) {
	t.Parallel()
	store := newFDStore(t)
	d := newFolder(t, simulatedFor("vision"))
	store.start(t, d)
	d.awaitHealth(t)
	before := d.held(t)
	until(t, "the cache to be stored", d.ended, func() bool { return len(store.all()) == 2 })
	must(t, d.cmd.Process.Kill())
	<-d.ended
	var carried []byte
	for _, file := range store.files() {
		if strings.HasPrefix(file.Name(), storedCache) {
			carried = textOf(t, file)
		}
	}
	store.clear()

	for name, given := range map[string][]*os.File{
		"all of them": hostile(t, carried),
		"what the daemon itself would have written, sealed": {memfd(t, storedCache+"1", carried, 0, everySeal)},
	} {
		// The last one's socket goes with it: a listener that the store still had would be one that is served.
		store.hold(given)
		store.start(t, d)
		d.awaitHealth(t)
		if len(given) == 1 { // or the others would show nothing
			d.mustBeSame(t, name, before)
			until(t, "its socket to be stored", d.ended, func() bool { return len(store.names()) == 1 })
			d.stop(t)
			store.clear()
			continue
		}
		if now := d.held(t); now.Fetches != 1 {
			t.Errorf("%s: %d fetches: something of it was believed", name, now.Fetches)
		}
		if status, body, err := d.get(d.module("vision"), vaultToken); status != 200 {
			t.Errorf("%s: the module got %d %s %v", name, status, body, err)
		}
		until(t, "the store to hold what is of use", d.ended, func() bool {
			all := store.all()
			return slices.Contains(all, storedName("vision", inodeOf(t, d.module("vision")))) && !slices.Contains(all, storedCache+"1") && !slices.Contains(all, "x") && !slices.Contains(all, storedModule+"vision-1")
		})
		if left := d.stillOpen(t, given); len(left) > 0 {
			t.Errorf("%s: still open: %q", name, left)
		}
		if n := d.resident(t); n > 256<<20 { // MemoryMax=, which a race detector's share fits into as well
			t.Errorf("%s: it has had %d MB", name, n>>20)
		}
		if strings.ContainsFunc(strings.ReplaceAll(strings.ReplaceAll(d.text(), "\n", ""), "\t", ""), func(r rune) bool { return r < ' ' || r == 0x7f }) {
			t.Errorf("%s: the log has control characters", name)
		}
		d.stop(t)
		store.clear()
	}
}

// stillOpen lists the files of given that the daemon has open.
func (d *daemonProcess) stillOpen(t *testing.T, given []*os.File) (names []string) {
	t.Helper()
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", d.cmd.Process.Pid))
	must(t, err)
	for _, file := range given {
		info, err := file.Stat()
		if err != nil || file.Name() == storedCache+"18" { // every eventfd is the same file
			continue
		}
		for _, fd := range fds {
			if there, err := os.Stat(fd); err == nil && os.SameFile(info, there) && info.Mode().Type()&os.ModeDevice == 0 {
				names = append(names, file.Name())
			}
		}
	}
	return names
}

// resident is the most memory that the daemon has had.
func (d *daemonProcess) resident(t *testing.T) (bytes int64) {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", d.cmd.Process.Pid))
	must(t, err)
	for line := range strings.Lines(string(text)) {
		if n, found := strings.CutPrefix(line, "VmHWM:"); found {
			_, err := fmt.Sscanf(n, "%d", &bytes)
			must(t, err)
		}
	}
	return bytes << 10
}

// TestHostileSockets: a descriptor in the place of one of the two sockets that are always there ends the start, and says
// which it is and what to do.
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
			listening(t, "token", "unix", filepath.Join(perceptdtest.ShortFolder(t), "1")), listening(t, "token", "unix", filepath.Join(perceptdtest.ShortFolder(t), "2")),
		}, `descriptor 4 is a second socket named "token"`},
	} {
		store := newFDStore(t)
		store.hold(row.given)
		d := newFolder(t, simulatedFor())
		store.start(t, d)
		<-d.ended
		if d.cmd.ProcessState.ExitCode() != exitFailed || !strings.Contains(d.text(), row.says) {
			t.Errorf("%s: ended with %d", row.name, d.cmd.ProcessState.ExitCode())
		}
	}
	for names, says := range map[string]string{"": "does not name", "a:b": "does not name", "a::b": "does not name"} {
		d := newFolder(t, simulatedFor())
		c := exec.Command("/bin/sh", append([]string{"-c", `LISTEN_PID=$$ exec "$0" "$@"`, binary(t, "perceptd")}, d.arguments()...)...)
		c.ExtraFiles = []*os.File{os.Stdin, os.Stdin, os.Stdin}
		d.process = begin(t, []string{"LISTEN_FDS=3", "LISTEN_FDNAMES=" + names}, c)
		<-d.ended
		if d.cmd.ProcessState.ExitCode() != exitFailed || !strings.Contains(d.text(), says) {
			t.Errorf("names %q: ended with %d", names, d.cmd.ProcessState.ExitCode())
		}
	}
}

// TestDeafServiceManager: a notify socket that is gone, is something else, or is never read keeps nobody from a token, holds
// up neither start nor stop for long, and loses no readiness.
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
			path := filepath.Join(perceptdtest.ShortFolder(t), "n")
			held := manager(path)
			if held != nil {
				defer held.Close()
			}
			d := newFolder(t, simulatedFor(modules...))
			d.process = launch(t, []string{"NOTIFY_SOCKET=" + path}, "perceptd", d.arguments()...)
			d.awaitHealth(t)
			if status, body, err := d.get(d.module("m39"), vaultToken); status != 200 {
				t.Errorf("%d %s %v", status, body, err)
			}
			if late, ok := held.(*net.UnixConn); ok && name == "read too late" {
				until(t, "it to be told that the daemon is ready", d.ended, func() bool { return hears(t, late, "READY=1") })
			}
			if status, body := d.reload(t, simulatedFor(modules[:1]...)); status != 200 {
				t.Errorf("reload: %d %s", status, body)
			}
			if status := d.stop(t); status != 0 {
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

// TestSocketOfAnotherDaemon: what leads to a second daemon that lives is taken from it by no path, and what is left of one
// that was killed is.
func TestSocketOfAnotherDaemon(t *testing.T) {
	t.Parallel()
	other := newFolder(t, simulatedFor("vision"))
	store := newFDStore(t)
	store.start(t, other)
	other.awaitHealth(t)
	until(t, "its socket to be stored", other.ended, func() bool { return len(store.names()) == 1 })
	stillAnswers := func(when string) {
		t.Helper()
		for _, socket := range []string{other.token(), other.module("vision")} {
			if status, body, err := other.get(socket, vaultToken); status != 200 {
				t.Errorf("%s: the other answers %d %s %v at %s", when, status, body, err, socket)
			}
		}
	}

	// Its own folder.
	second := launch(t, nil, "perceptd", append(other.arguments(), "--state-dir", t.TempDir())...)
	<-second.ended
	if status := second.cmd.ProcessState.ExitCode(); status != exitFailed || !strings.Contains(second.text(), fmt.Sprint(other.cmd.Process.Pid)) {
		t.Errorf("a second daemon in the folder ended with %d", status)
	}
	stillAnswers("a second daemon in the folder")

	// Its token socket in another's folder.
	d := newFolder(t, simulatedFor("vision"))
	must(t, os.Link(other.token(), d.token()))
	d.process = launch(t, nil, "perceptd", d.arguments()...)
	<-d.ended
	if status := d.cmd.ProcessState.ExitCode(); status != exitFailed || !strings.Contains(d.text(), d.token()) {
		t.Errorf("a daemon in whose folder the other serves ended with %d", status)
	}
	stillAnswers("a daemon in whose folder it serves")
	must(t, os.Remove(d.token()))

	// Its module's socket in another's folder: that module's trouble alone.
	must(t, os.MkdirAll(filepath.Dir(d.module("vision")), 0o700))
	_ = os.Remove(d.module("vision"))
	must(t, os.Link(other.module("vision"), d.module("vision")))
	d.again(t)
	if trouble := strings.Join(d.status(t).Trouble, "\n"); !strings.Contains(trouble, "module vision has no socket") {
		t.Errorf("trouble %q", trouble)
	}
	if status, body, err := d.get(d.token(), vaultToken); status != 200 {
		t.Errorf("users get %d %s %v", status, body, err)
	}
	stillAnswers("a daemon whose module's folder it serves in")
	d.stop(t)
	if inodeOf(t, d.module("vision")) != inodeOf(t, other.module("vision")) {
		t.Error("the link to the other's socket was taken away")
	}
	must(t, os.Remove(d.module("vision")))

	// Its listener among the descriptors that are kept for another.
	thief := newFDStore(t)
	for _, file := range store.files() {
		if strings.HasPrefix(file.Name(), storedModule) {
			fd, err := unix.FcntlInt(file.Fd(), unix.F_DUPFD_CLOEXEC, 0)
			must(t, err)
			thief.put(os.NewFile(uintptr(fd), file.Name()))
		}
	}
	thief.start(t, d)
	d.awaitHealth(t)
	if inodeOf(t, d.module("vision")) == inodeOf(t, other.module("vision")) {
		t.Error("the daemon serves on the other's socket")
	}
	if left := d.stillOpen(t, store.files()); len(left) > 0 {
		t.Errorf("still open: %q", left)
	}
	stillAnswers("a daemon that was handed its listener")
	d.stop(t)

	// Killed, it leaves sockets that nobody serves.
	must(t, other.cmd.Process.Kill())
	<-other.ended
	store.clear()
	other.again(t)
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
		path func(d *daemonProcess) string
		file bool // not a folder
	}{
		{"the runtime folder", func(d *daemonProcess) string { return d.dir }, false},
		{"the token socket", (*daemonProcess).token, true},
		{"the admin socket", (*daemonProcess).admin, true},
		{"the modules' folders", func(d *daemonProcess) string { return filepath.Join(d.dir, api.ModulesDirName) }, false},
		{"a module's folder", func(d *daemonProcess) string { return filepath.Dir(d.module("vision")) }, false},
		{"a module's socket", func(d *daemonProcess) string { return d.module("vision") }, true},
		{"the state folder", (*daemonProcess).state, false},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			for _, end := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
				testBindMount(t, end, row.path, row.file)
			}
		})
	}
}

// TestRevocationOutlivesItsRecord: whatever becomes of the record of policy changes over a crash, the token that systemd has
// held is withheld as before, the log tells of it once, and the record is whole again.
func TestRevocationOutlivesItsRecord(t *testing.T) {
	t.Parallel()
	const oneOfTwo = "one of the two files of the policy changes cannot be used, the other is in force"
	for _, row := range []struct {
		name   string
		asRoot bool                                             // folders are mounted
		begin  func(t *testing.T, d *daemonProcess)             // before the start; nil: nothing is done
		before func(t *testing.T, d *daemonProcess)             // the revocation
		status int                                              // of the revocation
		after  func(t *testing.T, d *daemonProcess, old string) // the crash; old is the record from before the revocation
		says   string
	}{
		{
			name: "a folder is mounted over it", asRoot: true, status: 200, says: "the record of policy changes was gone",
			after: func(t *testing.T, d *daemonProcess, _ string) { cover(t, t.TempDir(), d.state()) },
		},
		{
			name: "it is removed", status: 200, says: oneOfTwo,
			after: func(t *testing.T, d *daemonProcess, _ string) { must(t, os.Remove(d.record())) },
		},
		{
			name: "an older one is mounted over it", asRoot: true, status: 200, says: "the record of policy changes was older",
			after: func(t *testing.T, d *daemonProcess, old string) {
				folder := t.TempDir()
				must(t, os.WriteFile(filepath.Join(folder, filepath.Base(d.record())), []byte(old), 0o600))
				cover(t, folder, d.state())
			},
		},
		{
			name: "an older one is restored from a backup", status: 200, says: oneOfTwo,
			after: func(t *testing.T, d *daemonProcess, old string) {
				must(t, os.WriteFile(d.record(), []byte(old), 0o600))
			},
		},
		{
			name: "it is torn", status: 200, says: oneOfTwo,
			after: func(t *testing.T, d *daemonProcess, old string) {
				must(t, os.WriteFile(d.record(), []byte(old[:len(old)/2]), 0o600))
			},
		},
		{
			name: "the disk was full", asRoot: true, begin: smallDisk, before: fill, status: 507, says: "the record of policy changes was older",
			after: func(t *testing.T, d *daemonProcess, _ string) { empty(t, d) },
		},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			if row.asRoot && os.Getuid() != 0 {
				t.Skip("folders are mounted: run it as root")
			}
			store := newFDStore(t)
			d := newFolder(t, simulatedFor())
			if row.begin != nil {
				row.begin(t, d)
			}
			store.start(t, d)
			d.awaitHealth(t)
			d.held(t)
			until(t, "the cache to be stored", d.ended, func() bool { return len(store.all()) == 1 })
			report := func(effect string, want int) {
				t.Helper()
				status, body, err := d.ask(d.admin(), "POST", api.PathPolicyChanges, `{"all_resources":true,"effect":"`+effect+`"}`)
				if status != want {
					t.Fatalf("%d %s %v", status, body, err)
				}
				until(t, "the change to be stored", d.ended, func() bool { return store.hasChange(effect) })
			}
			report("granted", 200)
			old, err := os.ReadFile(d.record())
			must(t, err)
			if row.before != nil {
				row.before(t, d)
			}
			report("revoked", row.status)
			must(t, d.cmd.Process.Kill())
			<-d.ended
			row.after(t, d, string(old))
			store.start(t, d)
			d.awaitHealth(t)
			if status, body, err := d.get(d.token(), vaultToken); status != 403 || !strings.Contains(body, string(api.CodeRevoked)) {
				t.Errorf("a token from before the revocation: %d %.300s %v", status, body, err)
			}
			if n := strings.Count(d.text(), row.says); n != 1 {
				t.Errorf("the log tells of it %d times", n)
			}
			until(t, "the record to be whole", d.ended, func() bool {
				text, err := os.ReadFile(d.record())
				return err == nil && strings.Contains(string(text), `"revoked"`)
			})
		})
	}
}

// hasChange reports whether the cache that is kept last has a policy change of that effect.
func (s *fdStore) hasChange(effect string) bool {
	s.mu.Lock() // else it may be closed meanwhile
	defer s.mu.Unlock()
	if len(s.kept) != 1 {
		return false // the older is about to go
	}
	memory, err := store.Carried(s.kept[0])
	return err == nil && slices.ContainsFunc(memory.Record.Changes, func(p tokencache.PolicyChange) bool { return p.Effect.String() == effect })
}

func (d *daemonProcess) record() string { return filepath.Join(d.state(), "policy-changes.json") }

// servesOrEnds waits for one of the two, and reports whether the daemon serves.
func (d *daemonProcess) servesOrEnds() bool {
	for {
		select {
		case <-d.ended:
			return false
		case <-time.After(10 * time.Millisecond):
			if status, _, err := d.get(d.admin(), api.PathHealth); err == nil && status == 200 {
				return true
			}
		}
	}
}

func testBindMount(t *testing.T, end syscall.Signal, path func(*daemonProcess) string, file bool) {
	t.Helper()
	d := newFolder(t, simulatedFor("vision"))
	d.giveKey(t, d.keyFile(), 'k')
	d.again(t)
	before := d.held(t)
	if status, body, err := d.ask(d.admin(), "POST", api.PathPolicyChanges, `{"all_resources":true,"effect":"granted"}`); status/100 != 2 {
		t.Fatalf("%d %s %v", status, body, err)
	}
	until(t, "the tokens to be on the disk", d.ended, func() bool { _, err := os.Stat(d.sealed()); return err == nil })

	over := t.TempDir()
	mark := filepath.Join(over, "mark")
	must(t, os.WriteFile(mark, []byte("theirs"), 0o600))
	uncover := cover(t, map[bool]string{true: mark, false: over}[file], path(d))
	must(t, d.cmd.Process.Signal(end))
	<-d.ended
	if end == syscall.SIGTERM && d.cmd.ProcessState.ExitCode() != 0 {
		t.Errorf("it ended with %d", d.cmd.ProcessState.ExitCode())
	}
	// Started over it, it serves, or says why it does not.
	d.process = launch(t, nil, "perceptd", d.arguments()...)
	serves := d.servesOrEnds()
	if !serves && !strings.Contains(d.text(), path(d)) {
		t.Errorf("it neither serves nor names what is in its way")
	}
	if text, err := os.ReadFile(mark); err != nil || string(text) != "theirs" {
		t.Errorf("what was mounted was changed: %q %v", text, err)
	}
	if serves {
		must(t, d.cmd.Process.Signal(end))
		<-d.ended
	}
	uncover()
	d.again(t)
	d.mustBeSame(t, "with the mount gone", before)
	if changes := d.status(t).Changes; len(changes) != 1 {
		t.Errorf("%d policy changes are on record, one was", len(changes))
	}
	if status, body, err := d.get(d.module("vision"), vaultToken); status != 200 {
		t.Errorf("the module gets %d %s %v", status, body, err)
	}
	d.stop(t)
}
