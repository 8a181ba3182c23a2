// Package agent answers local callers: a token, or why not. It puts together the token cache, the grants in force and
// the audit. Attesting who calls and speaking HTTP are the work of other packages.
package agent

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"perceptd/agent/api"
	"perceptd/agent/grants"
	"perceptd/tokencache"
)

// Request asks for a token. At most one of the four ways to name an identity may be used; none
// leaves the choice to the caller's grants.
type Request struct {
	Resource string // App ID URI; a /.default suffix is dropped

	Identity   string // by configured name
	ClientID   string
	ObjectID   string
	ResourceID string

	MinTTL         time.Duration // the life that the caller wants the token to have left
	MinTTLRequired bool          // whether less than MinTTL is an error, or merely a pity

	// IssuedAfter is a moment, by the issuer's clock, after which the token is to have been minted. Zero:
	// any. It is always firm.
	IssuedAfter time.Time

	// Wait is how long, in real time, to wait until there is a token that meets the need and is not
	// withheld. Zero: for one fetch at most, which a longer Wait does not cut short either.
	Wait time.Duration
}

// Answer is a token on its way to a caller.
type Answer struct {
	tokencache.Answer
	Identity *grants.Identity

	// Advertise is the life that the SDK forms tell: no more than Left, and less, so that SDKs come back,
	// the sooner while the permissions are not current.
	Advertise time.Duration
}

// Counts counts what callers were answered.
type Counts struct {
	Served, Denied, Invalid, Failed int64
}

// Options is what an Agent is made of.
type Options struct {
	Fetch func(context.Context, tokencache.Key) (tokencache.Fetched, error)
	Rules Rules
	Clock tokencache.Clock // zero: Go's own
	Roll  func() float64   // randomness in [0, 1) of when tokens are fetched; nil: math/rand
	Log   *zap.Logger      // nil: none

	// Simulated says that Fetch is known to ask a simulated back end, so that nobody need be warned of what it gives.
	Simulated bool

	// Changed is called after each fetch and policy change, when Status may tell something new. It must
	// not block. Nil: nobody is told.
	Changed func()

	// Record is the policy changes on record from before. Nil: it is not there, as at a first start. Where Memory has a newer
	// one, that is taken.
	Record *tokencache.Record
	// LostRecord is why the record from before is no record any more. Where no copy of it is in Memory or Copies either, every token
	// from before is dropped, and what is fetched counts as uncertain, or is withheld (Rules.WithholdLost), until it is known to be
	// younger. Nil: it was read, or there was none.
	LostRecord error
	// UnreadRecord is why the record cannot be read now, and Load reads it again, until it has it, or fails with an error
	// whose method Spoilt returns true. Meanwhile tokens from before are treated the same, but for being dropped, and Keep is not called.
	UnreadRecord error
	Load         func() (*tokencache.Record, error)
	// UnreadTokens is why a file of what a cache before knew cannot be read now, and LoadTokens reads it again: it returns all that was
	// read, once, for the copies of the record and the marks, and that whose tokens are of use besides; with an error too, which says that
	// there is more that cannot be read now. Until it returns none a record that is lost counts as one that cannot be read. No Save
	// runs meanwhile.
	UnreadTokens error
	LoadTokens   func() (copies []tokencache.Snapshot, ours []*tokencache.Snapshot, err error)
	// Keep writes the whole record, each time it is another, so that it outlives this process. It is
	// called by one goroutine at a time and may take its time. Nil: nothing is kept.
	Keep func(tokencache.Record) error

	// BootID names this boot of the device, and Memory is what a cache before knew: see tokencache.Options.
	BootID string
	Memory *tokencache.Snapshot
	// Unopened is what caches before Memory's knew, which could not be read when that began: see tokencache.Cache.Restore.
	Unopened []*tokencache.Snapshot
	// On is for tokencache.Options.
	On time.Duration
	// Copies is whatever a cache before knew, of other sources as well, for the copies of the record and the marks that are in it. Nil:
	// Memory alone.
	Copies []tokencache.Snapshot
	// Keeping has what the cache knows outlive this process. Zero: it does not.
	Keeping Keeping
}

