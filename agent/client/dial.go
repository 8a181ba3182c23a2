package client

import (
	"context"
	"errors"
	"net"
	"os"
	"syscall"
	"time"
)

// Dial connects to one of the daemon's sockets. When the kernel's queue of those who want to connect there is full, as
// while somebody floods it, a plain net.Dial fails at once; Dial waits for a place until ctx ends.
func Dial(ctx context.Context, socket string) (net.Conn, error) {
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "unix", socket)
	if !errors.Is(err, syscall.EAGAIN) {
		return conn, err
	}
	conn, err = waitInLine(ctx, socket)
	if err != nil {
		return nil, &net.OpError{Op: "dial", Net: "unix", Addr: &net.UnixAddr{Name: socket, Net: "unix"}, Err: err}
	}
	return conn, nil
}

// inLine is how long a wait in the kernel goes on before it is looked whether somebody still wants it.
const inLine = 50 * time.Millisecond

// waitInLine connects as those do who wait in the kernel: it lets them in when there is room, and who comes again
// and again finds it taken by others.
func waitInLine(ctx context.Context, socket string) (net.Conn, error) {
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	file := os.NewFile(uintptr(fd), socket)
	defer file.Close() // the connection has a duplicate
	patience := syscall.NsecToTimeval(int64(inLine))
	if err := syscall.SetsockoptTimeval(fd, syscall.SOL_SOCKET, syscall.SO_SNDTIMEO, &patience); err != nil {
		return nil, os.NewSyscallError("setsockopt", err)
	}
	for {
		err := syscall.Connect(fd, &syscall.SockaddrUnix{Name: socket})
		switch {
		case err == nil:
			return net.FileConn(file)
		case err != syscall.EAGAIN && err != syscall.EINTR:
			return nil, os.NewSyscallError("connect", err)
		case ctx.Err() != nil:
			return nil, ctx.Err()
		}
	}
}
