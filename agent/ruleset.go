package agent

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"perceptd/tokencache"
)

// ruleset is Rules made ready for looking up. It never changes: a reload makes a new one.
type ruleset struct {
	rules    Rules
	sdkLife  time.Duration
	granted  map[who]map[string][]*Identity // caller → resource → identities
	keys     map[tokencache.Key]*Identity   // every key that some grant allows
	prefetch []tokencache.Key
}

func (r Rules) compile() (*ruleset, error) {
	if err := r.Validate(); err != nil {
		return nil, err
	}
	s := &ruleset{
		rules:   r,
		sdkLife: r.SDKLife,
		granted: make(map[who]map[string][]*Identity),
		keys:    make(map[tokencache.Key]*Identity),
	}
	if s.sdkLife == 0 {
		s.sdkLife = DefaultSDKLife
	}
	for _, grant := range r.Grants {
		s.add(grant)
	}
	return s, nil
}

func (s *ruleset) add(grant Grant) {
	identity := s.named(grant.Identity)
	caller := grant.Caller.who()
	if s.granted[caller] == nil {
		s.granted[caller] = make(map[string][]*Identity)
	}
	for _, resource := range grant.Resources {
		if !slices.Contains(s.granted[caller][resource], identity) {
			s.granted[caller][resource] = append(s.granted[caller][resource], identity)
		}
		key := tokencache.Key{Selector: identity.Selector(), Resource: resource}
		s.keys[key] = identity
		if grant.Prefetch && !slices.Contains(s.prefetch, key) {
			s.prefetch = append(s.prefetch, key)
		}
	}
}

// named returns the identity configured under name, or nil.
func (s *ruleset) named(name string) *Identity {
	for i := range s.rules.Identities {
		if s.rules.Identities[i].Name == name {
			return &s.rules.Identities[i]
		}
	}
	return nil
}

// choose returns the identity that a request is for, provided that the caller has it granted.
func (s *ruleset) choose(caller Caller, r Request) (*Identity, *Error) {
	if err := CheckResource(r.Resource); err != nil {
		return nil, &Error{Reason: BadResource, Detail: err.Error()}
	}
	granted := s.granted[caller.who()][r.Resource]
	if r.namesIdentity() {
		return s.chooseNamed(caller, r, granted)
	}
	switch len(granted) {
	case 0:
		return nil, s.notGranted(caller, r.Resource, "")
	case 1:
		return granted[0], nil
	}
	var names []string
	for _, identity := range granted {
		if identity.Default {
			return identity, nil
		}
		names = append(names, identity.Name)
	}
	slices.Sort(names)
	return nil, &Error{
		Reason:  AmbiguousIdentity,
		Detail:  fmt.Sprintf("several identities are granted for %s: name one of %s", r.Resource, strings.Join(names, ", ")),
		Choices: names,
	}
}

func (s *ruleset) chooseNamed(caller Caller, r Request, granted []*Identity) (*Identity, *Error) {
	for i := range s.rules.Identities {
		identity := &s.rules.Identities[i]
		if !r.names(identity) {
			continue
		}
		if slices.Contains(granted, identity) {
			return identity, nil
		}
		return nil, s.notGranted(caller, r.Resource, identity.Name)
	}
	var choices []string
	for _, identity := range granted {
		choices = append(choices, identity.Name)
	}
	slices.Sort(choices)
	return nil, &Error{
		Reason:  UnknownIdentity,
		Detail:  "Identity not found: no [[identity]] of the configuration goes by that name or ID",
		Choices: choices,
	}
}

func (s *ruleset) notGranted(caller Caller, resource, identity string) *Error {
	of := ""
	if identity != "" {
		of = fmt.Sprintf(" of identity %q", identity)
	}
	return &Error{
		Reason: NotGranted,
		Detail: fmt.Sprintf("no [[grant]] lets %v have tokens%s for %s: an administrator can add one", caller, of, resource),
	}
}

func (r Request) namesIdentity() bool {
	return r.Identity != "" || r.ClientID != "" || r.ObjectID != "" || r.ResourceID != ""
}

// names reports whether r names i. IDs are compared as Azure does, without regard to case.
func (r Request) names(i *Identity) bool {
	switch {
	case r.Identity != "":
		return r.Identity == i.Name
	case r.ClientID != "":
		return strings.EqualFold(r.ClientID, i.ClientID)
	case r.ObjectID != "":
		return strings.EqualFold(r.ObjectID, i.ObjectID)
	}
	return strings.EqualFold(r.ResourceID, i.ResourceID)
}

// changes lists in words what differs between s and the rules before it.
func (s *ruleset) changes(before *ruleset) []string {
	var all []string
	for _, identity := range s.rules.Identities {
		old := before.named(identity.Name)
		switch {
		case old == nil:
			all = append(all, fmt.Sprintf("identity %q added", identity.Name))
		case *old != identity:
			all = append(all, fmt.Sprintf("identity %q changed", identity.Name))
		}
	}
	for _, old := range before.rules.Identities {
		if s.named(old.Name) == nil {
			all = append(all, fmt.Sprintf("identity %q removed", old.Name))
		}
	}
	was, is := before.allowances(), s.allowances()
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
	if before.sdkLife != s.sdkLife {
		all = append(all, fmt.Sprintf("sdk_life is %v, was %v", s.sdkLife, before.sdkLife))
	}
	return all
}

// allowances lists what the grants allow, one line for each caller, identity and resource.
func (s *ruleset) allowances() []string {
	var all []string
	for _, grant := range s.rules.Grants {
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
