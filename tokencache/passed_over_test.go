package tokencache_test

import (
	"context"
	"fmt"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"perceptd/tokencache"
	"perceptd/tokencache/tokencachetest"
)

// A token counts as received when the back end gave it first, whatever became of it then: that it was replaced, that it
// was never held since it was older, another principal's or for a key that was dropped meanwhile. So one from before a
// revocation stays withheld when it comes again, also where the back end's count would have it be new, and in the next
// process.
func TestReceiptOutlivesWhatBecameOfTheToken(t *testing.T) {
	t.Parallel()
	refresh := func(t *testing.T, c *tokencache.Cache, want tokencache.Outcome) {
		t.Helper()
		if got, err := c.Refresh(t.Context(), vault, true); got != want || err != nil {
			t.Fatalf("%v, %v, want %v", got, err, want)
		}
		time.Sleep(time.Minute)
	}
	// The back end gives 0: the token that comes again, 1: one that was issued later, 2: one of another principal.
	for name, give := range map[string]func(t *testing.T, c *tokencache.Cache, gives *atomic.Int32){
		"replaced": func(t *testing.T, c *tokencache.Cache, gives *atomic.Int32) {
			mustGet(t, c, vault, sdk)
			gives.Store(1)
			refresh(t, c, tokencache.Newer)
		},
		"older": func(t *testing.T, c *tokencache.Cache, gives *atomic.Int32) {
			gives.Store(1)
			mustGet(t, c, vault, sdk)
			gives.Store(0)
			refresh(t, c, tokencache.Older)
		},
		"of a former principal": func(t *testing.T, c *tokencache.Cache, gives *atomic.Int32) {
			gives.Store(1) // of the same principal
			mustGet(t, c, vault, sdk)
			gives.Store(2)
			refresh(t, c, tokencache.Newer)
			gives.Store(0)
			// by a number that is no count it was issued since the switch
			if _, err := c.Refresh(t.Context(), vault, true); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Minute)
		},
		"of a key that was dropped": func(t *testing.T, c *tokencache.Cache, _ *atomic.Int32) {
			go func() { _, _ = c.Get(t.Context(), vault, sdk) }()
			time.Sleep(time.Second / 2) // the call takes longer
			c.Retain(func(tokencache.Key) bool { return false })
			time.Sleep(time.Minute)
			c.Retain(func(tokencache.Key) bool { return true })
		},
	} {
		for _, static := range []bool{false, true} {
			for _, restart := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s static %v restart %v", name, static, restart), func(t *testing.T) {
					t.Parallel()
					synctest.Test(t, func(t *testing.T) {
						var gives atomic.Int32
						w, start := &tokencachetest.Clock{}, time.Now()
						fetch := func(_ context.Context, key tokencache.Key) (tokencache.Fetched, error) {
							time.Sleep(time.Second)
							i := gives.Load()
							f := tokenOf([]string{"o", "o", "p"}[i], key,
								start.Add([]time.Duration{-10 * time.Hour, -time.Hour, -time.Hour}[i]))
							if static {
								f.Left = 24 * time.Hour
							}
							return f, nil
						}
						clock := w.AfterUptime()
						c := tokencache.New(tokencache.Options{Clock: clock, Fetch: fetch, BootID: "one"})
						defer func() { c.Close() }()
						give(t, c, &gives)
						note(t, c, "x", tokencache.Revoked, time.Time{})
						time.Sleep(jitter + time.Minute)
						if restart {
							c = after(c, fetch, clock, "one")
						}
						gives.Store(0)
						_, _, _ = c.Forget(t.Context(), vault, true)
						if answer, err := c.Get(t.Context(), vault, sdk); err == nil {
							t.Errorf("the token that was received before the revocation is served as %v",
								answer.Permissions.State)
						}
						if at := c.Snapshot().Keys[0].ReceivedOnTime; at > tokencachetest.Uptime+3*time.Minute {
							t.Errorf("received at %v", at)
						}
					})
				})
			}
		}
	}
}
