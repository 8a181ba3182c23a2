package link

import (
	"bufio"
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha1"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"perceptd/agent/api"
	"perceptd/agent/iothub/hubtest"
)

// What the proxies of these tests want of those who use them.
const (
	proxyUser     = "percept"
	proxyPassword = "canary:Pass word"
)

// testProxy is a proxy on loopback.
type testProxy struct {
	net.Listener
	ways map[string]string // where names lead: a proxy looks them up itself
	talk func(*testProxy, net.Conn) error

	running sync.WaitGroup
	mu      sync.Mutex // protects what follows
	asked   []string   // addresses
	open    []net.Conn
}

// startProxy returns a proxy whose talk answers each connection, over TLS where secure is set.
func startProxy(t *testing.T, hub *hubtest.Hub, secure *tls.Config, talk func(*testProxy, net.Conn) error) *testProxy {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if secure != nil {
		listener = tls.NewListener(listener, secure)
	}
	p := &testProxy{Listener: listener, talk: talk, ways: map[string]string{
		hub.Name() + ":8883": hub.MQTTAddress(), hub.Name() + ":443": hub.HTTPSAddress(),
	}}
	p.running.Go(p.serve)
	t.Cleanup(func() {
		_ = listener.Close()
		p.mu.Lock()
		for _, c := range p.open {
			_ = c.Close()
		}
		p.mu.Unlock()
		p.running.Wait()
	})
	return p
}

// serve talks with those who connect, until the listener is closed.
func (p *testProxy) serve() {
	for {
		c, err := p.Accept()
		if err != nil {
			return
		}
		p.keep(c)
		p.running.Go(func() {
			_ = p.talk(p, c) // who connects finds out by what comes, or does not
			_ = c.Close()
		})
	}
}

// keep has c closed at the end of the test.
func (p *testProxy) keep(c net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.open = append(p.open, c)
}

// url returns the proxy as it is configured.
func (p *testProxy) url(scheme, user, password string) *url.URL {
	return &url.URL{Scheme: scheme, Host: p.Addr().String(), User: url.UserPassword(user, password)}
}

func (p *testProxy) addresses() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.asked)
}

// pass connects c and the address that it asked for.
func (p *testProxy) pass(c net.Conn, address string, answer []byte) error {
	p.mu.Lock()
	p.asked = append(p.asked, address)
	p.mu.Unlock()
	hub, err := net.Dial("tcp", p.ways[address])
	if err != nil {
		return err
	}
	p.keep(hub)
	if _, err := c.Write(answer); err != nil {
		return err
	}
	var both sync.WaitGroup
	for from, to := range map[net.Conn]net.Conn{c: hub, hub: c} {
		both.Go(func() {
			_, _ = io.Copy(to, from)
			_ = to.Close()
		})
	}
	both.Wait()
	return nil
}

// talkHTTP is an HTTP proxy.
func talkHTTP(p *testProxy, c net.Conn) error {
	request, err := http.ReadRequest(bufio.NewReader(c))
	if err != nil {
		return err
	}
	want := "Basic " + base64.StdEncoding.EncodeToString([]byte(proxyUser+":"+proxyPassword))
	switch {
	case request.Header.Get("Proxy-Authorization") != want:
		_, err = c.Write([]byte("HTTP/1.1 407 Who\r\nProxy-Authenticate: Basic\r\nContent-Length: 0\r\n\r\n"))
		return err
	case request.Method != http.MethodConnect || p.ways[request.Host] == "":
		_, err = c.Write([]byte("HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n"))
		return err
	}
	return p.pass(c, request.Host, []byte("HTTP/1.1 200 Connection established\r\nVia: 1.1 proxy\r\n\r\n"))
}

// talkSOCKS is a SOCKS proxy.
//
// Source: RFC 1928, and RFC 1929 for user and password.
func talkSOCKS(p *testProxy, c net.Conn) error {
	const byPassword, connect, byName = 2, 1, 3
	r := bufio.NewReader(c)
	next := func(n byte) []byte {
		text := make([]byte, n)
		_, _ = io.ReadFull(r, text) // zeros are refused below
		return text
	}
	short := func() string { return string(next(next(1)[0])) }
	if head := next(2); head[0] != 5 || !slices.Contains(next(head[1]), byPassword) {
		_, err := c.Write([]byte{5, 0xff})
		return err
	}
	if _, err := c.Write([]byte{5, byPassword}); err != nil {
		return err
	}
	next(1)
	if user, password := short(), short(); user != proxyUser || password != proxyPassword {
		_, err := c.Write([]byte{1, 1})
		return err
	}
	if _, err := c.Write([]byte{1, 0}); err != nil {
		return err
	}
	request := next(4)
	host, port := short(), next(2)
	address := fmt.Sprintf("%s:%d", host, int(port[0])<<8|int(port[1]))
	if request[1] != connect || request[3] != byName || p.ways[address] == "" {
		_, err := c.Write([]byte{5, 2, 0, 1, 0, 0, 0, 0, 0, 0}) // by its rules
		return err
	}
	return p.pass(c, address, []byte{5, 0, 0, 1, 0, 0, 0, 0, 0, 0})
}

