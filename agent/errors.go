package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"perceptd/tokencache"
)

// Reason sorts the answers that are not a token.
type Reason uint8

const (
	BadResource       Reason = iota + 1 // the resource is no App ID URI
	UnknownIdentity                     // the configuration has no such identity
	AmbiguousIdentity                   // several identities are granted and none was named
	NotGranted                          // no grant allows it
	ShortLife                           // the newest token has less life than was firmly asked for
	Throttled                           // the back end asks for fewer calls
	Unreachable                         // no token cached, no answer from the back end
	MalformedAnswer                     // what answered is not a token endpoint
	IdentityNotFound                    // the back end does not know the identity
	Refused                             // the back end refuses this token
	Stopping                            // the daemon is going down or the identity was just removed
)

// Error is why a caller gets no token. Detail is fit for the caller's eyes and says what to do next.
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
func explain(identity *Identity, resource string, err error) error {
	var fetch *tokencache.FetchError
	var short *tokencache.ShortLifeError
	switch {
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
