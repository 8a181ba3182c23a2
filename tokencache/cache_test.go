package tokencache_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"perceptd/tokencache"
	"perceptd/tokencache/tokencachetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var vault = tokencache.Key{Resource: "https://vault.azure.net"}

// bubble runs f in virtual time with a cache on s.
func bubble(t *testing.T, s *tokencachetest.Source, f func(t *testing.T, c *tokencache.Cache)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		c := tokencache.New(tokencache.Options{Fetch: s.Fetch, Roll: func() float64 { return 0.5 }})
		defer c.Close()
		f(t, c)
	})
}

func mustGet(t *testing.T, c *tokencache.Cache, key tokencache.Key, need tokencache.Need) tokencache.Answer {
	t.Helper()
	answer, err := c.Get(t.Context(), key, need)
	if err != nil {
		t.Fatalf("Get(%v, %+v): %v", key, need, err)
	}
	if answer.Left <= 0 || answer.Token.Text.IsZero() {
		t.Fatalf("Get(%v) gave a token with %v left", key, answer.Left)
	}
	return answer
}

func only(t *testing.T, c *tokencache.Cache) tokencache.Status {
	t.Helper()
	all := c.Status()
	if len(all) != 1 {
		t.Fatalf("%d keys, want 1: %+v", len(all), all)
	}
	return all[0]
}

func kindOf(t *testing.T, err error) tokencache.Kind {
	t.Helper()
	var fetch *tokencache.FetchError
	if !errors.As(err, &fetch) {
		t.Fatalf("%v (%T) is no *FetchError", err, err)
	}
	return fetch.Kind
}

func TestColdRequestsShareOneCall(t *testing.T) {
	t.Parallel()
	s := &tokencachetest.Source{Latency: time.Second}
	bubble(t, s, func(t *testing.T, c *tokencache.Cache) {
		var all sync.WaitGroup
		for range 1000 {
			all.Go(func() {
				if _, err := c.Get(t.Context(), vault, tokencache.Need{}); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		if s.Count() != 1 {
			t.Errorf("%d calls for 1000 callers", s.Count())
		}
		if got := only(t, c); got.Served != 1000 || got.Fetches != 1 || got.State != tokencache.Fresh {
			t.Errorf("status %+v", got)
		}
	})
}

func TestCallerThatGivesUpLeavesTheOthers(t *testing.T) {
	t.Parallel()
	s := &tokencachetest.Source{Latency: 3 * time.Second}
	bubble(t, s, func(t *testing.T, c *tokencache.Cache) {
		var all sync.WaitGroup
		all.Go(func() { mustGet(t, c, vault, tokencache.Need{}) })
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := c.Get(ctx, vault, tokencache.Need{})
		if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), vault.Resource) {
			t.Errorf("error %v", err)
		}
		all.Wait()
		mustGet(t, c, vault, tokencache.Need{})
		if s.Count() != 1 {
			t.Errorf("%d calls", s.Count())
		}
	})
}

func TestValidTokenNeverWaits(t *testing.T) {
	t.Parallel()
	s := &tokencachetest.Source{}
	bubble(t, s, func(t *testing.T, c *tokencache.Cache) {
		first := mustGet(t, c, vault, tokencache.Need{})
		s.Set(func(s *tokencachetest.Source) { s.Latency = time.Hour }) // the back end hangs from now on
		time.Sleep(12*time.Hour + time.Minute)
		before := time.Now()
		again := mustGet(t, c, vault, tokencache.Need{MinTTL: 5 * time.Minute})
		if !again.Token.Text.Equal(first.Token.Text) || time.Since(before) != 0 {
			t.Errorf("waited %v while the back end hangs", time.Since(before))
		}
		if got := only(t, c); got.State != tokencache.Failing && got.State != tokencache.Refreshing {
			t.Errorf("state %v", got.State)
		}
	})
}

func TestFailureIsSharedAndRemembered(t *testing.T) {
	t.Parallel()
	s := &tokencachetest.Source{Latency: time.Second,
		Err: &tokencache.FetchError{Kind: tokencache.Unreachable, Detail: "connection refused"}}
	bubble(t, s, func(t *testing.T, c *tokencache.Cache) {
		var all sync.WaitGroup
		for range 100 {
			all.Go(func() {
				_, err := c.Get(t.Context(), vault, tokencache.Need{})
				if kindOf(t, err) != tokencache.Unreachable {
					t.Errorf("error %v", err)
				}
			})
		}
		all.Wait()
		if _, err := c.Get(t.Context(), vault, tokencache.Need{}); kindOf(t, err) != tokencache.Unreachable {
			t.Errorf("error %v", err)
		}
		if s.Count() != 1 {
			t.Errorf("%d calls for one storm", s.Count())
		}
		if got := only(t, c); got.State != tokencache.Missing || got.Failures != 1 ||
			got.LastOutcome != tokencache.Failed || got.LastError == nil {
			t.Errorf("status %+v", got)
		}
		s.Set(func(s *tokencachetest.Source) { s.Err = nil })
		time.Sleep(2 * time.Second)
		mustGet(t, c, vault, tokencache.Need{})
		if got := only(t, c); got.Failures != 0 || got.LastError != nil {
			t.Errorf("status %+v", got)
		}
	})
}

// A caller in a tight loop on a key that cannot be had costs a call after 2 s, 4 s and so on up to some minutes, and
// hears when the next one may be made; a cold key that nobody asks for again costs none.
func TestStormOnAMissingKey(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		fails tokencache.FetchError
		first int // calls in the first ten minutes of asking without pause: at 0, 2, 6, 14 s and so on
		later int // and in the eleventh hour
	}{
		{tokencache.FetchError{Kind: tokencache.Unreachable}, 9, 12},
		{tokencache.FetchError{Kind: tokencache.Malformed}, 9, 12},
		{tokencache.FetchError{Kind: tokencache.Unreachable, Extent: tokencache.OfIdentity}, 9, 12},
		// one in 5 s for all keys
		{tokencache.FetchError{Kind: tokencache.Unreachable, Extent: tokencache.OfSource}, 121, 720},
		{tokencache.FetchError{Kind: tokencache.Throttled}, 23, 120},
		{tokencache.FetchError{Kind: tokencache.IdentityNotFound}, 9, 3},
		{tokencache.FetchError{Kind: tokencache.Refused}, 9, 3},
	} {
		s := &tokencachetest.Source{Err: &row.fails}
		bubble(t, s, func(t *testing.T, c *tokencache.Cache) {
			asked := func(span, step time.Duration) int {
				before := s.Count()
				for range span / step {
					var failure *tokencache.FetchError
					if _, err := c.Get(t.Context(), vault, tokencache.Need{}); !errors.As(err, &failure) ||
						failure.Kind != row.fails.Kind || failure.RetryAfter <= 0 {
						t.Fatalf("%v, ask again after %v", err, failure.RetryAfter)
					}
					time.Sleep(step)
				}
				return s.Count() - before
			}
			if got := asked(10*time.Minute, 100*time.Millisecond); got != row.first {
				t.Errorf("%+v: %d calls in ten minutes, want %d", row.fails, got, row.first)
			}
			asked(9*time.Hour+50*time.Minute, time.Second)
			if got := asked(time.Hour, time.Second); got != row.later {
				t.Errorf("%+v: %d calls in the eleventh hour, want %d", row.fails, got, row.later)
			}
			before := s.Count()
			time.Sleep(10 * time.Hour)
			if s.Count() != before {
				t.Errorf("%+v: %d calls that nobody asked for", row.fails, s.Count()-before)
			}
		})
	}
}