// proxyCertificate returns a certificate of 127.0.0.1, and what trusts it and the hub.
func proxyCertificate(t *testing.T, hub *hubtest.Hub) (*tls.Config, *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		BasicConstraintsValid: true, IsCA: true,
	}
	text, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := x509.ParseCertificate(text)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(hub.RootPEM())
	pool.AddCert(parsed)
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{text}, PrivateKey: key}}}, pool
}

func TestProxies(t *testing.T) {
	t.Parallel()
	hub := startHub(t, hubtest.Options{})
	secure, pool := proxyCertificate(t, hub)
	for _, row := range []struct {
		scheme    string
		secure    *tls.Config
		talk      func(*testProxy, net.Conn) error
		webSocket bool
		address   string
	}{
		{"http", nil, talkHTTP, false, "hub.test:8883"},
		{"http", nil, talkHTTP, true, "hub.test:443"},
		{"https", secure, talkHTTP, false, "hub.test:8883"},
		{"https", secure, talkHTTP, true, "hub.test:443"},
		{"socks5", nil, talkSOCKS, false, "hub.test:8883"},
		{"socks5", nil, talkSOCKS, true, "hub.test:443"},
	} {
		t.Run(fmt.Sprintf("%s, WebSocket %t", row.scheme, row.webSocket), func(t *testing.T) {
			t.Parallel()
			id := fmt.Sprintf("%s-%t", row.scheme, row.webSocket)
			p := startProxy(t, hub, row.secure, row.talk)
			o := Options{Credentials: SharedKeyFile{Path: connectionFile(t, hub.CreateDevice(id))}}
			d := startWith(t, hub, id, o, func(o *Options) {
				o.Proxy, o.WebSocket = p.url(row.scheme, proxyUser, proxyPassword), row.webSocket
				o.Address, o.RootCAs = "", pool
			})
			d.connected(t)
			if _, err := d.Report(d.ctx, json.RawMessage(`{"a":1}`)); err != nil {
				t.Error(err)
			}
			if asked := p.addresses(); !slices.Equal(asked, []string{row.address}) {
				t.Errorf("the proxy was asked for %q, want %q once", asked, row.address)
			}
		})
	}
}

// says is a proxy that answers with text, whatever it is asked.
func says(text string) func(*testProxy, net.Conn) error {
	return func(_ *testProxy, c net.Conn) error {
		if _, err := c.Read(make([]byte, 4<<10)); err != nil {
			return err
		}
		_, err := c.Write([]byte(text))
		return err
	}
}

// echoes is a proxy that answers with what it was asked by, in format, whose length is beyond all bounds.
func echoes(format string) func(*testProxy, net.Conn) error {
	return func(_ *testProxy, c net.Conn) error {
		r, err := http.ReadRequest(bufio.NewReader(c))
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(c, format+"\r\n\r\n", r.Header.Get("Proxy-Authorization")+strings.Repeat("A", 9000))
		return err
	}
}

// strict is a proxy that passes nobody on.
func strict(talk func(*testProxy, net.Conn) error) func(*testProxy, net.Conn) error {
	return func(_ *testProxy, c net.Conn) error { return talk(new(testProxy), c) }
}

func TestProxiesThatLeadNowhere(t *testing.T) {
	t.Parallel()
	hub := startHub(t, hubtest.Options{})
	secure, _ := proxyCertificate(t, hub)
	long := strings.Repeat("x", 1<<20)
	for name, row := range map[string]struct {
		scheme   string
		secure   *tls.Config
		password string
		talk     func(*testProxy, net.Conn) error // nil: nobody is there
		want     string
	}{
		"another password":       {"http", nil, "canary", talkHTTP, "407"},
		"it does not pass 8883":  {"http", nil, proxyPassword, strict(talkHTTP), `transport = "websocket"`},
		"it answers 502":         {"http", nil, proxyPassword, says("HTTP/1.1 502 Down\r\n\r\n"), "it answers 502"},
		"it speaks no HTTP":      {"http", nil, proxyPassword, says("220 ftp\r\n\r\n"), "its answer cannot be read"},
		"its answer has no end":  {"http", nil, proxyPassword, says("HTTP/1.1 200 " + long), "read"},
		"it echoes the password": {"http", nil, proxyPassword, echoes("%s"), "it is not HTTP/1.1"},
		"it echoes it in a head": {"http", nil, proxyPassword, echoes("HTTP/1.1 200 OK\r\n%s no colon"),
			"it is not HTTP/1.1"},
		"it echoes it as length": {"http", nil, proxyPassword, echoes("HTTP/1.1 200 OK\r\nContent-Length: %s"),
			"it is not HTTP/1.1"},
		"it hangs up":            {"http", nil, proxyPassword, says(""), "EOF"},
		"it speaks too soon":     {"http", nil, proxyPassword, says("HTTP/1.1 200 OK\r\n\r\nx"), "before the hub does"},
		"it speaks no TLS":       {"https", nil, proxyPassword, says(""), "the proxy 127.0.0.1:"},
		"nobody trusts it":       {"https", secure, proxyPassword, talkHTTP, "unknown authority"},
		"another SOCKS password": {"socks5", nil, "canary", talkSOCKS, "authentication failed"},
		"it speaks no SOCKS":     {"socks5", nil, proxyPassword, says("HTTP/1.1 400\r\n\r\n"), "unexpected protocol"},
		"SOCKS by its rules":     {"socks5", nil, proxyPassword, strict(talkSOCKS), "not allowed by ruleset"},
		"nobody is there":        {"http", nil, proxyPassword, nil, "connection refused"},
		"nobody is there, SOCKS": {"socks5", nil, proxyPassword, nil, "connection refused"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := startProxy(t, hub, row.secure, row.talk)
			if row.talk == nil {
				_ = p.Close()
			}
			d := start(t, hub, func(o *Options) {
				o.Proxy, o.Address = p.url(row.scheme, proxyUser, row.password), ""
				o.MaxBackoff = time.Hour // it is tried a few times
			})
			d.failed(t, api.HubFailureProxy, row.want)
			d.Close()
			said := d.Status().LastError
			for _, entry := range d.logs.All() {
				said += fmt.Sprint(entry.Message, entry.ContextMap())
			}
			hidden := base64.StdEncoding.EncodeToString([]byte(proxyUser + ":" + row.password))
			if strings.Contains(said, "canary") || strings.Contains(said, hidden) {
				t.Errorf("the proxy's password is in %s", said)
			}
			if n := len(d.Status().LastError); n > maxError {
				t.Errorf("the error has %d bytes", n)
			}
		})
	}
}

