// Package tokencachetest has what tests of every package give a token cache: a fake source that the test steers, and a
// device's clocks over the virtual time of a synctest bubble.
package tokencachetest

import (
	"cmp"
	"context"
	"fmt"
	"sync"
	"time"

	"perceptd/tokencache"
)

// Canary begins the text of each token, so that a test finds it wherever it leaks.
const Canary = "canary-7c1e"

// Source is a source that a test steers. The zero value issues a new token of 24 hours at each call, at once. A test
// that runs beside fetches changes and reads the fields by Set.
type Source struct {
	mu sync.Mutex

	Life    time.Duration             // of the tokens that it issues; zero: 24 h
	Latency time.Duration             // how long a call takes
	Reuse   bool                      // it gives the same token until that has expired
	Err     error                     // what it answers instead of a token; nil: a token
	Edit    func(*tokencache.Fetched) // changes each answer; nil: nothing does

	Calls int              // that were made
	Peak  int              // calls under way at once, at most
	Times []time.Time      // of the calls
	Keys  []tokencache.Key // of the calls

	running int
	issued  tokencache.Token // last
}

// Set changes s, or reads it, while fetches may be under way.
func (s *Source) Set(change func(*Source)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(s)
}

// Count returns how many calls were made.
func (s *Source) Count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.Calls
}

// Fetch is a call: tokencache.Options.Fetch.
func (s *Source) Fetch(ctx context.Context, key tokencache.Key) (tokencache.Fetched, error) {
	latency := s.begin(key)
	defer s.Set(func(s *Source) { s.running-- })
	select {
	case <-time.After(latency):
	case <-ctx.Done():
		return tokencache.Fetched{}, ctx.Err()
	}
	return s.answer(key)
}

func (s *Source) begin(key tokencache.Key) (latency time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.Calls++
	s.running++
	s.Peak = max(s.Peak, s.running)
	s.Times = append(s.Times, time.Now())
	s.Keys = append(s.Keys, key)
	return s.Latency
}

func (s *Source) answer(key tokencache.Key) (tokencache.Fetched, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.Err != nil {
		return tokencache.Fetched{}, s.Err
	}
	life, now := cmp.Or(s.Life, 24*time.Hour), time.Now().Round(0)
	if !s.Reuse || !s.issued.ExpiresOn.After(now) {
		s.issued = tokencache.Token{
			Text:      tokencache.NewSecret(fmt.Sprintf("%s %v %d", Canary, key, s.Calls)),
			ExpiresOn: now.Add(life),
		}
	}
	fetched := tokencache.Fetched{Token: s.issued, Left: s.issued.ExpiresOn.Sub(now), Nominal: life}
	if s.Edit != nil {
		s.Edit(&fetched)
	}
	return fetched, nil
}
