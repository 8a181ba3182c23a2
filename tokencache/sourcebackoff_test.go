package tokencache_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"perceptd/tokencache"
	"perceptd/tokencache/tokencachetest"
)

// fleet is sixty keys, of two identities.
func fleet() (keys []tokencache.Key) {
	for i := range 60 {
		keys = append(keys, tokencache.Key{
			Selector: tokencache.Selector{Kind: tokencache.ClientID, ID: fmt.Sprint("identity ", i%2)},
			Resource: fmt.Sprintf("https://r%d.example.net", i/2),
		})
	}
	return keys
}

// ask has each key asked for every ten seconds, all at once, as modules do that are told to come back.
func ask(t *testing.T, c *tokencache.Cache, keys []tokencache.Key, span time.Duration) {
	t.Helper()
	for end := time.Now().Add(span); time.Now().Before(end); {
		next := time.Now().Add(10 * time.Second)
		var all sync.WaitGroup
		for _, key := range keys {
			all.Go(func() {
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				defer cancel()
				_, _ = c.Get(ctx, key, sdk)
			})
		}
		all.Wait()
		time.Sleep(time.Until(next))
	}
}

// What sixty keys cost that fail for good, each asked for every ten seconds, in an hour after the first; and what they
// cost that are prefetched and that nobody asks for.
func TestBudgetsOfFailure(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		fails       *tokencache.FetchError
		asked, idle int // calls an hour, at most
	}{
		{&tokencache.FetchError{Kind: tokencache.Refused}, 180, 120},
		{&tokencache.FetchError{Kind: tokencache.IdentityNotFound}, 180, 120},
		{&tokencache.FetchError{Kind: tokencache.Throttled}, 150, 40},
		{&tokencache.FetchError{Kind: tokencache.Throttled, RetryAfter: time.Minute}, 60, 60},
		{&tokencache.FetchError{Kind: tokencache.Unreachable, Extent: tokencache.OfSource}, 400, 150},
		{&tokencache.FetchError{Kind: tokencache.Unreachable}, 60 * 26, 60 * 36}, // each key for itself
		{&tokencache.FetchError{Kind: tokencache.Malformed, JustExpired: true}, 60 * 26, 60 * 36},
	} {
		for _, asked := range []bool{true, false} {
			s := &tokencachetest.Source{Err: row.fails, Latency: 50 * time.Millisecond}
			synctest.Test(t, func(t *testing.T) {
				c := tokencache.New(tokencache.Options{Fetch: s.Fetch})
				defer c.Close()
				keys := fleet()
				if err := c.Prefetch(keys); err != nil {
					t.Fatal(err)
				}
				spend := func(span time.Duration) int {
					before := s.Count()
					if asked {
						ask(t, c, keys, span)
					} else {
						time.Sleep(span)
					}
					return s.Count() - before
				}
				spend(time.Hour)
				most := row.idle
				if asked {
					most = row.asked
				}
				if spent := spend(time.Hour); spent > most || spent == 0 {
					t.Errorf("%+v, asked for %v: %d calls in the second hour, want 1 to %d", row.fails, asked, spent,
						most)
				}
			})
		}
	}
}

// A source that is well again is found out by one call, and then all keys are asked for, before their callers notice
// much.
func TestOneCallFindsTheSourceWellAgain(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		fails *tokencache.FetchError
		asked time.Duration // until all have tokens, where callers come
		idle  time.Duration // and where none do
	}{
		{&tokencache.FetchError{Kind: tokencache.Unreachable, Extent: tokencache.OfSource}, 40 * time.Second,
			2*time.Minute + 20*time.Second},
		{&tokencache.FetchError{Kind: tokencache.Throttled}, 80 * time.Second, 5*time.Minute + 20*time.Second},
		{&tokencache.FetchError{Kind: tokencache.Throttled, RetryAfter: 2 * time.Minute},
			2*time.Minute + 50*time.Second, 5*time.Minute + 20*time.Second},
	} {
		for _, asked := range []bool{true, false} {
			s := &tokencachetest.Source{Err: row.fails, Latency: 50 * time.Millisecond}
			synctest.Test(t, func(t *testing.T) {
				c := tokencache.New(tokencache.Options{Fetch: s.Fetch})
				defer c.Close()
				keys := fleet()
				if err := c.Prefetch(keys); err != nil {
					t.Fatal(err)
				}
				most := row.idle
				if asked {
					most = row.asked
					ask(t, c, keys, time.Hour)
				} else {
					time.Sleep(time.Hour)
				}
				before := s.Count()
				s.Set(func(s *tokencachetest.Source) { s.Err = nil })
				for end := time.Now().Add(most); time.Now().Before(end); {
					if asked {
						ask(t, c, keys, 10*time.Second)
					} else {
						time.Sleep(10 * time.Second)
					}
				}
				for _, got := range c.Status() {
					if got.Left == 0 {
						t.Fatalf("%+v, asked for %v: %v after it is well again: %+v", row.fails, asked, most, got)
					}
				}
				if spent := s.Count() - before; spent > 61 {
					t.Errorf("%+v, asked for %v: %d calls for 60 tokens", row.fails, asked, spent)
				}
			})
		}
	}
}

