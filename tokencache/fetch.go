package tokencache

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// flight is one fetch of one key, from the moment it is queued until it has landed.
type flight struct {
	key       Key
	priority  priority
	asked     bootTime      // when it was queued
	started   bool          // the call is under way
	startedAt bootTime      // when the call began
	done      chan struct{} // closed when outcome and err are set

	expires     bootTime // when the held token expires, or has expired
	notBefore   bootTime // no call before: the back end would still give the token that has expired
	yields      bool     // its key was throttled the last two times: the others go first
	quarantined bool     // its key is in quarantine
	retries     int      // how often it was tried again, since it brought a token whose life was over
	insisted    bool     // a caller wants it even while a change spreads
	forgets     bool     // what it brings replaces the held token and what was learned of its life

	outcome  Outcome
	err      error
	switched *Switch // of principals, if it showed one
	dropped  string  // the digest of the token that it replaced, if it forgets
}

// failure returns why f brought nothing. Nil: f is nil, has not landed, or brought something.
func (f *flight) failure() error {
	if f == nil {
		return nil
	}
	select {
	case <-f.done:
		return f.err
	default:
		return nil
	}
}

// stoodDown reports whether f was taken out of the queue because a policy change began to spread. Most callers have
// waited for no fetch, and As allocates.
func (f *flight) stoodDown() bool { return f != nil && errors.As(f.failure(), new(*PostponedError)) }

// startFetchLocked returns e's flight, and queues one if there is none. A queued flight takes on the priority of a
// caller that joins it.
func (c *Cache) startFetchLocked(e *entry, cl priority, now bootTime) *flight {
	if f := e.flight; f != nil {
		if cl < f.priority {
			f.priority = cl
			c.dispatchSoonLocked(now)
		}
		return f
	}
	e.flight = &flight{
		key: e.key, priority: cl, asked: now, notBefore: longAgo, expires: e.token.deadline, done: make(chan struct{}),
		yields: e.backOff.yields(), quarantined: e.backOff.quarantines > 0,
	}
	if over := c.overLocked(e, now); over <= now { // a miss just after an expiry waits for what the schedule waits for
		e.flight.notBefore = over.add(afterExpiry)
	}
	e.schedule.softFetchAfter = now.add(softFetchEvery)
	c.queue.waiting = append(c.queue.waiting, e.flight)
	c.dispatchSoonLocked(now)
	return e.flight
}

// dispatchSoonLocked begins the calls that may begin now, and leaves the rest to the schedule.
func (c *Cache) dispatchSoonLocked(now bootTime) {
	c.dispatchLocked(now)
	if len(c.queue.waiting) > 0 {
		c.wakeSchedule()
	}
}

// dispatchLocked begins as many queued flights as the source may have now.
func (c *Cache) dispatchLocked(now bootTime) {
	for f := c.queue.begin(now); f != nil; f = c.queue.begin(now) {
		c.running.Go(func() { c.runFetch(f) })
	}
}

// runFetch makes the call. It runs on the cache's context, not on any caller's.
func (c *Cache) runFetch(f *flight) {
	ctx, cancel := context.WithTimeout(c.ctx, fetchTimeout)
	defer cancel()
	begun := c.now()
	fetched, err := c.fetch(ctx, f.key)
	if event, done := c.finishFetch(f, begun, fetched, err); done {
		c.observe(event)
	}
}

// finishFetch takes in a call's result and begins the next flights. It discards the result if the key was dropped
// meanwhile.
func (c *Cache) finishFetch(f *flight, begun bootTime, fetched Fetched, err error) (Event, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.now()
	e := c.entries[f.key]
	dropped := e == nil || e.flight != f
	var left time.Duration
	var failure *FetchError
	fetched = fetched.withoutStrangeTimes(c.clock.Wall())
	if err == nil && !dropped {
		c.detectStaticLocked(e, fetched, fetched.Left-now.sub(begun), now)
	}
	fetched.Counted = fetched.Counted && !c.static
	switch {
	case err != nil:
		failure = asFetchError(err)
	case dropped:
		c.passOverLocked(fetched, fetched.Left-now.sub(begun), begun, now)
	default:
		left, failure = c.receiveLocked(e, begun, now, fetched)
		if failure == nil && f.forgets {
			f.dropped = c.dropTokenLocked(e, now)
		}
	}
	c.sourceAnsweredLocked(f, now, failure)
	done := !dropped && !c.retryExpiredLocked(e, f, now, failure)
	if done {
		c.completeLocked(e, f, begun, now, fetched, left, failure)
	}
	c.dispatchLocked(now)
	c.wakeSchedule()
	if !done {
		return Event{}, false
	}
	event := Event{
		Key: f.key, Outcome: f.outcome, Err: f.err, Left: max(0, c.leftLocked(e, now)), Took: now.sub(begun),
		Permissions: c.permissionsLocked(e, now), Switch: f.switched,
		Simulated: err == nil && fetched.Token.Claims.Simulated(),
	}
	if f.outcome == Newer {
		event.Twin, event.Omitted = c.twinLocked(e), e.token.omitted
		event.AudienceBefore, event.Audience = e.token.audienceBefore, e.token.lastClaims.Audience
	}
	if next := c.nextLocked(e, now); next != never {
		event.Retry = next.sub(now)
	}
	close(f.done)
	return event, true
}

