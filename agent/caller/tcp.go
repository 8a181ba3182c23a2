package caller

import (
	"bufio"
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

	"perceptd/agent"
)

// tableTries is how often the kernel's table is read before a socket counts as not there: while others connect, one
// reading may miss a line.
const tableTries = 3

var (
	errNoTCP    = errors.New("the connection is no TCP connection")
	errNoSocket = errors.New("the kernel's table of sockets does not have the other end: it is in another network namespace, or gone")
)

// PeerUser returns the uid of whoever made the socket at the other end of a TCP connection within this device, by the
// kernel's own table. A process that was handed a connection has the uid of the one that made it.
func (p *Prover) PeerUser(conn net.Conn) (uint32, error) {
	remote, ok := conn.RemoteAddr().(*net.TCPAddr)
	local, alsoOK := conn.LocalAddr().(*net.TCPAddr)
	if !ok || !alsoOK {
		return agent.NoID, errNoTCP
	}
	return p.kernel.tcpUser(plainAddress(remote), plainAddress(local))
}

func plainAddress(a *net.TCPAddr) netip.AddrPort {
	at := a.AddrPort()
	return netip.AddrPortFrom(at.Addr().Unmap(), at.Port())
}

// tcpUser returns the uid of the socket that is bound to local and connected to remote. A program may connect to an IPv4
// address with a socket for IPv6, which stands in the other table.
func (k kernel) tcpUser(local, remote netip.AddrPort) (uint32, error) {
	files := [...]string{"tcp", "tcp6"}
	if local.Addr().Is6() {
		files = [...]string{"tcp6", "tcp"}
	}
	for range tableTries {
		for _, name := range files {
			uid, found, err := k.findTCP(k.proc+"/self/net/"+name, local, remote)
			switch {
			case errors.Is(err, os.ErrNotExist): // a kernel without IPv6
			case err != nil:
				return agent.NoID, err
			case found && uid == k.stranger.uid:
				return agent.NoID, errStranger
			case found:
				return uid, nil
			}
		}
	}
	return agent.NoID, errNoSocket
}

func (k kernel) findTCP(path string, local, remote netip.AddrPort) (uid uint32, found bool, err error) {
	f, err := os.Open(path)
	if err != nil {
		return agent.NoID, false, fmt.Errorf("the kernel's table of sockets: %w", err)
	}
	defer func() { _ = f.Close() }()
	return findSocket(f, local, remote)
}

// tableBuffer is large, since each call for more of the table may miss what has changed in between.
const tableBuffer = 64 << 10

// findSocket looks through a table of the form of /proc/net/tcp. A line that cannot be read is nobody's.
func findSocket(table io.Reader, local, remote netip.AddrPort) (uid uint32, found bool, err error) {
	lines := bufio.NewScanner(table)
	lines.Buffer(make([]byte, tableBuffer), tableBuffer)
	for lines.Scan() {
		s, ok := readSocket(lines.Text())
		if ok && s.local == local && s.remote == remote {
			return s.uid, true, nil
		}
	}
	return agent.NoID, false, lines.Err()
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
