package socket

import (
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// private is the folder that is locked, as the daemon has it.
const private = "modules"

// folder returns a runtime folder that Lock accepts, whatever the umask.
func folder(t *testing.T) string {
	t.Helper()
	dir := shortFolder(t)
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

func locked(t *testing.T, dir string) *Dir {
	t.Helper()
	h, err := Lock(dir, private)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = h.Close() })
	return h
}

func listen(t *testing.T, h *Dir, in, name string) *Listener {
	t.Helper()
	l, err := h.Listen(in, name, 0o666, -1)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

// stale leaves a socket at path that nobody serves, as a killed daemon does.
func stale(t *testing.T, path string) {
	t.Helper()
	// No process may be started meanwhile: until it runs its own program it has the socket too.
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: path})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
}

func wantError(t *testing.T, err error, parts ...string) {
	t.Helper()
	if err == nil {
		t.Error("no error")
		return
	}
	for _, part := range parts {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("error %q does not say %q", err, part)
		}
	}
}

// talks checks that a client that connects to path reaches l.
func talks(t *testing.T, l *Listener, path string) {
	t.Helper()
	client, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	server, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := server.Write([]byte("hello")); err != nil {
		t.Error(err)
	}
	_ = server.Close()
	if got, err := io.ReadAll(client); err != nil || string(got) != "hello" {
		t.Errorf("read %q, %v", got, err)
	}
}

func TestListen(t *testing.T) {
	t.Parallel()
	dir := folder(t)
	h := locked(t, dir)
	for _, row := range []struct {
		in, name string
		mode     fs.FileMode
	}{
		{"", "token.sock", 0o666},
		{"", "admin.sock", 0o660},
		{"modules/vision", "token.sock", 0o666},
		{"modules/./vision", "other.sock", 0o600},
		{".", strings.Repeat("n", longestName), 0o666},
	} {
		l, err := h.Listen(row.in, row.name, row.mode, -1)
		if err != nil {
			t.Errorf("%s/%s: %v", row.in, row.name, err)
			continue
		}
		path := filepath.Join(dir, row.in, row.name)
		if l.Addr().String() != path || l.Addr().Network() != "unix" {
			t.Errorf("Addr() = %v, want %s", l.Addr(), path)
		}
		if st, err := os.Lstat(path); err != nil || st.Mode() != fs.ModeSocket|row.mode {
			t.Errorf("%s: mode %v, %v, want %v", path, st.Mode(), err, row.mode)
		}
		talks(t, l, path)
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is still there after Close: %v", path, err)
		}
		if err := l.Close(); err != nil {
			t.Errorf("second Close: %v", err)
		}
	}
	if st, err := os.Stat(filepath.Join(dir, "modules", "vision")); err != nil || st.Mode().Perm() != 0o755 {
		t.Errorf("folder made with %v, %v", st.Mode(), err)
	}
}

func TestListenSetsGroup(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("needs root: only root may give a socket to any group")
	}
	dir := folder(t)
	l, err := locked(t, dir).Listen("", "admin.sock", 0o660, 4242)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(dir, "admin.sock"), &st); err != nil || st.Gid != 4242 || st.Mode&0o777 != 0o660 {
		t.Errorf("group %d, mode %o, %v", st.Gid, st.Mode, err)
	}
}

func TestListenReplacesStaleSockets(t *testing.T) {
	t.Parallel()
	dir := folder(t)
	path := filepath.Join(dir, "token.sock")
	stale(t, path)
	stale(t, filepath.Join(dir, ".token.sock.new")) // of a daemon killed half-way
	l := listen(t, locked(t, dir), "", "token.sock")
	talks(t, l, path)
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 2 {
		t.Errorf("folder holds %v, %v, want the lock and the socket", entries, err)
	}
}

func TestListenLeavesALiveSocketAlone(t *testing.T) {
	t.Parallel()
	dir := folder(t)
	h := locked(t, dir)
	first := listen(t, h, "", "token.sock")
	path := filepath.Join(dir, "token.sock")
	_, err := h.Listen("", "token.sock", 0o666, -1)
	wantError(t, err, "another perceptd is serving on "+path, "stop it")
	probing, err := first.Accept()
	if err != nil {
		t.Fatal(err)
	}
	_ = probing.Close()
	talks(t, first, path)
}

// A server too busy to accept is alive: connecting to its full queue gives EAGAIN.
func TestListenLeavesABusySocketAlone(t *testing.T) {
	t.Parallel()
	dir := folder(t)
	path := filepath.Join(dir, "token.sock")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: path}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	waiting, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer waiting.Close()
	_, err = locked(t, dir).Listen("", "token.sock", 0o666, -1)
	wantError(t, err, "another perceptd is serving on")
}

