package agent

import (
	"context"
	"encoding/hex"
	"fmt"
	"strings"
	"time"

	"go.uber.org/zap"

	"perceptd/agent/api"
	"perceptd/agent/grants"
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
	Identity *grants.Identity

	// Sight is of the token held now: the refused one, unless a finding says otherwise.
	Sight    tokencache.TokenInfo
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
func (a *Agent) Rejected(ctx context.Context, caller grants.Caller, r Rejection) (Advice, error) {
	r.Resource = strings.TrimSuffix(r.Resource, "/.default")
	wanted, fault := r.check()
	if fault != nil {
		return Advice{}, fault
	}
	rules := a.rules.Load()
	asked := grants.Request{Resource: r.Resource, Identity: r.Identity}
	granted, denial := rules.authorize(&caller, asked)
	if denial != nil {
		a.audit.refused(rules, &caller, asked, denial)
		return Advice{}, denial
	}
	identity := granted.Identity
	if wait := a.reports.admit(rules.SubjectOf(&caller)); wait > 0 {
		return Advice{}, &Error{Code: api.CodeBusy, RetryAfter: wait, Detail: fmt.Sprintf(
			"too many reports of refused tokens: one in %v is looked into; the answer to the last one still stands", reportEvery)}
	}
	c, err := a.open(rules, caller, identity, r, wanted)
	if err != nil {
		return Advice{}, a.callerError(identity, r.Resource, err)
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
