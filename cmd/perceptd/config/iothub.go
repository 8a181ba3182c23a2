package config

import (
	"cmp"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"time"

	"perceptd/agent/iothub/link"
)

// IoTHub says how the device is connected to IoT Hub, and what it is known by there. It holds no secret, but says where
// those are. Zero: the device is not connected.
type IoTHub struct {
	// Who the device is, by one of these three.
	ConnectionString Secret
	Certificate      Certificate
	IdentityService  IdentityService

	WebSocket     bool   // on port 443, and not MQTT on 8883
	Proxy         string // URL without a password; empty: none
	ProxyPassword Secret // of the user in Proxy
	CAFile        string // of the certificates to trust; empty: the system's

	// Zero stands for what is not written, and a nanosecond for a spread of zero.
	TokenLife, KeepAlive, MaxBackoff, ReportSpread time.Duration
	Events                                         bool // are sent

	transport string // as it is written
}

// Certificate is what a device with an X.509 certificate is known by.
type Certificate struct {
	File string
	Key  Secret

	Hub, Gateway   string // host names; Gateway is dialled in Hub's place, and may have a port. Empty: Hub is dialled
	Device, Module string // Module is empty where the device itself is meant
}

// IdentityService is where IoT Edge's identity service is asked who the device is.
type IdentityService struct {
	On                        bool
	IdentitySocket, KeySocket string // empty: where IoT Edge has them
}

// What is written for transport.
const (
	transportMQTT      = "mqtt"
	transportWebSocket = "websocket"
)

// iothubKeys are the keys of [iothub].
var iothubKeys = []string{
	"connection_string_file", "credential", "certificate_file", "key_file", "key_credential", "hub", "gateway",
	"device", "module", "identity_service", "identity_socket", "key_socket", "transport", "proxy",
	"proxy_password_file", "proxy_password_credential", "ca_file", "token_life", "keep_alive", "max_backoff",
	"report_spread", "events",
}

// ownFile is where a secret is kept: perceptd reads it by its group, and cannot change it.
const ownFile = "a file of its own (owner root, group " + serviceUser + ", mode 0640)"

// take reads an [iothub].
func (h *IoTHub) take(t *table) {
	for _, row := range []struct {
		to        *string
		key, such string
	}{
		{&h.ConnectionString.File, "connection_string_file", "/etc/percept/iothub"},
		{&h.ConnectionString.Credential, "credential", "iothub"},
		{&h.Certificate.File, "certificate_file", "/etc/percept/device.pem"},
		{&h.Certificate.Key.File, "key_file", "/etc/percept/device.key"},
		{&h.Certificate.Key.Credential, "key_credential", "iothub-key"},
		{&h.Certificate.Hub, "hub", "example.azure-devices.net"},
		{&h.Certificate.Gateway, "gateway", "gateway.example"},
		{&h.Certificate.Device, "device", "percept-7"}, {&h.Certificate.Module, "module", "percept"},
		{&h.IdentityService.IdentitySocket, "identity_socket", "/run/aziot/identityd.sock"},
		{&h.IdentityService.KeySocket, "key_socket", "/run/aziot/keyd.sock"},
		{&h.transport, "transport", transportMQTT},
		{&h.Proxy, "proxy", "http://proxy.example:3128"},
		{&h.ProxyPassword.File, "proxy_password_file", "/etc/percept/proxy"},
		{&h.ProxyPassword.Credential, "proxy_password_credential", "proxy"},
		{&h.CAFile, "ca_file", "/etc/percept/ca.pem"},
	} {
		if text, ok := t.text(row.key, row.such); ok {
			*row.to = text
		}
	}
	for _, row := range []struct {
		to  *bool
		key string
	}{{&h.IdentityService.On, "identity_service"}, {&h.Events, "events"}} {
		if flag, ok := t.flag(row.key); ok {
			*row.to = flag
		}
	}
	for _, row := range []struct {
		to        *time.Duration
		key       string
		low, high time.Duration
	}{
		{&h.TokenLife, "token_life", minTokenLife, maxTokenLife},
		{&h.KeepAlive, "keep_alive", minKeepAlive, maxKeepAlive},
		{&h.MaxBackoff, "max_backoff", minMaxBackoff, maxMaxBackoff},
	} {
		if d, ok := t.duration(row.key, row.low, row.high); ok {
			*row.to = d
		}
	}
	if spread, ok := t.duration("report_spread", 0, maxReportSpread); ok {
		h.ReportSpread = cmp.Or(spread, noSpread)
	}
	t.finish()
}

const (
	minTokenLife    = time.Minute
	maxTokenLife    = 365 * 24 * time.Hour
	minKeepAlive    = 10 * time.Second
	maxKeepAlive    = 1177 * time.Second // the longest that IoT Hub takes
	minMaxBackoff   = time.Second
	maxMaxBackoff   = 24 * time.Hour
	maxReportSpread = 24 * time.Hour
)

// Configured reports whether the device is to be connected.
func (h IoTHub) Configured() bool { return len(h.credentials()) > 0 }

