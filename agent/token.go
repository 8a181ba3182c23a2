package agent

import (
	"context"
	"errors"
	"time"

	"perceptd/agent/api"
	"perceptd/agent/grants"
	"perceptd/tokencache"
)

// Request asks for a token.
type Request struct {
	grants.Request // names the token; a /.default suffix of its resource is dropped

	MinTTL         time.Duration // the life that the caller wants the token to have left
	MinTTLRequired bool          // true: less than MinTTL is an error; false: the token is returned anyway

	// IssuedAfter is a moment, by the issuer's clock, after which the token must have been issued. Zero: any.
	IssuedAfter time.Time

	// Wait is how long, in real time, to wait for a token that meets the need and is not withheld. Zero: for one fetch
	// at most, which a longer Wait does not cut short either.
	Wait time.Duration
}

// Answer is a token on its way to a caller.
type Answer struct {
	tokencache.Answer
	Identity    *grants.Identity
	Permissions api.Permissions

	// Advertise is the life that the SDK forms state. It is at most Left, and less where an SDK should come back
	// earlier: always by a limit, and by a lower one while the permissions are not current.
	Advertise time.Duration
}

// Counts returns how requests were answered since the start.
func (a *Agent) Counts() api.RequestCounts {
	return api.RequestCounts{
		Served: a.served.Load(), Denied: a.denied.Load(), Invalid: a.invalid.Load(), Failed: a.failed.Load(),
	}
}

// Token answers a caller: a token, or an *Error. It waits for the back end only when it must, and never longer than
// ctx.
func (a *Agent) Token(ctx context.Context, caller grants.Caller, r Request) (Answer, error) {
	r.Resource = grants.TrimScope(r.Resource)
	var answer Answer
	var err error
	if r.Wait > 0 {
		answer, err = a.await(ctx, &caller, r)
	} else {
		answer, err = a.answer(ctx, &caller, r)
	}
	if err == nil {
		a.served.Add(1)
		return answer, nil
	}
	var refusal *Error
	switch {
	case errors.As(err, &refusal) && refusal.isDenial():
		a.denied.Add(1)
		a.audit.refused(a.rules.Load(), &caller, r.Request, err)
	case refusal != nil && refusal.isInvalid():
		a.invalid.Add(1)
	default:
		a.failed.Add(1)
	}
	return Answer{}, err
}

// answer makes one try. The rules in force at its end decide.
func (a *Agent) answer(ctx context.Context, caller *grants.Caller, r Request) (Answer, error) {
	rules := a.rulesNow()
	granted, refusal := rules.authorize(caller, r.Request)
	if refusal != nil {
		return Answer{}, refusal
	}
	identity := granted.Identity
	key := tokencache.Key{Selector: identity.Selector(), Resource: r.Resource}
	answer, err := a.cache.Get(ctx, key, tokencache.Need{
		MinTTL: r.MinTTL, MinTTLRequired: r.MinTTLRequired, IssuedAfter: r.IssuedAfter,
		Alternates: rules.AlternatesFor(caller, identity, r.Resource),
	})
	if a.rules.Load() != rules { // a reload or a deny rule changed them while the caller waited
		return a.answer(ctx, caller, r)
	}
	if err != nil {
		return Answer{}, a.callerError(identity, r.Resource, err)
	}
	a.audit.allowed(rules, caller, granted, r.Resource)
	life := rules.SDKLifeOrDefault()
	if answer.Permissions.State != tokencache.Current || answer.Unconfirmed {
		life = min(life, staleSDKLife)
	}
	return Answer{
		Answer: answer, Identity: identity, Permissions: permissionsOf(answer.Permissions),
		Advertise: min(answer.Left, life),
	}, nil
}

// pollInterval is how often a waiting caller tries again when nothing wakes it: for a key without a token, whose fetch
// failed. The cache remembers failures, so that not every try costs a call.
const pollInterval = 2 * time.Second

// await tries until there is a token, until waiting no longer helps, or until r.Wait is over. Each try follows the
// rules in force.
func (a *Agent) await(ctx context.Context, caller *grants.Caller, r Request) (Answer, error) {
	waiting, cancel := context.WithTimeout(ctx, r.Wait)
	defer cancel()
	for {
		info, changed, err := a.peek(caller, r) // before the try, so that no change between try and wait is missed
		if err != nil {
			return Answer{}, err
		}
		answer, err := a.answer(ctx, caller, r)
		var refusal *Error
		if err == nil || !errors.As(err, &refusal) || !refusal.passes() {
			return answer, err
		}
		if !waitForChange(waiting, changed, info.SHA256 == "") {
			return Answer{}, err
		}
	}
}

// waitForChange returns when changed is closed; also after pollInterval if the token is missing. It returns false when
// ctx is done.
func waitForChange(ctx context.Context, changed <-chan struct{}, missing bool) bool {
	var again <-chan time.Time
	if missing {
		timer := time.NewTimer(pollInterval)
		defer timer.Stop()
		again = timer.C
	}
	select {
	case <-changed:
	case <-again:
	case <-ctx.Done():
		return false
	}
	return true
}

// Peek describes, without its text, the token that r would be answered with now. It returns a channel that is closed
// when that may have changed, also by a reload or a deny rule. It checks the grants at every call. It fetches nothing,
// but the cache counts it as a request for the token. The error is an *Error.
func (a *Agent) Peek(caller grants.Caller, r Request) (info api.WatchEvent, changed <-chan struct{}, err error) {
	named := r.Resource
	r.Resource = grants.TrimScope(named)
	info, changed, err = a.peek(&caller, r)
	info.Resource = named
	a.audit.refused(a.rules.Load(), &caller, r.Request, err)
	return info, changed, err
}

// peek is Peek without a trace in the audit.
func (a *Agent) peek(caller *grants.Caller, r Request) (api.WatchEvent, <-chan struct{}, error) {
	rules := a.rulesNow()
	granted, refusal := rules.authorize(caller, r.Request)
	if refusal != nil {
		return api.WatchEvent{}, nil, refusal
	}
	identity := granted.Identity
	held, changed, err := a.cache.Peek(tokencache.Key{Selector: identity.Selector(), Resource: r.Resource})
	if a.rules.Load() != rules { // what woke others for them may have come before changed
		return a.peek(caller, r)
	}
	if err != nil {
		return api.WatchEvent{}, nil, a.callerError(identity, r.Resource, err)
	}
	info := api.WatchEvent{Identity: identity.Name, Resource: r.Resource}
	if held.SHA256 != "" {
		info.SHA256, info.ExpiresOn, info.ReceivedOn = held.SHA256, api.Time(held.ExpiresOn), api.Time(held.ReceivedOn)
		info.Permissions = permissionsOf(held.Permissions)
	}
	return info, changed, nil
}