// Agent is safe for use by many goroutines.
type Agent struct {
	cache   *tokencache.Cache
	clock   tokencache.Clock
	log     *zap.Logger
	changed func()

	closing sync.Once

	apply sync.Mutex // one Apply at a time
	rules atomic.Pointer[ruleset]

	served, denied, invalid, failed atomic.Int64
	audit                           audit

	naming    sync.Mutex // one policy change at a time gets its name, or is withdrawn; protects what follows
	unread    *unread    // what is still to be read, and may tell of changes; nil: nothing is
	record    record
	memory    memory
	stale     staleTracker
	simulated simulatedWatch
	reports   reports
}

// New returns a working agent, or the faults of the rules. Close it.
func New(o Options) (*Agent, error) {
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	if o.Changed == nil {
		o.Changed = func() {}
	}
	compiled, err := o.Rules.compile()
	if err != nil {
		return nil, err
	}
	a := &Agent{clock: o.Clock.OrRuntime(), log: o.Log, changed: o.Changed}
	a.audit.open(o.Log, a.clock)
	a.simulated.expected = o.Simulated
	a.rules.Store(compiled)
	kept := o.told()
	before := kept.recover(o.Record, o.LostRecord, o.now(a.clock), o.Rules)
	before.Record, _ = o.Rules.withLostEffect(before.Record)
	before.lost = before.lost && o.UnreadRecord == nil
	if before.lost {
		o.Memory, o.Unopened = forgotten(o.Memory), slices.Clone(o.Unopened)
		for i, m := range o.Unopened {
			o.Unopened[i] = forgotten(m)
		}
	}
	ready := make(chan struct{})
	a.cache = tokencache.New(tokencache.Options{
		Fetch: o.Fetch, Clock: a.clock, Roll: o.Roll, Observe: a.fetched, ClockConfirmed: a.settled, Begin: ready, PropagationDelay: o.Rules.Spread,
		Record: before.Record, BootID: o.BootID, On: o.On, Snapshot: compiled.allowed(o.Memory),
	})
	for _, m := range o.Unopened {
		a.cache.Restore(compiled.allowed(m))
	}
	a.record.open(o.Keep, a.cache.Record, a.clock, o.Log)
	logJoined(o.Log, before.Changes)
	u := unread{kept: kept}
	if o.UnreadTokens != nil {
		u.tokens, u.fault = o.LoadTokens, o.UnreadTokens
		a.memory.unread.Store(&o.UnreadTokens)
	}
	switch {
	case o.UnreadRecord != nil:
		u.load = o.Load
		a.noteUnread(o.Rules, &u, o.UnreadRecord)
	case before.lost:
		a.noteLost(o.Rules, cmp.Or(o.LostRecord, errNoCopy))
	case before.why != "":
		a.record.restore(before)
	}
	a.record.renew()
	a.cache.SetAlternates(o.Rules.Alternates)
	a.cache.Retain(compiled.Allows)
	a.memory.open(o.Keeping, a.cache.Snapshot, a.clock, o.Log, a.changed)
	u.began = a.cache.Record()
	if u.load != nil || u.tokens != nil {
		a.unread = &u
		a.record.saver.Go(func() { a.readAgain(&u) })
	}
	if o.Memory != nil {
		a.memory.notice(true) // it came from one of both places, and the other may hold what is of another boot, or nothing
	}
	if err := a.cache.Prefetch(compiled.Prefetch()); err != nil {
		a.Close()
		return nil, err
	}
	close(ready)
	return a, nil
}

// Close ends the fetches under way, forgets every token, and has kept what there was to keep.
func (a *Agent) Close() { a.closing.Do(a.close) }

func (a *Agent) close() {
	keep := a.memory.close()
	a.cache.Close() // whoever waits is told before the disk is waited for
	a.record.close()
	keep()
}

// Check returns nil while the cache answers and its schedule moves: what a watchdog wants to know.
func (a *Agent) Ping(ctx context.Context) error { return a.cache.Ping(ctx) }

