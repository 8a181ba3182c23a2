package grants

import (
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	"perceptd/tokencache"
)

// Identity is a managed identity that the device may use. With no ID it is the system-assigned one. It may have
// several IDs: callers may select it by any of them, and the source is asked with the first of client, object and
// resource ID that is there.
type Identity struct {
	Name       string
	Default    bool // chosen when a caller names none and its grants leave a choice that includes it
	ClientID   string
	ObjectID   string
	ResourceID string
	Place      string // where the identity is written, for people; may be empty

	// Fault is why the identity is idle: no caller gets its tokens, and no other identity is the default while it may
	// be. Name and IDs are as far as they were understood, and Default is also true where it cannot be told. Empty: the
	// identity is sound.
	Fault string
}

// String names the identity so that people find it.
func (i Identity) String() string {
	if i.Place == "" {
		return fmt.Sprintf("identity %q", i.Name)
	}
	return fmt.Sprintf("identity %q (%s)", i.Name, i.Place)
}

// IsSelectorKnown reports whether it is understood what the source is asked with for i. An idle identity without an ID
// may be the system-assigned one or not.
func (i Identity) IsSelectorKnown() bool {
	return i.Fault == "" || i.Selector() != tokencache.Selector{}
}

// Selector returns what the source is asked with.
func (i Identity) Selector() tokencache.Selector {
	switch {
	case i.ClientID != "":
		return tokencache.Selector{Kind: tokencache.ClientID, ID: i.ClientID}
	case i.ObjectID != "":
		return tokencache.Selector{Kind: tokencache.ObjectID, ID: i.ObjectID}
	case i.ResourceID != "":
		return tokencache.Selector{Kind: tokencache.ResourceID, ID: i.ResourceID}
	}
	return tokencache.Selector{}
}

// Grant allows callers tokens of one identity for some resources.
type Grant struct {
	Caller    Match
	Identity  string   // an Identity's name
	Resources []string // App ID URIs, matched byte for byte
	Prefetch  bool     // fetch the token before any caller asks, and never evict it
	Place     string   // where the grant is written, for people; may be empty

	// Fault is why the grant is idle. It still decides for its caller, by its kind, and gives nothing, so that no
	// broader grant takes over. Identity and Resources are as far as they were understood. Empty: the grant is sound.
	Fault string
	// Unclear are the kinds of caller that an idle grant may be for, where its caller is not understood: then each
	// broader kind gives nothing either. Zero: it is for Caller.
	Unclear Kinds
	// AnyResource is true if it is not understood which resources an idle grant names. It may be any beside Resources.
	AnyResource bool
}

// Rules are all identities and grants. No grant, no token.
type Rules struct {
	Identities []Identity
	Grants     []Grant

	// Alternates names, for a resource, other App ID URIs that it accepts tokens for. A caller whose grants name both
	// with the same identity may get the token of one while the resource's own is not current. What is denied or
	// revoked by one of these names is so by all.
	Alternates map[string][]string
	// IdleAlternates are those of faulty entries, as far as they were understood: none gets the token of another by
	// them, but what is denied or revoked by one name is so by all.
	IdleAlternates map[string][]string
	// AnyAlternate is true if some faulty entry is not understood: each resource may go by the name of each other one.
	AnyAlternate bool

	// IdleContainers are the names of containers whose module is faulty. They match no grant.
	IdleContainers []string
	// AnyContainerIdle is true if it is not understood of which container some faulty module is. A container then
	// matches no grant, except on a module's own socket.
	AnyContainerIdle bool
}

const maxAlternates = 8 // of one resource

// RuleError is one fault in rules.
type RuleError struct {
	Kind   string // "identity", "grant" or "resource" (an entry of Alternates, in their order); or a setting's name
	Index  int    // from 0, within its kind
	Detail string

	With   []int // the other elements of its kind that have the fault as well: two of one name
	IsMild bool  // the element can be in force all the same, if it is not the default, or not prefetched
}

func (e *RuleError) Error() string { return e.Detail }

var (
	validName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)
	validGUID = regexp.MustCompile(`^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$`)
)

// IsName reports whether an identity or a module may have that name.
func IsName(text string) bool { return validName.MatchString(text) }

