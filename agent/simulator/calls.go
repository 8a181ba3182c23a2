package simulator

import (
	"maps"
	"slices"
	"time"
)

const (
	maxKeys = 1024 // identities and resources told apart, since resources come from callers
	maxLog  = 4096 // calls remembered with their times
)

// Key is what the back end caches by: an identity, and a resource byte for byte.
type Key struct {
	Identity string `json:"identity"` // its name; empty for one the device does not have
	Resource string `json:"resource"`
}

// Call is one token request.
type Call struct {
	At time.Time // when it came in, by the back end's clock
	Key
}

// Calls is what the back end was asked so far. A refused request counts like any other; of Arc's
// two legs only the second is one.
type Calls struct {
	Total  int
	PerKey map[Key]int // of the first 1,024 keys
	Peak   int         // the most requests that were under way at once; Token's take no time
	Log    []Call      // oldest first, the latest 4,096
}

// begin counts a call; the caller holds b.mu and ends the call.
func (c *Calls) begin(call Call) {
	c.Total++
	if c.PerKey == nil {
		c.PerKey = make(map[Key]int)
	}
	if _, known := c.PerKey[call.Key]; known || len(c.PerKey) < maxKeys {
		c.PerKey[call.Key]++
	}
	if len(c.Log) == 2*maxLog { // halved now and then rather than moved at every call
		c.Log = slices.Clone(c.Log[maxLog:])
	}
	c.Log = append(c.Log, call)
}

func (c *Calls) clone() Calls {
	log := c.Log[max(0, len(c.Log)-maxLog):]
	return Calls{c.Total, maps.Clone(c.PerKey), c.Peak, slices.Clone(log)}
}
