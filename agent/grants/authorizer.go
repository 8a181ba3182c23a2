package grants

import (
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"

	"perceptd/tokencache"
)

// Authorizer answers who may have which token, from rules that are indexed for it. It never changes and is safe for
// concurrent use: other rules need another Authorizer.
type Authorizer struct {
	rules    Rules
	granted  map[Subject]resources
	keys     map[tokencache.Key]*Identity // every key that some grant allows
	prefetch []tokencache.Key

	resources []string // that grants name, or that are alternates, in order
}

// GrantedIdentity is an identity whose tokens a grant allows.
type GrantedIdentity struct {
	Identity *Identity
	Grant    int // index of the first grant that allows it
}

// in reports whether all allows the same identity.
func (g GrantedIdentity) in(all []GrantedIdentity) bool {
	return slices.ContainsFunc(all, func(other GrantedIdentity) bool { return other.Identity == g.Identity })
}

// resources is what the grants for one subject allow: the identities for each resource.
type resources map[string][]GrantedIdentity

// NewAuthorizer returns an Authorizer for rules without faults.
func NewAuthorizer(rules Rules) *Authorizer {
	a := &Authorizer{
		rules:     rules,
		granted:   make(map[Subject]resources),
		keys:      make(map[tokencache.Key]*Identity),
		resources: rules.resources(),
	}
	for i := range rules.Grants {
		a.add(i)
	}
	return a
}

