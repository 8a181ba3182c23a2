package link

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"slices"
)

// CertificateFiles is credentials with which a device signs in by an X.509 certificate.
type CertificateFiles struct {
	Identity         Identity
	Certificate, Key string                            // paths of PEM files
	Read             func(path string) ([]byte, error) // nil: os.ReadFile
}

// Login reads the files.
func (f CertificateFiles) Login(context.Context) (Login, error) {
	if err := f.Identity.Validate(); err != nil {
		return Login{}, &CredentialsError{err}
	}
	certificate, err := readSecret(f.Read, f.Certificate)
	if err != nil {
		return Login{}, err
	}
	key, err := readSecret(f.Read, f.Key)
	if err != nil {
		return Login{}, err
	}
	defer clear(key)
	pair, err := tls.X509KeyPair(certificate, key)
	if err != nil {
		return Login{}, badCredentials("%s and %s are no certificate and its key in PEM: %w", f.Certificate, f.Key, err)
	}
	return Login{
		Identity: f.Identity, Certificate: &pair, secret: sha256.Sum256(slices.Concat(certificate, key)),
	}, nil
}
