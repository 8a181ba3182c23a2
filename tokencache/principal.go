package tokencache

import (
	"cmp"
	"strings"
)

// Principal is who a token speaks for. A claim that the token omits is empty.
type Principal struct {
	ObjectID string `json:"oid,omitempty"`
	TenantID string `json:"tid,omitempty"`
	ClientID string `json:"appid,omitempty"` // or azp

	Simulated bool `json:"simulated,omitempty"` // a simulated back end says so
}

// Principal returns who a token with these claims speaks for.
func (c Claims) Principal() Principal {
	return Principal{ObjectID: c.ObjectID, TenantID: c.TenantID, ClientID: c.ClientID, Simulated: c.Simulated()}
}

// IsZero reports whether the token names no principal.
func (p Principal) IsZero() bool { return p == Principal{} }

// Differs reports whether p and o are certainly different: they have different values of one claim. The client ID
// counts only if one of them has no object ID, which identifies a principal by itself. A simulated principal always
// differs from a real one.
func (p Principal) Differs(o Principal) bool {
	differ := func(a, b string) bool { return a != "" && b != "" && !strings.EqualFold(a, b) }
	if p.Simulated != o.Simulated {
		return !p.IsZero() && !o.IsZero()
	}
	if differ(p.ObjectID, o.ObjectID) || differ(p.TenantID, o.TenantID) {
		return true
	}
	return (p.ObjectID == "" || o.ObjectID == "") && differ(p.ClientID, o.ClientID)
}

// filled returns p with its missing claims taken from o.
func (p Principal) filled(o Principal) Principal {
	return Principal{
		ObjectID: cmp.Or(p.ObjectID, o.ObjectID), TenantID: cmp.Or(p.TenantID, o.TenantID),
		ClientID: cmp.Or(p.ClientID, o.ClientID), Simulated: p.Simulated || o.Simulated,
	}
}
