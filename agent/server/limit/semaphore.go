package limit

import "sync"

// Semaphore bounds how many requests stay for long at once, so that no caller can fill the server with them.
type Semaphore struct {
	mu    sync.Mutex // protects what follows
	total int
	held  map[Key]int
}

// Quota is how many may hold a Semaphore at once.
type Quota struct {
	PerKey    int // of one key
	PerParent int // of one parent of keys
	Total     int // of all keys
}

// TryAcquire counts a request of k. It reports false, and counts nothing, when that is one too many. Call Release in
// the end.
func (s *Semaphore) TryAcquire(k Key, most Quota) bool {
	parents, count := k.parents()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.total >= most.Total || s.held[k] >= most.PerKey {
		return false
	}
	for _, parent := range parents[:count] {
		if s.held[parent] >= most.PerParent {
			return false
		}
	}
	if s.held == nil {
		s.held = make(map[Key]int)
	}
	s.total++
	s.held[k]++
	for _, parent := range parents[:count] {
		s.held[parent]++
	}
	return true
}

// Release forgets a request that TryAcquire counted.
func (s *Semaphore) Release(k Key) {
	parents, count := k.parents()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.total--
	for _, of := range append(parents[:count], k) {
		if s.held[of]--; s.held[of] == 0 {
			delete(s.held, of)
		}
	}
}
