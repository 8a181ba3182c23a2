package config

import (
	"fmt"
	"math"
	"slices"
	"time"

	"perceptd/agent/simulator"
	"perceptd/agent/source"
)

// Kinds of source.
const (
	ManagedIdentity = "managed-identity"
	Simulated       = "simulated"
)

// Source says where tokens come from.
type Source struct {
	Kind     string
	Endpoint source.Endpoint
	Speed    float64 // simulated: how much faster time runs
	Rollover string  // simulated: when the back end hands out a newer token

	Spread time.Duration // simulated: how long a change of permissions takes to reach new tokens

	Fault string // why there is no source, although Kind may be understood; empty: there is one
}

// defaultSource is what counts where no file says otherwise.
var defaultSource = Source{Kind: ManagedIdentity, Endpoint: source.Auto, Speed: 1,
	Rollover: simulator.AtExpiry.String()}

// take reads a [source].
func (s *Source) take(t *table) {
	if kind, ok := t.text("kind", ManagedIdentity); ok {
		s.Kind = kind
	}
	if endpoint, ok := t.text("endpoint", string(source.Auto)); ok {
		s.Endpoint = source.Endpoint(endpoint)
	}
	if speed, ok := t.number("speed"); ok {
		s.Speed = speed
	}
	if rollover, ok := t.text("rollover", defaultSource.Rollover); ok {
		s.Rollover = rollover
	}
	if spread, ok := t.duration("spread", -math.MaxInt64, math.MaxInt64); ok {
		s.Spread = spread
	}
	t.finish()
}

// maxSimulatedSpread is as long as [tokens] spread can allow for.
const maxSimulatedSpread = 24 * time.Hour

// validate looks at what all files together say; key is the one that is wrong.
func (s *Source) validate() (key string, err error) {
	endpoints := []source.Endpoint{source.Auto, source.Arc, source.AppService, source.IMDS}
	forSimulated := fmt.Errorf("source.speed, source.rollover and source.spread are for source.kind = %q only",
		Simulated)
	_, err = simulator.ParseRollover(s.Rollover)
	switch {
	case s.Kind != ManagedIdentity && s.Kind != Simulated:
		return "source.kind", fmt.Errorf("source.kind is %q: it must be %q or %q", s.Kind, ManagedIdentity, Simulated)
	case !slices.Contains(endpoints, s.Endpoint):
		return "source.endpoint", fmt.Errorf("source.endpoint is %q: it must be auto, arc, app-service or imds",
			s.Endpoint)
	case s.Kind != Simulated && s.Speed != defaultSource.Speed:
		return "source.speed", forSimulated
	case s.Kind != Simulated && s.Rollover != defaultSource.Rollover:
		return "source.rollover", forSimulated
	case s.Kind != Simulated && s.Spread != defaultSource.Spread:
		return "source.spread", forSimulated
	case s.Spread < 0 || s.Spread > maxSimulatedSpread:
		return "source.spread", fmt.Errorf("source.spread is %v: it must be between 0s and %v",
			s.Spread, maxSimulatedSpread)
	case !(s.Speed >= 1 && s.Speed <= 100_000): // NaN is neither
		return "source.speed", fmt.Errorf("source.speed is %v: it must be between 1 and 100000", s.Speed)
	case err != nil:
		return "source.rollover", fmt.Errorf("source.rollover: %w", err)
	}
	return "", nil
}