func TestListenRefusesWhatItCannotReplace(t *testing.T) {
	t.Parallel()
	dir := folder(t)
	h := locked(t, dir)
	target := filepath.Join(folder(t), "elsewhere.sock")
	stale(t, target)
	datagram, err := net.ListenUnixgram("unixgram",
		&net.UnixAddr{Net: "unixgram", Name: filepath.Join(dir, "datagram")})
	if err != nil {
		t.Fatal(err)
	}
	defer datagram.Close()
	for name, plant := range map[string]func(path string) error{
		"regular": func(path string) error { return os.WriteFile(path, []byte("keep"), 0o600) },
		"folder":  func(path string) error { return os.MkdirAll(filepath.Join(path, "its own"), 0o755) },
		"link":    func(path string) error { return os.Symlink(target, path) },
		"dead":    func(path string) error { return os.Symlink("/nowhere", path) },
		"fifo":    func(path string) error { return unix.Mkfifo(path, 0o600) },
	} {
		path := filepath.Join(dir, name)
		if err := plant(path); err != nil {
			t.Fatal(err)
		}
		before, err := os.Lstat(path)
		if err != nil {
			t.Fatal(err)
		}
		_, err = h.Listen("", name, 0o666, -1)
		wantError(t, err, path+" is there and is not a socket", "remove it")
		if after, err := os.Lstat(path); err != nil || !os.SameFile(before, after) {
			t.Errorf("%s was replaced: %v", name, err)
		}
	}
	_, err = h.Listen("", "datagram", 0o666, -1)
	wantError(t, err, "cannot be told")
	if _, err := os.Lstat(target); err != nil {
		t.Errorf("the link's target: %v", err)
	}
}

func TestListenRefusesNames(t *testing.T) {
	t.Parallel()
	h := locked(t, folder(t))
	for _, name := range []string{"", ".", "..", "a/b", "@\x00", "\x00abstract", strings.Repeat("n", longestName+1)} {
		_, err := h.Listen("", name, 0o666, -1)
		wantError(t, err, "is no name for a socket")
	}
	for _, in := range []string{"..", "../x", "/etc", "a/../.."} {
		_, err := h.Listen(in, "token.sock", 0o666, -1)
		wantError(t, err, "is not below "+h.dir)
	}
}

func TestListenFollowsNoLinkBelowTheFolder(t *testing.T) {
	t.Parallel()
	dir, elsewhere := folder(t), folder(t)
	if err := os.Symlink(elsewhere, filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	h := locked(t, dir)
	for _, in := range []string{"link", "link/vision", "file", "file/x"} {
		_, err := h.Listen(in, "token.sock", 0o666, -1)
		wantError(t, err, "is a link, which is not followed")
	}
	if entries, err := os.ReadDir(elsewhere); err != nil || len(entries) != 0 {
		t.Errorf("the link's target holds %v, %v", entries, err)
	}
}

// The path is far longer than a socket address holds.
func TestListenInADeepFolder(t *testing.T) {
	t.Parallel()
	dir := folder(t)
	h := locked(t, dir)
	deep := strings.Repeat(strings.Repeat("d", 50)+"/", 5)
	l := listen(t, h, deep, "token.sock")
	in, err := os.Open(filepath.Join(dir, deep))
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	talks(t, l, entry(in, "token.sock"))
}

func TestCloseRemovesOnlyItsOwnSocket(t *testing.T) {
	t.Parallel()
	dir := folder(t)
	path := filepath.Join(dir, "token.sock")
	l := listen(t, locked(t, dir), "", "token.sock")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	stale(t, path)
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("another's socket was removed: %v", err)
	}
}

func TestCloseAfterTheSocketWasRemoved(t *testing.T) {
	t.Parallel()
	dir := folder(t)
	l := listen(t, locked(t, dir), "", "token.sock")
	if err := os.Remove(filepath.Join(dir, "token.sock")); err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
}

// The handle keeps a link that was put in the socket's place from being given the socket's mode.
func TestPermitRefusesALink(t *testing.T) {
	t.Parallel()
	dir := folder(t)
	secret := filepath.Join(folder(t), "secret")
	if err := errors.Join(os.WriteFile(secret, nil, 0o600), os.Symlink(secret, filepath.Join(dir, "s"))); err != nil {
		t.Fatal(err)
	}
	in, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	_, err = permit(in, "s", 0o666, -1)
	wantError(t, err, "something else took")
	if st, err := os.Stat(secret); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("the link's target has %v, %v", st.Mode(), err)
	}
	_, err = permit(in, "missing", 0o666, -1)
	wantError(t, err, "open")
}

