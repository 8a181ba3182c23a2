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

// Secrets are the header secrets of the loopback listener. A request that has the secret of a grant comes from the
// grant's caller. Each secret is derived from one root secret and the grant's subject, so that it stays the same over
// restarts and reveals nothing about the others. It is safe for concurrent use.
type Secrets struct {
	derive  func(subject string) [sha256.Size]byte             // has the root secret, where printing does not show it
	matches atomic.Pointer[map[[sha256.Size]byte]grants.Match] // by the SHA-256 of the header secret
}

// secretLength is the length of a header secret in hexadecimal digits.
const secretLength = 2 * sha256.Size

// NewSecrets returns the secrets that are derived from root. None is valid until SetGrants is called.
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

// SetGrants makes the secrets of these grants valid, and no others. A grant of which it is not understood whom it is
// for has none.
func (s *Secrets) SetGrants(all []grants.Ref) {
	subjects := make(map[[sha256.Size]byte]grants.Match)
	for i := range all {
		if all[i].Unclear != 0 {
			continue
		}
		match := all[i].Caller
		subjects[sha256.Sum256([]byte(s.Header(match)))] = match
	}
	s.matches.Store(&subjects)
}

// Header returns the secret for the subject of a grant, in hexadecimal digits. It must not be logged.
func (s *Secrets) Header(of grants.Match) string {
	sum := s.derive(of.Subject().String())
	return hex.EncodeToString(sum[:])
}

// Match returns whom the grants are for whose secret is header. The look-up is by digest, so that its duration reveals
// nothing about the valid secrets.
func (s *Secrets) Match(header string) (grants.Match, bool) {
	if len(header) != secretLength {
		return grants.Match{}, false
	}
	match, ok := (*s.matches.Load())[sha256.Sum256([]byte(header))]
	return match, ok
}

// viaSecret is the beginning of Caller.Via for a caller that was attested by a header secret.
const viaSecret = "header secret"

// CallerBySecret returns the caller that sent the header secret of subject. It has the one attribute that subject
// names and no others, so that no other grant matches it. uid is the user at the other end of the connection, and
// unknown the reason if that could not be determined. If subject is a user, uid has to be that user: otherwise the
// error is an *Error.
func CallerBySecret(subject grants.Match, uid uint32, unknown error) (grants.Caller, error) {
	c := subject.Caller()
	c.Via = viaSecret + ", " + DescribeTCPPeer(uid, unknown)
	if unknown == nil && subject.UID == nil {
		c.Peer = &uid
	}
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

// DescribeTCPPeer describes what is known about the user at the other end of a TCP connection.
func DescribeTCPPeer(uid uint32, unknown error) string {
	if unknown != nil {
		return "peer unknown"
	}
	return fmt.Sprintf("peer uid %d", uid)
}

func errOtherUser(uid uint32) error { return fmt.Errorf("uid %d did", uid) }

// ListenTCP returns l with connections for which TCPPeerUID works. l has to be bound to one address of this device.
// Only one goroutine may call Accept.
func (a *Attestor) ListenTCP(l net.Listener) net.Listener {
	return tcppeer.Listen(l, a.kernel.proc, a.kernel.overflow.uid)
}

// TCPPeerUID returns the uid of the process that made the socket at the other end of a connection from ListenTCP. If
// it is unknown, it returns grants.NoID and the reason.
func TCPPeerUID(conn net.Conn) (uint32, error) { return tcppeer.User(conn) }
