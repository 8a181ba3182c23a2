package iothub

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"net/http"
	"sync"
	"time"

	"go.uber.org/zap"

	"perceptd/agent/api"
	"perceptd/agent/iothub/link"
)

const (
	// defaultReportEvery is how far apart reports are at least.
	defaultReportEvery = 30 * time.Second
	// defaultReportSpread is over which time the reports of a fleet are spread.
	defaultReportSpread = time.Minute
	// reportLook is how often the status is looked at without a notice.
	reportLook = 5 * time.Minute
	// reportPause is from a notice to the look at the status.
	reportPause = time.Second
	// maxReportPause bounds the random part of the wait after a report that failed.
	maxReportPause = 15 * time.Minute
	// gathersFor is how long news that can wait is gathered, in times that reports are apart at least: an hour.
	gathersFor = 120
	// shortReports is for how long reports stay short after the hub refused a longer one.
	shortReports = 24 * time.Hour
)

// reporterOptions is what a reporter is made of.
type reporterOptions struct {
	Status func() api.Status // the whole status
	// Send merges a patch into the reported properties and returns their version. The error is a *link.RefusedError
	// where the hub refused it, and link.ErrOffline where nothing was sent.
	Send    func(ctx context.Context, patch json.RawMessage) (version int64, err error)
	Every   time.Duration  // how far apart reports are at least; zero: 30 s
	Spread  time.Duration  // a report waits for a random part of this; zero: a minute
	Roll    func() float64 // randomness in [0, 1); nil: math/rand
	Log     *zap.Logger
	Changed func() // what status returns may differ; it does not block
}

// reporter keeps "percept" in the reported properties as it should be. What changes within one wait is one message.
type reporter struct {
	options reporterOptions
	end     context.CancelFunc
	loop    sync.WaitGroup
	wake    chan struct{}

	mu       sync.Mutex      // protects what follows
	ack      *desiredAck     // nil: no desired properties were read yet
	read     *readProperties // what the loop has not looked at; nil: nothing
	moved    bool            // what the loop knows is of another identity of this device
	reported time.Time
	refused  string
}

// readProperties is what the hub was read to have.
type readProperties struct {
	percept map[string]any // under that name; empty: nothing
	version int64
}

func newReporter(o reporterOptions) *reporter {
	o.Every, o.Spread = cmp.Or(o.Every, defaultReportEvery), cmp.Or(o.Spread, defaultReportSpread)
	if o.Roll == nil {
		o.Roll = rand.Float64
	}
	ctx, end := context.WithCancel(context.Background())
	r := &reporter{options: o, end: end, wake: make(chan struct{}, 1)}
	r.loop.Go(func() { r.run(ctx) })
	return r
}

func (r *reporter) close() {
	r.end()
	r.loop.Wait()
}

// notice says that the status may differ.
func (r *reporter) notice() { poke(r.wake) }

// acknowledge has reported what became of the desired properties, and whether that is on the disk, in one message with
// what else is new.
func (r *reporter) acknowledge(of api.DesiredStatus, isKept bool) {
	ack := desiredAck{Version: of.Version, Status: ackApplied, Reason: of.Refused, Denies: of.Denies, NoRoom: of.NoRoom,
		NotKept: !isKept, Idle: of.Idle}
	if of.Refused != "" {
		ack.Status = ackRefused
	}
	r.mu.Lock()
	r.ack = &ack
	r.mu.Unlock()
	r.notice()
}

// move says that the device has another identity at the hub: what was reported as the one before says nothing of it.
// What the hub has is read next.
func (r *reporter) move() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ack, r.read, r.reported, r.refused, r.moved = nil, nil, time.Time{}, "", true
}

// connected says what the hub was read to have, and in which version: after each connect, and whenever the twin was
// read again.
func (r *reporter) connected(reported json.RawMessage, version int64) {
	var all map[string]any
	if err := json.Unmarshal(reported, &all); err != nil {
		return // the link has looked at it
	}
	read := readProperties{percept: map[string]any{}, version: version}
	if percept, there := all["percept"]; there {
		read.percept["percept"] = percept
	}
	r.mu.Lock()
	r.read = &read
	r.mu.Unlock()
	r.notice()
}

// status returns when the hub last took a report, and why it refused the last one; empty: it did not.
func (r *reporter) status() (reported time.Time, refused string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.reported, r.refused
}

// reporting is what the loop knows.
type reporting struct {
	has     map[string]any // what the hub has, as an object with "percept"; nil: not known, so that nothing is sent
	version int64          // of the reported properties, after the last patch that the hub took
	patch   map[string]any // that patch
	last    *report

	limit    int       // of the next report, in bytes
	longer   time.Time // when that is maxReport again
	failures int       // in a row
	soonest  time.Time // of the next report
	due      time.Time // of the report that is to be sent; zero: none is
	gathers  bool      // all that it would say can wait
}

// run sends a report whenever there is something to say.
func (r *reporter) run(ctx context.Context) {
	state := reporting{limit: maxReport}
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-r.wake:
			if !pause(ctx, reportPause) { // what comes together is looked at once
				return
			}
		case <-timer.C:
		}
		r.take(&state)
		timer.Reset(r.step(ctx, &state))
	}
}

