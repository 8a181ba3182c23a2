package tokencache

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
)

// Kind sorts the failures of a fetch by what a caller can do about them.
type Kind string

const (
	// Unreachable: no answer, one that says to come back later, or one of something on the way, such as a proxy's page. Time
	// heals it as far as callers are concerned.
	Unreachable Kind = "unreachable"
	// Throttled: the back end got too many calls. Time heals it, fewer calls heal it sooner.
	Throttled Kind = "throttled"
	// IdentityNotFound: the back end knows no such identity on this device. An administrator heals it.
	IdentityNotFound Kind = "identity_not_found"
	// Refused: the back end will not give this token. An administrator heals it.
	Refused Kind = "refused"
	// Malformed: what answered did not speak the protocol, or gave a token that cannot be used.
	Malformed Kind = "malformed_answer"
)

// Extent is how much of a source a failure tells of.
type Extent uint8

const (
	// OfKey: there was an answer, and it is about the key that was asked for. It slows no other key down.
	OfKey Extent = iota
	// OfIdentity: there was no answer in time, as may be for one identity and not for the others.
	OfIdentity
	// OfSource: the endpoint cannot be reached, whatever it is asked for.
	OfSource
)

// FetchError is why a source gave no token.
type FetchError struct {
	Kind       Kind
	Extent     Extent        // Throttled is OfSource whatever this says
	RetryAfter time.Duration // what the source was told by the back end, and callers by the cache; zero for nothing

	// JustExpired says that the answer was a token whose life has just ended: the back end is about to roll over, and is asked
	// again at once.
	JustExpired bool

	// Detail says what happened in words fit for a log and a caller: no endpoint body, no secret.
	Detail string
}

// extent is Extent, and OfSource with Throttled: whatever it is asked for counts.
func (e *FetchError) extent() Extent {
	if e.Kind == Throttled {
		return OfSource
	}
	return e.Extent
}

// lasts reports whether only an administrator heals e.
func (e *FetchError) lasts() bool { return e.Kind == IdentityNotFound || e.Kind == Refused }

func (e *FetchError) Error() string {
	return strings.ReplaceAll(string(e.Kind), "_", " ") + ": " + e.Detail
}

// asFetchError gives every error of a fetch a kind.
func asFetchError(err error) *FetchError {
	var fetch *FetchError
	switch {
	case errors.As(err, &fetch):
		return fetch
	case errors.Is(err, context.DeadlineExceeded):
		return &FetchError{Kind: Unreachable, Extent: OfIdentity, Detail: fmt.Sprintf("no answer within %v", fetchTimeout)}
	}
	return &FetchError{Kind: Unreachable, Detail: err.Error()}
}

// withRetryAfter returns e for a caller, for whom a call may be made after that time.
func (e *FetchError) withRetryAfter(after time.Duration) *FetchError {
	shared := *e
	shared.RetryAfter = after
	return &shared
}

// ShortLifeError is returned by Get for a firm need that the back end's token does not meet now.
type ShortLifeError struct {
	Left, Want time.Duration
}

func (e *ShortLifeError) Error() string {
	return fmt.Sprintf("the newest token has %v left, %v was asked for", e.Left.Round(time.Second), e.Want)
}

var (
	// ErrDropped is returned by Get and Refresh to callers that waited for a key while it was dropped.
	ErrDropped = errors.New("the key was dropped while its token was fetched")
	// ErrClosed is returned by Get and Refresh after Close.
	ErrClosed = errors.New("the token cache is closed")
)
