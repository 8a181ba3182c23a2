// Package tcppeer finds out which user is at the other end of a TCP connection within this device: by the kernel's
// table of sockets, since TCP has no credentials.
package tcppeer

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

var (
	errNotTCP      = errors.New("the listener is not one for TCP")
	errNotListened = errors.New("the connection did not come in on a listener that looks for its other end")
	errNoSocket    = errors.New("the kernel's table of sockets does not have the other end: " +
		"it is in another network namespace, or gone")
	errStranger = errors.New("the peer's user has no number in this user namespace, where all such look the same")
)

const (
	// lookupInterval is how often the kernel's table is read at most: it takes milliseconds, however few sockets there
	// are. All connections that come meanwhile share one look-up, so that a flood of them costs no more, and no client
	// waits longer.
	lookupInterval = 25 * time.Millisecond

	// lookupTries is how often the table is read for one connection: while others connect, one reading may miss a line.
	lookupTries = 2

	mostQueued = 1024 // connections that share a look-up
)

// listener accepts TCP connections within this device, and finds out which user is at their other end.
type listener struct {
	net.Listener
	proc     string
	stranger uint32
	at       netip.AddrPort

	// What follows is for one Accept at a time.
	lookedUp time.Time
	ready    []*peer
}

// peer is a connection and the user at its other end.
type peer struct {
	*net.TCPConn
	from    netip.AddrPort
	uid     uint32
	unknown error // why uid is not known
}

// Listen returns l, which is bound to one address of this device, with connections that User knows. proc is where the
// proc file system is mounted. stranger is the uid that stands for all who have no number in this user namespace, and
// so is nobody's; NoUser: there is none. Accept it from one goroutine.
func Listen(l net.Listener, proc string, stranger uint32) net.Listener {
	return &listener{Listener: l, proc: proc, stranger: stranger, at: AddressOf(l.Addr())}
}

// User returns the uid of the user that made the socket at the other end of a connection of Listen's, by the kernel's
// own table, or NoUser and why it is not known. A process that was handed a connection has the uid of the one that made
// it.
func User(conn net.Conn) (uint32, error) {
	if p, ok := conn.(*peer); ok {
		return p.uid, p.unknown
	}
	return NoUser, errNotListened
}

// NoUser is the uid that no user has.
const NoUser = ^uint32(0)

// Accept waits for the next connection.
func (l *listener) Accept() (net.Conn, error) {
	if len(l.ready) == 0 {
		first, err := l.accept()
		if err != nil {
			return nil, err
		}
		time.Sleep(time.Until(l.lookedUp.Add(lookupInterval)))
		l.ready = l.acceptQueued(first)
		l.lookedUp = time.Now()
		l.lookUp()
	}
	next := l.ready[0]
	l.ready = l.ready[1:]
	return next, nil
}

func (l *listener) accept() (*peer, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return nil, errors.Join(errNotTCP, conn.Close())
	}
	return &peer{TCPConn: tcp, from: AddressOf(tcp.RemoteAddr()), uid: NoUser}, nil
}

// acceptQueued returns first, and after it the connections that are in the kernel's queue already.
func (l *listener) acceptQueued(first *peer) []*peer {
	all := []*peer{first}
	for len(all) < mostQueued && l.hasQueued() {
		next, err := l.accept()
		if err != nil {
			return all // the next Accept says why
		}
		all = append(all, next)
	}
	return all
}

// hasQueued reports whether a connection waits in the kernel's queue.
func (l *listener) hasQueued() (more bool) {
	socket, ok := l.Listener.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return false
	}
	err = raw.Control(func(fd uintptr) {
		poll := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(poll[:], 0)
		more = n > 0 && err == nil
	})
	return more && err == nil
}

// lookUp looks up the users of the connections that are ready.
func (l *listener) lookUp() {
	for range lookupTries {
		found, err := Users(l.proc, l.at)
		missing := false
		for _, c := range l.ready {
			if uid, ok := found[c.from]; ok {
				c.uid, c.unknown = uid, nil
			}
			switch {
			case err != nil:
				c.uid, c.unknown = NoUser, err
			case c.uid == NoUser:
				c.unknown, missing = errNoSocket, true
			case c.uid == l.stranger:
				c.uid, c.unknown = NoUser, errStranger
			}
		}
		if !missing {
			return
		}
	}
}

