package tokencache_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"perceptd/agent/simulator"
	"perceptd/tokencache"
	"perceptd/tokencache/tokencachetest"
)

// servedWithin has a module ask every minute until it gets a token, and checks that it does by then.
func servedWithin(t *testing.T, c *tokencache.Cache, most time.Duration) {
	t.Helper()
	start := time.Now()
	for withheld(t, c) {
		if time.Sleep(time.Minute); time.Since(start) > 2*24*time.Hour {
			break
		}
	}
	if took := time.Since(start); took > most {
		t.Errorf("served after %v, want at most %v", took, most)
	}
}

// While a revocation spreads, a token that is issued would lack it, be withheld, and stay in the back end for a day. So
// nothing is fetched, whatever there is of a token and whoever asks.
func TestNothingIsFetchedWhileARevocationSpreads(t *testing.T) {
	t.Parallel()
	for name, row := range map[string]struct {
		before time.Duration // the note, from the first fetch; 0: there was none
		after  func(t *testing.T, d *device, c *tokencache.Cache) *tokencache.Cache
	}{
		"a key that nobody had asked for": {},
		"one that is to be prefetched since then": {after: func(t *testing.T, _ *device,
			c *tokencache.Cache) *tokencache.Cache {
			if err := c.Prefetch([]tokencache.Key{vault}); err != nil {
				t.Fatal(err)
			}
			return c
		}},
		"the token expires meanwhile":         {before: 24*time.Hour - 3*time.Minute},
		"it expires as the spreading is over": {before: 24*time.Hour - jitter - 10*time.Second},
		"it has much life left":               {before: time.Hour},
		"it expires meanwhile, over a restart": {before: 24*time.Hour - 3*time.Minute,
			after: restartedIn(5 * time.Minute)},
		"it expires later, over a restart": {before: 24*time.Hour - 12*time.Minute,
			after: restartedIn(5 * time.Minute)},
		"it is dropped": {before: time.Hour,
			after: func(_ *testing.T, _ *device, c *tokencache.Cache) *tokencache.Cache {
				c.DropTokens()
				return c
			}},
		"its grant goes and comes": {before: time.Hour,
			after: func(_ *testing.T, _ *device, c *tokencache.Cache) *tokencache.Cache {
				c.Retain(func(tokencache.Key) bool { return false })
				c.Retain(func(tokencache.Key) bool { return true })
				return c
			}},
		"somebody asks for a refresh": {before: 24*time.Hour - 3*time.Minute,
			after: func(t *testing.T, _ *device, c *tokencache.Cache) *tokencache.Cache {
				time.Sleep(4 * time.Minute)
				if _, err := c.Refresh(t.Context(), vault, false); !errors.As(err, new(*tokencache.PostponedError)) {
					t.Errorf("refresh: %v", err)
				}
				return c
			}},
		"the back end fails until then": {after: func(t *testing.T, d *device, c *tokencache.Cache) *tokencache.Cache {
			d.set(down)
			if err := c.Prefetch([]tokencache.Key{vault}); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Minute)
			c.TryAgain()
			d.set(nil)
			return c
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			days(t, simulator.Options{PropagationDelay: 8 * time.Minute},
				func(t *testing.T, d *device, c *tokencache.Cache) {
					if row.before > 0 {
						mustGet(t, c, vault, sdk)
						time.Sleep(row.before)
					}
					note(t, c, "x", tokencache.Revoked, time.Time{})
					start, calls := time.Now(), d.count()
					if row.after != nil {
						c = row.after(t, d, c)
						defer func() { c.Close() }()
					}
					for time.Since(start) < jitter {
						if !withheld(t, c) {
							t.Fatalf("served %v after the note", time.Since(start))
						}
						time.Sleep(30 * time.Second)
					}
					if n := d.count() - calls; n > 0 {
						t.Errorf("the back end was asked %d times while the revocation spread", n)
					}
					most := 6 * time.Minute
					if row.before > 0 { // the back end has that token until it expires
						most = max(most, 24*time.Hour-row.before)
					}
					servedWithin(t, c, most)
				})
		})
	}
}

