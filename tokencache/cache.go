package tokencache

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"
)

// MaxKeys is how many keys a cache holds. The least recently used one is dropped first.
const MaxKeys = 256

// Need is what a caller needs of a token.
type Need struct {
	// MinTTL is the life that the token should have left.
	MinTTL time.Duration
	// MinTTLRequired makes less life than MinTTL an error. Otherwise a caller waits for it for half a second at most,
	// and then gets the held token.
	MinTTLRequired bool

	// IssuedAfter is a time, by the issuer's clock, after which the token must have been issued. Zero: any.
	IssuedAfter time.Time

	// Alternates are resources of the same identity. Their token will do while it is current and the key's own is not.
	Alternates []string
}

// Answer is a token that is valid now.
type Answer struct {
	Token      *Token        // shared by all callers: not to be changed
	Resource   string        // whose token it is: the key's own, or one of Need.Alternates
	Left       time.Duration // until it expires, more than 0
	ReceivedOn time.Time     // wall time at which it came from the source
	RefreshIn  time.Duration // until the next planned fetch; asking again sooner brings nothing new

	// Unconfirmed says that Left is an upper bound: the device was off for an unknown time.
	Unconfirmed bool

	Permissions Permissions
}

// Options is what a Cache is made of. Fetch is required.
type Options struct {
	// Fetch gets a token from the source. It must heed its context, and should return *FetchError.
	Fetch func(context.Context, Key) (Fetched, error)

	Clock   Clock          // zero fields: Go's own clock
	Roll    func() float64 // randomness in [0, 1); nil: math/rand
	Observe func(Event)    // called after every fetch; nil: nothing is
	// ClockConfirmed is called when a trusted clock has shown when tokens of unknown age expire. Nil: nothing is.
	ClockConfirmed func()
	// Begin is closed when the schedule knows all it needs. Before that it makes no call and forgets nothing. Nil: it
	// begins at once.
	Begin <-chan struct{}

	// PropagationDelay is how long a policy change may take to reach newly issued tokens. Zero:
	// DefaultPropagationDelay.
	PropagationDelay time.Duration
	// Record is the policy changes on record from before. It and Snapshot are as they were taken: New converts their
	// on-times.
	Record Record

	// BootID names this boot of the device, for Snapshot. Empty: not known.
	BootID string
	// On is the on-time at which this boot began: see OnAtBoot. Zero: this is the first boot.
	On time.Duration
	// Snapshot is what the cache before this one knew. Nil: nothing.
	Snapshot *Snapshot
}

// Cache holds the tokens. Its methods may be called by many goroutines.
type Cache struct {
	fetch          func(context.Context, Key) (Fetched, error)
	clock          Clock
	roll           func() float64
	observe        func(Event)
	clockConfirmed func()
	bootID         string
	on             time.Duration // on-time at which this boot began

	ctx     context.Context
	cancel  context.CancelFunc
	running sync.WaitGroup     // the schedule and the flights
	wake    chan struct{}      // makes the schedule look again
	pings   chan chan struct{} // asks the schedule for a sign of life

	mu      sync.Mutex // protects what follows
	closed  bool
	entries map[Key]*entry
	queue   fetchQueue
	uses    uint64
	keep    func(Key) bool // nil: every key

	issuerClock      issuerClock
	changes          []*change
	lineage          string
	origins          []Origin
	generation       uint64 // of changes: see Record
	propagationDelay time.Duration
	alternates       map[string][]string // canonical names of a resource, by each of them: see together
	anyName          bool                // not all alternates are known
	rollovers        history             // of all keys: they share a back end
	learnedVersion   uint64              // how often what was learned from rollovers became void; from 1 on
	principals       map[Selector]*principals
	tombstones       tombstones
	readings         readings      // of the issuer's clock
	static           bool          // the source's expires_in does not count down: see detectStaticLocked
	countdown        countdown     // evidence that it does
	countedOn        time.Duration // on-time at which it last was shown to; 0: not since it was static
}

