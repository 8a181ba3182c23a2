package iothub

import (
	"context"
	"encoding/json"
	"fmt"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/time/rate"

	"perceptd/agent/api"
)

const (
	lookEvery    = 30 * time.Second // how often the status is looked at, since a denial gives no notice
	lookPause    = 5 * time.Second  // between a notice and the look, so that one look serves many
	sendTime     = 30 * time.Second // one try to send an event
	sendPause    = 5 * time.Second  // before the next try, doubled up to
	sendMaxPause = 5 * time.Minute
	summaryEvery = 10 * time.Minute // how often an event says how many were suppressed

	eventsAtOnce = 40 // of severity info, and as many of the others; and then
	eventsHour   = 60 // an hour of each
)

// events sends IoT Hub what happens to the device, which it finds by comparing one status with the next.
type events struct {
	look   func() api.Status // the whole status
	send   func(ctx context.Context, id string, body json.RawMessage, properties map[string]string) error
	log    *zap.Logger
	queue  *eventQueue
	noted  chan struct{}
	online chan struct{}
	end    context.CancelFunc
	loops  sync.WaitGroup

	infos, others *rate.Limiter

	mu         sync.Mutex // protects what follows
	suppressed int64      // ever
}

// newEvents begins to look and to send. send returns nil when IoT Hub has an event, and ends with its context.
func newEvents(
	look func() api.Status,
	send func(ctx context.Context, id string, body json.RawMessage, properties map[string]string) error,
	log *zap.Logger,
) *events {
	const each = time.Hour / eventsHour
	ctx, end := context.WithCancel(context.Background())
	e := &events{
		look: look, send: send, log: log, queue: newEventQueue(), end: end,
		noted: make(chan struct{}, 1), online: make(chan struct{}, 1),
		infos: rate.NewLimiter(rate.Every(each), eventsAtOnce), others: rate.NewLimiter(rate.Every(each), eventsAtOnce),
	}
	e.loops.Go(func() { e.watch(ctx) })
	e.loops.Go(func() { e.deliver(ctx) })
	return e
}

// notice says that the status may differ. It does not block.
func (e *events) notice() { poke(e.noted) }

// connected says that IoT Hub can be reached again. It does not block.
func (e *events) connected() { poke(e.online) }

// close ends both loops. What is not sent is lost.
func (e *events) close() {
	e.end()
	e.loops.Wait()
}

func (e *events) status() api.EventsStatus {
	s := e.queue.status()
	e.mu.Lock()
	defer e.mu.Unlock()
	s.Suppressed = e.suppressed
	return s
}

// watch compares each status with the one before.
func (e *events) watch(ctx context.Context) {
	begun := time.Now()
	var before watched
	var unsaid summary
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		status := e.look()
		var happened []api.HubEvent
		before, happened = before.next(status, time.Since(begun))
		for _, event := range happened {
			if e.allows(event) {
				e.queue.add(event)
				continue
			}
			unsaid.suppressed++
			e.mu.Lock()
			e.suppressed++
			e.mu.Unlock()
		}
		if event, due := unsaid.next(status.Now, time.Since(begun), e.queue.status().Dropped); due {
			e.queue.add(event)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-e.noted:
			if !pause(ctx, lookPause) {
				return
			}
		}
	}
}

// allows reports whether the budget has room for an event, and takes it out. Good news has a budget of its own, so that
// much of it crowds out nothing else.
func (e *events) allows(event api.HubEvent) bool {
	if event.Severity == api.SeverityInfo {
		return e.infos.Allow()
	}
	return e.others.Allow()
}

// summary is what has still to be said of events that were not sent.
type summary struct {
	suppressed, dropped int64         // since the last summary; of all that were ever dropped, those that it has said
	since               time.Duration // when the first was suppressed or dropped
	begun               bool
}

// next returns the event that says how many events were not sent, when that is due. dropped is how many the queue has
// dropped ever.
func (s *summary) next(now time.Time, at time.Duration, dropped int64) (api.HubEvent, bool) {
	count := s.suppressed + dropped - s.dropped
	if count == 0 {
		return api.HubEvent{}, false
	}
	if !s.begun {
		s.begun, s.since = true, at
	}
	if at-s.since < summaryEvery {
		return api.HubEvent{}, false
	}
	event := api.HubEvent{Type: api.HubEventSuppressed, Severity: api.SeverityWarning, At: now, Count: count,
		Detail: fmt.Sprintf("%d events came too often, and %d had no room while they waited", s.suppressed,
			dropped-s.dropped)}
	*s = summary{dropped: dropped}
	return event, true
}

// deliver sends the events in order, each until IoT Hub has it.
func (e *events) deliver(ctx context.Context) {
	wait := sendPause
	for {
		m, found := e.queue.begin()
		if !found {
			select {
			case <-ctx.Done():
				return
			case <-e.queue.more:
			}
			continue
		}
		sending, cancel := context.WithTimeout(ctx, sendTime)
		err := e.send(sending, m.id, m.body, m.properties)
		cancel()
		if e.queue.end(err == nil); err == nil {
			wait = sendPause
			continue
		}
		e.log.Debug("an event waits for IoT Hub", zap.String("type", string(m.kind)), zap.Error(err))
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-e.online:
			wait = sendPause
		case <-timer.C:
			wait = min(2*wait, sendMaxPause)
		}
		timer.Stop()
		if ctx.Err() != nil {
			return
		}
	}
}
