package hubtest

import (
	"fmt"
	"net/url"
	"strings"
)

// messagesWaiting is how many cloud-to-device messages wait for an identity, as IoT Hub has it.
const messagesWaiting = 50

// message is a cloud-to-device message that waits.
type message struct {
	topic string
	body  []byte
}

// SendMessage sends an identity a cloud-to-device message, with QoS 1. It waits where the identity is not subscribed to
// such messages, and is handed over once. Properties of the system have their "$." before the name.
func (h *Hub) SendMessage(id string, body []byte, properties map[string]string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	i := h.identities[id]
	if i == nil {
		return fmt.Errorf("%q is not registered", id)
	}
	if len(i.messages) == messagesWaiting {
		return fmt.Errorf("%d messages wait for %q already", messagesWaiting, id)
	}
	values := url.Values{}
	for name, value := range properties {
		values.Set(name, value)
	}
	values.Set("$.to", "/"+i.path()+"/messages/devicebound")
	bag := strings.ReplaceAll(values.Encode(), "+", "%20")
	i.messages = append(i.messages, message{i.path() + "/messages/devicebound/" + bag, body})
	h.deliverLocked(i)
	return nil
}

// deliverLocked hands over the messages that wait, if the identity is subscribed to them.
func (h *Hub) deliverLocked(i *identity) {
	for len(i.messages) > 0 && h.broker != nil && i.session != nil && i.session.isSubscribed(i.messages[0].topic) {
		next := i.messages[0]
		i.messages = i.messages[1:]
		if err := h.broker.server.Publish(nameSpace(i.id())+next.topic, next.body, false, 1); err != nil {
			h.options.Logf("message to %s on %s: %v", i.id(), next.topic, err)
		}
	}
}
