package server

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/grants"
	"perceptd/agent/server/limit"
)

// watch answers GET /v1/watch with an event for the token that is there and one for each change of it. Of changes that
// follow each other faster than the caller reads, only the last is sent.
func (s *Server) watch(req *request) *apiError {
	if e := req.query.parse(req.raw); e != nil {
		return e
	}
	request, e := readWatch(&req.query)
	if e != nil {
		return e
	}
	info, changed, err := s.Agent.Peek(req.caller, request)
	if err != nil {
		return errorOf(err)
	}
	limits := s.Limits.orDefaults()
	key, watching := req.conn.Key(), &s.quotas().watching
	if !watching.TryAcquire(key, limit.Quota{
		PerKey: limits.Watching, PerParent: 2 * limits.Watching, Total: partOf(limits.AllWatching, key),
	}) {
		return busy("too many streams of events are open already: share one, or ask with wait")
	}
	defer watching.Release(key)

	ctx, cancel := context.WithCancel(req.http.Context()) // no answer is due
	w := watcher{
		agent: s.Agent, ctx: ctx, caller: req.caller, request: request, stopping: req.stopping,
		aliveInterval: limits.Alive,
		stream:        stream{w: req.w, c: http.NewResponseController(req.w), now: s.now},
	}
	defer w.asking.Wait()
	defer cancel()
	req.streamed = true
	if w.stream.open() == nil {
		w.run(info, changed)
	}
	return nil
}

// readWatch reads the parameters of GET /v1/watch, as strictly as readV1.
func readWatch(q *query) (request agent.Request, e *apiError) {
	for _, p := range q.list[:q.count] {
		if p.name != "resource" && p.name != "identity" {
			return agent.Request{}, unknownV1(p.name, "resource and identity")
		}
	}
	request, _, e = readV1(q)
	return request, e
}

// watcher sends one caller the state of one token.
type watcher struct {
	agent         *agent.Agent
	ctx           context.Context // ends when the caller has gone
	caller        grants.Caller
	request       agent.Request
	stopping      <-chan struct{} // closed when the daemon goes down
	aliveInterval time.Duration   // between two signs of life
	stream        stream

	asking sync.WaitGroup // for the one that asks for the token
	asks   atomic.Bool    // whether there is one
}

// run sends the state and each change of it, until the caller goes away, is too slow or may not know any more, or the
// daemon goes down. info and changed are the result of the first look.
func (w *watcher) run(info api.WatchEvent, changed <-chan struct{}) {
	tick := time.NewTicker(w.aliveInterval)
	defer tick.Stop()
	var sent api.WatchEvent
	for {
		if name := eventName(sent, info); name != "" {
			if w.stream.send(name, info) != nil {
				return
			}
			sent = info
		}
		if info.SHA256 == "" {
			w.ask()
		}
		select {
		case <-changed:
		case <-tick.C:
			if w.stream.alive() != nil {
				return
			}
		case <-w.stopping:
			w.end(sent, stoppingDetail)
			return
		case <-w.ctx.Done():
			return
		}
		if now, err := attestedCaller(w.ctx); err != nil || !now.IsSame(w.caller) {
			w.end(sent, unattestedDetail)
			return
		}
		var err error
		if info, changed, err = w.agent.Peek(w.caller, w.request); err != nil {
			sent.Code = endCode(err)
			w.end(sent, whyEnded(err))
			return
		}
	}
}

// ask asks the agent for a token, unless it already does for this watcher. The token goes nowhere: the next look
// shows what came of it.
func (w *watcher) ask() {
	if w.asks.Swap(true) {
		return
	}
	request := w.request
	request.Wait = w.aliveInterval // the agent then asks on while the back end fails; after that the watcher does
	w.asking.Go(func() {
		defer w.asks.Store(false)
		_, _ = w.agent.Token(w.ctx, w.caller, request)
	})
}

// unattestedDetail is the detail of the last event when the caller's attestation has ended.
const unattestedDetail = "who is calling could not be proved any more: connect again"

// stoppingDetail is the detail of the last event when the daemon goes down.
const stoppingDetail = "perceptd is going down; connect again"

// end sends why there will be no more events, beside the state that was sent last.
func (w *watcher) end(last api.WatchEvent, detail string) {
	last.Detail = detail
	_ = w.stream.send(api.EventEnded, last) // there is nothing to end if that does not arrive
}

func whyEnded(err error) string {
	var why *agent.Error
	switch {
	case errors.As(err, &why) && why.Stopping:
		return stoppingDetail
	case errors.As(err, &why):
		return why.Detail
	}
	return internalError().detail
}

// endCode is the code of why a watch ends; empty where the daemon is going down.
func endCode(err error) api.Code {
	var why *agent.Error
	if errors.As(err, &why) && !why.Stopping {
		return why.Code
	}
	return ""
}

// eventName returns the name of the event that leads from the state that was sent last, the zero one at first, to the
// state of now; empty when they are the same.
func eventName(before, now api.WatchEvent) string {
	first := before.Identity != now.Identity // or the configuration chooses another one by now
	switch {
	case now.SHA256 == "" && (first || before.SHA256 != ""):
		return api.EventExpired
	case now.SHA256 == "":
		return ""
	case first || now.SHA256 != before.SHA256:
		return api.EventToken
	case !samePermissions(before.Permissions, now.Permissions):
		return api.EventPermissions
	}
	return ""
}

// forecastThreshold is how far the moment must move at which a token is current at the latest, to be worth an event: it
// is computed anew each time, by a clock that may be slewed.
const forecastThreshold = time.Minute

// samePermissions reports whether two permissions are the same to a watcher.
func samePermissions(x, y api.Permissions) bool {
	moved := x.CurrentBy.Sub(y.CurrentBy).Abs()
	return x.State == y.State && x.Withheld == y.Withheld && x.Changed.Equal(y.Changed) && moved < forecastThreshold
}

// eventStreamContent is the type of a stream of server-sent events. net/http only reads it.
var eventStreamContent = []string{"text/event-stream"}

// stream is an answer of server-sent events (the HTML standard, 9.2).
type stream struct {
	w    http.ResponseWriter
	c    *http.ResponseController
	now  func() time.Time // the device's wall clock
	sent int
}

// open begins the answer, with the advice to wait 2 seconds before connecting again.
func (s *stream) open() error {
	h := s.w.Header()
	h["Content-Type"] = eventStreamContent
	h["Cache-Control"] = noStore
	_ = s.c.SetReadDeadline(time.Time{}) // a caller that listens sends nothing more
	return s.write([]byte("retry: 2000\n\n"))
}

// send sends one event, with the time. Its id counts from 1.
func (s *stream) send(name string, event api.WatchEvent) error {
	s.sent++
	event.Now = api.Time(s.now())
	text := fmt.Appendf(nil, "event: %s\nid: %d\ndata: ", name, s.sent)
	text = append(text, encode(event)...) // one line, with its end
	return s.write(append(text, '\n'))
}

// aliveInterval sends a comment, which shows each end that the other is there.
func (s *stream) alive() error { return s.write([]byte(": alive\n\n")) }

// write sends text at once. The error is that of a caller that has gone or takes nothing.
func (s *stream) write(text []byte) error {
	_ = s.c.SetWriteDeadline(time.Now().Add(transferTime)) // its error comes again from the write
	if _, err := s.w.Write(text); err != nil {
		return err
	}
	return s.c.Flush()
}
