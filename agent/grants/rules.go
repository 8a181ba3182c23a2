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
}

// Rules are all identities and grants. No grant, no token.
type Rules struct {
	Identities []Identity
	Grants     []Grant

	// Alternates names, for a resource, other App ID URIs that it accepts tokens for. A caller whose grants name both
	// with the same identity may get the token of one while the resource's own is not current.
	Alternates map[string][]string
}

const maxAlternates = 8 // of one resource

// RuleError is one fault in rules.
type RuleError struct {
	Kind   string // "identity", "grant" or "resource" (an entry of Alternates, in their order); or a setting's name
	Index  int    // from 0, within its kind
	Detail string
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

// addFault adds a *RuleError to a list.
type addFault func(kind string, index int, format string, args ...any)

// Faults returns every fault in r as a *RuleError.
func (r Rules) Faults() (faults []error) {
	add := func(kind string, index int, format string, args ...any) {
		faults = append(faults, &RuleError{Kind: kind, Index: index, Detail: fmt.Sprintf(format, args...)})
	}
	r.checkIdentities(add)
	r.checkGrants(add)
	if n := r.prefetched(); n > tokencache.MaxKeys {
		add("grant", len(r.Grants)-1,
			"%d tokens are to be prefetched: at most %d can be; take prefetch off some grants", n, tokencache.MaxKeys)
	}
	for i, resource := range slices.Sorted(maps.Keys(r.Alternates)) {
		if err := CheckAlternates(resource, r.Alternates[resource]); err != nil {
			add("resource", i, "%v", err)
		}
	}
	return faults
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

func (r Rules) checkIdentities(add addFault) {
	if len(r.Identities) == 0 {
		add("identity", 0, "no [[identity]] is configured: name at least one")
	}
	names := make(map[string]bool)
	selectors := make(map[string]string) // lower-case "kind id" → identity's name
	defaults := 0
	for i, identity := range r.Identities {
		if !validName.MatchString(identity.Name) {
			add("identity", i, "identity name %q: letters, digits, dot, dash and underscore, at most 63", identity.Name)
		}
		if names[identity.Name] {
			add("identity", i, "identity %q is there twice", identity.Name)
		}
		names[identity.Name] = true
		if identity.Default {
			if defaults++; defaults > 1 {
				add("identity", i, "identity %q is a second default: only one may be", identity.Name)
			}
		}
		for _, id := range []struct{ field, value string }{
			{"client_id", identity.ClientID}, {"object_id", identity.ObjectID},
		} {
			if id.value != "" && !IsGUID(id.value) {
				add("identity", i, "identity %q: %s %q is no GUID", identity.Name, id.field, id.value)
			}
		}
		if identity.ResourceID != "" && !strings.HasPrefix(identity.ResourceID, "/subscriptions/") {
			add("identity", i, "identity %q: resource_id %q must begin with /subscriptions/",
				identity.Name, identity.ResourceID)
		}
		for _, selector := range identity.selectors() {
			switch other, taken := selectors[selector]; {
			case taken && selector == tokencache.Selector{}.String():
				add("identity", i, "identities %q and %q are both the system-assigned one, which a device has once: "+
					"give one of them a client_id, object_id or resource_id", other, identity.Name)
			case taken:
				add("identity", i, "identities %q and %q have the same %s", other, identity.Name, selector)
			}
			selectors[selector] = identity.Name
		}
	}
}

// selectors returns every ID that i may be selected by, in a form that can be compared.
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
	if len(all) == 0 {
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
			if grant.Prefetch {
				all[wanted{grant.Identity, resource}] = true
			}
		}
	}
	return len(all)
}

func (r Rules) checkGrants(add addFault) {
	for i, grant := range r.Grants {
		named := slices.ContainsFunc(r.Identities, func(id Identity) bool { return id.Name == grant.Identity })
		if !named {
			add("grant", i, "the grant for %s names identity %q, which is not configured", grant.Caller, grant.Identity)
		}
		if err := grant.Caller.Check(); err != nil {
			add("grant", i, "%v", err)
		}
		if len(grant.Resources) == 0 {
			add("grant", i, "the grant for %s names no resources", grant.Caller)
		}
		for _, resource := range grant.Resources {
			if err := checkPlainResource(resource); err != nil {
				add("grant", i, "the grant for %s: %v", grant.Caller, err)
			}
		}
	}
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