// restartedIn has the cache begin anew after that time, with what it knew.
func restartedIn(wait time.Duration) func(*testing.T, *device, *tokencache.Cache) *tokencache.Cache {
	return func(_ *testing.T, d *device, c *tokencache.Cache) *tokencache.Cache {
		time.Sleep(wait)
		m, record := c.Snapshot(), c.Record()
		c.Close()
		return tokencache.New(tokencache.Options{Fetch: d.Fetch, BootID: m.BootID, Snapshot: &m, Record: record,
			On: tokencache.OnAtBoot(m.BootID, m.Boot, m.Taken())})
	}
}

// A key that is to be prefetched, and that never had a token, waits for any change to spread: nobody waits for it.
// Whoever does has it fetched at once.
func TestPrefetchWaitsForAChangeToSpread(t *testing.T) {
	t.Parallel()
	for _, effect := range []tokencache.Effect{tokencache.Granted, tokencache.Changed} {
		for _, row := range []struct{ noted, asked, withdrawn bool }{
			{}, {noted: true}, {asked: true}, {withdrawn: true},
		} {
			days(t, simulator.Options{PropagationDelay: 8 * time.Minute},
				func(t *testing.T, d *device, c *tokencache.Cache) {
					prefetch := func() {
						if err := c.Prefetch([]tokencache.Key{vault}); err != nil {
							t.Fatal(err)
						}
						time.Sleep(20 * time.Second)
					}
					if row.noted { // when it had failed
						d.set(&tokencache.FetchError{Kind: tokencache.Refused, Extent: tokencache.OfKey})
						prefetch()
						d.set(nil)
					}
					calls := d.count()
					note(t, c, "x", effect, time.Time{})
					if !row.noted {
						prefetch()
					}
					switch {
					case row.asked:
						if got := policyState(t, c); got == tokencache.Current {
							t.Errorf("%v: served as %v", effect, got)
						}
						return
					case row.withdrawn:
						c.Withdraw("x")
						time.Sleep(time.Second)
						if n := d.count() - calls; n != 1 {
							t.Errorf("%v: %d calls after it was withdrawn", effect, n)
						}
						return
					}
					time.Sleep(jitter - 30*time.Second)
					if n := d.count() - calls; n > 0 {
						t.Errorf("%v, %+v: the back end was asked %d times while the change spread", effect, row, n)
					}
					time.Sleep(6 * time.Minute)
					if n := d.count() - calls; n != 1 {
						t.Errorf("%v, %+v: %d calls when it had spread", effect, row, n)
					}
					if got := policyState(t, c); got != tokencache.Current {
						t.Errorf("%v, %+v: served as %v", effect, row, got)
					}
				})
		}
	}
}

// A revocation that is withdrawn bars nothing any more, and a token that expired meanwhile is fetched at once.
func TestWithdrawnRevocationBarsNothing(t *testing.T) {
	t.Parallel()
	days(t, simulator.Options{}, func(t *testing.T, d *device, c *tokencache.Cache) {
		mustGet(t, c, vault, sdk)
		time.Sleep(24*time.Hour - 3*time.Minute)
		note(t, c, "x", tokencache.Revoked, time.Time{})
		time.Sleep(5 * time.Minute)
		mustBeWithheld(t, c)
		calls := d.count()
		c.Withdraw("x")
		time.Sleep(time.Second)
		if n := d.count() - calls; n != 1 {
			t.Errorf("%d calls", n)
		}
		mustGet(t, c, vault, sdk)
	})
}

