package tokencache_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"perceptd/tokencache"
)

// endpoint is a source that answers by turns, by chance or by how often it is asked. Its methods may be called at once.
type endpoint struct {
	mu     sync.Mutex
	answer func() (*tokencache.FetchError, time.Duration) // nil: a token; and how long it takes
	calls  int
}

func (s *endpoint) Fetch(_ context.Context, key tokencache.Key) (tokencache.Fetched, error) {
	s.mu.Lock()
	s.calls++
	failure, takes := s.answer()
	s.mu.Unlock()
	time.Sleep(takes)
	if failure != nil {
		return tokencache.Fetched{}, failure
	}
	return tokenOf("a", key, time.Now()), nil
}

func (s *endpoint) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.calls
}

// bucket returns whether an endpoint takes one more call that takes so many a minute.
func bucket(perMinute float64) func() bool {
	left, last := perMinute, time.Now()
	return func() bool {
		left, last = min(perMinute, left+time.Since(last).Minutes()*perMinute), time.Now()
		if left < 1 {
			return false
		}
		left--
		return true
	}
}

var (
	refused     = &tokencache.FetchError{Kind: tokencache.Refused}
	throttled   = &tokencache.FetchError{Kind: tokencache.Throttled}
	unavailable = &tokencache.FetchError{Kind: tokencache.Unreachable}
	silent      = &tokencache.FetchError{Kind: tokencache.Unreachable, Extent: tokencache.OfIdentity}
	gone        = &tokencache.FetchError{Kind: tokencache.Unreachable, Extent: tokencache.OfSource}
)

// turns is an endpoint that fails in these ways by turns.
func turns(failures ...*tokencache.FetchError) func() (*tokencache.FetchError, time.Duration) {
	i := 0
	return func() (*tokencache.FetchError, time.Duration) {
		i++
		return failures[i%len(failures)], 0
	}
}

// chance is an endpoint that fails in the first way with those odds, and else in the second one.
func chance(odds float64, a, b *tokencache.FetchError, takes time.Duration) func() (*tokencache.FetchError,
	time.Duration) {
	r := rand.New(rand.NewPCG(7, 8))
	return func() (*tokencache.FetchError, time.Duration) {
		if r.Float64() < odds {
			return a, 0
		}
		return b, takes
	}
}

// What sixty keys cost, in the third hour, of which none is ever given a token, where one failure is not like the one
// before: neither ends the back-off that the other has built up.
func TestBudgetsOfStruggling(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name        string
		answer      func() (*tokencache.FetchError, time.Duration)
		asked, idle int // calls an hour, at most
	}{
		{"refused and 429 by turns", turns(refused, throttled), 300, 120},
		{"refused and no answer by turns", turns(refused, silent), 400, 240},
		{"half refused, half 429", chance(0.5, refused, throttled, 0), 300, 120},
		{"nine of ten refused, one 429", chance(0.9, refused, throttled, 0), 300, 360},
		{"half trouble, half no answer", chance(0.5, unavailable, silent, 3*time.Second), 60 * 26, 60 * 36},
		{"half trouble, half no connection", chance(0.5, unavailable, gone, 0), 60 * 20, 300},
		{"refused, and 429 beyond 20 a minute", nil, 180, 360},
	} {
		for _, asked := range []bool{true, false} {
			synctest.Test(t, func(t *testing.T) {
				s := &endpoint{answer: row.answer}
				if s.answer == nil {
					takes := bucket(20)
					s.answer = func() (*tokencache.FetchError, time.Duration) {
						if takes() {
							return refused, 0
						}
						return throttled, 0
					}
				}
				c := tokencache.New(tokencache.Options{Fetch: s.Fetch})
				defer c.Close()
				keys := fleet()
				if err := c.Prefetch(keys); err != nil {
					t.Fatal(err)
				}
				spend := func(span time.Duration) int {
					before := s.count()
					if asked {
						ask(t, c, keys, span)
					} else {
						time.Sleep(span)
					}
					return s.count() - before
				}
				spend(2 * time.Hour)
				most := row.idle
				if asked {
					most = row.asked
				}
				if spent := spend(time.Hour); spent > most || spent == 0 {
					t.Errorf("%s, asked for %v: %d calls in the third hour, want 1 to %d", row.name, asked, spent, most)
				}
			})
		}
	}
}

// Keys that are refused do not have a throttling endpoint throttle for ever: the cold request of another identity,
// which the endpoint would answer, is answered within 45 seconds, also just after the start, by a module that asks once
// a second.
func TestRefusedKeysStarveNobody(t *testing.T) {
	t.Parallel()
	for _, n := range []int{10, 20, 60} {
		for _, perMinute := range []float64{6, 20} {
			for _, since := range []time.Duration{time.Minute, 2 * time.Hour} {
				synctest.Test(t, func(t *testing.T) {
					takes := bucket(perMinute)
					var mu sync.Mutex
					c := tokencache.New(tokencache.Options{Fetch: func(_ context.Context,
						key tokencache.Key) (tokencache.Fetched, error) {
						mu.Lock()
						defer mu.Unlock()
						switch {
						case !takes():
							return tokencache.Fetched{}, throttled
						case key.Selector == tokencache.Selector{}:
							return tokencache.Fetched{}, refused
						}
						return tokenOf("a", key, time.Now()), nil
					}})
					defer c.Close()
					var keys []tokencache.Key
					for i := range n {
						keys = append(keys, tokencache.Key{Resource: fmt.Sprintf("https://r%d.example.net", i)})
					}
					if err := c.Prefetch(keys); err != nil {
						t.Fatal(err)
					}
					time.Sleep(since)
					for i := range 20 {
						cold := tokencache.Key{Selector: tokencache.Selector{Kind: tokencache.ClientID, ID: "granted"},
							Resource: fmt.Sprint("api://", i)}
						began := time.Now()
						for {
							if _, err := c.Get(t.Context(), cold, sdk); err == nil {
								break
							}
							if time.Since(began) > time.Hour {
								break
							}
							time.Sleep(time.Second)
						}
						if took := time.Since(began); took > 45*time.Second {
							t.Errorf("%d keys refused, %v calls a minute, %v on: token %d came after %v", n, perMinute,
								since, i, took)
						}
						time.Sleep(6 * time.Minute)
					}
				})
			}
		}
	}
}
