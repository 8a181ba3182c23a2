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

	"perceptd/agent/api"
	"perceptd/agent/deny"
	"perceptd/tokencache"
)

// Options is what an Agent is made of.
type Options struct {
	Fetch func(context.Context, tokencache.Key) (tokencache.Fetched, error)
	Rules Rules
	Clock tokencache.Clock // zero: Go's own
	Roll  func() float64   // randomness in [0, 1) of when tokens are fetched; nil: math/rand
	Log   *zap.Logger      // nil: none

	// Simulated is true if Fetch is known to ask a simulated back end: its tokens then cause no warnings.
	Simulated bool

	// Changed is called after each fetch and policy change, when Status may differ. It must not block. Nil: it is not
	// called.
	Changed func()

	// Record is the saved record of policy changes. Nil: there is none, as at a first start. If Snapshot has a newer
	// one, that counts instead.
	Record *tokencache.Record
	// LostRecord is why the saved record can never be read. If neither Snapshot nor Copies have a copy of it, every
	// older token is dropped, and new ones count as uncertain, or are withheld (Rules.WithholdLost), until they are
	// known to be young enough. Nil: the record was read, or there was none.
	LostRecord error
	// UnreadRecord is why the saved record cannot be read now. LoadRecord then reads it again, until it returns a
	// record or an error whose method Spoilt returns true. Until then tokens are treated as with LostRecord, except
	// that none is dropped, and SaveRecord is not called.
	UnreadRecord error
	LoadRecord   func() (*tokencache.Record, error)
	// UnreadTokens is why a file with an earlier cache's snapshot cannot be read now. LoadTokens then reads it again.
	// It returns each snapshot once: in copies all, for their copies of the record and the marks in them, and in ours
	// those whose tokens can be used too. An error beside them says that there is more that cannot be read now. Until
	// LoadTokens returns no error, a lost record counts as one that cannot be read, and Persistence.Save is not called.
	UnreadTokens error
	LoadTokens   func() (copies []tokencache.Snapshot, ours []*tokencache.Snapshot, err error)
	// SaveRecord saves the whole record each time it differs. One goroutine at a time calls it, and it may block. Nil:
	// the record is not saved.
	SaveRecord func(tokencache.Record) error

	// Deny is how deny rules are kept. Zero: they are not.
	Deny DenyStore

	// BootID names this boot of the device, and Snapshot is that of an earlier cache: see tokencache.Options.
	BootID   string
	Snapshot *tokencache.Snapshot
	// Unopened are snapshots of caches before that one, which could not be read when it started: see
	// tokencache.Cache.Restore.
	Unopened []*tokencache.Snapshot
	// On goes into tokencache.Options.On.
	On time.Duration
	// Copies are all snapshots of earlier caches, also of those with other sources, for their copies of the record and
	// the marks in them. Nil: Snapshot alone.
	Copies []tokencache.Snapshot
	// Persistence saves the cache's state across restarts of the process. Zero: the state is not saved.
	Persistence Persistence
}

// Agent is safe for concurrent use.
type Agent struct {
	cache   *tokencache.Cache
	clock   tokencache.Clock
	log     *zap.Logger
	hubLog  *zap.Logger // what IoT Hub causes, bounded
	changed func()

	closing sync.Once

	apply        sync.Mutex            // one Apply at a time; protects twinPrefetch
	twinPrefetch []api.PrefetchRequest // what the twin has prefetched
	rules        atomic.Pointer[ruleset]

	served, denied, invalid, failed atomic.Int64
	audit                           audit

	deny denyRules

	naming        sync.Mutex        // one policy change at a time gets its ID, or is withdrawn; protects what follows
	deferred      *deferredRecovery // what has still to be read and may name policy changes; nil: nothing has
	twin          sync.Mutex        // one SetTwinChanges at a time; protects twinSeen
	twinSeen      map[string]bool   // IDs of the twin's policy changes, some of which may be over since
	changeSaver   changeSaver
	snapshotSaver snapshotSaver
	rereading     retryPauses
	stale         staleTracker
	simulated     simulatedWatch
	reports       reports
}