// credentials lists the keys that say who the device is, of which one is right.
func (h IoTHub) credentials() (keys []string) {
	for _, row := range []struct {
		key     string
		written bool
	}{
		{"iothub.connection_string_file", h.ConnectionString.File != ""},
		{"iothub.credential", h.ConnectionString.Credential != ""},
		{"iothub.certificate_file", h.Certificate.File != ""},
		{"iothub.identity_service", h.IdentityService.On},
	} {
		if row.written {
			keys = append(keys, row.key)
		}
	}
	return keys
}

// validate looks at what all files together say; there says whether one of them has an [iothub]. key is what is wrong.
func (h *IoTHub) validate(there bool) (key string, err error) {
	if !there {
		return "", nil
	}
	switch by := h.credentials(); {
	case len(by) == 0:
		return "iothub", errors.New("[iothub] does not say who the device is: write connection_string_file, " +
			"credential, certificate_file with key_file, hub and device, or identity_service = true, " +
			"or take [iothub] out")
	case len(by) > 1:
		return by[1], fmt.Errorf("%s beside %s: one of them says who the device is, take the other out", by[1], by[0])
	}
	for _, check := range []func() (string, error){
		h.checkPlaces, h.checkCertificate, h.checkIdentityService, h.checkTransport, h.checkProxy,
	} {
		if key, err := check(); err != nil {
			return key, err
		}
	}
	return "", nil
}

// checkPlaces looks at the names of files, sockets and credentials. What is written there may be the secret itself, and
// so is not repeated.
func (h *IoTHub) checkPlaces() (key string, err error) {
	for _, row := range []struct{ key, path string }{
		{"iothub.connection_string_file", h.ConnectionString.File}, {"iothub.certificate_file", h.Certificate.File},
		{"iothub.key_file", h.Certificate.Key.File}, {"iothub.proxy_password_file", h.ProxyPassword.File},
		{"iothub.ca_file", h.CAFile}, {"iothub.identity_socket", h.IdentityService.IdentitySocket},
		{"iothub.key_socket", h.IdentityService.KeySocket},
	} {
		if row.path != "" && (!isCleanPath(row.path) || strings.Contains(row.path, "SharedAccessKey=")) {
			return row.key, fmt.Errorf("%s must be an absolute path, such as /etc/percept/iothub", row.key)
		}
	}
	for _, row := range []struct{ key, name string }{
		{"iothub.credential", h.ConnectionString.Credential}, {"iothub.key_credential", h.Certificate.Key.Credential},
		{"iothub.proxy_password_credential", h.ProxyPassword.Credential},
	} {
		if row.name != "" && !isCredential(row.name) {
			return row.key, fmt.Errorf("%s must be the name of a credential that systemd gives the service, such as "+
				"iothub: letters, digits, dot, dash and underscore", row.key)
		}
	}
	return "", nil
}

// isCredential reports whether name may be that of a credential of systemd's.
func isCredential(name string) bool {
	return len(name) <= 64 && !strings.HasPrefix(name, ".") && !strings.HasPrefix(name, "-") &&
		!strings.ContainsFunc(name, func(r rune) bool {
			return !('a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' ||
				strings.ContainsRune("._-", r))
		})
}

// isGateway reports whether text is a host name, with a port or without.
func isGateway(text string) bool {
	return link.Identity{Hub: "hub", Device: "device", Gateway: text}.Validate() == nil
}

// isClient reports whether text may be the ID of a device or module that is connected: "+" and "#" have a meaning in
// the topics of MQTT.
func isClient(text string) bool { return link.IsID(text) && !strings.ContainsAny(text, "+#") }

// checkCertificate looks at what belongs to a certificate. What does not fit is not repeated: it may be a connection
// string that was written there by mistake.
func (h *IoTHub) checkCertificate() (key string, err error) {
	c := h.Certificate
	for _, row := range []struct{ key, value string }{
		{"iothub.key_file", c.Key.File}, {"iothub.key_credential", c.Key.Credential}, {"iothub.hub", c.Hub},
		{"iothub.gateway", c.Gateway}, {"iothub.device", c.Device}, {"iothub.module", c.Module},
	} {
		if row.value != "" && c.File == "" {
			return row.key, fmt.Errorf("%s belongs to certificate_file, and %s says all of that itself: take it out",
				row.key, h.credentials()[0])
		}
	}
	switch {
	case c.File == "":
		return "", nil
	case c.Key == Secret{}:
		return "iothub.certificate_file", errors.New(
			"iothub.certificate_file lacks its key: write key_file, or key_credential")
	case c.Key.File != "" && c.Key.Credential != "":
		return "iothub.key_credential", errors.New("iothub.key_credential beside iothub.key_file: take one of them out")
	case !link.IsHost(c.Hub):
		return h.keyOf("iothub.hub", c.Hub), errors.New("iothub.hub must be the hub's host name beside " +
			"certificate_file, such as example.azure-devices.net")
	case c.Gateway != "" && !isGateway(c.Gateway):
		return "iothub.gateway", errors.New("iothub.gateway must be the host name that is dialled in the hub's place")
	case !isClient(c.Device):
		return h.keyOf("iothub.device", c.Device), errors.New("iothub.device must be the device's ID in " +
			"the hub beside certificate_file, of at most 128 characters")
	case c.Module != "" && !isClient(c.Module):
		return "iothub.module", errors.New("iothub.module must be a module's ID, of at most 128 characters")
	}
	return "", nil
}

