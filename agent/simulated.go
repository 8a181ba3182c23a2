package agent

import (
	"sync"
	"time"

	"go.uber.org/zap"

	"perceptd/tokencache"
)

// MessageSimulated is the ID of the journal's entries about tokens from a simulated back end where none is configured.
// It never changes.
const MessageSimulated = "9d4e17b83c5a4f62b1f08e6a27c35d90"

// simulatedWarningInterval is the least time between two warnings about a simulated back end.
const simulatedWarningInterval = time.Hour

// simulatedWatch decides when to warn about simulated tokens from a source that is not a simulated one.
type simulatedWatch struct {
	expected bool // the source is a simulated one

	mu        sync.Mutex // protects what follows
	simulated bool       // the last token that came was simulated
	warned    bool       // at least once
	warnedAt  time.Duration
}

// shouldWarn takes in whether a token that came is simulated, and reports whether to warn: when the first simulated
// token follows real ones, and at most once in simulatedWarningInterval.
func (w *simulatedWatch) shouldWarn(simulated bool, now time.Duration) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	first := simulated && !w.simulated
	w.simulated = simulated
	if !first || w.expected || w.warned && now-w.warnedAt < simulatedWarningInterval {
		return false
	}
	w.warned, w.warnedAt = true, now
	return true
}

// logSimulated warns when a simulated back end answers where a real one should.
func (a *Agent) logSimulated(e tokencache.Event) {
	if e.Outcome == tokencache.Failed || !a.simulated.shouldWarn(e.Simulated, a.clock.Boot()) {
		return
	}
	a.log.Warn("SIMULATED: a token came that says that a simulated back end made it, and opens nothing: "+
		"systemctl cat perceptd and systemctl show-environment tell what leads perceptd there; "+
		"once that is gone: systemctl restart perceptd",
		zap.String("resource", e.Key.Resource), zap.Stringer("selector", e.Key.Selector),
		zap.String("message_id", MessageSimulated))
}
