package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"perceptd/agent/grants"
	"perceptd/tokencache"
)

// Reason sorts the answers that are not a token.
type Reason uint8

const (
	BadResource        Reason = iota + 1 // the resource is no App ID URI
	UnknownIdentity                      // the configuration has no such identity
	AmbiguousIdentity                    // several identities are granted and none was named
	NotGranted                           // no grant allows it
	ShortLife                            // the newest token has less life than was firmly asked for
	Throttled                            // the back end asks for fewer calls
	Unreachable                          // no token cached, no answer from the back end, or one of something on the way
	MalformedAnswer                      // the back end's answer holds no token that can be used
	IdentityNotFound                     // the back end does not know the identity
	Refused                              // the back end refuses this token
	Stopping                             // the daemon is going down or the identity was just removed
	PermissionsRevoked                   // a revocation withholds the token until a current one arrives
	NotYet                               // the back end has no token minted after the moment asked for
	BadChange                            // a policy change, or a report of a refused token, that cannot be taken as it is
	FutureChange                         // the policy change is dated ahead of a clock that is right
	TooManyChanges                       // the record of policy changes is full
	UnknownChange                        // no policy change of that ID is on record
	NotKept                              // done, but not written to the disk
	Busy                                 // this caller asks too much at once
)

// isInvalid reports whether a request was wrong in itself, whoever made it.
func (r Reason) isInvalid() bool {
	return r == BadResource || r == UnknownIdentity || r == AmbiguousIdentity
}

// passes reports whether waiting helps.
func (r Reason) passes() bool {
	switch r {
	case NotYet, ShortLife, PermissionsRevoked, Unreachable, Throttled:
		return true
	}
	return false
}

// Error is why somebody does not get what was asked for. Detail is fit for the caller's eyes and says what to do next.
type Error struct {
	Reason     Reason
	Detail     string
	Choices    []string      // identities to name, with AmbiguousIdentity and UnknownIdentity
	RetryAfter time.Duration // when asking again may help; zero: unknown or never
}

func (e *Error) Error() string { return e.Detail }

var reasonOfKind = map[tokencache.Kind]Reason{
	tokencache.Unreachable:      Unreachable,
	tokencache.Throttled:        Throttled,
	tokencache.IdentityNotFound: IdentityNotFound,
	tokencache.Refused:          Refused,
	tokencache.Malformed:        MalformedAnswer,
}

// explain turns what the cache says into an answer for a caller.
func (a *Agent) explain(identity *grants.Identity, resource string, err error) error {
	var fetch *tokencache.FetchError
	var short *tokencache.ShortLifeError
	var withheld *tokencache.WithheldError
	var notYet *tokencache.NotYetError
	switch {
	case errors.As(err, &withheld):
		return a.explainWithheld(identity, resource, withheld)
	case errors.As(err, &notYet):
		return a.explainNotYet(identity, resource, notYet)
	case errors.As(err, &fetch):
		return &Error{
			Reason:     reasonOfKind[fetch.Kind],
			Detail:     fmt.Sprintf("no token of identity %q for %s: %v", identity.Name, resource, fetch),
			RetryAfter: fetch.RetryAfter,
		}
	case errors.As(err, &short):
		return &Error{
			Reason: ShortLife,
			Detail: fmt.Sprintf("%v; the back end hands out the same token until it rolls over: ask for less, or later", short),
		}
	case errors.Is(err, context.DeadlineExceeded):
		return &Error{
			Reason: Unreachable,
			Detail: fmt.Sprintf("no token of identity %q for %s yet: the back end has not answered, and the call to it goes on; ask again", identity.Name, resource),
		}
	case errors.Is(err, tokencache.ErrDropped), errors.Is(err, tokencache.ErrClosed):
		return &Error{Reason: Stopping, Detail: err.Error() + "; ask again"}
	}
	return err
}

// explainWithheld says what a revocation does to those who ask. It is no error that time alone heals
// soon, so no moment to ask again is given; wait and watch are there for that.
func (a *Agent) explainWithheld(identity *grants.Identity, resource string, err *tokencache.WithheldError) *Error {
	if standIn, alone := a.withheldForRecord(tokencache.Key{Selector: identity.Selector(), Resource: resource}); alone {
		return &Error{Reason: PermissionsRevoked, Detail: fmt.Sprintf(
			"%s, so that nobody knows whether permissions of identity %q on %s were revoked: tokens from before %s are withheld ([tokens] lost_record); to end that: %s",
			standIn.Record.what(), identity.Name, resource, stamp(standIn.RecordedAt), standIn.Mend)}
	}
	if !err.Spread.IsZero() {
		return &Error{Reason: PermissionsRevoked, Detail: fmt.Sprintf(
			"permissions of identity %q on %s were revoked on %s, which takes minutes to reach new tokens: none is fetched before %s, since it would lack that and stay for a day; a current one is here by %s at the latest; tokens already handed out cannot be recalled; ask again with wait, or watch",
			identity.Name, resource, stamp(err.Revoked), stamp(err.Spread), stamp(err.Until))}
	}
	probably := ""
	if likely := err.Permissions.Likely; !likely.IsZero() {
		probably = fmt.Sprintf(", probably by %s", stamp(likely))
	}
	return &Error{Reason: PermissionsRevoked, Detail: fmt.Sprintf(
		"permissions of identity %q on %s were revoked on %s, and the back end still hands out a token from before: it is withheld until a current one is here, by %s at the latest%s; tokens already handed out cannot be recalled; ask again with wait, or watch",
		identity.Name, resource, stamp(err.Revoked), stamp(err.Until), probably)}
}

func (a *Agent) explainNotYet(identity *grants.Identity, resource string, err *tokencache.NotYetError) *Error {
	by := err.ExpiresOn
	if likely := err.Permissions.Likely; !likely.IsZero() && likely.Before(by) {
		by = likely
	}
	return &Error{
		Reason: NotYet,
		Detail: fmt.Sprintf("the back end still hands out a token of identity %q for %s that was minted before %s, and may until that expires on %s; ask again with wait, or watch",
			identity.Name, resource, stamp(err.Want), stamp(err.ExpiresOn)),
		RetryAfter: min(max(by.Sub(a.clock.Wall()), notYetSoonest), notYetLatest),
	}
}

// Between these a caller that asked for a younger token than there is may come back.
const (
	notYetSoonest = 30 * time.Second
	notYetLatest  = 5 * time.Minute
)
