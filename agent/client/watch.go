package client

import (
	"context"
	"fmt"
	"io"
	"iter"
	"net/http"
	"net/url"

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
	// added; what is there now is told with every one.
	Name string

	api.WatchEvent
}

// Watch tells what the daemon holds of a token, at once and at each change, until the caller leaves the
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
// other faster than the caller takes them are told as one.
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
		return c.notTheContract()
	}
	events := newEventReader(response.Body)
	for {
		event, err := events.next()
		switch {
		case err == errNoEvent:
			return c.notTheContract()
		case err == errLongLine:
			return fmt.Errorf("%s %s on %s: %w", c.method, c.path, c.socket, err)
		case err != nil:
			return c.transportError(ctx, err)
		case !take(event) || event.Name == api.EventEnded:
			return nil
		}
	}
}