// resources returns the resources that grants name or that are alternates, in order.
func (r Rules) resources() []string {
	var all []string
	for _, grant := range r.Grants {
		all = append(all, grant.Resources...)
	}
	for resource, alternates := range r.Alternates {
		all = append(append(all, resource), alternates...)
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// add indexes the grant with that index.
func (a *Authorizer) add(index int) {
	grant := &a.rules.Grants[index]
	identity := a.Named(grant.Identity)
	subject := grant.Caller.Subject()
	if a.granted[subject] == nil {
		a.granted[subject] = make(resources)
	}
	for _, resource := range grant.Resources {
		one := GrantedIdentity{Identity: identity, Grant: index}
		if !one.in(a.granted[subject][resource]) {
			a.granted[subject][resource] = append(a.granted[subject][resource], one)
		}
		key := tokencache.Key{Selector: identity.Selector(), Resource: resource}
		a.keys[key] = identity
		if grant.Prefetch && !slices.Contains(a.prefetch, key) {
			a.prefetch = append(a.prefetch, key)
		}
	}
}

// Named returns the identity with that name, or nil.
func (a *Authorizer) Named(name string) *Identity {
	for i := range a.rules.Identities {
		if a.rules.Identities[i].Name == name {
			return &a.rules.Identities[i]
		}
	}
	return nil
}

// NameOf returns the name of the identity with that selector, or the selector in words if there is none.
func (a *Authorizer) NameOf(selector tokencache.Selector) string {
	for _, identity := range a.rules.Identities {
		if identity.Selector() == selector {
			return identity.Name
		}
	}
	return selector.String()
}

// Keys returns every key that some grant allows, with its identity, in no order.
func (a *Authorizer) Keys() iter.Seq2[tokencache.Key, *Identity] { return maps.All(a.keys) }

// IdentityOf returns the identity of a key, or nil if no grant allows that key.
func (a *Authorizer) IdentityOf(key tokencache.Key) *Identity { return a.keys[key] }

// Allows reports whether some grant allows key.
func (a *Authorizer) Allows(key tokencache.Key) bool { return a.keys[key] != nil }

// Prefetch returns the keys to fetch before any caller asks. The caller must not modify it.
func (a *Authorizer) Prefetch() []tokencache.Key { return a.prefetch }

// HasGrants reports whether some grant is for s.
func (a *Authorizer) HasGrants(s Subject) bool { return a.granted[s] != nil }

// Resources returns the resources that grants name or that are alternates, in order. The caller must not modify it.
func (a *Authorizer) Resources() []string { return a.resources }

// Spelling returns resource as the rules spell it; empty if they do not have it in any spelling.
func (a *Authorizer) Spelling(resource string) string { return spelling(a.resources, resource) }

// spelling returns the one of all that is resource in this or another spelling, the same one first; empty for none.
func spelling(all []string, resource string) string {
	if slices.Contains(all, resource) {
		return resource
	}
	wanted := tokencache.Canonical(resource)
	if i := slices.IndexFunc(all, func(other string) bool { return tokencache.Canonical(other) == wanted }); i >= 0 {
		return all[i]
	}
	return ""
}

// Ref is a grant and where it stands.
type Ref struct {
	Index int // from 0, in the order of the configuration
	Grant
}

// String names the grant so that people find it.
func (r *Ref) String() string {
	if r.Place == "" {
		return fmt.Sprintf("grant %d", r.Index+1)
	}
	return fmt.Sprintf("grant %d (%s)", r.Index+1, r.Place)
}

// Ref returns the grant with that index.
func (a *Authorizer) Ref(index int) *Ref { return &Ref{Index: index, Grant: a.rules.Grants[index]} }

// Refs returns every grant, in the order of the configuration.
func (a *Authorizer) Refs() []Ref {
	all := make([]Ref, len(a.rules.Grants))
	for i := range all {
		all[i] = *a.Ref(i)
	}
	return all
}

// UselessAlternates names in words the alternates for which no caller can get a token, since no caller's grants name
// both URIs with the same identity.
func (r Rules) UselessAlternates() []string {
	a := NewAuthorizer(r)
	var all []string
	for _, resource := range slices.Sorted(maps.Keys(r.Alternates)) {
		for _, alternate := range r.Alternates[resource] {
			if !a.servesInPlaceOf(alternate, resource) {
				all = append(all, fmt.Sprintf(
					"%s will never stand in for %s: no caller's grants name both with the same identity",
					alternate, resource))
			}
		}
	}
	return all
}

// servesInPlaceOf reports whether some caller may have tokens of one identity for both resources.
func (a *Authorizer) servesInPlaceOf(alternate, resource string) bool {
	for _, granted := range a.granted {
		for _, one := range granted[resource] {
			if one.in(granted[alternate]) {
				return true
			}
		}
	}
	return false
}

// Changes describes how the identities and grants differ from those before. AlternateChanges has the alternates.
func (a *Authorizer) Changes(before *Authorizer) []string {
	var all []string
	for _, identity := range a.rules.Identities {
		old := before.Named(identity.Name)
		switch {
		case old == nil:
			all = append(all, fmt.Sprintf("identity %q added", identity.Name))
		case *old != identity:
			all = append(all, fmt.Sprintf("identity %q changed", identity.Name))
		}
	}
	for _, old := range before.rules.Identities {
		if a.Named(old.Name) == nil {
			all = append(all, fmt.Sprintf("identity %q removed", old.Name))
		}
	}
	was, is := before.rules.allowances(), a.rules.allowances()
	for _, line := range is {
		if !slices.Contains(was, line) {
			all = append(all, "granted: "+line)
		}
	}
	for _, line := range was {
		if !slices.Contains(is, line) {
			all = append(all, "no longer granted: "+line)
		}
	}
	return all
}

// allowances returns what the grants allow, one line for each caller, identity and resource.
func (r Rules) allowances() []string {
	var all []string
	for _, grant := range r.Grants {
		for _, resource := range grant.Resources {
			line := fmt.Sprintf("%v, identity %q, %s", grant.Caller, grant.Identity, resource)
			if grant.Prefetch {
				line += ", prefetched"
			}
			all = append(all, line)
		}
	}
	return all
}

// AlternateChanges describes how the alternates differ from those before.
func (a *Authorizer) AlternateChanges(before *Authorizer) []string {
	var all []string
	is, was := a.rules.Alternates, before.rules.Alternates
	for _, resource := range slices.Sorted(maps.Keys(is)) {
		if !slices.Equal(is[resource], was[resource]) {
			all = append(all, fmt.Sprintf("resource %s: alternates %s", resource, strings.Join(is[resource], ", ")))
		}
	}
	for _, resource := range slices.Sorted(maps.Keys(was)) {
		if is[resource] == nil {
			all = append(all, fmt.Sprintf("resource %s: no alternates any more", resource))
		}
	}
	return all
}