// New returns a cache at work. Close it.
func New(o Options) *Cache {
	if o.Roll == nil {
		o.Roll = rand.Float64
	}
	if o.Observe == nil {
		o.Observe = func(Event) {}
	}
	if o.ClockConfirmed == nil {
		o.ClockConfirmed = func() {}
	}
	c := &Cache{
		fetch:          o.Fetch,
		clock:          o.Clock.OrRuntime(),
		roll:           o.Roll,
		observe:        o.Observe,
		clockConfirmed: o.ClockConfirmed,
		wake:           make(chan struct{}, 1),
		pings:          make(chan chan struct{}),
		entries:        make(map[Key]*entry), principals: make(map[Selector]*principals),
		queue:            newFetchQueue(),
		learnedVersion:   1,
		propagationDelay: cmp.Or(o.PropagationDelay, DefaultPropagationDelay),
		bootID:           o.BootID,
		on:               max(o.On, 1), // 0 stands for unknown

		lineage: o.Record.Lineage, origins: o.Record.Origins, generation: o.Record.Generation,
	}
	c.loadLocked(o.Record.In(c.instantLocked()).Changes) // nobody else has c yet
	if o.Snapshot != nil {
		c.restore(o.Snapshot)
	}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	c.running.Go(func() { c.runFrom(o.Begin) })
	return c
}

// Close cancels the fetches under way, answers every waiting caller with ErrClosed, and forgets every token.
func (c *Cache) Close() {
	c.mu.Lock()
	c.closed = true
	for _, e := range c.entries {
		c.dropLocked(e, ErrClosed)
	}
	c.mu.Unlock()
	c.cancel()
	c.running.Wait()
}

// Get returns a valid token for key that meets the need. If the cache holds one, Get does not wait. Otherwise it waits
// for one fetch that all callers of the key share. It gives up when ctx ends; the fetch goes on for the others.
//
// The error is a *FetchError, *ShortLifeError, *NotYetError or *WithheldError, ErrDropped, ErrClosed, or wraps ctx's.
func (c *Cache) Get(ctx context.Context, key Key, need Need) (Answer, error) {
	var tried *flight
	for {
		c.mu.Lock()
		step := c.stepLocked(key, need, tried)
		c.mu.Unlock()
		if step.wait == nil {
			return step.answer, step.err
		}
		if err := await(ctx, step.wait, step.atMost); err != nil {
			return Answer{}, fmt.Errorf("waiting for the token of %v: %w", key, err)
		}
		tried = step.wait
	}
}