// New returns a working agent. Elements of the rules with a fault are idle, as Rules.Settle makes them. Close it.
func New(o Options) (*Agent, error) {
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	if o.Changed == nil {
		o.Changed = func() {}
	}
	compiled := o.Rules.compile()
	o.Rules = compiled.Rules
	a := &Agent{clock: o.Clock.OrRuntime(), log: o.Log, hubLog: BoundedLog(o.Log), changed: o.Changed}
	a.audit.open(o.Log, a.clock)
	a.simulated.expected = o.Simulated
	a.deny.open(o.Deny, a.clock, o.Log, a.changed)
	compiled.denied = deny.Compile(a.deny.record, a.deny.namesIn(compiled))
	a.rules.Store(compiled)
	kept := o.recordCopies()
	before := kept.recover(o.Record, o.LostRecord, o.now(a.clock), o.Rules)
	before.Record, _ = o.Rules.withLostEffect(before.Record)
	before.lost = before.lost && o.UnreadRecord == nil
	if before.lost {
		o.Snapshot, o.Unopened = forgotten(o.Snapshot), slices.Clone(o.Unopened)
		for i, m := range o.Unopened {
			o.Unopened[i] = forgotten(m)
		}
	}
	ready := make(chan struct{})
	a.cache = tokencache.New(tokencache.Options{
		Fetch: o.Fetch, Clock: a.clock, Roll: o.Roll, Observe: a.fetched,
		ClockConfirmed: a.clockConfirmed, Begin: ready, PropagationDelay: o.Rules.Spread,
		Record: before.Record, BootID: o.BootID, On: o.On, Snapshot: compiled.allowed(o.Snapshot),
	})
	for _, m := range o.Unopened {
		a.cache.Restore(compiled.allowed(m))
	}
	a.changeSaver.open(o.SaveRecord, a.cache.Record, a.clock, o.Log, a.changed)
	logJoined(o.Log, before.Changes)
	u := deferredRecovery{kept: kept}
	if o.UnreadTokens != nil {
		u.tokens, u.fault = o.LoadTokens, o.UnreadTokens
		a.snapshotSaver.unread.Store(&o.UnreadTokens)
	}
	switch {
	case o.UnreadRecord != nil:
		u.load = o.LoadRecord
		a.recordUnread(o.Rules, &u, o.UnreadRecord)
	case before.lost:
		a.recordLost(o.Rules, cmp.Or(o.LostRecord, errNoCopy))
	case before.why != "":
		a.changeSaver.saveRecovered(before)
	}
	a.changeSaver.renew()
	a.cache.SetAlternates(o.Rules.OtherNames())
	a.cache.SetAlternatesUnknown(o.Rules.AnyAlternate)
	a.cache.Retain(compiled.keeps)
	a.rereading.open(a.clock)
	a.snapshotSaver.open(o.Persistence, a.cache.Snapshot, a.clock, o.Log, a.changed)
	u.began = a.cache.Record()
	if u.load != nil || u.tokens != nil {
		a.deferred = &u
		a.rereading.loop.Go(func() { a.readAgain(&u) })
	}
	if a.deny.load != nil {
		a.rereading.loop.Go(a.readDenyRulesAgain)
	}
	if o.Snapshot != nil {
		// The snapshot came from one of two places, and the other may have that of another boot, or none.
		a.snapshotSaver.notice(true)
	}
	if err := a.cache.Prefetch(compiled.Prefetch()); err != nil {
		a.Close()
		return nil, err
	}
	note := func(isFirst bool) { // the record of policy changes notes which one of deny rules there is
		a.changeSaver.renew()
		if isFirst { // snapshots note that there is one
			a.snapshotSaver.notice(true)
		}
	}
	a.deny.note.Store(&note)
	if o.Deny.LoadOther != nil {
		rejoin := func() error { return a.joinOtherDenyRules(o.Deny.LoadOther) }
		a.deny.saver.rejoin.Store(&rejoin)
	}
	close(ready)
	return a, nil
}

// Close ends the fetches under way, saves what has not been saved, and drops every token.
func (a *Agent) Close() { a.closing.Do(a.close) }

func (a *Agent) close() {
	keep := a.snapshotSaver.close()
	a.cache.Close() // callers that wait get their error before the disk is waited for
	a.rereading.close()
	a.deny.saver.close()
	a.changeSaver.close() // it notes which deny rules there are
	a.deny.handers.Wait()
	keep()
}

// Ping returns nil while the cache answers and its schedule moves. It is for a watchdog.
func (a *Agent) Ping(ctx context.Context) error { return a.cache.Ping(ctx) }
