package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"perceptd/agent/api"
	"perceptd/agent/grants"
	"perceptd/tokencache"
)

const (
	// rbacDelay is how long Azure says that a role assignment may take to reach a resource.
	rbacDelay = 10 * time.Minute

	// clockSlack is the life below which a resource whose clock is a little ahead refuses a token.
	clockSlack = 2 * time.Minute
)

// diagnosis is one report of a refused token that is looked into.
type diagnosis struct {
	agent    *Agent
	rules    *ruleset
	caller   grants.Caller
	identity *grants.Identity
	report   api.Rejection
	wanted   challenge
	now      time.Time // by the device's clock

	key  tokencache.Key
	held tokencache.TokenInfo // the token held now: the refused one, unless a finding says otherwise

	findings []api.Finding // the likeliest first; judge always makes one
	retry    bool          // a token that may be accepted can be had now
	retryOn  time.Time     // when asking again is worth while; zero: now, with retry; else it is not known
	fetched  tokencache.Outcome
}

// diagnose looks up the token held. A token of an alternate was handed out in place of the resource's own, so that may
// be the one that was refused.
func (a *Agent) diagnose(
	rules *ruleset, caller grants.Caller, identity *grants.Identity, r api.Rejection, wanted challenge,
) (*diagnosis, error) {
	d := &diagnosis{
		agent: a, rules: rules, caller: caller, identity: identity, report: r, wanted: wanted, now: a.clock.Wall(),
		key: tokencache.Key{Selector: identity.Selector(), Resource: r.Resource},
	}
	var err error
	if d.held, _, err = a.cache.Peek(d.key); err != nil {
		return nil, err
	}
	for _, alternate := range rules.AlternatesFor(&caller, identity, r.Resource) {
		key := tokencache.Key{Selector: identity.Selector(), Resource: alternate}
		if r.SHA256 == "" || r.SHA256 == d.held.SHA256 || !a.holds(key, r.SHA256) {
			continue
		}
		if held, _, err := a.cache.Peek(key); err == nil && held.SHA256 == r.SHA256 {
			d.key, d.held = key, held
		}
	}
	return d, nil
}

// advice is the answer to the report, which named the resource so.
func (d *diagnosis) advice(named string) api.Advice {
	advice := api.Advice{
		Identity: d.identity.Name, Resource: named, SHA256: d.held.SHA256, Findings: d.findings, Retry: d.retry,
		RetryOn: api.Time(d.retryOn), Fetched: d.fetched, Claims: claimsOf(d.held.Claims),
	}
	if d.held.SHA256 != "" {
		advice.Permissions = permissionsOf(d.held.Permissions)
	}
	return advice
}

func (d *diagnosis) judge(ctx context.Context) {
	switch {
	case d.held.SHA256 == "":
		d.add(api.CauseUnknownToken,
			"no valid token is held for it now, so nothing is known of the refused one; it may have expired",
			"ask for a token again")
		d.retry = true
	case d.report.SHA256 != "" && d.report.SHA256 != d.held.SHA256:
		d.judgeOther()
	default:
		d.agent.reports.note(d.key, d.held.SHA256, d.now)
		d.judgeHeld(ctx)
	}
}

// judgeOther is for a token that is not the one held: an older one, or one held for something else.
func (d *diagnosis) judgeOther() {
	for key, identity := range d.rules.Keys() {
		if !d.rules.MayHave(&d.caller, identity, key.Resource) || !d.agent.holds(key, d.report.SHA256) {
			continue
		}
		if key.Resource != d.report.Resource {
			d.add(api.CauseWrongAudience, fmt.Sprintf("the refused token is the one for %s", key.Resource),
				fmt.Sprintf("ask for a token for %s and send that one", d.report.Resource))
		}
		if identity != d.identity {
			d.add(api.CauseWrongIdentity,
				fmt.Sprintf("the refused token is that of identity %q", identity.Name),
				fmt.Sprintf("send the token of identity %q, or have %q granted the permission",
					d.identity.Name, identity.Name))
		}
		d.retry = true
		return
	}
	d.add(api.CauseOldToken, fmt.Sprintf("the token held now is another one, received on %s",
		formatTime(d.held.ReceivedOn)),
		"ask for a token again and send that one; if an SDK or a program keeps tokens of its own, have it drop them")
	d.retry = !d.held.Permissions.Withheld
	if !d.retry {
		d.judgePolicyChanges()
	}
}

