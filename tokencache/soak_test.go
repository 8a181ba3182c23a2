package tokencache_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"perceptd/agent/simulator"
	"perceptd/tokencache"
)

const (
	soakDays    = 30
	soakCallers = 50
	soakGrowth  = 1 << 20 // bytes of heap, of what comes and goes
	soakSettled = 3       // days until everything that is bounded is full
)

// habit is how one caller asks.
type habit struct {
	key   tokencache.Key
	need  tokencache.Need
	every time.Duration
	next  time.Time
}

// soak is a device for a month.
type soak struct {
	*survivor
	random  *rand.Rand
	callers []*habit
	noted   int
	served  int
	heap    []uint64 // in use at the end of each day
	threads []int    // goroutines then
}

// Thirty days of faults, outages, wrong clocks, restarts, reboots and policy changes: nobody is refused what could have
// been served, nor served what has expired; the back end is left in peace; and nothing grows.
//
// It measures the memory of the whole process, and so does not run beside other tests.
func TestThirtyDays(t *testing.T) {
	for _, rollover := range []simulator.Rollover{simulator.AtExpiry, simulator.Jittered} {
		t.Run(rollover.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				thirtyDays(t, simulator.Options{Rollover: rollover, Seed: 30, Aged: 5 * time.Hour})
			})
		})
	}
}

func thirtyDays(t *testing.T, options simulator.Options) {
	s := &soak{survivor: newSurvivor(options), random: rand.New(rand.NewPCG(options.Seed, 1))}
	defer func() { s.cache.Close() }()
	s.hire()
	begun := s.now()
	for day := 1; day <= soakDays; day++ {
		for s.now().Before(begun.Add(time.Duration(day) * 24 * time.Hour)) {
			if err := s.hour(t); err != nil {
				t.Fatalf("after %v: %v", s.now().Sub(begun), err)
			}
		}
		s.measure()
	}
	t.Logf("%d requests, %d starts, %d policy changes; heap %d kB on day %d, %d kB on the last; %d goroutines",
		s.served, s.startup, s.noted, s.heap[soakSettled]>>10, soakSettled+1, s.heap[soakDays-1]>>10,
		s.threads[soakDays-1])
	for day := soakSettled; day < soakDays; day++ {
		if s.heap[day] > s.heap[soakSettled]+soakGrowth || s.threads[day] > s.threads[soakSettled] {
			t.Errorf("at the end of day %d: %d kB and %d goroutines, it was %d kB and %d", day+1, s.heap[day]>>10,
				s.threads[day],
				s.heap[soakSettled]>>10, s.threads[soakSettled])
		}
	}
}

// hire gives every caller its habits.
func (s *soak) hire() {
	paces := []time.Duration{time.Minute, 5 * time.Minute, 25 * time.Minute, time.Hour, 6 * time.Hour, 20 * time.Hour}
	needs := []tokencache.Need{{}, sdk, {MinTTL: 10 * time.Minute, MinTTLRequired: true}}
	for i := range soakCallers {
		every := paces[i%len(paces)]
		s.callers = append(s.callers, &habit{
			key: tokencache.Key{Resource: fmt.Sprint("api://", i%7)}, need: needs[i%len(needs)], every: every,
			next: s.now().Add(time.Duration(s.random.Int64N(int64(every)))),
		})
	}
}

// hour is one of the callers' hours, with what happens in it.
func (s *soak) hour(t *testing.T) error {
	for range 60 {
		time.Sleep(time.Minute)
		if err := s.minute(t); err != nil {
			return err
		}
	}
	s.keep(s.cache)
	if err := s.storms(); err != nil {
		return err
	}
	s.forget()
	return s.happen(t)
}

// minute has those ask whose time has come, all at once.
func (s *soak) minute(t *testing.T) error {
	now := s.now()
	faults := make([]error, len(s.callers))
	var all sync.WaitGroup
	for i, h := range s.callers {
		if h.next.After(now) {
			continue
		}
		h.next = now.Add(time.Duration(float64(h.every) * (0.8 + 0.4*s.random.Float64())))
		s.served++
		all.Go(func() { faults[i] = s.check(t, h.key, h.need) })
	}
	all.Wait()
	return errors.Join(faults...)
}

// happen is what befalls a device, now and then.
func (s *soak) happen(t *testing.T) error {
	much := s.random.IntN(100)
	switch s.random.IntN(24) {
	case 0, 1:
		s.fails([]error{down, &tokencache.FetchError{Kind: tokencache.Throttled, RetryAfter: time.Hour,
			Detail: "too many"},
			&tokencache.FetchError{Kind: tokencache.Malformed, Detail: "a page"}}[much%3])
	case 2, 3, 4, 5, 6:
		s.fails(nil)
	case 7:
		s.set(s.clockOf(much))
	case 8, 9:
		s.set(0, true)
	case 10:
		s.skip(time.Duration(much) * 5 * time.Minute)
	case 11:
		return s.restarted(t, much%2 == 0)
	case 12:
		ahead, known := s.clockOf(much)
		s.reboot(much%2 == 0, time.Duration(much*much)*5*time.Second, ahead, known)
	case 13:
		s.noted++
		return s.note(s.noted, much)
	case 14:
		for _, ch := range s.record { // nobody is kept from all tokens for good
			if ch.noted {
				return s.withdraw(ch.ID)
			}
		}
	}
	return nil
}

func (s *soak) withdraw(id string) error {
	s.cache.Withdraw(id)
	s.record = slices.DeleteFunc(s.record, func(ch happened) bool { return ch.ID == id })
	return nil
}

// forget has the oracle not be what grows.
func (s *soak) forget() {
	now := s.now()
	s.mu.Lock()
	defer s.mu.Unlock()
	for key, all := range s.calls {
		s.calls[key] = slices.Clip(slices.DeleteFunc(all, func(c call) bool { return now.Sub(c.on) > time.Hour }))
	}
	for digest, seen := range s.shown {
		if now.Sub(seen.on) > 48*time.Hour {
			delete(s.shown, digest)
		}
	}
	s.gaps = slices.DeleteFunc(s.gaps, func(g gap) bool { return now.Sub(g.to) > 30*24*time.Hour })
	s.asked, s.startup = 0, s.startup%1000
}

func (s *soak) measure() {
	synctest.Wait()
	runtime.GC()
	runtime.GC() // what the first has found to be finalised
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	s.heap, s.threads = append(s.heap, m.HeapAlloc), append(s.threads, runtime.NumGoroutine())
}
