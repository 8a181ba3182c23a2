package tokencache

import (
	"cmp"
	"slices"
	"time"
)

// Outcome is what a fetch brought.
type Outcome string

const (
	NotFetched Outcome = ""          // no fetch has ended yet
	Newer      Outcome = "newer"     // a token, or a newer one than before
	Unchanged  Outcome = "unchanged" // the back end's cached copy of the token already held
	Older      Outcome = "older"     // one issued before the token held, which stays
	Former     Outcome = "former"    // one of a principal from before a switch: taken only where none is held
	Simulated  Outcome = "simulated" // one of a simulated back end, where tokens are a real one's: likewise
	Failed     Outcome = "failed"    // none
	Held       Outcome = "held"      // of Refresh: nothing was asked, since a policy change is still spreading
)

// State is the state of a key.
type State string

const (
	Missing    State = "missing"  // no valid token, and the last fetch failed
	Fetching   State = "fetching" // no valid token yet; a fetch is under way, or comes once a policy change has spread
	Fresh      State = "fresh"    // valid, no refresh due
	Refreshing State = "refresh"  // valid, a refresh is due or under way
	Failing    State = "failing"  // valid, but refreshing it fails
	Idle       State = "idle"     // valid, but not asked for: left to expire
)

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
	LastError   error // with Failed, or if there is no valid token and the source is failing
	Failures    int   // in a row
	Fetches     int   // calls made to the source
	Served      int64 // answers given by Get

	// Without a valid token these are zero.
	Unconfirmed bool // Left is an upper bound: the device was off for an unknown time
	Permissions Permissions
	Issued      IssueWindow
	Life        time.Duration // that the token had when it was issued
	Claims      Claims
	Before      *Claims   // of the token before, if its groups, roles or wids differ
	Expected    time.Time // when a newer token is expected; zero: not known
	Former      bool      // the token is of a former principal of its selector, a real one
	// AudienceBefore is the audience of the token before, if the held one has another; else empty.
	AudienceBefore string

	Ended Stretch // the time in which the token before this one lacked a policy change; zero: there was none

	HeldUntil time.Time // nothing is fetched before, since a policy change is still spreading; zero: nothing holds

	Pattern Pattern // of the rollovers
	Seen    int     // rollovers observed for this key, at most a few

	// Changes is whether the token carries the policy changes on record that are about the key, the latest first: the
	// latest that it may lack, then the latest of the others, MaxVerdicts in all. MoreChanges is how many more there
	// are.
	Changes     []Verdict
	MoreChanges int
}

// MaxVerdicts is how many policy changes a Status lists. All of them, for many keys and many changes, would be too
// much.
const MaxVerdicts = 6

// Verdict is whether a token carries a policy change.
type Verdict struct {
	ID    string          // its ID
	State PermissionState // empty without a valid token
}

// TokenInfo is what is held of a key, without the token's text. It is zero without a valid token.
type TokenInfo struct {
	SHA256                string // of the token's text
	Left                  time.Duration
	ReceivedOn, ExpiresOn time.Time // by the device's clock
	Issued                IssueWindow
	Claims                Claims
	Permissions           Permissions
}

// Event describes a fetch that ended.
type Event struct {
	Key     Key
	Outcome Outcome
	Err     error         // with Failed
	Left    time.Duration // life left of the token now held, 0 for none
	Took    time.Duration // from the call to its answer
	Retry   time.Duration // until the next planned fetch, 0 for none

	Permissions Permissions // of the token now held

	Simulated bool // what was fetched is of a simulated back end, by its own word

	Switch *Switch // of principals, if it is to be reported; nil: none

	// With Newer: another key with the same token, the audience of the token before if the new one has another, and the
	// claims that the new one omits if the one before omitted others.
	Twin           *Key
	AudienceBefore string
	Audience       string // of the token that came
	Omitted        []string
}

// Peek returns what is held of key now, and a channel that is closed when that changes: at a newer token, other
// permissions, the expiry, or when the key is dropped. It counts as asking for the token, so that the key stays fresh,
// but it fetches nothing. The error is ErrDropped or ErrClosed.
func (c *Cache) Peek(key Key) (TokenInfo, <-chan struct{}, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.now()
	e, err := c.entryLocked(key, now)
	if err != nil {
		return TokenInfo{}, nil, err
	}
	left := c.leftLocked(e, now)
	if left <= 0 {
		return TokenInfo{}, e.changed, nil
	}
	c.reviveLocked(e, left, now)
	return TokenInfo{
		SHA256: e.token.Text.SHA256(), Left: left,
		ReceivedOn: e.token.receivedWall, ExpiresOn: c.clock.Wall().Add(left),
		Issued: e.token.issued, Claims: e.token.Claims, Permissions: c.permissionsLocked(e, now),
	}, e.changed, nil
}