func TestSoftNeed(t *testing.T) {
	t.Parallel()
	soft := tokencache.Need{MinTTL: 5 * time.Minute}
	s := &tokencachetest.Source{Life: 10 * time.Minute, Reuse: true}
	bubble(t, s, func(t *testing.T, c *tokencache.Cache) {
		mustGet(t, c, vault, soft)
		time.Sleep(7*time.Minute + 59*time.Second) // one second before the refresh at 80 %
		s.Set(func(s *tokencachetest.Source) { s.Latency = 10 * time.Second })
		before := time.Now()
		mustGet(t, c, vault, soft)
		if waited := time.Since(before); waited != 500*time.Millisecond {
			t.Errorf("waited %v for a slow refresh, want 500ms", waited)
		}
		mustGet(t, c, vault, soft)
		if waited := time.Since(before); waited != 500*time.Millisecond {
			t.Errorf("the second caller waited as well: %v in all", waited)
		}
		time.Sleep(10 * time.Second) // the back end gave the same token
		mustGet(t, c, vault, soft)
		if s.Count() != 2 {
			t.Errorf("%d calls: none is tried again so soon", s.Count())
		}
		time.Sleep(time.Minute) // half of what was left, since the back end has nothing newer
		s.Set(func(s *tokencachetest.Source) { s.Latency, s.Reuse = 100*time.Millisecond, false })
		before = time.Now()
		if got := mustGet(t, c, vault, soft); got.Left < 9*time.Minute {
			t.Errorf("%v left after a quick refresh", got.Left)
		}
		if waited := time.Since(before); waited != 100*time.Millisecond {
			t.Errorf("waited %v", waited)
		}
	})
}

