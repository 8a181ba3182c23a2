package tokencache

import "cmp"

// SelectorKind says which of its names selects an identity. Kinds sort in the order of the constants.
type SelectorKind string

const (
	SystemAssigned SelectorKind = ""            // the device's own identity; needs no ID
	ClientID       SelectorKind = "client_id"   // a user-assigned identity by its application ID
	ObjectID       SelectorKind = "object_id"   // a user-assigned identity by its principal ID
	ResourceID     SelectorKind = "resource_id" // a user-assigned identity by its ARM resource ID
)

func (k SelectorKind) String() string {
	if k == SystemAssigned {
		return "system-assigned"
	}
	return string(k)
}

// MarshalText returns the word for k, by which it is kept.
func (k SelectorKind) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// UnmarshalText takes a word that is none for a kind that is none.
func (k *SelectorKind) UnmarshalText(text []byte) error {
	switch *k = SelectorKind(text); *k {
	case SelectorKind(SystemAssigned.String()):
		*k = SystemAssigned
	case SystemAssigned:
		*k = "none"
	}
	return nil
}

// Selector is what a source is asked with to say which identity is meant. The zero value is the
// system-assigned identity. It is not the identity's configured name: an identity whose client ID
// changes on reload must share nothing with the old one.
type Selector struct {
	Kind SelectorKind `json:"kind"`
	ID   string       `json:"id,omitempty"` // empty for SystemAssigned
}

func (s Selector) String() string {
	if s.Kind == SystemAssigned {
		return s.Kind.String()
	}
	return s.Kind.String() + " " + s.ID
}

// Key names one cached token: an identity's selector and the App ID URI the token is for. The back
// end caches per resource URI, byte for byte, so nothing about the spelling is normalised.
type Key struct {
	Selector Selector `json:"selector"`
	Resource string   `json:"resource"`
}

func (k Key) String() string { return k.Selector.String() + " for " + k.Resource }

// compare orders keys by identity and resource.
func (k Key) compare(o Key) int {
	return cmp.Or(
		cmp.Compare(k.Selector.Kind, o.Selector.Kind), cmp.Compare(k.Selector.ID, o.Selector.ID),
		cmp.Compare(k.Resource, o.Resource),
	)
}