// judgeHeld is for the token held. A 401 is mostly about who sends the token, a 403 about what it may.
func (d *diagnosis) judgeHeld(ctx context.Context) {
	if d.report.Status == 401 {
		d.judgeChallenge(ctx)
		d.judgeAudience()
		d.judgeIdentity()
		d.judgeClock()
		d.judgePolicyChanges()
		if len(d.findings) == 0 {
			d.add(api.CauseWrongAudience, fmt.Sprintf("nothing is wrong with the token as far as can be told here: "+
				"its audience is %s, and it is good for another %v",
				cmp.Or(d.held.Claims.Audience, notStated), d.held.Left.Round(time.Second)),
				"compare the audience with the one that the resource wants, which its WWW-Authenticate header or its "+
					"documentation names, and pass on its claims challenge if there is one")
		}
		return
	}
	d.judgePolicyChanges()
	d.judgeChallenge(ctx)
	d.judgeAudience()
	d.judgeIdentity()
	d.judgeClock()
	d.judgePermissions()
}

// judgePolicyChanges is about policy changes on record that the token may lack.
func (d *diagnosis) judgePolicyChanges() {
	p := d.held.Permissions
	if p.State == tokencache.Current {
		return
	}
	how := "was minted before"
	if p.State == tokencache.Uncertain {
		how = "may have been minted before"
	}
	by, on := "by "+formatTime(p.CurrentBy)+" at the latest", p.CurrentBy
	if !p.Likely.IsZero() {
		by, on = by+", probably by "+formatTime(p.Likely), p.Likely
	}
	detail := fmt.Sprintf("the token %s the policy change of %s had reached new tokens, and the back end goes on "+
		"handing it out; a current one is here %s", how, formatTime(p.Changed), by)
	placeholder, alone := d.agent.placeholderAlone(d.key)
	switch {
	case alone:
		detail = fmt.Sprintf("%s, so that nobody knows whether the token is current: it is withheld ([tokens] "+
			"lost_record); to end that: %s", recordText(placeholder.Record), placeholder.Mend)
	case p.Withheld:
		detail += "; until then it is withheld, since permissions were revoked"
	}
	d.add(api.CauseStale, detail,
		"ask for the token with wait, or watch, and try the resource again when the token is another one")
	d.retryAt(on)
}

// judgeAudience compares the audience byte for byte, as resources do. One that is a GUID is the
// application's own ID, which cannot be compared with a URI.
func (d *diagnosis) judgeAudience() {
	aud := d.held.Claims.Audience
	switch {
	case d.key.Resource != d.report.Resource:
		d.add(api.CauseWrongAudience,
			fmt.Sprintf("the token was asked for as %s, an alternate of %s, "+
				"since that one's own was not current", d.key.Resource, d.report.Resource),
			fmt.Sprintf("the resource does not accept this audience, it seems: "+
				"take it off the alternates of %s in the configuration", d.report.Resource))
	case aud == "" || aud == d.key.Resource || grants.IsGUID(aud) || grants.IsGUID(d.key.Resource):
	case tokencache.Canonical(aud) == tokencache.Canonical(d.key.Resource):
		d.add(api.CauseWrongAudience,
			fmt.Sprintf("the token's audience is %s, and it was asked for as %s: another spelling",
				aud, d.key.Resource),
			"name the resource exactly as it wants its audience: a slash at the end makes another one")
	default:
		d.add(api.CauseWrongAudience,
			fmt.Sprintf("the token's audience is %s, and it was asked for as %s", aud, d.key.Resource),
			"name the resource exactly as it wants its audience")
	}
}

// judgeIdentity compares the token's owner with the IDs that are configured.
func (d *diagnosis) judgeIdentity() {
	identity := d.identity
	for _, id := range []struct{ name, configured, carried string }{
		{"client", identity.ClientID, d.held.Claims.ClientID},
		{"object", identity.ObjectID, d.held.Claims.ObjectID},
	} {
		if id.configured != "" && id.carried != "" && !strings.EqualFold(id.configured, id.carried) {
			d.add(api.CauseWrongIdentity, fmt.Sprintf("the token's %s ID is %s, and identity %q is configured with %s",
				id.name, id.carried, identity.Name, id.configured),
				"correct the configuration, or grant the permission to the identity that the token is of")
			return
		}
	}
}

