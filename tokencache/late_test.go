package tokencache_test

import (
	"testing"
	"testing/synctest"
	"time"

	"perceptd/tokencache"
	"perceptd/tokencache/tokencachetest"
)

// What was kept can be read only after a boot has gone on without it. A token from before a revocation that has come
// again meanwhile, or that comes after that, was received when it was first, as at a start at which it was read at
// once.
func TestLateTokensTellWhenATokenWasReceived(t *testing.T) {
	t.Parallel()
	forget := func(c *tokencache.Cache) {
		for _, want := range []bool{false, true} {
			c.Retain(func(tokencache.Key) bool { return want })
		}
	}
	nothing := func(*testing.T, *plain, *tokencache.Cache) {}
	for name, row := range map[string]struct {
		kept       func(*tokencache.Cache) // before it was kept
		meanwhile  func(*testing.T, *plain, *tokencache.Cache)
		afterwards func(*testing.T, *plain, *tokencache.Cache)
	}{
		"it is held":  {afterwards: nothing},
		"it was held": {kept: forget, afterwards: nothing},
		"it is dropped": {meanwhile: func(_ *testing.T, _ *plain, c *tokencache.Cache) { forget(c) },
			afterwards: nothing},
		"it was held, and is not": {kept: forget,
			meanwhile: func(_ *testing.T, _ *plain, c *tokencache.Cache) { forget(c) }, afterwards: nothing},
		"another is held": {
			meanwhile: func(t *testing.T, p *plain, c *tokencache.Cache) {
				p.issue(vault.Resource, time.Now())
				if outcome, err := c.Refresh(t.Context(), vault, true); outcome != tokencache.Newer {
					t.Fatal(outcome, err)
				}
			},
			afterwards: func(t *testing.T, p *plain, c *tokencache.Cache) {
				mustGet(t, c, vault, sdk) // which is from after the revocation
				forget(c)
				p.issue(vault.Resource, time.Now().Add(-2*time.Hour-8*time.Minute)) // a replica that lags
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				w, p := new(tokencachetest.Clock), &plain{counts: true, static: true}
				c := tokencache.New(tokencache.Options{Fetch: p.Fetch, Clock: w.AfterBoot(), BootID: "one"})
				mustGet(t, c, vault, sdk)
				time.Sleep(time.Hour)
				note(t, c, "x", tokencache.Revoked, time.Time{})
				time.Sleep(time.Hour)
				if row.kept != nil {
					row.kept(c)
				}
				m, record := c.Snapshot(), c.Record()
				m.Static = false // else that alone would tell
				c.Close()

				clock := w.AfterBoot()
				c = tokencache.New(tokencache.Options{
					Fetch: p.Fetch, Clock: clock, BootID: "two", Record: record,
					On: tokencache.OnAtBoot("two", clock.Boot(), record.Instant),
				})
				defer c.Close()
				time.Sleep(time.Minute)
				mustGet(t, c, vault, sdk) // nothing tells that it is from before
				time.Sleep(7 * time.Minute)
				if row.meanwhile != nil {
					row.meanwhile(t, p, c)
				}
				c.Restore(&m)
				row.afterwards(t, p, c)
				mustBeWithheld(t, c)
				for _, r := range c.Snapshot().Keys {
					if r.Key == vault && r.ReceivedOnTime > 2*time.Minute {
						t.Errorf("received at %v on-time, and first after one minute", r.ReceivedOnTime)
					}
				}
			})
		})
	}
}

// That a source's counts of lives are none is not forgotten as what was kept is read late, and what was kept of ages by
// such counts is void where it has been found out since.
func TestLateTokensAndStaticCounts(t *testing.T) {
	t.Parallel()
	for name, before := range map[string]bool{"found out before": true, "found out since": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				w, p, other := new(tokencachetest.Clock), &plain{counts: true,
					static: true}, tokencache.Key{Resource: "api://other"}
				clock := w.AfterBoot()
				start := func(on time.Duration) *tokencache.Cache {
					return tokencache.New(tokencache.Options{Fetch: p.Fetch, Clock: clock, BootID: "one", On: on})
				}
				show := func(c *tokencache.Cache) {
					mustGet(t, c, other, sdk)
					time.Sleep(time.Hour)
					if _, err := c.Refresh(t.Context(), other, true); err != nil {
						t.Fatal(err)
					}
				}
				c := start(0)
				mustGet(t, c, vault, sdk)
				if before {
					show(c)
				}
				m := c.Snapshot()
				c.Close()
				if m.Static != before {
					t.Fatalf("static: %v", m.Static)
				}
				c = start(m.On - m.Boot)
				defer c.Close()
				if !before {
					show(c)
				}
				c.Restore(&m)
				if !c.Snapshot().Static {
					t.Error("forgotten")
				}
				for _, r := range c.Snapshot().Keys {
					if !r.Blind {
						t.Errorf("the age of %v is known by a count that is none", r.Key)
					}
				}
			})
		})
	}
}

