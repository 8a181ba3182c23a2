package client

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"perceptd/agent/api"
)

const (
	maxAnswer = api.MaxAnswer // bytes of body
	maxHeader = 64 << 10      // bytes of header

	jsonType    = "application/json"
	problemType = "application/problem+json"
	eventType   = "text/event-stream"
)

// call is one request to one socket.
type call struct {
	socket string
	method string
	path   string
	query  url.Values
	body   any // nil: none

	// alsoAnswer is a status beside 200 that carries an answer. Zero: none.
	alsoAnswer int
}

func answerTo[T any](ctx context.Context, c call) (T, error) {
	var answer T
	if err := c.do(ctx, &answer); err != nil {
		var none T
		return none, err
	}
	return answer, nil
}

// do sends the request and decodes the answer into answer.
func (c call) do(ctx context.Context, answer any) error {
	response, err := c.send(ctx, jsonType)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, maxAnswer+1))
	switch {
	case err != nil:
		return c.transportError(ctx, err)
	case len(body) > maxAnswer:
		return fmt.Errorf("%s %s on %s: the answer is longer than %d bytes", c.method, c.path, c.socket, maxAnswer)
	case !c.isAnswer(response):
		return c.refusal(response, body)
	// The decoder's error is left out, since it may quote what it read.
	case !hasMediaType(response, jsonType) || json.Unmarshal(body, answer) != nil:
		return c.notTheContract()
	}
	return nil
}

const (
	tries = 4                     // at once, while the daemon asks for another request to know who is calling
	pause = 50 * time.Millisecond // before the next, where it cannot be sent on the same connection
)

// send sends the request and returns the answer as it begins. wanted is the media type of an answer that
// is no refusal. The answer's body is to be closed, which closes the connection.
func (c call) send(ctx context.Context, wanted string) (*http.Response, error) {
	var to *wire
	for left := tries - 1; ; left-- {
		response, err := c.sendOn(ctx, &to, wanted)
		var again bool
		if err == nil {
			again, err = asksAgain(response)
		}
		switch {
		case err != nil:
			if to != nil {
				to.close()
			}
			return nil, c.transportError(ctx, err)
		case !again || left == 0:
			response.Body = lastBody{response.Body, to}
			return response, nil
		case response.Close:
			to.close()
			to = nil
			select {
			case <-time.After(pause):
			case <-ctx.Done(): // which the next try tells
			}
		}
	}
}

// sendOn sends the request on a connection, a new one where there is none.
func (c call) sendOn(ctx context.Context, to **wire, wanted string) (*http.Response, error) {
	request, err := c.request(ctx)
	if err != nil {
		return nil, err
	}
	request.Header.Set("Accept", wanted)
	if *to == nil {
		if *to, err = connect(ctx, c.socket); err != nil {
			return nil, err
		}
	}
	return (*to).ask(request)
}

// asksAgain reports whether the daemon knows who is calling once it is asked again, as it does of a young process on an old
// kernel. It reads such an answer; every other can be read still.
func asksAgain(response *http.Response) (bool, error) {
	if response.StatusCode != http.StatusServiceUnavailable || !hasMediaType(response, problemType) {
		return false, nil
	}
	body, err := io.ReadAll(io.LimitReader(response.Body, maxAnswer+1))
	if err != nil {
		return false, err
	}
	response.Body = io.NopCloser(bytes.NewReader(body))
	var problem api.Problem
	return json.Unmarshal(body, &problem) == nil && problem.Code == api.CodeAskAgain, nil
}

// isAnswer reports whether the response is what was asked for and not a refusal.
func (c call) isAnswer(response *http.Response) bool {
	switch response.StatusCode {
	case http.StatusOK:
		return true
	case c.alsoAnswer:
		return !hasMediaType(response, problemType)
	}
	return false
}

func (c call) request(ctx context.Context) (*http.Request, error) {
	// Unix sockets have no host; "localhost" is what the daemon expects there.
	target := url.URL{Scheme: "http", Host: "localhost", Path: c.path, RawQuery: c.query.Encode()}
	var body io.Reader
	if c.body != nil {
		encoded, err := json.Marshal(c.body)
		if err != nil {
			return nil, err
		}
		body = bytes.NewReader(encoded)
	}
	request, err := http.NewRequestWithContext(ctx, c.method, target.String(), body)
	if err != nil {
		return nil, err
	}
	if c.body != nil {
		request.Header.Set("Content-Type", jsonType)
	}
	return request, nil
}

// transportError sorts what went wrong before a whole answer was there.
func (c call) transportError(ctx context.Context, err error) error {
	cause := ctx.Err()
	var dial *net.OpError
	switch {
	case errors.Is(cause, context.DeadlineExceeded):
		return &UnreachableError{Socket: c.socket, Err: cause}
	case cause != nil:
		return cause
	case errors.As(err, &dial) && dial.Op == "dial":
		// The operation's own text repeats the path.
		err = dial.Err
	case errors.As(err, &dial):
		// It has the path by which the daemon bound its socket, which is another.
		err = fmt.Errorf("the connection was closed before a whole answer: %w", dial.Err)
	case !errors.As(err, &dial) && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF):
		err = errNotHTTP // net/http quotes what was sent, which may be a token
	}
	return &UnreachableError{Socket: c.socket, Err: err}
}

// refusal makes an *Error of an answer that is none.
func (c call) refusal(response *http.Response, body []byte) error {
	refusal := &Error{RetryAfter: retryAfter(response)}
	if !hasMediaType(response, problemType) || json.Unmarshal(body, &refusal.Problem) != nil {
		refusal.Problem = api.Problem{Title: http.StatusText(response.StatusCode)}
	}
	// What was sent counts, not what the body repeats of it.
	refusal.Status = response.StatusCode
	return refusal
}

// notTheContract says that an answer came which the wire contract does not know.
func (c call) notTheContract() error {
	return fmt.Errorf("%s %s on %s: the answer is not one of perceptd's; do the versions differ?", c.method, c.path, c.socket)
}

func hasMediaType(response *http.Response, want string) bool {
	got, _, err := mime.ParseMediaType(response.Header.Get("Content-Type"))
	return err == nil && got == want
}

// retryAfter reads the seconds form of Retry-After, the only one that the daemon writes.
func retryAfter(response *http.Response) time.Duration {
	seconds, err := strconv.ParseUint(response.Header.Get("Retry-After"), 10, 31)
	if err != nil {
		return 0
	}
	return time.Duration(seconds) * time.Second
}
