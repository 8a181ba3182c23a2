package daemon

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"perceptd/agent/api"
	"perceptd/cmd/perceptd/e2e/harness"
)

func TestSockets(t *testing.T) {
	t.Parallel()
	d := harness.LaunchDaemon(t, harness.SimulatedFor("vision"))
	for path, want := range map[string]os.FileMode{d.Token(): 0o666, d.Admin(): 0o660, d.Module("vision"): 0o666} {
		info, err := os.Lstat(path)
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode() != want|os.ModeSocket {
			t.Errorf("%s: %v", path, info.Mode())
		}
	}
	for socket, identity := range map[string]string{d.Token(): "device", d.Module("vision"): "vision"} {
		status, body, err := d.Get(socket, harness.VaultToken)
		if err != nil || status != 200 || !strings.Contains(body, `"identity":"`+identity+`"`) {
			t.Errorf("%s: %d %s %v", socket, status, body, err)
		}
	}
	// Whoever comes in on a module's socket is that module, root or not.
	if status, body, _ := d.Get(d.Module("vision"), harness.VaultToken+"&identity=device"); status != 403 {
		t.Errorf("the module vision got a token of device: %d %s", status, body)
	}
	if status := d.Stop(t); status != 0 {
		t.Errorf("exit status %d", status)
	}
	if _, err := os.Lstat(d.Token()); err == nil {
		t.Error("the token socket is still there")
	}
	if _, err := os.Stat(filepath.Dir(d.Module("vision"))); err != nil {
		t.Errorf("a module's folder is gone with the daemon, and what has it mounted sees nothing any more: %v", err)
	}
}

// A module is known by its socket, so that no other user of the device may get to it. What mounts its
// folder elsewhere is root's business.
func TestModuleSocketsAreShut(t *testing.T) {
	t.Parallel()
	d := harness.LaunchDaemon(t, harness.SimulatedFor("vision"))
	info, err := os.Stat(filepath.Join(d.Dir, api.ModulesDirName))
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm() != 0o700 {
		t.Errorf("%v", info.Mode())
	}
	if os.Getuid() != 0 {
		return // only root can be somebody else
	}
	for _, dir := range []string{d.Dir, filepath.Dir(harness.Binary(t, "perceptctl"))} {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for socket, status := range map[string]int{d.Module("vision"): 3, d.Token(): 4} {
		c := exec.Command(harness.Binary(t, "perceptctl"), "--socket", socket, "token", "--resource", harness.VaultURI)
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		if out, _ := c.CombinedOutput(); c.ProcessState.ExitCode() != status {
			t.Errorf("another user at %s: exit status %d, want %d\n%s", socket, c.ProcessState.ExitCode(), status, out)
		}
	}
}

// What one module has done to its own folder is its own trouble.
func TestSpoiltModuleFolder(t *testing.T) {
	t.Parallel()
	d := harness.LaunchDaemon(t, harness.SimulatedFor())
	if err := os.MkdirAll(d.Module("vision")+"/its own", 0o755); err != nil { // a folder in the socket's place
		t.Fatal(err)
	}
	if status, body := d.Reload(t, harness.SimulatedFor("vision", "speech")); status != 200 {
		t.Errorf("%d %s", status, body)
	}
	if status, _, err := d.Get(d.Module("speech"), harness.VaultToken); status != 200 {
		t.Errorf("the other module: %d %v", status, err)
	}
	if got := d.Status(t).Trouble; len(got) != 1 || !strings.Contains(got[0], "module vision has no socket") {
		t.Errorf("trouble %q", got)
	}
	if err := os.RemoveAll(d.Module("vision")); err != nil {
		t.Fatal(err)
	}
	if status, body := d.Reload(t, harness.SimulatedFor("vision", "speech")); status != 200 {
		t.Errorf("%d %s", status, body)
	}
	if status, _, err := d.Get(d.Module("vision"), harness.VaultToken); status != 200 || len(d.Status(t).Trouble) != 0 {
		t.Errorf("mended: %d %v %q", status, err, d.Status(t).Trouble)
	}
}

// A module that removes its socket, or puts something else in its place, does not keep the daemon from feeding
// systemd's watchdog; it has its socket again without a person, or by a reload.
func TestRemovedModuleSocket(t *testing.T) {
	t.Parallel()
	for name, environment := range map[string]func(t *testing.T) ([]string, <-chan string){
		"systemd": func(t *testing.T) ([]string, <-chan string) {
			manager, told := harness.ListenAsSystemd(t)
			return []string{"NOTIFY_SOCKET=" + manager, "WATCHDOG_USEC=200000"}, told
		},
		"reload": func(t *testing.T) ([]string, <-chan string) { return nil, nil },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			with, told := environment(t)
			d := harness.LaunchDaemon(t, harness.SimulatedFor("vision"), with...)
			if err := os.Remove(d.Module("vision")); err != nil {
				t.Fatal(err)
			}
			if told == nil {
				if got := d.Status(t).Trouble; len(got) != 1 ||
					!strings.Contains(got[0], "module vision has no socket any more") {
					t.Errorf("trouble %q", got)
				}
				if status, body := d.Reload(t, harness.SimulatedFor("vision")); status != 200 {
					t.Errorf("%d %s", status, body)
				}
			} else {
				harness.AwaitPings(t, told)
			}
			harness.Until(t, "the socket", d.Ended, func() bool {
				status, _, err := d.Get(d.Module("vision"), harness.VaultToken)
				return err == nil && status == 200
			})
			if got := d.Status(t).Trouble; len(got) != 0 {
				t.Errorf("made again: %q", got)
			}
		})
	}
}