// Token answers a caller: a token, or an *Error. It waits for the back end only when it must, and
// never longer than ctx.
func (a *Agent) Token(ctx context.Context, caller grants.Caller, r Request) (Answer, error) {
	r.Resource = strings.TrimSuffix(r.Resource, "/.default")
	answer, err := a.answer(ctx, caller, r)
	if err == nil {
		a.served.Add(1)
		return answer, nil
	}
	var refusal *Error
	switch {
	case errors.As(err, &refusal) && refusal.Code == api.CodeNotGranted:
		a.denied.Add(1)
		a.audit.denied(a.rules.Load(), &caller, r.forGrants())
	case refusal != nil && refusal.isInvalid():
		a.invalid.Add(1)
	default:
		a.failed.Add(1)
	}
	return Answer{}, err
}

func (a *Agent) answer(ctx context.Context, caller grants.Caller, r Request) (Answer, error) {
	if r.Wait > 0 {
		return a.await(ctx, caller, r)
	}
	for {
		rules := a.rules.Load()
		answer, err := a.answerUnder(ctx, rules, caller, r)
		if a.rules.Load() == rules {
			return answer, err
		}
		// The rules changed while the caller waited: what it may have is decided by those in force.
	}
}

func (a *Agent) answerUnder(ctx context.Context, rules *ruleset, caller grants.Caller, r Request) (Answer, error) {
	granted, denial := rules.authorize(&caller, r.forGrants())
	if denial != nil {
		return Answer{}, denial
	}
	identity := granted.Identity
	answer, err := a.cache.Get(ctx, tokencache.Key{Selector: identity.Selector(), Resource: r.Resource}, tokencache.Need{
		MinTTL: r.MinTTL, MinTTLRequired: r.MinTTLRequired, IssuedAfter: r.IssuedAfter, Alternates: rules.AlternatesFor(&caller, identity, r.Resource),
	})
	if err != nil {
		return Answer{}, a.callerError(identity, r.Resource, err)
	}
	a.audit.allowed(rules, &caller, granted, r.Resource)
	told := rules.sdkLife()
	if answer.Permissions.State != tokencache.Current || answer.Unconfirmed {
		told = min(told, staleSDKLife)
	}
	return Answer{Answer: answer, Identity: identity, Advertise: min(answer.Left, told)}, nil
}

// askAgain is how often a waiting caller asks where no news will come by itself: for a key without a
// token, whose fetch failed. The cache remembers failures, so that asking costs no call each time.
const pollInterval = 2 * time.Second

// await answers a caller that would rather wait than be told that there is no token for it yet. The
// rules are those in force at each try.
func (a *Agent) await(ctx context.Context, caller grants.Caller, r Request) (Answer, error) {
	patience, cancel := context.WithTimeout(ctx, r.Wait)
	defer cancel()
	for {
		sight, news, err := a.peek(caller, r) // first, so that nothing is missed between the try and the wait
		if err != nil {
			return Answer{}, err
		}
		r.Wait = 0
		answer, err := a.answer(ctx, caller, r)
		var refusal *Error
		if err == nil || !errors.As(err, &refusal) || !refusal.passes() {
			return answer, err
		}
		if !pause(patience, news, sight.SHA256 == "") {
			return Answer{}, err
		}
	}
}

// pause returns at news, or after a while where none will come by itself; false when patience is over.
func pause(patience context.Context, news <-chan struct{}, missing bool) bool {
	var again <-chan time.Time
	if missing {
		timer := time.NewTimer(pollInterval)
		defer timer.Stop()
		again = timer.C
	}
	select {
	case <-news:
	case <-again:
	case <-patience.Done():
		return false
	}
	return true
}

// Counts returns what callers were answered since the start.
func (a *Agent) Counts() Counts {
	return Counts{Served: a.served.Load(), Denied: a.denied.Load(), Invalid: a.invalid.Load(), Failed: a.failed.Load()}
}

// Decide returns what the grants in force say to a request, and what the caller would be refused with. It fetches
// nothing and counts nothing.
func (a *Agent) Decide(caller grants.Caller, r grants.Request) (grants.Decision, *Error) {
	r.Resource = strings.TrimSuffix(r.Resource, "/.default")
	d := a.rules.Load().Decide(&caller, r)
	return d, refusalOf(d.Denial)
}

// GrantsFor returns the grants that decide about a caller, in the order of the configuration: all that it may have.
func (a *Agent) GrantsFor(caller grants.Caller) []grants.Ref {
	return a.rules.Load().GrantsFor(&caller)
}

// Grants returns every grant in force.
func (a *Agent) Grants() []grants.Ref { return a.rules.Load().Refs() }