// What was queued for a caller when the revocation was noted is not fetched for it.
func TestQueuedFetchIsStoodDown(t *testing.T) {
	t.Parallel()
	s := &tokencachetest.Source{Latency: time.Second}
	bubble(t, s, func(t *testing.T, c *tokencache.Cache) {
		got := make(chan error)
		for _, resource := range []string{"api://a", "api://b", vault.Resource} { // two calls at once
			go func() {
				_, err := c.Get(t.Context(), tokencache.Key{Resource: resource}, sdk)
				got <- err
			}()
			synctest.Wait()
		}
		if _, err := c.RecordChange(tokencache.PolicyChange{ID: "x", AllIdentities: true, Resource: vault.Resource,
			Effect: tokencache.Revoked}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if err := <-got; !errors.As(err, new(*tokencache.WithheldError)) {
			t.Errorf("who waited got %v", err)
		}
		<-got
		<-got
		if n := s.Count(); n != 2 {
			t.Errorf("%d calls", n)
		}
	})
}

// What somebody insists on is fetched, whatever other changes are noted while it is queued.
func TestInsistedFetchIsNotStoodDown(t *testing.T) {
	t.Parallel()
	days(t, simulator.Options{}, func(t *testing.T, _ *device, c *tokencache.Cache) {
		keys := make([]tokencache.Key, 20)
		for i := range keys {
			keys[i] = tokencache.Key{Resource: api(i)}
			mustGet(t, c, keys[i], sdk)
		}
		time.Sleep(time.Hour)
		note(t, c, "one", tokencache.Revoked, time.Time{})
		time.Sleep(time.Minute)
		var all sync.WaitGroup
		for _, key := range keys {
			all.Go(func() {
				if _, err := c.Refresh(t.Context(), key, true); err != nil {
					t.Errorf("%v: %v", key, err)
				}
			})
		}
		time.Sleep(time.Second)
		note(t, c, "two", tokencache.Granted, time.Time{})
		all.Wait()
	})
}

// Who waited for a fetch that was taken out of the queue for a revocation, which was withdrawn before it could look,
// gets what there is to get then: to its caller nothing is held.
func TestStoodDownForAWithdrawnRevocation(t *testing.T) {
	t.Parallel()
	for range 20 { // the waiters may look before the withdrawal, or after it
		bubble(t, &tokencachetest.Source{Latency: time.Second}, func(t *testing.T, c *tokencache.Cache) {
			var all sync.WaitGroup
			for i := range 20 {
				all.Go(func() {
					if _, err := c.Get(t.Context(), tokencache.Key{Resource: api(i)}, sdk); err != nil &&
						!errors.As(err, new(*tokencache.WithheldError)) {
						t.Error(err)
					}
				})
			}
			synctest.Wait()
			note(t, c, "x", tokencache.Revoked, time.Time{})
			c.Withdraw("x")
			all.Wait()
		})
	}
}

// A change has fetches wait until it has spread, and where tokens have no date for five minutes more: one that is
// issued then shows that it meets the change.
func TestHowLongAChangeHoldsFetches(t *testing.T) {
	t.Parallel()
	for name, row := range map[string]struct {
		edit  func(*tokencache.Fetched)
		holds time.Duration
	}{
		"dated": {byEntra, jitter},
		"without a date": {func(f *tokencache.Fetched) {
			f.Token.Claims.IssuedAt, f.Token.NotBefore = time.Time{},
				time.Time{}
		}, jitter + 5*time.Minute},
	} {
		bubble(t, &tokencachetest.Source{Edit: row.edit}, func(t *testing.T, c *tokencache.Cache) {
			mustGet(t, c, vault, sdk)
			time.Sleep(time.Hour)
			for _, effect := range []tokencache.Effect{tokencache.Granted, tokencache.Revoked} {
				note(t, c, string(effect), effect, time.Time{})
				const whole = 5 * time.Second
				if got := time.Until(c.Status()[0].HeldUntil); got != row.holds+whole {
					t.Errorf("%s, %v: %v", name, effect, got)
				}
				time.Sleep(row.holds + time.Hour)
			}
		})
	}
}

// On-time is less than the time that has passed. Where the clock is known to be right, a night in which the device was
// off counts: the revocation has spread, who asks need not wait, and the status tells of nothing that does.
func TestNightOffIsPartOfTheSpreading(t *testing.T) {
	t.Parallel()
	for _, known := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			w, p := &tokencachetest.Clock{Trusted: known}, new(plain)
			c := tokencache.New(tokencache.Options{Fetch: p.Fetch, Clock: w.AfterBoot(), BootID: "one"})
			defer func() { c.Close() }()
			time.Sleep(time.Hour)
			note(t, c, "x", tokencache.Revoked, time.Time{})
			m, record := c.Snapshot(), c.Record()
			c.Close()
			time.Sleep(8 * time.Hour)
			clock := w.AfterBoot()
			c = tokencache.New(tokencache.Options{
				Fetch: p.Fetch, Clock: clock, BootID: "two", Snapshot: &m, Record: record,
				On: tokencache.OnAtBoot("two", clock.Boot(), m.Taken(), record.Instant),
			})
			if err := c.Prefetch([]tokencache.Key{vault}); err != nil {
				t.Fatal(err)
			}
			if held := c.Status()[0].HeldUntil; known != held.IsZero() {
				t.Errorf("known %v: nothing is fetched before %v", known, held)
			}
			if _, err := c.Get(t.Context(), vault, sdk); known != (err == nil) {
				t.Errorf("known %v: %v", known, err)
			}
		})
	}
}