// passed makes a listening socket in d's folder, as systemd does, and returns its descriptor.
func passed(t *testing.T, path string, mode os.FileMode) *os.File {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	file, err := l.File()
	if err := errors.Join(err, l.Close(), os.Chmod(path, mode)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = file.Close() })
	return file
}

// The sockets that systemd passes outlive the daemon: who connects between two of them is answered by
// the second.
func TestSocketActivation(t *testing.T) {
	t.Parallel()
	harness.Binary(t, "perceptd") // built now, since who waits below does not wait for a compiler
	d := harness.NewDaemon(t, harness.SimulatedFor())
	// Modes that the daemon would not choose, so that it shows when it touches them.
	files := []*os.File{
		passed(t, d.Admin(), 0o640), passed(t, filepath.Join(d.Dir, "other.sock"), 0o640), passed(t, d.Token(), 0o640),
	}
	activate := func() *harness.Process {
		c := exec.Command("/bin/sh", append([]string{"-c", `LISTEN_PID=$$ exec "$0" "$@"`,
			harness.Binary(t, "perceptd")}, d.Arguments()...)...)
		c.ExtraFiles = files
		return harness.Begin(t, []string{"LISTEN_FDS=3", "LISTEN_FDNAMES=admin:other:token"}, c)
	}
	answered := make(chan int)
	wait := func() {
		go func() {
			status, _, _ := d.Get(d.Token(), harness.VaultToken)
			answered <- status
		}()
	}
	wait() // nobody is there to accept yet
	d.Process = activate()
	if got := <-answered; got != 200 {
		t.Errorf("who waited for the first daemon got %d", got)
	}
	if status := d.Stop(t); status != 0 {
		t.Errorf("exit status %d", status)
	}
	if !strings.Contains(d.Text(), "descriptors that nobody knows were closed") {
		t.Error("the third socket is not told of")
	}
	for _, path := range []string{d.Token(), d.Admin()} {
		if info, err := os.Lstat(path); err != nil || info.Mode() != os.ModeSocket|0o640 {
			t.Errorf("%s after the daemon: %v", path, err)
		}
	}
	wait()
	d.Process = activate()
	if got := <-answered; got != 200 {
		t.Errorf("who waited for the second daemon got %d", got)
	}
	// A socket that can accept no more is the end of the daemon, and not of silence.
	if err := unix.Shutdown(int(files[2].Fd()), unix.SHUT_RDWR); err != nil {
		t.Fatal(err)
	}
	<-d.Ended
	if got := d.Cmd.ProcessState.ExitCode(); got != harness.ExitFailed ||
		!strings.Contains(d.Text(), "perceptd: token socket: accept ") {
		t.Errorf("exit status %d", got)
	}
}

