package grants

import (
	"cmp"
	"fmt"
	"slices"
)

// Suggestion is what an administrator can write so that a caller gets what it was denied, if it should have it. It
// gives that caller what was asked for, beside what it has, and to others as little as a grant can.
type Suggestion struct {
	// AddTo is the grant that the resource can be added to; nil: none decides about the caller and is for the identity.
	AddTo *Ref

	// Grants do the same beside the grants that are there. The first has the resource that was asked for, in Azure's
	// own spelling. An Identity may be empty: which one is meant cannot be told.
	Grants []Grant

	// Repeats says that Grants have more than was asked for: what grants of a broader kind allow the caller now, which
	// no longer count for it beside a grant of its own kind.
	Repeats bool

	// Why says why there is nothing to suggest; empty: there is.
	Why string
}

// suggest returns what would allow a request that no grant allows; nil: something else helps better.
func (a *Authorizer) suggest(caller *Caller, r Request, near *NearMiss) *Suggestion {
	if near != nil && near.Usual == near.Spelling || checkPlainResource(r.Resource) != nil {
		return nil // it is to be asked for otherwise
	}
	match, why := caller.ownMatch()
	if why != "" {
		return &Suggestion{Why: why}
	}
	deciding := a.GrantsFor(caller)
	if i := slices.IndexFunc(deciding, func(g Ref) bool { return g.Fault != "" }); i >= 0 {
		return &Suggestion{Why: fmt.Sprintf("%v decides about it and is faulty: %s", deciding[i].base(), mendIt)}
	}
	if match.Unit != "" && len(deciding) > 0 && deciding[0].Caller.Subject().kind > byImage {
		// What grants for its user and groups give a service's process may differ from what others in it have: a grant
		// for the service would give them that, and take theirs.
		match = Match{UID: &caller.UID}
	}
	identity := a.meant(r, deciding)
	if near != nil && near.Decides && !r.NamesIdentity() {
		identity = near.Identity
	}
	added := Grant{Caller: match, Identity: identity,
		Resources: []string{cmp.Or(UnusualSpelling(r.Resource), r.Resource)}}
	if len(deciding) == 0 {
		return &Suggestion{Grants: []Grant{added}}
	}
	if deciding[0].Caller.Subject().kind == match.Subject().kind {
		to := deciding[0]
		for _, one := range slices.Backward(deciding) {
			if one.Identity == identity {
				to = one
			}
		}
		added.Caller = to.Caller
		s := &Suggestion{Grants: []Grant{added}}
		if to.Identity == identity {
			s.AddTo = &to
		}
		return s
	}
	all := []Grant{added}
	for _, broader := range deciding {
		all = addedTo(all, Grant{Caller: match, Identity: broader.Identity, Resources: broader.Resources})
	}
	return &Suggestion{Grants: all, Repeats: true}
}

// addedTo adds a grant to others for the same caller, to the one for its identity where there is one.
func addedTo(all []Grant, more Grant) []Grant {
	for i := range all {
		if all[i].Identity != more.Identity {
			continue
		}
		for _, resource := range more.Resources {
			if !slices.Contains(all[i].Resources, resource) {
				all[i].Resources = append(all[i].Resources, resource)
			}
		}
		return all
	}
	more.Resources = slices.Clone(more.Resources)
	return append(all, more)
}

// meant returns the name of the identity that a request is for: the one it names, or that of every grant that decides,
// or the default, or the only one; empty: it cannot be told.
func (a *Authorizer) meant(r Request, deciding []Ref) string {
	if r.NamesIdentity() {
		for i := range a.rules.Identities {
			if r.Names(&a.rules.Identities[i]) {
				return a.rules.Identities[i].Name
			}
		}
		return ""
	}
	others := func(g Ref) bool { return g.Identity != deciding[0].Identity }
	if len(deciding) > 0 && !slices.ContainsFunc(deciding, others) {
		return deciding[0].Identity
	}
	for _, identity := range a.rules.Identities {
		if identity.Default && identity.Fault == "" {
			return identity.Name
		}
	}
	if len(a.rules.Identities) == 1 && a.rules.Identities[0].Fault == "" {
		return a.rules.Identities[0].Name
	}
	return ""
}

// ownMatch returns the most specific match of a grant for the caller, or why none can be for it.
func (c *Caller) ownMatch() (m Match, why string) {
	switch {
	case c.Module != "":
		return Match{Module: c.Module}, ""
	case c.Container != nil:
		for _, image := range append(slices.Clone(c.Container.RepoDigests), c.Container.Digest) {
			if image != "" && checkImage(image) == nil {
				return Match{Image: image}, ""
			}
		}
		return Match{}, "no grant can be for a container whose image the engine does not say: give it a module's socket"
	case c.Unit != "" && checkUnit(c.Unit) == nil:
		return Match{Unit: c.Unit}, ""
	case c.Nested:
		return Match{}, "no grant can be for a process in a pid namespace of its own that is of no service: " +
			"run it as a service, or give it a module's socket"
	case c.UID != NoID:
		return Match{UID: &c.UID}, ""
	case c.GID != NoID:
		return Match{GID: &c.GID}, ""
	}
	return Match{}, "no grant can be for a caller of which nothing is known"
}
