package client

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// Where too many want to connect, the client waits for its turn instead of failing.
func TestDialWaitsWhereTheQueueIsFull(t *testing.T) {
	t.Parallel()
	path := filepath.Join(ShortFolder(t), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	raw, err := l.(*net.UnixListener).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := raw.Control(func(fd uintptr) { err = unix.Listen(int(fd), 0) }); err != nil {
		t.Fatal(err)
	}
	full := func() {
		t.Helper()
		for {
			conn, err := net.Dial("unix", path)
			if errors.Is(err, syscall.EAGAIN) {
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { conn.Close() })
		}
	}
	full()
	ended, end := context.WithCancel(t.Context())
	tried := make(chan error)
	go func() {
		_, err := Dial(ended, path)
		tried <- err
	}()
	end()
	if err := <-tried; !errors.Is(err, syscall.EAGAIN) && !errors.Is(err, context.Canceled) {
		t.Errorf("given up with %v", err)
	}
	go func() {
		conn, err := Dial(t.Context(), path)
		if err == nil {
			conn.Close()
		}
		tried <- err
	}()
	for done := false; !done; {
		conn, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
		select {
		case err := <-tried:
			if done = true; err != nil {
				t.Error(err)
			}
		default:
			full() // and somebody else is always faster, until he is not
		}
	}
	if _, err := Dial(t.Context(), path+"x"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("where nothing is: %v", err)
	}
}