// However many connections a caller keeps, the technicians' socket answers, and the daemon still gets to
// itself: not even its own user can have systemd restart it.
func TestFewDescriptors(t *testing.T) {
	t.Parallel()
	manager, told := harness.ListenAsSystemd(t)
	d := harness.NewDaemon(t, harness.SimulatedFor())
	c := exec.Command("/bin/sh", append([]string{"-c", `ulimit -n 64; exec "$0" "$@"`, harness.Binary(t, "perceptd")},
		d.Arguments()...)...)
	d.Process = harness.Begin(t, []string{"NOTIFY_SOCKET=" + manager, "WATCHDOG_USEC=200000"}, c)
	d.AwaitHealth(t)
	// A stream is never idle, so that it makes room for none.
	stream := func() (net.Conn, string) {
		t.Helper()
		conn, err := net.Dial("unix", d.Token())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		if _, err := fmt.Fprintf(conn, "GET %s?resource=%s HTTP/1.1\r\nHost: localhost\r\n\r\n",
			api.PathWatch, harness.VaultURI); err != nil {
			t.Fatal(err)
		}
		answer := make([]byte, len("HTTP/1.1 200"))
		if _, err := io.ReadFull(conn, answer); err != nil {
			t.Fatal(err)
		}
		return conn, string(answer[len("HTTP/1.1 "):])
	}
	kept, answered := stream()
	if answered != "200" {
		t.Fatalf("the first one: %s", answered)
	}
	for others := 0; answered == "200"; others++ {
		if _, answered = stream(); others == 64 {
			t.Fatal("there is no end")
		}
	}
	oneTooMany := func() {
		t.Helper()
		// the line for refusals is short here
		if status, body, err := d.Get(d.Token(), harness.VaultToken); err == nil && status != 429 {
			t.Errorf("one too many: %d %s", status, body)
		}
	}
	oneTooMany()
	harness.Until(t, "readiness, seen on the admin socket", d.Ended, func() bool { return d.Status(t).Ready })
	harness.AwaitPings(t, told)
	oneTooMany() // all the while
	_ = kept.Close()
	harness.Until(t, "a free connection", d.Ended, func() bool {
		status, _, err := d.Get(d.Token(), harness.VaultToken)
		return err == nil && status == 200
	})
}

// nobodys returns the command that starts d as user nobody, whom modes keep out as they do not root. The test has to be
// root.
func nobodys(t *testing.T, d *harness.Daemon) *exec.Cmd {
	t.Helper()
	for _, path := range []string{d.Dir, d.Config} {
		if err := os.Chown(path, 65534, 65534); err != nil {
			t.Fatal(err)
		}
	}
	for _, path := range []string{filepath.Dir(d.Config), filepath.Dir(harness.Binary(t, "perceptd"))} {
		if err := os.Chmod(path, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	c := exec.Command(harness.Binary(t, "perceptd"), d.Arguments()...)
	c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	return c
}

// Nobody may read the daemon's memory: not from a core dump, not as the same user.
func TestMemoryIsShut(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("needs root: what a process shuts belongs to root then, which another user's shows")
	}
	d := harness.NewDaemon(t, strings.Replace(harness.SimulatedFor(), "{ uid = 0 }", "{ uid = 65534 }", 1))
	d.Process = harness.Begin(t, nil, nobodys(t, d))
	d.AwaitHealth(t)
	var memory unix.Stat_t
	if err := unix.Stat(fmt.Sprintf("/proc/%d/mem", d.Cmd.Process.Pid), &memory); err != nil || memory.Uid != 0 {
		t.Errorf("the daemon's memory belongs to user %d, %v", memory.Uid, err)
	}
	limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", d.Cmd.Process.Pid))
	if err != nil || !strings.Contains(strings.Join(strings.Fields(string(limits)), " "), "Max core file size 0 0 ") {
		t.Errorf("%v\n%s", err, limits)
	}
}
