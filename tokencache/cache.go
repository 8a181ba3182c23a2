package tokencache

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"
)

// MaxKeys is how many keys a cache holds; the one that was asked for least recently goes first.
const MaxKeys = 256

// Need is what a caller needs of a token.
type Need struct {
	// MinTTL is the life that the token is to have left.
	MinTTL time.Duration
	// Firm makes less life than MinTTL an error. Otherwise a caller waits for it for half a second at
	// most, and then gets the token there is.
	Firm bool
}

// Answer is a token that is valid now.
type Answer struct {
	Token      *Token        // shared by all who got it: not to be changed
	Left       time.Duration // until it expires, more than 0
	ReceivedOn time.Time     // wall time at which it came from the source
	RefreshIn  time.Duration // until the next planned fetch; asking again sooner brings nothing new
}

// Options is what a Cache is made of. Fetch is required.
type Options struct {
	// Fetch gets a token from the source. It must heed its context, and should return *FetchError.
	Fetch func(context.Context, Key) (Fetched, error)

	Clock   Clock          // zero fields: Go's own clock
	Roll    func() float64 // randomness in [0, 1); nil: math/rand
	Observe func(Event)    // called after every fetch; nil: nobody
}

// Cache holds the tokens. Its methods may be called by many goroutines.
type Cache struct {
	fetch   func(context.Context, Key) (Fetched, error)
	clock   Clock
	roll    func() float64
	observe func(Event)

	ctx     context.Context
	cancel  context.CancelFunc
	running sync.WaitGroup     // the schedule and the flights
	wake    chan struct{}      // tells the schedule to look again
	pulse   chan chan struct{} // asks the schedule for a sign of life

	mu      sync.Mutex // protects what follows
	closed  bool
	entries map[Key]*entry
	gate    gate
	uses    uint64
	keep    func(Key) bool // nil: every key
}

// New returns a cache at work. Close it.
func New(o Options) *Cache {
	if o.Roll == nil {
		o.Roll = rand.Float64
	}
	if o.Observe == nil {
		o.Observe = func(Event) {}
	}
	c := &Cache{
		fetch:   o.Fetch,
		clock:   o.Clock.orRuntime(),
		roll:    o.Roll,
		observe: o.Observe,
		wake:    make(chan struct{}, 1),
		pulse:   make(chan chan struct{}),
		entries: make(map[Key]*entry),
		gate:    newGate(),
	}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	c.running.Go(c.run)
	return c
}

// Close cancels the fetches under way, answers whoever waits with ErrClosed, and forgets every token.
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

// Get returns a valid token for key that meets the need. A valid token never waits for the source; a
// miss, and a need that the held token does not meet, wait for one fetch that all callers share, but
// not longer than ctx, whose end leaves the fetch under way for the others.
//
// The error is a *FetchError, a *ShortLifeError, ErrDropped, ErrClosed, or wraps ctx's.
func (c *Cache) Get(ctx context.Context, key Key, need Need) (Answer, error) {
	var landed *flight
	for {
		c.mu.Lock()
		answer, f, patience, err := c.lookLocked(key, need, landed)
		c.mu.Unlock()
		if f == nil {
			return answer, err
		}
		if err := await(ctx, f, patience); err != nil {
			return Answer{}, fmt.Errorf("waiting for the token of %v: %w", key, err)
		}
		landed = f
	}
}