func TestProxyThatIsSilent(t *testing.T) {
	t.Parallel()
	hub := startHub(t, hubtest.Options{})
	for _, scheme := range []string{"http", "https", "socks5"} {
		t.Run(scheme, func(t *testing.T) {
			t.Parallel()
			reached := make(chan struct{}, 1)
			p := startProxy(t, hub, nil, func(_ *testProxy, c net.Conn) error {
				reached <- struct{}{}
				_, err := io.Copy(io.Discard, c) // until it is closed
				return err
			})
			d := start(t, hub, func(o *Options) {
				o.Proxy, o.Address, o.OperationTimeout = p.url(scheme, proxyUser, proxyPassword), "", time.Hour
			})
			<-reached
			d.Close() // or this test never ends
		})
	}
}

// The proxies of the environment are for others: the link has one by its configuration, or none.
func TestProxiesOfTheEnvironment(t *testing.T) {
	hub := startHub(t, hubtest.Options{})
	p := startProxy(t, hub, nil, talkHTTP)
	for _, name := range []string{"ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY"} {
		t.Setenv(name, "http://"+p.Addr().String())
		t.Setenv(strings.ToLower(name), "http://"+p.Addr().String())
	}
	for _, webSocket := range []bool{false, true} {
		d := start(t, hub, func(o *Options) {
			if o.WebSocket = webSocket; webSocket {
				o.Address = hub.HTTPSAddress()
			}
		})
		d.connected(t)
		d.Close()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.open) != 0 {
		t.Errorf("%d connections came to the environment's proxy", len(p.open))
	}
}

// A hub whose answer to the upgrade has a head without end is read no further than heads go.
func TestUpgradeWithoutEnd(t *testing.T) {
	t.Parallel()
	here, hub := net.Pipe()
	var sent atomic.Int64
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		request, err := http.ReadRequest(bufio.NewReader(hub))
		if err != nil {
			t.Error(err)
			return
		}
		_ = request.Body.Close()
		_, err = hub.Write([]byte("HTTP/1.1 101 Switching Protocols\r\nX: "))
		for part := bytes.Repeat([]byte{'x'}, 1<<10); err == nil; {
			var n int
			n, err = hub.Write(part)
			sent.Add(int64(n))
		}
	}()
	_, err := upgrade(t.Context(), here, "hub.test", true, time.Minute)
	_ = here.Close()
	<-ended
	if err == nil || !strings.Contains(err.Error(), "its head has more than 16384 bytes") || sent.Load() > maxHead {
		t.Errorf("%v, after %d bytes", err, sent.Load())
	}
}

// A hub over WebSocket that stops reading is given up after the time for a write, whatever deadline was set before.
func TestWritesOverWebSocketEnd(t *testing.T) {
	t.Parallel()
	here, hub := net.Pipe()
	go func() {
		request, err := http.ReadRequest(bufio.NewReader(hub))
		if err != nil {
			t.Error(err)
			return
		}
		sum := sha1.Sum([]byte(request.Header.Get("Sec-WebSocket-Key") + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
		_, _ = fmt.Fprintf(hub, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"+
			"Sec-WebSocket-Protocol: mqtt\r\nSec-WebSocket-Accept: %s\r\n\r\n",
			base64.StdEncoding.EncodeToString(sum[:]))
	}()
	c, err := upgrade(t.Context(), here, "hub.test", true, 10*time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	defer hub.Close()
	defer c.Close()
	_ = c.SetWriteDeadline(time.Time{})
	var network net.Error
	if _, err := c.Write([]byte{0xc0, 0}); !errors.As(err, &network) || !network.Timeout() {
		t.Errorf("%v", err)
	}
}
