package tokencache

import (
	"slices"
	"time"
)

const (
	softWait       = 500 * time.Millisecond // how long a caller waits for more life than it must have
	softFetchEvery = 30 * time.Second       // how often, at most, callers' wishes for more life cause a fetch
	softFetchTop   = 5 * time.Minute        // and how seldom, at least
	idleAfter      = 24 * time.Hour         // a key that nobody asked for in this time is left to expire
)

// entry is what is known of one key. Times are boot times unless they say wall.
type entry struct {
	key       Key
	canonical string   // of the resource, as it is compared
	goesBy    []string // spellings of all that its resource goes by; nil: of itself alone
	prefetch  bool
	asked     time.Duration // of the last Get
	used      uint64        // rank of the last Get among all, for eviction

	token        *Token // shared with answers, so never changed; an empty one when there is none
	deadline     time.Duration
	unconfirmed  bool // deadline is the latest that it can be
	presumed     bool // deadline is nobody's word
	nominal      time.Duration
	receivedWall time.Time

	// Of the token held last, and kept when it is forgotten, since they tell of its rollover.
	digest         string // of its text
	receipt        receipt
	issued         IssueWindow   // zero: nothing tells it by the issuer's clock
	life           time.Duration // at its minting; 0: there never was one
	given          time.Duration // at its receipt, as the back end counted it; 0: it did not, or was proved wrong
	said           said          // of the token given last
	issuedAt       time.Duration // when that was
	received       time.Duration
	shown          time.Duration // when the back end last handed it out
	answered       time.Duration // when it last handed out any
	probedSince    time.Duration // since when it is probed for, not being current; never: it is not
	tries          int           // how often the back end was asked since, and had nothing newer
	advised        time.Duration // when the back end advises to ask again
	claims         Claims
	before         *Claims  // of the one before, where permissions differ
	audienceBefore string   // of the token before, where the one held has another; empty: it has not
	omitted        []string // claims that are left out of the one held, and others than of the one before

	policy    policyState // to the policy changes on record
	judgement judgement
	rollovers history
	learnt    learnt
	changed   chan struct{} // closed when what Look tells is different

	flight  *flight       // under way or queued, else nil
	next    time.Duration // when the schedule fetches, or never
	putOff  bool          // changes that left the token as it was have put that off once since the back end answered
	confirm time.Duration // by when it does, since whom the token speaks for is open; never: it is not
	claim   claim         // of a former principal, to be the current one
	probe   bool          // the next scheduled fetch looks for a rollover

	softFetchAfter time.Duration // no wish for more life causes a fetch before
	failures       int           // in a row
	failure        *FetchError   // the last one, with failures > 0
	waits          int           // of the schedule, each longer than the one before
	rests          time.Duration // the schedule leaves the key alone until then
	asks           int           // fetches that callers waited for and that failed, in a row
	failedUntil    time.Duration // no caller's miss causes a fetch before
	apart          int           // how often it was throttled again after another key was given a token: then it is set apart
	throttles      int           // 429 in a row
	othersGiven    uint64        // gate.given at the last of them
	fetches        int
	served         int64

	outcome   Outcome
	endedWall time.Time // of the last fetch
}

// softFetchPause is how long callers' wishes for more life cause no fetch after one that brought nothing newer.
func softFetchPause(held time.Duration) time.Duration {
	return min(max(softFetchEvery, held/2), softFetchTop)
}

// underWay reports whether a call for e has begun, and will end.
func (e *entry) underWay() bool { return e.flight != nil && e.flight.begun }

// wanted reports whether the schedule still works for e.
func (e *entry) wanted(now time.Duration) bool {
	return e.prefetch || now-e.asked <= idleAfter
}

// nominalOf bounds what a source says of a token's whole life.
func nominalOf(f Fetched) time.Duration {
	if f.Nominal <= 0 {
		return defaultNominal
	}
	return min(f.Nominal, longestNominal)
}

