// Package hubtest is an IoT Hub on loopback, for tests and demonstrations: the device API over MQTT 3.1.1 and over
// WebSocket, and the registry, twins, direct methods and queries of the service's REST API. It keeps the limits that
// Microsoft documents, and refuses what it does not know. Faults are switched on while it runs.
package hubtest

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"net"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// Options is what a Hub is made of. The zero value will do.
type Options struct {
	// Name is the hub's host name, as devices know it. Empty: hub.test.
	Name string

	// Address is the loopback address to listen on. Empty: one that no other hub of this device has.
	Address string

	// MQTTPort and HTTPSPort are the ports of MQTT, and of REST and WebSocket. Zero: 8883 and 8443. The real ones are
	// 8883 and 443.
	MQTTPort, HTTPSPort int

	// Limits are the hub's throttles. Zero: none.
	Limits Limits

	// Now is the hub's clock. Nil: the device's wall clock.
	Now func() time.Time

	// Logf, if set, is called for what the hub refuses, and for connections that begin and end.
	Logf func(format string, args ...any)
}

// Hub is safe for concurrent use.
type Hub struct {
	Faults Faults

	options      Options
	certificates certificates
	policyKey    []byte // of the shared access policy iothubowner

	mu         sync.Mutex // protects what follows
	identities map[string]*identity

	configurations map[string]*configuration
	made           int                            // configurations, ever
	methods        map[string]chan<- methodAnswer // by identity and request ID
	changed        chan struct{}                  // closed, and made anew, when a session or a subscription changes
	throttles      throttles
	broker         *broker // nil: the hub is down
	closed         bool

	requests atomic.Uint64
}

// policyName is the shared access policy with every right on the service's side.
const policyName = "iothubowner"

// Name returns the hub's host name.
func (h *Hub) Name() string { return h.options.Name }

// MQTTAddress returns the address and port of MQTT over TLS.
func (h *Hub) MQTTAddress() string {
	return net.JoinHostPort(h.options.Address, strconv.Itoa(h.options.MQTTPort))
}

// HTTPSAddress returns the address and port of the REST API, and of MQTT over WebSocket.
func (h *Hub) HTTPSAddress() string {
	return net.JoinHostPort(h.options.Address, strconv.Itoa(h.options.HTTPSPort))
}

// RootCAs returns the certificate authority that the hub's certificate is of.
func (h *Hub) RootCAs() *x509.CertPool { return h.certificates.pool }

// RootPEM returns the same in PEM.
func (h *Hub) RootPEM() []byte { return h.certificates.rootPEM }

// ServiceConnectionString returns what a back-end application connects with.
func (h *Hub) ServiceConnectionString() string {
	return "HostName=" + h.options.Name + ";SharedAccessKeyName=" + policyName +
		";SharedAccessKey=" + encodeKey(h.policyKey)
}

// ServiceClient returns an HTTP client that reaches the REST API by the hub's name.
func (h *Hub) ServiceClient() *http.Client {
	dialer := net.Dialer{Timeout: 10 * time.Second}
	return &http.Client{Timeout: time.Minute, Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, "tcp", h.HTTPSAddress())
		},
		TLSClientConfig: &tls.Config{RootCAs: h.RootCAs(), ServerName: h.Name(), MinVersion: tls.VersionTLS12},
	}}
}

// changedLocked wakes those that wait for a session or a subscription.
func (h *Hub) changedLocked() {
	close(h.changed)
	h.changed = make(chan struct{})
}
