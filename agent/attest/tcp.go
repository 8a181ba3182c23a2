package attest

import (
	"net"

	"perceptd/agent/tcppeer"
)

// ListenTCP returns l, which is bound to one address of this device, with connections that PeerUser knows. Accept it from
// one goroutine.
func (a *Attestor) ListenTCP(l net.Listener) net.Listener {
	return tcppeer.Listen(l, a.kernel.proc, a.kernel.overflow.uid)
}

// TCPPeerUID returns the uid of whoever made the socket at the other end of a connection of ListenTCP's, or agent.NoID and
// why it is not known.
func TCPPeerUID(conn net.Conn) (uint32, error) { return tcppeer.User(conn) }
