package hubtest

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// CreateDevice registers a device and returns its connection string. A device that is there is replaced: its twin
// begins anew, at version 1.
func (h *Hub) CreateDevice(device string) string { return h.create(device, "") }

// CreateModule registers a module of a device and returns its connection string.
func (h *Hub) CreateModule(device, module string) string { return h.create(device, module) }

func (h *Hub) create(device, module string) string {
	h.mu.Lock()
	defer h.mu.Unlock()
	i := h.registerLocked(device, module)
	text := "HostName=" + h.options.Name + ";DeviceId=" + device
	if module != "" {
		text += ";ModuleId=" + module
	}
	return text + ";SharedAccessKey=" + encodeKey(i.primary)
}

// CreateCertificateDevice registers a device that signs in with a certificate.
func (h *Hub) CreateCertificateDevice(device string, certificate *x509.Certificate) {
	h.mu.Lock()
	defer h.mu.Unlock()
	i := h.registerLocked(device, "")
	i.primary, i.secondary, i.thumbprint = nil, nil, thumbprint(certificate.Raw)
}

// CreateAuthorityDevice registers a device that signs in with any certificate of its name that is of the hub's
// authority: see NewClientCertificate.
func (h *Hub) CreateAuthorityDevice(device string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	i := h.registerLocked(device, "")
	i.primary, i.secondary, i.byAuthority = nil, nil, true
}

// Delete removes an identity, and ends its connection.
func (h *Hub) Delete(id string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if i := h.identities[id]; i != nil {
		h.removeLocked(i)
	}
}

func (h *Hub) registerLocked(device, module string) *identity {
	i := &identity{
		device: device, module: module, primary: newKey(), secondary: newKey(), etag: 1,
		generation: strconv.FormatInt(h.options.Now().UnixNano(), 10), twin: newTwin(h.options.Now()),
	}
	if before := h.identities[i.id()]; before != nil {
		h.removeLocked(before)
	}
	h.identities[i.id()] = i
	return i
}

func (h *Hub) removeLocked(i *identity) {
	delete(h.identities, i.id())
	if i.session != nil {
		i.session.end("the identity was removed")
	}
}

func thumbprint(certificate []byte) string {
	sum := sha256.Sum256(certificate)
	return hex.EncodeToString(sum[:])
}

// login is a CONNECT, read.
type login struct {
	hub, device, module string
	apiVersion          string // of the device API
}

// readLogin reads a user name: HOST/DEVICE/[MODULE/]?api-version=…; the question mark may be missing.
func readLogin(user string) (login, error) {
	path, query, found := strings.Cut(user, "/?")
	if !found {
		if cut := strings.LastIndexByte(user, '/'); cut >= 0 {
			path, query = user[:cut], user[cut+1:]
		}
	}
	parts := strings.Split(path, "/")
	values, err := url.ParseQuery(query)
	if err != nil || len(parts) < 2 || len(parts) > 3 {
		return login{}, fmt.Errorf("user name %q is not HOST/DEVICE/[MODULE/]?api-version=…", user)
	}
	l := login{hub: parts[0], device: parts[1], apiVersion: values.Get("api-version")}
	if len(parts) == 3 {
		l.module = parts[2]
	}
	if l.apiVersion == "" {
		return login{}, fmt.Errorf("user name %q has no api-version", user)
	}
	return l, nil
}

// authenticateLocked returns whose connection it is, and until when it may last; zero: for ever. client is the client
// ID of the CONNECT, and peer the certificates of its TLS connection.
func (h *Hub) authenticateLocked(
	client, user, password string, peer []*x509.Certificate,
) (*identity, login, time.Time, error) {
	l, err := readLogin(user)
	if err != nil {
		return nil, l, time.Time{}, err
	}
	i := h.identities[client]
	switch {
	case !strings.EqualFold(l.hub, h.options.Name):
		return nil, l, time.Time{}, fmt.Errorf("the user name is for hub %q", l.hub)
	case i == nil || i.device != l.device || i.module != l.module:
		return nil, l, time.Time{}, fmt.Errorf("client %q is not registered, or not the user name's", client)
	case i.disabled:
		return nil, l, time.Time{}, errors.New("the identity is disabled")
	case i.thumbprint != "" && (len(peer) == 0 || thumbprint(peer[0].Raw) != i.thumbprint):
		return nil, l, time.Time{}, errors.New("the client's certificate is not the identity's")
	case i.byAuthority:
		return i, l, time.Time{}, h.checkCertificate(i, peer)
	case i.thumbprint != "":
		return i, l, time.Time{}, nil
	}
	signature, err := parseSignature(password)
	if err != nil {
		return nil, l, time.Time{}, fmt.Errorf("the password is no signature: %w", err)
	}
	if err := h.checkSignature(&signature, i); err != nil {
		return nil, l, time.Time{}, err
	}
	return i, l, signature.expires, nil
}

// checkCertificate checks that a client's certificate is of the hub's authority, of the identity's name, and valid now.
func (h *Hub) checkCertificate(i *identity, peer []*x509.Certificate) error {
	if len(peer) == 0 || peer[0].Subject.CommonName != i.device {
		return fmt.Errorf("the client has no certificate whose common name is %q", i.device)
	}
	between := x509.NewCertPool()
	for _, c := range peer[1:] {
		between.AddCert(c)
	}
	_, err := peer[0].Verify(x509.VerifyOptions{
		Roots: h.certificates.pool, Intermediates: between, CurrentTime: h.options.Now(),
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	return err
}

func (h *Hub) checkSignature(s *sharedAccessSignature, i *identity) error {
	switch {
	case !s.covers(h.options.Name + "/" + i.path()):
		return fmt.Errorf("the signature is for %q, not for %s/%s", s.resource, h.options.Name, i.path())
	case !h.options.Now().Before(s.expires):
		return fmt.Errorf("the signature expired at %s", s.expires.UTC().Format(time.RFC3339))
	case s.policy == policyName && s.isBy(h.policyKey), s.policy == "" && (s.isBy(i.primary) || s.isBy(i.secondary)):
		return nil
	}
	return errors.New("the signature is not by a key of the identity")
}

// peerCertificates returns the client's certificates of a TLS connection.
func peerCertificates(c *tls.Conn) []*x509.Certificate {
	if c == nil {
		return nil
	}
	return c.ConnectionState().PeerCertificates
}
