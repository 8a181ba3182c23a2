package attest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"perceptd/agent"
)

// listener accepts connections that can be proved.
type listener struct {
	net.Listener
	kernel  kernel
	emptyAt atomic.Int64 // since boot, when its queue was last seen empty; nobody who connected before is left in it
}

// Listen returns l with connections that NewContext can prove. Every connection of a socket that is served
// must come from it.
func (p *Attestor) Listen(l net.Listener) net.Listener {
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
	conn, err := newConnection(unixConn)
	if err != nil {
		return nil, errors.Join(err, unixConn.Close())
	}
	conn.waited = waited
	if !l.kernel.pidfd {
		conn.receive = conn.receiveWatched
		conn.emptyAt, conn.acceptedAt = time.Duration(l.emptyAt.Load()), sinceBoot()
	}
	conn.meet(l.kernel)
	return conn, nil
}

// PeerUID returns the uid at the other end of a connection that a Prover's listener accepted, as the kernel recorded it when
// it connected, or agent.NoID.
func PeerUID(conn net.Conn) uint32 {
	if c, ok := conn.(*connection); ok && c.met == nil {
		return c.ucred.Uid
	}
	return agent.NoID
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
	ucred               unix.Ucred    // who connected
	met                 error         // why that is not known
	unmarked            error         // why the writers cannot be told
	held                process       // who connected, where it has to be taken hold of at once; its proof's from then on
	heldFault           error         // why it is not held
	emptyAt, acceptedAt time.Duration // since boot; without a pidfd only
	waited              bool          // the queue was empty before

	peer    atomic.Int32 // the process that connected; 0: not known yet
	marked  bool         // a writer was told; only the one that reads uses it
	foreign atomic.Int32 // another process that wrote; -1: one that cannot be told
	proof   atomic.Pointer[Attestation]

	mu     sync.Mutex // protects what follows; without a pidfd only
	silent bool       // once everything that had been written was read, while the process was held
	wrote  bool       // since then the process that connected has written, by its number

	// What follows is for one read at a time, and made once: each request reads more than once.
	raw         syscall.RawConn
	receive     func(fd uintptr) bool
	message     unix.Msghdr
	into        unix.Iovec
	credentials [credentialsSize]byte
	received    int
	fault       unix.Errno
}

func newConnection(conn *net.UnixConn) (*connection, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	c := &connection{UnixConn: conn, raw: raw}
	c.message.Iov, c.message.Iovlen = &c.into, 1
	c.message.Control = &c.credentials[0]
	c.receive = c.receiveMessage
	return c, nil
}

// meet finds out what cannot wait for the connection's turn: who it is, and without a pidfd the hold on the process, since
// its number may soon be another's.
func (c *connection) meet(k kernel) {
	c.met = control(c.UnixConn, func(fd int) error {
		c.unmarked = passCredentials(fd)
		peer, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
		if err != nil {
			return fmt.Errorf("the kernel does not tell the peer's credentials: %w", err)
		}
		c.ucred = *peer
		if !k.pidfd {
			c.held, c.heldFault = k.hold(fd, peer.Pid)
		}
		return nil
	})
}

// credentialsSize leaves room for the writer's credentials and for nothing else, so that descriptors that a
// caller sends are dropped by the kernel.
const credentialsSize = unix.SizeofCmsghdr + (unix.SizeofUcred+7)&^7

// Read reads what was written and notes who wrote it. It is net's own Read with one thing more, which net's ReadMsgUnix
// makes dearer than a request can bear.
func (c *connection) Read(b []byte) (int, error) {
	if len(b) == 0 {
		return c.UnixConn.Read(b)
	}
	c.into.Base = &b[0]
	c.into.SetLen(len(b))
	err := c.raw.Read(c.receive)
	c.into.Base = nil
	switch {
	case err != nil:
		return 0, err
	case c.fault != 0:
		return 0, &net.OpError{Op: "read", Net: "unix", Err: os.NewSyscallError("recvmsg", c.fault)}
	case c.received == 0:
		return 0, io.EOF
	}
	c.note(c.credentials[:c.message.Controllen])
	return c.received, nil
}

// receiveMessage reports false when there is nothing to receive yet.
func (c *connection) receiveMessage(fd uintptr) bool {
	for {
		c.message.SetControllen(len(c.credentials))
		n, _, errno := unix.RawSyscall(unix.SYS_RECVMSG, fd, uintptr(unsafe.Pointer(&c.message)), unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
		switch errno {
		case unix.EINTR: // Go's own signals
			continue
		case unix.EAGAIN:
			return false
		}
		c.received, c.fault = int(n), errno
		return true
	}
}

// receiveWatched is receiveMessage with an eye on who writes after a silence.
func (c *connection) receiveWatched(fd uintptr) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	done := c.receiveMessage(fd)
	if done && c.silent && c.fault == 0 && c.received > 0 && writer(c.credentials[:c.message.Controllen]) == c.ucred.Pid {
		c.wrote = true
	}
	return done
}

// fallSilent reports whether all that was written has been read, and has what is written from now on be noted.
func (c *connection) fallSilent() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	waiting := 0
	err := control(c.UnixConn, func(fd int) (err error) {
		waiting, err = unix.IoctlGetInt(fd, unix.SIOCINQ)
		return err
	})
	c.silent = c.silent || err == nil && waiting == 0
	return c.silent
}

// hasWritten reports whether the process that is held has written after a silence.
func (c *connection) hasWritten() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.wrote
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
	} else if c.held.fd > 0 {
		c.held.release()
	}
	return c.UnixConn.Close()
}
