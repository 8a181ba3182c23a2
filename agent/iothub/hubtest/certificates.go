package hubtest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"time"
)

// certificates are the hub's own certificate, and the authority that it and devices' certificates are of.
type certificates struct {
	authority *x509.Certificate
	key       *ecdsa.PrivateKey
	server    tls.Certificate
	pool      *x509.CertPool
	rootPEM   []byte
}

const certificateLife = 365 * 24 * time.Hour

// makeCertificates makes an authority and a certificate of it for name, localhost and address.
func makeCertificates(name, address string, now time.Time) (c certificates, err error) {
	if c.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return c, err
	}
	root := template("hubtest's certificate authority", now)
	root.IsCA, root.BasicConstraintsValid, root.KeyUsage = true, true, x509.KeyUsageCertSign
	der, err := x509.CreateCertificate(rand.Reader, root, root, &c.key.PublicKey, c.key)
	if err != nil {
		return c, err
	}
	if c.authority, err = x509.ParseCertificate(der); err != nil {
		return c, err
	}
	c.pool = x509.NewCertPool()
	c.pool.AddCert(c.authority)
	c.rootPEM = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})

	server := template(name, now)
	server.DNSNames, server.IPAddresses = []string{name, "localhost"}, []net.IP{net.ParseIP(address)}
	if ip := net.ParseIP(name); ip != nil {
		server.IPAddresses = append(server.IPAddresses, ip)
	}
	server.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	c.server, err = c.issue(server)
	return c, err
}

func template(name string, now time.Time) *x509.Certificate {
	serial, _ := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120)) // never fails
	return &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(certificateLife),
		KeyUsage: x509.KeyUsageDigitalSignature,
	}
}

// issue makes a key and a certificate for it.
func (c *certificates) issue(of *x509.Certificate) (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	der, err := x509.CreateCertificate(rand.Reader, of, c.authority, &key.PublicKey, c.key)
	if err != nil {
		return tls.Certificate{}, err
	}
	leaf, err := x509.ParseCertificate(der)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}, err
}

// NewClientCertificate returns a certificate with which a device of that name can sign in, and its key in PEM.
func (h *Hub) NewClientCertificate(device string) (certificate tls.Certificate, certPEM, keyPEM []byte, err error) {
	of := template(device, h.options.Now())
	of.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	if certificate, err = h.certificates.issue(of); err != nil {
		return certificate, nil, nil, err
	}
	key, err := x509.MarshalPKCS8PrivateKey(certificate.PrivateKey)
	if err != nil {
		return certificate, nil, nil, err
	}
	return certificate, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certificate.Certificate[0]}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}), nil
}
