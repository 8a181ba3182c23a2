package tokencache

import "time"

// Outcome is what a fetch brought.
type Outcome uint8

const (
	NotFetched Outcome = iota // no fetch has ended yet
	Newer                     // a token, or a newer one than before
	Unchanged                 // the back end's cached copy of the token already held
	Older                     // one minted before the token held, which stays
	Failed
)

func (o Outcome) String() string {
	return [...]string{"not fetched", "newer", "unchanged", "older", "failed"}[o]
}

// State is a key's state in a word.
type State uint8

const (
	Missing    State = iota // no valid token, and the last fetch failed
	Fetching                // no valid token yet; a fetch is under way
	Fresh                   // valid, no refresh due
	Refreshing              // valid, a refresh is due or under way
	Failing                 // valid, but refreshing it fails
	Idle                    // valid, but nobody asks: left to expire
)

func (s State) String() string {
	return [...]string{"missing", "fetching", "fresh", "refresh", "failing", "idle"}[s]
}

// Status is what people may know of a key. Wall times are by the device's clock.
type Status struct {
	Key         Key
	State       State
	Prefetch    bool
	SHA256      string        // of the token's text; empty without a valid token
	ReceivedOn  time.Time     // zero without a valid token
	ExpiresOn   time.Time     // zero without a valid token
	Left        time.Duration // 0 without a valid token
	NextRefresh time.Time     // zero: none planned
	LastFetch   time.Time     // zero: none has ended
	LastOutcome Outcome
	LastError   error // with Failed
	Failures    int   // in a row
	Fetches     int   // calls made to the source
	Served      int64 // answers given by Get
}

// Event tells of a fetch that ended.
type Event struct {
	Key     Key
	Outcome Outcome
	Err     error         // with Failed
	Left    time.Duration // life left of the token now held, 0 for none
	Took    time.Duration // from the call to its answer
	Retry   time.Duration // until the next planned fetch, 0 for none
}