// AddressOf returns an address of TCP as a value, and the zero one for any other.
func AddressOf(a net.Addr) netip.AddrPort {
	tcp, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	at := tcp.AddrPort()
	return netip.AddrPortFrom(at.Addr().Unmap(), at.Port())
}

// Users returns the users of the sockets that are connected to an address, by the addresses that they are bound to. A
// program may connect to an IPv4 address with a socket for IPv6, which stands in the other table. proc is where the
// proc file system is mounted.
func Users(proc string, to netip.AddrPort) (map[netip.AddrPort]uint32, error) {
	all := make(map[netip.AddrPort]uint32)
	for _, name := range [...]string{"tcp", "tcp6"} {
		f, err := os.Open(proc + "/self/net/" + name)
		if errors.Is(err, os.ErrNotExist) { // a kernel without IPv6
			continue
		}
		if err == nil {
			err = errors.Join(findSockets(f, to, all), f.Close())
		}
		if err != nil {
			return nil, fmt.Errorf("the kernel's table of sockets: %w", err)
		}
	}
	return all, nil
}

// tableBuffer is large, since each call for more of the table may miss what has changed in between.
const tableBuffer = 64 << 10

// findSockets adds to users those of a table of the form of /proc/net/tcp that are connected to that address. A line
// that cannot be read is nobody's.
func findSockets(table io.Reader, to netip.AddrPort, users map[netip.AddrPort]uint32) error {
	lines := bufio.NewScanner(table)
	lines.Buffer(make([]byte, tableBuffer), tableBuffer)
	port := fmt.Appendf(nil, ":%04X ", to.Port()) // which most lines do not have
	for lines.Scan() {
		if !bytes.Contains(lines.Bytes(), port) {
			continue
		}
		if s, ok := readSocket(lines.Text()); ok && s.remote == to {
			users[s.local] = s.uid
		}
	}
	return lines.Err()
}

// socket is a line of /proc/net/tcp.
type socket struct {
	local, remote netip.AddrPort
	uid           uint32
}

// readSocket reads a line, such as
//
//	0: 0100007F:9DBC 0100007F:C350 01 00000000:00000000 00:00000000 00000000  1000        0 12345 1 …
//
// It reports false for one that has no inode as well: its process has closed it, and the kernel gives 0 for its uid
// then.
func readSocket(line string) (s socket, ok bool) {
	fields := strings.Fields(line)
	if len(fields) < 10 {
		return socket{}, false
	}
	local, okLocal := readAddress(fields[1])
	remote, okRemote := readAddress(fields[2])
	uid, err := strconv.ParseUint(fields[7], 10, 32)
	inode, errInode := strconv.ParseUint(fields[9], 10, 64)
	if !okLocal || !okRemote || err != nil || errInode != nil || inode == 0 {
		return socket{}, false
	}
	return socket{local, remote, uint32(uid)}, true
}

// readAddress reads an address and a port in hexadecimal digits: the address in words of 32 bits, as they are in
// memory.
func readAddress(text string) (netip.AddrPort, bool) {
	address, port, _ := strings.Cut(text, ":")
	var words [16]byte
	if len(address) != 8 && len(address) != 32 || len(port) != 4 {
		return netip.AddrPort{}, false
	}
	n, err := hex.Decode(words[:], []byte(address))
	number, errPort := strconv.ParseUint(port, 16, 16)
	if err != nil || errPort != nil {
		return netip.AddrPort{}, false
	}
	for i := 0; i < n; i += 4 {
		binary.NativeEndian.PutUint32(words[i:], binary.BigEndian.Uint32(words[i:]))
	}
	ip, _ := netip.AddrFromSlice(words[:n])
	return netip.AddrPortFrom(ip.Unmap(), uint16(number)), true
}
