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

// listener accepts connections that can be proved.
type listener struct {
	net.Listener
	kernel       kernel
	queueEmptyAt atomic.Int64 // since boot, when its queue was last seen empty; nobody who connected before is left in it
}

// Listen returns l with connections that NewContext can prove. Every connection of a socket that is served
// must come from it.
func (a *Attestor) Listen(l net.Listener) net.Listener {
	_ = withFD(l, func(fd int) error { return passCredentials(fd) }) // Linux 6.16 has connections inherit it
	return &listener{Listener: l, kernel: a.kernel}
}

// Accept waits for the next connection.
func (l *listener) Accept() (net.Conn, error) {
	waited := l.pollQueue()
	accepted, err := l.Listener.Accept()
	unixConn, ok := accepted.(*net.UnixConn)
	if err != nil || !ok {
		return accepted, err
	}
	conn, err := newConnection(unixConn)
	if err != nil {
		return nil, errors.Join(err, unixConn.Close())
	}
	conn.queueWasEmpty = waited
	if !l.kernel.pidfd {
		conn.receive = conn.receiveTracked
		conn.queueEmptyAt, conn.acceptedAt = time.Duration(l.queueEmptyAt.Load()), sinceBoot()
	}
	conn.readPeer(l.kernel)
	return conn, nil
}

// PeerUID returns the uid at the other end of a connection that a Prover's listener accepted, as the kernel recorded it when
// it connected, or grants.NoID.
func PeerUID(conn net.Conn) uint32 {
	if c, ok := conn.(*connection); ok && c.ucredErr == nil {
		return c.ucred.Uid
	}
	return grants.NoID
}

// pollQueue notes whether nobody waits in the queue, and reports it. With a pidfd nobody needs to know.
func (l *listener) pollQueue() (empty bool) {
	if l.kernel.pidfd {
		return true
	}
	err := withFD(l.Listener, func(fd int) error {
		now := sinceBoot() // before the look: who comes in between counts as later
		poll := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(poll[:], 0)
		if empty = n == 0 && err == nil; empty {
			l.queueEmptyAt.Store(int64(now))
		}
		return nil
	})
	return empty && err == nil
}

// passCredentials has the kernel tell with what is read who wrote it.
func passCredentials(fd int) error {
	return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PASSCRED, 1)
}

// withFD calls do with the descriptor of a socket.
func withFD(socket any, f func(fd int) error) error {
	s, ok := socket.(syscall.Conn)
	if !ok {
		return errNotUnix
	}
	raw, err := s.SyscallConn()
	if err != nil {
		return err
	}
	var doErr error
	err = raw.Control(func(fd uintptr) { doErr = f(int(fd)) })
	return errors.Join(err, doErr)
}

// connection is a connection whose reader notices who writes.
type connection struct {
	*net.UnixConn
	ucred                    unix.Ucred    // who connected
	ucredErr                 error         // why that is not known
	passcredErr              error         // why the writers cannot be told
	process                  process       // who connected, where it has to be taken hold of at once; its proof's from then on
	processErr               error         // why it is not held
	queueEmptyAt, acceptedAt time.Duration // since boot; without a pidfd only
	queueWasEmpty            bool          // the queue was empty before

	peerPID     atomic.Int32 // the process that connected; 0: not known yet
	writerSeen  bool         // a writer was told; only the one that reads uses it
	foreignPID  atomic.Int32 // another process that wrote; -1: one that cannot be told
	attestation atomic.Pointer[Attestation]

	mu        sync.Mutex // protects what follows; without a pidfd only
	drained   bool       // once everything that had been written was read, while the process was held
	peerWrote bool       // since then the process that connected has written, by its number

	// What follows is for one read at a time, and made once: each request reads more than once.
	raw         syscall.RawConn
	receive     func(fd uintptr) bool
	message     unix.Msghdr
	iov         unix.Iovec
	credentials [credentialsSize]byte
	received    int
	errno       unix.Errno
}

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

// readPeer finds out what cannot wait for the connection's turn: who it is, and without a pidfd the hold on the process, since
// its number may soon be another's.
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

// credentialsSize leaves room for the writer's credentials and for nothing else, so that descriptors that a
// caller sends are dropped by the kernel.
const credentialsSize = unix.SizeofCmsghdr + (unix.SizeofUcred+7)&^7

// Read reads what was written and notes who wrote it. It is net's own Read with one thing more, which net's ReadMsgUnix
// makes dearer than a request can bear.
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
		c.received, c.errno = int(n), errno
		return true
	}
}

// receiveTracked is receiveMessage with an eye on who writes after a silence.
func (c *connection) receiveTracked(fd uintptr) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	done := c.receiveMessage(fd)
	if done && c.drained && c.errno == 0 && c.received > 0 && writerPID(c.credentials[:c.message.Controllen]) == c.ucred.Pid {
		c.peerWrote = true
	}
	return done
}

// markDrained reports whether all that was written has been read, and has what is written from now on be noted.
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

// peerHasWritten reports whether the process that is held has written after a silence.
func (c *connection) peerHasWritten() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.peerWrote
}

// recordWriter looks at the writer's credentials. What was written before they were asked for comes without, at the very
// beginning of a connection only.
func (c *connection) recordWriter(credentials []byte) {
	switch pid := writerPID(credentials); {
	case pid == c.peerPID.Load() && pid != 0:
		c.writerSeen = true
	case pid == 0 && !c.writerSeen && c.passcredErr == nil:
	case pid == 0:
		c.foreignPID.CompareAndSwap(0, -1)
	default:
		c.foreignPID.CompareAndSwap(0, pid)
	}
}

// writerPID returns the process that wrote, or 0 when that is not told.
func writerPID(credentials []byte) int32 {
	if len(credentials) < unix.SizeofCmsghdr {
		return 0 // there is none, on which the parser would panic
	}
	header, data, _, err := unix.ParseOneSocketControlMessage(credentials)
	if err != nil || header.Level != unix.SOL_SOCKET || header.Type != unix.SCM_CREDENTIALS || len(data) < 4 {
		return 0
	}
	return int32(binary.NativeEndian.Uint32(data))
}

// Close ends the connection and lets go of its caller.
func (c *connection) Close() error {
	if p := c.attestation.Load(); p != nil {
		p.release()
	} else if c.process.fd > 0 {
		c.process.close()
	}
	return c.UnixConn.Close()
}

// PeerPID returns the process at the other end of a connection that a Prover's listener accepted, as the kernel recorded it
// when it connected, or 0. Its number may be another's by now.
func PeerPID(conn net.Conn) int32 {
	if c, ok := conn.(*connection); ok && c.ucredErr == nil {
		return c.ucred.Pid
	}
	return 0
}

// Peer returns who is at the other end of a connection of Listen's, and its owner, as far as one look at its cgroup shows:
// enough to count connections by that are refused before anything of them is proved.
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
