package iothub

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"pgregory.net/rapid"

	"perceptd/agent/api"
)

// ids returns the IDs of what waits, without the name of the process.
func (q *eventQueue) ids() []string {
	var all []string
	for _, m := range q.waiting {
		all = append(all, strings.TrimPrefix(m.id, q.name+"-"))
	}
	return all
}

func TestFullQueueDropsTheLeastImportant(t *testing.T) {
	t.Parallel()
	q := newEventQueue()
	for i := range maxQueued {
		severity := api.SeverityError
		if i == 0 || i == 7 || i == 9 {
			severity = api.SeverityInfo
		}
		q.add(api.HubEvent{Severity: severity})
	}
	if m, any := q.begin(); !any || m.id != q.name+"-1" {
		t.Fatalf("%+v", m)
	}
	q.add(api.HubEvent{Severity: api.SeverityWarning}) // the first is on its way, so the eighth goes
	q.add(api.HubEvent{Severity: api.SeverityWarning})
	q.add(api.HubEvent{Severity: api.SeverityInfo}) // it goes itself
	got := q.ids()
	if len(got) != maxQueued || got[0] != "1" || slices.Contains(got, "8") || slices.Contains(got, "10") ||
		got[maxQueued-1] != fmt.Sprint(maxQueued+2) {
		t.Errorf("%v", got)
	}
	q.end(true)
	if s := q.status(); s.Sent != 1 || s.Dropped != 3 || s.Waiting != maxQueued-1 {
		t.Errorf("%+v", s)
	}
}

// Whatever is added and sent, the queue stays within its bounds, keeps the order, and counts what it drops.
func TestQueueIsBounded(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		q := newEventQueue()
		added := 0
		for range rapid.IntRange(1, 100).Draw(t, "steps") {
			switch rapid.IntRange(0, 2).Draw(t, "step") {
			case 0:
				if _, any := q.begin(); any {
					q.end(rapid.Bool().Draw(t, "sent"))
				}
			default:
				long := strings.Repeat("x", rapid.IntRange(0, 300).Draw(t, "long"))
				for range rapid.IntRange(1, 60).Draw(t, "events") {
					added++
					q.add(api.HubEvent{Severity: rapid.SampledFrom(importance).Draw(t, "severity"), Detail: long})
				}
			}
			bytes, last := 0, 0
			for _, m := range q.waiting {
				bytes += m.size()
				n := 0
				if _, err := fmt.Sscan(strings.TrimPrefix(m.id, q.name+"-"), &n); err != nil || n <= last {
					t.Fatalf("%s after %d: %v", m.id, last, err)
				}
				last = n
			}
			s := q.status()
			if bytes != q.bytes || bytes > maxQueuedBytes || len(q.waiting) > maxQueued ||
				int64(added) != s.Sent+s.Dropped+int64(s.Waiting) {
				t.Fatalf("%d bytes, counted %d; %d added, %+v", bytes, q.bytes, added, s)
			}
		}
	})
}

// hubSide is where events go, as IoT Hub takes them.
type hubSide struct {
	mu     sync.Mutex // protects what follows
	err    error      // of what is sent from now on
	got    []api.HubEvent
	ids    []string
	tries  int
	status api.Status
}

func (h *hubSide) send(_ context.Context, id string, body json.RawMessage, _ map[string]string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.tries++; h.err != nil {
		return h.err
	}
	var e api.HubEvent
	if err := json.Unmarshal(body, &e); err != nil {
		return err
	}
	h.got, h.ids = append(h.got, e), append(h.ids, id)
	return nil
}

func (h *hubSide) look() api.Status {
	h.mu.Lock()
	defer h.mu.Unlock()
	s := h.status
	s.Now = api.Time(time.Now())
	return s
}

// set changes what the hub does, or how the device is.
func (h *hubSide) set(change func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	change()
}

// becomes has the device be so, and e look at it.
func (h *hubSide) becomes(e *events, status api.Status) {
	h.set(func() { h.status = status })
	e.notice()
	time.Sleep(lookPause + time.Second)
	synctest.Wait()
}

// delivering runs f in virtual time with a device of which all is well, and its events.
func delivering(t *testing.T, f func(t *testing.T, h *hubSide, e *events)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		h := &hubSide{status: calm()}
		e := newEvents(h.look, h.send, zap.NewNop())
		defer e.close()
		synctest.Wait()
		f(t, h, e)
	})
}

