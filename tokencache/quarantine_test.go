package tokencache_test

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"perceptd/tokencache"
)

// granted is an identity whose tokens the back end gives, beside one that it throttles for ever.
var granted = tokencache.Selector{Kind: tokencache.ClientID, ID: "granted"}

// partial throttles the device's own identity, until it is well, and rolls over at the expiry for others.
type partial struct {
	after time.Duration // Retry-After

	mu        sync.Mutex
	well      bool
	throttled int
	issued    map[tokencache.Key]time.Time
}

func (s *partial) Fetch(_ context.Context, key tokencache.Key) (tokencache.Fetched, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if key.Selector != granted && !s.well {
		s.throttled++
		return tokencache.Fetched{}, &tokencache.FetchError{Kind: tokencache.Throttled, RetryAfter: s.after}
	}
	if time.Since(s.issued[key]) >= 24*time.Hour {
		s.issued[key] = time.Now()
	}
	return tokenOf("a", key, s.issued[key]), nil
}

func (s *partial) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.throttled
}

// Keys that are throttled for ever leave others their tokens, asked for or not, whatever pause the back end asks for at
// each 429, but for such a pause where they expire in it; and a cold request of another identity waits for no more than
// one such pause, and ten seconds until its module comes again.
func TestThrottledKeysStarveNobody(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		keys, healthy int
		after         time.Duration
		asked         bool
		most          int // calls an hour for those that are throttled
	}{
		{1, 60, 0, false, 3},
		{1, 60, 0, true, 6},
		{1, 60, 30 * time.Second, false, 3},
		{1, 60, 5 * time.Minute, false, 3},
		{1, 5, 5 * time.Minute, true, 6},
		{3, 60, 5 * time.Minute, true, 6},
		{30, 20, 5 * time.Minute, true, 8},
		{30, 20, 0, true, 30 * 6},
	} {
		synctest.Test(t, func(t *testing.T) {
			s := &partial{after: row.after, issued: make(map[tokencache.Key]time.Time)}
			c := tokencache.New(tokencache.Options{Fetch: s.Fetch})
			defer c.Close()
			var throttled, keys []tokencache.Key
			for i := range row.keys {
				throttled = append(throttled, tokencache.Key{Resource: fmt.Sprint("api://throttled/", i)})
			}
			for i := range row.healthy {
				keys = append(keys, tokencache.Key{Selector: granted, Resource: fmt.Sprint("api://", i)})
			}
			if err := c.Prefetch(append(keys, throttled...)); err != nil {
				t.Fatal(err)
			}
			if row.asked {
				ctx, cancel := context.WithCancel(t.Context())
				var all sync.WaitGroup
				defer all.Wait()
				defer cancel()
				for _, key := range throttled {
					all.Go(func() {
						for ctx.Err() == nil {
							_, _ = c.Get(ctx, key, sdk)
							time.Sleep(10 * time.Second)
						}
					})
				}
			}
			time.Sleep(30 * time.Hour)
			before := s.count()
			const hours = 24
			for i := range hours {
				began := time.Now()
				for time.Since(began) < time.Hour {
					if _, err := c.Get(t.Context(),
						tokencache.Key{Selector: granted, Resource: fmt.Sprint("api://cold/", i)}, sdk); err == nil {
						break
					}
					time.Sleep(10 * time.Second)
				}
				if took := time.Since(began); took > 5*time.Minute+10*time.Second {
					t.Errorf("%+v: a cold request took %v", row, took)
				}
				missing := func() (n int) {
					for _, got := range c.Status() {
						if got.Prefetch && got.Key.Selector == granted && got.Left == 0 {
							n++
						}
					}
					return n
				}
				if missing() > 0 { // they expired in a pause
					time.Sleep(5 * time.Minute)
				}
				if n := missing(); n > 0 {
					t.Errorf("%+v: %d keys have no token", row, n)
				}
				time.Sleep(time.Hour - time.Since(began))
			}
			if spent := s.count() - before; spent > hours*row.most || spent == 0 {
				t.Errorf("%+v: %d calls in %d hours, want 1 to %d", row, spent, hours, hours*row.most)
			}
		})
	}
}

// A key that was throttled for itself is found to be well again: by a caller's call within 20 minutes, by the
// schedule's within an hour, at once when somebody has every key tried again.
func TestThrottledKeyIsWellAgain(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		asked, reload bool
		most          time.Duration
	}{{true, false, 20*time.Minute + 10*time.Second}, {false, false, time.Hour}, {false, true, 0}} {
		synctest.Test(t, func(t *testing.T) {
			s := &partial{issued: make(map[tokencache.Key]time.Time)}
			c := tokencache.New(tokencache.Options{Fetch: s.Fetch})
			defer c.Close()
			if err := c.Prefetch([]tokencache.Key{vault}); err != nil {
				t.Fatal(err)
			}
			for i := range 100 {
				_, _ = c.Get(t.Context(), tokencache.Key{Selector: granted, Resource: fmt.Sprint("api://", i)}, sdk)
				time.Sleep(20 * time.Minute)
			}
			s.mu.Lock()
			s.well = true
			s.mu.Unlock()
			if row.reload {
				c.TryAgain()
			}
			if row.asked {
				ask(t, c, []tokencache.Key{vault}, row.most)
			} else {
				time.Sleep(row.most)
			}
			synctest.Wait()
			for _, got := range c.Status() {
				if got.Key == vault && got.Left == 0 {
					t.Errorf("%+v: %+v", row, got)
				}
			}
		})
	}
}

// An endpoint that takes few calls a minute is no key's own trouble: sixty keys have their tokens in not much more than
// the minutes that this takes.
func TestSlowEndpointFills(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		takes := bucket(6)
		s := &endpoint{answer: func() (*tokencache.FetchError, time.Duration) {
			if takes() {
				return nil, 0
			}
			return throttled, 0
		}}
		c := tokencache.New(tokencache.Options{Fetch: s.Fetch})
		defer c.Close()
		if err := c.Prefetch(fleet()); err != nil {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Minute)
		for _, got := range c.Status() {
			if got.Left == 0 {
				t.Errorf("no token of %v after %d calls: %+v", got.Key, s.count(), got)
			}
		}
	})
}