func TestSoftNeedDuringFailures(t *testing.T) {
	t.Parallel()
	s := &tokencachetest.Source{Life: 4 * time.Minute}
	bubble(t, s, func(t *testing.T, c *tokencache.Cache) {
		mustGet(t, c, vault, tokencache.Need{})
		s.Set(func(s *tokencachetest.Source) { s.Err = &tokencache.FetchError{Kind: tokencache.Refused, Detail: "no"} })
		time.Sleep(time.Minute)
		soft := tokencache.Need{MinTTL: 5 * time.Minute}
		mustGet(t, c, vault, soft)
		failed := s.Count()
		mustGet(t, c, vault, soft)
		if s.Count() != failed {
			t.Error("a remembered failure was tried again for a wish")
		}
	})
}

func TestFirmNeed(t *testing.T) {
	t.Parallel()
	s := &tokencachetest.Source{Life: time.Hour, Reuse: true}
	bubble(t, s, func(t *testing.T, c *tokencache.Cache) {
		mustGet(t, c, vault, tokencache.Need{})
		time.Sleep(40 * time.Minute)
		firm := tokencache.Need{MinTTL: 30 * time.Minute, MinTTLRequired: true}
		var short *tokencache.ShortLifeError
		if _, err := c.Get(t.Context(), vault, firm); !errors.As(err, &short) || short.Left != 20*time.Minute ||
			short.Want != 30*time.Minute {
			t.Errorf("error %v", err)
		}
		if _, err := c.Get(t.Context(), vault, firm); !errors.As(err, &short) || s.Count() != 2 {
			t.Errorf("error %v after %d calls", err, s.Count())
		}
		time.Sleep(5 * time.Minute)
		s.Set(func(s *tokencachetest.Source) { s.Reuse = false })
		if got := mustGet(t, c, vault, firm); got.Left != time.Hour {
			t.Errorf("%v left", got.Left)
		}
		s.Set(func(s *tokencachetest.Source) {
			s.Err = &tokencache.FetchError{Kind: tokencache.Unreachable, Detail: "gone"}
		})
		time.Sleep(31 * time.Minute)
		if _, err := c.Get(t.Context(), vault, firm); kindOf(t, err) != tokencache.Unreachable {
			t.Errorf("error %v", err)
		}
		if _, err := c.Get(t.Context(), vault, firm); kindOf(t, err) != tokencache.Unreachable {
			t.Errorf("remembered error %v", err)
		}
		mustGet(t, c, vault, tokencache.Need{})
	})
}

func TestRetryAfter(t *testing.T) {
	t.Parallel()
	for _, row := range []struct{ told, obeyed time.Duration }{
		{7 * time.Second, 7 * time.Second},
		{2 * time.Minute, 2 * time.Minute},
		{24 * 365 * time.Hour, 5 * time.Minute}, // nobody waits years
	} {
		s := &tokencachetest.Source{Err: &tokencache.FetchError{Kind: tokencache.Throttled, RetryAfter: row.told,
			Detail: "too many"}}
		bubble(t, s, func(t *testing.T, c *tokencache.Cache) {
			other := tokencache.Key{Resource: "https://storage.azure.com"}
			_, err := c.Get(t.Context(), vault, tokencache.Need{})
			if kindOf(t, err) != tokencache.Throttled {
				t.Fatal(err)
			}
			for range int(row.obeyed/time.Second) - 1 {
				time.Sleep(time.Second)
				var fetch *tokencache.FetchError
				for _, key := range []tokencache.Key{vault, other} {
					if _, err := c.Get(t.Context(), key, tokencache.Need{}); !errors.As(err, &fetch) ||
						fetch.RetryAfter <= 0 || fetch.RetryAfter > row.obeyed {
						t.Fatalf("%v: error %v, retry after %v", key, err, fetch.RetryAfter)
					}
				}
				if _, err := c.Refresh(t.Context(), other, false); kindOf(t, err) != tokencache.Throttled {
					t.Fatal(err)
				}
			}
			if s.Count() != 1 {
				t.Errorf("%d calls within Retry-After %v", s.Count(), row.told)
			}
			s.Set(func(s *tokencachetest.Source) { s.Err = nil })
			time.Sleep(time.Second)
			mustGet(t, c, vault, tokencache.Need{})
			mustGet(t, c, other, tokencache.Need{})
		})
	}
}

