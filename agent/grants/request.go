package grants

import (
	"cmp"
	"strings"
)

// Request names the token that a caller asks for. It names the identity in at most one of the four ways; in none, the
// caller's grants choose it.
type Request struct {
	Resource string // App ID URI, without a /.default suffix

	Identity   string // by configured name
	ClientID   string
	ObjectID   string
	ResourceID string

	// Parameter is what the caller calls the ID that it names the identity by, for people; empty: as the configuration.
	Parameter string
}

// NamesIdentity reports whether r names an identity.
func (r *Request) NamesIdentity() bool { return r.IdentityText() != "" }

// IdentityText returns how r names an identity; empty: it names none.
func (r *Request) IdentityText() string {
	return cmp.Or(r.Identity, r.ClientID, r.ObjectID, r.ResourceID)
}

// identityField returns the key of an [[identity]] by which r names one.
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

// Names reports whether r names i. IDs are compared as Azure does, without regard to case.
func (r *Request) Names(i *Identity) bool {
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