// await returns when f has landed or patience is over. An error means that ctx ended first.
func await(ctx context.Context, f *flight, patience time.Duration) error {
	var over <-chan time.Time
	if patience != never {
		timer := time.NewTimer(patience)
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

// lookLocked decides one step of Get: an answer, an error, or a flight to wait for, and how long.
// landed is the flight that this caller has waited for already, or nil.
//
// A caller comes here again after its flight, since what landed may not be what it needs: the token
// may be the one it had, or have expired while the caller was not scheduled.
func (c *Cache) lookLocked(key Key, need Need, landed *flight) (Answer, *flight, time.Duration, error) {
	now := c.clock.Boot()
	e, err := c.entryLocked(key, now)
	if err != nil {
		return Answer{}, nil, 0, err
	}
	left := c.leftLocked(e, now)
	switch {
	case left > 0 && (left >= need.MinTTL || landed != nil && !need.Firm):
		return c.serveLocked(e, left, now), nil, 0, nil
	case left > 0 && !need.Firm:
		return c.wishLocked(e, left, now)
	case landed != nil && ended(landed) && landed.err != nil:
		return Answer{}, nil, 0, landed.err
	case left > 0 && (landed != nil || now < e.wishes && e.flight == nil):
		if failure := e.remembered(now); failure != nil {
			return Answer{}, nil, 0, failure
		}
		return Answer{}, nil, 0, &ShortLifeError{Left: left, Want: need.MinTTL}
	}
	if !e.underWay() {
		if failure := c.refusalLocked(e, now); failure != nil {
			return Answer{}, nil, 0, failure
		}
	}
	return Answer{}, c.flyLocked(e, forCaller, now), never, nil
}

// wishLocked serves a caller that would like more life than the token has: it waits a little for a
// fetch that is young, or that may be tried again by now.
func (c *Cache) wishLocked(e *entry, left, now time.Duration) (Answer, *flight, time.Duration, error) {
	if !e.underWay() && (e.flight == nil && now < e.wishes || c.refusalLocked(e, now) != nil) {
		return c.serveLocked(e, left, now), nil, 0, nil
	}
	f := c.flyLocked(e, forCaller, now)
	if patience := softWait - (now - f.asked); patience > 0 {
		return Answer{}, f, patience, nil
	}
	return c.serveLocked(e, left, now), nil, 0, nil
}

// refusalLocked returns why no call is to be made for e now, or nil.
func (c *Cache) refusalLocked(e *entry, now time.Duration) *FetchError {
	if failure := e.remembered(now); failure != nil {
		return failure
	}
	if pause := c.gate.paused - now; pause > 0 {
		return &FetchError{Kind: Throttled, RetryAfter: pause, Detail: "the back end asked for a pause in all calls"}
	}
	return nil
}

func (c *Cache) serveLocked(e *entry, left, now time.Duration) Answer {
	e.served++
	if e.next == never && e.flight == nil { // it had been idle: bring the schedule back
		e.next = min(now+firstRefresh(left, 0, c.roll()), e.deadline+afterExpiry)
		c.nudge()
	}
	return Answer{Token: e.token, Left: left, ReceivedOn: e.receivedWall, RefreshIn: max(0, min(e.next-now, left))}
}

// leftLocked returns the life that e's token has left: by boot time, and by the wall clock too where
// that is known to be right. Expired if either says so.
func (c *Cache) leftLocked(e *entry, now time.Duration) time.Duration {
	if e.token.Text.IsZero() {
		return 0
	}
	return c.leftOf(e.token.ExpiresOn, e.deadline-now)
}

func (c *Cache) leftOf(expiresOn time.Time, byBoot time.Duration) time.Duration {
	if expiresOn.IsZero() || !c.clock.Synchronised() {
		return byBoot
	}
	return min(byBoot, expiresOn.Sub(c.clock.Wall()))
}

// entryLocked returns key's entry for a caller, made if need be, and notes that it was used.
func (c *Cache) entryLocked(key Key, now time.Duration) (*entry, error) {
	if c.closed {
		return nil, ErrClosed
	}
	e := c.entries[key]
	if e == nil {
		if c.keep != nil && !c.keep(key) {
			return nil, ErrDropped
		}
		e = c.addLocked(key)
		c.evictLocked(e)
	}
	c.uses++
	e.used, e.asked = c.uses, now
	return e, nil
}

func (c *Cache) addLocked(key Key) *entry {
	e := &entry{key: key, token: &Token{}, asked: longAgo, deadline: longAgo, next: never, wishes: longAgo, failedUntil: longAgo}
	c.entries[key] = e
	return e
}

// evictLocked makes room, for e if it is not nil, by dropping the key asked for least recently. Prefetched keys stay, and
// so do keys with a fetch under way, whose number the callers that wait for them bound.
func (c *Cache) evictLocked(e *entry) {
	for len(c.entries) > MaxKeys {
		var oldest *entry
		for _, o := range c.entries {
			if o != e && !o.prefetch && o.flight == nil && (oldest == nil || o.used < oldest.used) {
				oldest = o
			}
		}
		if oldest == nil {
			return
		}
		c.dropLocked(oldest, ErrDropped)
	}
}

// dropLocked removes e and tells whoever waits for it why.
func (c *Cache) dropLocked(e *entry, why error) {
	e.forget()
	delete(c.entries, e.key)
	if f := e.flight; f != nil {
		e.flight = nil
		c.gate.remove(f)
		f.err = why
		close(f.done)
	}
}

// Retain drops at once, with its token, every key that keep does not want, now and from now on.
func (c *Cache) Retain(keep func(Key) bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.keep = keep
	for key, e := range c.entries {
		if !keep(key) {
			c.dropLocked(e, ErrDropped)
		}
	}
}

// Prefetch names the keys that are fetched before anyone asks, kept fresh when nobody does, and never
// evicted; it replaces those named before. More than MaxKeys of them is an error and changes nothing.
func (c *Cache) Prefetch(keys []Key) error {
	if len(keys) > MaxKeys {
		return fmt.Errorf("%d tokens are to be prefetched: at most %d can be", len(keys), MaxKeys)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return ErrClosed
	}
	for _, e := range c.entries {
		e.prefetch = false
	}
	now := c.clock.Boot()
	for _, key := range keys {
		e := c.entries[key]
		if e == nil {
			e = c.addLocked(key)
		}
		e.prefetch = true
		if e.next == never && e.flight == nil {
			e.next = now
		}
	}
	c.evictLocked(nil)
	c.nudge()
	return nil
}

// Refresh fetches key's token now, whatever the schedule says, within the source's limits.
func (c *Cache) Refresh(ctx context.Context, key Key) (Outcome, error) {
	f, err := c.begin(key)
	if err != nil {
		return Failed, err
	}
	if err := await(ctx, f, never); err != nil {
		return Failed, fmt.Errorf("waiting for the refresh of %v: %w", key, err)
	}
	if f.err != nil {
		return Failed, f.err
	}
	return f.outcome, nil
}

func (c *Cache) begin(key Key) (*flight, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.clock.Boot()
	e, err := c.entryLocked(key, now)
	if err != nil {
		return nil, err
	}
	if pause := c.gate.paused - now; pause > 0 && !e.underWay() {
		return nil, &FetchError{Kind: Throttled, RetryAfter: pause, Detail: "the back end asked for a pause in all calls"}
	}
	return c.flyLocked(e, forCaller, now), nil
}

// Check returns nil when the lock can be had and the schedule moves, else ctx's error.
func (c *Cache) Check(ctx context.Context) error {
	alive := make(chan struct{})
	select {
	case c.pulse <- alive:
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

// Status returns what people may know of every key, in no order.
func (c *Cache) Status() []Status {
	c.mu.Lock()
	defer c.mu.Unlock()
	now, wall := c.clock.Boot(), c.clock.Wall()
	all := make([]Status, 0, len(c.entries))
	for _, e := range c.entries {
		all = append(all, c.statusLocked(e, now, wall))
	}
	return all
}

func (c *Cache) statusLocked(e *entry, now time.Duration, wall time.Time) Status {
	s := Status{
		Key: e.key, Prefetch: e.prefetch, LastFetch: e.endedWall, LastOutcome: e.outcome,
		Failures: e.failures, Fetches: e.fetches, Served: e.served,
	}
	if e.failure != nil {
		s.LastError = e.failure
	}
	if e.next != never {
		s.NextRefresh = wall.Add(max(0, e.next-now))
	}
	left := c.leftLocked(e, now)
	if left > 0 {
		s.Left, s.SHA256 = left, e.token.Text.SHA256()
		s.ReceivedOn, s.ExpiresOn = e.receivedWall, wall.Add(left)
	}
	s.State = e.state(left > 0)
	return s
}

func (e *entry) state(valid bool) State {
	switch {
	case !valid && e.flight != nil:
		return Fetching
	case !valid:
		return Missing
	case e.failures > 0:
		return Failing
	case e.flight != nil:
		return Refreshing
	case e.next == never:
		return Idle
	}
	return Fresh
}

// nudge makes the schedule look again soon.
func (c *Cache) nudge() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

func ended(f *flight) bool {
	select {
	case <-f.done:
		return true
	default:
		return false
	}
}

// asFetchError gives every error of a fetch a kind.
func asFetchError(err error) *FetchError {
	var fetch *FetchError
	switch {
	case errors.As(err, &fetch):
		return fetch
	case errors.Is(err, context.DeadlineExceeded):
		return &FetchError{Kind: Unreachable, Detail: fmt.Sprintf("no answer within %v", fetchTimeout)}
	}
	return &FetchError{Kind: Unreachable, Detail: err.Error()}
}
