package agent

import "perceptd/tokencache"

// Recorded returns the policy changes on record as the cache has them.
func (a *Agent) Recorded() []tokencache.RecordedChange { return a.cache.Changes() }

// DefaultSDKLife is the longest life that the SDK forms advertise, unless configured.
const DefaultSDKLife = defaultSDKLife
