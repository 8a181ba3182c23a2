package hubtest

import (
	"context"
	"encoding/hex"
	"errors"
	mqtt "github.com/mochi-mqtt/server/v2"
	"strings"
	"time"
)

// The topics that are the same for every identity. A trailing # stands for the rest.
const (
	topicTwinRead    = "$iothub/twin/GET/"
	topicReported    = "$iothub/twin/PATCH/properties/reported/"
	topicTwinAnswer  = "$iothub/twin/res/"
	topicDesired     = "$iothub/twin/PATCH/properties/desired/"
	topicMethod      = "$iothub/methods/POST/"
	topicMethodReply = "$iothub/methods/res/"
)

// session is a connection that was accepted.
type session struct {
	client     *mqtt.Client
	identity   *identity
	apiVersion string
	expiry     *time.Timer // nil: the connection may last
	wire       *wireCounter
	over       chan struct{} // closed when the broker has forgotten the connection
}

// end cuts the connection, as the hub does: MQTT 3.1.1 has no word of farewell for servers.
func (s *session) end(why string) { s.client.Stop(errors.New(why)) }

func (s *session) isEventTopic(topic string) bool {
	return strings.HasPrefix(topic, s.identity.path()+"/messages/events/")
}

// nameSpace is the prefix of a client's topics within the broker.
func nameSpace(client string) string { return "c" + hex.EncodeToString([]byte(client)) + "/" }

// sendLocked sends an identity a message. It is lost where that is not subscribed.
func (h *Hub) sendLocked(i *identity, topic string, payload []byte) {
	if h.broker == nil || i.session == nil || !i.session.isSubscribed(topic) {
		return
	}
	switch {
	case strings.HasPrefix(topic, topicDesired):
		i.counters.Notifications.add(len(payload))
	case strings.HasPrefix(topic, topicMethod):
		i.counters.Methods.add(len(payload))
	}
	if err := h.broker.server.Publish(nameSpace(i.id())+topic, payload, false, 0); err != nil {
		h.options.Logf("message to %s on %s: %v", i.id(), topic, err)
	}
}

// isSubscribed reports whether a filter of the session matches topic.
func (s *session) isSubscribed(topic string) bool {
	for filter := range s.client.State.Subscriptions.GetAll() {
		prefix := strings.TrimSuffix(strings.TrimPrefix(filter, nameSpace(s.client.ID)), "#")
		if strings.HasPrefix(topic, prefix) {
			return true
		}
	}
	return false
}

// IsConnected reports whether an identity is connected.
func (h *Hub) IsConnected(id string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	i := h.identities[id]
	return i != nil && i.session != nil
}

// IsListening reports whether an identity is subscribed to everything that a managed device needs: methods, answers to
// twin requests, and notifications of desired properties.
func (h *Hub) IsListening(id string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	i := h.identities[id]
	return i != nil && i.session != nil && i.session.isSubscribed(topicMethod) &&
		i.session.isSubscribed(topicTwinAnswer) && i.session.isSubscribed(topicDesired)
}

// Drop cuts the connection of an identity, and reports whether there was one.
func (h *Hub) Drop(id string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	i := h.identities[id]
	if i == nil || i.session == nil {
		return false
	}
	i.session.end("dropped")
	return true
}

// DropAll cuts every connection.
func (h *Hub) DropAll() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, i := range h.identities {
		if i.session != nil {
			i.session.end("dropped")
		}
	}
}

// WaitListening waits until an identity listens: see IsListening.
func (h *Hub) WaitListening(ctx context.Context, id string) error {
	return h.wait(ctx, func() bool { return h.IsListening(id) })
}

// wait waits until holds, which may call the hub.
func (h *Hub) wait(ctx context.Context, holds func() bool) error {
	for {
		h.mu.Lock()
		changed := h.changed
		h.mu.Unlock()
		if holds() {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
