package agent

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"perceptd/tokencache"
)

// ruleset is Rules made ready for looking up. It never changes: a reload makes a new one.
type ruleset struct {
	rules    Rules
	sdkLife  time.Duration
	granted  map[who]entitlements
	keys     map[tokencache.Key]*Identity // every key that some grant allows
	prefetch []tokencache.Key

	resources []string // that grants name, or that are alternates, in order
}

// entitlement is one identity that a grant allows tokens of.
type entitlement struct {
	identity *Identity
	grant    int // the first grant that allows it
}

// in reports whether all allows the same identity.
func (e entitlement) in(all []entitlement) bool {
	return slices.ContainsFunc(all, func(other entitlement) bool { return other.identity == e.identity })
}

// entitlements is what the grants for one who allow: resource → identities.
type entitlements map[string][]entitlement

func (r Rules) compile() (*ruleset, error) {
	if err := r.Validate(); err != nil {
		return nil, err
	}
	return r.index(), nil
}

// index makes sound rules ready for looking up.
func (r Rules) index() *ruleset {
	s := &ruleset{
		rules:     r,
		sdkLife:   cmp.Or(r.SDKLife, DefaultSDKLife),
		granted:   make(map[who]entitlements),
		keys:      make(map[tokencache.Key]*Identity),
		resources: r.known(),
	}
	for i := range r.Grants {
		s.add(i)
	}
	return s
}

// known lists the resources that grants name or that are alternates.
func (r Rules) known() []string {
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

// UselessAlternates lists in words the alternates that nobody can get a token of, since no caller's
// grants name both URIs with the same identity.
func (r Rules) UselessAlternates() []string {
	s := r.index()
	var all []string
	for _, resource := range slices.Sorted(maps.Keys(r.Alternates)) {
		for _, alternate := range r.Alternates[resource] {
			if !s.servesInPlaceOf(alternate, resource) {
				all = append(all, fmt.Sprintf("%s will never stand in for %s: no caller's grants name both with the same identity", alternate, resource))
			}
		}
	}
	return all
}

// servesInPlaceOf reports whether some caller may have tokens of one identity for both resources.
func (s *ruleset) servesInPlaceOf(alternate, resource string) bool {
	for _, granted := range s.granted {
		for _, one := range granted[resource] {
			if one.in(granted[alternate]) {
				return true
			}
		}
	}
	return false
}

// add makes the grant of that index count.
func (s *ruleset) add(index int) {
	grant := &s.rules.Grants[index]
	identity := s.named(grant.Identity)
	caller := grant.Caller.who()
	if s.granted[caller] == nil {
		s.granted[caller] = make(entitlements)
	}
	for _, resource := range grant.Resources {
		one := entitlement{identity: identity, grant: index}
		if !one.in(s.granted[caller][resource]) {
			s.granted[caller][resource] = append(s.granted[caller][resource], one)
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

func (s *ruleset) allows(key tokencache.Key) bool { return s.keys[key] != nil }

// allowed returns m without the keys that the rules have no use for any more. A token of theirs that comes again was received when
// it was first.
func (s *ruleset) allowed(m *tokencache.Snapshot) *tokencache.Snapshot {
	if m == nil {
		return nil
	}
	left := *m
	left.Keys, left.Tombstones = nil, slices.Clone(m.Tombstones)
	for _, r := range m.Keys {
		if s.allows(r.Key) {
			left.Keys = append(left.Keys, r)
		} else if b, ok := r.Tombstone(); ok {
			left.Tombstones = append(left.Tombstones, b)
		}
	}
	return &left
}

// matching returns the keys to refresh: those that are cached, or, where a resource is named, those
// that the grants allow for it.
func (s *ruleset) matching(cached []tokencache.Status, identity, resource string) []tokencache.Key {
	wanted := make(map[tokencache.Key]bool)
	if resource == "" {
		for _, status := range cached {
			wanted[status.Key] = s.keys[status.Key] != nil
		}
	} else {
		for key := range s.keys {
			wanted[key] = key.Resource == resource
		}
	}
	var keys []tokencache.Key
	for key, want := range wanted {
		if want && (identity == "" || s.keys[key].Name == identity) {
			keys = append(keys, key)
		}
	}
	slices.SortFunc(keys, func(x, y tokencache.Key) int {
		return strings.Compare(s.keys[x].Name+"\x00"+x.Resource, s.keys[y].Name+"\x00"+y.Resource)
	})
	return keys
}

func (s *ruleset) unknownIdentity(name string) *Error {
	var names []string
	for _, identity := range s.rules.Identities {
		names = append(names, identity.Name)
	}
	slices.Sort(names)
	return &Error{
		Reason:  UnknownIdentity,
		Detail:  fmt.Sprintf("no [[identity]] of the configuration is named %q", cut(name, 64)),
		Choices: names,
	}
}

// identityText is how r names an identity; empty: it names none.
func (r *Request) identityText() string {
	return cmp.Or(r.Identity, r.ClientID, r.ObjectID, r.ResourceID)
}

// identityField is the key of an [[identity]] by which r names one.
func (r *Request) identityField() string {
	switch {
	case r.Identity != "":
		return "name"
	case r.ClientID != "":
		return "client_id"
	case r.ObjectID != "":
		return "object_id"
	}
	return "resource_id"
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
	if is := s.rules.WithholdLost; is != before.rules.WithholdLost && is {
		all = append(all, "tokens from before are withheld when the record of policy changes is lost, and no longer served")
	} else if is != before.rules.WithholdLost {
		all = append(all, "tokens from before are served when the record of policy changes is lost, and no longer withheld")
	}
	if is, was := s.rules.SpreadOrDefault(), before.rules.SpreadOrDefault(); is != was {
		all = append(all, fmt.Sprintf("spread is %v, was %v", is.Truncate(time.Microsecond), was.Truncate(time.Microsecond)))
	}
	return append(all, s.alternateChanges(before)...)
}

// alternateChanges lists in words which alternates differ between s and the rules before it.
func (s *ruleset) alternateChanges(before *ruleset) []string {
	var all []string
	is, was := s.rules.Alternates, before.rules.Alternates
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