// Nor need the schedule wait for a key whose token has expired in that night, once the clock shows it.
func TestScheduleAfterANightOff(t *testing.T) {
	t.Parallel()
	for _, known := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			w, p := &tokencachetest.Clock{Trusted: true}, new(plain)
			c := tokencache.New(tokencache.Options{Fetch: p.Fetch, Clock: w.AfterBoot(), BootID: "one"})
			defer func() { c.Close() }()
			mustGet(t, c, vault, sdk)
			time.Sleep(20 * time.Hour)
			note(t, c, "x", tokencache.Revoked, time.Time{})
			m, record := c.Snapshot(), c.Record()
			c.Close()
			time.Sleep(8 * time.Hour)
			w.Set(-8*time.Hour, false)
			clock := w.AfterBoot()
			c = tokencache.New(tokencache.Options{
				Fetch: p.Fetch, Clock: clock, BootID: "two", Snapshot: &m, Record: record,
				On: tokencache.OnAtBoot("two", clock.Boot(), m.Taken(), record.Instant),
			})
			if err := c.Prefetch([]tokencache.Key{vault}); err != nil {
				t.Fatal(err)
			}
			w.Set(0, known)
			time.Sleep(6 * time.Minute)
			synctest.Wait()
			if fetched := c.Status()[0].Fetches > 0; fetched != known {
				t.Errorf("known %v: fetched %v", known, fetched)
			}
		})
	}
}

// Nor where the clock is known at the start, nor for a key that never had a token: what any caller would get is
// prefetched, and fetched for whoever refreshes it.
func TestScheduleAfterANightOffByAKnownClock(t *testing.T) {
	t.Parallel()
	for _, known := range []bool{false, true} {
		for _, key := range []tokencache.Key{vault, storage} {
			synctest.Test(t, func(t *testing.T) {
				w, p := &tokencachetest.Clock{Trusted: true}, new(plain)
				c := tokencache.New(tokencache.Options{Fetch: p.Fetch, Clock: w.AfterBoot(), BootID: "one"})
				defer func() { c.Close() }()
				mustGet(t, c, vault, sdk)
				time.Sleep(20 * time.Hour)
				note(t, c, "x", tokencache.Revoked, time.Time{})
				m, record := c.Snapshot(), c.Record()
				c.Close()
				time.Sleep(8 * time.Hour)
				w.Set(0, known)
				clock := w.AfterBoot()
				c = tokencache.New(tokencache.Options{
					Fetch: p.Fetch, Clock: clock, BootID: "two", Snapshot: &m, Record: record,
					On: tokencache.OnAtBoot("two", clock.Boot(), m.Taken(), record.Instant),
				})
				if err := c.Prefetch([]tokencache.Key{key}); err != nil {
					t.Fatal(err)
				}
				time.Sleep(6 * time.Minute)
				synctest.Wait()
				for _, s := range c.Status() {
					if s.Key == key && (s.Fetches > 0) != known {
						t.Errorf("%v, known %v: fetched %d times, held until %v", key, known, s.Fetches, s.HeldUntil)
					}
				}
				if _, err := c.Refresh(t.Context(), key, false); (err == nil) != known {
					t.Errorf("%v, known %v: refresh: %v", key, known, err)
				}
			})
		}
	}
}

