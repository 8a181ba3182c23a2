package tokencache

import "time"

const (
	// quarantineFirst is how long the schedule first leaves a key in quarantine alone. It doubles up to longTop.
	quarantineFirst = time.Minute
	// quarantineShare bounds the pauses that the back end asks for when such keys are fetched: to one part in so many.
	quarantineShare = 4
)

// keyBackOff is the failures of a key, and how long they put off its fetches.
type keyBackOff struct {
	failures int         // in a row
	failure  *FetchError // the last one, with failures > 0
	waits    int         // of the schedule, each longer than the one before
	until    bootTime    // the schedule leaves the key alone until then
	asks     int         // fetches that callers waited for and that failed, in a row
	callers  bootTime    // no caller's miss causes a fetch before

	throttles   int    // 429 in a row
	othersGiven uint64 // fetchQueue.given at the last of them
	quarantines int    // how often it was throttled while others were given tokens; 0: not in quarantine
}

// fail takes in a failed fetch, for which a caller waited or not, of a key whose token has left to live. A failure of
// the source as a whole does not count against the key, and ends none of the key's own waits: the source's back-off
// says when it is over.
func (b *keyBackOff) fail(err *FetchError, asked bool, left time.Duration, now bootTime, roll float64) {
	b.failures++
	b.failure = err
	if err.extent() == OfSource {
		b.until, b.callers = max(b.until, now), max(b.callers, now)
	} else {
		b.lengthen(err, asked, left, now, roll)
	}
}

// lengthen makes the key wait longer than after the failure before. Callers have a count of their own: the first caller
// after a failure of the schedule asks at once.
func (b *keyBackOff) lengthen(err *FetchError, asked bool, left time.Duration, now bootTime, roll float64) {
	b.waits++
	wait, atLeast := backoff, min(err.RetryAfter, retryAfter)
	if err.lasts() {
		wait = longBackoff
	}
	b.until = now.add(max(wait(b.waits, left, roll), atLeast))
	if asked {
		b.asks++
	}
	b.callers = now.add(max(askWait(err, b.asks, left), atLeast))
}

// heal forgets all failures.
func (b *keyBackOff) heal() { *b = keyBackOff{until: longAgo, callers: longAgo} }

// yields reports whether the key leaves the first call after a pause to others, since its last two answers were 429.
func (b *keyBackOff) yields() bool { return b.throttles > 1 }

// quarantineLocked takes in a 429 for e. If e's last answer was a 429 too, while another key was given a token in
// between, then e is throttled for itself and goes into quarantine: it waits on its own, longer and longer, and no
// token of another key ends that. So the pauses that the back end asks for on its account do not take all the time
// there is.
func (c *Cache) quarantineLocked(e *entry, failure *FetchError, now bootTime) {
	if e.backOff.throttles > 0 && c.queue.given > e.backOff.othersGiven {
		e.backOff.quarantines++
	}
	e.backOff.throttles++
	e.backOff.othersGiven = c.queue.given
	if e.backOff.quarantines == 0 {
		return
	}
	b, atLeast := &e.backOff, min(failure.RetryAfter, retryAfter)
	b.until = max(b.until, now.add(max(atLeast, doubled(quarantineFirst, b.quarantines, longTop))))
	b.callers = max(b.callers, now.add(max(atLeast, doubled(askThrottleTop, b.quarantines, askLongTop))))
	c.queue.quarantine = max(c.queue.quarantine, now.add(quarantineShare*atLeast))
}

// quarantinedUntilLocked returns the boot time until which e's quarantine holds its calls; longAgo: it is in none.
func (c *Cache) quarantinedUntilLocked(e *entry) bootTime {
	if e.backOff.quarantines == 0 {
		return longAgo
	}
	return c.queue.quarantine
}

// BackOff is failures in a row as they are kept: of one key, or of the source as a whole. With it a daemon that crashes
// again and again asks no more often than one that runs. Durations are boot times.
type BackOff struct {
	Kind     string        `json:"kind"`   // one of kindWords
	Extent   string        `json:"extent"` // one of extentWords
	Detail   string        `json:"detail,omitempty"`
	Failures int           `json:"failures"`
	Waits    int           `json:"waits,omitempty"` // of the schedule, each longer than the one before; of a key
	Asks     int           `json:"asks,omitempty"`  // fetches that callers waited for and that failed; of a key
	Until    time.Duration `json:"until_ns"`        // the schedule makes no call before
	Callers  time.Duration `json:"callers_ns"`      // nor for a caller before
}

// The words of a BackOff, which are on the disk and do not change.
var (
	kindWords = map[Kind]string{
		Unreachable: "unreachable", Throttled: "throttled", IdentityNotFound: "identity-not-found", Refused: "refused",
		Malformed: "malformed",
	}
	extentWords = map[Extent]string{OfKey: "key", OfIdentity: "identity", OfSource: "source"}
)

// failingOf returns failures as they are kept, nil without any.
func failingOf(f *FetchError, failures int, until, callers bootTime) *BackOff {
	if failures == 0 {
		return nil
	}
	return &BackOff{
		Kind: kindWords[f.Kind], Extent: extentWords[f.Extent], Detail: f.Detail, Failures: failures,
		Until: time.Duration(until), Callers: time.Duration(callers),
	}
}

// export returns the failures of b as they are kept, nil without any.
func (b *keyBackOff) export() *BackOff {
	f := failingOf(b.failure, b.failures, b.until, b.callers)
	if f != nil {
		f.Waits, f.Asks = b.waits, b.asks
	}
	return f
}

// export returns the failures of r as they are kept, nil without any.
func (r *sourceBackOff) export() *BackOff {
	return failingOf(r.failure, r.failures, r.until, r.callers)
}

// failure returns the last failure.
func (f *BackOff) failure() *FetchError {
	kind, _ := meaning(kindWords, f.Kind)
	extent, _ := meaning(extentWords, f.Extent)
	return &FetchError{Kind: kind, Extent: extent, Detail: f.Detail}
}

// meaning returns what a word stands for, and whether it is known.
func meaning[T comparable](words map[T]string, word string) (t T, known bool) {
	for t, w := range words {
		if w == word {
			return t, true
		}
	}
	return t, false
}
