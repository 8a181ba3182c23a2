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

	"perceptd/agent/grants"
)

// listener accepts connections that can be attested.
type listener struct {
	net.Listener
	kernel       kernel
	queueEmptyAt atomic.Int64 // since boot: when the queue was last seen empty; every connection in it was made later
}

// Listen returns l with connections that NewContext can attest. Every connection that is served must come from it.
func (a *Attestor) Listen(l net.Listener) net.Listener {
	_ = withFD(l, func(fd int) error { return passCredentials(fd) }) // since Linux 6.16 connections inherit it
	return &listener{Listener: l, kernel: a.kernel}
}

// Accept waits for the next connection.
func (l *listener) Accept() (net.Conn, error) {
	queueWasEmpty := l.pollQueue()
	accepted, err := l.Listener.Accept()
	unixConn, ok := accepted.(*net.UnixConn)
	if err != nil || !ok {
		return accepted, err
	}
	conn, err := newConnection(unixConn)
	if err != nil {
		return nil, errors.Join(err, unixConn.Close())
	}
	conn.queueWasEmpty = queueWasEmpty
	if !l.kernel.pidfd {
		conn.receive = conn.receiveTracked
		conn.queueEmptyAt, conn.acceptedAt = time.Duration(l.queueEmptyAt.Load()), sinceBoot()
	}
	conn.readPeer(l.kernel)
	return conn, nil
}

// PeerUID returns the uid of the process at the other end of a connection from Listen, as the kernel recorded it when
// that process connected, or grants.NoID.
func PeerUID(conn net.Conn) uint32 {
	if c, ok := conn.(*connection); ok && c.ucredErr == nil {
		return c.ucred.Uid
	}
	return grants.NoID
}

// PeerPID returns the ID of the process at the other end of a connection from Listen, as the kernel recorded it when
// that process connected, or 0. Another process may have that ID by now.
func PeerPID(conn net.Conn) int32 {
	if c, ok := conn.(*connection); ok && c.ucredErr == nil {
		return c.ucred.Pid
	}
	return 0
}

// Peer returns the process at the other end of a connection from Listen and the user whose session it runs in, from
// the credentials and one read of its cgroup. Nothing of it is attested: it is for counting connections that are
// refused before attestation.
func (a *Attestor) Peer(conn net.Conn) (caller grants.Caller, owner uint32) {
	c, ok := conn.(*connection)
	if !ok || c.ucredErr != nil {
		return grants.Caller{UID: grants.NoID, GID: grants.NoID}, grants.NoID
	}
	caller = grants.Caller{UID: c.ucred.Uid, GID: c.ucred.Gid, PID: c.ucred.Pid}
	l := a.locate(c.ucred.Pid, a.rules.Load())
	l.fillIn(&caller)
	return caller, l.owner()
}

// pollQueue reports whether no connection waits to be accepted, and records the time if so. With SO_PEERPIDFD it is
// not needed and does nothing.
func (l *listener) pollQueue() (empty bool) {
	if l.kernel.pidfd {
		return true
	}
	err := withFD(l.Listener, func(fd int) error {
		now := sinceBoot() // before the poll: a connection made in between counts as later
		poll := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(poll[:], 0)
		if empty = n == 0 && err == nil; empty {
			l.queueEmptyAt.Store(int64(now))
		}
		return nil
	})
	return empty && err == nil
}

// passCredentials makes the kernel report the writer with each message that is read.
func passCredentials(fd int) error {
	return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PASSCRED, 1)
}

// withFD calls f with the descriptor of a socket.
func withFD(socket any, f func(fd int) error) error {
	s, ok := socket.(syscall.Conn)
	if !ok {
		return errNotUnix
	}
	raw, err := s.SyscallConn()
	if err != nil {
		return err
	}
	var callErr error
	err = raw.Control(func(fd uintptr) { callErr = f(int(fd)) })
	return errors.Join(err, callErr)
}

// connection is a connection that records who writes on it.
type connection struct {
	*net.UnixConn
	ucred                    unix.Ucred    // who connected
	ucredErr                 error         // why that is unknown
	passcredErr              error         // why writers cannot be identified
	process                  process       // who connected, without SO_PEERPIDFD; the attestation takes it over
	processErr               error         // why it could not be opened
	queueEmptyAt, acceptedAt time.Duration // since boot; without SO_PEERPIDFD only
	queueWasEmpty            bool          // no connection waited before this one was accepted

	peerPID     atomic.Int32 // the process that connected; 0: not known yet
	writerSeen  bool         // the kernel has reported a writer; used by Read only
	foreignPID  atomic.Int32 // another process that wrote; 0: none; -1: an unknown one
	attestation atomic.Pointer[Attestation]

	mu        sync.Mutex // protects what follows; without SO_PEERPIDFD only
	drained   bool       // at some moment, with the process open, everything that was written had been read
	peerWrote bool       // since then a process with the peer's ID has written

	// What follows belongs to Read, of which one runs at a time. It is allocated once, since each request reads more
	// than once.
	raw         syscall.RawConn
	receive     func(fd uintptr) bool
	message     unix.Msghdr
	iov         unix.Iovec
	credentials [credentialsSize]byte
	received    int
	errno       unix.Errno
}

