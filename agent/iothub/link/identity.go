package link

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"strconv"
	"strings"
)

// Identity is a device, or a module of it, as IoT Hub knows it.
type Identity struct {
	Hub     string // the hub's host name
	Gateway string // host, or host:port, to connect to where that is not the hub; empty: the hub
	Device  string
	Module  string // empty: the device itself
}

// String returns HUB/DEVICE or HUB/DEVICE/MODULE.
func (i Identity) String() string { return i.Hub + "/" + i.client() }

// client is the client ID.
func (i Identity) client() string {
	if i.Module == "" {
		return i.Device
	}
	return i.Device + "/" + i.Module
}

// resource is what a signature is for, escaped once.
func (i Identity) resource() string {
	of := i.Hub + "/devices/" + url.PathEscape(i.Device)
	if i.Module != "" {
		of += "/modules/" + url.PathEscape(i.Module)
	}
	return of
}

// events is the topic of events, without their properties.
func (i Identity) events() string {
	if i.Module == "" {
		return "devices/" + i.Device + "/messages/events/"
	}
	return "devices/" + i.Device + "/modules/" + i.Module + "/messages/events/"
}

// apiVersion is that of IoT Hub's device API. Those before 2019-10-01 take no arrays.
const apiVersion = "2021-04-12"

// userName is that of MQTT.
func (i Identity) userName() string { return i.String() + "/?api-version=" + apiVersion }

// host returns the host to connect to, and the port if one is named.
func (i Identity) host() (host, port string) {
	if i.Gateway == "" {
		return i.Hub, ""
	}
	if host, port, err := net.SplitHostPort(i.Gateway); err == nil {
		return host, port
	}
	return i.Gateway, ""
}

// IsHost reports whether text may be a host name, or an IPv4 address.
func IsHost(text string) bool {
	isEnd := func(b byte) bool { return b != '.' && b != '-' }
	return len(text) > 0 && len(text) <= maxHost && isEnd(text[0]) && isEnd(text[len(text)-1]) &&
		onlyOf(text, alphanumeric+".-")
}

// IsID reports whether text may be the ID of a device or a module, as IoT Hub's registry allows.
func IsID(text string) bool {
	return len(text) > 0 && len(text) <= maxID && onlyOf(text, alphanumeric+idMarks)
}

const (
	maxHost      = 254
	maxID        = 128
	alphanumeric = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
	idMarks      = "-:.+%_#*?!(),=@$'"
)

// onlyOf reports whether each character of text is one of all. It takes the place of a regular expression with a length
// in it, which would cost a device without a hub half a megabyte.
func onlyOf(text, all string) bool {
	return !strings.ContainsFunc(text, func(r rune) bool { return !strings.ContainsRune(all, r) })
}

// Validate returns what is wrong with the names, or nil. It repeats none of them: in a file whose fields are mixed up a
// key may stand in their place.
func (i Identity) Validate() error {
	host, port := i.host()
	if _, err := strconv.ParseUint(port, 10, 16); port != "" && err != nil {
		return errors.New("the gateway's port is no port")
	}
	switch {
	case !IsHost(i.Hub):
		return errors.New("the hub's name is no host name, such as myhub.azure-devices.net")
	case !IsHost(host) && net.ParseIP(host) == nil:
		return errors.New("the gateway's name is no host name")
	case !IsID(i.Device):
		return errors.New("the device's ID is not one that IoT Hub allows")
	case i.Module != "" && !IsID(i.Module):
		return errors.New("the module's ID is not one that IoT Hub allows")
	}
	return nil
}

// Credentials say who the device is, and prove it.
type Credentials interface {
	// Login reads them. The error names what is wrong, and no secret. ctx bounds what is asked of others.
	Login(ctx context.Context) (Login, error)
}

// Login is credentials that were read. Either Certificate or Sign is set.
type Login struct {
	Identity
	Certificate *tls.Certificate // X.509
	// Sign returns the HMAC-SHA256 of data by the identity's key.
	Sign func(ctx context.Context, data []byte) ([]byte, error)

	secret [sha256.Size]byte // of the secret: equal where that is
}

// readLogin reads credentials. The hub's name is the same in upper and lower case, and is one from here on: what the
// hub has set is kept by it.
func readLogin(ctx context.Context, c Credentials) (Login, error) {
	login, err := c.Login(ctx)
	login.Hub = strings.ToLower(login.Hub)
	return login, err
}

// signs reports whether l signs in by signatures, which expire.
func (l *Login) signs() bool { return l.Certificate == nil }

// isSame reports whether l and o are the same identity with the same secret.
func (l *Login) isSame(o *Login) bool { return l.Identity == o.Identity && l.secret == o.secret }

// CredentialsError is why credentials are of no use. No part of a secret is in it.
type CredentialsError struct{ Err error }

func (e *CredentialsError) Error() string { return e.Err.Error() }

// Unwrap returns what is wrong.
func (e *CredentialsError) Unwrap() error { return e.Err }

func badCredentials(format string, args ...any) error {
	return &CredentialsError{fmt.Errorf(format, args...)}
}

// maxCredentials bounds a file, in bytes.
const maxCredentials = 64 << 10

// readSecret reads a file of credentials by read; nil: os.ReadFile.
func readSecret(read func(string) ([]byte, error), path string) ([]byte, error) {
	if read == nil {
		read = os.ReadFile
	}
	text, err := read(path)
	switch {
	case err != nil:
		return nil, &CredentialsError{err}
	case len(text) > maxCredentials:
		return nil, badCredentials("%s has %d bytes: it is no credential", path, len(text))
	case strings.TrimSpace(string(text)) == "":
		return nil, &CredentialsError{errors.New(path + " is empty")}
	}
	return text, nil
}