// replace puts a fetched token into e and returns what this shows of the rollover of the one before, if
// there was one. left is the life that the token has left at now, and m when it was minted.
func (e *entry) replace(f Fetched, m IssueWindow, left, begun, now time.Duration) (seen rollover, ok bool) {
	life := lifeOf(f.Token, m, left)
	born := now + left - life
	seen, ok = e.rolledOver(min(now, born+issueSlack))
	e.before = differing(e.claims, f.Token.Claims, ok || e.unconfirmed)
	e.token, e.nominal, e.claims, e.receivedWall = &f.Token, nominalOf(f), f.Token.Claims, e.endedWall
	e.issued, e.life, e.issuedAt = m, life, born
	e.received, e.shown, e.probedSince, e.deadline, e.tries = now, begun, never, now+left, 0
	e.unconfirmed, e.presumed = false, f.Presumed
	e.advised = longAgo
	if f.RefreshIn > 0 && f.RefreshIn < left {
		e.advised = now + f.RefreshIn
	}
	return seen, ok
}

// rolledOver tells between which shares of its life the token before stopped being handed out, given the
// boot time of the minting of the one that followed it.
func (e *entry) rolledOver(minted time.Duration) (rollover, bool) {
	if e.life == 0 || e.unconfirmed { // there was none, or nobody can tell how old it was
		return rollover{}, false
	}
	r := rollover{
		of: e.key, after: share(e.shown-e.issuedAt, e.life), by: share(min(minted-e.issuedAt, e.life+afterExpiry), e.life), watched: 1,
	}
	if e.probedSince != never {
		r.watched = share(e.probedSince-e.issuedAt, e.life)
	}
	return r, r.after < r.by
}

// differing returns the claims of the token before where they tell of other permissions than those of
// the one that followed it. What either leaves out is not known to differ.
func differing(before, after Claims, known bool) *Claims {
	same := func(name string, one, two []string) bool {
		return slices.Equal(one, two) || slices.Contains(before.Omitted, name) || slices.Contains(after.Omitted, name)
	}
	if !known || same("groups", before.Groups, after.Groups) && same("roles", before.Roles, after.Roles) && same("wids", before.WIDs, after.WIDs) {
		return nil
	}
	return &before
}

// fail remembers a failure, for which a caller waited or not, and plans the next try, for no sooner than held. A key that never had a token and is not
// to be prefetched is tried again only when somebody asks.
func (e *entry) fail(err *FetchError, asked bool, left, held, now time.Duration, roll float64) {
	e.failures++
	e.failure = err
	if err.extent() == OfSource { // how the source is left alone says when: it is not held against the key, nor does it end what is
		e.rests, e.failedUntil = max(e.rests, now), max(e.failedUntil, now)
	} else {
		e.waitsFor(err, asked, left, now, roll)
	}
	e.next = max(e.rests, held)
	if !e.prefetch && e.deadline == longAgo {
		e.next = never
	}
}

// waitsFor has the key wait for longer than after its failure before. Callers ask by a measure of their own: the first that
// comes after the schedule failed does so at once.
func (e *entry) waitsFor(err *FetchError, asked bool, left time.Duration, now time.Duration, roll float64) {
	e.waits++
	wait, told := backoff, min(err.RetryAfter, retryAfter)
	if err.lasts() {
		wait = longBackoff
	}
	e.rests = now + max(wait(e.waits, left, roll), told)
	if asked {
		e.asks++
	}
	e.failedUntil = now + max(askWait(err, e.asks, left), told)
}

// heals forgets all failures.
func (e *entry) heals() {
	e.failures, e.failure, e.waits, e.asks, e.rests, e.failedUntil = 0, nil, 0, 0, longAgo, longAgo
	e.throttles, e.apart = 0, 0
}

// remembered returns the failure that callers share until it is worth trying again, or nil.
func (e *entry) remembered(now time.Duration) *FetchError {
	if e.failure == nil || now >= e.failedUntil {
		return nil
	}
	return e.failure.withRetryAfter(min(e.failedUntil, max(e.next, now+time.Second)) - now)
}

// told returns e for a caller, for whom a call may be made after that time.
func (e *FetchError) withRetryAfter(after time.Duration) *FetchError {
	shared := *e
	shared.RetryAfter = after
	return &shared
}

// forget drops the token's text, which nobody may have any more.
func (e *entry) forget() { e.token = &Token{} }

// tell lets those know who watch e.
func (e *entry) notify() {
	close(e.changed)
	e.changed = make(chan struct{})
}