// Nor is it believed of an old file, as one that was put aside a month ago, where the source has been shown to count
// since: a token from after a revocation stays current. That nobody knew in between shows nothing.
func TestOldFileAndCountsShownSince(t *testing.T) {
	t.Parallel()
	for name, row := range map[string]struct {
		afresh bool          // the source was not known to count nothing when it began to
		shows  time.Duration // for how long it has
		void   bool
	}{
		"for a month":              {shows: 30 * 24 * time.Hour},
		"for a month, nobody knew": {shows: 30 * 24 * time.Hour, afresh: true},
		"for two hours":            {shows: 2 * time.Hour, afresh: true, void: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				w, p, other := new(tokencachetest.Clock), &plain{counts: true,
					static: true}, tokencache.Key{Resource: "api://other"}
				c := tokencache.New(tokencache.Options{Fetch: p.Fetch, Clock: w.AfterBoot(), BootID: "one"})
				defer func() { c.Close() }()
				ask := func() {
					if _, err := c.Refresh(t.Context(), other, true); err != nil {
						t.Fatal(err)
					}
				}
				ask()
				time.Sleep(time.Hour)
				ask()
				aside := c.Snapshot()
				if !aside.Static {
					t.Fatal("it is not known that the counts are none")
				}
				p.static = false
				if row.afresh {
					c.Close()
					clock := w.AfterBoot()
					c = tokencache.New(tokencache.Options{Fetch: p.Fetch, Clock: clock, BootID: "one and a half",
						On: aside.On})
				}
				for begun := time.Now(); time.Since(begun) < row.shows; time.Sleep(time.Hour) {
					ask()
				}
				note(t, c, "x", tokencache.Revoked, time.Time{})
				time.Sleep(20 * time.Minute)
				mustGet(t, c, vault, sdk)
				c = after(c, p.Fetch, w.AfterBoot(), "two")
				mustGet(t, c, vault, sdk)
				c.Restore(&aside)
				if got := c.Snapshot().Static; got != row.void {
					t.Errorf("its counts are taken for none: %v", got)
				}
				for range 60 {
					if _, err := c.Get(t.Context(), vault, sdk); err != nil && !row.void {
						t.Fatal(err)
					}
					time.Sleep(time.Minute)
				}
			})
		})
	}
}

// What was learnt of a token's life, and was dropped at somebody's wish, does not come back with what is read late, nor
// over a restart meanwhile.
func TestLateTokensBringNoLifeBackThatWasDropped(t *testing.T) {
	t.Parallel()
	for _, restart := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			w, r, began := new(tokencachetest.Clock), new(registry), time.Now()
			clock, left := w.AfterBoot(), time.Hour
			r.gives(func(key tokencache.Key) tokencache.Fetched {
				f := tokenOf("a", key, began)
				f.Left, f.Token.Claims.IssuedAt = left, time.Time{}
				return f
			})
			start := func(m *tokencache.Snapshot) *tokencache.Cache {
				return tokencache.New(tokencache.Options{Fetch: r.Fetch, Clock: clock, BootID: "one", Snapshot: m})
			}
			c := start(nil)
			refreshed(t, c, vault, tokencache.Newer)
			unread := c.Snapshot()
			received := only(t, c).ReceivedOn
			c.Close()
			time.Sleep(10 * time.Minute)

			c = start(nil)
			refreshed(t, c, vault, tokencache.Newer)
			r.during(func() { left = 5 * time.Hour })
			time.Sleep(10 * time.Minute)
			forgotten(t, c, vault, tokencache.Unchanged)
			if restart {
				m := c.Snapshot()
				c.Close()
				c = start(&m)
			}
			defer func() { c.Close() }()
			c.Restore(&unread)
			if got := only(t, c); got.Left != left || !got.ReceivedOn.Equal(received) {
				t.Errorf("restart %v: %v left, received on %v, and first on %v", restart, got.Left, got.ReceivedOn,
					received)
			}
			refreshed(t, c, vault, tokencache.Unchanged)
			if got := only(t, c).Left; got != left {
				t.Errorf("restart %v: then %v left", restart, got)
			}
		})
	}
}
