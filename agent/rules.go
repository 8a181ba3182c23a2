package agent

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"perceptd/agent/api"
	"perceptd/agent/deny"
	"perceptd/agent/grants"
	"perceptd/tokencache"
)

// defaultSDKLife is the longest life that the SDK forms advertise, unless configured: an SDK comes back with 5 minutes
// left, so that a module has a new token at most half an hour after the daemon.
const defaultSDKLife = 35 * time.Minute

// minSDKLife keeps SDKs from asking on every call: some do so below 20 minutes.
const minSDKLife = 20 * time.Minute

// staleSDKLife is the longest life that the SDK forms advertise while permissions are not current. SDKs come back five
// minutes before its end.
const staleSDKLife = 25 * time.Minute

const (
	maxSDKLife = 24 * time.Hour
	maxSpread  = 24 * time.Hour
)

// Rules are the grants, and the settings of how tokens that they allow are handed out.
type Rules struct {
	grants.Rules

	// SDKLife is the longest life that the SDK forms advertise, so that a module's SDK comes back for newer tokens.
	// Zero means defaultSDKLife; between 20 minutes and 24 hours.
	SDKLife time.Duration

	// Spread is how long a policy change may take to reach newly issued tokens, up to 24 hours. Zero means ten minutes;
	// a nanosecond will do for none.
	Spread time.Duration

	// WithholdLost says what becomes of older tokens when the record of policy changes is lost or cannot be read now.
	// True: they are withheld until they are known to be current. False: they are served, as uncertain.
	WithholdLost bool

	// NoRules is why no configuration is in force, so that every request is refused. Empty: one is.
	NoRules string
}

// SpreadOrDefault returns how long a policy change may take to reach newly issued tokens.
func (r *Rules) SpreadOrDefault() time.Duration {
	return cmp.Or(r.Spread, tokencache.DefaultPropagationDelay)
}

// SDKLifeOrDefault returns the longest life that the SDK forms advertise.
func (r *Rules) SDKLifeOrDefault() time.Duration { return cmp.Or(r.SDKLife, defaultSDKLife) }

// Validate returns every fault in r, as *grants.RuleErrors joined, or nil. Kind is "sdk_life" or "spread" where a
// setting is at fault.
func (r Rules) Validate() error {
	faults := r.Faults()
	if r.SDKLife != 0 && (r.SDKLife < minSDKLife || r.SDKLife > maxSDKLife) {
		faults = append(faults, &grants.RuleError{
			Kind:   "sdk_life",
			Detail: fmt.Sprintf("sdk_life is %v: it must be between %v and 24h", r.SDKLife, minSDKLife),
		})
	}
	if r.Spread < 0 || r.Spread > maxSpread {
		faults = append(faults, &grants.RuleError{
			Kind:   "spread",
			Detail: fmt.Sprintf("spread is %v: it must be between 0s and %v", r.Spread, maxSpread),
		})
	}
	return errors.Join(faults...)
}

// Settle returns r with each fault that Validate finds put into the element that has it, as grants.Rules.Settle does. A
// setting with a fault has the value that hands out the least.
func (r Rules) Settle() Rules {
	r.Rules = r.Rules.Settle()
	if r.SDKLife != 0 && (r.SDKLife < minSDKLife || r.SDKLife > maxSDKLife) {
		r.SDKLife = minSDKLife
	}
	if r.Spread < 0 || r.Spread > maxSpread {
		r.Spread = maxSpread
	}
	return r
}

// ruleset is Rules in force. It never changes: a reload, or another deny rule, makes a new one.
type ruleset struct {
	Rules
	*grants.Authorizer
	denied *deny.List // what takes away what the grants allow
}

func (r Rules) compile() *ruleset {
	r = r.Settle()
	return &ruleset{Rules: r, Authorizer: grants.NewAuthorizer(r.Rules)}
}