// receiveLocked returns the life left of a token fetched for e, or why it cannot be used.
func (c *Cache) receiveLocked(e *entry, begun, now bootTime, fetched Fetched) (
	left time.Duration, failure *FetchError,
) {
	m := issueWindowOf(fetched.Token, fetched.Left-now.sub(begun), fetched.Counted || c.clockTrusted())
	c.issuerClock.learn(fetched, m, c.clock.Wall(), begun, now)
	c.correctLocked(now)
	c.tombstones.cameAgain(fetched.Token.Text, c.onAt(now))
	left, failure = c.usable(e, fetched, min(fetched.Left, c.longestLocked(fetched, begun, now))-now.sub(begun), now)
	if fetched.Counted {
		c.readings.add(readingOf(fetched, fetched.Left-now.sub(begun), now))
	}
	return left, failure
}

// A back end that gives a token whose life is just over is asked again after a moment, each time a longer one: it rolls
// over in these seconds, its clock is not quite ours, and an answer takes time. A back end that has given nothing else
// for a while is not rolling over.
const (
	retryFirst          = 250 * time.Millisecond
	retryTop            = time.Second
	maxRetries          = 6
	retryFailuresAtMost = 2 // of a key's fetches in a row that failed

	// retryLeftAtMost is the life left of a held token that may be over before a waiting caller runs.
	retryLeftAtMost = 3 * time.Second
)

// retryExpiredLocked queues f again for its waiting callers, if f brought a token whose life was just over. It reports
// whether it did.
func (c *Cache) retryExpiredLocked(e *entry, f *flight, now bootTime, failure *FetchError) bool {
	if failure == nil || !failure.JustExpired || f.retries == maxRetries {
		return false
	}
	if c.leftLocked(e, now) > retryLeftAtMost || c.barredLocked(e, now) {
		return false
	}
	if e.backOff.failures >= retryFailuresAtMost && e.backOff.failure.extent() != OfSource {
		return false
	}
	f.retries++
	f.started, f.notBefore = false, now.add(doubled(retryFirst, f.retries, retryTop))
	e.last.fetches++
	c.queue.waiting = append(c.queue.waiting, f)
	return true
}

// completeLocked takes a flight's result into e, and plans e's next fetch.
func (c *Cache) completeLocked(
	e *entry, f *flight, begun, now bootTime, fetched Fetched, left time.Duration, failure *FetchError,
) {
	e.flight = nil
	e.last.fetches++
	e.last.endedWall = c.clock.Wall()
	if failure == nil {
		f.outcome, f.switched = c.takeLocked(e, fetched, left, c.leftLocked(e, now), begun, now)
	} else {
		if failure.Kind == Throttled {
			c.quarantineLocked(e, failure, now)
		} else {
			e.backOff.throttles = 0
		}
		e.fail(failure, f.priority == forCaller, e.token.deadline.sub(now), c.postponedUntilLocked(e, now), now,
			c.roll())
		again := e.backOff.callers
		if failure.extent() == OfSource {
			e.schedule.next = c.nextLocked(e, now)
			again = max(again, c.queue.backOff.callers)
		}
		f.outcome, f.err = Failed, failure.withRetryAfter(max(0, again.sub(now)))
	}
	e.last.outcome = f.outcome
}

