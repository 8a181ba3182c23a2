package agent

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"go.uber.org/zap"

	"perceptd/tokencache"
)

// Rejection is a caller's report that a resource refused a token.
type Rejection struct {
	Resource  string // App ID URI; a /.default suffix is dropped
	Identity  string // by configured name; empty as in Request
	SHA256    string // of the refused token's text, in hexadecimal; empty: the one held now
	Status    int    // 401 or 403
	Challenge []byte // the claims challenge, as a JSON object; empty: there was none
}

// Cause is why a resource may have refused a token.
type Cause uint8

const (
	OldToken      Cause = iota + 1 // another token is held by now
	StaleToken                     // minted before a known policy change
	StaleClaims                    // groups, roles or wids in the token may be outdated
	RBACDelay                      // a role assignment takes up to 10 minutes to reach the resource
	WrongAudience                  // the token is for another resource
	WrongIdentity                  // the token is another identity's
	RevokedToken                   // a claims challenge: the resource wants a token from after a revocation
	WrongClock                     // the token is expired, or not valid yet, by some clock
	NoPermission                   // nothing here is outdated: the permission is missing
	UnknownToken                   // nothing is known of that token
)

// Finding is one reason that a resource may have had.
type Finding struct {
	Cause  Cause
	Detail string // what is known, in a sentence
	Action string // what to do, in a sentence
}

// Advice is what is known about a refused token.
type Advice struct {
	Identity *Identity

	// Sight is of the token held now: the refused one, unless a finding says otherwise.
	Sight    tokencache.Sight
	Findings []Finding // the likeliest first; there is always one
	Retry    bool      // a token that may be accepted can be had now

	// RetryOn is when asking again is worth while, by the device's clock. Zero: now, with Retry; else
	// nobody knows.
	RetryOn time.Time

	// Fetched is what the fetch for a challenge brought; NotFetched without one.
	Fetched tokencache.Outcome
}

// Rejected tells a caller why a resource may have refused a token, and what to do. A claims challenge
// causes a fetch, at most one for a key in half a minute; nothing else that others could notice comes of
// a report, be it true or false. The error is an *Error, with Busy for a caller that reports too often.
func (a *Agent) Rejected(ctx context.Context, caller Caller, r Rejection) (Advice, error) {
	r.Resource = strings.TrimSuffix(r.Resource, "/.default")
	wanted, fault := r.check()
	if fault != nil {
		return Advice{}, fault
	}
	rules := a.rules.Load()
	granted, denial := rules.choose(&caller, Request{Resource: r.Resource, Identity: r.Identity})
	if denial != nil {
		a.audit.refused(rules, &caller, Request{Resource: r.Resource, Identity: r.Identity}, denial)
		return Advice{}, denial
	}
	identity := granted.identity
	if wait := a.reports.admit(rules.account(&caller)); wait > 0 {
		return Advice{}, &Error{Reason: Busy, RetryAfter: wait, Detail: fmt.Sprintf(
			"too many reports of refused tokens: one in %v is looked into; the answer to the last one still stands", reportEvery)}
	}
	c, err := a.open(rules, caller, identity, r, wanted)
	if err != nil {
		return Advice{}, a.explain(identity, r.Resource, err)
	}
	c.judge(ctx)
	a.log.Info("a resource refused a token", zap.Stringer("caller", caller), zap.String("identity", identity.Name),
		zap.String("resource", r.Resource), zap.Int("status", r.Status), zap.String("likeliest", c.advice.Findings[0].Detail))
	return c.advice, nil
}

// check returns what the challenge asks for, or what is wrong with the report.
func (r *Rejection) check() (challenge, *Error) {
	if r.Status != 401 && r.Status != 403 {
		return challenge{}, badChange("status is %d: report a token that a resource refused with 401 or 403", r.Status)
	}
	r.SHA256 = strings.ToLower(r.SHA256)
	if digest, err := hex.DecodeString(r.SHA256); err != nil || len(digest) != 0 && len(digest) != 32 {
		return challenge{}, badChange("token_sha256 is not the SHA-256 of a token in 64 hexadecimal digits: leave it out for the token held now")
	}
	wanted, err := parseChallenge(r.Challenge)
	if err != nil {
		return challenge{}, badChange("the claims challenge cannot be read: %v; give the value of claims in the WWW-Authenticate header", err)
	}
	return wanted, nil
}

// inquiry is one report being looked into.
type inquiry struct {
	agent  *Agent
	rules  *ruleset
	caller Caller
	report Rejection
	wanted challenge

	key    tokencache.Key
	held   tokencache.Sight
	advice Advice
	now    time.Time // by the device's clock
}

// open looks up what is held. A token of an alternate was handed out in the place of the resource's own,
// so that may be the one that was refused.
func (a *Agent) open(rules *ruleset, caller Caller, identity *Identity, r Rejection, wanted challenge) (*inquiry, error) {
	c := &inquiry{agent: a, rules: rules, caller: caller, report: r, wanted: wanted, now: a.clock.Wall()}
	c.advice.Identity = identity
	c.key = tokencache.Key{Selector: identity.Selector(), Resource: r.Resource}
	var err error
	if c.held, _, err = a.cache.Look(c.key); err != nil {
		return nil, err
	}
	for _, alternate := range rules.alternatesFor(&caller, identity, r.Resource) {
		key := tokencache.Key{Selector: identity.Selector(), Resource: alternate}
		if r.SHA256 == "" || r.SHA256 == c.held.SHA256 || !a.holds(key, r.SHA256) {
			continue
		}
		if held, _, err := a.cache.Look(key); err == nil && held.SHA256 == r.SHA256 {
			c.key, c.held = key, held
		}
	}
	c.advice.Sight = c.held
	return c, nil
}

