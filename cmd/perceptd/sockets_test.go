package main

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
	"perceptd/cmd/perceptd/e2e/perceptdtest"
)

func TestSockets(t *testing.T) {
	t.Parallel()
	d := launchDaemon(t, simulatedFor("vision"))
	for path, want := range map[string]os.FileMode{d.token(): 0o666, d.admin(): 0o660, d.module("vision"): 0o666} {
		info, err := os.Lstat(path)
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode() != want|os.ModeSocket {
			t.Errorf("%s: %v", path, info.Mode())
		}
	}
	for socket, identity := range map[string]string{d.token(): "device", d.module("vision"): "vision"} {
		status, body, err := d.get(socket, vaultToken)
		if err != nil || status != 200 || !strings.Contains(body, `"identity":"`+identity+`"`) {
			t.Errorf("%s: %d %s %v", socket, status, body, err)
		}
	}
	// Whoever comes in on a module's socket is that module, root or not.
	if status, body, _ := d.get(d.module("vision"), vaultToken+"&identity=device"); status != 403 {
		t.Errorf("the module vision got a token of device: %d %s", status, body)
	}
	if status := d.stop(t); status != 0 {
		t.Errorf("exit status %d", status)
	}
	if _, err := os.Lstat(d.token()); err == nil {
		t.Error("the token socket is still there")
	}
	if _, err := os.Stat(filepath.Dir(d.module("vision"))); err != nil {
		t.Errorf("a module's folder is gone with the daemon, and what has it mounted sees nothing any more: %v", err)
	}
}

