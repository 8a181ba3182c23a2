package hubtest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strconv"
)

// methodAnswer is what a device answers a direct method with.
type methodAnswer struct {
	status  int
	payload json.RawMessage
}

var (
	// ErrNotOnline is why a method was not called: the device is not connected, or takes no methods.
	ErrNotOnline = errors.New("the device is not online")
	// ErrMethodTimeout says that the device has not answered in time.
	ErrMethodTimeout = errors.New("the device did not answer in time")
)

// maxMethod bounds the payload of a method, in bytes, each way.
const maxMethod = 128 << 10

// InvokeMethod calls a direct method of an identity and returns its status and answer. It waits for the device to be
// online, and for its answer, until ctx ends.
func (h *Hub) InvokeMethod(
	ctx context.Context, id, name string, payload []byte,
) (status int, answer json.RawMessage, err error) {
	if len(payload) > maxMethod {
		return 0, nil, fmt.Errorf("the payload has %d bytes, more than %d", len(payload), maxMethod)
	}
	answered := make(chan methodAnswer, 1)
	request := strconv.FormatUint(h.requests.Add(1), 16)
	if err := h.wait(ctx, func() bool { return h.call(id, name, request, payload, answered) }); err != nil {
		return 0, nil, ErrNotOnline
	}
	defer func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		delete(h.methods, id+"#"+request)
	}()
	select {
	case a := <-answered:
		return a.status, a.payload, nil
	case <-ctx.Done():
		return 0, nil, ErrMethodTimeout
	}
}

// call sends the call, if the device is online.
func (h *Hub) call(id, name, request string, payload []byte, answered chan<- methodAnswer) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	i := h.identities[id]
	if i == nil || i.session == nil || !i.session.isSubscribed(topicMethod) {
		return false
	}
	h.methods[id+"#"+request] = answered
	h.sendLocked(i, topicMethod+url.PathEscape(name)+"/?$rid="+request, payload)
	return true
}

func (h *Hub) answeredLocked(i *identity, status, request string, payload []byte) {
	i.counters.Methods.add(len(payload))
	code, err := strconv.Atoi(status)
	waiting := h.methods[i.id()+"#"+request]
	if err != nil || waiting == nil || len(payload) > maxMethod || len(payload) > 0 && !json.Valid(payload) {
		h.options.Logf("%s: an answer to method call %s that is of no use: status %q, %d bytes",
			i.id(), request, status, len(payload))
		return
	}
	answer := methodAnswer{status: code, payload: slices.Clone(payload)}
	if len(payload) == 0 {
		answer.payload = json.RawMessage("null")
	}
	select {
	case waiting <- answer:
	default: // it has answered twice
	}
}