func (c *inquiry) judge(ctx context.Context) {
	switch {
	case c.held.SHA256 == "":
		c.add(UnknownToken, "no valid token is held for it now, so nothing is known of the refused one; it may have expired",
			"ask for a token again")
		c.advice.Retry = true
	case c.report.SHA256 != "" && c.report.SHA256 != c.held.SHA256:
		c.judgeOther()
	default:
		c.agent.reports.note(c.key, c.held.SHA256, c.now)
		c.judgeHeld(ctx)
	}
}

// judgeOther is for a token that is not the one held: an older one, or one held for something else.
func (c *inquiry) judgeOther() {
	for key, identity := range c.rules.keys {
		if !c.rules.mayHave(&c.caller, identity, key.Resource) || !c.agent.holds(key, c.report.SHA256) {
			continue
		}
		if key.Resource != c.report.Resource {
			c.add(WrongAudience, fmt.Sprintf("the refused token is the one for %s", key.Resource),
				fmt.Sprintf("ask for a token for %s and send that one", c.report.Resource))
		}
		if identity != c.advice.Identity {
			c.add(WrongIdentity, fmt.Sprintf("the refused token is that of identity %q", identity.Name),
				fmt.Sprintf("send the token of identity %q, or have %q granted the permission", c.advice.Identity.Name, identity.Name))
		}
		c.advice.Retry = true
		return
	}
	c.add(OldToken, fmt.Sprintf("the token held now is another one, received on %s", stamp(c.held.ReceivedOn)),
		"ask for a token again and send that one; if an SDK or a program keeps tokens of its own, have it drop them")
	c.advice.Retry = !c.held.Permissions.Withheld
	if !c.advice.Retry {
		c.judgeStanding()
	}
}

// judgeHeld is for the token held. A 401 is mostly about who sends the token, a 403 about what it may.
func (c *inquiry) judgeHeld(ctx context.Context) {
	if c.report.Status == 401 {
		c.judgeChallenge(ctx)
		c.judgeAudience()
		c.judgeIdentity()
		c.judgeClock()
		c.judgeStanding()
		if len(c.advice.Findings) == 0 {
			c.add(WrongAudience, fmt.Sprintf("nothing is wrong with the token as far as can be told here: its audience is %s, and it is good for another %v",
				orUntold(c.held.Claims.Audience), c.held.Left.Round(time.Second)),
				"compare the audience with the one that the resource wants, which its WWW-Authenticate header or its documentation names, and pass on its claims challenge if there is one")
		}
		return
	}
	c.judgeStanding()
	c.judgeChallenge(ctx)
	c.judgeAudience()
	c.judgeIdentity()
	c.judgeClock()
	c.judgePermissions()
}

func (c *inquiry) add(cause Cause, detail, action string) {
	c.advice.Findings = append(c.advice.Findings, Finding{Cause: cause, Detail: detail, Action: action})
}

// retryOn notes a moment at which asking again is worth while, if it is the first.
func (c *inquiry) retryOn(at time.Time) {
	if c.advice.RetryOn.IsZero() && !c.advice.Retry {
		c.advice.RetryOn = at
	}
}

// holds reports whether the cache has that token under key.
func (a *Agent) holds(key tokencache.Key, digest string) bool {
	for _, status := range a.cache.Status() {
		if status.Key == key {
			return status.SHA256 == digest
		}
	}
	return false
}

// expected returns when a newer token than the one held under key is expected, which is at its expiry
// unless something earlier was learnt.
func (a *Agent) expected(key tokencache.Key, held tokencache.Sight) (at time.Time, earlier bool) {
	for _, status := range a.cache.Status() {
		if status.Key == key && !status.Expected.IsZero() && status.Expected.Before(held.ExpiresOn) {
			return status.Expected, true
		}
	}
	return held.ExpiresOn, false
}

// fetchFor makes the one fetch that a claims challenge is worth, and says in words what came of it.
func (c *inquiry) fetchFor(ctx context.Context) string {
	if !c.agent.reports.mayFetch(c.key, c.agent.clock.Boot()) {
		return fmt.Sprintf("a fetch for such a challenge was made less than %v ago", challengeEvery)
	}
	outcome, err := c.agent.cache.Refresh(ctx, c.key, false)
	var spreading *tokencache.HeldError
	switch {
	case errors.As(err, &spreading):
		return err.Error()
	case err != nil:
		c.advice.Fetched = tokencache.Failed
		return fmt.Sprintf("a fetch was tried and failed: %v", c.agent.explain(c.advice.Identity, c.key.Resource, err))
	}
	c.advice.Fetched = outcome
	if held, _, err := c.agent.cache.Look(c.key); err == nil && held.SHA256 != "" {
		c.held, c.advice.Sight = held, held
	}
	if outcome == tokencache.Newer {
		c.advice.Retry = true
		return "a fetch just now brought a newer token"
	}
	return "a fetch just now brought the same token from the back end's cache"
}
