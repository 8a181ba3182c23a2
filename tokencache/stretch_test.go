package tokencache_test

import (
	"testing"
	"time"

	"perceptd/agent/simulator"
	"perceptd/tokencache"
)

// A stretch goes over several tokens that lack a change, ends with the first that carries it, and is told no longer
// when that token is replaced in turn.
func TestStretchOverTokens(t *testing.T) {
	t.Parallel()
	days(t, simulator.Options{Rollover: simulator.AtHalfLife, PropagationDelay: 13 * time.Hour},
		func(t *testing.T, d *device, c *tokencache.Cache) {
			serveThrough(t, c, time.Hour, time.Minute)
			if got := only(t, c).Ended; got != (tokencache.Stretch{}) {
				t.Errorf("without a change: %+v", got)
			}
			c.SetPropagationDelay(13 * time.Hour)
			changed := time.Now()
			note(t, c, "x", tokencache.Granted, time.Time{})
			serveThrough(t, c, 12*time.Hour, time.Minute)
			// Whoever insists gets a token while the change spreads, which may lack it.
			if _, err := c.Refresh(t.Context(), vault, true); err != nil {
				t.Fatal(err, only(t, c))
			}
			if got := only(t, c); got.Permissions.State != tokencache.Uncertain || got.Ended.State != tokencache.Stale {
				t.Errorf("of the second token: %+v, %+v", got.Permissions, got.Ended)
			}
			serveThrough(t, c, 14*time.Hour, time.Minute)
			current := only(t, c)
			if current.Permissions.State != tokencache.Current {
				t.Fatalf("%+v", current)
			}
			if got := current.Ended; !got.From.Equal(changed) || got.State != tokencache.Stale || got.Withheld ||
				got.To.Sub(current.ReceivedOn).Abs() > time.Second {
				t.Errorf("changed at %v, current since %v: %+v", changed, current.ReceivedOn, got)
			}
			serveThrough(t, c, 13*time.Hour, time.Minute)
			if got := only(t, c); !got.ReceivedOn.After(current.ReceivedOn) || got.Ended != (tokencache.Stretch{}) {
				t.Errorf("after the next token: %+v", got)
			}
		})
}
