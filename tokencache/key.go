package tokencache

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
)

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

// UnmarshalJSON refuses a selector without a kind, which would else be the system-assigned identity.
func (s *Selector) UnmarshalJSON(text []byte) error {
	var doc struct {
		Kind *SelectorKind `json:"kind"`
		ID   string        `json:"id"`
	}
	if err := unmarshalKnown(text, &doc); err != nil {
		return err
	}
	if doc.Kind == nil {
		return errSelectorMissing
	}
	*s = Selector{*doc.Kind, doc.ID}
	return nil
}

// errSelectorMissing is why a document is refused that does not say whose token it is about.
var errSelectorMissing = errors.New("its selector is none")

// unmarshalKnown decodes JSON in which every field is known.
func unmarshalKnown(text []byte, into any) error {
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	return d.Decode(into)
}

// Key names one cached token: an identity's selector and the App ID URI the token is for. The back
// end caches per resource URI, byte for byte, so nothing about the spelling is normalised.
type Key struct {
	Selector Selector `json:"selector"`
	Resource string   `json:"resource"`
}

// UnmarshalJSON refuses a key without a selector, which would else be the system-assigned identity's.
func (k *Key) UnmarshalJSON(text []byte) error {
	var doc struct {
		Selector *Selector `json:"selector"`
		Resource string    `json:"resource"`
	}
	if err := unmarshalKnown(text, &doc); err != nil {
		return err
	}
	if doc.Selector == nil {
		return errSelectorMissing
	}
	*k = Key{*doc.Selector, doc.Resource}
	return nil
}

func (k Key) String() string { return k.Selector.String() + " for " + k.Resource }

// compare orders keys by identity and resource.
func (k Key) compare(o Key) int {
	return cmp.Or(
		cmp.Compare(k.Selector.Kind, o.Selector.Kind), cmp.Compare(k.Selector.ID, o.Selector.ID),
		cmp.Compare(k.Resource, o.Resource),
	)
}