// What a caller is told while a revocation spreads says so, and until when.
func TestWithheldWhileItSpreads(t *testing.T) {
	t.Parallel()
	days(t, simulator.Options{}, func(t *testing.T, _ *device, c *tokencache.Cache) {
		start := time.Now()
		note(t, c, "x", tokencache.Revoked, time.Time{})
		var why *tokencache.WithheldError
		if _, err := c.Get(t.Context(), vault, sdk); !errors.As(err, &why) {
			t.Fatal(err)
		}
		if spread := why.Spread.Sub(start); spread < 10*time.Minute || spread > 10*time.Minute+10*time.Second {
			t.Errorf("told to have spread after %v", spread)
		}
		if until := why.Until.Sub(start); until < 24*time.Hour || until > 25*time.Hour {
			t.Errorf("told to be served after %v", until)
		}
		if got := only(t, c); got.State != tokencache.Fetching ||
			got.HeldUntil.Sub(start).Round(time.Minute) != 10*time.Minute || got.NextRefresh != got.HeldUntil {
			t.Errorf("status: %+v", got)
		}
	})
}

// Tokens whose issue is told to minutes alone show that they are current five minutes later. A key that has none yet
// waits so long where the other keys' tokens are such.
func TestColdKeyWaitsAsTheOthersDo(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := new(plain)
		odd := func(ctx context.Context, key tokencache.Key) (tokencache.Fetched, error) {
			f, err := p.Fetch(ctx, key)
			f.Token.Claims.IssuedAt = f.Token.Claims.IssuedAt.Add(17 * time.Second)
			return f, err
		}
		c := tokencache.New(tokencache.Options{Fetch: odd, Clock: (&tokencachetest.Clock{Trusted: true}).AfterUptime()})
		defer c.Close()
		mustGet(t, c, tokencache.Key{Resource: "api://other"}, sdk)
		time.Sleep(time.Hour)
		note(t, c, "x", tokencache.Revoked, time.Time{})
		servedWithin(t, c, 16*time.Minute)
	})
}

// While a revocation of this boot spreads, nothing is fetched though the clock steps, which is known to be right before
// and after: the boot clock tells that it is still spreading. The back end counts nothing, so that no better clock
// tells.
func TestClockThatStepsWhileARevocationSpreads(t *testing.T) {
	t.Parallel()
	for _, step := range []time.Duration{0, 30 * time.Minute, 3 * time.Hour} {
		for _, held := range []bool{false, true} {
			t.Run(fmt.Sprintf("by %v, held %v", step, held), func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					w, r := &tokencachetest.Clock{Trusted: true}, &registry{}
					w.Set(step, true)
					r.gives(func(key tokencache.Key) tokencache.Fetched {
						f := tokenOf("o", key, time.Now())
						f.Counted = false
						return f
					})
					c := tokencache.New(tokencache.Options{Clock: w.AfterUptime(), Fetch: r.Fetch})
					defer c.Close()
					if held {
						mustGet(t, c, vault, sdk)
					}
					time.Sleep(2 * time.Hour)
					note(t, c, "x", tokencache.Revoked, time.Time{})
					before, noted := len(r.asked(vault)), time.Now()
					time.Sleep(2 * time.Minute)
					w.Set(0, true)
					for time.Since(noted) < jitter-time.Minute {
						if !withheld(t, c) {
							t.Fatalf("a token is served %v after the revocation", time.Since(noted))
						}
						if _, err := c.Refresh(t.Context(), vault, false); err == nil {
							t.Errorf("refreshed %v after the revocation", time.Since(noted))
						}
						time.Sleep(time.Minute)
					}
					if n := len(r.asked(vault)); n != before {
						t.Errorf("%d calls while it was spreading", n-before)
					}
				})
			})
		}
	}
}
