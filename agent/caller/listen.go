package caller

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// listener accepts connections that can be proved.
type listener struct {
	net.Listener
	kernel  kernel
	emptyAt atomic.Int64 // since boot, when its queue was last seen empty; nobody who connected before is left in it
}

// Listen returns l with connections that NewContext can prove. Every connection of a socket that is served
// must come from it.
func (p *Prover) Listen(l net.Listener) net.Listener {
	_ = control(l, func(fd int) error { return passCredentials(fd) }) // Linux 6.16 has connections inherit it
	return &listener{Listener: l, kernel: p.kernel}
}

// Accept waits for the next connection.
func (l *listener) Accept() (net.Conn, error) {
	waited := l.look()
	accepted, err := l.Listener.Accept()
	unixConn, ok := accepted.(*net.UnixConn)
	if err != nil || !ok {
		return accepted, err
	}
	conn := &connection{UnixConn: unixConn, waited: waited}
	if !l.kernel.pidfd {
		conn.emptyAt, conn.acceptedAt = time.Duration(l.emptyAt.Load()), sinceBoot()
	}
	conn.unmarked = control(unixConn, passCredentials)
	return conn, nil
}

// look notes whether nobody waits in the queue, and reports it. With a pidfd nobody needs to know.
func (l *listener) look() (empty bool) {
	if l.kernel.pidfd {
		return true
	}
	err := control(l.Listener, func(fd int) error {
		now := sinceBoot() // before the look: who comes in between counts as later
		poll := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(poll[:], 0)
		if empty = n == 0 && err == nil; empty {
			l.emptyAt.Store(int64(now))
		}
		return nil
	})
	return empty && err == nil
}

// passCredentials has the kernel tell with what is read who wrote it.
func passCredentials(fd int) error {
	return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PASSCRED, 1)
}

// control calls do with the descriptor of a socket.
func control(socket any, do func(fd int) error) error {
	s, ok := socket.(syscall.Conn)
	if !ok {
		return errNotUnix
	}
	raw, err := s.SyscallConn()
	if err != nil {
		return err
	}
	var fault error
	err = raw.Control(func(fd uintptr) { fault = do(int(fd)) })
	return errors.Join(err, fault)
}

// connection is a connection whose reader notices who writes.
type connection struct {
	*net.UnixConn
	unmarked            error         // why the writers cannot be told
	emptyAt, acceptedAt time.Duration // since boot; without a pidfd only
	waited              bool          // the queue was empty before

	peer    atomic.Int32 // the process that connected; 0: not known yet
	marked  bool         // a writer was told; only the one that reads uses it
	foreign atomic.Int32 // another process that wrote; -1: one that cannot be told
	proof   atomic.Pointer[Proof]

	credentials [credentialsSize]byte // only the one that reads uses it
}

// credentialsSize leaves room for the writer's credentials and for nothing else, so that descriptors that a
// caller sends are dropped by the kernel.
const credentialsSize = unix.SizeofCmsghdr + (unix.SizeofUcred+7)&^7

// Read reads what was written and notes who wrote it.
func (c *connection) Read(b []byte) (int, error) {
	if len(b) == 0 {
		return c.UnixConn.Read(b)
	}
	n, control, _, _, err := c.UnixConn.ReadMsgUnix(b, c.credentials[:])
	if errors.Is(err, io.EOF) {
		return n, io.EOF // net wraps it here, and not in Read
	}
	if n > 0 {
		c.note(c.credentials[:control])
	}
	return n, err
}

// note looks at the writer's credentials. What was written before they were asked for comes without, at the very
// beginning of a connection only.
func (c *connection) note(control []byte) {
	switch pid := writer(control); {
	case pid == c.peer.Load() && pid != 0:
		c.marked = true
	case pid == 0 && !c.marked && c.unmarked == nil:
	case pid == 0:
		c.foreign.CompareAndSwap(0, -1)
	default:
		c.foreign.CompareAndSwap(0, pid)
	}
}

// writer returns the process that wrote, or 0 when that is not told.
func writer(control []byte) int32 {
	if len(control) < unix.SizeofCmsghdr {
		return 0 // there is none, on which the parser would panic
	}
	header, data, _, err := unix.ParseOneSocketControlMessage(control)
	if err != nil || header.Level != unix.SOL_SOCKET || header.Type != unix.SCM_CREDENTIALS || len(data) < 4 {
		return 0
	}
	return int32(binary.NativeEndian.Uint32(data))
}

// Close ends the connection and lets go of its caller.
func (c *connection) Close() error {
	if p := c.proof.Load(); p != nil {
		p.release()
	}
	return c.UnixConn.Close()
}