// IsGUID reports whether text is a GUID, as identities, applications and tenants have one.
func IsGUID(text string) bool { return validGUID.MatchString(text) }

// faultList collects faults of rules.
type faultList []*RuleError

func (l *faultList) add(kind string, index int, format string, args ...any) *RuleError {
	fault := &RuleError{Kind: kind, Index: index, Detail: fmt.Sprintf(format, args...)}
	*l = append(*l, fault)
	return fault
}

// Faults returns as *RuleErrors every fault in r that is not in its elements' Fault already.
func (r Rules) Faults() (faults []error) {
	for _, fault := range r.faults() {
		faults = append(faults, fault)
	}
	return faults
}

func (r Rules) faults() faultList {
	var all faultList
	r.checkIdentities(&all)
	r.checkGrants(&all)
	if n := r.prefetched(); n > tokencache.MaxKeys {
		fault := all.add("grant", len(r.Grants)-1,
			"%d tokens are to be prefetched: at most %d can be; take prefetch off some grants", n, tokencache.MaxKeys)
		fault.IsMild = true
	}
	for i, resource := range slices.Sorted(maps.Keys(r.Alternates)) {
		if err := CheckAlternates(resource, r.Alternates[resource]); err != nil {
			all.add("resource", i, "%v", err)
		}
	}
	return all
}

// CheckAlternates returns what is wrong with the other App ID URIs that a resource is said to accept, or nil.
func CheckAlternates(resource string, alternates []string) error {
	if err := checkPlainResource(resource); err != nil {
		return err
	}
	if n := len(alternates); n == 0 || n > maxAlternates {
		return fmt.Errorf("resource %s has %d alternates: name 1 to %d", resource, n, maxAlternates)
	}
	for i, alternate := range alternates {
		if err := checkPlainResource(alternate); err != nil {
			return fmt.Errorf("the alternates of %s: %w", resource, err)
		}
		switch {
		case alternate == resource:
			return fmt.Errorf("the alternates of %s: it is no alternate of itself", resource)
		case slices.Contains(alternates[:i], alternate):
			return fmt.Errorf("the alternates of %s: %s is there twice", resource, alternate)
		}
	}
	return nil
}

// TrimScope returns the resource of a scope, which has /.default behind it. A resource stays as it is.
func TrimScope(asked string) string { return strings.TrimSuffix(asked, "/.default") }

// checkPlainResource accepts what a configuration may name: resources, not scopes.
func checkPlainResource(resource string) error {
	if err := CheckResource(resource); err != nil {
		return err
	}
	if TrimScope(resource) != resource {
		return fmt.Errorf("resource %q is a scope: drop the /.default", resource)
	}
	return nil
}

// isFaultyResource reports whether it is not understood which resource is named.
func isFaultyResource(resource string) bool { return checkPlainResource(resource) != nil }

func (r Rules) checkIdentities(all *faultList) {
	if len(r.Identities) == 0 {
		all.add("identity", 0, "no [[identity]] is configured: name at least one")
	}
	names := make(map[string]int)     // → index
	selectors := make(map[string]int) // lower-case "kind id" → index
	firstDefault := -1
	for i, identity := range r.Identities {
		if identity.Fault == "" {
			identity.check(all, i)
		}
		both := func(other int, format string, args ...any) {
			if identity.Fault == "" || r.Identities[other].Fault == "" {
				all.add("identity", i, format, args...).With = []int{other}
			}
		}
		if other, taken := names[identity.Name]; taken {
			both(other, "identity %q is there twice", identity.Name)
		}
		if identity.Name != "" || identity.Fault == "" {
			names[identity.Name] = i
		}
		if identity.Default && identity.Fault == "" {
			if firstDefault >= 0 {
				fault := all.add("identity", i, "identity %q is a second default: only one may be", identity.Name)
				fault.With, fault.IsMild = []int{firstDefault}, true
			}
			firstDefault = i
		}
		for _, selector := range identity.selectors() {
			switch other, taken := selectors[selector]; {
			case taken && selector == tokencache.Selector{}.String():
				both(other, "identities %q and %q are both the system-assigned one, which a device has once: "+
					"give one of them a client_id, object_id or resource_id", r.Identities[other].Name, identity.Name)
			case taken:
				both(other, "identities %q and %q have the same %s", r.Identities[other].Name, identity.Name, selector)
			}
			selectors[selector] = i
		}
	}
}