// await waits until f has landed, for atMost. An error means that ctx ended first.
func await(ctx context.Context, f *flight, atMost time.Duration) error {
	var over <-chan time.Time
	if atMost != forever {
		timer := time.NewTimer(atMost)
		defer timer.Stop()
		over = timer.C
	}
	select {
	case <-f.done:
		return nil
	case <-over:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// step is what Get does next: it answers, fails, or waits for a shared fetch.
type step struct {
	answer Answer
	err    error

	wait   *flight       // nil: answer and err are final
	atMost time.Duration // how long to wait for it
}

// supply is what the cache has for a caller of Get, measured by what the caller needs.
type supply uint8

const (
	missing    supply = iota // no valid token
	lacking                  // a valid one that is not what is firmly needed
	wanting                  // one that is, with less life than the caller would like
	sufficient               // one that is all that was asked for
	withheld                 // a revocation withholds it, and would withhold what is fetched now
)

// stepLocked decides one step of Get. tried is the fetch that this caller has already waited for, or nil.
//
// After its fetch a caller comes here again, since the fetched token may not be what it needs: it may be the one that
// was held before, or it may have expired before the caller ran.
func (c *Cache) stepLocked(key Key, need Need, tried *flight) step {
	now := c.now()
	e, err := c.entryLocked(key, now)
	if err != nil {
		return step{err: err}
	}
	if tried.stoodDown() {
		tried = nil // for a change that may have been withdrawn by now
	}
	left := c.leftLocked(e, now)
	c.reviveLocked(e, left, now)
	if answer, found := c.answerInsteadLocked(e, need, left, now); found {
		return step{answer: answer}
	}
	short := c.shortLocked(e, need, left, now)
	there := c.supplyLocked(e, need, short, left, now)
	switch there {
	case withheld:
		return step{err: c.withheldLocked(e, now)}
	case sufficient:
		return step{answer: c.serveLocked(e, left, now)}
	case wanting:
		if tried != nil {
			return step{answer: c.serveLocked(e, left, now)}
		}
		return c.softFetchLocked(e, left, now)
	case lacking, missing: // all who waited for a fetch share its failure
		if failure := tried.failure(); failure != nil {
			return step{err: failure}
		}
	}
	if there == lacking && (tried != nil || e.flight == nil && c.futileLocked(e, now)) {
		if failure := e.sharedFailure(now); failure != nil {
			return step{err: failure}
		}
		return step{err: short}
	}
	return c.missLocked(e, now)
}

// supplyLocked returns what e's token is worth for that need. short is how it falls short of a firm need; nil: it does
// not.
func (c *Cache) supplyLocked(e *entry, need Need, short error, left time.Duration, now bootTime) supply {
	switch {
	case e.policy.withheld() && (left > 0 || c.barredLocked(e, now)):
		return withheld
	case left <= 0:
		return missing
	case short != nil:
		return lacking
	case left < need.MinTTL:
		return wanting
	}
	return sufficient
}

// answerInsteadLocked answers with an alternate's current token, if e's token is not current or may not be fetched now.
// If there is none, and a revocation bars the fetch, it plans the fetch for when the revocation has spread.
func (c *Cache) answerInsteadLocked(e *entry, need Need, left time.Duration, now bootTime) (Answer, bool) {
	barred := c.barredLocked(e, now)
	if e.policy.worst == Current || left <= 0 && !barred {
		return Answer{}, false
	}
	answer, found := c.alternateLocked(e, need, now)
	if !found && barred {
		c.awaitSpreadLocked(e, now)
	}
	return answer, found
}

// missLocked makes a caller wait for a fetch, or returns why no call may be made now.
func (c *Cache) missLocked(e *entry, now bootTime) step {
	if !e.underWay() {
		if failure := c.ownRefusalLocked(e, now); failure != nil {
			return step{err: failure}
		}
		if failure := c.pauseLocked(now); failure != nil {
			c.queue.backOff.turnedAway = c.queue.backOff.turnedAway || !e.backOff.yields()
			return step{err: failure}
		}
	}
	return step{wait: c.startFetchLocked(e, forCaller, now), atMost: forever}
}

// shortLocked returns how e's token falls short of what is firmly needed, or nil.
func (c *Cache) shortLocked(e *entry, need Need, left time.Duration, now bootTime) error {
	switch {
	case need.MinTTLRequired && left < need.MinTTL:
		return &ShortLifeError{Left: left, Want: need.MinTTL}
	case !need.IssuedAfter.IsZero() && !e.token.issued.Earliest.After(need.IssuedAfter):
		expiresOn := c.clock.Wall().Add(left)
		return &NotYetError{Want: need.IssuedAfter, Permissions: c.permissionsLocked(e, now), ExpiresOn: expiresOn}
	}
	return nil
}

// futileLocked reports whether a fetch for a caller's soft need would bring nothing: one was made just now, a policy
// change is still spreading, or the rollover is known to come later.
func (c *Cache) futileLocked(e *entry, now bootTime) bool {
	return now < e.schedule.softFetchAfter || c.postponedLocked(e, now) || now < c.rolloverLocked(e)
}

// alternateLocked answers with the token of an alternate resource, if one is current. Alternates without a token are
// planned to be fetched by the schedule.
func (c *Cache) alternateLocked(e *entry, need Need, now bootTime) (Answer, bool) {
	for _, resource := range need.Alternates {
		o, err := c.entryLocked(Key{Selector: e.key.Selector, Resource: resource}, now, e)
		if err != nil {
			continue
		}
		left := c.leftLocked(o, now)
		c.reviveLocked(o, left, now)
		switch {
		case left > 0 && o.policy.worst == Current && c.shortLocked(o, need, left, now) == nil:
			return c.serveLocked(o, left, now), true
		case left <= 0 && o.flight == nil && o.schedule.next == never:
			o.schedule.probe, o.schedule.next = true, max(now, c.spreadsUntilLocked(o, now), o.backOff.until)
			c.wakeSchedule()
		}
	}
	return Answer{}, false
}

// awaitSpreadLocked plans a fetch for e for when the revocation has spread for which a caller was refused.
func (c *Cache) awaitSpreadLocked(e *entry, now bootTime) {
	if e.schedule.next == never && e.flight == nil {
		e.schedule.next = max(now, e.backOff.until, c.barredUntilLocked(e, now))
		c.wakeSchedule()
	}
}

// softFetchLocked serves a caller that would like more life than the token has. It waits a little for a fetch, if a
// young one is under way or a new one may be made.
func (c *Cache) softFetchLocked(e *entry, left time.Duration, now bootTime) step {
	if !e.underWay() && (e.flight == nil && c.futileLocked(e, now) || c.refusalLocked(e, now) != nil) {
		return step{answer: c.serveLocked(e, left, now)}
	}
	f := c.startFetchLocked(e, forCaller, now)
	if atMost := softWait - now.sub(f.asked); atMost > 0 {
		return step{wait: f, atMost: atMost}
	}
	return step{answer: c.serveLocked(e, left, now)}
}

// refusalLocked returns why no call may be made for e now, or nil.
func (c *Cache) refusalLocked(e *entry, now bootTime) *FetchError {
	if failure := c.ownRefusalLocked(e, now); failure != nil {
		return failure
	}
	return c.pauseLocked(now)
}

// ownRefusalLocked returns why no call may be made for e now, though other keys may have one, or nil.
func (c *Cache) ownRefusalLocked(e *entry, now bootTime) *FetchError {
	if failure := e.sharedFailure(now); failure != nil {
		return failure
	}
	first := &flight{priority: forCaller, yields: e.backOff.yields()}
	from := max(c.quarantinedUntilLocked(e), c.queue.backOff.yields(first))
	if e.backOff.failure != nil && now < from {
		return e.backOff.failure.withRetryAfter(from.sub(now))
	}
	return nil
}

// serveLocked answers with e's token, which has left to live.
func (c *Cache) serveLocked(e *entry, left time.Duration, now bootTime) Answer {
	e.served++
	return Answer{
		Token: e.token.Token, Resource: e.key.Resource, Left: left, ReceivedOn: e.token.receivedWall,
		RefreshIn:   max(0, min(e.schedule.next.sub(now), left)),
		Permissions: c.permissionsLocked(e, now), Unconfirmed: c.unconfirmedLocked(e),
	}
}

// Refresh fetches key's token now, whatever the schedule says, within the source's limits. While a policy change is
// still spreading it returns *PostponedError instead, unless the caller insists.
func (c *Cache) Refresh(ctx context.Context, key Key, insist bool) (Outcome, error) {
	outcome, _, err := c.refresh(ctx, key, insist, false)
	return outcome, err
}

// Forget fetches key's token as Refresh does. When a usable token has arrived, it drops the token held before, and what
// was learnt of its life. So it gives up no token in vain.
//
// If the caller insists, it drops the token before the fetch. Callers that come meanwhile wait for the fetch. If
// nothing may be fetched now, it drops nothing. While fetches fail, it asks only if the caller insists.
//
// The cache remembers when the token was received: if the back end gives it again, it counts as received then. Forget
// returns the digest of the token that it dropped, "" for none.
func (c *Cache) Forget(ctx context.Context, key Key, insist bool) (_ Outcome, dropped string, _ error) {
	return c.refresh(ctx, key, insist, true)
}

// refresh is Refresh, or with forget it is Forget.
func (c *Cache) refresh(ctx context.Context, key Key, insist, forget bool) (_ Outcome, dropped string, _ error) {
	f, dropped, err := c.begin(key, insist, forget)
	switch {
	case errors.As(err, new(*PostponedError)):
		return Held, "", err
	case err != nil:
		return Failed, "", err
	}
	if err := await(ctx, f, forever); err != nil {
		return Failed, dropped, fmt.Errorf("waiting for the refresh of %v: %w", key, err)
	}
	if f.err != nil {
		return f.outcome, dropped, f.err
	}
	return f.outcome, cmp.Or(dropped, f.dropped), nil
}

// begin starts the fetch of refresh, or joins the one under way.
func (c *Cache) begin(key Key, insist, forget bool) (_ *flight, dropped string, _ error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.now()
	e, err := c.entryLocked(key, now)
	if err != nil {
		return nil, "", err
	}
	if !e.underWay() {
		if !insist && c.postponedLocked(e, now) {
			return nil, "", &PostponedError{For: c.postponedUntilLocked(e, now).sub(now)}
		}
		if pause := c.askedPauseLocked(now); pause != nil {
			return nil, "", pause
		}
	}
	if forget && !insist {
		if failure := c.lastFailureLocked(e); failure != nil && !e.token.Text.IsZero() {
			kept := *failure
			kept.Detail += "; so the token held was not dropped, which it is only if the fetch is insisted on"
			return nil, "", &kept
		}
	}
	if forget && insist {
		dropped = c.dropTokenLocked(e, now)
	}
	c.endWaitsLocked(now)
	f := c.startFetchLocked(e, forCaller, now)
	f.insisted, f.forgets = f.insisted || insist, f.forgets || forget
	return f, dropped, nil
}

// lastFailureLocked returns why a fetch for e is likely to fail, or nil.
func (c *Cache) lastFailureLocked(e *entry) *FetchError {
	if e.backOff.failure != nil {
		return e.backOff.failure
	}
	return c.queue.backOff.failure
}

// Ping returns nil if the lock is free and the schedule runs, else ctx's error.
func (c *Cache) Ping(ctx context.Context) error {
	alive := make(chan struct{})
	select {
	case c.pings <- alive:
	case <-c.ctx.Done():
		return ErrClosed
	case <-ctx.Done():
		return fmt.Errorf("the token cache's schedule stands still: %w", ctx.Err())
	}
	select {
	case <-alive:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("the token cache's lock is not to be had: %w", ctx.Err())
	}
}
