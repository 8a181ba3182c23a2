package tokencache

import "time"

// BackOff is what is remembered of failures in a row: of one key, or of the source as a whole. So that a daemon that crashes
// again and again asks no more often than one that does not. Durations are boot times.
type BackOff struct {
	Kind     Kind
	Extent   Extent
	Detail   string
	Failures int
	Waits    int           // of the schedule, each longer than the one before; of a key
	Asks     int           // fetches that callers waited for and that failed; of a key
	Until    time.Duration // the schedule makes no call before
	Callers  time.Duration // and nobody does before for a caller
}

func failingOf(f *FetchError, failures int, until, callers time.Duration) *BackOff {
	if failures == 0 {
		return nil
	}
	return &BackOff{Kind: f.Kind, Extent: f.Extent, Detail: f.Detail, Failures: failures, Until: until, Callers: callers}
}

// failing tells of e's failures, nil without any.
func (e *entry) failing() *BackOff {
	f := failingOf(e.failure, e.failures, e.rests, e.failedUntil)
	if f != nil {
		f.Waits, f.Asks = e.waits, e.asks
	}
	return f
}

// failing tells of the source's failures, nil without any.
func (r *sourceBackOff) failing() *BackOff {
	return failingOf(r.failure, r.failures, r.until, r.callers)
}

func (f *BackOff) failure() *FetchError {
	return &FetchError{Kind: f.Kind, Extent: f.Extent, Detail: f.Detail}
}
