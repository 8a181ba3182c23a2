package source

import (
	"fmt"
	"strings"

	"perceptd/tokencache"
)

// checkIdentity compares what was asked for with what the answer and the token in it say. A silent
// answer passes, except on Arc, where an old agent's silence means that it ignored the selector.
func (a answer) checkIdentity(at target, key tokencache.Key) *tokencache.FetchError {
	// Some endpoints repeat the resource in another spelling, in small letters, or as a scope. Any other difference is
	// another resource's token. The token's audience is not compared: resources have audiences of other names, and
	// GUIDs.
	if a.resource != "" && !strings.EqualFold(spelling(a.resource), spelling(key.Resource)) {
		return malformed("%s answered with a token for another resource than %s", at.dial, key.Resource)
	}
	s := key.Selector
	confirmed := s.Kind == tokencache.SystemAssigned
	for _, name := range echoNames(s.Kind) {
		switch id := a.echo[name]; {
		case id == "":
		case !sameID(id, s.ID):
			return otherIdentity(at, s, name)
		default:
			confirmed = true
		}
	}
	if at.form == Arc && !confirmed {
		return &tokencache.FetchError{Kind: tokencache.IdentityNotFound, Detail: fmt.Sprintf(
			"the Arc agent answered with another identity than %v, or did not say which: agents without user-assigned "+
				"identities give the system-assigned one's token; update the agent (azcmagent version) and assign "+
				"the identity", s)}
	}
	if claim := a.token.contradicts(s); claim != "" {
		return otherIdentity(at, s, "the token's "+claim)
	}
	return nil
}

func otherIdentity(at target, s tokencache.Selector, by string) *tokencache.FetchError {
	return &tokencache.FetchError{Kind: tokencache.IdentityNotFound, Detail: fmt.Sprintf(
		"%s answered with another identity than %v, by %s: "+
			"check the identity's IDs and that it is assigned to this device", at.dial, s, by)}
}

// contradicts names the claim that shows that the token is not of the identity s; empty for none.
func (t jwt) contradicts(s tokencache.Selector) string {
	differs := func(claim, id string) bool { return claim != "" && !sameID(claim, id) }
	switch {
	case s.Kind == tokencache.ClientID && differs(t.claims.ClientID, s.ID):
		return "appid"
	case s.Kind == tokencache.ObjectID && differs(t.claims.ObjectID, s.ID):
		return "oid"
	case s.Kind == tokencache.ResourceID && differs(t.resourceID, s.ID):
		return "xms_mirid"
	case s.Kind == tokencache.SystemAssigned && userAssigned(t.resourceID):
		// The metadata service falls back to the only user-assigned identity there is.
		return "xms_mirid, which is a user-assigned identity's"
	}
	return ""
}

func userAssigned(resourceID string) bool {
	return strings.Contains(strings.ToLower(resourceID), "/microsoft.managedidentity/userassignedidentities/")
}

func spelling(resource string) string {
	return tokencache.Canonical(strings.TrimSuffix(resource, "/.default"))
}

// sameID compares GUIDs, in each form that they are written in, and ARM resource IDs. In neither case matters.
func sameID(a, b string) bool {
	if x, y := guid(a), guid(b); x != "" && y != "" {
		return x == y
	}
	return strings.EqualFold(strings.Trim(a, "/ "), strings.Trim(b, "/ "))
}

// guid returns the 32 digits of a GUID, with or without hyphens and braces; empty for what is none.
func guid(id string) string {
	digits := strings.ToLower(strings.ReplaceAll(strings.Trim(id, "{} "), "-", ""))
	if len(digits) != 32 || strings.Trim(digits, "0123456789abcdef") != "" {
		return ""
	}
	return digits
}
