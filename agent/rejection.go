package agent

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.uber.org/zap"

	"perceptd/agent/api"
	"perceptd/agent/grants"
	"perceptd/tokencache"
)

// Rejected returns why a resource may have refused a caller's token, and what the caller can do. r.Claims is the JSON
// object of the claims challenge; empty: there was none. A challenge causes a fetch, at most one for a key in half a
// minute; nothing else that others could notice follows from a report, whether it is true or false. The error is an
// *Error, with CodeBusy for a caller that reports too often.
func (a *Agent) Rejected(ctx context.Context, caller grants.Caller, r api.Rejection) (api.Advice, error) {
	named := r.Resource
	r.Resource = grants.TrimScope(r.Resource)
	wanted, fault := checkRejection(&r)
	if fault != nil {
		return api.Advice{}, fault
	}
	rules := a.rulesNow()
	asked := grants.Request{Resource: r.Resource, Identity: r.Identity}
	granted, denial := rules.authorize(&caller, asked)
	if denial != nil {
		a.audit.refused(rules, &caller, asked, denial)
		return api.Advice{}, denial
	}
	identity := granted.Identity
	if wait := a.reports.admit(rules.SubjectOf(&caller)); wait > 0 {
		return api.Advice{}, &Error{Code: api.CodeBusy, RetryAfter: wait, Detail: fmt.Sprintf(
			"too many reports of refused tokens: one in %v is looked into; the answer to the last one still stands",
			reportEvery)}
	}
	d, err := a.diagnose(rules, caller, identity, r, wanted)
	if err != nil {
		return api.Advice{}, a.callerError(identity, r.Resource, err)
	}
	d.judge(ctx)
	a.log.Info("a resource refused a token", zap.Stringer("caller", caller), zap.String("identity", identity.Name),
		zap.String("resource", r.Resource), zap.Int("status", r.Status), zap.String("likeliest", d.findings[0].Detail))
	return d.advice(named), nil
}

// checkRejection returns what the challenge asks for, or what is wrong with the report.
func checkRejection(r *api.Rejection) (challenge, *Error) {
	if r.Status != 401 && r.Status != 403 {
		return challenge{}, badChange("status is %d: report a token that a resource refused with 401 or 403", r.Status)
	}
	r.SHA256 = strings.ToLower(r.SHA256)
	if digest, err := hex.DecodeString(r.SHA256); err != nil || len(digest) != 0 && len(digest) != 32 {
		return challenge{}, badChange("token_sha256 is not the SHA-256 of a token in 64 hexadecimal digits: leave it " +
			"out for the token held now")
	}
	wanted, err := parseChallenge([]byte(r.Claims))
	if err != nil {
		return challenge{}, badChange("the claims challenge cannot be read: %v; give the value of claims in the "+
			"WWW-Authenticate header", err)
	}
	return wanted, nil
}

// challenge is what a claims challenge asks for (OpenID Connect Core, 5.5, as Entra uses it).
type challenge struct {
	made   bool
	after  time.Time // a token issued after this; zero: not asked for
	others []string  // names of other claims that are asked for
}

const maxChallenge = 16 << 10 // bytes

// parseChallenge reads a challenge. Nothing is no challenge.
func parseChallenge(text []byte) (challenge, error) {
	text = bytes.TrimSpace(text)
	switch {
	case len(text) == 0:
		return challenge{}, nil
	case len(text) > maxChallenge:
		return challenge{}, fmt.Errorf("it is larger than %d bytes", maxChallenge)
	}
	var members map[string]json.RawMessage
	if err := json.Unmarshal(text, &members); err != nil || members == nil {
		return challenge{}, errors.New("it is not a JSON object")
	}
	var claims map[string]struct{ Value any }
	if raw, there := members["access_token"]; there && json.Unmarshal(raw, &claims) != nil {
		return challenge{}, errors.New("its access_token is not an object of claims")
	}
	c := challenge{made: true}
	for name, claim := range claims {
		if name == "nbf" {
			c.after = secondsOf(claim.Value)
		} else {
			c.others = append(c.others, strconv.Quote(truncate(name, 64)))
		}
	}
	slices.Sort(c.others)
	c.others = c.others[:min(len(c.others), listed)]
	return c, nil
}

// secondsOf reads Unix seconds, written as a number or a string; zero for anything else.
func secondsOf(value any) time.Time {
	var seconds float64
	switch v := value.(type) {
	case float64:
		seconds = v
	case string:
		parsed, err := strconv.ParseFloat(v, 64)
		if err != nil {
			return time.Time{}
		}
		seconds = parsed
	}
	if !(seconds > 0 && seconds < tokencache.EndOfDates) {
		return time.Time{}
	}
	return time.Unix(int64(seconds), 0)
}
