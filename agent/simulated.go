package agent

import (
	"sync"
	"time"

	"go.uber.org/zap"

	"perceptd/tokencache"
)

// MessageSimulated is the ID of the journal's entries on tokens of a simulated back end where none is configured; it never changes.
const MessageSimulated = "9d4e17b83c5a4f62b1f08e6a27c35d90"

// warnSimulatedEvery is how often, at most, people are warned of a simulated back end where none is configured.
const warnSimulatedEvery = time.Hour

// strange is what people were told of tokens that are simulated though the source is not.
type strange struct {
	expected bool // the source is a simulated one

	mu   sync.Mutex // protects what follows
	on   bool       // the last token that came was one
	told bool       // ever
	at   time.Duration
}

// comes notes whether a token that came is simulated, and reports whether people are to be warned: when the first comes after real
// ones, at most once an hour.
func (s *strange) comes(simulated bool, now time.Duration) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	first := simulated && !s.on
	s.on = simulated
	if !first || s.expected || s.told && now-s.at < warnSimulatedEvery {
		return false
	}
	s.told, s.at = true, now
	return true
}

// logSimulated warns of a simulated back end that answers where a real one should.
func (a *Agent) logSimulated(e tokencache.Event) {
	if e.Outcome == tokencache.Failed || !a.strange.comes(e.Simulated, a.clock.Boot()) {
		return
	}
	a.log.Warn("SIMULATED: a token came that says that a simulated back end made it, and opens nothing: "+
		"systemctl cat perceptd and systemctl show-environment tell what leads perceptd there; once that is gone: systemctl restart perceptd",
		zap.String("resource", e.Key.Resource), zap.Stringer("selector", e.Key.Selector), zap.String("message_id", MessageSimulated))
}
