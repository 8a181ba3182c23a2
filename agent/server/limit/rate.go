package limit

import (
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// Rate slows down callers that come faster than honest ones do. Each key has a budget that fills up steadily. A caller
// that has used it up waits a moment for it, and is refused when it would have to wait longer than MaxWait. So a flood
// costs the others little: its connections spend their time waiting.
//
// Set the fields before the first use.
type Rate struct {
	PerSecond int           // of one key, in the long run
	Burst     int           // of one key at once
	MaxWait   time.Duration // how long a caller may have to wait for its turn

	mu sync.Mutex // protects what follows
	// of Reserve's times: one that comes late, or by a clock that was set back, fills no budget twice
	latest   time.Time
	limiters map[Key]*rate.Limiter
	sweepAt  int       // number of limiters at which those with a full budget are removed
	swept    time.Time // when that was last done
}

const (
	// fewLimiters is how many keys are kept without looking for those that can go.
	fewLimiters = 256
	// mostLimiters bounds the keys that are kept. More share one budget.
	mostLimiters = 8192
	// sweepEvery bounds what looking for those that can go costs while there are many.
	sweepEvery = 100 * time.Millisecond
)

// othersKey is the key of all that come while mostLimiters are kept. It is no module's name.
var othersKey = Key{Module: "*"}

// Reserve takes one out of k's budget and returns how long the caller has to wait for it. It reports false, and takes
// nothing, when that is longer than MaxWait; then wait is how long it is until a call would be granted.
func (r *Rate) Reserve(k Key, now time.Time) (wait time.Duration, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if now.Before(r.latest) {
		now = r.latest
	}
	r.latest = now
	reservation := r.limiterLocked(k, now).ReserveN(now, 1)
	wait = reservation.DelayFrom(now)
	if wait > r.MaxWait {
		reservation.CancelAt(now)
		return wait - r.MaxWait, false
	}
	return wait, true
}

// limiterLocked returns the limiter of k.
func (r *Rate) limiterLocked(k Key, now time.Time) *rate.Limiter {
	limiter := r.limiters[k]
	if limiter == nil && len(r.limiters) >= max(fewLimiters, r.sweepAt) {
		if now.Sub(r.swept) >= sweepEvery {
			r.sweepLocked(now)
		}
		if len(r.limiters) >= mostLimiters {
			k = othersKey
			limiter = r.limiters[k]
		}
	}
	if limiter == nil {
		limiter = rate.NewLimiter(rate.Limit(r.PerSecond), r.Burst)
		if r.limiters == nil {
			r.limiters = make(map[Key]*rate.Limiter)
		}
		r.limiters[k] = limiter
	}
	return limiter
}

// sweepLocked removes the limiters whose budget is full: a new one is no different.
func (r *Rate) sweepLocked(now time.Time) {
	for k, limiter := range r.limiters {
		if limiter.TokensAt(now) >= float64(limiter.Burst()) {
			delete(r.limiters, k)
		}
	}
	r.sweepAt, r.swept = min(2*len(r.limiters), mostLimiters), now
}
