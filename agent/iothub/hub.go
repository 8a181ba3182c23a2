// Package iothub joins an agent to IoT Hub: the twin and direct methods set what the agent does, and what it has is
// reported.
package iothub

import (
	"context"
	"encoding/json"
	"sync"
	"time"

	"go.uber.org/zap"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/iothub/link"
)

// Options is what a Hub is made of.
type Options struct {
	Link   link.Options // but for Twin, Patch, Method and Changed, which are the Hub's
	Agent  *agent.Agent
	Status func() api.Status // the whole status; it waits for nothing
	Level  zap.AtomicLevel   // of what the log writes, at its configured level: the twin may set another
	Log    *zap.Logger
	// Changed is called when Status may differ. It does not block. Nil: it is not called.
	Changed func()

	ReportEvery  time.Duration // the shortest time between two reports; zero: 30 s, as hubs of many devices need
	ReportSpread time.Duration // a report waits for a random part of this; zero: a minute, a nanosecond: none
	Events       bool          // events are sent
}

// closeTime is how long Close waits for what is being put in force.
const closeTime = time.Second

// Hub joins an agent to IoT Hub. It is safe for concurrent use.
type Hub struct {
	webSocket bool
	desired   *desired
	methods   *methods
	reporter  *reporter
	events    *events // nil: none are sent
	changed   func()

	poked     chan struct{} // something waits, or may differ
	decided   chan struct{} // something became of a document
	closing   chan struct{}
	running   sync.WaitGroup
	closeOnce sync.Once

	mu        sync.Mutex // protects what follows
	link      *link.Link
	twin      *document // the last full read that is not in force yet
	twinOf    string    // this device's identity whose twin was read last; empty: none was
	again     bool      // the last document may come to something else by now
	connected bool      // as it was told last
}

// New returns a Hub, which begins to connect. Close it, before the agent.
func New(o Options) *Hub {
	if o.Changed == nil {
		o.Changed = func() {}
	}
	o.Log, o.Link.Log = agent.BoundedLog(o.Log), agent.BoundedLog(o.Link.Log)
	h := &Hub{
		webSocket: o.Link.WebSocket, changed: o.Changed,
		desired: &desired{
			agent: o.Agent, level: o.Level, configured: o.Level.Level(), log: o.Log,
		},
		poked: make(chan struct{}, 1), decided: make(chan struct{}, 1), closing: make(chan struct{}),
	}
	h.methods = newMethods(o.Agent, o.Status, o.Log)
	h.reporter = newReporter(reporterOptions{
		Status: o.Status, Every: o.ReportEvery, Spread: o.ReportSpread, Log: o.Log, Changed: o.Changed,
		Send: func(ctx context.Context, patch json.RawMessage) (int64, error) {
			return h.connection().Report(ctx, patch)
		},
	})
	h.desired.changed = h.desiredChanged
	if o.Events {
		h.events = newEvents(o.Status, h.sendEvent, o.Log)
	}
	at := o.Link
	at.Twin, at.Patch, at.Method, at.Changed = h.takeTwin, h.takePatch, h.methods.serve, h.linkChanged
	at.Connecting = h.desired.connecting
	h.mu.Lock()
	defer h.mu.Unlock()
	h.link = link.New(at) // which calls back before it is returned, perhaps
	h.running.Go(h.run)
	h.running.Go(h.acknowledge)
	return h
}

// connection returns the link.
func (h *Hub) connection() *link.Link {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.link
}

// twinIdentity is the identity of this device whose twin was read last; empty: none was.
func (h *Hub) twinIdentity() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.twinOf
}

func (h *Hub) sendEvent(
	ctx context.Context, id string, body json.RawMessage, properties map[string]string,
) error {
	return h.connection().Send(ctx, link.Event{ID: id, Body: body, Properties: properties})
}

// takePatch has what a notification adds to deny be denied at once. It waits for nothing.
func (h *Hub) takePatch(text json.RawMessage, identity link.Identity, number int64) {
	var of struct {
		Version int64 `json:"$version"`
	}
	if len(text) > maxDesired || json.Unmarshal(text, &of) != nil {
		text = nil // the twin is read now, and is what counts
	}
	h.desired.tighten(document{hub: identity.String(), version: of.Version, text: text}, number)
}

// takeTwin has what the whole twin says be put in force.
func (h *Hub) takeTwin(t link.Twin) {
	identity := t.Identity.String()
	h.mu.Lock()
	moved := h.twinOf != "" && h.twinOf != identity
	h.twin, h.twinOf = &document{identity, t.DesiredVersion, t.Desired, t.Asked}, identity
	h.mu.Unlock()
	if moved {
		h.reporter.move()
	}
	h.reporter.connected(t.Reported, t.ReportedVersion)
	poke(h.poked)
}