// keyOf returns key, or where its value is missing the key of the certificate that it belongs to.
func (h *IoTHub) keyOf(key, value string) string {
	if value == "" {
		return "iothub.certificate_file"
	}
	return key
}

// checkIdentityService looks at what belongs to the identity service.
func (h *IoTHub) checkIdentityService() (key string, err error) {
	for _, row := range []struct{ key, value string }{
		{"iothub.identity_socket", h.IdentityService.IdentitySocket},
		{"iothub.key_socket", h.IdentityService.KeySocket},
	} {
		if row.value != "" && !h.IdentityService.On {
			return row.key, fmt.Errorf("%s has no effect without identity_service = true: take it out", row.key)
		}
	}
	return "", nil
}

// checkTransport takes the transport as it is written.
func (h *IoTHub) checkTransport() (key string, err error) {
	switch h.transport {
	case "", transportMQTT, transportWebSocket:
		h.WebSocket = h.transport == transportWebSocket
		h.transport = ""
		return "", nil
	}
	return "iothub.transport", fmt.Errorf("iothub.transport is %q: it must be %q (port 8883) or %q (port 443)",
		h.transport, transportMQTT, transportWebSocket)
}

// checkProxy looks at the proxy. Its URL may have a password in it by mistake, and so is not repeated.
func (h *IoTHub) checkProxy() (key string, err error) {
	proxy, err := url.Parse(h.Proxy)
	switch {
	case h.ProxyPassword.File != "" && h.ProxyPassword.Credential != "":
		return "iothub.proxy_password_credential", errors.New(
			"iothub.proxy_password_credential beside iothub.proxy_password_file: take one of them out")
	case h.Proxy == "" && h.ProxyPassword != Secret{}:
		return "iothub", errors.New("[iothub] has a proxy's password and no proxy: write proxy, or take the password " +
			"out")
	case h.Proxy == "":
		return "", nil
	case err != nil || !slices.Contains([]string{"http", "https", "socks5"}, proxy.Scheme) || proxy.Hostname() == "" ||
		strings.Trim(proxy.Path, "/") != "" || proxy.RawQuery != "" || proxy.Fragment != "":
		return "iothub.proxy", errors.New(`iothub.proxy must be a URL of http, https or socks5 with a host and a ` +
			`port, such as "http://proxy.example:3128" or "socks5://user@proxy.example:1080"`)
	}
	switch _, inURL := proxy.User.Password(); {
	case inURL:
		return "iothub.proxy", errors.New("iothub.proxy has a password in it, and this file is no secret: " +
			"keep it in " + ownFile + ", and name that as proxy_password_file")
	case proxy.User == nil && h.ProxyPassword != Secret{}:
		return "iothub.proxy", errors.New(`iothub.proxy names no user whose password there is: ` +
			`write one, as in "http://user@proxy.example:3128"`)
	}
	return "", nil
}

// String says in words who the device is, and how it is connected.
func (h IoTHub) String() string {
	var parts []string
	add := func(written bool, format string, values ...any) {
		if written {
			parts = append(parts, fmt.Sprintf(format, values...))
		}
	}
	c, service := h.Certificate, h.IdentityService
	add(h.ConnectionString != Secret{}, "by the connection string in %v", h.ConnectionString)
	add(c.File != "", "as %s of %s", strings.Trim(c.Device+"/"+c.Module, "/"), c.Hub)
	add(c.File != "", "by the certificate in %s with the key in %v", c.File, c.Key)
	add(c.Gateway != "", "at %s", c.Gateway)
	add(service.On, "by what IoT Edge's identity service says")
	add(service.IdentitySocket != "", "at %s", service.IdentitySocket)
	add(service.KeySocket != "", "with keys of %s", service.KeySocket)
	add(!h.WebSocket, "over MQTT (port 8883)")
	add(h.WebSocket, "over WebSocket (port 443)")
	add(h.Proxy != "", "through the proxy %s", h.Proxy)
	add(h.ProxyPassword != Secret{}, "with the password in %v", h.ProxyPassword)
	add(h.CAFile != "", "trusting the certificates in %s", h.CAFile)
	add(h.TokenLife != 0, "token_life %v", h.TokenLife)
	add(h.KeepAlive != 0, "keep_alive %v", h.KeepAlive)
	add(h.MaxBackoff != 0, "max_backoff %v", h.MaxBackoff)
	add(h.ReportSpread != 0, "report_spread %v", h.ReportSpread.Truncate(time.Microsecond))
	add(h.Events, "with events")
	return strings.Join(parts, ", ")
}
