package tokencache

import "time"

const (
	quarantineFirst = time.Minute // the schedule asks for a key set apart no sooner; then after twice that, and so on up to longTop
	quarantineShare = 4           // of all time the pauses that the back end asks for when it is asked for such keys take one in so many
)

// keyBackOff is a key's failures, and how long they put its fetches off.
type keyBackOff struct {
	failures int         // in a row
	failure  *FetchError // the last one, with failures > 0
	waits    int         // of the schedule, each longer than the one before
	until    bootTime    // the schedule leaves the key alone until then
	asks     int         // fetches that callers waited for and that failed, in a row
	callers  bootTime    // no caller's miss causes a fetch before

	throttles   int    // 429 in a row
	othersGiven uint64 // fetchQueue.given at the last of them
	quarantines int    // how often it was throttled again after another key was given a token: then it is set apart
}

// fail takes in a failed fetch, for which a caller waited or not, of a key whose token has left to live. How the source is left alone says
// when a failure of the source is over: it is not counted against the key, and ends no wait of the key's own.
func (b *keyBackOff) fail(err *FetchError, asked bool, left time.Duration, now bootTime, roll float64) {
	b.failures++
	b.failure = err
	if err.extent() == OfSource {
		b.until, b.callers = max(b.until, now), max(b.callers, now)
	} else {
		b.lengthen(err, asked, left, now, roll)
	}
}

// lengthen makes the key wait for longer than after the failure before. Callers have a count of their own: the first that comes after the
// schedule failed asks at once.
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

// yields reports whether the key leaves the first call after a pause to others: its last two answers were 429.
func (b *keyBackOff) yields() bool { return b.throttles > 1 }

// setApartLocked takes in a 429 for e. A key whose last answer was one too, while another was given a token in between, is throttled
// for itself, and is set apart: it waits by a measure of its own, which no token of others ends, so that the pauses that the back
// end asks for on its account are not all there is.
func (c *Cache) quarantineLocked(e *entry, failure *FetchError, now bootTime) {
	if e.backOff.throttles > 0 && c.queue.given > e.backOff.othersGiven {
		e.backOff.quarantines++
	}
	e.backOff.throttles++
	e.backOff.othersGiven = c.queue.given
	if e.backOff.quarantines == 0 {
		return
	}
	told := min(failure.RetryAfter, retryAfter)
	e.backOff.until = max(e.backOff.until, now.add(max(told, doubled(quarantineFirst, e.backOff.quarantines, longTop))))
	e.backOff.callers = max(e.backOff.callers, now.add(max(told, doubled(askThrottleTop, e.backOff.quarantines, askLongTop))))
	c.queue.quarantine = max(c.queue.quarantine, now.add(quarantineShare*told))
}

// apartLocked returns the boot time before which e is not asked for since it is set apart; longAgo: it is not.
func (c *Cache) quarantinedUntilLocked(e *entry) bootTime {
	if e.backOff.quarantines == 0 {
		return longAgo
	}
	return c.queue.quarantine
}

// BackOff is what is remembered of failures in a row: of one key, or of the source as a whole. So that a daemon that crashes
// again and again asks no more often than one that does not. Durations are boot times.
type BackOff struct {
	Kind     string        `json:"kind"`   // one of kindWords
	Extent   string        `json:"extent"` // one of extentWords
	Detail   string        `json:"detail,omitempty"`
	Failures int           `json:"failures"`
	Waits    int           `json:"waits,omitempty"` // of the schedule, each longer than the one before; of a key
	Asks     int           `json:"asks,omitempty"`  // fetches that callers waited for and that failed; of a key
	Until    time.Duration `json:"until_ns"`        // the schedule makes no call before
	Callers  time.Duration `json:"callers_ns"`      // and nobody does before for a caller
}

// The words of a BackOff, which are on the disk and do not change.
var (
	kindWords = map[Kind]string{
		Unreachable: "unreachable", Throttled: "throttled", IdentityNotFound: "identity-not-found", Refused: "refused", Malformed: "malformed",
	}
	extentWords = map[Extent]string{OfKey: "key", OfIdentity: "identity", OfSource: "source"}
)

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

func (f *BackOff) failure() *FetchError {
	kind, _ := meaning(kindWords, f.Kind)
	extent, _ := meaning(extentWords, f.Extent)
	return &FetchError{Kind: kind, Extent: extent, Detail: f.Detail}
}

// meaning returns what a word stands for, and whether it stands for anything.
func meaning[T comparable](words map[T]string, word string) (t T, known bool) {
	for t, w := range words {
		if w == word {
			return t, true
		}
	}
	return t, false
}
