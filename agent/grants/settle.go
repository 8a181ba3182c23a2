package grants

import (
	"fmt"
	"maps"
	"slices"

	"perceptd/tokencache"
)

// Settle returns r with each fault that Faults finds put into the elements that have it, so that the rest can be in
// force and nobody gets what r would not give without its faults:
//
//   - Identities and grants with a fault are idle, and so is each grant of an idle identity. Of two identities with one
//     name or ID both are, since it is not known which one is meant.
//   - There is no default while an idle identity may be the default, or two are.
//   - Alternates with a fault are idle.
//   - Of more tokens to prefetch than can be, the last grants' are not prefetched.
func (r Rules) Settle() Rules {
	r.Identities, r.Grants = slices.Clone(r.Identities), slices.Clone(r.Grants)
	for _, fault := range r.faults() {
		if fault.IsMild {
			continue
		}
		for _, i := range append(fault.With, fault.Index) {
			switch {
			case fault.Kind == "identity" && i < len(r.Identities):
				blame(&r.Identities[i].Fault, fault.Detail)
			case fault.Kind == "grant":
				r.Grants[i].blame(fault.Detail)
			}
		}
	}
	r.settleDefault()
	r.settleGrants()
	r.settleAlternates()
	r.settlePrefetch()
	return r
}

// blame adds a fault to those of an element.
func blame(fault *string, detail string) {
	if *fault != "" {
		detail = *fault + "; " + detail
	}
	*fault = detail
}

// blame makes g idle. Faults says no more of which resources it names than that they are faulty.
func (g *Grant) blame(detail string) {
	blame(&g.Fault, detail)
	g.AnyResource = g.AnyResource || len(g.Resources) == 0 || slices.ContainsFunc(g.Resources, isFaultyResource)
}

// settleDefault leaves no sound identity the default unless it is certain that it is.
func (r Rules) settleDefault() {
	mayBe := 0
	for _, identity := range r.Identities {
		if identity.Default {
			mayBe++
		}
	}
	for i := range r.Identities {
		if identity := &r.Identities[i]; mayBe > 1 && identity.Fault == "" {
			identity.Default = false
		}
	}
}

// settleGrants makes the grants of idle identities idle, and finds out whom and what idle grants may be for.
func (r Rules) settleGrants() {
	for i := range r.Grants {
		grant := &r.Grants[i]
		for _, identity := range r.Identities {
			if grant.Fault == "" && identity.Name == grant.Identity && identity.Fault != "" {
				grant.blame(fmt.Sprintf("%s is faulty: %s", identity, identity.Fault))
			}
		}
		if grant.Fault != "" && slices.ContainsFunc(grant.Resources, isFaultyResource) {
			grant.AnyResource = true
		}
		if grant.Fault != "" && grant.Unclear == 0 && grant.Caller.Check() != nil {
			grant.Unclear = grant.Caller.kinds()
		}
	}
}

// settleAlternates makes faulty alternates idle.
func (r *Rules) settleAlternates() {
	sound, idle := make(map[string][]string), maps.Clone(r.IdleAlternates)
	for resource, alternates := range r.Alternates {
		if CheckAlternates(resource, alternates) == nil {
			sound[resource] = alternates
			continue
		}
		if idle == nil {
			idle = make(map[string][]string)
		}
		idle[resource] = slices.Concat(idle[resource], alternates)
		all := append([]string{resource}, alternates...)
		r.AnyAlternate = r.AnyAlternate || slices.ContainsFunc(all, isFaultyResource)
	}
	if len(sound) < len(r.Alternates) {
		r.Alternates, r.IdleAlternates = sound, idle
	}
}

// settlePrefetch takes prefetching off the grants for whose tokens there is no room.
func (r Rules) settlePrefetch() {
	if r.prefetched() <= tokencache.MaxKeys {
		return
	}
	for i := len(r.Grants) - 1; i >= 0 && r.prefetched() > tokencache.MaxKeys; i-- {
		if r.Grants[i].Fault == "" {
			r.Grants[i].Prefetch = false
		}
	}
}

// OtherNames returns, for each resource, the others that what is denied or revoked by its name is denied or revoked by
// as well: its alternates, idle ones included. With AnyAlternate there may be more.
func (r Rules) OtherNames() map[string][]string {
	if len(r.IdleAlternates) == 0 {
		return r.Alternates
	}
	all := maps.Clone(r.IdleAlternates)
	for resource, alternates := range r.Alternates {
		all[resource] = slices.Concat(all[resource], alternates)
	}
	return all
}