func TestUnusableAnswers(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name string
		edit func(*tokencache.Fetched)
		want string
	}{
		{"no token", func(f *tokencache.Fetched) { f.Token.Text = tokencache.NewSecret("") }, "no token"},
		{"no life", func(f *tokencache.Fetched) { f.Left = 0 }, "expired"},
		{"expired by the wall clock", func(f *tokencache.Fetched) { f.Token.ExpiresOn = time.Now().Add(-time.Minute) },
			"expired 1m0s ago"},
	} {
		s := &tokencachetest.Source{Edit: row.edit}
		bubble(t, s, func(t *testing.T, c *tokencache.Cache) {
			_, err := c.Get(t.Context(), vault, tokencache.Need{})
			if kindOf(t, err) != tokencache.Malformed || !strings.Contains(err.Error(), row.want) {
				t.Errorf("%s: %v", row.name, err)
			}
		})
	}
}

func TestErrorsWithoutAKindGetOne(t *testing.T) {
	t.Parallel()
	s := &tokencachetest.Source{Err: errors.New("the cable is cut")}
	bubble(t, s, func(t *testing.T, c *tokencache.Cache) {
		_, err := c.Get(t.Context(), vault, tokencache.Need{})
		if kindOf(t, err) != tokencache.Unreachable || !strings.Contains(err.Error(), "the cable is cut") {
			t.Error(err)
		}
	})
	s = &tokencachetest.Source{Latency: time.Hour}
	bubble(t, s, func(t *testing.T, c *tokencache.Cache) {
		before := time.Now()
		_, err := c.Get(t.Context(), vault, tokencache.Need{})
		if kindOf(t, err) != tokencache.Unreachable || !strings.Contains(err.Error(), "no answer within 15s") ||
			time.Since(before) != 15*time.Second {
			t.Errorf("%v after %v", err, time.Since(before))
		}
	})
}

// A life beyond what such a token has is not believed: the clock that told it was wrong.
func TestLifeIsBoundedByTheNominalOne(t *testing.T) {
	t.Parallel()
	s := &tokencachetest.Source{Edit: func(f *tokencache.Fetched) {
		f.Left, f.Token.ExpiresOn = 1000*time.Hour, time.Time{}
	}}
	bubble(t, s, func(t *testing.T, c *tokencache.Cache) {
		if got := mustGet(t, c, vault, tokencache.Need{}); got.Left != 24*time.Hour {
			t.Errorf("%v left", got.Left)
		}
	})
}

func TestSlowAnswersShortenTheLife(t *testing.T) {
	t.Parallel()
	s := &tokencachetest.Source{Latency: 10 * time.Second,
		Edit: func(f *tokencache.Fetched) { f.Token.ExpiresOn = time.Time{} }}
	bubble(t, s, func(t *testing.T, c *tokencache.Cache) {
		if got := mustGet(t, c, vault, tokencache.Need{}); got.Left != 24*time.Hour-10*time.Second {
			t.Errorf("%v left: the token may have been issued when the call began", got.Left)
		}
	})
}

func TestOlderTokenNeverReplacesANewer(t *testing.T) {
	t.Parallel()
	s := &tokencachetest.Source{}
	bubble(t, s, func(t *testing.T, c *tokencache.Cache) {
		held := mustGet(t, c, vault, tokencache.Need{})
		s.Set(func(s *tokencachetest.Source) {
			s.Edit = func(f *tokencache.Fetched) { // what another replica has had for an hour longer
				f.Token.ExpiresOn = held.Token.ExpiresOn.Add(-time.Hour)
				f.Left = time.Until(f.Token.ExpiresOn)
			}
		})
		time.Sleep(time.Hour)
		if outcome, err := c.Refresh(t.Context(), vault, false); err != nil || outcome != tokencache.Older {
			t.Errorf("refresh: %v, %v", outcome, err)
		}
		if got := mustGet(t, c, vault, tokencache.Need{}); !got.Token.Text.Equal(held.Token.Text) {
			t.Error("an older token came in")
		}
		time.Sleep(22 * time.Hour)
		if got := mustGet(t, c, vault, tokencache.Need{}); !got.Token.Text.Equal(held.Token.Text) {
			t.Error("the held token was lost before its expiry")
		}
	})
}