// takeLocked accepts a fetched token, or keeps the held one, and plans the next fetch. left and held are the lives that
// the fetched and the held token have left at now; held may be 0. It also returns a switch of principals, if it is to
// be reported.
func (c *Cache) takeLocked(e *entry, f Fetched, left, held time.Duration, begun, now bootTime) (Outcome, *Switch) {
	e.backOff.heal()
	e.last.answered, e.schedule.putOff = begun, false
	e.schedule.tries++
	admitted, switched := c.admitLocked(e, f, left, held, now)
	simulated := f.Token.Claims.Simulated()
	before := e.token.lastClaims
	another := f.Token.Claims.Principal().Differs(before.Principal()) ||
		e.token.life > 0 && simulated != before.Simulated()
	outcome := Newer
	switch {
	case held > 0 && f.Token.Text.Equal(e.token.Text):
		outcome = Unchanged
		e.schedule.softFetchAfter = now.add(softFetchPause(held))
		c.updateLifeLocked(e, f, left, now)
		if e.token.unconfirmed {
			e.token.anchor(e.token.deadline)
		}
		e.token.shown, e.token.unconfirmed = begun, false
	case !admitted && simulated && !before.Simulated():
		outcome = Simulated
		c.passOverLocked(f, left, begun, now)
	case !admitted:
		outcome = Former
		c.passOverLocked(f, left, begun, now)
	case held > 0 && !another && c.olderLocked(e, f, left, now):
		outcome = Older
		c.passOverLocked(f, left, begun, now)
	default:
		first, again := c.tombstones.find(f.Token.Text)
		e.token.audienceBefore = audienceBefore(before, f.Token.Claims)
		e.token.omitted = omittedAnew(before, f.Token.Claims)
		if !e.token.Text.IsZero() && !f.Token.Text.Equal(e.token.Text) {
			c.tombstones.add(c.tombstoneOfLocked(e))
		}
		e.stretch = c.endedLocked(e, now)
		seen, ok := e.replace(f, c.receiptLocked(e, f, first, again, left, now), left, begun, now)
		e.token.given = c.lifeCountedLocked(f, left, begun, now)
		if again {
			e.token.received, e.token.receivedWall, e.token.given = first.received, first.receivedWall, first.given
		}
		switch {
		case another:
			c.forgetRolloversLocked(e)
		case again && held <= 0:
			outcome = Unchanged // it was forgotten meanwhile
		case ok:
			c.sawLocked(e, seen)
		}
		if held <= 0 && c.formerLocked(e) { // it is accepted since there is no other
			outcome = Former
			if simulated {
				outcome = Simulated
			}
		}
		c.judgeLocked(e)
		e.notify()
	}
	c.boundIssuerLocked(e, now)
	e.schedule.confirm = c.confirmLocked(e, now)
	c.planLocked(e, now)
	return outcome, switched
}

// passOverLocked remembers the receipt of a fetched token that does not become the held one. left is its life.
func (c *Cache) passOverLocked(f Fetched, left time.Duration, begun, now bootTime) {
	if f.Token.Text.IsZero() {
		return
	}
	r, known := c.tombstones.find(f.Token.Text)
	if !known {
		got, _ := c.receiptOf(f, tombstone{}, false, left, now)
		r = tombstone{
			digest: f.Token.Text.SHA256(), receipt: got,
			received: now, receivedWall: c.clock.Wall(), expiresOn: f.Token.ExpiresOn,
			given: c.lifeCountedLocked(f, left, begun, now), deadline: now.add(left),
		}
		if f.Presumed {
			r.deadline = never
		}
	}
	r.cameOn = c.onAt(now)
	c.tombstones.add(r)
}

// olderLocked reports whether a fetched token, which has left to live at now, was issued before the one that e holds. A
// token that carries policy changes which the held one lacks is not older, whatever its dates: a date may be wrong, a
// receipt is not.
func (c *Cache) olderLocked(e *entry, f Fetched, left time.Duration, now bootTime) bool {
	first, again := c.tombstones.find(f.Token.Text)
	r, m := c.receiptOf(f, first, again, left, now)
	if !issuedBefore(f.Token, m, nominalOf(f), *e.token.Token, e.token.issued, e.token.nominal) {
		return false
	}
	fetched := *e
	fetched.token.receipt, fetched.token.issued, fetched.changed = r, m, make(chan struct{})
	c.judgeLocked(&fetched)
	return fetched.policy.worst.worse(e.policy.worst) == fetched.policy.worst &&
		(fetched.policy.withheld() || !e.policy.withheld())
}

// usable returns the life left of a token fetched for e, or why it cannot be used.
func (c *Cache) usable(e *entry, fetched Fetched, left time.Duration, now bootTime) (time.Duration, *FetchError) {
	if fetched.Token.Text.IsZero() {
		return 0, &FetchError{Kind: Malformed, Detail: "the answer has no token"}
	}
	if left = c.leftOf(fetched.Token.ExpiresOn, left); left <= 0 {
		return 0, &FetchError{
			Kind: Malformed, JustExpired: -left <= JustExpired,
			Detail: fmt.Sprintf("the back end gave a token that expired %v ago", (-left).Round(time.Second)),
		}
	}
	if first, known := c.tombstoneLocked(e, fetched.Token.Text); known {
		if e.flight.forgets && fetched.Token.Text.Equal(e.token.Text) {
			first = first.dropped()
		}
		if left = c.believedLifeLocked(first, fetched, left, now); left <= 0 {
			return 0, &FetchError{
				Kind: Malformed, JustExpired: -left <= JustExpired,
				Detail: "the back end gave a token again whose life is over by what it said before, " +
					"and nothing bears out what it says now",
			}
		}
	}
	return left, nil
}

// JustExpired is how long ago a token may have expired for FetchError.JustExpired to be set.
const JustExpired = 10 * time.Second

// twinLocked returns another key with the same token as e: the back end does not distinguish the two. Nil: there is
// none.
func (c *Cache) twinLocked(e *entry) *Key {
	for _, o := range c.entries {
		if o != e && o.token.Text.Equal(e.token.Text) {
			twin := o.key
			return &twin
		}
	}
	return nil
}