func TestEventsAreDelivered(t *testing.T) {
	t.Parallel()
	delivering(t, func(t *testing.T, h *hubSide, e *events) {
		h.set(func() { h.status = failing(0) })
		e.notice()
		time.Sleep(lookPause)
		synctest.Wait()
		h.set(func() { h.status = calm() })
		time.Sleep(lookEvery) // without a notice
		synctest.Wait()
		h.mu.Lock()
		defer h.mu.Unlock()
		if len(h.got) != 2 || h.got[0].Type != api.HubEventTokenTrouble ||
			h.got[1].Type != api.HubEventTokenTroubleEnded || h.ids[0] != e.queue.name+"-1" ||
			h.ids[1] != e.queue.name+"-2" {
			t.Errorf("%v %+v", h.ids, h.got)
		}
		if s := e.status(); s != (api.EventsStatus{Sent: 2}) {
			t.Errorf("%+v", s)
		}
	})
}

// While the hub is gone events wait, are tried seldom, and come in order and once when it is there again.
func TestEventsWaitForTheHub(t *testing.T) {
	t.Parallel()
	delivering(t, func(t *testing.T, h *hubSide, e *events) {
		h.set(func() { h.err = errors.New("offline") })
		for range 5 {
			h.becomes(e, failing(0))
			h.becomes(e, calm())
		}
		time.Sleep(24 * time.Hour)
		synctest.Wait()
		h.set(func() {
			if len(h.got) != 0 || h.tries < 100 || h.tries > 400 {
				t.Errorf("%d tries in a day", h.tries)
			}
			h.err = nil
		})
		if s := e.status(); s.Waiting != 10 {
			t.Errorf("%+v", s)
		}
		e.connected()
		synctest.Wait()
		h.mu.Lock()
		defer h.mu.Unlock()
		if !slices.IsSortedFunc(h.got, func(a, b api.HubEvent) int { return a.At.Compare(b.At) }) || len(h.got) != 10 {
			t.Errorf("%+v", h.got)
		}
	})
}

// A send that never ends is given up and tried again with the same ID.
func TestEventsAreSentAgain(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var ids []string
		var mu sync.Mutex // protects ids
		send := func(ctx context.Context, id string, _ json.RawMessage, _ map[string]string) error {
			mu.Lock()
			ids = append(ids, id)
			first := len(ids) == 1
			mu.Unlock()
			if first {
				<-ctx.Done()
			}
			return ctx.Err()
		}
		e := newEvents(func() api.Status { return failing(0) }, send, zap.NewNop())
		time.Sleep(2 * sendTime)
		synctest.Wait()
		e.close()
		if len(ids) != 2 || ids[0] != ids[1] {
			t.Errorf("%v", ids)
		}
	})
}

// Events that come too often are left out, good news first, and one event counts them.
func TestEventsAreRateLimited(t *testing.T) {
	t.Parallel()
	delivering(t, func(t *testing.T, h *hubSide, e *events) {
		for range 60 {
			h.becomes(e, failing(0))
			h.becomes(e, calm())
		}
		time.Sleep(2 * summaryEvery)
		synctest.Wait()
		h.mu.Lock()
		defer h.mu.Unlock()
		counts := make(map[api.HubEventType]int)
		var left int64
		for _, event := range h.got {
			if counts[event.Type]++; event.Type == api.HubEventSuppressed {
				left += event.Count
			}
		}
		begun, ended := counts[api.HubEventTokenTrouble], counts[api.HubEventTokenTroubleEnded]
		if begun < 50 || begun > 55 || ended < 50 || ended > 55 || left != int64(120-begun-ended) ||
			left != e.status().Suppressed {
			t.Errorf("%v: %d left out, %+v", counts, left, e.status())
		}
	})
}

// Much good news at once leaves room for the other.
func TestGoodNewsDelaysNoOther(t *testing.T) {
	t.Parallel()
	delivering(t, func(t *testing.T, h *hubSide, e *events) {
		many := func(state api.PermissionState) api.Status {
			var s api.Status
			s.Clock.Known = true
			s.Changes = []api.PolicyChange{{ID: "change", Effect: api.EffectGranted}}
			for i := range 256 {
				s.Tokens = append(s.Tokens, api.TokenStatus{Identity: fmt.Sprint(i), ExpiresIn: 7200,
					Changes: []api.TokenChange{{ID: "change", State: state}}})
			}
			return s
		}
		h.becomes(e, many(api.PermissionsStale))
		h.becomes(e, many(api.PermissionsCurrent))
		h.becomes(e, failing(0))
		h.set(func() {
			if len(h.got) != eventsAtOnce+1 || h.got[eventsAtOnce].Type != api.HubEventTokenTrouble {
				t.Errorf("%d events", len(h.got))
			}
		})
		time.Sleep(2 * summaryEvery)
		synctest.Wait()
		h.mu.Lock()
		defer h.mu.Unlock()
		last := h.got[len(h.got)-1]
		if last.Type != api.HubEventSuppressed || last.Count != 256-eventsAtOnce ||
			e.status().Suppressed != last.Count {
			t.Errorf("%+v", last)
		}
	})
}