func TestRefresh(t *testing.T) {
	t.Parallel()
	s := &tokencachetest.Source{Reuse: true, Latency: time.Second}
	bubble(t, s, func(t *testing.T, c *tokencache.Cache) {
		if outcome, err := c.Refresh(t.Context(), vault, false); err != nil || outcome != tokencache.Newer {
			t.Errorf("first: %v, %v", outcome, err)
		}
		if outcome, err := c.Refresh(t.Context(), vault, false); err != nil || outcome != tokencache.Unchanged {
			t.Errorf("second: %v, %v", outcome, err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if _, err := c.Refresh(ctx, vault, false); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("gave up: %v", err)
		}
		s.Set(func(s *tokencachetest.Source) { s.Err = &tokencache.FetchError{Kind: tokencache.Refused, Detail: "no"} })
		time.Sleep(time.Minute)
		if outcome, err := c.Refresh(t.Context(), vault, false); kindOf(t, err) != tokencache.Refused ||
			outcome != tokencache.Failed {
			t.Errorf("failing: %v, %v", outcome, err)
		}
	})
}

func TestRetain(t *testing.T) {
	t.Parallel()
	storage := tokencache.Key{Resource: "https://storage.azure.com"}
	s := &tokencachetest.Source{Latency: time.Second}
	bubble(t, s, func(t *testing.T, c *tokencache.Cache) {
		mustGet(t, c, vault, tokencache.Need{})
		mustGet(t, c, storage, tokencache.Need{})
		var waiter sync.WaitGroup
		waiter.Go(func() {
			if _, err := c.Refresh(t.Context(), vault, false); !errors.Is(err, tokencache.ErrDropped) {
				t.Errorf("a waiter for a dropped key got %v", err)
			}
		})
		synctest.Wait()
		c.Retain(func(k tokencache.Key) bool { return k == storage })
		waiter.Wait()
		if _, err := c.Get(t.Context(), vault, tokencache.Need{}); !errors.Is(err, tokencache.ErrDropped) {
			t.Errorf("a dropped key gave %v", err)
		}
		if _, err := c.Refresh(t.Context(), vault, false); !errors.Is(err, tokencache.ErrDropped) {
			t.Errorf("refreshing a dropped key gave %v", err)
		}
		time.Sleep(5 * time.Second) // the fetch for the dropped key lands, in nothing
		if got := only(t, c); got.Key != storage {
			t.Errorf("%v came back", got.Key)
		}
	})
}

// What is fetched for a key that was dropped and wanted again meanwhile is not what was asked for.
func TestLandingAfterDropAndReturn(t *testing.T) {
	t.Parallel()
	s := &tokencachetest.Source{Latency: 10 * time.Second}
	bubble(t, s, func(t *testing.T, c *tokencache.Cache) {
		go c.Refresh(t.Context(), vault, false)
		synctest.Wait()
		c.Retain(func(tokencache.Key) bool { return false })
		c.Retain(func(tokencache.Key) bool { return true })
		time.Sleep(5 * time.Second)
		before := time.Now()
		mustGet(t, c, vault, tokencache.Need{})
		if time.Since(before) != 10*time.Second || s.Count() != 2 {
			t.Errorf("took %v and %d calls", time.Since(before), s.Count())
		}
	})
}

func TestPrefetch(t *testing.T) {
	t.Parallel()
	s := &tokencachetest.Source{}
	bubble(t, s, func(t *testing.T, c *tokencache.Cache) {
		if err := c.Prefetch([]tokencache.Key{vault}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if got := only(t, c); !got.Prefetch || got.State != tokencache.Fresh {
			t.Errorf("status %+v", got)
		}
		time.Sleep(10*24*time.Hour + time.Minute) // nobody asks
		if got := only(t, c); got.State != tokencache.Fresh || got.Left < 11*time.Hour {
			t.Errorf("after ten days %+v", got)
		}
		if err := c.Prefetch(nil); err != nil {
			t.Fatal(err)
		}
		time.Sleep(25 * time.Hour)
		if got := c.Status(); len(got) != 0 {
			t.Errorf("no longer prefetched, and still there: %+v", got)
		}
		if err := c.Prefetch(make([]tokencache.Key, tokencache.MaxKeys+1)); err == nil ||
			!strings.Contains(err.Error(), "257") {
			t.Errorf("257 keys: %v", err)
		}
	})
}

func TestPrefetchKeepsTryingAFailingSource(t *testing.T) {
	t.Parallel()
	s := &tokencachetest.Source{Err: &tokencache.FetchError{Kind: tokencache.Unreachable, Detail: "no network yet"}}
	bubble(t, s, func(t *testing.T, c *tokencache.Cache) {
		if err := c.Prefetch([]tokencache.Key{vault}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(24 * time.Hour)
		if calls := s.Count(); calls < 24*12 || calls > 24*12*2+20 {
			t.Errorf("%d calls in a day without a network", calls)
		}
		s.Set(func(s *tokencachetest.Source) { s.Err = nil })
		time.Sleep(5 * time.Minute)
		if got := only(t, c); got.State != tokencache.Fresh {
			t.Errorf("the network is back for 5 minutes: %+v", got)
		}
	})
}

func TestIdleKeyExpiresAndComesBack(t *testing.T) {
	t.Parallel()
	s := &tokencachetest.Source{}
	bubble(t, s, func(t *testing.T, c *tokencache.Cache) {
		mustGet(t, c, vault, tokencache.Need{}) // hour 0
		time.Sleep(25 * time.Hour)              // refreshed at 12 and 24, asked for at 0 only
		calls := s.Count()
		if got := only(t, c); calls != 3 || got.State != tokencache.Fresh {
			t.Fatalf("%d calls, status %+v", calls, got)
		}
		time.Sleep(12 * time.Hour)
		if got := only(t, c); got.State != tokencache.Idle || s.Count() != calls || !got.NextRefresh.IsZero() {
			t.Fatalf("%d calls, status %+v", s.Count(), got)
		}
		mustGet(t, c, vault, tokencache.Need{}) // somebody asks again, 11 h before its end
		if got := only(t, c); got.State != tokencache.Fresh || got.NextRefresh.IsZero() {
			t.Errorf("status %+v", got)
		}
		time.Sleep(80 * time.Hour)
		if got := c.Status(); len(got) != 0 {
			t.Errorf("nobody asks for days: %+v", got)
		}
	})
}

func TestLeastRecentlyUsedGoesFirst(t *testing.T) {
	t.Parallel()
	s := &tokencachetest.Source{}
	bubble(t, s, func(t *testing.T, c *tokencache.Cache) {
		key := func(i int) tokencache.Key { return tokencache.Key{Resource: fmt.Sprintf("api://%d", i)} }
		if err := c.Prefetch([]tokencache.Key{key(0)}); err != nil {
			t.Fatal(err)
		}
		for i := range tokencache.MaxKeys {
			mustGet(t, c, key(i), tokencache.Need{})
		}
		mustGet(t, c, key(1), tokencache.Need{})
		mustGet(t, c, key(1000), tokencache.Need{})
		mustGet(t, c, key(1001), tokencache.Need{})
		kept := make(map[tokencache.Key]bool)
		for _, status := range c.Status() {
			kept[status.Key] = true
		}
		if len(kept) != tokencache.MaxKeys || !kept[key(0)] || !kept[key(1)] || kept[key(2)] || kept[key(3)] ||
			!kept[key(4)] {
			t.Errorf("%d keys; 0 %v, 1 %v, 2 %v, 3 %v, 4 %v", len(kept), kept[key(0)], kept[key(1)], kept[key(2)],
				kept[key(3)], kept[key(4)])
		}
	})
}

func TestFullOfPrefetchedKeys(t *testing.T) {
	t.Parallel()
	s := &tokencachetest.Source{}
	bubble(t, s, func(t *testing.T, c *tokencache.Cache) {
		var keys []tokencache.Key
		for i := range tokencache.MaxKeys {
			keys = append(keys, tokencache.Key{Resource: fmt.Sprintf("api://%d", i)})
		}
		mustGet(t, c, vault, tokencache.Need{})
		if err := c.Prefetch(keys); err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Minute)
		if n := len(c.Status()); n != tokencache.MaxKeys {
			t.Errorf("%d keys", n)
		}
		mustGet(t, c, vault, tokencache.Need{}) // served all the same, and the first to go
		mustGet(t, c, keys[7], tokencache.Need{})
	})
}

func TestSourceLimits(t *testing.T) {
	t.Parallel()
	s := &tokencachetest.Source{Latency: 30 * time.Millisecond}
	bubble(t, s, func(t *testing.T, c *tokencache.Cache) {
		var all sync.WaitGroup
		for i := range 40 {
			all.Go(func() { mustGet(t, c, tokencache.Key{Resource: fmt.Sprintf("api://%d", i)}, tokencache.Need{}) })
		}
		all.Wait()
		if s.Peak > 2 {
			t.Errorf("%d calls at once", s.Peak)
		}
		for i := 5; i < len(s.Times); i++ {
			if gap := s.Times[i].Sub(s.Times[i-5]); gap < time.Second {
				t.Errorf("six calls within %v", gap)
			}
		}
		if took := s.Times[39].Sub(s.Times[0]); took > 8*time.Second {
			t.Errorf("40 calls took %v: the source was left idle", took)
		}
	})
}

// Whoever waits goes before whoever does not: a caller's miss is not queued behind the prefetching of
// two hundred keys, and joining a queued prefetch moves it to the front.
func TestCallersGoFirst(t *testing.T) {
	t.Parallel()
	s := &tokencachetest.Source{Latency: 200 * time.Millisecond}
	bubble(t, s, func(t *testing.T, c *tokencache.Cache) {
		var keys []tokencache.Key
		for i := range 200 {
			keys = append(keys, tokencache.Key{Resource: fmt.Sprintf("api://%d", i)})
		}
		if err := c.Prefetch(keys); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		before := time.Now()
		mustGet(t, c, vault, tokencache.Need{})
		if waited := time.Since(before); waited > time.Second {
			t.Errorf("a miss waited %v", waited)
		}
		begun := make(map[tokencache.Key]bool)
		s.Set(func(s *tokencachetest.Source) {
			for _, key := range s.Keys {
				begun[key] = true
			}
		})
		for _, key := range keys {
			if !begun[key] {
				before = time.Now()
				mustGet(t, c, key, tokencache.Need{})
				if waited := time.Since(before); waited > time.Second {
					t.Errorf("a caller that joined a queued prefetch waited %v", waited)
				}
				break
			}
		}
	})
}

// Keys for which the back end hangs, and whose callers come again and again, take every call there is;
// the others are refreshed all the same.
func TestHangingKeysDoNotStarveTheOthers(t *testing.T) {
	t.Parallel()
	s := &tokencachetest.Source{}
	synctest.Test(t, func(t *testing.T) {
		c := tokencache.New(tokencache.Options{Roll: func() float64 { return 0.5 },
			Fetch: func(ctx context.Context, key tokencache.Key) (tokencache.Fetched, error) {
				if key == vault {
					return s.Fetch(ctx, key)
				}
				<-ctx.Done()
				return tokencache.Fetched{}, ctx.Err()
			}})
		defer c.Close()
		if err := c.Prefetch([]tokencache.Key{vault}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		time.Sleep(11 * time.Hour)
		var all sync.WaitGroup
		for i := range 8 {
			all.Go(func() {
				for ctx.Err() == nil {
					_, _ = c.Get(ctx, tokencache.Key{Resource: fmt.Sprintf("api://%d", i)}, tokencache.Need{})
					time.Sleep(time.Second)
				}
			})
		}
		time.Sleep(time.Hour + 2*time.Minute)
		if s.Count() != 2 {
			t.Errorf("%d calls for the key that works: its refresh was due two minutes ago", s.Count())
		}
		cancel()
		all.Wait()
	})
}

// A pause that the back end asks for is told to whoever comes, also for a key whose fetch is queued.
func TestPauseIsToldForQueuedKeys(t *testing.T) {
	t.Parallel()
	s := &tokencachetest.Source{Latency: time.Second,
		Err: &tokencache.FetchError{Kind: tokencache.Throttled, RetryAfter: time.Minute, Detail: "too many"}}
	bubble(t, s, func(t *testing.T, c *tokencache.Cache) {
		var keys []tokencache.Key
		for i := range 4 {
			keys = append(keys, tokencache.Key{Resource: fmt.Sprintf("api://%d", i)})
		}
		if err := c.Prefetch(keys); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Second)
		before := time.Now()
		for _, key := range keys {
			if _, err := c.Get(t.Context(), key, tokencache.Need{}); kindOf(t, err) != tokencache.Throttled {
				t.Errorf("%v: %v", key, err)
			}
			if _, err := c.Refresh(t.Context(), key, false); kindOf(t, err) != tokencache.Throttled {
				t.Errorf("refresh of %v: %v", key, err)
			}
		}
		if waited := time.Since(before); waited != 0 {
			t.Errorf("waited %v to be told", waited)
		}
	})
}

func TestClose(t *testing.T) {
	t.Parallel()
	s := &tokencachetest.Source{Latency: time.Hour}
	bubble(t, s, func(t *testing.T, c *tokencache.Cache) {
		var waiter sync.WaitGroup
		waiter.Go(func() {
			if _, err := c.Get(t.Context(), vault, tokencache.Need{}); !errors.Is(err, tokencache.ErrClosed) {
				t.Errorf("a waiter got %v", err)
			}
		})
		synctest.Wait()
		c.Close()
		waiter.Wait()
		if _, err := c.Get(t.Context(), vault, tokencache.Need{}); !errors.Is(err, tokencache.ErrClosed) {
			t.Errorf("Get after Close: %v", err)
		}
		if err := c.Prefetch(nil); !errors.Is(err, tokencache.ErrClosed) {
			t.Errorf("Prefetch after Close: %v", err)
		}
		if err := c.Ping(t.Context()); !errors.Is(err, tokencache.ErrClosed) {
			t.Errorf("Check after Close: %v", err)
		}
	})
}

// Not in virtual time: a goroutine that waits for a lock would hold the bubble's clock.
func TestCheck(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	var armed atomic.Bool
	reading := make(chan struct{}, 10)
	clock := tokencache.Clock{Boot: func() time.Duration {
		if armed.Load() {
			reading <- struct{}{}
		}
		mu.Lock()
		defer mu.Unlock()
		return time.Hour
	}}
	c := tokencache.New(tokencache.Options{Fetch: (&tokencachetest.Source{}).Fetch, Clock: clock})
	defer c.Close()
	if err := c.Ping(t.Context()); err != nil {
		t.Fatal(err)
	}
	mu.Lock() // whoever reads the clock under the cache's lock now stays there
	armed.Store(true)
	stuck := make(chan struct{})
	go func() {
		defer close(stuck)
		c.Status()
	}()
	<-reading
	armed.Store(false)
	for _, want := range []string{"lock", "schedule"} {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		err := c.Ping(ctx)
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), want) {
			t.Errorf("stuck, and Check says %v, want a word of the %s", err, want)
		}
	}
	mu.Unlock()
	<-stuck
	if err := c.Ping(t.Context()); err != nil {
		t.Errorf("no longer stuck, and Check says %v", err)
	}
}

