package link

import (
	"bufio"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"net/url"
	"sync"
	"time"

	"github.com/gorilla/websocket"
	"golang.org/x/net/proxy"
)

// The ports of IoT Hub.
const (
	portMQTT      = "8883"
	portWebSocket = "443"
)

// pathWebSocket is the path of MQTT over WebSocket. With withoutCertificate, which Microsoft's SDKs send too, the hub
// does not ask for a client's certificate in the middle of TLS.
const (
	pathWebSocket      = "/$iothub/websocket"
	withoutCertificate = "?iothub-no-client-cert=true"
)

// keepAliveTCP is how often a silent connection is probed, beside MQTT's own keep-alive.
const keepAliveTCP = 30 * time.Second

// dialer makes connections to the hub.
type dialer struct {
	webSocket bool
	proxy     *url.URL
	address   string        // in the place of the hub's; empty: the hub's
	timeout   time.Duration // of each write
	tls       *tls.Config
}

// dial returns a connection over which MQTT is spoken.
func (d *dialer) dial(ctx context.Context, to Identity) (net.Conn, error) {
	host, port := to.host()
	standard := portMQTT
	if d.webSocket {
		standard, port = portWebSocket, "" // a gateway's port is that of MQTT
	}
	address := cmp.Or(d.address, net.JoinHostPort(host, cmp.Or(port, standard)))
	c, err := d.secure(ctx, address, host)
	if err != nil || !d.webSocket {
		return c, err
	}
	return upgrade(ctx, c, host, len(d.tls.Certificates) == 0, d.timeout)
}

// secure returns a TLS connection to host at address.
func (d *dialer) secure(ctx context.Context, address, host string) (net.Conn, error) {
	plain, err := d.reach(ctx, address)
	if err != nil {
		return nil, err
	}
	config := d.tls.Clone()
	config.ServerName = host
	c := tls.Client(plain, config)
	if err := c.HandshakeContext(ctx); err != nil {
		_ = plain.Close()
		return nil, fmt.Errorf("TLS with %s: %w", host, err)
	}
	return c, nil
}

// reach returns a TCP connection to address, through the proxy if there is one.
func (d *dialer) reach(ctx context.Context, address string) (net.Conn, error) {
	direct := net.Dialer{KeepAlive: keepAliveTCP}
	if d.proxy == nil {
		return direct.DialContext(ctx, "tcp", address)
	}
	var c net.Conn
	var err error
	if d.proxy.Scheme == "socks5" {
		c, err = dialSOCKS(ctx, &direct, d.proxy, address)
	} else {
		c, err = dialCONNECT(ctx, &direct, d.proxy, d.tls, address)
	}
	if err != nil {
		return nil, &ProxyError{Proxy: d.proxy.Host, Err: err}
	}
	return c, nil
}

func dialSOCKS(ctx context.Context, direct *net.Dialer, by *url.URL, address string) (net.Conn, error) {
	var auth *proxy.Auth
	if by.User != nil {
		password, _ := by.User.Password()
		auth = &proxy.Auth{User: by.User.Username(), Password: password}
	}
	d, err := proxy.SOCKS5("tcp", proxyAddress(by, "1080"), auth, direct)
	if err != nil {
		return nil, err
	}
	return d.(proxy.ContextDialer).DialContext(ctx, "tcp", address)
}

// maxHead bounds the head of an answer of a proxy, or of the hub to an upgrade, in bytes.
const maxHead = 16 << 10

// dialCONNECT asks an HTTP proxy for a tunnel.
func dialCONNECT(
	ctx context.Context, direct *net.Dialer, by *url.URL, trust *tls.Config, address string,
) (_ net.Conn, err error) {
	port := "80"
	if by.Scheme == "https" {
		port = "443"
	}
	plain, err := direct.DialContext(ctx, "tcp", proxyAddress(by, port))
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = plain.Close()
			err = cmp.Or(ctx.Err(), err)
		}
	}()
	defer context.AfterFunc(ctx, func() { _ = plain.Close() })()
	c := plain
	if by.Scheme == "https" {
		c = tls.Client(c, &tls.Config{RootCAs: trust.RootCAs, ServerName: by.Hostname(), MinVersion: tls.VersionTLS12})
	}
	request := &http.Request{
		Method: http.MethodConnect, URL: &url.URL{Opaque: address}, Host: address, Header: make(http.Header),
	}
	if by.User != nil {
		password, _ := by.User.Password()
		request.Header.Set("Proxy-Authorization", "Basic "+
			base64.StdEncoding.EncodeToString([]byte(by.User.Username()+":"+password)))
	}
	if err := request.Write(c); err != nil {
		return nil, err
	}
	head := bufio.NewReader(io.LimitReader(c, maxHead))
	answer, err := http.ReadResponse(head, request)
	switch {
	case err != nil:
		return nil, fmt.Errorf("its answer cannot be read: %w", answerFault(err))
	case answer.StatusCode == http.StatusProxyAuthRequired:
		return nil, errors.New("it wants another user and password (407)")
	case answer.StatusCode != http.StatusOK:
		return nil, fmt.Errorf("it answers %d to CONNECT %s: many allow port 443 alone, which transport = "+
			`"websocket" uses`, answer.StatusCode, address)
	case head.Buffered() > 0:
		return nil, errors.New("it sends something before the hub does")
	}
	return c, nil
}