// authorize returns the identity that a request is for, with the grant that allows it, or why caller may not have it.
func (s *ruleset) authorize(caller *grants.Caller, r grants.Request) (grants.GrantedIdentity, *Error) {
	if s.NoRules != "" {
		return grants.GrantedIdentity{}, noRulesError(s.NoRules)
	}
	if why := s.denied.Lost(); why != "" {
		return grants.GrantedIdentity{}, lostError(why)
	}
	granted, denial := s.Authorize(caller, r)
	if denial != nil {
		return granted, refusalOf(denial)
	}
	if rule := s.denied.Denies(caller, granted.Identity, r.Resource); rule != nil {
		return grants.GrantedIdentity{}, deniedError(rule, caller, granted.Identity, r.Resource)
	}
	return granted, nil
}

// noRulesRetryAfter is when to ask again while no configuration is in force: a person has to mend it.
const noRulesRetryAfter = 30 * time.Second

// noRulesError is what every request is answered while no configuration is in force.
func noRulesError(why string) *Error {
	return &Error{Code: api.CodeNoConfiguration, RetryAfter: noRulesRetryAfter, Detail: fmt.Sprintf(
		"no configuration is in force, so that no token is handed out: %s", why)}
}

// deniesAll reports whether no caller whatever gets the token of a key.
func (s *ruleset) deniesAll(key tokencache.Key) bool {
	identity := s.IdentityOf(key)
	return s.denied.Lost() != "" || identity != nil && s.denied.DeniesAll(identity, key.Resource) != nil
}

// refusalOf turns a denial by the grants into the answer to a caller.
func refusalOf(denial *grants.Denial) *Error {
	if denial == nil {
		return nil
	}
	return &Error{
		Code: codeOfDenial[denial.Err], Detail: denial.Detail, Choices: denial.Choices, Granted: denial.Granted,
		NearMiss: denial.NearMiss, Suggestion: denial.Suggestion, forAudit: denial.ForAdministrator,
	}
}

var codeOfDenial = map[error]api.Code{
	grants.ErrBadResource:       api.CodeBadRequest,
	grants.ErrUnknownIdentity:   api.CodeUnknownIdentity,
	grants.ErrAmbiguousIdentity: api.CodeAmbiguous,
	grants.ErrNotGranted:        api.CodeNotGranted,
	grants.ErrFaulty:            api.CodeFaultyGrant,
}

// unknownIdentity refuses a name that no identity has.
func (s *ruleset) unknownIdentity(name string) *Error {
	var names []string
	for _, identity := range s.Identities {
		if identity.Fault == "" {
			names = append(names, identity.Name)
		}
	}
	slices.Sort(names)
	return &Error{
		Code:    api.CodeUnknownIdentity,
		Detail:  fmt.Sprintf("no [[identity]] of the configuration is named %q", truncate(name, 64)),
		Choices: names,
	}
}

// nameOf returns the name of the identity that a policy change is about, or its selector in words if none is configured
// with that any more; empty for all.
func (s *ruleset) nameOf(p tokencache.PolicyChange) string {
	if p.AllIdentities {
		return ""
	}
	return s.NameOf(p.Selector)
}

// resourceList names the resources of the rules, as far as an error has room.
func (s *ruleset) resourceList() string {
	all := s.Resources()
	if len(all) == 0 {
		return "none"
	}
	names := strings.Join(all[:min(listed, len(all))], ", ")
	if more := len(all) - listed; more > 0 {
		names += fmt.Sprintf(" and %d more", more)
	}
	return names
}

// matching returns the keys to refresh: those that are cached or, if a resource is named, those that the grants allow
// for it.
func (s *ruleset) matching(cached []tokencache.Status, identity, resource string) []tokencache.Key {
	named := func(of *grants.Identity) bool { return of != nil && (identity == "" || of.Name == identity) }
	var keys []tokencache.Key
	if resource == "" {
		for _, status := range cached {
			if named(s.IdentityOf(status.Key)) {
				keys = append(keys, status.Key)
			}
		}
	} else {
		for key, of := range s.Keys() {
			if key.Resource == resource && named(of) {
				keys = append(keys, key)
			}
		}
	}
	slices.SortFunc(keys, func(x, y tokencache.Key) int {
		return strings.Compare(s.IdentityOf(x).Name+"\x00"+x.Resource, s.IdentityOf(y).Name+"\x00"+y.Resource)
	})
	return keys
}

// mayKnow reports whether what s does not name may be named once faults are mended.
func (s *ruleset) mayKnow() bool { return s.NoRules != "" || s.HasIdle() }

