// Package deny takes tokens away from callers, whatever the grants allow: deny rules, who set them, and the record that
// keeps them. The package is pure: it compares values, and neither reads nor writes anything.
package deny

import "strings"

// Target says which tokens a rule denies: those for which all holds that it names. It names at least one thing.
type Target struct {
	All      bool   `json:"all,omitempty"`      // every token of every caller; then it names nothing else
	Module   string `json:"module,omitempty"`   // configured name of the calling module
	Unit     string `json:"unit,omitempty"`     // the caller's systemd service
	User     string `json:"user,omitempty"`     // the caller's user, by name or uid
	Identity string `json:"identity,omitempty"` // configured name of the identity
	Resource string `json:"resource,omitempty"` // the resource, in any spelling
}

// String names what a rule denies: "module vision, identity device for https://vault.azure.net", "everything".
func (t Target) String() string {
	if t.All {
		return "everything"
	}
	var parts []string
	for _, named := range []struct{ kind, name string }{
		{"module", t.Module}, {"unit", t.Unit}, {"user", t.User}, {"identity", t.Identity},
	} {
		if named.name != "" {
			parts = append(parts, named.kind+" "+named.name)
		}
	}
	switch text := strings.Join(parts, ", "); {
	case t.Resource == "":
		return text
	case text == "":
		return "resource " + t.Resource
	default:
		return text + " for " + t.Resource
	}
}

// Origin is who set a rule, and so who lifts it.
type Origin string

const (
	Local  Origin = "local"  // a person on the device
	Twin   Origin = "twin"   // the desired properties of the IoT Hub twin
	Method Origin = "method" // a direct method from IoT Hub
)
