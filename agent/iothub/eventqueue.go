package iothub

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"unicode"
	"unicode/utf8"

	"perceptd/agent/api"
)

const (
	maxQueued      = 200      // events that wait
	maxQueuedBytes = 64 << 10 // their bodies and properties together
	maxEventBody   = 1000     // bytes

	maxEventName     = 64 // bytes of an identity, a change and a rule in an event
	maxEventResource = 160
	maxEventDetail   = 300
)

// message is an event as it is sent. By its ID the receiver recognises one that comes twice.
type message struct {
	id         string
	body       json.RawMessage
	properties map[string]string
	severity   api.HubSeverity
	kind       api.HubEventType
}

// size returns about how much memory m takes.
func (m *message) size() int {
	size := len(m.id) + len(m.body)
	for name, value := range m.properties {
		size += len(name) + len(value)
	}
	return size
}

// messageOf makes a message of an event. Its system properties say that the body is JSON, so that IoT Hub can route by
// the body, and when it was made.
func messageOf(id string, e api.HubEvent) message {
	for _, name := range []*string{&e.Identity, &e.Change, &e.Rule} {
		*name = plain(*name, maxEventName)
	}
	e.Resource, e.Detail = plain(e.Resource, maxEventResource), plain(e.Detail, maxEventDetail)
	m := message{id: id, body: eventBody(e), severity: e.Severity, kind: e.Type, properties: map[string]string{
		"$.ct": "application/json", "$.ce": "utf-8", "$.ctime": e.At.UTC().Format("2006-01-02T15:04:05.000Z"),
		"type": string(e.Type), "severity": string(e.Severity),
	}}
	if len(m.body) > maxEventBody {
		e.Detail = ""
		m.body = eventBody(e)
	}
	for name, value := range map[string]string{
		"identity": e.Identity, "resource": e.Resource, "change": e.Change, "rule": e.Rule,
	} {
		if value != "" {
			m.properties[name] = value
		}
	}
	return m
}

// eventBody returns e as JSON; encoding a struct of ours cannot fail.
func eventBody(e api.HubEvent) json.RawMessage {
	var b bytes.Buffer
	encoder := json.NewEncoder(&b)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(e); err != nil {
		panic(err)
	}
	return bytes.TrimSpace(b.Bytes())
}

// plain returns text without what cannot be printed, cut to so many bytes.
func plain(text string, most int) string {
	text = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, text)
	if len(text) <= most {
		return text
	}
	const mark = "…"
	cut := most - len(mark)
	for !utf8.RuneStart(text[cut]) {
		cut--
	}
	return text[:cut] + mark
}

// eventQueue holds events until IoT Hub has them, in order. When it is full the oldest of the least important goes.
type eventQueue struct {
	name string        // of this process, in the IDs of its events
	more chan struct{} // says that there are more

	mu      sync.Mutex // protects what follows
	waiting []message  // the oldest first
	bytes   int
	sending bool // the first is on its way: it stays
	last    int64
	sent    int64
	dropped int64
}

func newEventQueue() *eventQueue {
	var name [8]byte
	_, _ = rand.Read(name[:]) // never fails
	return &eventQueue{name: hex.EncodeToString(name[:]), more: make(chan struct{}, 1)}
}

// add puts an event at the end, and makes room for it.
func (q *eventQueue) add(e api.HubEvent) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.last++
	m := messageOf(fmt.Sprintf("%s-%d", q.name, q.last), e)
	q.waiting = append(q.waiting, m)
	q.bytes += m.size()
	for len(q.waiting) > maxQueued || q.bytes > maxQueuedBytes {
		q.dropLocked()
	}
	poke(q.more)
}

// importance orders severities.
var importance = []api.HubSeverity{api.SeverityInfo, api.SeverityWarning, api.SeverityError}

// dropLocked drops the oldest of the least important events that are not on their way.
func (q *eventQueue) dropLocked() {
	first := 0
	if q.sending {
		first = 1
	}
	least := first
	for i := first; i < len(q.waiting); i++ {
		if slices.Index(importance, q.waiting[i].severity) < slices.Index(importance, q.waiting[least].severity) {
			least = i
		}
	}
	q.bytes -= q.waiting[least].size()
	q.waiting = slices.Delete(q.waiting, least, least+1)
	q.dropped++
}

// begin returns the first event, if there is one. It stays until end says that IoT Hub has it.
func (q *eventQueue) begin() (m message, found bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.waiting) == 0 {
		return message{}, false
	}
	q.sending = true
	return q.waiting[0], true
}

// end says what became of the first event: IoT Hub has it, or it is to be sent again.
func (q *eventQueue) end(sent bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.sending = false
	if !sent {
		return
	}
	q.bytes -= q.waiting[0].size()
	q.waiting = slices.Delete(q.waiting, 0, 1)
	q.sent++
}

func (q *eventQueue) status() api.EventsStatus {
	q.mu.Lock()
	defer q.mu.Unlock()
	return api.EventsStatus{Sent: q.sent, Waiting: len(q.waiting), Dropped: q.dropped}
}
