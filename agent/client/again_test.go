package client_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"testing"
	"time"

	"perceptd/agent/api"
	"perceptd/agent/client"
)

// provedLater is a daemon that wants to be asked again: on the same connection, or where it closes that on a new one.
type provedLater struct {
	closes bool
	never  bool

	mu    sync.Mutex
	asked map[any]int // by connection
	order []any
}

func (p *provedLater) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	if r.Method == http.MethodPost && len(body) == 0 {
		http.Error(w, "no body", http.StatusBadRequest)
		return
	}
	conn := r.Context().Value(connKey{})
	p.mu.Lock()
	defer p.mu.Unlock()
	p.asked[conn]++
	p.order = append(p.order, conn)
	switch {
	case p.never || !p.closes && p.asked[conn] == 1 || p.closes && len(p.order) == 1:
		if p.closes {
			w.Header().Set("Connection", "close")
		}
		w.Header().Set("Retry-After", "1")
		answer(w, http.StatusServiceUnavailable, "application/problem+json",
			`{"status":503,"code":"ask_again","detail":"ask again"}`)
	case r.URL.Path == api.PathWatch:
		w.Header().Set("Content-Type", "text/event-stream")
		_, _ = io.WriteString(w, "event: ended\ndata: {}\n\n")
	case r.URL.Path == api.PathToken:
		answer(w, http.StatusOK, "application/json", `{"access_token":"eyJ"}`)
	default:
		answer(w, http.StatusOK, "application/json", `{}`)
	}
}

// A daemon that is not sure yet who is calling is asked again on the same connection, by every call.
func TestAsksAgain(t *testing.T) {
	t.Parallel()
	calls := map[string]func(context.Context, *client.Client) error{
		"token": func(ctx context.Context, c *client.Client) error {
			_, err := c.Token(ctx, client.TokenRequest{Resource: "r"})
			return err
		},
		"whoami": func(ctx context.Context, c *client.Client) error { _, err := c.WhoAmI(ctx); return err },
		"report": func(ctx context.Context, c *client.Client) error {
			_, err := c.Rejected(ctx, api.Rejection{Resource: "r"})
			return err
		},
		"watch": func(ctx context.Context, c *client.Client) error {
			for event, err := range c.Watch(ctx, client.WatchRequest{Resource: "r"}) {
				if err != nil || event.Name == api.EventEnded {
					return err
				}
			}
			return errors.New("no event")
		},
	}
	for name, call := range calls {
		for _, closes := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, closes %v", name, closes), func(t *testing.T) {
				t.Parallel()
				p := &provedLater{closes: closes, asked: make(map[any]int)}
				if err := call(t.Context(), serve(t, p.ServeHTTP)); err != nil {
					t.Error(err)
				}
				if len(p.order) != 2 || (p.order[0] == p.order[1]) == closes {
					t.Errorf("asked on %v", p.order)
				}
			})
		}
	}
}

// It is asked a few times and no more, and not at all by a caller that has gone.
func TestAsksAgainInVain(t *testing.T) {
	t.Parallel()
	p := &provedLater{never: true, asked: make(map[any]int)}
	_, err := serve(t, p.ServeHTTP).WhoAmI(t.Context())
	var refusal *client.Error
	if !errors.As(err, &refusal) || refusal.Code != api.CodeAskAgain || refusal.Status != 503 ||
		refusal.RetryAfter != time.Second || err.Error() != "ask again" {
		t.Errorf("%v", err)
	}
	if len(p.order) != 4 || len(p.asked) != 1 {
		t.Errorf("asked on %v", p.order)
	}
	ctx, cancel := context.WithCancel(t.Context())
	gone := &provedLater{never: true, closes: true, asked: make(map[any]int)}
	c := serve(t, func(w http.ResponseWriter, r *http.Request) { gone.ServeHTTP(w, r); cancel() })
	if _, err := c.WhoAmI(ctx); !errors.Is(err, context.Canceled) || len(gone.order) != 1 {
		t.Errorf("%v, asked on %v", err, gone.order)
	}
}
