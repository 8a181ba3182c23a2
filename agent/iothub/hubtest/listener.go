package hubtest

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"

	"github.com/gorilla/websocket"
)

// wireCounter is a TCP connection that counts its bytes.
type wireCounter struct {
	net.Conn
	in, out atomic.Int64
}

func (c *wireCounter) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.in.Add(int64(n))
	return n, err
}

func (c *wireCounter) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.out.Add(int64(n))
	return n, err
}

// countingListener accepts connections that count their bytes.
type countingListener struct{ net.Listener }

func (l countingListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &wireCounter{Conn: c}, nil
}

// listen listens for TLS on address. Certificates of clients are asked for, and looked at when they sign in.
func (h *Hub) listen(address string) (net.Listener, error) {
	plain, err := net.Listen("tcp", address)
	if err != nil {
		return nil, err
	}
	return tls.NewListener(countingListener{plain}, &tls.Config{
		Certificates: []tls.Certificate{h.certificates.server}, MinVersion: tls.VersionTLS12,
		ClientAuth: tls.RequestClientCert, NextProtos: []string{"http/1.1"},
	}), nil
}

// connections are those that are served now.
type connections struct {
	serving sync.WaitGroup

	mu     sync.Mutex // protects what follows
	open   map[net.Conn]struct{}
	closed bool
}

// serve calls f for c, which it closes, unless all are closed.
func (s *connections) serve(c net.Conn, f func()) {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		_ = c.Close()
		return
	}
	s.open[c] = struct{}{}
	s.serving.Add(1)
	s.mu.Unlock()
	defer s.serving.Done()
	defer func() {
		_ = c.Close()
		s.mu.Lock()
		delete(s.open, c)
		s.mu.Unlock()
	}()
	f()
}

// close cuts all connections and waits until they are served no more.
func (s *connections) close() {
	s.mu.Lock()
	s.closed = true
	for c := range s.open {
		_ = c.Close()
	}
	s.mu.Unlock()
	s.serving.Wait()
}

// tlsOf returns the TLS connection under a connection of a client.
func tlsOf(c net.Conn) *tls.Conn {
	switch c := c.(type) {
	case *tls.Conn:
		return c
	case *webSocketConn:
		of, _ := c.Conn.(*tls.Conn)
		return of
	}
	return nil
}

// webSocketConn is a WebSocket as a stream, as MQTT wants it: the bytes of all binary messages.
type webSocketConn struct {
	net.Conn // what is under it
	socket   *websocket.Conn
	message  io.Reader // what is left of a message; nil: nothing
}

func (c *webSocketConn) Read(p []byte) (int, error) {
	for {
		if c.message == nil {
			kind, message, err := c.socket.NextReader()
			if err != nil {
				return 0, err
			}
			if kind != websocket.BinaryMessage {
				return 0, errors.New("MQTT over WebSocket has binary messages only")
			}
			c.message = message
		}
		n, err := c.message.Read(p)
		if errors.Is(err, io.EOF) {
			c.message, err = nil, nil
		}
		if n > 0 || err != nil {
			return n, err
		}
	}
}

func (c *webSocketConn) Write(p []byte) (int, error) {
	if err := c.socket.WriteMessage(websocket.BinaryMessage, p); err != nil {
		return 0, err
	}
	return len(p), nil
}

// pathWebSocket is where MQTT over WebSocket begins.
const pathWebSocket = "/$iothub/websocket"

var upgrader = websocket.Upgrader{
	Subprotocols: []string{"mqtt"}, CheckOrigin: func(*http.Request) bool { return true },
}