// step sends a report if it is due, and returns how long it is until the next step.
func (r *reporter) step(ctx context.Context, state *reporting) time.Duration {
	patch, now := r.compare(state), time.Now()
	if patch == nil {
		state.due = time.Time{}
		return reportLook
	}
	waits := canWait(state.has, patch)
	if state.due.IsZero() || state.gathers && !waits {
		state.gathers = waits
		state.due = later(state.soonest, now.Add(time.Duration(r.options.Roll()*float64(r.options.Spread))))
		if waits {
			state.due = state.due.Add(gathersFor * r.options.Every)
		}
	}
	if wait := state.due.Sub(now); wait > 0 {
		return min(wait, reportLook)
	}
	r.send(ctx, state, patch)
	state.due = time.Time{}
	return 0
}

// canWait reports whether all that a patch says is that tokens were renewed, or that fewer of them lack a policy
// change, and still some do. Each token is renewed at a time of its own, so that each would be a message.
func canWait(has, patch map[string]any) bool {
	before, _ := has["percept"].(map[string]any)
	now, _ := patch["percept"].(map[string]any)
	for name := range now {
		if name != "tokens" && name != "summary" {
			return false
		}
	}
	counted, _ := before["summary"].(map[string]any)
	counts, _ := now["summary"].(map[string]any)
	for name, count := range counts {
		was, _ := counted[name].(float64)
		is, _ := count.(float64)
		isLacking := name == "stale" || name == "uncertain" || name == "withheld"
		if !isLacking || is == 0 || is > was {
			return false
		}
	}
	return before != nil && now != nil
}

func later(x, y time.Time) time.Time {
	if x.After(y) {
		return x
	}
	return y
}

// take has what was read count as what the hub has.
func (r *reporter) take(state *reporting) {
	r.mu.Lock()
	read, moved := r.read, r.moved
	r.read, r.moved = nil, false
	r.mu.Unlock()
	if moved {
		*state = reporting{limit: maxReport, soonest: state.soonest}
	}
	if read == nil {
		return
	}
	if state.has == nil { // the first of this connection
		state.last = readReport(read.percept["percept"])
	}
	state.has = read.percept
	if read.version < state.version { // it was read before the last patch, or the identity was made anew
		state.has = doubted(state.has, state.patch)
	}
	state.version = read.version
}

// compare returns what is to be sent; nil: nothing.
func (r *reporter) compare(state *reporting) map[string]any {
	if state.has == nil {
		return nil
	}
	if !time.Now().Before(state.longer) {
		state.limit = maxReport
	}
	want := r.want(state)
	if before, _ := state.has["percept"].(map[string]any); before != nil {
		if counts, there := before["requests"]; there { // they are no news
			want["requests"] = counts
		}
	}
	return mergePatch(state.has, map[string]any{"percept": want})
}

// want returns what is to be reported, without the counts of requests.
func (r *reporter) want(state *reporting) map[string]any {
	r.mu.Lock()
	ack := r.ack
	r.mu.Unlock()
	status := r.options.Status()
	if ack == nil && state.last != nil {
		ack = state.last.Desired // of the process before, until the twin was read
	}
	state.last = describe(&status, ack, state.last, state.limit)
	return decoded(state.last)
}

// decoded returns a report as encoding/json decodes it.
func decoded(v any) map[string]any {
	text, err := json.Marshal(v)
	if err != nil {
		panic(err) // it is of ours
	}
	var all map[string]any
	if err := json.Unmarshal(text, &all); err != nil {
		panic(err)
	}
	return all
}

// send sends a patch, and the counts of requests with it.
func (r *reporter) send(ctx context.Context, state *reporting, patch map[string]any) {
	if percept, ok := patch["percept"].(map[string]any); ok {
		status := r.options.Status()
		percept["requests"] = decoded(requestsCount{status.Requests, minute(status.Now)})
	}
	text, err := json.Marshal(patch)
	if err != nil {
		panic(err)
	}
	version, err := r.options.Send(ctx, text)
	now := time.Now()
	var refused *link.RefusedError
	switch {
	case err == nil:
		state.has, state.version, state.patch, state.failures = merged(state.has, patch), version, patch, 0
	case errors.Is(err, link.ErrOffline):
		state.has = nil // the next connection reads it
		return
	case errors.As(err, &refused):
		state.failures++
		if refused.Status == http.StatusBadRequest {
			state.limit = max(minReport, state.limit/2) // others of the device may take the room
			state.longer = now.Add(shortReports)
		}
	default:
		state.failures++
		state.has = doubted(state.has, patch)
	}
	state.soonest = now.Add(r.pause(state.failures))
	r.note(err)
}

// pause returns how long it is until the next report, after so many that failed in a row.
func (r *reporter) pause(failures int) time.Duration {
	if failures == 0 {
		return r.options.Every
	}
	bound := min(r.options.Every<<min(failures, 16), maxReportPause)
	return r.options.Every + time.Duration(r.options.Roll()*float64(bound))
}

// note remembers how a report ended. The log has what is news.
func (r *reporter) note(err error) {
	r.mu.Lock()
	before := r.refused
	if r.refused = ""; err != nil {
		r.refused = err.Error()
	} else {
		r.reported = api.Time(time.Now())
	}
	after := r.refused
	r.mu.Unlock()
	if after != before && err != nil {
		r.options.Log.Warn("the reported properties were not taken by IoT Hub, and are sent again", zap.Error(err))
	}
	r.options.Changed()
}
