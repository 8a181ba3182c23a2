package tokencache_test

import (
	"math"
	"testing"
	"testing/synctest"
	"time"

	"perceptd/tokencache"
	"perceptd/tokencache/tokencachetest"
)

// A daemon that crashes every few seconds, or reboots, makes no more calls to a source that fails than one that goes
// on: what failed is remembered, also where no key ever had a token.
func TestFailuresOutliveCrashes(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		fails *tokencache.FetchError
		had   bool // tokens, which have expired since
		// calls in an hour of a crash every five seconds, each after every key was asked for; without any, 60 keys cost
		// 43,200
		most int
	}{
		{&tokencache.FetchError{Kind: tokencache.Refused}, false, 60 * 17},
		{&tokencache.FetchError{Kind: tokencache.Refused}, true, 60 * 17},
		{&tokencache.FetchError{Kind: tokencache.Throttled}, false, 200},
		{&tokencache.FetchError{Kind: tokencache.Throttled, RetryAfter: time.Hour}, false, 20},
		{&tokencache.FetchError{Kind: tokencache.Throttled, RetryAfter: time.Hour}, true, 20},
		{&tokencache.FetchError{Kind: tokencache.Unreachable, Extent: tokencache.OfSource}, false, 800},
		{&tokencache.FetchError{Kind: tokencache.Unreachable}, false, 60 * 45},
	} {
		for _, reboots := range []bool{false, true} {
			s := &tokencachetest.Source{}
			synctest.Test(t, func(t *testing.T) {
				boot, id := time.Now().Add(-time.Hour), "first"
				clock := tokencache.Clock{Boot: func() time.Duration { return time.Since(boot) }}
				keys := fleet()
				begin := func(m *tokencache.Snapshot) *tokencache.Cache {
					c := tokencache.New(tokencache.Options{Fetch: s.Fetch, Clock: clock, BootID: id, Snapshot: m})
					synctest.Wait() // whatever it does before it knows what is to be prefetched
					if err := c.Prefetch(keys); err != nil {
						t.Fatal(err)
					}
					return c
				}
				c := tokencache.New(tokencache.Options{Fetch: s.Fetch, Clock: clock, BootID: id})
				if row.had {
					if err := c.Prefetch(keys); err != nil {
						t.Fatal(err)
					}
					time.Sleep(time.Minute)
				}
				s.Set(func(s *tokencachetest.Source) { s.Err = row.fails })
				if row.had {
					time.Sleep(30 * time.Hour)
				}
				before := s.Count()
				for end := time.Now().Add(time.Hour); time.Now().Before(end); {
					for _, key := range keys {
						_, _ = c.Get(t.Context(), key, sdk)
					}
					time.Sleep(5 * time.Second)
					m := c.Snapshot()
					c.Close()
					if reboots {
						boot, id = time.Now(), time.Now().String()
					}
					c = begin(&m)
				}
				if spent := s.Count() - before; spent > row.most {
					t.Errorf("%+v, had tokens %v, reboots %v: %d calls in an hour, want %d at most", row.fails, row.had,
						reboots, spent, row.most)
				}
				s.Set(func(s *tokencachetest.Source) { s.Err = nil })
				c.TryAgain()
				time.Sleep(5*time.Minute + 30*time.Second) // a pause holds for five minutes
				for _, got := range c.Status() {
					if got.Left == 0 || got.Failures != 0 {
						t.Fatalf("%+v: well again for five minutes: %+v", row.fails, got)
					}
				}
				c.Close()
			})
		}
	}
}

// What is remembered of a pause or of failures is bounded, whatever the memory says.
func TestRememberedWaitsAreBounded(t *testing.T) {
	t.Parallel()
	const eternity = time.Duration(math.MaxInt64) / 4
	for _, row := range []struct {
		paused time.Duration
		source *tokencache.BackOff
		key    *tokencache.BackOff
		most   time.Duration
	}{
		{eternity, nil, nil, 5 * time.Minute},
		{0, &tokencache.BackOff{Kind: "throttled", Extent: "key", Failures: 1 << 30, Until: eternity,
			Callers: eternity}, nil, 5 * time.Minute},
		{0, nil, &tokencache.BackOff{Kind: "unreachable", Extent: "key", Failures: 1 << 30, Waits: 1 << 30,
			Asks: 1 << 30, Until: eternity, Callers: eternity}, 5 * time.Minute},
		{0, nil, &tokencache.BackOff{Kind: "refused", Extent: "key", Failures: 1 << 30, Waits: 1 << 30, Asks: 1 << 30,
			Until: eternity, Callers: eternity}, time.Hour},
	} {
		for _, id := range []string{"same", "other"} {
			synctest.Test(t, func(t *testing.T) {
				m := tokencache.Snapshot{
					BootID: "same", Wall: time.Now(), Synchronised: true, Paused: row.paused, Failing: row.source,
					Keys: []tokencache.SnapshotEntry{{Key: vault, Deadline: -2 * eternity, Next: new(eternity),
						Failing: row.key}},
				}
				s := &tokencachetest.Source{}
				c := tokencache.New(tokencache.Options{Fetch: s.Fetch, BootID: id, Snapshot: &m})
				defer c.Close()
				if err := c.Prefetch([]tokencache.Key{vault}); err != nil {
					t.Fatal(err)
				}
				time.Sleep(row.most + time.Second)
				if s.Count() != 1 {
					t.Errorf("%+v %+v %+v: %d calls within %v", row.paused, row.source, row.key, s.Count(), row.most)
				}
			})
		}
	}
}
