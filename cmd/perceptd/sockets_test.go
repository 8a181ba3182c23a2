package main

import (
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"perceptd/cmd/perceptd/e2e/harness"
)

// crowded returns the address of a listening socket whose queue is full, and the socket.
func crowded(t *testing.T) (net.Addr, *net.UnixListener) {
	t.Helper()
	d := harness.NewDaemon(t, "")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	file := os.NewFile(uintptr(fd), "listener")
	defer file.Close() // FileListener duplicates it
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: d.Token()}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	l, err := net.FileListener(file)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	for {
		conn, err := net.Dial("unix", d.Token())
		if errors.Is(err, unix.EAGAIN) {
			return l.Addr(), l.(*net.UnixListener)
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
	}
}

// The check of itself waits its turn when others have filled the socket's queue, within its time.
func TestCheckWaitsInTheQueue(t *testing.T) {
	t.Parallel()
	at, l := crowded(t)
	over, cancel := context.WithCancel(t.Context())
	cancel()
	if err := askHealth(over, at); err == nil {
		t.Error("the time is over, and all is well")
	}
	short, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := askHealth(short, at); err == nil {
		t.Error("nobody answered, and all is well")
	}
	var serving sync.WaitGroup
	defer serving.Wait()
	s := &http.Server{Handler: http.NotFoundHandler()}
	defer s.Close()
	checked := make(chan error)
	go func() { checked <- askHealth(t.Context(), at) }()
	serving.Go(func() { _ = s.Serve(l) })
	if err := <-checked; err == nil || !strings.Contains(err.Error(), `answered "HTTP/1.1 404 "`) {
		t.Errorf("%v", err)
	}
}

func TestStoredNames(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name, module string
		inode        uint64
	}{
		{"module-vision-7", "vision", 7},
		{"module-a-b.c_d-18446744073709551615", "a-b.c_d", 18446744073709551615},
		{"module-vision", "", 0}, {"module--7", "", 0}, {"module-7", "", 0}, {"module-vision-", "",
			0}, {"module-vision-07", "", 0},
		{"module-vision-+7", "", 0}, {"module-vision-x", "", 0}, {"module-..-7", "", 0}, {"module-a/b-7", "", 0},
		{"module-vision-18446744073709551616", "", 0}, {"token", "", 0}, {"", "", 0},
	} {
		module, inode, ok := parseStored(row.name)
		if ok != (row.module != "") || ok && (module != row.module || inode != row.inode) {
			t.Errorf("%q: %q %d %v", row.name, module, inode, ok)
		}
	}
}

func FuzzStoredName(f *testing.F) {
	f.Add("module-vision-7")
	f.Add("module-../x-7")
	f.Fuzz(func(t *testing.T, name string) {
		module, inode, ok := parseStored(name)
		if ok && (storedName(module, inode) != name || strings.Contains(module, "/") || module == "..") {
			t.Errorf("%q: %q %d", name, module, inode)
		}
	})
}
