package tokencache

import "time"

const (
	softWait  = 500 * time.Millisecond // how long a caller waits for more life than it must have
	wishEvery = 30 * time.Second       // how often, at most, callers' wishes for more life cause a fetch
	wishTop   = 5 * time.Minute        // and how seldom, at least
	idleAfter = 24 * time.Hour         // a key that nobody asked for in this time is left to expire
)

// entry is what is known of one key. Times are boot times unless they say wall.
type entry struct {
	key      Key
	prefetch bool
	asked    time.Duration // of the last Get
	used     uint64        // rank of the last Get among all, for eviction

	token        *Token // shared with answers, so never changed; an empty one when there is none
	deadline     time.Duration
	nominal      time.Duration
	receivedWall time.Time

	flight *flight       // under way or queued, else nil
	next   time.Duration // when the schedule fetches, or never
	probe  bool          // the next scheduled fetch looks for a rollover

	wishes      time.Duration // no wish for more life causes a fetch before
	failures    int           // in a row
	failure     *FetchError   // the last one, with failures > 0
	failedUntil time.Duration // no caller's miss causes a fetch before
	fetches     int
	served      int64

	outcome   Outcome
	endedWall time.Time // of the last fetch
}

// underWay reports whether a call for e has begun, and will end.
func (e *entry) underWay() bool { return e.flight != nil && e.flight.begun }

// wanted reports whether the schedule still works for e.
func (e *entry) wanted(now time.Duration) bool {
	return e.prefetch || now-e.asked <= idleAfter
}

// mintedBefore reports whether t was minted before o. Expiry less nominal life stands in for the
// minting where a token does not tell it.
func mintedBefore(t Token, nominal time.Duration, o Token, oNominal time.Duration) bool {
	if !t.Claims.IssuedAt.IsZero() && !o.Claims.IssuedAt.IsZero() {
		return t.Claims.IssuedAt.Before(o.Claims.IssuedAt)
	}
	return t.ExpiresOn.Add(-nominal).Before(o.ExpiresOn.Add(-oNominal))
}

// nominalOf bounds what a source says of a token's whole life.
func nominalOf(f Fetched) time.Duration {
	if f.Nominal <= 0 {
		return defaultNominal
	}
	return min(f.Nominal, longestNominal)
}

// settle takes a fetched token in, or keeps the one that is there, and plans the next fetch.
// left and held are the lives that the fetched and the held token have left at now; held may be 0.
func (e *entry) settle(f Fetched, left, held, now time.Duration, roll float64) Outcome {
	e.failures, e.failure, e.failedUntil = 0, nil, longAgo
	nominal := nominalOf(f)
	switch {
	case held > 0 && f.Token.Text.Equal(e.token.Text):
		e.wishes = now + min(max(wishEvery, held/2), wishTop)
		e.deadline = min(e.deadline, now+left)
		e.probe, e.next = true, now+nextTry(min(held, left), roll)
		return Unchanged
	case held > 0 && mintedBefore(f.Token, nominal, *e.token, e.nominal):
		e.probe, e.next = true, now+nextTry(held, roll)
		return Older
	}
	e.token, e.nominal, e.receivedWall = &f.Token, nominal, e.endedWall
	e.deadline = now + left
	e.probe, e.next = false, now+firstRefresh(left, f.RefreshIn, roll)
	return Newer
}

// fail remembers a failure and plans the next try. A key that never had a token and is not to be
// prefetched is tried again only when somebody asks.
func (e *entry) fail(err *FetchError, left time.Duration, now time.Duration, roll float64) {
	e.failures++
	e.failure = err
	wait := max(backoff(e.failures, left, roll), min(err.RetryAfter, retryAfter))
	e.next = now + wait
	if !e.prefetch && e.deadline == longAgo {
		e.next = never
	}
	e.failedUntil = now + max(min(wait, urgentTop), min(err.RetryAfter, retryAfter))
	if err.Kind == IdentityNotFound || err.Kind == Refused {
		e.failedUntil = now + max(wait, wishEvery)
	}
}

// remembered returns the failure that callers share until it is worth trying again, or nil.
func (e *entry) remembered(now time.Duration) *FetchError {
	if e.failure == nil || now >= e.failedUntil {
		return nil
	}
	shared := *e.failure
	if shared.RetryAfter > 0 {
		shared.RetryAfter = e.failedUntil - now
	}
	return &shared
}

// forget drops the token's text, which nobody may have any more.
func (e *entry) forget() { e.token = &Token{} }
