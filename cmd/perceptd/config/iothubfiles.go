package config

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"os"
)

// ProxyURL returns the proxy with its password; nil: there is none.
func (h IoTHub) ProxyURL() (*url.URL, error) { return h.proxyURL(processFiles()) }

func (h IoTHub) proxyURL(from files) (*url.URL, error) {
	if h.Proxy == "" {
		return nil, nil
	}
	proxy, err := url.Parse(h.Proxy)
	if err != nil {
		return nil, errors.New("iothub.proxy is no URL") // which validate has seen to
	}
	if h.ProxyPassword == (Secret{}) {
		return proxy, nil
	}
	text, err := from.named(h.ProxyPassword)
	if err != nil {
		return nil, fmt.Errorf("the proxy's password: %w", err)
	}
	password := string(bytes.TrimRight(text, "\r\n"))
	clear(text)
	if password == "" {
		return nil, fmt.Errorf("the proxy's password: %v is empty", h.ProxyPassword)
	}
	proxy.User = url.UserPassword(proxy.User.Username(), password)
	return proxy, nil
}

// named reads where a secret is.
func (f files) named(s Secret) ([]byte, error) {
	path, err := s.Path(os.Getenv(credentialsVariable))
	if err != nil {
		return nil, err
	}
	return f.secret(path)
}

// credentialsVariable is where systemd says in which folder the service's credentials are.
const credentialsVariable = "CREDENTIALS_DIRECTORY"

// Roots returns the certificates by which the hub is checked; nil: the system's.
func (h IoTHub) Roots() (*x509.CertPool, error) { return h.roots(processFiles()) }

func (h IoTHub) roots(from files) (*x509.CertPool, error) {
	if h.CAFile == "" {
		return nil, nil
	}
	text, err := from.public(h.CAFile)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(text) {
		return nil, fmt.Errorf("%s: no certificate is in it: it must be PEM, \"-----BEGIN CERTIFICATE-----\"", h.CAFile)
	}
	return pool, nil
}
