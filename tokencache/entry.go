package tokencache

import (
	"slices"
	"time"
)

const (
	softWait       = 500 * time.Millisecond // how long a caller waits for more life than it must have
	softFetchEvery = 30 * time.Second       // how often, at most, callers' soft needs cause a fetch
	softFetchTop   = 5 * time.Minute        // and how seldom, at least
	idleAfter      = 24 * time.Hour         // a key that is not asked for in this time is left to expire
)

// entry is all that the cache knows of one key.
type entry struct {
	key       Key
	canonical string   // of the resource, as it is compared
	goesBy    []string // canonical names of its resource; nil: canonical alone
	anyName   bool     // its resource may go by any other name as well
	prefetch  bool
	asked     bootTime // of the last Get
	used      uint64   // rank of the last Get among all, for eviction
	served    int64    // answers given by Get

	token    heldToken
	schedule schedule
	flight   *flight // under way or queued, else nil
	last     lastFetch
	backOff  keyBackOff

	policy    policyState // what the policy changes on record say of the token
	judgement judgement
	claim     claim // of a former principal, to be the current one
	rollovers history
	learned   learned
	stretch   Stretch       // in which the token before this one lacked a change
	changed   chan struct{} // closed when what Peek returns changes
}

// heldToken is the token that a key holds. When it is forgotten, all but the token itself is kept: the next token then
// shows when the back end rolled over.
type heldToken struct {
	*Token // shared with answers, so never changed; an empty one when there is none

	deadline     bootTime // when it expires; longAgo: there never was one
	unconfirmed  bool     // deadline is the latest that it can be
	presumed     bool     // deadline is a guess: see Fetched
	nominal      time.Duration
	receivedWall time.Time

	digest   string // of its text
	receipt  receipt
	issued   IssueWindow   // zero: not known by the issuer's clock
	life     time.Duration // when it was issued; 0: there never was one
	given    time.Duration // when it was received, as the back end counted it; 0: it did not, or was proved wrong
	issuedAt bootTime
	received bootTime
	shown    bootTime // when the back end last handed it out

	lastClaims     Claims   // its claims, also when it is forgotten
	before         *Claims  // of the token before, if permissions differ
	audienceBefore string   // of the token before, if this one has another; else empty
	omitted        []string // claims that this one omits, if the one before omitted others
}

// schedule is when a key is fetched.
type schedule struct {
	next           bootTime // never: it is not
	confirm        bootTime // it is by then, since it is open whom the token speaks for; never: that is not open
	putOff         bool     // changes that left the token as it was have put next off once since the back end answered
	probe          bool     // the next fetch looks for a rollover
	probedSince    bootTime // since when the token is probed for, not being current; never: it is not
	tries          int      // fetches since the token was received, none of which brought a newer one
	advised        bootTime // when the back end advises to ask again
	softFetchAfter bootTime // no caller's soft need causes a fetch before
}

// lastFetch is what the last fetches of a key brought.
type lastFetch struct {
	outcome   Outcome
	endedWall time.Time
	answered  bootTime // when the back end last handed out a token, whichever
	said      said     // of the token given last
	fetches   int      // in all
}

// softFetchPause returns how long callers' soft needs cause no further fetch after one that brought nothing newer.
func softFetchPause(held time.Duration) time.Duration {
	return min(max(softFetchEvery, held/2), softFetchTop)
}

// underWay reports whether a call for e has begun and not ended.
func (e *entry) underWay() bool { return e.flight != nil && e.flight.started }

// wanted reports whether the schedule still fetches e.
func (e *entry) wanted(now bootTime) bool {
	return e.prefetch || now.sub(e.asked) <= idleAfter
}

// nominalOf returns the whole life that a source says a token has, within bounds.
func nominalOf(f Fetched) time.Duration {
	if f.Nominal <= 0 {
		return defaultNominal
	}
	return min(f.Nominal, longestNominal)
}

