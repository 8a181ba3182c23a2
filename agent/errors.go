package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"perceptd/agent/api"
	"perceptd/agent/grants"
	"perceptd/tokencache"
)

// Error is why a caller does not get what it asked for. Detail is fit for the caller's eyes and says what to do next.
type Error struct {
	Code       api.Code
	Detail     string
	Choices    []string           // identities to name, with CodeAmbiguous, CodeUnknownIdentity, CodeFaultyGrant
	Granted    []*grants.Identity // these identities, where they are those of a request for a token
	RetryAfter time.Duration      // when asking again may help; zero: unknown or never

	// NearMiss and Suggestion are what helps, with CodeNotGranted; nil: nothing that is known.
	NearMiss   *grants.NearMiss
	Suggestion *grants.Suggestion

	// forAudit is the deny rule that takes the token away, with CodeDenied, or what is not for every caller, with
	// CodeFaultyGrant.
	forAudit string

	// Stopping says, with CodeUnreachable, that the daemon is going down, or that the identity was just removed.
	Stopping bool
}

func (e *Error) Error() string { return e.Detail }

// isInvalid reports whether a request for a token is wrong for every caller.
func (e *Error) isInvalid() bool {
	return e.Code == api.CodeBadRequest || e.Code == api.CodeUnknownIdentity || e.Code == api.CodeAmbiguous
}

// isDenial reports whether the caller may not have what it asks for, by the grants or by a deny rule.
func (e *Error) isDenial() bool {
	return e.Code == api.CodeNotGranted || e.Code == api.CodeFaultyGrant || e.Code == api.CodeDenied
}

// passes reports whether waiting helps.
func (e *Error) passes() bool {
	switch e.Code {
	case api.CodeNotYet, api.CodeShortLife, api.CodeRevoked, api.CodeUnreachable, api.CodeThrottled:
		return !e.Stopping
	}
	return false
}

// callerError returns what a caller is answered for an error of the cache.
func (a *Agent) callerError(identity *grants.Identity, resource string, err error) error {
	var fetch *tokencache.FetchError
	var short *tokencache.ShortLifeError
	var withheld *tokencache.WithheldError
	var notYet *tokencache.NotYetError
	switch {
	case errors.As(err, &withheld):
		return a.withheldError(identity, resource, withheld)
	case errors.As(err, &notYet):
		return a.notYetError(identity, resource, notYet)
	case errors.As(err, &fetch):
		return &Error{
			Code:       api.Code(fetch.Kind),
			Detail:     fmt.Sprintf("no token of identity %q for %s: %v", identity.Name, resource, fetch),
			RetryAfter: fetch.RetryAfter,
		}
	case errors.As(err, &short):
		return &Error{
			Code: api.CodeShortLife,
			Detail: fmt.Sprintf("%v; the back end hands out the same token until it rolls over: "+
				"ask for less, or later", short),
		}
	case errors.Is(err, context.DeadlineExceeded):
		return &Error{
			Code: api.CodeUnreachable,
			Detail: fmt.Sprintf("no token of identity %q for %s yet: the back end has not answered, and the call to "+
				"it goes on; ask again", identity.Name, resource),
		}
	case errors.Is(err, tokencache.ErrDropped), errors.Is(err, tokencache.ErrClosed):
		return &Error{Code: api.CodeUnreachable, Stopping: true, Detail: err.Error() + "; ask again"}
	}
	return err
}

// withheldError says what a revocation does to callers. It can last for a day, so it names no moment to ask again; wait
// and watch are there for that.
func (a *Agent) withheldError(identity *grants.Identity, resource string, err *tokencache.WithheldError) *Error {
	key := tokencache.Key{Selector: identity.Selector(), Resource: resource}
	if placeholder, alone := a.placeholderAlone(key); alone {
		return &Error{Code: api.CodeRevoked, Detail: fmt.Sprintf(
			"%s, so that nobody knows whether permissions of identity %q on %s were revoked: tokens from before %s "+
				"are withheld ([tokens] lost_record); to end that: %s",
			recordText(placeholder.Record), identity.Name, resource, formatTime(placeholder.RecordedOn),
			placeholder.Mend)}
	}
	if !err.Spread.IsZero() {
		return &Error{Code: api.CodeRevoked, Detail: fmt.Sprintf(
			"permissions of identity %q on %s were revoked on %s, which takes minutes to reach new tokens: none is "+
				"fetched before %s, since it would lack that and stay for a day; a current one is here by %s at the "+
				"latest; tokens already handed out cannot be recalled; ask again with wait, or watch",
			identity.Name, resource, formatTime(err.Revoked), formatTime(err.Spread), formatTime(err.Until))}
	}
	probably := ""
	if likely := err.Permissions.Likely; !likely.IsZero() {
		probably = fmt.Sprintf(", probably by %s", formatTime(likely))
	}
	return &Error{Code: api.CodeRevoked, Detail: fmt.Sprintf(
		"permissions of identity %q on %s were revoked on %s, and the back end still hands out a token from before: "+
			"it is withheld until a current one is here, by %s at the latest%s; tokens already handed out cannot be "+
			"recalled; ask again with wait, or watch",
		identity.Name, resource, formatTime(err.Revoked), formatTime(err.Until), probably)}
}

func (a *Agent) notYetError(identity *grants.Identity, resource string, err *tokencache.NotYetError) *Error {
	by := err.ExpiresOn
	if likely := err.Permissions.Likely; !likely.IsZero() && likely.Before(by) {
		by = likely
	}
	return &Error{
		Code: api.CodeNotYet,
		Detail: fmt.Sprintf("the back end still hands out a token of identity %q for %s that was minted before %s, "+
			"and may until that expires on %s; ask again with wait, or watch",
			identity.Name, resource, formatTime(err.Want), formatTime(err.ExpiresOn)),
		RetryAfter: min(max(by.Sub(a.clock.Wall()), notYetSoonest), notYetLatest),
	}
}

// A caller that asked for a younger token than there is may ask again after a time between these.
const (
	notYetSoonest = 30 * time.Second
	notYetLatest  = 5 * time.Minute
)

// placeholderAlone returns the placeholder that withholds the token of key, if no revocation on record withholds it
// too.
func (a *Agent) placeholderAlone(key tokencache.Key) (placeholder api.PolicyChange, alone bool) {
	for _, p := range a.cache.Withholders(key) {
		c := a.describeChange(tokencache.RecordedChange{PolicyChange: p})
		if c.Record == "" {
			return api.PolicyChange{}, false
		}
		if !alone {
			placeholder, alone = c, true
		}
	}
	return placeholder, alone
}

// badChange is the error for a policy change or a deny rule that is not sound.
func badChange(format string, args ...any) *Error {
	return &Error{Code: api.CodeBadRequest, Detail: fmt.Sprintf(format, args...)}
}
