package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"perceptd/agent/grants"
	"perceptd/tokencache"
)

const (
	maxChallenge = 16 << 10 // bytes

	// rbacDelay is how long Azure says that a role assignment may take to reach a resource.
	rbacDelay = 10 * time.Minute

	// clockSlack is the life below which a resource whose clock is a little ahead refuses a token.
	clockSlack = 2 * time.Minute
)

// inquiry is one report being looked into.
type inquiry struct {
	agent  *Agent
	rules  *ruleset
	caller grants.Caller
	report Rejection
	wanted challenge

	key    tokencache.Key
	held   tokencache.TokenInfo
	advice Advice
	now    time.Time // by the device's clock
}

// open looks up what is held. A token of an alternate was handed out in the place of the resource's own,
// so that may be the one that was refused.
func (a *Agent) open(rules *ruleset, caller grants.Caller, identity *grants.Identity, r Rejection, wanted challenge) (*inquiry, error) {
	c := &inquiry{agent: a, rules: rules, caller: caller, report: r, wanted: wanted, now: a.clock.Wall()}
	c.advice.Identity = identity
	c.key = tokencache.Key{Selector: identity.Selector(), Resource: r.Resource}
	var err error
	if c.held, _, err = a.cache.Peek(c.key); err != nil {
		return nil, err
	}
	for _, alternate := range rules.AlternatesFor(&caller, identity, r.Resource) {
		key := tokencache.Key{Selector: identity.Selector(), Resource: alternate}
		if r.SHA256 == "" || r.SHA256 == c.held.SHA256 || !a.holds(key, r.SHA256) {
			continue
		}
		if held, _, err := a.cache.Peek(key); err == nil && held.SHA256 == r.SHA256 {
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
	for key, identity := range c.rules.Keys() {
		if !c.rules.MayHave(&c.caller, identity, key.Resource) || !c.agent.holds(key, c.report.SHA256) {
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

// judgeStanding is about policy changes on record that the token may lack.
func (c *inquiry) judgeStanding() {
	p := c.held.Permissions
	if p.State == tokencache.Current {
		return
	}
	how := "was minted before"
	if p.State == tokencache.Uncertain {
		how = "may have been minted before"
	}
	by, on := "by "+stamp(p.CurrentBy)+" at the latest", p.CurrentBy
	if !p.Likely.IsZero() {
		by, on = by+", probably by "+stamp(p.Likely), p.Likely
	}
	detail := fmt.Sprintf("the token %s the policy change of %s had reached new tokens, and the back end goes on handing it out; a current one is here %s", how, stamp(p.Changed), by)
	standIn, alone := c.agent.withheldForRecord(c.key)
	switch {
	case alone:
		detail = fmt.Sprintf("%s, so that nobody knows whether the token is current: it is withheld ([tokens] lost_record); to end that: %s", standIn.Record.what(), standIn.Mend)
	case p.Withheld:
		detail += "; until then it is withheld, since permissions were revoked"
	}
	c.add(StaleToken, detail, "ask for the token with wait, or watch, and try the resource again when the token is another one")
	c.retryOn(on)
}

// judgeAudience compares the audience byte for byte, as resources do. One that is a GUID is the
// application's own ID, which cannot be compared with a URI.
func (c *inquiry) judgeAudience() {
	aud := c.held.Claims.Audience
	switch {
	case c.key.Resource != c.report.Resource:
		c.add(WrongAudience, fmt.Sprintf("the token was asked for as %s, an alternate of %s, since that one's own was not current", c.key.Resource, c.report.Resource),
			fmt.Sprintf("the resource does not accept this audience, it seems: take it off the alternates of %s in the configuration", c.report.Resource))
	case aud == "" || aud == c.key.Resource || grants.IsGUID(aud) || grants.IsGUID(c.key.Resource):
	case tokencache.Canonical(aud) == tokencache.Canonical(c.key.Resource):
		c.add(WrongAudience, fmt.Sprintf("the token's audience is %s, and it was asked for as %s: another spelling", aud, c.key.Resource),
			"name the resource exactly as it wants its audience: a slash at the end makes another one")
	default:
		c.add(WrongAudience, fmt.Sprintf("the token's audience is %s, and it was asked for as %s", aud, c.key.Resource),
			"name the resource exactly as it wants its audience")
	}
}

// judgeIdentity compares the token's owner with the IDs that are configured.
func (c *inquiry) judgeIdentity() {
	identity := c.advice.Identity
	for _, id := range []struct{ name, configured, carried string }{
		{"client", identity.ClientID, c.held.Claims.ClientID},
		{"object", identity.ObjectID, c.held.Claims.ObjectID},
	} {
		if id.configured != "" && id.carried != "" && !strings.EqualFold(id.configured, id.carried) {
			c.add(WrongIdentity, fmt.Sprintf("the token's %s ID is %s, and identity %q is configured with %s", id.name, id.carried, identity.Name, id.configured),
				"correct the configuration, or grant the permission to the identity that the token is of")
			return
		}
	}
}

// judgeClock is about clocks that disagree: this device's, the issuer's and the resource's.
func (c *inquiry) judgeClock() {
	known := c.agent.cache.ClockStatus().Trusted
	from := c.held.Claims.NotBefore
	switch {
	case from.After(c.now):
		c.add(WrongClock, fmt.Sprintf("the token is valid from %s, and this device's clock says %s", stamp(from), stamp(c.now)),
			"set this device's clock right (timedatectl)")
	case c.held.Left < clockSlack:
		c.add(WrongClock, fmt.Sprintf("the token expires in %v: a resource whose clock is ahead counts it as expired", c.held.Left.Round(time.Second)),
			"ask for a token with min_ttl=5m")
		c.retryOn(c.held.ExpiresOn)
	case !known:
		c.add(WrongClock, fmt.Sprintf("this device's clock says %s and is not known to be right, so the token may be expired by the resource's", stamp(c.now)),
			"have the clock synchronised (timedatectl), then ask for a token again")
	}
}

// judgeChallenge is about a resource that asks for a token with certain claims, such as one from after a
// revocation.
func (c *inquiry) judgeChallenge(ctx context.Context) {
	if !c.wanted.made {
		return
	}
	detail := "the resource sent a claims challenge, as it does when the identity was disabled or its sessions were revoked"
	if !c.wanted.after.IsZero() {
		detail = fmt.Sprintf("the resource sent a claims challenge: it wants a token issued after %s, as it does when sessions were revoked", stamp(c.wanted.after))
	}
	if len(c.wanted.others) > 0 {
		detail += "; it also asks for " + strings.Join(c.wanted.others, ", ") + ", which an administrator has to look into"
	}
	detail += "; the managed-identity endpoint takes no claims (azidentity sends none), so the back end cannot be told, and may give the same token: " + c.fetchFor(ctx)
	if c.advice.Retry {
		c.add(RevokedToken, detail, "ask for the token again and try the resource with it")
		return
	}
	on, earlier := c.agent.expected(c.key, c.held)
	when := "at the latest when this one expires, on " + stamp(c.held.ExpiresOn)
	if earlier {
		when = "probably on " + stamp(on) + ", " + when
	}
	c.add(RevokedToken, detail, "wait for a newer token, which comes "+when+": ask with issued_after and wait, or watch")
	c.retryOn(on)
}

// judgePermissions is for a token that the resource accepts and that may too little.
func (c *inquiry) judgePermissions() {
	held := c.held.Claims
	age := c.now.Sub(c.held.Issued.Latest)
	if carried := carriedIn(held); carried != "" && age > rbacDelay {
		on, _ := c.agent.expected(c.key, c.held)
		c.add(StaleClaims, fmt.Sprintf("the token was minted on %s and carries %s: what changed in these since is not in it", stamp(c.held.Issued.Latest), carried),
			fmt.Sprintf("if a membership or role was changed since, have an administrator note it (perceptctl policy-changed --all-resources --identity %s --effect changed), so that the next token is looked for; it comes by %s", c.advice.Identity.Name, stamp(on)))
	}
	again := c.now.Add(rbacDelay)
	c.add(RBACDelay, fmt.Sprintf("roles assigned directly to the identity are looked up by the resource, whatever the token, and take up to %d minutes to reach it", int(rbacDelay.Minutes())),
		fmt.Sprintf("if a role was assigned just now, try again until %s with the same token", stamp(again)))
	detail := fmt.Sprintf("the token is of identity %q (object ID %s, client ID %s), and no policy change is on record that it lacks",
		c.advice.Identity.Name, orUntold(held.ObjectID), orUntold(held.ClientID))
	if c.held.Permissions.State != tokencache.Current {
		detail = fmt.Sprintf("the token is of identity %q (object ID %s, client ID %s)", c.advice.Identity.Name, orUntold(held.ObjectID), orUntold(held.ClientID))
	}
	c.add(NoPermission, detail, fmt.Sprintf("see in Azure whether that identity has the permission on %s", c.report.Resource))
	c.retryOn(again)
}

// carriedIn lists the claims of a token that decide permissions and go out of date with it; empty for
// none.
func carriedIn(claims tokencache.Claims) string {
	var all []string
	for _, list := range []struct {
		name   string
		values []string
	}{{"groups", claims.Groups}, {"roles", claims.Roles}, {"wids", claims.WIDs}} {
		if slices.Contains(claims.Omitted, list.name) {
			all = append(all, list.name+" that are too long to be kept, or cannot be shown")
		}
		if n := len(list.values); n > 0 {
			text := list.name + " " + strings.Join(list.values[:min(n, listed)], ", ")
			if n > listed {
				text += fmt.Sprintf(" and %d more", n-listed)
			}
			all = append(all, text)
		}
	}
	return strings.Join(all, "; ")
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
func (a *Agent) expected(key tokencache.Key, held tokencache.TokenInfo) (at time.Time, earlier bool) {
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
		return fmt.Sprintf("a fetch was tried and failed: %v", c.agent.callerError(c.advice.Identity, c.key.Resource, err))
	}
	c.advice.Fetched = outcome
	if held, _, err := c.agent.cache.Peek(c.key); err == nil && held.SHA256 != "" {
		c.held, c.advice.Sight = held, held
	}
	if outcome == tokencache.Newer {
		c.advice.Retry = true
		return "a fetch just now brought a newer token"
	}
	return "a fetch just now brought the same token from the back end's cache"
}

// challenge is what a claims challenge asks for (OpenID Connect Core, 5.5, as Entra uses it).
type challenge struct {
	made   bool
	after  time.Time // a token issued after this; zero: not asked for
	others []string  // names of other claims that are asked for
}

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
			c.others = append(c.others, strconv.Quote(cut(name, 64)))
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
	if !(seconds > 0 && seconds < float64(latestChange.Unix())) {
		return time.Time{}
	}
	return time.Unix(int64(seconds), 0)
}