// keeps reports whether the token of a key is kept: it may be allowed, now or once faults are mended.
func (s *ruleset) keeps(key tokencache.Key) bool { return s.NoRules != "" || s.Keeps(key) }

// allowed returns m without the keys that no grant allows any more, not even one with a fault. Their tombstones stay: a
// token that comes again counts as received when it was first.
func (s *ruleset) allowed(m *tokencache.Snapshot) *tokencache.Snapshot {
	if m == nil {
		return nil
	}
	left := *m
	left.Keys, left.Tombstones = nil, slices.Clone(m.Tombstones)
	for _, r := range m.Keys {
		if s.keeps(r.Key) {
			left.Keys = append(left.Keys, r)
		} else if b, ok := r.Tombstone(); ok {
			left.Tombstones = append(left.Tombstones, b)
		}
	}
	return &left
}

// changes describes how s differs from the rules before it.
func (s *ruleset) changes(before *ruleset) []string {
	all := s.Changes(before.Authorizer)
	if is, was := s.SDKLifeOrDefault(), before.SDKLifeOrDefault(); is != was {
		all = append(all, fmt.Sprintf("sdk_life is %v, was %v", is, was))
	}
	switch is := s.WithholdLost; {
	case is && !before.WithholdLost:
		all = append(all,
			"tokens from before are withheld when the record of policy changes is lost, and no longer served")
	case !is && before.WithholdLost:
		all = append(all,
			"tokens from before are served when the record of policy changes is lost, and no longer withheld")
	}
	if is, was := s.SpreadOrDefault(), before.SpreadOrDefault(); is != was {
		all = append(all, fmt.Sprintf("spread is %v, was %v",
			is.Truncate(time.Microsecond), was.Truncate(time.Microsecond)))
	}
	return append(all, s.AlternateChanges(before.Authorizer)...)
}

// Decide returns what the grants in force say to a request, unless a deny rule takes the token away, and what the
// caller would be refused with. It fetches nothing and counts nothing.
func (a *Agent) Decide(caller grants.Caller, r grants.Request) (grants.Decision, *Error) {
	r.Resource = grants.TrimScope(r.Resource)
	rules := a.rulesNow()
	d := rules.Decide(&caller, r)
	if !d.Allowed && rules.NoRules == "" {
		return d, refusalOf(d.Denial)
	}
	_, refusal := rules.authorize(&caller, r)
	if refusal != nil {
		d.Allowed, d.Reason = false, refusal.Detail
	}
	return d, refusal
}

// GrantsFor returns the grants that decide about a caller, in the order of the configuration: all that it may have.
func (a *Agent) GrantsFor(caller grants.Caller) []grants.Ref {
	return a.rules.Load().GrantsFor(&caller)
}

// WhyNothing says in words why a caller gets nothing, whatever grants are for it: no configuration is in force, or its
// module is faulty. Nil: neither is so.
func (a *Agent) WhyNothing(caller grants.Caller) *Error {
	rules := a.rules.Load()
	if rules.NoRules != "" {
		return noRulesError(rules.NoRules)
	}
	if why := rules.WhyNothing(&caller); why != "" {
		return &Error{Code: api.CodeFaultyGrant, Detail: why}
	}
	return nil
}

// WhyNoRules says in words why no configuration is in force; empty: one is.
func (a *Agent) WhyNoRules() string { return a.rules.Load().NoRules }

// Grants returns every grant in force, idle ones included.
func (a *Agent) Grants() []grants.Ref { return a.rules.Load().Refs() }

// DeniedOfGrant returns the IDs of the deny rules that take the token for a resource away from callers that a grant is
// for, and whether it is taken from each of them, be it since the record of deny rules is lost.
func (a *Agent) DeniedOfGrant(g grants.Ref, resource string) (ids []string, all bool) {
	rules := a.rulesNow()
	i := slices.IndexFunc(rules.Rules.Identities, func(i grants.Identity) bool { return i.Name == g.Identity })
	if i < 0 {
		return nil, false // the rules have changed since
	}
	ids, all = rules.denied.OfGrant(g.Caller, &rules.Rules.Identities[i], resource)
	return ids, all || rules.denied.Lost() != ""
}
