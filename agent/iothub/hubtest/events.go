package hubtest

import (
	"context"
	"slices"
	"time"
)

// Event is a device-to-cloud message.
type Event struct {
	Properties map[string]string // those of the application, and of the system with their "$."
	Body       []byte
	StoredOn   time.Time
}

// eventsKept bounds the events that the hub remembers of an identity.
const eventsKept = 10000

// Events returns the events of an identity, the oldest first.
func (h *Hub) Events(id string) []Event {
	h.mu.Lock()
	defer h.mu.Unlock()
	if i := h.identities[id]; i != nil {
		return slices.Clone(i.events)
	}
	return nil
}

// WaitEvents waits until the events of an identity satisfy holds.
func (h *Hub) WaitEvents(ctx context.Context, id string, holds func([]Event) bool) error {
	return h.wait(ctx, func() bool { return holds(h.Events(id)) })
}
