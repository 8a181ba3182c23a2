package caller

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
	"time"

	"golang.org/x/sys/unix"

	"perceptd/agent"
)

var (
	errNotTCP   = errors.New("the listener is not one for TCP")
	errNoTCP    = errors.New("the connection did not come in on a listener that looks for its other end")
	errNoSocket = errors.New("the kernel's table of sockets does not have the other end: it is in another network namespace, or gone")
)

const (
	// lookEvery is how often the kernel's table is read at most: it takes milliseconds, however few sockets there are. All
	// who connect meanwhile share one look, so that a flood of connections costs no more, and lets nobody wait longer.
	lookEvery = 25 * time.Millisecond

	// lookTries is how often the table is read for one connection: while others connect, one reading may miss a line.
	lookTries = 2

	mostWaiting = 1024 // connections that share a look
)

// tcpListener accepts TCP connections within this device, and finds out which user is at their other end.
type tcpListener struct {
	net.Listener
	kernel kernel
	at     netip.AddrPort

	// What follows is for one Accept at a time.
	looked time.Time
	ready  []*tcpPeer
}

// tcpPeer is a connection and the user at its other end.
type tcpPeer struct {
	*net.TCPConn
	from    netip.AddrPort
	uid     uint32
	unknown error // why uid is not known
}

// ListenTCP returns l, which is bound to one address of this device, with connections that PeerUser knows. Accept it from
// one goroutine.
func (p *Prover) ListenTCP(l net.Listener) net.Listener {
	return &tcpListener{Listener: l, kernel: p.kernel, at: addressOf(l.Addr())}
}

// PeerUser returns the uid of whoever made the socket at the other end of a connection of ListenTCP's, by the kernel's
// own table, or why it is not known. A process that was handed a connection has the uid of the one that made it.
func PeerUser(conn net.Conn) (uint32, error) {
	if c, ok := conn.(*tcpPeer); ok {
		return c.uid, c.unknown
	}
	return agent.NoID, errNoTCP
}

// Accept waits for the next connection.
func (l *tcpListener) Accept() (net.Conn, error) {
	if len(l.ready) == 0 {
		first, err := l.accept()
		if err != nil {
			return nil, err
		}
		time.Sleep(time.Until(l.looked.Add(lookEvery)))
		l.ready = l.andWaiting(first)
		l.looked = time.Now()
		l.look()
	}
	next := l.ready[0]
	l.ready = l.ready[1:]
	return next, nil
}

func (l *tcpListener) accept() (*tcpPeer, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return nil, errors.Join(errNotTCP, conn.Close())
	}
	return &tcpPeer{TCPConn: tcp, from: addressOf(tcp.RemoteAddr()), uid: agent.NoID}, nil
}

// andWaiting returns first, and after it those who have connected already.
func (l *tcpListener) andWaiting(first *tcpPeer) []*tcpPeer {
	all := []*tcpPeer{first}
	for len(all) < mostWaiting && l.hasMore() {
		next, err := l.accept()
		if err != nil {
			return all // the next Accept says why
		}
		all = append(all, next)
	}
	return all
}

// hasMore reports whether somebody waits in the queue.
func (l *tcpListener) hasMore() (more bool) {
	err := control(l.Listener, func(fd int) error {
		poll := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(poll[:], 0)
		more = n > 0
		return err
	})
	return more && err == nil
}

// look finds out whose the connections are that are ready.
func (l *tcpListener) look() {
	for range lookTries {
		users, err := l.kernel.tcpUsers(l.at)
		missing := false
		for _, c := range l.ready {
			if uid, found := users[c.from]; found {
				c.uid, c.unknown = uid, nil
			}
			switch {
			case err != nil:
				c.uid, c.unknown = agent.NoID, err
			case c.uid == agent.NoID:
				c.unknown, missing = errNoSocket, true
			case c.uid == l.kernel.stranger.uid:
				c.uid, c.unknown = agent.NoID, errStranger
			}
		}
		if !missing {
			return
		}
	}
}

func addressOf(a net.Addr) netip.AddrPort {
	tcp, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	at := tcp.AddrPort()
	return netip.AddrPortFrom(at.Addr().Unmap(), at.Port())
}

// tcpUsers returns the users of the sockets that are connected to an address, by the addresses that they are bound to. A
// program may connect to an IPv4 address with a socket for IPv6, which stands in the other table.
func (k kernel) tcpUsers(to netip.AddrPort) (map[netip.AddrPort]uint32, error) {
	users := make(map[netip.AddrPort]uint32)
	for _, name := range [...]string{"tcp", "tcp6"} {
		f, err := os.Open(k.proc + "/self/net/" + name)
		if errors.Is(err, os.ErrNotExist) { // a kernel without IPv6
			continue
		}
		if err == nil {
			err = errors.Join(findSockets(f, to, users), f.Close())
		}
		if err != nil {
			return nil, fmt.Errorf("the kernel's table of sockets: %w", err)
		}
	}
	return users, nil
}

// tableBuffer is large, since each call for more of the table may miss what has changed in between.
const tableBuffer = 64 << 10

// findSockets adds to users those of a table of the form of /proc/net/tcp that are connected to that address. A line that
// cannot be read is nobody's.
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

// tcpSocket is a line of /proc/net/tcp.
type tcpSocket struct {
	local, remote netip.AddrPort
	uid           uint32
}

// readSocket reads a line, such as
//
//	0: 0100007F:9DBC 0100007F:C350 01 00000000:00000000 00:00000000 00000000  1000        0 12345 1 …
//
// It reports false for one that has no inode as well: its process has closed it, and the kernel gives 0 for its uid then.
func readSocket(line string) (s tcpSocket, ok bool) {
	fields := strings.Fields(line)
	if len(fields) < 10 {
		return tcpSocket{}, false
	}
	local, okLocal := readAddress(fields[1])
	remote, okRemote := readAddress(fields[2])
	uid, err := strconv.ParseUint(fields[7], 10, 32)
	inode, errInode := strconv.ParseUint(fields[9], 10, 64)
	if !okLocal || !okRemote || err != nil || errInode != nil || inode == 0 {
		return tcpSocket{}, false
	}
	return tcpSocket{local, remote, uint32(uid)}, true
}

// readAddress reads an address and a port in hexadecimal digits: the address in words of 32 bits, as they are in memory.
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