// Wake closes every channel that Peek has returned: who may have what is held has changed.
func (c *Cache) Wake() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, e := range c.entries {
		e.notify()
	}
}

// Status returns what people may know of every key, in no order.
func (c *Cache) Status() []Status {
	all, judged, ids := c.status()
	for i := range all {
		all[i].Changes = judged[i].verdicts(ids, all[i].Left > 0)
		all[i].MoreChanges = len(judged[i].about) - len(all[i].Changes)
	}
	return all
}

// status returns Status without verdicts, and what these are made from: each token's judgement, and the IDs of the
// changes in their order.
func (c *Cache) status() (all []Status, judged []judgement, ids []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now, wall := c.now(), c.clock.Wall()
	all, judged = make([]Status, 0, len(c.entries)), make([]judgement, 0, len(c.entries))
	for _, e := range c.entries {
		all, judged = append(all, c.statusLocked(e, now, wall)), append(judged, e.judgement)
	}
	ids = make([]string, 0, len(c.changes))
	for _, ch := range c.changes {
		ids = append(ids, ch.ID)
	}
	return all, judged, ids
}

// verdicts returns whether a token, valid or not, carries the changes that are about its key. ids are the changes' IDs
// in their order.
func (j judgement) verdicts(ids []string, valid bool) []Verdict {
	type verdict struct {
		place
		PermissionState
	}
	chosen := make([]verdict, 0, MaxVerdicts)
	for i := len(j.lacks) - 1; i >= 0 && len(chosen) < MaxVerdicts; i-- {
		state := Uncertain
		if j.stale[i] {
			state = Stale
		}
		chosen = append(chosen, verdict{j.lacks[i], state})
	}
	for i := len(j.about) - 1; i >= 0 && len(chosen) < MaxVerdicts; i-- {
		if _, lacked := slices.BinarySearch(j.lacks, j.about[i]); !lacked {
			chosen = append(chosen, verdict{j.about[i], Current})
		}
	}
	slices.SortFunc(chosen, func(a, b verdict) int { return cmp.Compare(b.place, a.place) })
	all := make([]Verdict, len(chosen))
	for i, v := range chosen {
		all[i].ID = ids[v.place]
		if valid {
			all[i].State = v.PermissionState
		}
	}
	return all
}

// statusLocked returns the status of e without verdicts.
func (c *Cache) statusLocked(e *entry, now bootTime, wall time.Time) Status {
	s := Status{
		Key: e.key, Prefetch: e.prefetch, LastFetch: e.last.endedWall, LastOutcome: e.last.outcome,
		Failures: e.backOff.failures, Fetches: e.last.fetches, Served: e.served,
	}
	if next := c.nextLocked(e, now); next != never {
		s.NextRefresh = wall.Add(next.sub(now))
	}
	left := c.leftLocked(e, now)
	switch failure := c.lastFailureLocked(e); {
	case e.backOff.failure != nil, left <= 0 && failure != nil:
		s.LastError = failure
	}
	if left > 0 {
		s.Left, s.SHA256 = left, e.token.Text.SHA256()
		s.ReceivedOn, s.ExpiresOn = e.token.receivedWall, wall.Add(left)
		s.Permissions, s.Issued, s.Life = c.permissionsLocked(e, now), e.token.issued, e.token.life
		s.Claims, s.Before, s.Unconfirmed = e.token.Claims, e.token.before, c.unconfirmedLocked(e)
		if at := c.likelyLocked(e, now); at != never {
			s.Expected = wall.Add(at.sub(now))
		}
		s.Former = c.formerLocked(e) && !e.token.lastClaims.Simulated()
		s.AudienceBefore, s.Ended = e.token.audienceBefore, e.stretch
	}
	if left > 0 && c.postponedLocked(e, now) || c.barredLocked(e, now) {
		s.HeldUntil = wall.Add(c.postponedUntilLocked(e, now).sub(now))
	}
	s.Pattern, s.Seen = c.patternLocked(e), len(e.rollovers)
	s.State = e.state(left > 0)
	return s
}

// state returns the state of e, whose token is valid or not.
func (e *entry) state(valid bool) State {
	switch {
	case !valid && (e.flight != nil || e.backOff.failures == 0 && e.schedule.next != never):
		return Fetching
	case !valid:
		return Missing
	case e.backOff.failures > 0:
		return Failing
	case e.flight != nil:
		return Refreshing
	case e.schedule.next == never:
		return Idle
	}
	return Fresh
}
