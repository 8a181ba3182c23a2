package agent

import (
	"sync"
	"time"

	"go.uber.org/zap"

	"perceptd/tokencache"
)

// chase remembers which tokens are waited for to become current, so that the log can tell how long that
// took.
type chase struct {
	mu    sync.Mutex
	since map[tokencache.Key]time.Time // when the change was that the token may lack
}

// restart takes in how every token stands, after the record of changes became another.
func (c *chase) restart(keys []tokencache.Status) {
	since := make(map[tokencache.Key]time.Time)
	for _, key := range keys {
		if key.Permissions.State != tokencache.Current {
			since[key.Key] = key.Permissions.Changed
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.since = since
}

// ended takes in how a token stands after a fetch, and reports whether it just became current, and since
// when that was waited for.
func (c *chase) ended(e tokencache.Event) (since time.Time, ended bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e.Left > 0 && e.Permissions.State != tokencache.Current {
		if c.since == nil {
			c.since = make(map[tokencache.Key]time.Time)
		}
		c.since[e.Key] = e.Permissions.Changed
		return time.Time{}, false
	}
	since, waited := c.since[e.Key]
	if !waited || e.Outcome != tokencache.Newer {
		return time.Time{}, false
	}
	delete(c.since, e.Key)
	return since, true
}

// logChase writes a line when a token is current again.
func (a *Agent) logChase(e tokencache.Event) {
	since, ended := a.chase.ended(e)
	if !ended {
		return
	}
	fields := []zap.Field{
		zap.String("resource", e.Key.Resource),
		zap.Stringer("selector", e.Key.Selector),
		zap.Time("changed", since),
		zap.Duration("after", a.clock.Wall().Sub(since).Round(time.Second)),
	}
	if identity := a.rules.Load().IdentityOf(e.Key); identity != nil {
		fields = append(fields, zap.String("identity", identity.Name))
	}
	a.log.Info("the token is current: its permissions are those from after the policy change", fields...)
}
