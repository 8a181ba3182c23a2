package agent

import (
	"context"
	"errors"
	"strings"
	"time"

	"perceptd/tokencache"
)

// Sight is what is held for a caller, without the token's text.
type Sight struct {
	tokencache.Sight
	Identity *Identity
}

// Look tells a caller what is held now of the token that r would be answered with, and when to look
// again: the channel is closed when that is no longer true, which may turn out to be nothing new. Grants
// are checked anew at every call. The error is an *Error. It fetches nothing, but counts as asking.
func (a *Agent) Look(caller Caller, r Request) (Sight, <-chan struct{}, error) {
	sight, news, err := a.look(caller, r)
	a.audit.refused(a.rules.Load(), &caller, r, err)
	return sight, news, err
}

func (a *Agent) look(caller Caller, r Request) (Sight, <-chan struct{}, error) {
	r.Resource = strings.TrimSuffix(r.Resource, "/.default")
	granted, denial := a.rules.Load().choose(&caller, r)
	if denial != nil {
		return Sight{}, nil, denial
	}
	identity := granted.identity
	sight, news, err := a.cache.Look(tokencache.Key{Selector: identity.Selector(), Resource: r.Resource})
	if err != nil {
		return Sight{}, nil, a.explain(identity, r.Resource, err)
	}
	return Sight{Sight: sight, Identity: identity}, news, nil
}

// askAgain is how often a waiting caller asks where no news will come by itself: for a key without a
// token, whose fetch failed. The cache remembers failures, so that asking costs no call each time.
const askAgain = 2 * time.Second

// await answers a caller that would rather wait than be told that there is no token for it yet. The
// rules are those in force at each try.
func (a *Agent) await(ctx context.Context, caller Caller, r Request) (Answer, error) {
	patience, cancel := context.WithTimeout(ctx, r.Wait)
	defer cancel()
	for {
		sight, news, err := a.look(caller, r) // first, so that nothing is missed between the try and the wait
		if err != nil {
			return Answer{}, err
		}
		r.Wait = 0
		answer, err := a.answer(ctx, caller, r)
		var refusal *Error
		if err == nil || !errors.As(err, &refusal) || !refusal.Reason.passes() {
			return answer, err
		}
		if !pause(patience, news, sight.SHA256 == "") {
			return Answer{}, err
		}
	}
}

// pause returns at news, or after a while where none will come by itself; false when patience is over.
func pause(patience context.Context, news <-chan struct{}, missing bool) bool {
	var again <-chan time.Time
	if missing {
		timer := time.NewTimer(askAgain)
		defer timer.Stop()
		again = timer.C
	}
	select {
	case <-news:
	case <-again:
	case <-patience.Done():
		return false
	}
	return true
}

// passes reports whether waiting helps.
func (r Reason) passes() bool {
	switch r {
	case NotYet, ShortLife, PermissionsRevoked, Unreachable, Throttled:
		return true
	}
	return false
}
