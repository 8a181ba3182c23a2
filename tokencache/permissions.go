package tokencache

import (
	"fmt"
	"time"
)

// Standing says how a token stands to the policy changes on record.
type Standing uint8

const (
	Current   Standing = iota // minted after every change had reached new tokens; or no change is known
	Uncertain                 // it cannot be told
	Stale                     // minted before a change
)

func (s Standing) String() string { return [...]string{"current", "uncertain", "stale"}[s] }

// Permissions is what is known of the permissions that a token carries. Times are by the device's clock.
type Permissions struct {
	Standing  Standing
	Changed   time.Time // the latest change that the token may lack; zero when current
	CurrentBy time.Time // a current token is here by then at the latest, if the back end answers; zero when current
	Likely    time.Time // and probably by then; zero when current, or when nothing was learnt yet
	Withheld  bool      // a revocation keeps the token from everybody
}

// WithheldError is returned by Get while a revocation keeps back the token that there is.
type WithheldError struct {
	Permissions Permissions
	Revoked     time.Time // the latest revocation that the token may lack
}

func (e *WithheldError) Error() string {
	return fmt.Sprintf("permissions were revoked on %s, and the back end still hands out a token from before: withheld until %s at the latest",
		stamp(e.Revoked), stamp(e.Permissions.CurrentBy))
}

// NotYetError is returned by Get when the back end has no token that is as young as asked for.
type NotYetError struct {
	Want        time.Time // Need.MintedAfter
	Permissions Permissions
	ExpiresOn   time.Time // of the token held, by the device's clock
}

func (e *NotYetError) Error() string {
	return fmt.Sprintf("the back end still hands out a token minted before %s, which expires on %s", stamp(e.Want), stamp(e.ExpiresOn))
}

// HeldError is returned by Refresh while a fetch could bring a token without a policy change that is on
// its way through the directory. The back end would then keep that token for a day.
type HeldError struct {
	For time.Duration
}

func (e *HeldError) Error() string {
	return fmt.Sprintf("a policy change is still spreading: a token fetched now may lack it and then stay for a day; the fetch comes by itself in %v", e.For.Round(time.Second))
}

func stamp(t time.Time) string { return t.UTC().Format("Jan 2 15:04:05 UTC") }

// verdictLocked says how the token of e stands to one change.
func (c *Cache) verdictLocked(e *entry, ch *change) Standing {
	switch {
	case ch.Floating && e.received < ch.BootAt && ch.Effect != Unknown:
		return Stale
	case ch.Floating:
		return Uncertain
	case e.minted.Earliest.After(ch.At.Add(c.spread)):
		return Current
	case e.minted.Latest.Before(ch.At) && ch.Effect != Unknown:
		return Stale
	}
	return Uncertain
}

// judgeLocked notes how e's token stands to the changes on record.
func (c *Cache) judgeLocked(e *entry) {
	before := e.standing
	e.standing = standing{}
	for _, ch := range c.changes {
		if !c.touches(ch, e.key) {
			continue
		}
		s, holds := &e.standing, ch.holds+e.minted.blur()
		s.holds = max(s.holds, holds)
		verdict := c.verdictLocked(e, ch)
		if verdict == Current {
			continue
		}
		s.worst = max(s.worst, verdict)
		s.unmet = max(s.unmet, holds)
		if ch.At.After(s.changed) {
			s.changed = ch.At
		}
		if ch.Effect == Revoked && ch.At.After(s.revoked) {
			s.revoked = ch.At
		}
	}
	if e.standing != before {
		e.tell()
	}
}

// rejudgeLocked judges every token anew after the record of changes is another, and plans anew what
// the judgement touches.
func (c *Cache) rejudgeLocked(now time.Duration) {
	for _, e := range c.entries {
		before := e.standing
		c.judgeLocked(e)
		if e.standing != before && e.next != never {
			c.planLocked(e, now)
		}
	}
	c.nudge()
}

// standing is how an entry's token stands to all changes that touch it.
type standing struct {
	worst   Standing
	changed time.Time     // the latest change not met; zero: none
	revoked time.Time     // the latest revocation not met; zero: none, nothing is withheld
	holds   time.Duration // boot time until which the schedule leaves the back end alone
	unmet   time.Duration // the latest holds of a change not met
}

func (s standing) withheld() bool { return !s.revoked.IsZero() }

// permissionsLocked returns what callers and people are told of e's token.
func (c *Cache) permissionsLocked(e *entry, now time.Duration) Permissions {
	s := e.standing
	if s.worst == Current {
		return Permissions{}
	}
	wall := c.clock.Wall()
	p := Permissions{Standing: s.worst, Changed: s.changed, Withheld: s.withheld()}
	p.CurrentBy = wall.Add(e.currentBy() - now)
	if at := c.likelyLocked(e, now); at != never {
		p.Likely = wall.Add(min(at, e.currentBy()) - now)
	}
	return p
}

// currentBy returns the boot time by which a token that meets every change is here at the latest. A
// fetch after a change had spread shows which token the back end holds: then it is that one's expiry.
// Before, it is a whole life after the spreading, since the back end may mint until then.
func (e *entry) currentBy() time.Duration {
	if s := e.standing; e.shown < s.unmet || e.deadline == longAgo {
		return s.unmet + max(e.life, defaultNominal)
	}
	return e.deadline + afterExpiry
}
