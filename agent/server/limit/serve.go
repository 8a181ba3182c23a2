package limit

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync/atomic"
	"time"
)

// Bounds of a request's head.
const (
	// HeadLines is how many lines may follow the request line. SDKs send up to 15; continued lines count too.
	HeadLines = 64
	// HeadBytes is how many the request line and they may have, with their ends and the empty line.
	HeadBytes = 16 << 10
)

// Serve is server.Serve(l) for requests whose head is within bounds, in lines as well as in bytes: net/http makes a map
// of the lines while it waits for the end, so that 16 KiB of lines with five bytes each cost 0.6 MB a connection. The
// server's hooks see the connections of l.
//
// Serve counts what is read, and never reads more or otherwise than the server asks for. What a caller sends beyond the
// bounds is answered with status 431, once every request before it has its answer, and the connection ends.
func Serve(server *http.Server, l net.Listener) error {
	server.MaxHeaderBytes = HeadBytes // to which net/http adds 4 KiB: the answer comes from here
	inContext, inState := server.ConnContext, server.ConnState
	if inContext != nil {
		server.ConnContext = func(ctx context.Context, c net.Conn) context.Context {
			return inContext(ctx, c.(*headConn).Conn)
		}
	}
	server.ConnState = func(c net.Conn, state http.ConnState) {
		if state == http.StateIdle {
			c.(*headConn).answered.Add(1)
		}
		if inState != nil {
			inState(c.(*headConn).Conn, state)
		}
	}
	return server.Serve(&headListener{l})
}

type headListener struct{ net.Listener }

// Accept waits for the next connection.
func (l *headListener) Accept() (net.Conn, error) {
	accepted, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &headConn{Conn: accepted}, nil
}

// headConn is a connection whose reader ends at a bound.
type headConn struct {
	net.Conn
	answered atomic.Uint32 // requests

	// What follows is for one read at a time.
	head    head
	beyond  bool // the bounds: nothing is read for the server any more
	refused bool // the caller was told
}

// NetConn returns the listener's own connection, for a handler that takes it over.
func (c *headConn) NetConn() net.Conn { return c.Conn }

// CloseWrite is for net/http, which closes in two steps where the caller is still sending.
func (c *headConn) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return nil
}

// Read reads what is within the bounds.
func (c *headConn) Read(p []byte) (int, error) {
	if !c.beyond {
		n, err := c.Conn.Read(p)
		passed := c.head.pass(p[:n])
		if passed == n {
			return n, err
		}
		c.beyond = true
		if passed > 0 {
			return passed, nil
		}
	}
	return 0, c.refuse(len(p))
}

// errBeyond is a net.OpError, which has net/http answer nothing more.
var errBeyond = &net.OpError{Op: "read", Net: "http", Err: errors.New("the head of the request is too large")}

// refuse answers with 431, if it is the caller's turn to be answered, and returns how a read of that many bytes ends.
//
// A connection that is closed with something unread takes its answer back: so what still comes is read and dropped
// until the caller sees it. While a request before it waits for its answer net/http reads one byte, and takes an
// error for a caller that has gone; more than that it reads of a body, which has ended here.
func (c *headConn) refuse(size int) error {
	underWay := c.head.ended != c.answered.Load()
	if underWay && size > 1 {
		return errBeyond
	}
	if !underWay && !c.refused {
		c.refused = true
		_ = c.Conn.SetWriteDeadline(time.Now().Add(answerTime))
		_, _ = c.Conn.Write(headTooLarge) // a caller that has gone misses nothing
		_ = c.CloseWrite()
	}
	dropped := make([]byte, 512)
	for range mostDropped / len(dropped) {
		if _, err := c.Conn.Read(dropped); err != nil {
			if timeout, ok := err.(net.Error); ok && timeout.Timeout() {
				return err // net/http ends its own reads so
			}
			break
		}
	}
	return errBeyond
}

// answerTime is how long an answer may take to leave, which fits into any socket's buffer.
const answerTime = 2 * time.Second

// headTooLarge is the answer, with the fields that SDKs show.
var headTooLarge = func() []byte {
	const status = http.StatusRequestHeaderFieldsTooLarge
	detail := fmt.Sprintf("a request may have %d header lines and %d bytes before its body: send less",
		HeadLines, HeadBytes)
	body := fmt.Sprintf(`{"error":"invalid_request","error_description":%q,"statusCode":%d,"message":%q}`+"\n",
		detail, status, detail)
	return fmt.Appendf(nil, "HTTP/1.1 %d %s\r\nContent-Type: application/json\r\nCache-Control: no-store\r\n"+
		"Connection: close\r\nContent-Length: %d\r\n\r\n%s", status, http.StatusText(status), len(body), body)
}()
