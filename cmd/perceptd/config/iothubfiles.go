package config

import (
	"bytes"
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"os"

	"perceptd/agent/iothub/link"
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
	return s.given(f.secret(path))
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

// Credentials returns what says who the device is, which is read anew at each connection.
func (h IoTHub) Credentials() link.Credentials { return credentials{h, processFiles()} }

// credentials finds out where the secret is each time that it is needed: systemd may not have given it.
type credentials struct {
	of   IoTHub
	from files
}

// Login reads who the device is. Only the identity service is asked for it, the others are files.
func (c credentials) Login(ctx context.Context) (link.Login, error) {
	h := c.of
	if h.IdentityService.On {
		return link.IdentityService{
			IdentitySocket: h.IdentityService.IdentitySocket, KeySocket: h.IdentityService.KeySocket,
		}.Login(ctx)
	}
	if h.Certificate.File == "" {
		read := func(string) ([]byte, error) { return c.from.named(h.ConnectionString) }
		return link.SharedKeyFile{Path: h.ConnectionString.String(), Read: read}.Login(ctx)
	}
	key := h.Certificate.Key.String()
	read := func(path string) ([]byte, error) {
		if path == key {
			return c.from.named(h.Certificate.Key)
		}
		return c.from.public(path)
	}
	identity := link.Identity{
		Hub: h.Certificate.Hub, Gateway: h.Certificate.Gateway, Device: h.Certificate.Device,
		Module: h.Certificate.Module,
	}
	return link.CertificateFiles{Identity: identity, Certificate: h.Certificate.File, Key: key, Read: read}.Login(ctx)
}

// CheckFiles reads every file and credential that [iothub] names, and connects nowhere. The error says which cannot be
// used, and why.
func (h IoTHub) CheckFiles(ctx context.Context) error { return h.checkFiles(ctx, processFiles()) }

func (h IoTHub) checkFiles(ctx context.Context, from files) error {
	_, proxy := h.proxyURL(from)
	_, roots := h.roots(from)
	var login error
	if h.ConnectionString != (Secret{}) || h.Certificate.File != "" { // the identity service may be there later
		_, login = credentials{h, from}.Login(ctx)
	}
	return errors.Join(proxy, roots, login)
}

// OfSystemd returns the name of systemd's credential that says who the device is, or proves it; "": a file does.
func (h IoTHub) OfSystemd() string {
	return cmp.Or(h.ConnectionString.Credential, h.Certificate.Key.Credential)
}

// withoutCredentials leaves out what is in systemd's credentials, where their folder is not known, and says so.
func (h IoTHub) withoutCredentials(folder string) (known IoTHub, unknown []string) {
	for _, row := range []struct{ secret, with *string }{
		{&h.ConnectionString.Credential, nil}, {&h.Certificate.Key.Credential, &h.Certificate.File},
		{&h.ProxyPassword.Credential, &h.Proxy},
	} {
		if *row.secret == "" || folder != "" {
			continue
		}
		unknown = append(unknown, fmt.Sprintf("systemd's credential %s was not checked: the service alone has it; "+
			"perceptctl doctor says what is wrong with it", *row.secret))
		*row.secret = ""
		if row.with != nil {
			*row.with = ""
		}
	}
	return h, unknown
}
