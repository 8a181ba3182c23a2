package daemon

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"perceptd/cmd/perceptd/e2e/harness"
)

// A service manager that reads nothing delays a start once, not for each of the sockets that it is to keep. When it
// reads again it is told that the daemon serves, and given the sockets.
func TestBusyManager(t *testing.T) {
	t.Parallel()
	path := filepath.Join(harness.ShortFolder(t), "n")
	manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer manager.Close()
	fillQueue(t, path)
	var modules []string
	for i := range 256 {
		modules = append(modules, fmt.Sprintf("m%d", i))
	}
	d := harness.NewDaemon(t, harness.SimulatedFor(modules...))
	d.Process = harness.Launch(t, []string{"NOTIFY_SOCKET=" + path, "FDSTORE=1000"}, "perceptd", d.Arguments()...)
	d.AwaitHealth(t)
	if status, _, err := d.Get(d.Module("m255"), harness.VaultToken); err != nil || status != 200 {
		t.Errorf("%d %v", status, err)
	}
	if trouble := strings.Join(d.Status(t).Trouble, "\n"); !strings.Contains(trouble,
		"module m0 and 255 more: the socket is not kept through a restart") {
		t.Errorf("trouble %q", trouble)
	}
	if n := strings.Count(d.Text(), "sockets are not kept through a restart"); n != 1 {
		t.Errorf("%d lines in the log of 256 sockets that are not kept", n)
	}
	stored := make(map[string]bool)
	for ready := false; !ready || len(stored) < len(modules); {
		message := make([]byte, 4096)
		n, err := manager.Read(message) // descriptors that come along are dropped
		if err != nil {
			t.Fatal(err)
		}
		lines := strings.Split(string(message[:n]), "\n")
		ready = ready || lines[0] == "READY=1"
		if lines[0] == "FDSTORE=1" && strings.HasPrefix(lines[1], "FDNAME="+fdModule) {
			stored[lines[1]] = true
		}
	}
	var reading sync.WaitGroup
	defer reading.Wait()
	defer manager.Close()
	reading.Go(func() { // the daemon tells more, and is not to wait
		for message := make([]byte, 4096); ; {
			if _, err := manager.Read(message); err != nil {
				return
			}
		}
	})
	harness.Until(t, "no trouble with sockets", d.Ended, func() bool { // tokens are handed over again in their own time
		return !strings.Contains(strings.Join(d.Status(t).Trouble, "\n"), "the socket is not kept")
	})
}

// A service manager that is not there keeps nobody waiting, and nobody from being served.
func TestNoManager(t *testing.T) {
	t.Parallel()
	dir := harness.ShortFolder(t)
	unserved := filepath.Join(dir, "unserved")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: unserved, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	l.Close() // its path stays
	for name, address := range map[string]string{"absent": filepath.Join(dir, "absent"), "unserved": unserved,
		"no socket": "what/is/this", "a folder": dir} {
		d := harness.LaunchDaemon(t, harness.SimulatedFor("vision"), "NOTIFY_SOCKET="+address, "WATCHDOG_USEC=200000")
		if status, _, err := d.Get(d.Module("vision"), harness.VaultToken); err != nil || status != 200 {
			t.Errorf("%s: %d %v", name, status, err)
		}
		if status := d.Stop(t); status != 0 {
			t.Errorf("%s: exit status %d", name, status)
		}
	}
}

// fillQueue sends to the datagram socket at path until its queue is full.
func fillQueue(t *testing.T, path string) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	for range 1_000_000 {
		err := unix.Sendto(fd, []byte("x"), unix.MSG_DONTWAIT, &unix.SockaddrUnix{Name: path})
		if errors.Is(err, unix.EAGAIN) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	t.Fatal("the queue is never full")
}

// What systemd is told, over its real protocol.
func TestNotify(t *testing.T) {
	t.Parallel()
	manager, told := harness.ListenAsSystemd(t)
	d := harness.LaunchDaemon(t, harness.SimulatedFor(), "NOTIFY_SOCKET="+manager, "WATCHDOG_USEC=200000")
	harness.AwaitMessages(t, told, "READY=1", "WATCHDOG=1", "STATUS=SIMULATED; 2 identities, 1 token, next refresh ")
	d.Rewrite(t, "[x]\n")
	if err := d.Cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	harness.AwaitMessages(t, told, "RELOADING=1\nMONOTONIC_USEC=",
		"STATUS=SIMULATED; trouble: the last reload changed nothing", "READY=1", "WATCHDOG=1")
	if status := d.Stop(t); status != 0 {
		t.Errorf("exit status %d", status)
	}
	harness.AwaitMessages(t, told, "STOPPING=1")
}

// The daemon's text follows what comes and goes without an event, with each of its checks of itself.
func TestStatusTextFollows(t *testing.T) {
	t.Parallel()
	manager, told := harness.ListenAsSystemd(t)
	d := harness.NewDaemon(t, harness.SimulatedFor("vision"))
	c := exec.Command(harness.Binary(t, "perceptd"), d.Arguments()...)
	if os.Getuid() == 0 { // whom no mode keeps out
		if err := errors.Join(os.Chmod(filepath.Dir(manager), 0o755), os.Chmod(manager, 0o666)); err != nil {
			t.Fatal(err)
		}
		c = nobodys(t, d)
	}
	d.Process = harness.Begin(t, []string{"NOTIFY_SOCKET=" + manager, "WATCHDOG_USEC=200000"}, c)
	const well = "STATUS=SIMULATED; 2 identities, "
	harness.AwaitMessages(t, told, well, "READY=1")
	for _, step := range []struct {
		do    func() error
		tells string
	}{
		{func() error { return os.Chmod(d.Admin(), 0) },
			"STATUS=SIMULATED; trouble: perceptd cannot check that it answers on " + d.Admin()},
		{func() error { return os.Chmod(d.Admin(), 0o660) }, well},
		{func() error {
			at := d.Module("vision")
			return errors.Join(os.Remove(at), os.MkdirAll(filepath.Join(at, "full"), 0o755))
		}, "STATUS=SIMULATED; trouble: module vision has no socket"},
		{func() error { return os.RemoveAll(d.Module("vision")) }, well},
	} {
		if err := step.do(); err != nil {
			t.Fatal(err)
		}
		harness.AwaitMessages(t, told, step.tells)
	}
	harness.AwaitPings(t, told)
	harness.AwaitPings(t, told)
	if status := d.Stop(t); status != 0 {
		t.Errorf("exit status %d", status)
	}
}