// An answer about one key slows no other, whatever it is.
func TestOneBadKeySlowsNoOther(t *testing.T) {
	t.Parallel()
	for _, fails := range []*tokencache.FetchError{
		{Kind: tokencache.Refused}, {Kind: tokencache.IdentityNotFound}, {Kind: tokencache.Malformed},
		{Kind: tokencache.Unreachable},
		{Kind: tokencache.Unreachable, RetryAfter: 5 * time.Minute}, {Kind: tokencache.Malformed, JustExpired: true},
	} {
		s := &tokencachetest.Source{}
		synctest.Test(t, func(t *testing.T) {
			bad := tokencache.Key{Resource: "api://bad"}
			c := tokencache.New(tokencache.Options{Fetch: func(ctx context.Context,
				key tokencache.Key) (tokencache.Fetched, error) {
				if key == bad {
					return tokencache.Fetched{}, fails
				}
				return s.Fetch(ctx, key)
			}})
			defer c.Close()
			for i := range 100 {
				if _, err := c.Get(t.Context(), bad, sdk); kindOf(t, err) != fails.Kind {
					t.Fatal(err)
				}
				before := time.Now()
				mustGet(t, c, tokencache.Key{Resource: fmt.Sprint("api://good/", i)}, sdk)
				if waited := time.Since(before); waited > time.Second {
					t.Fatalf("%+v: the other key waited %v", fails, waited)
				}
				time.Sleep(time.Second)
			}
		})
	}
}

// An alternate that fails is asked for by the schedule's measure, however often the stale token is.
func TestFailingAlternate(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		fails tokencache.Kind
		most  int // calls in an hour
	}{{tokencache.Refused, 15}, {tokencache.Malformed, 40}, {tokencache.Unreachable, 40}, {tokencache.Throttled, 40}} {
		synctest.Test(t, func(t *testing.T) {
			const blob = "https://account.blob.core.windows.net"
			var mu sync.Mutex
			calls, s := 0, &tokencachetest.Source{}
			c := tokencache.New(tokencache.Options{Fetch: func(ctx context.Context,
				key tokencache.Key) (tokencache.Fetched, error) {
				if key.Resource != blob {
					return s.Fetch(ctx, key)
				}
				mu.Lock()
				defer mu.Unlock()
				calls++
				return tokencache.Fetched{}, &tokencache.FetchError{Kind: row.fails}
			}})
			defer c.Close()
			c.SetAlternates(map[string][]string{vault.Resource: {blob}})
			need := tokencache.Need{MinTTL: 5 * time.Minute, Alternates: []string{blob}}
			mustGet(t, c, vault, need)
			s.Set(func(s *tokencachetest.Source) { s.Reuse = true })
			time.Sleep(time.Hour)
			note(t, c, "x", tokencache.Granted, time.Time{})
			time.Sleep(jitter + time.Minute)
			for end := time.Now().Add(time.Hour); time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
				mustGet(t, c, vault, need)
			}
			mu.Lock()
			defer mu.Unlock()
			if calls > row.most || calls < 5 {
				t.Errorf("%v: %d calls for the alternate, want 5 to %d", row.fails, calls, row.most)
			}
		})
	}
}

