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

// steady gives each key the same token for as long as it lives, and notes when it was asked.
type steady struct {
	mu    sync.Mutex
	began time.Time
	calls map[tokencache.Key][]time.Duration // since began
}

func (s *steady) Fetch(_ context.Context, key tokencache.Key) (tokencache.Fetched, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls[key] = append(s.calls[key], time.Since(s.began))
	expires := s.began.Add(24 * time.Hour)
	return tokencache.Fetched{
		Token: tokencache.Token{
			Text: tokencache.NewSecret("canary " + key.Resource), ExpiresOn: expires,
			Claims: tokencache.Claims{IssuedAt: s.began.Add(-5 * time.Minute)},
		},
		Left: time.Until(expires), Counted: true, Nominal: 24 * time.Hour,
	}, nil
}

// asked returns when each key was asked for since the last time, and forgets it.
func (s *steady) asked() map[tokencache.Key][]time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	calls := s.calls
	s.calls = make(map[tokencache.Key][]time.Duration)
	return calls
}

// away has 60 keys fetched, and after an hour a cache of another boot, or of the same, begin with them.
func away(t *testing.T, boot string, f func(t *testing.T, s *steady, c *tokencache.Cache, back time.Duration)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		s := &steady{began: time.Now(), calls: make(map[tokencache.Key][]time.Duration)}
		clock := tokencache.Clock{Synchronised: func() bool { return true }, Boot: func() time.Duration {
			if boot != "first" && time.Since(s.began) >= time.Hour {
				return time.Since(s.began) - time.Hour + time.Minute // it has just booted
			}
			return time.Since(s.began) + time.Minute
		}}
		c := tokencache.New(tokencache.Options{Fetch: s.Fetch, BootID: "first", Clock: clock})
		for i := range 60 {
			mustGet(t, c, tokencache.Key{Resource: fmt.Sprintf("api://%d", i)}, tokencache.Need{})
		}
		m := c.Snapshot()
		c.Close()
		time.Sleep(time.Hour)
		s.asked()
		back := time.Since(s.began)
		rolls := 0
		roll := func() float64 { rolls++; return float64(rolls*7%60) / 60 }
		c = tokencache.New(tokencache.Options{Fetch: s.Fetch, BootID: boot, Clock: clock, Snapshot: &m, Roll: roll})
		defer c.Close()
		f(t, s, c, back)
	})
}

// After a boot each token that was kept is asked for once, soon, and not all of them at once.
func TestRestoredTokensAreConfirmed(t *testing.T) {
	t.Parallel()
	away(t, "second", func(t *testing.T, s *steady, c *tokencache.Cache, back time.Duration) {
		time.Sleep(30*time.Second - 1)
		synctest.Wait()
		if n := len(s.asked()); n != 0 {
			t.Errorf("%d keys are asked for at once", n)
		}
		time.Sleep(10*time.Minute + 15*time.Second)
		synctest.Wait()
		calls, minutes := s.asked(), make(map[time.Duration]int)
		for _, at := range calls {
			if len(at) != 1 {
				t.Errorf("a key is asked for %d times", len(at))
			}
			minutes[(at[0]-back).Truncate(time.Minute)]++
		}
		if len(calls) != 60 {
			t.Errorf("%d of 60 keys are asked for", len(calls))
		}
		for minute, n := range minutes {
			if n > 20 {
				t.Errorf("%d of 60 are asked for in minute %v", n, minute)
			}
		}
		time.Sleep(4 * time.Hour)
		synctest.Wait()
		if n := len(s.asked()); n != 0 {
			t.Errorf("%d are asked for again", n)
		}
		for _, status := range c.Status() {
			if status.LastOutcome != tokencache.Unchanged {
				t.Errorf("%v: %v", status.Key, status.LastOutcome)
			}
		}
	})
}

// A restart within the boot asks for nothing.
func TestRestartConfirmsNothing(t *testing.T) {
	t.Parallel()
	away(t, "first", func(t *testing.T, s *steady, _ *tokencache.Cache, _ time.Duration) {
		time.Sleep(time.Hour)
		synctest.Wait()
		if n := len(s.asked()); n != 0 {
			t.Errorf("%d keys are asked for", n)
		}
	})
}

// While a policy change spreads, nothing is asked for the sake of a confirmation: the back end would keep what it
// makes.
func TestConfirmationsWaitForAChange(t *testing.T) {
	t.Parallel()
	away(t, "second", func(t *testing.T, s *steady, c *tokencache.Cache, back time.Duration) {
		change := tokencache.PolicyChange{ID: "x", AllIdentities: true, Effect: tokencache.Granted}
		if _, err := c.RecordChange(change); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if n := len(s.asked()); n != 0 {
			t.Errorf("%d keys are asked for while the change spreads", n)
		}
		time.Sleep(15 * time.Minute)
		synctest.Wait()
		if n := len(s.asked()); n != 60 {
			t.Errorf("%d of 60 are asked for after that", n)
		}
	})
}
