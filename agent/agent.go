// Package agent decides which local caller gets which token, and says why not. It owns the token
// cache and the rules in force; proving who calls and speaking HTTP are other packages' work.
package agent

import (
	"context"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

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

	MinTTL time.Duration // the life that the caller wants the token to have left
	Firm   bool          // whether less than MinTTL is an error, or merely a pity
}

// Answer is a token on its way to a caller.
type Answer struct {
	tokencache.Answer
	Identity *Identity

	// Advertise is the life that the SDK forms tell: less than Left, so that SDKs come back.
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
	Log   *zap.Logger      // nil: none

	// Changed is called after each fetch, when Status may tell something new. It must not block. Nil:
	// nobody is told.
	Changed func()
}

// Agent is safe for use by many goroutines.
type Agent struct {
	cache   *tokencache.Cache
	log     *zap.Logger
	changed func()

	apply sync.Mutex // one Apply at a time
	rules atomic.Pointer[ruleset]

	served, denied, invalid, failed atomic.Int64
	denials                         denialLog
}

// New returns a working agent, or the faults of the rules. Close it.
func New(o Options) (*Agent, error) {
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	if o.Changed == nil {
		o.Changed = func() {}
	}
	a := &Agent{log: o.Log, changed: o.Changed}
	a.denials.log = o.Log
	compiled, err := o.Rules.compile()
	if err != nil {
		return nil, err
	}
	a.rules.Store(compiled)
	a.cache = tokencache.New(tokencache.Options{Fetch: o.Fetch, Clock: o.Clock, Observe: a.fetched})
	a.cache.Retain(compiled.allows)
	if err := a.cache.Prefetch(compiled.prefetch); err != nil {
		a.cache.Close()
		return nil, err
	}
	return a, nil
}

// Close ends the fetches under way and forgets every token.
func (a *Agent) Close() { a.cache.Close() }

// Check returns nil while the cache answers and its schedule moves: what a watchdog wants to know.
func (a *Agent) Check(ctx context.Context) error { return a.cache.Check(ctx) }

// Token answers a caller: a token, or an *Error. It waits for the back end only when it must, and
// never longer than ctx.
func (a *Agent) Token(ctx context.Context, caller Caller, r Request) (Answer, error) {
	r.Resource = strings.TrimSuffix(r.Resource, "/.default")
	for {
		rules := a.rules.Load()
		answer, err := a.tokenUnder(ctx, rules, caller, r)
		if a.rules.Load() == rules {
			return answer, err
		}
		// The rules changed while the caller waited: what it may have is decided by those in force.
	}
}

func (a *Agent) tokenUnder(ctx context.Context, rules *ruleset, caller Caller, r Request) (Answer, error) {
	identity, denial := rules.choose(caller, r)
	if denial != nil {
		a.refused(caller, r, denial)
		return Answer{}, denial
	}
	answer, err := a.cache.Get(ctx, tokencache.Key{Selector: identity.Selector(), Resource: r.Resource},
		tokencache.Need{MinTTL: r.MinTTL, Firm: r.Firm})
	if err != nil {
		a.failed.Add(1)
		return Answer{}, explain(identity, r.Resource, err)
	}
	a.served.Add(1)
	return Answer{Answer: answer, Identity: identity, Advertise: min(answer.Left, rules.sdkLife)}, nil
}

func (a *Agent) refused(caller Caller, r Request, err *Error) {
	if err.Reason != NotGranted {
		a.invalid.Add(1)
		return
	}
	a.denied.Add(1)
	a.denials.note(caller, r, err)
}

// Counts returns what callers were answered since the start.
func (a *Agent) Counts() Counts {
	return Counts{Served: a.served.Load(), Denied: a.denied.Load(), Invalid: a.invalid.Load(), Failed: a.failed.Load()}
}
