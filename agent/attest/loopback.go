package attest

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net"
	"sync/atomic"

	"perceptd/agent/grants"
	"perceptd/agent/tcppeer"
)

// Secrets are the header secrets of the loopback listener: whoever sends a grant's secret is its caller. Each is made of
// one root secret and of whom the grant is for, so that it stays the same over restarts, and neither tells of another.
// It is safe for concurrent use.
type Secrets struct {
	derive  func(subject string) [sha256.Size]byte // holds the root, where no print finds it
	matches atomic.Pointer[map[[sha256.Size]byte]grants.Match]
}

// secretLength is the length of a header secret.
const secretLength = 2 * sha256.Size

// NewSecrets returns the secrets that are made of root. They are nobody's until SetGrants.
func NewSecrets(root [32]byte) *Secrets {
	s := &Secrets{derive: func(subject string) (sum [sha256.Size]byte) {
		mac := hmac.New(sha256.New, root[:])
		_, _ = mac.Write([]byte("perceptd header secret\x00" + subject))
		mac.Sum(sum[:0])
		return sum
	}}
	s.SetGrants(nil)
	return s
}

// SetGrants has the secrets of those grants count, and no others.
func (s *Secrets) SetGrants(all []grants.Ref) {
	subjects := make(map[[sha256.Size]byte]grants.Match)
	for i := range all {
		match := all[i].Caller
		subjects[sha256.Sum256([]byte(s.Header(match)))] = match
	}
	s.matches.Store(&subjects)
}

// Header returns the secret of whom a grant is for, in hexadecimal digits. It must not get into any log.
func (s *Secrets) Header(of grants.Match) string {
	sum := s.derive(of.Subject().String())
	return hex.EncodeToString(sum[:])
}

// Subject returns whom the grants are for whose secret a header has. It is looked up by its digest, so that the time that
// this takes tells nothing of the secrets there are.
func (s *Secrets) Subject(header string) (grants.Match, bool) {
	if len(header) != secretLength {
		return grants.Match{}, false
	}
	match, ok := (*s.matches.Load())[sha256.Sum256([]byte(header))]
	return match, ok
}

// viaSecret begins what is told of a caller that was not proved by its socket.
const viaSecret = "header secret"

// CallerBySecret returns the caller that has shown the secret of a subject: it has that and nothing else that a grant could be
// for. uid is the user at the other end, or why it is not known. A subject that is a user must be it: else the error,
// which is an *UnprovedError, says so.
func CallerBySecret(subject grants.Match, uid uint32, unknown error) (grants.Caller, error) {
	c := subject.Caller()
	c.Via = viaSecret + ", " + DescribeTCPPeer(uid, unknown)
	switch {
	case subject.UID == nil:
		return c, nil
	case unknown != nil:
		return c, &Error{
			What: "that " + subject.String() + " sent its header secret", Why: unknown.Error(),
			Hint: "ask from this device's own network, or on the token socket",
		}
	case uid != *subject.UID:
		return c, newError("that "+subject.String()+" sent its header secret", errOtherUser(uid))
	}
	return c, nil
}

// DescribeTCPPeer says in words what is known of the user at the other end of a TCP connection.
func DescribeTCPPeer(uid uint32, unknown error) string {
	if unknown != nil {
		return "peer unknown"
	}
	return fmt.Sprintf("peer uid %d", uid)
}

func errOtherUser(uid uint32) error { return fmt.Errorf("uid %d did", uid) }

// ListenTCP returns l, which is bound to one address of this device, with connections that PeerUser knows. Accept it from
// one goroutine.
func (a *Attestor) ListenTCP(l net.Listener) net.Listener {
	return tcppeer.Listen(l, a.kernel.proc, a.kernel.overflow.uid)
}

// TCPPeerUID returns the uid of whoever made the socket at the other end of a connection of ListenTCP's, or grants.NoID and
// why it is not known.
func TCPPeerUID(conn net.Conn) (uint32, error) { return tcppeer.User(conn) }
