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

	idle    []int // indexes of the idle grants
	unclear Kinds // of caller that some idle grant may be for

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

// identitiesOf returns the identities that are granted, in the order of their names.
func identitiesOf(granted []GrantedIdentity) []*Identity {
	var all []*Identity
	for _, one := range granted {
		all = append(all, one.Identity)
	}
	slices.SortFunc(all, func(x, y *Identity) int { return strings.Compare(x.Name, y.Name) })
	return all
}

func namesOf(identities []*Identity) []string {
	var names []string
	for _, one := range identities {
		names = append(names, one.Name)
	}
	return names
}

// resources is what the grants for one subject allow: the identities for each resource.
type resources map[string][]GrantedIdentity

// NewAuthorizer returns an Authorizer for rules without faults, or settled ones.
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

// add indexes the grant with that index.
func (a *Authorizer) add(index int) {
	grant := &a.rules.Grants[index]
	if grant.Fault != "" {
		a.idle = append(a.idle, index)
		a.unclear |= grant.Unclear
	}
	if grant.Fault != "" && grant.Unclear != 0 {
		return
	}
	subject := grant.Caller.Subject()
	if a.granted[subject] == nil {
		a.granted[subject] = make(resources)
	}
	if grant.Fault != "" {
		return
	}
	identity := a.Named(grant.Identity)
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

// deciding appends to found the subjects that the caller matches, of the most specific kind that has grants for it. by
// is that kind: zero if no grant is for the caller. Without subjects an idle grant decides, which may be of that kind.
func (a *Authorizer) deciding(c *Caller, found []Subject) (subjects []Subject, by kind) {
	if a.isOfIdleModule(c) {
		return found, 0
	}
	for s := range c.subjects {
		if s.kind != by {
			if len(found) > 0 || a.unclear.has(by) {
				return found, by // what follows is less specific
			}
			by = s.kind
		}
		if a.granted[s] != nil && !slices.Contains(found, s) {
			found = append(found, s)
		}
	}
	if len(found) == 0 && !a.unclear.has(by) {
		by = 0
	}
	return found, by
}

// isOfIdleModule reports whether c runs in a container whose module is faulty, as far as that is understood.
func (a *Authorizer) isOfIdleModule(c *Caller) bool {
	if c.Container == nil {
		return false
	}
	return a.rules.AnyContainerIdle && c.Module == "" || slices.Contains(a.rules.IdleContainers, c.Container.Name)
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
		if identity.Selector() == selector && identity.IsSelectorKnown() {
			return identity.Name
		}
	}
	return selector.String()
}

// Keys returns every key that some grant allows, with its identity, in no order.
func (a *Authorizer) Keys() iter.Seq2[tokencache.Key, *Identity] { return maps.All(a.keys) }

// IdentityOf returns the identity of a key, or nil if no grant allows that key.
func (a *Authorizer) IdentityOf(key tokencache.Key) *Identity { return a.keys[key] }

// Keeps reports whether a token of key is to be kept: some grant allows it, or an idle one may, once it is mended.
func (a *Authorizer) Keeps(key tokencache.Key) bool {
	return a.keys[key] != nil || slices.ContainsFunc(a.idle, func(index int) bool { return a.mayAllow(index, key) })
}

// mayAllow reports whether the idle grant with that index may allow key, once it is mended.
func (a *Authorizer) mayAllow(index int, key tokencache.Key) bool {
	grant := &a.rules.Grants[index]
	identity := a.Named(grant.Identity)
	isUnderstood := identity != nil && identity.Fault == ""
	return grant.mayName(key.Resource) && (!isUnderstood || identity.Selector() == key.Selector)
}

// mayName reports whether an idle grant may name resource.
func (g *Grant) mayName(resource string) bool {
	return g.AnyResource || slices.Contains(g.Resources, resource)
}

// Prefetch returns the keys to fetch before any caller asks. The caller must not modify it.
func (a *Authorizer) Prefetch() []tokencache.Key { return a.prefetch }

// MayNameAny reports whether it is not understood which resources the rules name.
func (a *Authorizer) MayNameAny() bool {
	isUnclear := func(index int) bool { return a.rules.Grants[index].AnyResource }
	return a.rules.AnyAlternate || slices.ContainsFunc(a.idle, isUnclear)
}

// HasIdle reports whether some element of the rules is idle, so that not all that they name is known.
func (a *Authorizer) HasIdle() bool {
	isIdle := func(i Identity) bool { return i.Fault != "" }
	return len(a.idle) > 0 || a.MayNameAny() || slices.ContainsFunc(a.rules.Identities, isIdle)
}

// HasGrants reports whether some grant is for s, an idle one included.
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

// GrantsFor returns the grants that decide about a caller, in the order of the configuration: all that it may have.
func (a *Authorizer) GrantsFor(caller *Caller) []Ref {
	var room [4]Subject
	deciding, by := a.deciding(caller, room[:0])
	var all []Ref
	for i := range a.rules.Grants {
		grant := &a.rules.Grants[i]
		decides := grant.Unclear.has(by)
		if grant.Unclear == 0 {
			decides = slices.Contains(deciding, grant.Caller.Subject())
		}
		if decides {
			all = append(all, *a.Ref(i))
		}
	}
	return all
}

// UselessAlternates names in words the alternates for which no caller can get a token, since no caller's grants name
// both URIs with the same identity.
func (r Rules) UselessAlternates() []string {
	a := NewAuthorizer(r.Settle())
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
		case !old.isSame(identity):
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

// isSame reports whether i and o are the same but for where they are written.
func (i Identity) isSame(o Identity) bool {
	i.Place, o.Place = "", ""
	return i == o
}

// allowances returns what the grants allow, one line for each caller, identity and resource.
func (r Rules) allowances() []string {
	var all []string
	for _, grant := range r.Grants {
		if grant.Fault != "" {
			continue // it gives nothing
		}
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
