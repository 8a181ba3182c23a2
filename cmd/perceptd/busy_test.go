package main

import (
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"perceptd/cmd/perceptd/e2e/perceptdtest"
)

// A service manager that reads nothing delays a start once, not for each of the sockets that it is to keep. When it reads
// again it is told that the daemon serves, and given the sockets.
func TestBusyManager(t *testing.T) {
	t.Parallel()
	path := filepath.Join(perceptdtest.ShortFolder(t), "n")
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
	d := newFolder(t, simulatedFor(modules...))
	d.process = launch(t, []string{"NOTIFY_SOCKET=" + path, "FDSTORE=1000"}, "perceptd", d.arguments()...)
	d.awaitHealth(t)
	if status, _, err := d.get(d.module("m255"), vaultToken); err != nil || status != 200 {
		t.Errorf("%d %v", status, err)
	}
	if trouble := strings.Join(d.status(t).Trouble, "\n"); !strings.Contains(trouble, "module m0 and 255 more: the socket is not kept through a restart") {
		t.Errorf("trouble %q", trouble)
	}
	if n := strings.Count(d.text(), "sockets are not kept through a restart"); n != 1 {
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
		if lines[0] == "FDSTORE=1" && strings.HasPrefix(lines[1], "FDNAME="+storedModule) {
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
	until(t, "no trouble with sockets", d.ended, func() bool { // tokens are handed over again in their own time
		return !strings.Contains(strings.Join(d.status(t).Trouble, "\n"), "the socket is not kept")
	})
}

// A service manager that is not there keeps nobody waiting, and nobody from being served.
func TestNoManager(t *testing.T) {
	t.Parallel()
	dir := perceptdtest.ShortFolder(t)
	unserved := filepath.Join(dir, "unserved")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: unserved, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	l.Close() // its path stays
	for name, address := range map[string]string{"absent": filepath.Join(dir, "absent"), "unserved": unserved, "no socket": "what/is/this", "a folder": dir} {
		d := launchDaemon(t, simulatedFor("vision"), "NOTIFY_SOCKET="+address, "WATCHDOG_USEC=200000")
		if status, _, err := d.get(d.module("vision"), vaultToken); err != nil || status != 200 {
			t.Errorf("%s: %d %v", name, status, err)
		}
		if status := d.stop(t); status != 0 {
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
