package grants

import (
	"fmt"
	"slices"
)

// What idle elements do to a request: they give nothing, and the denial says which element it is, where it is written
// and what its fault is.

// mendIt is what becomes of an idle element.
const mendIt = "an administrator mends it, and then: perceptctl reload"

// mayBeFor reports whether a grant for one of these kinds may be for c.
func (k Kinds) mayBeFor(c *Caller) bool {
	for s := range c.subjects {
		if k.has(s.kind) {
			return true
		}
	}
	return false
}

// For says in words whom a grant is for.
func (g *Grant) For() string {
	if g.Unclear != 0 {
		return "not understood (by " + g.Unclear.String() + ")"
	}
	return g.Caller.String()
}

// mayGive returns an idle grant that decides about caller and may give it, once it is mended, tokens of identity for
// resource; nil: none does. Identity nil is any.
func (a *Authorizer) mayGive(caller *Caller, resource string, identity *Identity) *Ref {
	return a.findIdle(caller, func(grant *Grant, alone bool) bool {
		named := a.Named(grant.Identity)
		isAnother := identity != nil && named != nil && named != identity && named.Fault == ""
		return alone || grant.mayName(resource) && !isAnother
	})
}

// mayGiveAnother returns an idle grant that decides about caller and may give it, once it is mended, tokens for
// resource of another identity than this one; nil: none does. Then it is not known whose token is meant where none is
// named.
func (a *Authorizer) mayGiveAnother(caller *Caller, resource string, identity *Identity) *Ref {
	return a.findIdle(caller, func(grant *Grant, _ bool) bool {
		return grant.mayName(resource) && a.Named(grant.Identity) != identity
	})
}

// findIdle returns the first idle grant for which is returns true, of those that decide about caller. alone is true if
// no grant decides of which it is known that it is for the caller.
func (a *Authorizer) findIdle(caller *Caller, is func(grant *Grant, alone bool) bool) *Ref {
	if len(a.idle) == 0 {
		return nil
	}
	var room [4]Subject
	deciding, by := a.deciding(caller, room[:0])
	for _, index := range a.idle {
		grant := &a.rules.Grants[index]
		decides := grant.Unclear.has(by)
		if grant.Unclear == 0 {
			decides = slices.Contains(deciding, grant.Caller.Subject())
		}
		if decides && is(grant, len(deciding) == 0) {
			return a.Ref(index)
		}
	}
	return nil
}

// idleGrant denies what an idle grant decides about.
func idleGrant(grant *Ref, caller *Caller) *Denial {
	decides := "decides about"
	if grant.Unclear != 0 {
		decides = "may be for"
	}
	says := func(grant, fault string) string {
		return fmt.Sprintf("%s %s %v, is faulty and gives nothing%s; %s", grant, decides, *caller, fault, mendIt)
	}
	return &Denial{Err: ErrFaulty, Detail: says(grant.base(), grant.faultForCaller()),
		ForAdministrator: says(grant.String(), ": "+grant.Fault)}
}

// faultForCaller is the fault in a part of a sentence; or "" if it is not known that the grant is for the caller, since
// the fault may say whom it is for.
func (g *Grant) faultForCaller() string {
	if g.Unclear != 0 {
		return ""
	}
	return ": " + g.Fault
}

// unclearIdentity denies a request that names no identity, since an idle grant may be for another one than granted.
func unclearIdentity(grant *Ref, caller *Caller, granted []GrantedIdentity) *Denial {
	denial := idleGrant(grant, caller)
	denial.Granted = identitiesOf(granted)
	denial.Choices = namesOf(denial.Granted)
	more := fmt.Sprintf("; it may be for another identity than %q: a request that names that is answered",
		granted[0].Identity.Name)
	denial.Detail += more
	denial.ForAdministrator += more
	return denial
}

// orIdle adds to what is said of an unknown identity that an idle one may be meant, whose name and IDs may not be
// understood.
func (a *Authorizer) orIdle() string {
	for i := range a.rules.Identities {
		if identity := &a.rules.Identities[i]; identity.Fault != "" {
			return fmt.Sprintf("; it may be %v, which is faulty: %s; %s", identity.base(), identity.Fault, mendIt)
		}
	}
	return ""
}

// idleIdentity denies a request for an idle identity.
func idleIdentity(identity *Identity) *Denial {
	return &Denial{Err: ErrFaulty, Detail: identity.base().WhyIdle(), ForAdministrator: identity.WhyIdle()}
}

// base is the identity without the folder of its place, which is not for callers.
func (i Identity) base() Identity {
	i.Place = WithoutFolder(i.Place)
	return i
}

// WhyIdle says in words to a caller why a grant is idle, and what mends it.
func (r *Ref) WhyIdle() string {
	return fmt.Sprintf("%s is faulty and gives nothing%s; %s", r.base(), r.faultForCaller(), mendIt)
}

// WhyIdle says in words to administrators why an identity is idle, and what mends it.
func (i Identity) WhyIdle() string {
	return fmt.Sprintf("%v is faulty and gives nothing: %s; %s", i, i.Fault, mendIt)
}

// WhyNothing says in words why a caller gets nothing, whatever grants are for it; empty: it is not so.
func (a *Authorizer) WhyNothing(caller *Caller) string {
	if !a.isOfIdleModule(caller) {
		return ""
	}
	return idleModule(caller).Detail
}

// idleModule denies what a container asks for whose module is faulty.
func idleModule(caller *Caller) *Denial {
	return &Denial{Err: ErrFaulty, Detail: fmt.Sprintf(
		"%v gets nothing: its [[module]] is faulty, or one that may be its (perceptctl status names it); %s",
		*caller, mendIt)}
}
