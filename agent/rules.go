package agent

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"perceptd/tokencache"
)

// Identity is a managed identity that the device may use. With no ID it is the system-assigned one.
// Several IDs may stand beside each other: callers may select by any of them, and the source is asked
// with the first of client, object and resource ID that is there.
type Identity struct {
	Name       string
	Default    bool // taken when a caller names none and its grants leave a choice that includes it
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
	Prefetch  bool     // fetch before anyone asks, and never let go
}

// DefaultSDKLife is the longest life that the SDK forms advertise, unless configured.
const DefaultSDKLife = time.Hour

// minSDKLife keeps SDKs from asking on every call: some do so below 20 minutes.
const minSDKLife = 20 * time.Minute

// Rules is everything that decides who gets what. No grant, no token.
type Rules struct {
	Identities []Identity
	Grants     []Grant

	// SDKLife is the longest life that the SDK forms advertise, so that a module's SDK comes back for
	// newer tokens. Zero means DefaultSDKLife; between 20 minutes and 24 hours.
	SDKLife time.Duration
}

// RuleError is one thing wrong with rules. Index counts from 0 within its kind.
type RuleError struct {
	Kind   string // "identity", "grant" or "sdk_life"
	Index  int
	Detail string
}

func (e *RuleError) Error() string { return e.Detail }

var (
	validName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)
	validGUID = regexp.MustCompile(`^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$`)
)

// Validate returns every fault of r as *RuleErrors joined, or nil.
func (r Rules) Validate() error {
	var faults []error
	fault := func(kind string, index int, format string, args ...any) {
		faults = append(faults, &RuleError{Kind: kind, Index: index, Detail: fmt.Sprintf(format, args...)})
	}
	r.validateIdentities(fault)
	r.validateGrants(fault)
	if n := r.prefetched(); n > tokencache.MaxKeys {
		fault("grant", len(r.Grants)-1, "%d tokens are to be prefetched: at most %d can be; take prefetch off some grants", n, tokencache.MaxKeys)
	}
	if r.SDKLife != 0 && (r.SDKLife < minSDKLife || r.SDKLife > 24*time.Hour) {
		fault("sdk_life", 0, "sdk_life is %v: it must be between %v and 24h", r.SDKLife, minSDKLife)
	}
	return errors.Join(faults...)
}

func (r Rules) validateIdentities(fault func(kind string, index int, format string, args ...any)) {
	if len(r.Identities) == 0 {
		fault("identity", 0, "no [[identity]] is configured: name at least one")
	}
	names := make(map[string]bool)
	selectors := make(map[string]string) // lower-case "kind id" → identity's name
	defaults := 0
	for i, identity := range r.Identities {
		if !validName.MatchString(identity.Name) {
			fault("identity", i, "identity name %q: letters, digits, dot, dash and underscore, at most 63", identity.Name)
		}
		if names[identity.Name] {
			fault("identity", i, "identity %q is there twice", identity.Name)
		}
		names[identity.Name] = true
		if identity.Default {
			if defaults++; defaults > 1 {
				fault("identity", i, "identity %q is a second default: only one may be", identity.Name)
			}
		}
		for _, id := range []struct{ field, value string }{{"client_id", identity.ClientID}, {"object_id", identity.ObjectID}} {
			if id.value != "" && !validGUID.MatchString(id.value) {
				fault("identity", i, "identity %q: %s %q is no GUID", identity.Name, id.field, id.value)
			}
		}
		if identity.ResourceID != "" && !strings.HasPrefix(identity.ResourceID, "/subscriptions/") {
			fault("identity", i, "identity %q: resource_id %q must begin with /subscriptions/", identity.Name, identity.ResourceID)
		}
		for _, selector := range identity.selectors() {
			switch other, taken := selectors[selector]; {
			case taken && selector == tokencache.Selector{}.String():
				fault("identity", i, "identities %q and %q are both the system-assigned one, which a device has once: give one of them a client_id, object_id or resource_id",
					other, identity.Name)
			case taken:
				fault("identity", i, "identities %q and %q have the same %s", other, identity.Name, selector)
			}
			selectors[selector] = identity.Name
		}
	}
}

// selectors lists, in a form fit for comparing, every ID that i may be selected by.
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

// prefetched counts the tokens that the grants want prefetched.
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

func (r Rules) validateGrants(fault func(kind string, index int, format string, args ...any)) {
	for i, grant := range r.Grants {
		named := slices.ContainsFunc(r.Identities, func(id Identity) bool { return id.Name == grant.Identity })
		if !named {
			fault("grant", i, "the grant for %s names identity %q, which is not configured", grant.Caller, grant.Identity)
		}
		switch {
		case (grant.Caller.Module != "") == (grant.Caller.UID != nil):
			fault("grant", i, "a grant's caller is exactly one of module, user and uid")
		case grant.Caller.Module != "" && !validName.MatchString(grant.Caller.Module):
			fault("grant", i, "module name %q: letters, digits, dot, dash and underscore, at most 63", grant.Caller.Module)
		}
		if len(grant.Resources) == 0 {
			fault("grant", i, "the grant for %s names no resources", grant.Caller)
		}
		for _, resource := range grant.Resources {
			if err := CheckResource(resource); err != nil {
				fault("grant", i, "the grant for %s: %v", grant.Caller, err)
			} else if strings.HasSuffix(resource, "/.default") {
				fault("grant", i, "the grant for %s: resource %q is a scope: drop the /.default", grant.Caller, resource)
			}
		}
	}
}

// maxResource bounds a resource's length; Entra's own limit for an App ID URI is 255.
const maxResource = 512

// CheckResource says what is wrong with a resource, or nil. It accepts App ID URIs and bare GUIDs.
func CheckResource(resource string) error {
	switch {
	case resource == "":
		return errors.New("the resource is empty: name an App ID URI such as https://vault.azure.net")
	case len(resource) > maxResource:
		return fmt.Errorf("the resource is %d bytes long, more than %d", len(resource), maxResource)
	}
	for _, c := range []byte(resource) {
		if c <= ' ' || c >= 0x7f || c == '"' || c == '<' || c == '>' || c == '\\' {
			return fmt.Errorf("resource %q has a character that no App ID URI has", resource)
		}
	}
	if !strings.Contains(resource, ":") && !validGUID.MatchString(resource) {
		return fmt.Errorf("resource %q is no App ID URI (such as https://vault.azure.net) and no GUID", resource)
	}
	return nil
}