// desiredChanged has what became of a document be reported, and shown.
func (h *Hub) desiredChanged() {
	poke(h.decided)
	h.changed()
}

// linkChanged passes on that the link may be another.
func (h *Hub) linkChanged() {
	poke(h.poked)
	h.changed()
}

// keepAgain is how long after what is in force could not be kept it is looked whether it is by now.
const keepAgain = time.Minute

// acknowledge has what became of the last document be reported once it is on the disk, or could not be written there,
// which the acknowledgement says then. What comes meanwhile is put in force all the same.
func (h *Hub) acknowledge() {
	var again <-chan time.Time
	for {
		select {
		case <-h.decided:
		case <-again:
		case <-h.closing:
			return
		}
		identity := h.twinIdentity()
		status := h.desired.describeOf(identity)
		isKept := h.desired.keep()
		if again = nil; !isKept {
			again = time.After(keepAgain)
		}
		if status.Version > 0 && h.twinIdentity() == identity {
			h.reporter.acknowledge(status, isKept)
		}
	}
}

// run puts in force what comes, apart from the link, and waits for no disk.
func (h *Hub) run() {
	later := time.NewTimer(applyAgain)
	defer later.Stop()
	for {
		select {
		case <-h.poked:
		case <-later.C:
			later.Reset(applyAgain)
			if h.desired.unfinished() {
				h.desired.again()
			}
			continue
		case <-h.closing:
			return
		}
		h.mu.Lock()
		twin, again := h.twin, h.again
		h.twin, h.again = nil, false
		h.mu.Unlock()
		switch {
		case twin != nil:
			h.desired.read(*twin)
		case again:
			h.desired.again()
		default:
			h.desired.notice()
		}
		h.tellConnection()
	}
}

// tellConnection has events that wait be sent when there is a connection again, and the agent know as whom.
func (h *Hub) tellConnection() {
	status := h.connection().Status()
	if status.Identity != (link.Identity{}) {
		h.desired.agent.NoteHub(status.Identity.String())
	}
	connected := status.Connected
	h.mu.Lock()
	news := connected && !h.connected
	h.connected = connected
	h.mu.Unlock()
	if news && h.events != nil {
		h.events.connected()
	}
}

// Status returns how the device and IoT Hub are connected, and what became of what the hub says, as the identity that
// the device has there now.
func (h *Hub) Status() api.HubStatus {
	l := h.connection().Status()
	identity := l.Identity.String()
	s := api.HubStatus{
		Hub: l.Identity.Hub, Device: l.Identity.Device, Module: l.Identity.Module, Transport: "mqtt",
		Now:       api.Time(time.Now()),
		Connected: l.Connected, Since: api.Time(l.Since), LastError: l.LastError, LastErrorOn: api.Time(l.LastErrorOn),
		Failure: l.Failure, NextTry: api.Time(l.NextTry), Desired: h.desired.describeOf(identity),
	}
	if l.Connected { // what is not connected says why by itself
		s.TwinError, s.TwinErrorSince = l.TwinError, api.Time(l.TwinErrorOn)
	}
	if h.twinIdentity() == identity {
		s.Reported, s.ReportError = h.reporter.status()
	}
	if h.webSocket {
		s.Transport = "websocket"
	}
	if h.events != nil {
		s.Events = new(h.events.status())
	}
	return s
}

// Notice says that the status may differ from what it was. It does not block.
func (h *Hub) Notice() {
	h.reporter.notice()
	if h.events != nil {
		h.events.notice()
	}
	poke(h.poked)
}

// HaveCredentialsChanged reads the credentials, and reports whether they differ from those of the last try, so that
// Reload connects anew. The error is why they cannot be read.
func (h *Hub) HaveCredentialsChanged(ctx context.Context) (bool, error) {
	return h.connection().HaveCredentialsChanged(ctx)
}

// Reload has the credentials be read again, a connection be tried at once where there is none, and the last document
// that was read be applied to what is configured now. It waits for nothing.
func (h *Hub) Reload() {
	h.connection().TryAgain()
	h.mu.Lock()
	h.again = true
	h.mu.Unlock()
	poke(h.poked)
}

// Close ends the connection, and waits a moment for what is being put in force. What the hub has set stays in force.
func (h *Hub) Close() { h.closeOnce.Do(h.close) }

func (h *Hub) close() {
	h.connection().Close()
	close(h.closing)
	h.reporter.close()
	if h.events != nil {
		h.events.close()
	}
	ended := make(chan struct{})
	go func() {
		h.running.Wait()
		close(ended)
	}()
	late := time.NewTimer(closeTime)
	defer late.Stop()
	select {
	case <-ended:
	case <-late.C: // the disk does not answer: what waits there ends with it
	}
}
