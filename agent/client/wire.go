package client

import (
	"bufio"
	"context"
	"errors"
	"io"
	"math"
	"net"
	"net/http"
	"time"
)

// wire is one connection to the daemon, on which requests are answered one after the other. net/http's Transport is not used:
// it writes what is sent beside an answer, which may be a token, to the standard logger, and that is the module's own output.
// Here it is not read. No redirect is followed, and no proxy is known.
type wire struct {
	conn    net.Conn
	answers *bufio.Reader
	left    *io.LimitedReader // of conn, below answers: what a header may still have
	forget  func() bool       // ends the watch over the context
}

// connect opens a connection that breaks when ctx ends.
func connect(ctx context.Context, socket string) (*wire, error) {
	conn, err := Dial(ctx, socket)
	if err != nil {
		return nil, err
	}
	w := &wire{conn: conn, left: &io.LimitedReader{R: conn}}
	w.answers = bufio.NewReader(w.left)
	w.forget = context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	return w, nil
}

var errNotHTTP = errors.New("what answers there does not speak HTTP as perceptd does")

// ask sends a request and returns the answer as it begins. The answer before must have been read to its end.
func (w *wire) ask(request *http.Request) (*http.Response, error) {
	if w.answers.Buffered() > 0 {
		return nil, errNotHTTP
	}
	sendErr := request.Write(w.conn) // what refuses a request may not have read all of it
	w.left.N = maxHeader
	_, err := w.answers.Peek(1) // tells a connection that was closed from an answer that broke off
	var response *http.Response
	if err == nil {
		response, err = http.ReadResponse(w.answers, request)
	}
	switch {
	case err != nil && w.left.N == 0:
		return nil, errNotHTTP
	case err != nil && sendErr != nil:
		return nil, sendErr
	case err != nil:
		return nil, err
	}
	w.left.N = math.MaxInt64 // who reads the body bounds it
	return response, nil
}

func (w *wire) close() {
	w.forget()
	_ = w.conn.Close() // nothing can be done about it, and nothing is lost
}

// lastBody is a body whose end is its connection's.
type lastBody struct {
	io.Reader
	wire *wire
}

// Close closes the connection, whatever is left of the body.
func (b lastBody) Close() error {
	b.wire.close()
	return nil
}
