package link

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"

	"github.com/eclipse/paho.mqtt.golang/packets"

	"perceptd/agent/api"
)

// ProxyError is why the proxy leads nowhere.
type ProxyError struct {
	Proxy string // its address, without user and password
	Err   error
}

func (e *ProxyError) Error() string { return fmt.Sprintf("the proxy %s: %v", e.Proxy, e.Err) }

// Unwrap returns what went wrong.
func (e *ProxyError) Unwrap() error { return e.Err }

// IdentityServiceError is why IoT Edge's identity service gives no identity or signature.
type IdentityServiceError struct {
	Socket string
	Err    error
}

func (e *IdentityServiceError) Error() string {
	return fmt.Sprintf("IoT Edge's identity service at %s: %v", e.Socket, e.Err)
}

// Unwrap returns what went wrong.
func (e *IdentityServiceError) Unwrap() error { return e.Err }

// RefusedError is the hub's answer to a request about the twin that it does not grant.
type RefusedError struct {
	What   string // "reported properties"
	Status int    // as of HTTP: 400, 429, 500 …
}

func (e *RefusedError) Error() string {
	return fmt.Sprintf("IoT Hub answers %d to %s", e.Status, e.What)
}

// isBusy reports whether the hub answered that it cannot do that now: it throttles (429), or fails.
func isBusy(err error) bool {
	var refused *RefusedError
	return errors.As(err, &refused) &&
		(refused.Status == http.StatusTooManyRequests || refused.Status >= http.StatusInternalServerError)
}

// subscriptionRefused is why a connection is given up whose SUBSCRIBE the hub answered with 0x80.
type subscriptionRefused struct{ filter string }

func (e *subscriptionRefused) Error() string {
	return fmt.Sprintf("IoT Hub refuses the subscription %s", e.filter)
}

// connectionLost is why a connection ended that was open.
type connectionLost struct{ err error }

func (e *connectionLost) Error() string { return fmt.Sprintf("the connection ended: %v", e.err) }
func (e *connectionLost) Unwrap() error { return e.err }

// failureOf returns what kind of failure err is.
func failureOf(err error) api.HubFailure {
	var (
		credentials *CredentialsError
		edge        *IdentityServiceError
		proxy       *ProxyError
		name        *net.DNSError
		invalid     x509.CertificateInvalidError
		unknown     x509.UnknownAuthorityError
		other       x509.HostnameError
		verify      *tls.CertificateVerificationError
	)
	switch {
	case errors.As(err, &edge):
		return api.HubFailureIdentity
	case errors.As(err, &credentials):
		return api.HubFailureCredentials
	case isConnectRefused(err):
		return api.HubFailureRefused
	case errors.As(err, &proxy) && !errors.As(err, &name):
		return api.HubFailureProxy
	case errors.As(err, &name):
		return api.HubFailureName
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return api.HubFailureClock
	case errors.As(err, &invalid), errors.As(err, &unknown), errors.As(err, &other), errors.As(err, &verify):
		return api.HubFailureCertificate
	case isNetwork(err):
		return api.HubFailureNetwork
	}
	return ""
}

// isConnectRefused reports whether the hub refused a CONNECT because of its sender.
func isConnectRefused(err error) bool {
	for _, refusal := range []error{
		packets.ErrorRefusedBadUsernameOrPassword, packets.ErrorRefusedNotAuthorised, packets.ErrorRefusedIDRejected,
	} {
		if errors.Is(err, refusal) {
			return true
		}
	}
	return false
}

func isNetwork(err error) bool {
	var lost *connectionLost
	var operation *net.OpError
	return errors.As(err, &lost) || errors.As(err, &operation) || errors.Is(err, context.DeadlineExceeded) ||
		errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, packets.ErrorNetworkError) ||
		errors.Is(err, packets.ErrorRefusedServerUnavailable)
}

// explained adds to an error of a CONNECT what a person looks at.
func explained(err error, login *Login) error {
	if !isConnectRefused(err) {
		return err
	}
	what := "the key in the credentials is not the one that the hub has, the device is disabled or not registered there"
	if !login.signs() {
		what = "the certificate is not the one that the hub knows, the device is disabled or not registered there"
	}
	return fmt.Errorf("IoT Hub refuses %s: %w: %s, or the clock of this device is wrong", login.Identity, err, what)
}

// maxError bounds an error in the log and the status, in bytes: a certificate, for one, can have any number of names.
const maxError = 1 << 10

// bounded returns what err says, on one line, and not too long.
func bounded(err error) string {
	text := err.Error()
	if len(text) > maxError {
		text = strings.ToValidUTF8(text[:maxError-len("…")], "") + "…"
	}
	return oneLine(text)
}