// replace puts a fetched token into e. It returns what this shows of the rollover of the token before, if there was
// one. left is the life that the token has left at now, and m is when it was issued.
func (e *entry) replace(f Fetched, m IssueWindow, left time.Duration, begun, now bootTime) (seen rollover, ok bool) {
	life := lifeOf(f.Token, m, left)
	issuedAt := now.add(left - life)
	seen, ok = e.rolledOver(min(now, issuedAt.add(issueSlack)))
	t := &e.token
	t.before = differing(t.lastClaims, f.Token.Claims, ok || t.unconfirmed)
	t.Token, t.nominal, t.lastClaims, t.receivedWall = &f.Token, nominalOf(f), f.Token.Claims, e.last.endedWall
	t.issued, t.life, t.issuedAt = m, life, issuedAt
	t.received, t.shown, t.deadline = now, begun, now.add(left)
	t.unconfirmed, t.presumed = false, f.Presumed
	e.schedule.probedSince, e.schedule.tries = never, 0
	e.schedule.advised = longAgo
	if f.RefreshIn > 0 && f.RefreshIn < left {
		e.schedule.advised = now.add(f.RefreshIn)
	}
	return seen, ok
}

// rolledOver returns between which shares of its life the token before stopped being handed out. issued is the boot
// time at which its successor was issued.
func (e *entry) rolledOver(issued bootTime) (rollover, bool) {
	if e.token.life == 0 || e.token.unconfirmed { // there was none, or its age is not known
		return rollover{}, false
	}
	t := &e.token
	ended := min(issued.sub(t.issuedAt), t.life+afterExpiry)
	r := rollover{of: e.key, after: share(t.shown.sub(t.issuedAt), t.life), by: share(ended, t.life), watched: 1}
	if e.schedule.probedSince != never {
		r.watched = share(e.schedule.probedSince.sub(t.issuedAt), t.life)
	}
	return r, r.after < r.by
}

// differing returns the claims of the token before, if they show other permissions than those of the token after it. A
// claim that either omits is not known to differ.
func differing(before, after Claims, known bool) *Claims {
	same := func(name string, one, two []string) bool {
		return slices.Equal(one, two) || slices.Contains(before.Omitted, name) || slices.Contains(after.Omitted, name)
	}
	if !known || same("groups", before.Groups, after.Groups) && same("roles", before.Roles, after.Roles) &&
		same("wids", before.WIDs, after.WIDs) {
		return nil
	}
	return &before
}

// omittedAnew returns the claims that the new token omits, if the old one omitted others; else nil.
func omittedAnew(before, after Claims) []string {
	if slices.Equal(before.Omitted, after.Omitted) {
		return nil
	}
	return after.Omitted
}

// audienceBefore returns the old token's audience if the new token has another; else "".
func audienceBefore(before, after Claims) string {
	if before.Audience == after.Audience || after.Audience == "" {
		return ""
	}
	return before.Audience
}

// fail takes in a failed fetch, for which a caller waited or not, and plans the next one, no sooner than held. A key
// that never had a token and is not prefetched is fetched again only for a caller.
func (e *entry) fail(err *FetchError, asked bool, left time.Duration, held, now bootTime, roll float64) {
	e.backOff.fail(err, asked, left, now, roll)
	e.schedule.next = max(e.backOff.until, held)
	if !e.prefetch && e.token.deadline == longAgo {
		e.schedule.next = never
	}
}

// sharedFailure returns the failure that callers share until the fetch is worth another try, or nil.
func (e *entry) sharedFailure(now bootTime) *FetchError {
	if e.backOff.failure == nil || now >= e.backOff.callers {
		return nil
	}
	return e.backOff.failure.withRetryAfter(min(e.backOff.callers, max(e.schedule.next, now.add(time.Second))).sub(now))
}

// forget drops the token: no caller gets it any more.
func (t *heldToken) forget() { t.Token = &Token{} }

// extend moves the expiry to a later time.
func (t *heldToken) extend(deadline bootTime) {
	t.deadline = deadline
	t.life = max(t.life, deadline.sub(t.received))
	t.issuedAt = deadline.add(-t.life)
}

// anchor sets the true expiry, and shifts the times that were known only in relation to a guessed one.
func (t *heldToken) anchor(deadline bootTime) {
	shift := deadline.sub(t.issuedAt) - t.life
	t.deadline, t.issuedAt = deadline, t.issuedAt.add(shift)
	t.received, t.shown = t.received.add(shift), t.shown.add(shift)
}

// speaksFor reports whether the token says that it is who's.
func (t *heldToken) speaksFor(who Principal) bool {
	own := t.lastClaims.Principal()
	return !own.IsZero() && !own.Differs(who)
}

// notify wakes those who watch e.
func (e *entry) notify() {
	close(e.changed)
	e.changed = make(chan struct{})
}