// answerFault returns why an answer cannot be read. Where that is not the network, the error may quote what came, and
// so what was sent: the proxy's password, where the proxy echoes it.
func answerFault(err error) error {
	var network net.Error
	for _, known := range []error{io.EOF, io.ErrUnexpectedEOF, context.Canceled, websocket.ErrBadHandshake,
		errLongHead} {
		if errors.Is(err, known) {
			return known
		}
	}
	if errors.As(err, &network) {
		return err
	}
	return errors.New("it is not HTTP/1.1")
}

func proxyAddress(by *url.URL, port string) string {
	return net.JoinHostPort(by.Hostname(), cmp.Or(by.Port(), port))
}

// upgrade speaks WebSocket over c. bySignature says that the device has no certificate.
func upgrade(
	ctx context.Context, c net.Conn, host string, bySignature bool, timeout time.Duration,
) (net.Conn, error) {
	path := pathWebSocket
	if bySignature {
		path += withoutCertificate
	}
	d := websocket.Dialer{
		Subprotocols: []string{"mqtt"},
	}
	head := &headReader{Conn: c, left: maxHead}
	d.NetDialTLSContext = func(context.Context, string, string) (net.Conn, error) { return head, nil }
	socket, answer, err := d.DialContext(ctx, "wss://"+host+path, nil)
	if err != nil {
		_ = c.Close()
		if answer != nil {
			return nil, fmt.Errorf("WebSocket: the hub answers %d: %w", answer.StatusCode, answerFault(err))
		}
		return nil, fmt.Errorf("WebSocket: the hub's answer cannot be read: %w", answerFault(err))
	}
	head.left = math.MaxInt // what follows has a limit of its own
	socket.SetReadLimit(2 * maxPacket)
	return &stream{Conn: c, socket: socket, timeout: timeout}, nil
}

// errLongHead is why an answer is not read on.
var errLongHead = fmt.Errorf("its head has more than %d bytes", maxHead)

// headReader is a connection from which only so many bytes are read: those of an answer's head.
type headReader struct {
	net.Conn
	left int
}

func (r *headReader) Read(p []byte) (int, error) {
	if r.left <= 0 {
		return 0, errLongHead
	}
	n, err := r.Conn.Read(p[:min(len(p), r.left)])
	r.left -= n
	return n, err
}

// stream is a WebSocket as a stream of bytes: those of all binary messages.
type stream struct {
	net.Conn // what is under it
	socket   *websocket.Conn
	message  io.Reader // what is left of a message; nil: nothing

	timeout time.Duration // of each write

	writing sync.Mutex // MQTT's library writes its pings beside the rest
}

// SetWriteDeadline does nothing: each write has its own deadline, which the socket sets.
func (s *stream) SetWriteDeadline(time.Time) error { return nil }

func (s *stream) Read(p []byte) (int, error) {
	for {
		if s.message == nil {
			kind, message, err := s.socket.NextReader()
			if err != nil {
				return 0, err
			}
			if kind != websocket.BinaryMessage {
				return 0, errors.New("IoT Hub sends a WebSocket message that is not binary")
			}
			s.message = message
		}
		n, err := s.message.Read(p)
		if errors.Is(err, io.EOF) {
			s.message, err = nil, nil
		}
		if n > 0 || err != nil {
			return n, err
		}
	}
}

func (s *stream) Write(p []byte) (int, error) {
	s.writing.Lock()
	defer s.writing.Unlock()
	if err := s.socket.SetWriteDeadline(time.Now().Add(s.timeout)); err != nil {
		return 0, err
	}
	if err := s.socket.WriteMessage(websocket.BinaryMessage, p); err != nil {
		return 0, err
	}
	return len(p), nil
}
