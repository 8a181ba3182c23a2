package identityproxy

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// receiveBuffer bounds what the kernel keeps of a connection before it is read. A request has a few hundred bytes.
const receiveBuffer = 16 << 10

const maxPortTries = 16 // another process may be faster

// listen opens a free port of 127.0.0.1, and returns with it a second socket that holds the port: as long as any
// process has that open, no other can listen there, and once the listener is gone, connections are refused at once.
//
// Two sockets share a port while both allow it and neither listens. Once the first listens and the second no longer
// allows it, the port is taken for every other socket.
func listen() (net.Listener, *os.File, error) {
	var err error
	for range maxPortTries {
		var holder *os.File
		var port int
		if holder, port, err = holdPort(); err != nil {
			break
		}
		var l net.Listener
		l, err = net.Listen("tcp4", "127.0.0.1:"+strconv.Itoa(port)) // with SO_REUSEADDR, as every listener of net's
		if err == nil {
			if err = errors.Join(setInt(holder, unix.SO_REUSEADDR, 0),
				setListenerInt(l, unix.SO_RCVBUF, receiveBuffer)); err == nil {
				return l, holder, nil
			}
			_ = l.Close()
		}
		_ = holder.Close()
		if !errors.Is(err, syscall.EADDRINUSE) {
			break
		}
	}
	return nil, nil, fmt.Errorf("opening the token endpoint: %w", err)
}

// holdPort binds a socket to a port of 127.0.0.1 that is free.
func holdPort() (holder *os.File, port int, err error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, 0, os.NewSyscallError("socket", err)
	}
	holder = os.NewFile(uintptr(fd), "port")
	err = os.NewSyscallError("bind", unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}))
	if err == nil {
		err = setInt(holder, unix.SO_REUSEADDR, 1) // after bind, so that the port is one that is free
	}
	if err == nil {
		var at unix.Sockaddr
		if at, err = unix.Getsockname(fd); err == nil {
			return holder, at.(*unix.SockaddrInet4).Port, nil
		}
	}
	return nil, 0, errors.Join(err, holder.Close())
}

func setInt(f *os.File, option, value int) error {
	return os.NewSyscallError("setsockopt", unix.SetsockoptInt(int(f.Fd()), unix.SOL_SOCKET, option, value))
}

func setListenerInt(l net.Listener, option, value int) error {
	raw, err := l.(*net.TCPListener).SyscallConn()
	if err != nil {
		return err
	}
	var fault error
	err = raw.Control(func(fd uintptr) { fault = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, option, value) })
	return errors.Join(err, os.NewSyscallError("setsockopt", fault))
}