// check finds what is wrong with i alone.
func (i Identity) check(all *faultList, index int) {
	if !validName.MatchString(i.Name) {
		all.add("identity", index, "identity name %q: letters, digits, dot, dash and underscore, at most 63", i.Name)
	}
	for _, id := range []struct{ field, value string }{{"client_id", i.ClientID}, {"object_id", i.ObjectID}} {
		if id.value != "" && !IsGUID(id.value) {
			all.add("identity", index, "identity %q: %s %q is no GUID", i.Name, id.field, id.value)
		}
	}
	if i.ResourceID != "" && !strings.HasPrefix(i.ResourceID, "/subscriptions/") {
		all.add("identity", index, "identity %q: resource_id %q must begin with /subscriptions/", i.Name, i.ResourceID)
	}
}

// selectors returns every ID that i may be selected by, in a form that can be compared. Of an idle identity without an
// ID it is not known whether it is the system-assigned one.
func (i Identity) selectors() []string {
	var all []string
	for _, s := range []tokencache.Selector{
		{Kind: tokencache.ClientID, ID: i.ClientID},
		{Kind: tokencache.ObjectID, ID: i.ObjectID},
		{Kind: tokencache.ResourceID, ID: i.ResourceID},
	} {
		if s.ID != "" {
			all = append(all, strings.ToLower(s.String()))
		}
	}
	if len(all) == 0 && i.IsSelectorKnown() {
		all = []string{tokencache.Selector{}.String()}
	}
	return all
}

// prefetched returns how many tokens the grants ask to prefetch.
func (r Rules) prefetched() int {
	type wanted struct{ identity, resource string }
	all := make(map[wanted]bool)
	for _, grant := range r.Grants {
		for _, resource := range grant.Resources {
			if grant.Prefetch && grant.Fault == "" {
				all[wanted{grant.Identity, resource}] = true
			}
		}
	}
	return len(all)
}

func (r Rules) checkGrants(all *faultList) {
	for i, grant := range r.Grants {
		if grant.Fault != "" {
			continue
		}
		named := slices.ContainsFunc(r.Identities, func(id Identity) bool { return id.Name == grant.Identity })
		if !named {
			all.add("grant", i, "the grant for %s names identity %q, which is not configured",
				grant.Caller, grant.Identity)
		}
		if err := grant.Caller.Check(); err != nil {
			all.add("grant", i, "%v", err)
		}
		if len(grant.Resources) == 0 {
			all.add("grant", i, "the grant for %s names no resources", grant.Caller)
		}
		for _, resource := range grant.Resources {
			if err := checkPlainResource(resource); err != nil {
				all.add("grant", i, "the grant for %s: %v", grant.Caller, err)
			}
		}
	}
}

// resources returns the resources that grants name or that are alternates, in order.
func (r Rules) resources() []string {
	var all []string
	for _, grant := range r.Grants {
		all = append(all, grant.Resources...)
	}
	for _, alternates := range []map[string][]string{r.Alternates, r.IdleAlternates} {
		for resource, others := range alternates {
			all = append(append(all, resource), others...)
		}
	}
	slices.Sort(all)
	return slices.DeleteFunc(slices.Compact(all), isFaultyResource)
}

// MaxResource bounds a resource's length in bytes. Entra's own limit for an App ID URI is 255.
const MaxResource = tokencache.MaxResource

// CheckResource returns what is wrong with a resource, or nil. It accepts App ID URIs and bare GUIDs.
func CheckResource(resource string) error {
	switch {
	case resource == "":
		return errors.New("the resource is empty: name an App ID URI such as https://vault.azure.net")
	case len(resource) > MaxResource:
		return fmt.Errorf("the resource is %d bytes long, more than %d", len(resource), MaxResource)
	}
	for _, c := range []byte(resource) {
		if c <= ' ' || c >= 0x7f || c == '"' || c == '<' || c == '>' || c == '\\' {
			return fmt.Errorf("resource %q has a character that no App ID URI has", resource)
		}
	}
	if !strings.Contains(resource, ":") && !IsGUID(resource) {
		return fmt.Errorf("resource %q is no App ID URI (such as https://vault.azure.net) and no GUID", resource)
	}
	return nil
}
