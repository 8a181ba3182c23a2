package hubtest

import (
	"context"
	"encoding/json"
	"fmt"
)

// UpdateDesired merges change, a JSON object in which null deletes, into the desired properties of an identity, and
// notifies it. It returns their version.
func (h *Hub) UpdateDesired(id string, change []byte) (int64, error) {
	return h.setDesired(id, change, false)
}

// ReplaceDesired has the desired properties of an identity be those, and notifies it. Such a notification looks as if
// it added to what was there.
func (h *Hub) ReplaceDesired(id string, properties []byte) (int64, error) {
	return h.setDesired(id, properties, true)
}

func (h *Hub) setDesired(id string, text []byte, replace bool) (int64, error) {
	change, err := readObject(text)
	if err != nil {
		return 0, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	i := h.identities[id]
	if i == nil {
		return 0, fmt.Errorf("%q is not registered", id)
	}
	return h.setDesiredLocked(i, change, replace, arraysSince)
}

func (h *Hub) setDesiredLocked(i *identity, change object, replace bool, apiVersion string) (int64, error) {
	if err := i.twin.desired.patch(change, replace, apiVersion, h.options.Now()); err != nil {
		return 0, err
	}
	i.twin.etag++
	notice := clone(change)
	delete(notice, "$metadata")
	notice["$version"] = i.twin.desired.version
	h.notifyLocked(i, notice)
	return i.twin.desired.version, nil
}

// notifyLocked sends a notification of desired properties to an identity that is connected.
func (h *Hub) notifyLocked(i *identity, notice object) {
	text, _ := json.Marshal(notice) // it was JSON before
	topic := fmt.Sprintf("%s?$version=%v", topicDesired, notice["$version"])
	h.sendLocked(i, topic, text)
}

// SendRaw sends an identity a message on any topic: a notification that is malformed, old or hostile.
func (h *Hub) SendRaw(id, topic string, payload []byte) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	i := h.identities[id]
	if i == nil {
		return fmt.Errorf("%q is not registered", id)
	}
	h.sendLocked(i, topic, payload)
	return nil
}

// Desired returns the desired properties of an identity, with their $version and $metadata; nil: it is not registered.
func (h *Hub) Desired(id string) map[string]any {
	h.mu.Lock()
	defer h.mu.Unlock()
	if i := h.identities[id]; i != nil {
		return i.twin.desired.forService()
	}
	return nil
}

// Reported returns the reported properties of an identity in the same form.
func (h *Hub) Reported(id string) map[string]any {
	h.mu.Lock()
	defer h.mu.Unlock()
	if i := h.identities[id]; i != nil {
		return i.twin.reported.forService()
	}
	return nil
}

// WaitReported waits until the reported properties of an identity satisfy holds.
func (h *Hub) WaitReported(ctx context.Context, id string, holds func(reported map[string]any) bool) error {
	return h.wait(ctx, func() bool { return holds(h.Reported(id)) })
}