func TestServeErrorsLeaveNothingBehind(t *testing.T) {
	t.Parallel()
	dir := folder(t)
	if err := os.Mkdir(filepath.Join(dir, "taken"), 0o755); err != nil {
		t.Fatal(err)
	}
	in, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	_, err = serve(in, "taken", 0o666, -1) // a folder that came after checkFree looked
	wantError(t, err, "rename")
	if err := os.Mkdir(filepath.Join(dir, ".busy.new"), 0o755); err != nil {
		t.Fatal(err)
	}
	_, err = serve(in, "busy", 0o666, -1)
	wantError(t, err, "remove .busy.new")
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 2 {
		t.Errorf("folder holds %v, %v", entries, err)
	}
	_, _, err = bind(in, "no/such", 0o666, -1)
	wantError(t, err, "is /proc mounted?")
	_, _, err = bind(in, "taken", 0o666, -1)
	wantError(t, err, "bind")
}

func TestLockRefusesFolders(t *testing.T) {
	t.Parallel()
	dir := folder(t)
	path := func(name string) string { return filepath.Join(dir, name) }
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.Symlink(folder(t), path("link")))
	must(os.WriteFile(path("file"), nil, 0o600))
	must(os.Mkdir(path("linked"), 0o755))
	must(os.Symlink(folder(t), path("linked/"+private)))
	must(errors.Join(os.Mkdir(path("open"), 0o700), os.Chmod(path("open"), 0o777)))
	must(errors.Join(os.Mkdir(path("group"), 0o700), os.Chmod(path("group"), 0o770)))
	for _, row := range []struct{ dir, says string }{
		{"", "--runtime-dir"},
		{path("missing"), "make it with mode 0755"},
		{path("link"), "is a link, which is not followed"},
		{path("link") + "/", "is a link, which is not followed"},
		{path("file"), "is not a folder"},
		{path("linked"), private + " is not a folder, or is a link, which is not followed"},
		{path("open"), "others may write"},
		{path("group"), "others may write"},
	} {
		_, err := Lock(row.dir, private)
		wantError(t, err, row.says)
	}
	must(errors.Join(os.Mkdir(path("sticky"), 0o700), os.Chmod(path("sticky"), 0o777|os.ModeSticky)))
	locked(t, path("sticky"))
}

func TestLockRefusesAnotherUsersFolder(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("needs root: only root may give a folder away")
	}
	dir := folder(t)
	if err := os.Chown(dir, 4242, -1); err != nil {
		t.Fatal(err)
	}
	_, err := Lock(dir, private)
	wantError(t, err, "belongs to user 4242", "--runtime-dir")
}

// A daemon of a version that had a lock file, and this one, never serve beside each other.
func TestLockHeedsTheOlderOne(t *testing.T) {
	t.Parallel()
	dir := folder(t)
	path := filepath.Join(dir, olderLock)
	older, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer older.Close()
	take := func() error { return unix.Flock(int(older.Fd()), unix.LOCK_EX|unix.LOCK_NB) }
	if err := take(); err != nil {
		t.Fatal(err)
	}
	_, err = Lock(dir, private)
	wantError(t, err, "program socket.test (process "+strconv.Itoa(os.Getpid())+") is serving in "+dir)
	if err := unix.Flock(int(older.Fd()), unix.LOCK_UN); err != nil {
		t.Fatal(err)
	}
	h := locked(t, dir)
	if err := take(); !errors.Is(err, unix.EWOULDBLOCK) {
		t.Errorf("an older daemon could start beside this one: %v", err)
	}
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	if err := take(); err != nil {
		t.Errorf("after the daemon: %v", err)
	}
}

// What another user could have made or locked keeps nobody from starting.
func TestLockIgnoresWhatIsNoOlderOne(t *testing.T) {
	t.Parallel()
	for name, plant := range map[string]func(path string) error{
		"link":   func(path string) error { return os.Symlink("/etc/hostname", path) },
		"fifo":   func(path string) error { return unix.Mkfifo(path, 0o600) },
		"folder": func(path string) error { return os.Mkdir(path, 0o700) },
		"hard link": func(path string) error {
			return errors.Join(os.WriteFile(path+".2", nil, 0o600), os.Link(path+".2", path))
		},
		"open to others": func(path string) error {
			return errors.Join(os.WriteFile(path, nil, 0o600),
				os.Chmod(path, 0o644))
		},
	} {
		dir := folder(t)
		path := filepath.Join(dir, olderLock)
		if err := plant(path); err != nil {
			t.Fatal(err)
		}
		if fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0); err == nil {
			defer unix.Close(fd)
			_ = unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
		}
		h, err := Lock(dir, private)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		_ = h.Close()
	}
}