// judgeClock is about clocks that disagree: this device's, the issuer's and the resource's.
func (d *diagnosis) judgeClock() {
	known := d.agent.cache.ClockStatus().Trusted
	from := d.held.Claims.NotBefore
	switch {
	case from.After(d.now):
		d.add(api.CauseClock, fmt.Sprintf("the token is valid from %s, and this device's clock says %s",
			formatTime(from), formatTime(d.now)),
			"set this device's clock right (timedatectl)")
	case d.held.Left < clockSlack:
		d.add(api.CauseClock,
			fmt.Sprintf("the token expires in %v: a resource whose clock is ahead counts it as expired",
				d.held.Left.Round(time.Second)),
			"ask for a token with min_ttl=5m")
		d.retryAt(d.held.ExpiresOn)
	case !known:
		d.add(api.CauseClock, fmt.Sprintf("this device's clock says %s and is not known to be right, so the token "+
			"may be expired by the resource's", formatTime(d.now)),
			"have the clock synchronised (timedatectl), then ask for a token again")
	}
}

// judgeChallenge is about a resource that asks for a token with certain claims, such as one from after a
// revocation.
func (d *diagnosis) judgeChallenge(ctx context.Context) {
	if !d.wanted.made {
		return
	}
	detail := "the resource sent a claims challenge, as it does when the identity was disabled " +
		"or its sessions were revoked"
	if !d.wanted.after.IsZero() {
		detail = fmt.Sprintf("the resource sent a claims challenge: it wants a token issued after %s, "+
			"as it does when sessions were revoked", formatTime(d.wanted.after))
	}
	if len(d.wanted.others) > 0 {
		detail += "; it also asks for " + strings.Join(d.wanted.others, ", ") +
			", which an administrator has to look into"
	}
	detail += "; the managed-identity endpoint takes no claims (azidentity sends none), so the back end cannot be " +
		"told, and may give the same token: " + d.fetchFor(ctx)
	if d.retry {
		d.add(api.CauseRevoked, detail, "ask for the token again and try the resource with it")
		return
	}
	on, earlier := d.agent.expected(d.key, d.held)
	when := "at the latest when this one expires, on " + formatTime(d.held.ExpiresOn)
	if earlier {
		when = "probably on " + formatTime(on) + ", " + when
	}
	d.add(api.CauseRevoked, detail,
		"wait for a newer token, which comes "+when+": ask with issued_after and wait, or watch")
	d.retryAt(on)
}

