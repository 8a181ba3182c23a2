package tokencache

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
)

// Kind classifies the failures of a fetch by what a caller can do about them.
type Kind string

const (
	// Unreachable: no answer, one that says to come back later, or one of something on the way, such as a proxy's page.
	// For callers, time heals it.
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

// Extent is how much of a source a failure is about.
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
	RetryAfter time.Duration // what the back end asked of the source, or the cache asks of callers; zero: nothing

	// JustExpired says that the answer was a token whose life has just ended: the back end is about to roll over, and
	// is asked again at once.
	JustExpired bool

	// Detail says what happened in words fit for a log and a caller: no endpoint body, no secret.
	Detail string
}

// extent returns e's Extent. Throttled counts as OfSource, since calls for any key add to it.
func (e *FetchError) extent() Extent {
	if e.Kind == Throttled {
		return OfSource
	}
	return e.Extent
}

// lasts reports whether only an administrator can heal e.
func (e *FetchError) lasts() bool { return e.Kind == IdentityNotFound || e.Kind == Refused }

func (e *FetchError) Error() string {
	return strings.ReplaceAll(string(e.Kind), "_", " ") + ": " + e.Detail
}

// asFetchError returns the error of a fetch as a *FetchError.
func asFetchError(err error) *FetchError {
	var fetch *FetchError
	switch {
	case errors.As(err, &fetch):
		return fetch
	case errors.Is(err, context.DeadlineExceeded):
		detail := fmt.Sprintf("no answer within %v", fetchTimeout)
		return &FetchError{Kind: Unreachable, Extent: OfIdentity, Detail: detail}
	}
	return &FetchError{Kind: Unreachable, Detail: err.Error()}
}

// withRetryAfter returns a copy of e for a caller, which may try again after that time.
func (e *FetchError) withRetryAfter(after time.Duration) *FetchError {
	shared := *e
	shared.RetryAfter = after
	return &shared
}

// ShortLifeError is returned by Get if the back end's token does not meet a firm need now.
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

// WithheldError is returned by Get while a revocation withholds the token.
type WithheldError struct {
	Permissions Permissions
	Revoked     time.Time // the latest revocation that the token may lack
	Until       time.Time // a token that no revocation withholds is here by then at the latest, if the back end answers
	Spread      time.Time // no token is held, and none is fetched before, since the revocation spreads; zero: one is
}

func (e *WithheldError) Error() string {
	if !e.Spread.IsZero() {
		return fmt.Sprintf("permissions were revoked on %s, and a token issued before %s may lack that: "+
			"none is fetched until then, and one is here by %s at the latest",
			stamp(e.Revoked), stamp(e.Spread), stamp(e.Until))
	}
	return fmt.Sprintf("permissions were revoked on %s, and the back end still hands out a token from before: "+
		"withheld until %s at the latest",
		stamp(e.Revoked), stamp(e.Until))
}

// NotYetError is returned by Get if the back end has no token as young as was asked for.
type NotYetError struct {
	Want        time.Time // Need.IssuedAfter
	Permissions Permissions
	ExpiresOn   time.Time // of the token held, by the device's clock
}

func (e *NotYetError) Error() string {
	return fmt.Sprintf("the back end still hands out a token minted before %s, which expires on %s",
		stamp(e.Want), stamp(e.ExpiresOn))
}

// PostponedError is returned by Refresh while a policy change spreads through the directory. A token fetched now may
// lack the change, and the back end would keep that token for a day.
type PostponedError struct {
	For time.Duration
}

func (e *PostponedError) Error() string {
	return fmt.Sprintf("a policy change is still spreading: a token fetched now may lack it and then stay for a day; "+
		"the fetch comes by itself in %v", e.For.Round(time.Second))
}

// FutureError is returned by RecordChange for a change dated ahead of a clock that is known to be right.
type FutureError struct {
	Ahead time.Duration
}

func (e *FutureError) Error() string {
	return fmt.Sprintf("the policy change is dated %v in the future", e.Ahead.Round(time.Second))
}

// ErrTooManyChanges is returned by RecordChange if MaxChanges are on record, no two of one identity and resource.
var ErrTooManyChanges = errors.New("too many policy changes are on record")

// stamp formats a time in the text of an error.
func stamp(t time.Time) string { return t.UTC().Format("Jan 2 15:04:05 UTC") }
