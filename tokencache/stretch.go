package tokencache

import "time"

// Stretch is a time, which is over, in which the token held of a key lacked a policy change. It is told while the token
// that ended it is held.
type Stretch struct {
	From, To time.Time       // by the device's clock: from the change on, or from when a token came that lacked it
	State    PermissionState // the worst in that time
	Withheld bool
}

// endedLocked returns the stretch that ends now, since e's token is replaced: zero where it carried every change. It
// begins before that token where the one before it lacked a change as well.
func (c *Cache) endedLocked(e *entry, now bootTime) Stretch {
	if len(e.judgement.lacks) == 0 || e.token.life == 0 {
		return Stretch{}
	}
	s := Stretch{
		From: c.changes[e.judgement.lacks[0]].At, To: c.clock.Wall(), State: e.policy.worst,
		Withheld: e.policy.withheld(),
	}
	if over := now.sub(e.token.deadline); over > 0 {
		s.To = s.To.Add(-over)
	}
	before := e.stretch
	if before == (Stretch{}) {
		if came := e.token.receivedWall; came.After(s.From) {
			s.From = came
		}
		return s
	}
	if before.From.Before(s.From) {
		s.From = before.From
	}
	s.State, s.Withheld = s.State.worse(before.State), s.Withheld || before.Withheld
	return s
}