func TestLockNamesItsHolder(t *testing.T) {
	t.Parallel()
	dir := folder(t)
	h := locked(t, dir)
	_, err := Lock(dir, private)
	wantError(t, err, "program socket.test (process "+strconv.Itoa(os.Getpid())+") is serving in "+dir, "stop it",
		"--runtime-dir and --state-dir")
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	locked(t, dir) // the folder left behind is no hindrance
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 || entries[0].Name() != private {
		t.Errorf("there is more than the folder that is locked: %v %v", entries, err)
	}
}

// Whoever can open a folder can lock it, so that the one that is locked is shut first.
func TestLockShutsItsFolder(t *testing.T) {
	t.Parallel()
	dir := folder(t)
	path := filepath.Join(dir, private)
	if err := errors.Join(os.Mkdir(path, 0o700), os.Chmod(path, 0o755)); err != nil {
		t.Fatal(err)
	}
	locked(t, dir)
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("%v %v", info.Mode(), err)
	}
}

func TestConcurrentStarts(t *testing.T) {
	t.Parallel()
	dir := folder(t)
	stale(t, filepath.Join(dir, "token.sock"))
	var (
		wg   sync.WaitGroup
		mu   sync.Mutex
		wins []*Listener
	)
	for range 16 {
		wg.Go(func() {
			h, err := Lock(dir, private)
			if err != nil {
				return
			}
			t.Cleanup(func() { _ = h.Close() })
			l, err := h.Listen("", "token.sock", 0o666, -1)
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			wins = append(wins, l)
		})
	}
	wg.Wait()
	if len(wins) != 1 {
		t.Fatalf("%d of 16 starts won", len(wins))
	}
	talks(t, wins[0], filepath.Join(dir, "token.sock"))
	_ = wins[0].Close()
}

// Two processes start at once; the loser sees the winner, and takes over once the winner was killed.
func TestConcurrentProcesses(t *testing.T) {
	t.Parallel()
	const variable = "PERCEPT_TEST_SOCKET_FOLDER"
	if dir := os.Getenv(variable); dir != "" {
		h, err := Lock(dir, private)
		if err == nil {
			_, err = h.Listen("", "token.sock", 0o666, -1)
		}
		word := "won"
		if err != nil {
			word = "lost"
		}
		_, _ = os.Stdout.WriteString(word + "\n")
		_, _ = io.Copy(io.Discard, os.Stdin) // until the parent is done with it
		return
	}
	dir := folder(t)
	words := map[string]int{}
	var children []*exec.Cmd
	for range 4 {
		cmd := exec.Command(os.Args[0], "-test.run=^TestConcurrentProcesses$")
		cmd.Env = append(os.Environ(), variable+"="+dir)
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		defer in.Close()
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		children = append(children, cmd)
		defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
		word := make([]byte, 5)
		n, _ := io.ReadAtLeast(out, word, 4)
		words[strings.TrimSpace(string(word[:n]))]++
	}
	if words["won"] != 1 || words["lost"] != 3 {
		t.Errorf("processes say %v, want one that won", words)
	}
	if _, err := Lock(dir, private); err == nil {
		t.Error("the lock of a live process was taken")
	}
	for _, cmd := range children {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
	talks(t, listen(t, locked(t, dir), "", "token.sock"), filepath.Join(dir, "token.sock"))
}

// The umask is the process's, so this test has a process to itself.
func TestListenWhateverTheUmask(t *testing.T) {
	t.Parallel()
	const variable = "PERCEPT_TEST_SOCKET_UMASK"
	if os.Getenv(variable) == "" {
		cmd := exec.Command(os.Args[0], "-test.run=^TestListenWhateverTheUmask$")
		cmd.Env = append(os.Environ(), variable+"=1")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	for _, mask := range []int{0, 0o077, 0o277} {
		dir := folder(t)
		h := locked(t, dir)
		unix.Umask(mask)
		listen(t, h, "modules/vision", "token.sock")
		unix.Umask(0o022)
		for path, want := range map[string]fs.FileMode{"modules": 0o700, "modules/vision": 0o755,
			"modules/vision/token.sock": 0o666} {
			if st, err := os.Stat(filepath.Join(dir, path)); err != nil || st.Mode().Perm() != want {
				t.Errorf("umask %03o: %s has %v, %v, want %v", mask, path, st.Mode(), err, want)
			}
		}
	}
}

func TestDescriptorsAreCloseOnExec(t *testing.T) {
	t.Parallel()
	h := locked(t, folder(t))
	l := listen(t, h, "", "token.sock")
	file, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for name, fd := range map[string]uintptr{"folder": h.folder.Fd(), "socket folder": l.folder.Fd(),
		"inode": l.made.Fd(), "socket": file.Fd()} {
		if flags, err := unix.FcntlInt(fd, unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
			t.Errorf("%s: flags %#x, %v", name, flags, err)
		}
	}
}
