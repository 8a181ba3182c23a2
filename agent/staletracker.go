package agent

import (
	"sync"
	"time"

	"go.uber.org/zap"

	"perceptd/tokencache"
)

// staleTracker remembers which tokens may lack a policy change, so that the log can say how long it took until they
// had it. The zero value tracks none.
type staleTracker struct {
	mu    sync.Mutex
	since map[tokencache.Key]time.Time // when the change was made that the token may lack
}

// reset replaces what is tracked by the state of every token. It is called when the record of changes differs.
func (t *staleTracker) reset(keys []tokencache.Status) {
	since := make(map[tokencache.Key]time.Time)
	for _, key := range keys {
		if key.Permissions.State != tokencache.Current {
			since[key.Key] = key.Permissions.Changed
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.since = since
}

// update tracks a token's state after a fetch. It reports whether the token just became current, and when the change
// was made that it lacked before.
func (t *staleTracker) update(e tokencache.Event) (changed time.Time, becameCurrent bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if e.Left > 0 && e.Permissions.State != tokencache.Current {
		if t.since == nil {
			t.since = make(map[tokencache.Key]time.Time)
		}
		t.since[e.Key] = e.Permissions.Changed
		return time.Time{}, false
	}
	changed, wasStale := t.since[e.Key]
	if !wasStale || e.Outcome != tokencache.Newer {
		return time.Time{}, false
	}
	delete(t.since, e.Key)
	return changed, true
}

// logCurrent writes a line when a token becomes current.
func (a *Agent) logCurrent(e tokencache.Event) {
	changed, becameCurrent := a.stale.update(e)
	if !becameCurrent {
		return
	}
	fields := []zap.Field{
		zap.String("resource", e.Key.Resource),
		zap.Stringer("selector", e.Key.Selector),
		zap.Time("changed", changed),
		zap.Duration("after", a.clock.Wall().Sub(changed).Round(time.Second)),
	}
	if identity := a.rules.Load().IdentityOf(e.Key); identity != nil {
		fields = append(fields, zap.String("identity", identity.Name))
	}
	a.log.Info("the token is current: its permissions are those from after the policy change", fields...)
}