// A module is known by its socket, so that no other user of the device may get to it. What mounts its
// folder elsewhere is root's business.
func TestModuleSocketsAreShut(t *testing.T) {
	t.Parallel()
	d := launchDaemon(t, simulatedFor("vision"))
	info, err := os.Stat(filepath.Join(d.dir, api.ModulesDirName))
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm() != 0o700 {
		t.Errorf("%v", info.Mode())
	}
	if os.Getuid() != 0 {
		return // only root can be somebody else
	}
	for _, dir := range []string{d.dir, filepath.Dir(binary(t, "perceptctl"))} {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for socket, status := range map[string]int{d.module("vision"): 3, d.token(): 4} {
		c := exec.Command(binary(t, "perceptctl"), "--socket", socket, "token", "--resource", perceptdtest.VaultURI)
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		if out, _ := c.CombinedOutput(); c.ProcessState.ExitCode() != status {
			t.Errorf("another user at %s: exit status %d, want %d\n%s", socket, c.ProcessState.ExitCode(), status, out)
		}
	}
}

// What one module has done to its own folder is its own trouble.
func TestSpoiltModuleFolder(t *testing.T) {
	t.Parallel()
	d := launchDaemon(t, simulatedFor())
	if err := os.MkdirAll(d.module("vision"), 0o755); err != nil { // a folder in the socket's place
		t.Fatal(err)
	}
	if status, body := d.reload(t, simulatedFor("vision", "speech")); status != 200 {
		t.Errorf("%d %s", status, body)
	}
	if status, _, err := d.get(d.module("speech"), vaultToken); status != 200 {
		t.Errorf("the other module: %d %v", status, err)
	}
	if got := d.status(t).Trouble; len(got) != 1 || !strings.Contains(got[0], "module vision has no socket") {
		t.Errorf("trouble %q", got)
	}
	if err := os.Remove(d.module("vision")); err != nil {
		t.Fatal(err)
	}
	if status, body := d.reload(t, simulatedFor("vision", "speech")); status != 200 {
		t.Errorf("%d %s", status, body)
	}
	if status, _, err := d.get(d.module("vision"), vaultToken); status != 200 || len(d.status(t).Trouble) != 0 {
		t.Errorf("mended: %d %v %q", status, err, d.status(t).Trouble)
	}
}

// A module that removes its socket, or puts another in its place, does not keep the daemon from feeding
// systemd's watchdog; a reload gives it its socket again.
func TestRemovedModuleSocket(t *testing.T) {
	t.Parallel()
	manager, told := listenAsSystemd(t)
	d := launchDaemon(t, simulatedFor("vision"), "NOTIFY_SOCKET="+manager, "WATCHDOG_USEC=200000")
	if err := os.Remove(d.module("vision")); err != nil {
		t.Fatal(err)
	}
	if got := d.status(t).Trouble; len(got) != 1 || !strings.Contains(got[0], "module vision has no socket any more") {
		t.Errorf("trouble %q", got)
	}
	awaitPings(t, told)
	if status, body := d.reload(t, simulatedFor("vision")); status != 200 {
		t.Errorf("%d %s", status, body)
	}
	if status, _, err := d.get(d.module("vision"), vaultToken); status != 200 || len(d.status(t).Trouble) != 0 {
		t.Errorf("made again: %d %v %q", status, err, d.status(t).Trouble)
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
	binary(t, "perceptd") // built now, since who waits below does not wait for a compiler
	d := newFolder(t, simulatedFor())
	// Modes that the daemon would not choose, so that it shows when it touches them.
	files := []*os.File{
		passed(t, d.admin(), 0o640), passed(t, filepath.Join(d.dir, "other.sock"), 0o640), passed(t, d.token(), 0o640),
	}
	activate := func() *process {
		c := exec.Command("/bin/sh", append([]string{"-c", `LISTEN_PID=$$ exec "$0" "$@"`, binary(t, "perceptd")}, d.arguments()...)...)
		c.ExtraFiles = files
		return begin(t, []string{"LISTEN_FDS=3", "LISTEN_FDNAMES=admin:other:token"}, c)
	}
	answered := make(chan int)
	wait := func() {
		go func() {
			status, _, _ := d.get(d.token(), vaultToken)
			answered <- status
		}()
	}
	wait() // nobody is there to accept yet
	d.process = activate()
	if got := <-answered; got != 200 {
		t.Errorf("who waited for the first daemon got %d", got)
	}
	if status := d.stop(t); status != 0 {
		t.Errorf("exit status %d", status)
	}
	if !strings.Contains(d.text(), "descriptors that nobody knows were closed") {
		t.Error("the third socket is not told of")
	}
	for _, path := range []string{d.token(), d.admin()} {
		if info, err := os.Lstat(path); err != nil || info.Mode() != os.ModeSocket|0o640 {
			t.Errorf("%s after the daemon: %v", path, err)
		}
	}
	wait()
	d.process = activate()
	if got := <-answered; got != 200 {
		t.Errorf("who waited for the second daemon got %d", got)
	}
	// A socket that can accept no more is the end of the daemon, and not of silence.
	if err := unix.Shutdown(int(files[2].Fd()), unix.SHUT_RDWR); err != nil {
		t.Fatal(err)
	}
	<-d.ended
	if got := d.cmd.ProcessState.ExitCode(); got != exitFailed || !strings.Contains(d.text(), "perceptd: token socket: accept ") {
		t.Errorf("exit status %d", got)
	}
}

// However many connections a caller keeps, the technicians' socket answers, and the daemon still gets to
// itself: not even its own user can have systemd restart it.
func TestFewDescriptors(t *testing.T) {
	t.Parallel()
	manager, told := listenAsSystemd(t)
	d := newFolder(t, simulatedFor())
	c := exec.Command("/bin/sh", append([]string{"-c", `ulimit -n 64; exec "$0" "$@"`, binary(t, "perceptd")}, d.arguments()...)...)
	d.process = begin(t, []string{"NOTIFY_SOCKET=" + manager, "WATCHDOG_USEC=200000"}, c)
	d.awaitHealth(t)
	// A stream is never idle, so that it makes room for none.
	stream := func() (net.Conn, string) {
		t.Helper()
		conn, err := net.Dial("unix", d.token())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		if _, err := fmt.Fprintf(conn, "GET %s?resource=%s HTTP/1.1\r\nHost: localhost\r\n\r\n", api.PathWatch, perceptdtest.VaultURI); err != nil {
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
		if status, body, err := d.get(d.token(), vaultToken); err == nil && status != 429 { // the line for refusals is short here
			t.Errorf("one too many: %d %s", status, body)
		}
	}
	oneTooMany()
	until(t, "readiness, seen on the admin socket", d.ended, func() bool { return d.status(t).Ready })
	awaitPings(t, told)
	oneTooMany() // all the while
	_ = kept.Close()
	until(t, "a free connection", d.ended, func() bool {
		status, _, err := d.get(d.token(), vaultToken)
		return err == nil && status == 200
	})
}

// nobodys returns the command that starts d as user nobody, whom modes keep out as they do not root. The test has to be root.
func nobodys(t *testing.T, d *daemonProcess) *exec.Cmd {
	t.Helper()
	for _, path := range []string{d.dir, d.config} {
		if err := os.Chown(path, 65534, 65534); err != nil {
			t.Fatal(err)
		}
	}
	for _, path := range []string{filepath.Dir(d.config), filepath.Dir(binary(t, "perceptd"))} {
		if err := os.Chmod(path, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	c := exec.Command(binary(t, "perceptd"), d.arguments()...)
	c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	return c
}

// Nobody may read the daemon's memory: not from a core dump, not as the same user.
func TestMemoryIsShut(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("needs root: what a process shuts belongs to root then, which another user's shows")
	}
	d := newFolder(t, strings.Replace(simulatedFor(), "{ uid = 0 }", "{ uid = 65534 }", 1))
	d.process = begin(t, nil, nobodys(t, d))
	d.awaitHealth(t)
	var memory unix.Stat_t
	if err := unix.Stat(fmt.Sprintf("/proc/%d/mem", d.cmd.Process.Pid), &memory); err != nil || memory.Uid != 0 {
		t.Errorf("the daemon's memory belongs to user %d, %v", memory.Uid, err)
	}
	limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", d.cmd.Process.Pid))
	if err != nil || !strings.Contains(strings.Join(strings.Fields(string(limits)), " "), "Max core file size 0 0 ") {
		t.Errorf("%v\n%s", err, limits)
	}
}
