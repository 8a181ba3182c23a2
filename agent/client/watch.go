package client

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/http"
	"net/url"
	"unicode/utf8"

	"perceptd/agent/api"
)

// WatchRequest says which token is watched.
type WatchRequest struct {
	Resource string // as in TokenRequest
	Identity string // as in TokenRequest
}

// Event is one event of a Watch.
type Event struct {
	// Name says what happened: api.EventToken, EventPermissions, EventExpired or EventEnded. Others may be
	// added; every event has the present state.
	Name string

	api.WatchEvent
}

// Watch yields what the daemon holds of a token, at once and at each change, until the caller leaves the
// loop or ctx ends. No event carries token text: ask for it with Token.
//
//	for event, err := range c.Watch(ctx, request) {
//		if err != nil {
//			return err
//		}
//		…
//	}
//
// An event named api.EventEnded is the last one; its Detail says why. Any other end is an error, and the
// last of the loop: those of Token, an *UnreachableError also when the daemon went away later on. Watch
// does not connect again: whether and when to is the caller's to decide. Changes that follow each
// other faster than the caller takes them are one event.
func (c *Client) Watch(ctx context.Context, r WatchRequest) iter.Seq2[Event, error] {
	query := url.Values{"resource": {r.Resource}}
	if r.Identity != "" {
		query.Set("identity", r.Identity)
	}
	call := call{socket: c.TokenSocketPath(), method: http.MethodGet, path: api.PathWatch, query: query}
	return func(yield func(Event, error) bool) {
		if err := call.watch(ctx, func(e Event) bool { return yield(e, nil) }); err != nil {
			yield(Event{}, err)
		}
	}
}

// watch hands on events until there are no more, which is an error unless the daemon or the taker wanted it.
func (c call) watch(ctx context.Context, take func(Event) bool) error {
	response, err := c.send(ctx, eventType)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if !c.isAnswer(response) {
		body, err := io.ReadAll(io.LimitReader(response.Body, maxAnswer))
		if err != nil {
			return c.transportError(ctx, err)
		}
		return c.refusal(response, body)
	}
	if !hasMediaType(response, eventType) {
		return c.contractError()
	}
	events := newEventReader(response.Body)
	for {
		event, err := events.next()
		switch {
		case err == errNoEvent:
			return c.contractError()
		case err == errLongLine:
			return fmt.Errorf("%s %s on %s: %w", c.method, c.path, c.socket, err)
		case err != nil:
			return c.transportError(ctx, err)
		case !take(event) || event.Name == api.EventEnded:
			return nil
		}
	}
}

// maxLine bounds a line of a stream of events; the daemon's are far shorter.
const maxLine = 64 << 10

var (
	errLongLine = fmt.Errorf("a line of the stream is longer than %d bytes", maxLine)
	errNoEvent  = errors.New("the stream is not one of perceptd's")
)

// eventReader reads server-sent events (the HTML standard, 9.2) as the daemon writes them: lines end with
// LF or CRLF, an event has a name and one line of JSON.
type eventReader struct{ in *bufio.Reader }

func newEventReader(r io.Reader) *eventReader {
	return &eventReader{in: bufio.NewReaderSize(r, maxLine)}
}

// next returns the next event. The error is errLongLine, errNoEvent, or that of the reader, which is
// io.ErrUnexpectedEOF at the end, since no stream ends without having said so.
func (r *eventReader) next() (Event, error) {
	var event Event
	named, filled := false, false
	for {
		line, err := r.line()
		switch {
		case err != nil:
			return Event{}, err
		case len(line) == 0 && named && filled:
			return event, nil
		case len(line) == 0 && (named || filled):
			return Event{}, errNoEvent
		}
		name, value, _ := bytes.Cut(line, []byte(":"))
		value = bytes.TrimPrefix(value, []byte(" "))
		switch string(name) {
		case "event":
			if named || len(value) == 0 {
				return Event{}, errNoEvent
			}
			event.Name, named = string(value), true
		case "data":
			// The decoder's error is left out, since it quotes what it read.
			if filled || !isObject(value) || json.Unmarshal(value, &event.WatchEvent) != nil {
				return Event{}, errNoEvent
			}
			filled = true
		}
		// Comments keep the connection busy; ids and the advice when to connect again are not used; what
		// is not known is to be left alone.
	}
}

// line returns one line without its end, good until the next call.
func (r *eventReader) line() ([]byte, error) {
	line, err := r.in.ReadSlice('\n')
	switch {
	case err == bufio.ErrBufferFull:
		return nil, errLongLine
	case err == io.EOF:
		return nil, io.ErrUnexpectedEOF
	case err != nil:
		return nil, err
	}
	line = bytes.TrimSuffix(line[:len(line)-1], []byte("\r"))
	if !utf8.Valid(line) || bytes.ContainsAny(line, "\x00\r") {
		return nil, errNoEvent
	}
	return line, nil
}

func isObject(text []byte) bool { return len(text) > 0 && text[0] == '{' }
