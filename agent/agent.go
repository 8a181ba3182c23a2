// Package agent answers local callers: a token, or why not. It puts together the token cache, the grants in force and
// the audit. Attesting who calls and speaking HTTP are the work of other packages.
package agent

import (
	"cmp"
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"perceptd/tokencache"
)

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

	naming        sync.Mutex // one policy change at a time gets its name, or is withdrawn; protects what follows
	unread        *unread    // what is still to be read, and may tell of changes; nil: nothing is
	changeSaver   changeSaver
	snapshotSaver snapshotSaver
	rereading     rereading
	stale         staleTracker
	simulated     simulatedWatch
	reports       reports
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
	a.changeSaver.open(o.Keep, a.cache.Record, a.clock, o.Log)
	logJoined(o.Log, before.Changes)
	u := unread{kept: kept}
	if o.UnreadTokens != nil {
		u.tokens, u.fault = o.LoadTokens, o.UnreadTokens
		a.snapshotSaver.unread.Store(&o.UnreadTokens)
	}
	switch {
	case o.UnreadRecord != nil:
		u.load = o.Load
		a.noteUnread(o.Rules, &u, o.UnreadRecord)
	case before.lost:
		a.noteLost(o.Rules, cmp.Or(o.LostRecord, errNoCopy))
	case before.why != "":
		a.changeSaver.restore(before)
	}
	a.changeSaver.renew()
	a.cache.SetAlternates(o.Rules.Alternates)
	a.cache.Retain(compiled.Allows)
	a.rereading.open(a.clock)
	a.snapshotSaver.open(o.Keeping, a.cache.Snapshot, a.clock, o.Log, a.changed)
	u.began = a.cache.Record()
	if u.load != nil || u.tokens != nil {
		a.unread = &u
		a.rereading.loop.Go(func() { a.readAgain(&u) })
	}
	if o.Memory != nil {
		a.snapshotSaver.notice(true) // it came from one of both places, and the other may hold what is of another boot, or nothing
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
	keep := a.snapshotSaver.close()
	a.cache.Close() // whoever waits is told before the disk is waited for
	a.rereading.close()
	a.changeSaver.close()
	keep()
}

// Ping returns nil while the cache answers and its schedule moves. It is for a watchdog.
func (a *Agent) Ping(ctx context.Context) error { return a.cache.Ping(ctx) }
