package tokencache_test

import (
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"perceptd/tokencache"
	"perceptd/tokencache/tokencachetest"
)

func forgotten(t *testing.T, c *tokencache.Cache, key tokencache.Key, want tokencache.Outcome) (dropped string) {
	t.Helper()
	got, dropped, err := c.Forget(t.Context(), key, true)
	if err != nil || got != want {
		t.Fatalf("forget %v: %v, %v, want %v", key, got, err, want)
	}
	return dropped
}

// A token is dropped with what was learnt of its life, and fetched anew; callers that come meanwhile wait for the
// fetch.
func TestForget(t *testing.T) {
	t.Parallel()
	s := &tokencachetest.Source{Latency: 2 * time.Second}
	bubble(t, s, func(t *testing.T, c *tokencache.Cache) {
		held := mustGet(t, c, vault, tokencache.Need{})
		_, changed, err := c.Peek(vault)
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		got := make(chan tokencache.Answer)
		go func() {
			time.Sleep(time.Second) // the fetch is under way
			answer, _ := c.Get(t.Context(), vault, tokencache.Need{})
			got <- answer
		}()
		if dropped := forgotten(t, c, vault, tokencache.Newer); dropped != held.Token.Text.SHA256() {
			t.Errorf("dropped %q", dropped)
		}
		if answer := <-got; answer.Token == nil || answer.Token.Text.Equal(held.Token.Text) || s.Count() != 2 {
			t.Errorf("the caller that waited got %v after %d calls", answer.Token, s.Count())
		}
		select {
		case <-changed:
		default:
			t.Error("who watches was not told")
		}
	})
}

// Without insisting a token is dropped only for one that has arrived: callers have it until then, and keep it where the
// back end gives a page, an error, or a token that is of no use.
func TestForgetGivesUpNothingInVain(t *testing.T) {
	t.Parallel()
	for name, fails := range map[string]func(*tokencachetest.Source){
		"a page": func(s *tokencachetest.Source) {
			s.Err = &tokencache.FetchError{Kind: tokencache.Malformed, Detail: "an HTML page"}
		},
		"an error": func(s *tokencachetest.Source) {
			s.Err = &tokencache.FetchError{Kind: tokencache.Unreachable, Detail: "refused"}
		},
		"too old": func(s *tokencachetest.Source) { s.Life = -time.Hour },
	} {
		s := &tokencachetest.Source{Latency: 2 * time.Second}
		bubble(t, s, func(t *testing.T, c *tokencache.Cache) {
			held := mustGet(t, c, vault, tokencache.Need{})
			has := func() bool { return mustGet(t, c, vault, tokencache.Need{}).Token.Text.Equal(held.Token.Text) }
			s.Set(fails)
			forget := func() (dropped string, err error) {
				done := make(chan struct{})
				go func() {
					defer close(done)
					_, dropped, err = c.Forget(t.Context(), vault, false)
				}()
				time.Sleep(time.Second)
				if !has() {
					t.Errorf("%s: it is dropped before anything came", name)
				}
				<-done
				return dropped, err
			}
			if dropped, err := forget(); err == nil || dropped != "" || !has() {
				t.Errorf("%s: dropped %q, %v", name, dropped, err)
			}
			s.Set(func(s *tokencachetest.Source) { s.Err, s.Life = nil, 0 })
			if _, err := c.Refresh(t.Context(), vault, true); err != nil {
				t.Fatal(name, err)
			}
			held = mustGet(t, c, vault, tokencache.Need{})
			if dropped, err := forget(); err != nil || dropped != held.Token.Text.SHA256() || has() {
				t.Errorf("%s, then another: dropped %q, %v", name, dropped, err)
			}
		})
	}
}

// Where nothing may be asked now, nothing is dropped.
func TestForgetDropsNothingInVain(t *testing.T) {
	t.Parallel()
	s := &tokencachetest.Source{}
	bubble(t, s, func(t *testing.T, c *tokencache.Cache) {
		held := mustGet(t, c, vault, tokencache.Need{})
		note(t, c, "x", tokencache.Changed, time.Time{})
		var spreads *tokencache.PostponedError
		if _, dropped, err := c.Forget(t.Context(), vault, false); !errors.As(err, &spreads) || dropped != "" {
			t.Errorf("while a change spreads: %v, dropped %q", err, dropped)
		}
		s.Set(func(s *tokencachetest.Source) {
			s.Err = &tokencache.FetchError{Kind: tokencache.Throttled, RetryAfter: time.Minute, Detail: "slow down"}
		})
		_, _ = c.Refresh(t.Context(), storage, true)
		if _, dropped, err := c.Forget(t.Context(), vault, true); kindOf(t, err) != tokencache.Throttled ||
			dropped != "" {
			t.Errorf("in a pause: %v, dropped %q", err, dropped)
		}
		if got := mustGet(t, c, vault, tokencache.Need{}); !got.Token.Text.Equal(held.Token.Text) {
			t.Error("the token is gone")
		}
	})
}

// A life that was learnt wrongly is forgotten; that the token was received is not.
func TestForgetForgetsTheLife(t *testing.T) {
	t.Parallel()
	registered(t, func(t *testing.T, r *registry, c *tokencache.Cache) {
		began := time.Now()
		left := time.Hour
		r.gives(func(key tokencache.Key) tokencache.Fetched {
			f := tokenOf("a", key, began)
			f.Left, f.Token.Claims.IssuedAt = left, time.Time{}
			return f
		})
		refreshed(t, c, vault, tokencache.Newer)
		received := only(t, c).ReceivedOn
		time.Sleep(10 * time.Minute)
		r.during(func() { left = 5 * time.Hour })
		refreshed(t, c, vault, tokencache.Unchanged)
		if got := only(t, c).Left; got > 24*time.Hour-10*time.Minute {
			t.Errorf("%v left before", got)
		}
		forgotten(t, c, vault, tokencache.Unchanged)
		if got := only(t, c); got.Left != left || !got.ReceivedOn.Equal(received) {
			t.Errorf("%v left, received on %v, and first on %v", got.Left, got.ReceivedOn, received)
		}
	})
}

