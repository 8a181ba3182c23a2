package agent

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
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
	Place     string   // where it is written, for people; may be empty
}

// DefaultSDKLife is the longest life that the SDK forms advertise, unless configured: an SDK comes back
// with 5 minutes left, so that a module has a new token at most half an hour after the daemon.
const DefaultSDKLife = 35 * time.Minute

// minSDKLife keeps SDKs from asking on every call: some do so below 20 minutes.
const minSDKLife = 20 * time.Minute

// chaseSDKLife is the longest life that the SDK forms advertise while permissions are not current: SDKs
// come back five minutes before it is over.
const chaseSDKLife = 25 * time.Minute

const (
	maxSpread     = 24 * time.Hour
	maxAlternates = 8 // of one resource
)

// Rules is everything that decides who gets what. No grant, no token.
type Rules struct {
	Identities []Identity
	Grants     []Grant

	// SDKLife is the longest life that the SDK forms advertise, so that a module's SDK comes back for
	// newer tokens. Zero means DefaultSDKLife; between 20 minutes and 24 hours.
	SDKLife time.Duration

	// Spread is how long a policy change may take to reach newly minted tokens, up to 24 hours. Zero means
	// ten minutes; a nanosecond will do for none.
	Spread time.Duration

	// WithholdLost says what becomes of tokens from before when the record of policy changes is lost, or cannot be read now: they are
	// withheld until they are known to be current. False: they are served, as uncertain.
	WithholdLost bool

	// Alternates names, for a resource, other App ID URIs that it accepts tokens for. A caller whose grants
	// name both with the same identity may get the token of one while the resource's own is not current.
	Alternates map[string][]string
}

// SpreadOrDefault returns how long a policy change may take to reach newly minted tokens.
func (r Rules) SpreadOrDefault() time.Duration {
	return cmp.Or(r.Spread, tokencache.DefaultPropagationDelay)
}

// RuleError is one thing wrong with rules. Index counts from 0 within its kind.
type RuleError struct {
	Kind   string // "identity", "grant", "resource" (an entry of Alternates, in their order), "sdk_life" or "spread"
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
	if r.Spread < 0 || r.Spread > maxSpread {
		fault("spread", 0, "spread is %v: it must be between 0s and %v", r.Spread, maxSpread)
	}
	for i, resource := range slices.Sorted(maps.Keys(r.Alternates)) {
		if err := CheckAlternates(resource, r.Alternates[resource]); err != nil {
			fault("resource", i, "%v", err)
		}
	}
	return errors.Join(faults...)
}

// CheckAlternates says what is wrong with the other App ID URIs that a resource is to accept, or nil.
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

// checkPlainResource accepts what a configuration may name: resources, and no scopes.
func checkPlainResource(resource string) error {
	if err := CheckResource(resource); err != nil {
		return err
	}
	if strings.HasSuffix(resource, "/.default") {
		return fmt.Errorf("resource %q is a scope: drop the /.default", resource)
	}
	return nil
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
		if err := grant.Caller.Check(); err != nil {
			fault("grant", i, "%v", err)
		}
		if len(grant.Resources) == 0 {
			fault("grant", i, "the grant for %s names no resources", grant.Caller)
		}
		for _, resource := range grant.Resources {
			if err := checkPlainResource(resource); err != nil {
				fault("grant", i, "the grant for %s: %v", grant.Caller, err)
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
