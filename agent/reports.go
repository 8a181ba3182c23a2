package agent

import (
	"sync"
	"time"

	"golang.org/x/time/rate"

	"perceptd/agent/grants"
	"perceptd/tokencache"
)

const (
	// Reports of refused tokens that a caller may make: so many at once, and one more each time that
	// reportEvery is over.
	reportBurst = 5
	reportEvery = 10 * time.Second

	// challengeEvery is how often, at most, claims challenges cause a fetch of one key.
	challengeEvery = 30 * time.Second
)

// reports is what is remembered of callers' reports of refused tokens: what limits them, and what a
// technician wants to see. It holds no more callers and keys than the grants name.
type reports struct {
	mu      sync.Mutex // protects what follows
	callers map[grants.Subject]*rate.Limiter
	refused map[tokencache.Key]refusedToken
	fetched map[tokencache.Key]time.Duration // boot time of the last fetch for a challenge
}

// refusedToken is a token that a resource refused.
type refusedToken struct {
	digest string
	on     time.Time
}

// admit returns how long a caller has to wait before it may report, 0 for not at all.
func (r *reports) admit(caller grants.Subject) time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.callers == nil {
		r.callers = make(map[grants.Subject]*rate.Limiter)
	}
	limit := r.callers[caller]
	if limit == nil {
		limit = rate.NewLimiter(rate.Every(reportEvery), reportBurst)
		r.callers[caller] = limit
	}
	reservation := limit.Reserve()
	wait := reservation.Delay()
	if wait > 0 {
		reservation.Cancel()
	}
	return wait
}

// note remembers that a resource refused the token of that digest.
func (r *reports) note(key tokencache.Key, digest string, on time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.refused == nil {
		r.refused = make(map[tokencache.Key]refusedToken)
	}
	r.refused[key] = refusedToken{digest, on}
}

// refusedOn returns when a resource last refused the token of that digest; zero for never.
func (r *reports) refusedOn(key tokencache.Key, digest string) time.Time {
	r.mu.Lock()
	defer r.mu.Unlock()
	if last := r.refused[key]; digest != "" && last.digest == digest {
		return last.on
	}
	return time.Time{}
}

// mayFetch reports whether a challenge may cause a fetch of key now, and counts it.
func (r *reports) mayFetch(key tokencache.Key, now time.Duration) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.fetched == nil {
		r.fetched = make(map[tokencache.Key]time.Duration)
	}
	if last, ok := r.fetched[key]; ok && now-last < challengeEvery {
		return false
	}
	r.fetched[key] = now
	return true
}

// retain forgets the callers and keys that no grant names any more.
func (r *reports) retain(rules *ruleset) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for caller := range r.callers {
		if !rules.HasGrants(caller) {
			delete(r.callers, caller)
		}
	}
	for key := range r.refused {
		if !rules.Allows(key) {
			delete(r.refused, key)
		}
	}
	for key := range r.fetched {
		if !rules.Allows(key) {
			delete(r.fetched, key)
		}
	}
}