// The token that a revocation withholds is withheld when it comes again, also over a restart, and by a clock that is
// wrong.
func TestForgetWeakensNoRevocation(t *testing.T) {
	t.Parallel()
	for _, restart := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			w, r := &tokencachetest.Clock{}, &registry{}
			options := tokencache.Options{Fetch: r.Fetch, Clock: w.AfterUptime().OrRuntime(), BootID: "b"}
			c := tokencache.New(options)
			began := time.Now()
			r.gives(always("a", began))
			holds(t, c, vault, "a")
			received := only(t, c).ReceivedOn
			time.Sleep(time.Hour)
			note(t, c, "x", tokencache.Revoked, time.Time{})
			time.Sleep(time.Hour)
			if restart {
				_, _, err := c.Forget(t.Context(), vault, true)
				if err != nil {
					t.Fatal(err)
				}
				kept := c.Snapshot()
				kept.Keys = nil // it was dropped, and not fetched anew yet
				options.Snapshot, options.Record = &kept, c.Record()
				c.Close()
				c = tokencache.New(options)
			}
			defer c.Close()
			outcome, _, err := c.Forget(t.Context(), vault, true)
			if err != nil || outcome != tokencache.Unchanged && !restart {
				t.Fatal(outcome, err)
			}
			got := only(t, c)
			if !got.Permissions.Withheld || got.Permissions.State != tokencache.Stale || !restart &&
				!got.ReceivedOn.Equal(received) {
				t.Errorf("restart %v: %+v, received on %v", restart, got.Permissions, got.ReceivedOn)
			}
		})
	}
}

// In an outage no token is dropped that may not come again, unless somebody insists; and one that was dropped all the
// same, of a key to be prefetched, is there again soon after the outage, also where its call never began.
func TestForgetInAnOutage(t *testing.T) {
	t.Parallel()
	for _, fails := range []*tokencache.FetchError{
		{Kind: tokencache.Unreachable, Extent: tokencache.OfSource, Detail: "connection refused"},
		{Kind: tokencache.Throttled, Detail: "slow down"},
		{Kind: tokencache.Unreachable, Detail: "trouble"},
	} {
		for _, insist := range []bool{false, true} {
			s := &tokencachetest.Source{Latency: 50 * time.Millisecond}
			bubble(t, s, func(t *testing.T, c *tokencache.Cache) {
				keys := fleet()
				if err := c.Prefetch(keys); err != nil {
					t.Fatal(err)
				}
				time.Sleep(time.Minute)
				s.Set(func(s *tokencachetest.Source) { s.Err = fails })
				_, first, err := c.Forget(t.Context(), keys[0], false)
				if kindOf(t, err) != fails.Kind || first != "" {
					t.Fatalf("%v: dropped %q, and nothing came: %v", fails, first, err)
				}
				if got := mustGet(t, c, keys[0], tokencache.Need{}); got.Token.Text.IsZero() {
					t.Errorf("%v: the token is gone: %+v", fails, got)
				}
				var all sync.WaitGroup
				for _, key := range keys {
					all.Go(func() {
						_, dropped, err := c.Forget(t.Context(), key, insist)
						_ = kindOf(t, err)
						if source := fails.Kind == tokencache.Throttled ||
							fails.Extent == tokencache.OfSource; source && !insist && dropped != "" {
							t.Errorf("%v: the token of %v was dropped", fails, key)
						}
					})
				}
				all.Wait()
				for _, got := range c.Status() {
					if got.Left == 0 && got.LastError == nil {
						t.Errorf("%v: nothing tells why there is no token: %+v", fails, got)
					}
				}
				s.Set(func(s *tokencachetest.Source) { s.Err = nil })
				time.Sleep(2 * time.Minute)
				for _, got := range c.Status() {
					if got.Left == 0 {
						t.Errorf("%v, insisted %v: no token: %+v", fails, insist, got)
					}
				}
			})
		}
	}
}

// A key that failed itself is not without its token for the wish to have a newer one, either.
func TestForgetOfAFailingKey(t *testing.T) {
	t.Parallel()
	s := &tokencachetest.Source{}
	bubble(t, s, func(t *testing.T, c *tokencache.Cache) {
		mustGet(t, c, vault, tokencache.Need{})
		s.Set(func(s *tokencachetest.Source) { s.Err = &tokencache.FetchError{Kind: tokencache.Refused, Detail: "no"} })
		if _, err := c.Refresh(t.Context(), vault, false); kindOf(t, err) != tokencache.Refused {
			t.Fatal(err)
		}
		calls := s.Count()
		if _, dropped, err := c.Forget(t.Context(), vault, false); kindOf(t, err) != tokencache.Refused ||
			dropped != "" || s.Count() != calls {
			t.Errorf("dropped %q, %v, %d calls", dropped, err, s.Count()-calls)
		}
		if _, dropped, err := c.Forget(t.Context(), vault, true); kindOf(t, err) != tokencache.Refused ||
			dropped == "" {
			t.Errorf("insisted: dropped %q, %v", dropped, err)
		}
	})
}
