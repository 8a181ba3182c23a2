package tokencache

import "time"

const (
	apartFirst = time.Minute // the schedule asks for a key set apart no sooner; then after twice that, and so on up to longTop
	apartShare = 4           // of all time the pauses that the back end asks for when it is asked for such keys take one in so many
)

// setApartLocked takes in a 429 for e. A key whose last answer was one too, while another was given a token in between, is throttled
// for itself, and is set apart: it waits by a measure of its own, which no token of others ends, so that the pauses that the back
// end asks for on its account are not all there is.
func (c *Cache) setApartLocked(e *entry, failure *FetchError, now time.Duration) {
	if e.throttles > 0 && c.queue.given > e.othersGiven {
		e.apart++
	}
	e.throttles++
	e.othersGiven = c.queue.given
	if e.apart == 0 {
		return
	}
	told := min(failure.RetryAfter, retryAfter)
	e.rests = max(e.rests, now+max(told, doubled(apartFirst, e.apart, longTop)))
	e.failedUntil = max(e.failedUntil, now+max(told, doubled(askThrottleTop, e.apart, askLongTop)))
	c.queue.apart = max(c.queue.apart, now+apartShare*told)
}

// yields reports whether e leaves the first call after a pause to others: its last two answers were 429.
func (e *entry) yields() bool { return e.throttles > 1 }

// apartLocked returns the boot time before which e is not asked for since it is set apart; longAgo: it is not.
func (c *Cache) apartLocked(e *entry) time.Duration {
	if e.apart == 0 {
		return longAgo
	}
	return c.queue.apart
}
