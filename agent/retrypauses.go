package agent

import (
	"sync"
	"time"

	"perceptd/tokencache"
)

const readAgainSoonest, readAgainLatest = time.Second, time.Minute

// retryPauses is the pauses between tries to read something again in the background.
type retryPauses struct {
	clock tokencache.Clock
	loop  sync.WaitGroup
	end   chan struct{} // closed by close

	mu      sync.Mutex    // protects what follows
	hurried chan struct{} // closed by the next hurry
}

func (r *retryPauses) open(clock tokencache.Clock) {
	r.clock, r.end, r.hurried = clock, make(chan struct{}), make(chan struct{})
}

// hurry ends the pause: the cause may have been mended.
func (r *retryPauses) hurry() {
	r.mu.Lock()
	defer r.mu.Unlock()
	close(r.hurried)
	r.hurried = make(chan struct{})
}

// pause waits for so long, or for at least a second until hurry is called. False: r is closed.
func (r *retryPauses) pause(wait time.Duration) bool {
	r.mu.Lock()
	hurried := r.hurried
	r.mu.Unlock()
	soonest := min(wait, readAgainSoonest)
	return r.sleep(soonest, nil) && r.sleep(wait-soonest, hurried)
}

// sleep waits for so long, or until cut is closed.
func (r *retryPauses) sleep(wait time.Duration, cut <-chan struct{}) bool {
	fired, stop := r.clock.Timer(wait)
	defer stop()
	select {
	case <-fired:
	case <-cut:
	case <-r.end:
		return false
	}
	return true
}

func (r *retryPauses) close() {
	close(r.end)
	r.loop.Wait()
}
