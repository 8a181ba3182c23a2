package server

import (
	"fmt"
	"net/http"
	"sync"
	"time"

	"perceptd/agent/api"
)

// pace slows down whoever asks faster than honest callers do. Each caller has a budget that fills up
// steadily; who has used it up waits for it a moment, and is refused when it is overdrawn by more. So a
// flood costs the others little: its connections spend their time waiting.
//
// For each caller the time is kept at which its budget is full again (the generic cell rate algorithm), and
// only while that lies ahead.
type pace struct {
	mu    sync.Mutex // protects what follows
	full  map[quotaKey]time.Time
	sweep int       // entries at which those that are full are taken out
	swept time.Time // when that was done last
}

const (
	// patience is how long a request waits for its turn, and how long one that gets none is held before
	// it is refused.
	patience = time.Second

	// fewPaced is how many callers are kept without looking for those that can go.
	fewPaced = 256
	// mostPaced bounds the callers that are kept. More share one budget.
	mostPaced = 8192
	// sweepEvery bounds what looking for those that can go costs while there are many.
	sweepEvery = 100 * time.Millisecond
)

// rate is what a budget is.
type rate struct {
	perSecond, burst int
	patience         time.Duration // how long somebody may have to wait for his turn
}

// requests is the budget of one caller's requests.
func (l Limits) requests() rate { return rate{l.PerSecond, l.Burst, patience} }

// turn returns how long somebody of k who comes now has to wait, or false when he gets no turn: then that is how long
// until there is one to be had.
func (p *pace) turn(k quotaKey, now time.Time, r rate) (wait time.Duration, ok bool) {
	each := time.Second / time.Duration(r.perSecond)
	budget := each * time.Duration(r.burst)
	p.mu.Lock()
	defer p.mu.Unlock()
	full, known := p.full[k]
	if !known && len(p.full) >= max(fewPaced, p.sweep) {
		if now.Sub(p.swept) >= sweepEvery {
			p.forget(now)
		}
		if len(p.full) >= mostPaced {
			k = quotaKey{module: "*"} // which is no module's name
			full = p.full[k]
		}
	}
	if full.Before(now) {
		full = now
	}
	full = full.Add(each)
	wait = max(0, full.Sub(now)-budget)
	if wait > r.patience {
		return wait - r.patience, false
	}
	if p.full == nil {
		p.full = make(map[quotaKey]time.Time)
	}
	p.full[k] = full
	return wait, true
}

// forget takes out whose budget is full. The lock is held.
func (p *pace) forget(now time.Time) {
	for k, full := range p.full {
		if !full.After(now) {
			delete(p.full, k)
		}
	}
	p.sweep, p.swept = min(2*len(p.full), mostPaced), now
}

// admit makes the request wait for its turn, or returns why it gets none.
func (s *Server) admit(x *exchange) *fault {
	wait, ok := s.pace.turn(x.connection.key, time.Now(), s.Limits.orDefaults().requests())
	if ok && wait == 0 {
		return nil
	}
	held := wait
	if !ok {
		held = patience
	}
	timer := time.NewTimer(held)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-x.down: // then nobody is kept waiting
	case <-x.request.Context().Done():
	}
	if ok {
		return nil
	}
	f := busy(fmt.Sprintf("more than %d requests a second: keep the token that you have until it is nearly over, as expires_in says", s.Limits.orDefaults().PerSecond))
	f.retryAfter = max(wait, time.Second)
	return f
}

// paced reports whether a request counts. The daemon's look at its own health does not.
func (x *exchange) paced(to *route) bool {
	return to.socket != onAdmin && !(to.path == api.PathHealth && isOwn(x.caller) && x.request.Method == http.MethodGet)
}