// newConnection prepares conn for Read.
func newConnection(conn *net.UnixConn) (*connection, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	c := &connection{UnixConn: conn, raw: raw}
	c.message.Iov, c.message.Iovlen = &c.iov, 1
	c.message.Control = &c.credentials[0]
	c.receive = c.receiveMessage
	return c, nil
}

// readPeer reads what cannot wait until the connection is served: the peer's credentials, and without SO_PEERPIDFD
// the handle of its process, whose ID may soon be reused.
func (c *connection) readPeer(k kernel) {
	c.ucredErr = withFD(c.UnixConn, func(fd int) error {
		c.passcredErr = passCredentials(fd)
		peer, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
		if err != nil {
			return fmt.Errorf("the kernel does not tell the peer's credentials: %w", err)
		}
		c.ucred = *peer
		if !k.pidfd {
			c.process, c.processErr = k.openPeer(fd, peer.Pid)
		}
		return nil
	})
}

// credentialsSize has room for the writer's credentials and nothing else, so that the kernel drops descriptors that a
// caller sends.
const credentialsSize = unix.SizeofCmsghdr + (unix.SizeofUcred+7)&^7

// Read reads what was written and records who wrote it. It is net's own Read plus the credentials. net's ReadMsgUnix
// would do the same and costs too much for each request.
func (c *connection) Read(b []byte) (int, error) {
	if len(b) == 0 {
		return c.UnixConn.Read(b)
	}
	c.iov.Base = &b[0]
	c.iov.SetLen(len(b))
	err := c.raw.Read(c.receive)
	c.iov.Base = nil
	switch {
	case err != nil:
		return 0, err
	case c.errno != 0:
		return 0, &net.OpError{Op: "read", Net: "unix", Err: os.NewSyscallError("recvmsg", c.errno)}
	case c.received == 0:
		return 0, io.EOF
	}
	c.recordWriter(c.credentials[:c.message.Controllen])
	return c.received, nil
}

// receiveMessage receives one message. It returns false if there is none yet.
func (c *connection) receiveMessage(fd uintptr) bool {
	for {
		c.message.SetControllen(len(c.credentials))
		n, _, errno := unix.RawSyscall(unix.SYS_RECVMSG, fd, uintptr(unsafe.Pointer(&c.message)),
			unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
		switch errno {
		case unix.EINTR: // Go's own signals
			continue
		case unix.EAGAIN:
			return false
		}
		c.received, c.errno = int(n), errno
		return true
	}
}

// receiveTracked is receiveMessage, and records whether the peer writes after markDrained.
func (c *connection) receiveTracked(fd uintptr) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	done := c.receiveMessage(fd)
	if done && c.drained && c.errno == 0 && c.received > 0 &&
		writerPID(c.credentials[:c.message.Controllen]) == c.ucred.Pid {
		c.peerWrote = true
	}
	return done
}

// markDrained reports whether everything that was written has been read. From then on receiveTracked records whether
// the peer writes.
func (c *connection) markDrained() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	unread := 0
	err := withFD(c.UnixConn, func(fd int) (err error) {
		unread, err = unix.IoctlGetInt(fd, unix.SIOCINQ)
		return err
	})
	c.drained = c.drained || err == nil && unread == 0
	return c.drained
}

// peerHasWritten reports whether the process whose handle is open has written since markDrained.
func (c *connection) peerHasWritten() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.peerWrote
}

// recordWriter records who wrote, from the credentials that came with a message. Only what was written at the very
// beginning of a connection, before passCredentials, comes without credentials.
func (c *connection) recordWriter(credentials []byte) {
	switch pid := writerPID(credentials); {
	case pid == c.peerPID.Load() && pid != 0:
		c.writerSeen = true
	case pid == 0 && !c.writerSeen && c.passcredErr == nil: // written before passCredentials
	case pid == 0:
		c.foreignPID.CompareAndSwap(0, -1)
	default:
		c.foreignPID.CompareAndSwap(0, pid)
	}
}

// writerPID returns the process that wrote, or 0 if the kernel did not report it.
func writerPID(credentials []byte) int32 {
	if len(credentials) < unix.SizeofCmsghdr {
		return 0 // no message: the parser would panic
	}
	header, data, _, err := unix.ParseOneSocketControlMessage(credentials)
	if err != nil || header.Level != unix.SOL_SOCKET || header.Type != unix.SCM_CREDENTIALS || len(data) < 4 {
		return 0
	}
	return int32(binary.NativeEndian.Uint32(data))
}

// Close closes the connection and the handle of its caller's process.
func (c *connection) Close() error {
	if attestation := c.attestation.Load(); attestation != nil {
		attestation.release()
	} else if c.process.fd > 0 {
		c.process.close()
	}
	return c.UnixConn.Close()
}