// Callers whose call has not begun are told at once what another call has found out of the source.
func TestCallersInLineAreToldOfTheSource(t *testing.T) {
	t.Parallel()
	s := &tokencachetest.Source{Latency: time.Second,
		Err: &tokencache.FetchError{Kind: tokencache.Unreachable, Extent: tokencache.OfSource}}
	bubble(t, s, func(t *testing.T, c *tokencache.Cache) {
		var all sync.WaitGroup
		before := time.Now()
		for _, key := range fleet() {
			all.Go(func() {
				var failure *tokencache.FetchError
				if _, err := c.Get(t.Context(), key, sdk); !errors.As(err, &failure) ||
					failure.Kind != tokencache.Unreachable || failure.RetryAfter != 2*time.Second {
					t.Errorf("%v", err)
				}
			})
		}
		all.Wait()
		if took := time.Since(before); took != time.Second || s.Count() > 2 {
			t.Errorf("told after %v and %d calls", took, s.Count())
		}
	})
}

// Who asks for it ends the waits after failures, of the schedule and of callers; but not a pause that the source asked
// for.
func TestTryAgain(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		fails *tokencache.FetchError
		after time.Duration
		again bool
	}{
		{&tokencache.FetchError{Kind: tokencache.Refused}, 5 * time.Hour, true},
		{&tokencache.FetchError{Kind: tokencache.Unreachable}, 5 * time.Hour, true},
		{&tokencache.FetchError{Kind: tokencache.Unreachable, Extent: tokencache.OfSource}, 5 * time.Hour, true},
		{&tokencache.FetchError{Kind: tokencache.Throttled}, 5 * time.Hour, true},
		{&tokencache.FetchError{Kind: tokencache.Throttled, RetryAfter: 5 * time.Minute}, 2 * time.Minute, false},
	} {
		s := &tokencachetest.Source{Err: row.fails}
		bubble(t, s, func(t *testing.T, c *tokencache.Cache) {
			other := tokencache.Key{Resource: "api://other"}
			if err := c.Prefetch([]tokencache.Key{vault}); err != nil {
				t.Fatal(err)
			}
			ask(t, c, []tokencache.Key{vault, other}, row.after)
			s.Set(func(s *tokencachetest.Source) { s.Err = nil })
			before := s.Count()
			c.TryAgain()
			time.Sleep(time.Second)
			if got := s.Count() == before+1; got != row.again {
				t.Errorf("%+v: %d calls for the prefetched key", row.fails, s.Count()-before)
			}
			if _, err := c.Get(t.Context(), other, sdk); (err == nil) != row.again {
				t.Errorf("%+v: a caller gets %v", row.fails, err)
			}
		})
	}
}

// A person's refresh asks at once, and whoever asks for the key afterwards gets what it brought.
func TestRefreshCutsShort(t *testing.T) {
	t.Parallel()
	for _, fails := range []*tokencache.FetchError{{Kind: tokencache.Refused},
		{Kind: tokencache.Unreachable, Extent: tokencache.OfSource}} {
		s := &tokencachetest.Source{Err: fails}
		bubble(t, s, func(t *testing.T, c *tokencache.Cache) {
			ask(t, c, []tokencache.Key{vault}, 5*time.Hour)
			s.Set(func(s *tokencachetest.Source) { s.Err = nil })
			before := time.Now()
			if outcome, err := c.Refresh(t.Context(), vault, false); outcome != tokencache.Newer || err != nil ||
				time.Since(before) != 0 {
				t.Errorf("%v, %v after %v", outcome, err, time.Since(before))
			}
			mustGet(t, c, vault, sdk)
		})
	}
}

// People are told when a key is really asked for: not before the source is asked at all.
func TestNextRefreshIsNotWithinAPause(t *testing.T) {
	t.Parallel()
	s := &tokencachetest.Source{}
	bubble(t, s, func(t *testing.T, c *tokencache.Cache) {
		mustGet(t, c, vault, sdk)
		time.Sleep(12*time.Hour - time.Minute)
		s.Set(func(s *tokencachetest.Source) {
			s.Err = &tokencache.FetchError{Kind: tokencache.Throttled, RetryAfter: 5 * time.Minute}
		})
		if _, err := c.Get(t.Context(), tokencache.Key{Resource: "api://other"}, sdk); kindOf(t,
			err) != tokencache.Throttled {
			t.Fatal(err)
		}
		for _, got := range c.Status() {
			if next := time.Until(got.NextRefresh); got.Key == vault && next != 5*time.Minute {
				t.Errorf("the refresh that is due in a minute is told to come in %v", next)
			}
		}
	})
}
