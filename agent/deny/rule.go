// Package deny takes tokens away from callers, whatever the grants allow: deny rules, who set them, and the record that
// keeps them. The package is pure: it compares values, and neither reads nor writes anything.
package deny

// Target says which tokens a rule denies: those for which all holds that it names. It names at least one thing.
type Target struct {
	All      bool   `json:"all,omitempty"`      // every token of every caller; then it names nothing else
	Module   string `json:"module,omitempty"`   // configured name of the calling module
	Unit     string `json:"unit,omitempty"`     // the caller's systemd service
	User     string `json:"user,omitempty"`     // the caller's user, by name or uid
	Identity string `json:"identity,omitempty"` // configured name of the identity
	Resource string `json:"resource,omitempty"` // the resource, in any spelling
}

// Origin is who set a rule, and so who lifts it.
type Origin string

const (
	Local  Origin = "local"  // a person on the device
	Twin   Origin = "twin"   // the desired properties of the IoT Hub twin
	Method Origin = "method" // a direct method from IoT Hub
)