func TestObserve(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := &tokencachetest.Source{Latency: time.Second}
		events := make(chan tokencache.Event, 10)
		c := tokencache.New(tokencache.Options{Fetch: s.Fetch, Roll: func() float64 { return 0.5 },
			Observe: func(e tokencache.Event) { events <- e }})
		defer c.Close()
		mustGet(t, c, vault, tokencache.Need{})
		got := <-events
		if got.Outcome != tokencache.Newer || got.Key != vault || got.Took != time.Second ||
			got.Left != 24*time.Hour-time.Second {
			t.Errorf("event %+v", got)
		}
		if want := firstRefreshOf(got.Left); got.Retry != want {
			t.Errorf("next planned in %v, want %v", got.Retry, want)
		}
	})
}

func firstRefreshOf(left time.Duration) time.Duration { return left / 2 }

// The wall clock may say whatever it likes while nobody vouches for it; where it is known to be right,
// a token is expired when either clock says so.
func TestExpiryByTwoClocks(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		var skew time.Duration
		var synchronised bool
		set := func(by time.Duration, known bool) {
			mu.Lock()
			defer mu.Unlock()
			skew, synchronised = by, known
		}
		clock := tokencache.Clock{
			Wall: func() time.Time {
				mu.Lock()
				defer mu.Unlock()
				return time.Now().Round(0).Add(skew)
			},
			Synchronised: func() bool {
				mu.Lock()
				defer mu.Unlock()
				return synchronised
			},
		}
		s := &tokencachetest.Source{}
		set(-20*365*24*time.Hour, false)
		c := tokencache.New(tokencache.Options{Fetch: s.Fetch, Clock: clock})
		defer c.Close()
		mustGet(t, c, vault, tokencache.Need{})
		set(30*365*24*time.Hour, false) // a wild step, not vouched for
		got := mustGet(t, c, vault, tokencache.Need{})
		if got.Left != 24*time.Hour || s.Count() != 1 {
			t.Errorf("%v left, %d calls", got.Left, s.Count())
		}
		set(10*time.Hour, true)
		if got := mustGet(t, c, vault, tokencache.Need{}); got.Left != 14*time.Hour {
			t.Errorf("%v left by a trusted clock that is 10 h ahead", got.Left)
		}
		set(25*time.Hour, true)
		s.Set(func(s *tokencachetest.Source) { s.Err = errors.New("down") })
		if _, err := c.Get(t.Context(), vault, tokencache.Need{}); kindOf(t, err) != tokencache.Unreachable {
			t.Errorf("expired by the trusted clock, and Get says %v", err)
		}
		time.Sleep(10 * time.Minute)
		set(0, true) // it was wrong after all, and is set right
		if got := mustGet(t, c, vault, tokencache.Need{}); got.Left != 23*time.Hour+50*time.Minute {
			t.Errorf("%v left: a token was deleted for a clock's sake", got.Left)
		}
		s.Set(func(s *tokencachetest.Source) { s.Err = nil })
		time.Sleep(5 * time.Minute)
		before := s.Count()
		set(25*time.Hour, true)
		time.Sleep(6 * time.Minute)
		if s.Count() == before {
			t.Error("the clock says expired for minutes, and nothing newer was asked for")
		}
	})
}

func TestNames(t *testing.T) {
	t.Parallel()
	for got, want := range map[fmt.Stringer]string{
		vault: "system-assigned for https://vault.azure.net",
		tokencache.Key{Selector: tokencache.Selector{Kind: tokencache.ClientID, ID: "c"},
			Resource: "r"}: "client_id c for r",
		tokencache.ObjectID:   "object_id",
		tokencache.ResourceID: "resource_id",
	} {
		if got.String() != want {
			t.Errorf("%q, want %q", got.String(), want)
		}
	}
	fetch := &tokencache.FetchError{Kind: tokencache.IdentityNotFound, Detail: "the endpoint says so"}
	if got, want := fetch.Error(), "identity not found: the endpoint says so"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	if got := (&tokencache.ShortLifeError{Left: time.Minute, Want: time.Hour}).Error(); !strings.Contains(got, "1m0s") {
		t.Error(got)
	}
}
