package agent

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"perceptd/agent/api"
	"perceptd/agent/grants"
	"perceptd/tokencache"
)

// Apply puts rules in force atomically and returns in words what changed. Elements with a fault are idle, as
// Rules.Settle makes them. It drops the tokens of keys that no grant names any more, and tries again at once the keys
// that failed and a record that could not be read or written.
func (a *Agent) Apply(rules Rules) ([]string, error) {
	a.apply.Lock()
	defer a.apply.Unlock()
	compiled := rules.compile()
	rules = compiled.Rules
	before := a.putInForce(compiled)
	a.cache.SetPropagationDelay(rules.Spread)
	a.cache.SetAlternates(rules.OtherNames())
	a.cache.SetAlternatesUnknown(rules.AnyAlternate)
	a.applyLostEffect(rules)
	a.cache.Retain(compiled.keeps)
	if _, err := a.prefetch(compiled); err != nil {
		return nil, err
	}
	a.cache.TryAgain()
	a.changeSaver.hurry()
	a.deny.saver.hurry()
	a.rereading.hurry()
	a.stale.reset(a.cache.Status())
	a.reports.retain(compiled)
	a.snapshotSaver.notice(true) // tokens that are not allowed any more are to be nowhere
	return compiled.changes(before), nil
}

// refreshesAtOnce bounds the refreshes that one request has under way; the cache orders them anyway.
const refreshesAtOnce = 8

// Refresh fetches the cached tokens of an identity and resource now; an empty name stands for all. It also tries again
// to read or write a record of policy changes that failed. The results are in the order of Status. While a policy
// change is spreading, it fetches nothing (OutcomeHeld) unless the caller insists. An *Error says that nothing has that
// name.
func (a *Agent) Refresh(ctx context.Context, identity, resource string, insist bool) ([]api.RefreshResult, error) {
	return a.refresh(ctx, identity, resource, func(key tokencache.Key, _ *grants.Identity) (tokencache.Outcome, error) {
		return a.cache.Refresh(ctx, key, insist)
	})
}

// Forget fetches anew as Refresh does, and drops the cached tokens of an identity and resource, with what was learnt of
// their lives, when others have come that can be used, or before where the caller insists: see tokencache.Cache.Forget.
func (a *Agent) Forget(ctx context.Context, identity, resource string, insist bool) ([]api.RefreshResult, error) {
	defer a.snapshotSaver.notice(true) // what was dropped is to be nowhere
	fetch := func(key tokencache.Key, of *grants.Identity) (tokencache.Outcome, error) {
		outcome, dropped, err := a.cache.Forget(ctx, key, insist)
		if dropped != "" {
			a.logForgotten(key, of.Name, dropped)
		}
		return outcome, err
	}
	return a.refresh(ctx, identity, resource, fetch)
}

// refresh calls fetch for each cached key of an identity and resource.
func (a *Agent) refresh(
	ctx context.Context, identity, resource string,
	fetch func(tokencache.Key, *grants.Identity) (tokencache.Outcome, error),
) ([]api.RefreshResult, error) {
	rules := a.rules.Load()
	resource = grants.TrimScope(resource)
	if identity != "" {
		switch named := rules.Named(identity); {
		case named == nil:
			return nil, rules.unknownIdentity(identity)
		case named.Fault != "":
			return nil, &Error{Code: api.CodeFaultyGrant, Detail: named.WhyIdle()}
		}
	}
	keys := rules.matching(a.cache.Status(), identity, resource)
	if len(keys) == 0 && resource != "" {
		return nil, &Error{Code: api.CodeBadRequest, Detail: fmt.Sprintf(
			"no grant names resource %q for such an identity", resource)}
	}
	a.changeSaver.hurry()
	a.deny.saver.hurry()
	a.rereading.hurry()
	results := make([]api.RefreshResult, len(keys))
	var all sync.WaitGroup
	slots := make(chan struct{}, refreshesAtOnce)
	for i, key := range keys {
		identity, result := rules.IdentityOf(key), &results[i]
		*result = api.RefreshResult{Identity: identity.Name, Resource: key.Resource, Outcome: tokencache.Failed}
		slots <- struct{}{}
		if err := ctx.Err(); err != nil { // do not queue calls that nobody waits for
			result.Detail = err.Error()
			<-slots
			continue
		}
		all.Go(func() {
			var err error
			if result.Outcome, err = fetch(key, identity); err != nil {
				result.Detail = err.Error()
			}
			<-slots
		})
	}
	all.Wait()
	return results, nil
}

func (a *Agent) fetched(e tokencache.Event) {
	a.logFetch(e)
	a.logPrincipal(e)
	a.logSimulated(e)
	a.logCurrent(e)
	a.changeSaver.notice()
	brought := []tokencache.Outcome{tokencache.Newer, tokencache.Former, tokencache.Simulated}
	a.snapshotSaver.notice(slices.Contains(brought, e.Outcome))
	a.changed()
}

// clockConfirmed has the cache saved with what the clock has shown, which may be lost again before the next fetch.
func (a *Agent) clockConfirmed() {
	a.snapshotSaver.notice(true)
	a.changed()
}

// logFetch writes one line for each fetch that ended: failures of a prefetched or held token are a
// warning, since a module may soon notice.
func (a *Agent) logFetch(e tokencache.Event) {
	fields := []zap.Field{
		zap.String("resource", e.Key.Resource),
		zap.Stringer("selector", e.Key.Selector),
		zap.String("outcome", string(e.Outcome)),
		zap.Duration("took", e.Took.Round(time.Microsecond)),
		zap.Duration("left", e.Left.Round(time.Second)),
		zap.Duration("next", e.Retry.Round(time.Second)),
	}
	if identity := a.rules.Load().IdentityOf(e.Key); identity != nil {
		fields = append(fields, zap.String("identity", identity.Name))
	}
	switch e.Outcome {
	case tokencache.Failed:
		a.log.Warn("token fetch failed", append(fields, zap.Error(e.Err))...)
	case tokencache.Newer:
		a.log.Info("token fetched", fields...)
	case tokencache.Former:
		a.log.Info("token fetched that is of a former principal: it is taken only where none is held", fields...)
	case tokencache.Simulated:
		a.log.Info("token fetched that is of a simulated back end: it is taken only where none is held", fields...)
	default:
		a.log.Debug("token fetched, the back end has no newer one", fields...)
	}
}