// judgePermissions is for a token that the resource accepts and that may too little.
func (d *diagnosis) judgePermissions() {
	held := d.held.Claims
	age := d.now.Sub(d.held.Issued.Latest)
	if carried := carriedIn(held); carried != "" && age > rbacDelay {
		on, _ := d.agent.expected(d.key, d.held)
		d.add(api.CauseStaleClaims,
			fmt.Sprintf("the token was minted on %s and carries %s: "+
				"what changed in these since is not in it", formatTime(d.held.Issued.Latest), carried),
			fmt.Sprintf("if a membership or role was changed since, have an administrator note it (perceptctl "+
				"policy-changed --all-resources --identity %s --effect changed), so that the next token is looked "+
				"for; it comes by %s", d.identity.Name, formatTime(on)))
	}
	again := d.now.Add(rbacDelay)
	d.add(api.CauseRBACDelay, fmt.Sprintf("roles assigned directly to the identity are looked up by the resource, "+
		"whatever the token, and take up to %d minutes to reach it", int(rbacDelay.Minutes())),
		fmt.Sprintf("if a role was assigned just now, try again until %s with the same token", formatTime(again)))
	detail := fmt.Sprintf("the token is of identity %q (object ID %s, client ID %s), and no policy change is on "+
		"record that it lacks",
		d.identity.Name, cmp.Or(held.ObjectID, notStated), cmp.Or(held.ClientID, notStated))
	if d.held.Permissions.State != tokencache.Current {
		detail = fmt.Sprintf("the token is of identity %q (object ID %s, client ID %s)", d.identity.Name,
			cmp.Or(held.ObjectID, notStated), cmp.Or(held.ClientID, notStated))
	}
	d.add(api.CauseNoPermission, detail,
		fmt.Sprintf("see in Azure whether that identity has the permission on %s", d.report.Resource))
	d.retryAt(again)
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

func (d *diagnosis) add(cause api.Cause, detail, action string) {
	d.findings = append(d.findings, api.Finding{Cause: cause, Detail: detail, Action: action})
}

// retryAt notes a moment at which asking again is worth while, if it is the first.
func (d *diagnosis) retryAt(at time.Time) {
	if d.retryOn.IsZero() && !d.retry {
		d.retryOn = at
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
func (d *diagnosis) fetchFor(ctx context.Context) string {
	if !d.agent.reports.mayFetch(d.key, d.agent.clock.Boot()) {
		return fmt.Sprintf("a fetch for such a challenge was made less than %v ago", challengeEvery)
	}
	outcome, err := d.agent.cache.Refresh(ctx, d.key, false)
	var spreading *tokencache.PostponedError
	switch {
	case errors.As(err, &spreading):
		return err.Error()
	case err != nil:
		d.fetched = tokencache.Failed
		return fmt.Sprintf("a fetch was tried and failed: %v", d.agent.callerError(d.identity, d.key.Resource, err))
	}
	d.fetched = outcome
	if held, _, err := d.agent.cache.Peek(d.key); err == nil && held.SHA256 != "" {
		d.held = held
	}
	if outcome == tokencache.Newer {
		d.retry = true
		return "a fetch just now brought a newer token"
	}
	return "a fetch just now brought the same token from the back end's cache"
}

const (
	// Reports of refused tokens that a caller may make: so many at once, and one more each time that
	// reportEvery is over.
	reportBurst = 5
	reportEvery = 10 * time.Second

	// challengeEvery is how often, at most, claims challenges cause a fetch of one key.
	challengeEvery = 30 * time.Second
)

// reports is what is remembered of callers' reports of refused tokens: what limits them, and what a
// technician wants to see. It holds no more callers and keys than the grants name.
type reports struct {
	mu      sync.Mutex // protects what follows
	callers map[grants.Subject]*rate.Limiter
	refused map[tokencache.Key]refusedToken
	fetched map[tokencache.Key]time.Duration // boot time of the last fetch for a challenge
}

// refusedToken is a token that a resource refused.
type refusedToken struct {
	digest string
	on     time.Time
}

// admit returns how long a caller has to wait before it may report, 0 for not at all.
func (r *reports) admit(caller grants.Subject) time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.callers == nil {
		r.callers = make(map[grants.Subject]*rate.Limiter)
	}
	limit := r.callers[caller]
	if limit == nil {
		limit = rate.NewLimiter(rate.Every(reportEvery), reportBurst)
		r.callers[caller] = limit
	}
	reservation := limit.Reserve()
	wait := reservation.Delay()
	if wait > 0 {
		reservation.Cancel()
	}
	return wait
}

// note remembers that a resource refused the token of that digest.
func (r *reports) note(key tokencache.Key, digest string, on time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.refused == nil {
		r.refused = make(map[tokencache.Key]refusedToken)
	}
	r.refused[key] = refusedToken{digest, on}
}

// refusedOn returns when a resource last refused the token of that digest; zero for never.
func (r *reports) refusedOn(key tokencache.Key, digest string) time.Time {
	r.mu.Lock()
	defer r.mu.Unlock()
	if last := r.refused[key]; digest != "" && last.digest == digest {
		return last.on
	}
	return time.Time{}
}

// mayFetch reports whether a challenge may cause a fetch of key now, and counts it.
func (r *reports) mayFetch(key tokencache.Key, now time.Duration) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.fetched == nil {
		r.fetched = make(map[tokencache.Key]time.Duration)
	}
	if last, ok := r.fetched[key]; ok && now-last < challengeEvery {
		return false
	}
	r.fetched[key] = now
	return true
}

// retain forgets the callers and keys that no grant names any more.
func (r *reports) retain(rules *ruleset) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for caller := range r.callers {
		if !rules.HasGrants(caller) {
			delete(r.callers, caller)
		}
	}
	for key := range r.refused {
		if !rules.keeps(key) {
			delete(r.refused, key)
		}
	}
	for key := range r.fetched {
		if !rules.keeps(key) {
			delete(r.fetched, key)
		}
	}
}
