package explain

import (
	"fmt"
	"strings"
	"time"

	"perceptd/agent/api"
)

// IsCurrent reports whether a valid token carries every policy change on record. A daemon that says nothing of them
// knows of none.
func IsCurrent(token api.TokenStatus) bool {
	return token.Permissions.State == api.PermissionsCurrent || token.Permissions.State == ""
}

// TokenChange is a policy change, and whether a token carries it.
type TokenChange struct {
	api.PolicyChange
	State api.PermissionState `json:"standing,omitempty"` // empty without a valid token
}

// Lacked reports whether the token may lack the change.
func (c TokenChange) Lacked() bool {
	return c.State == api.PermissionsStale || c.State == api.PermissionsUncertain
}

// ChangesOf returns the changes on record that touch a token, the latest first, as perceptd judges them.
func ChangesOf(token api.TokenStatus, onRecord []api.PolicyChange) []TokenChange {
	standing := make(map[string]api.PermissionState, len(token.Changes))
	for _, change := range token.Changes {
		standing[change.ID] = change.State
	}
	changes := []TokenChange{}
	for _, change := range onRecord {
		if standing, touches := standing[change.ID]; touches {
			changes = append(changes, TokenChange{change, standing})
		}
	}
	return changes
}

// LostRecord returns the change that stands for a lost record of policy changes and withholds a token, of those that
// touch it; nil where there is none, or a revocation on record withholds the token.
func LostRecord(changes []TokenChange) (found *api.PolicyChange) {
	for _, change := range changes {
		switch {
		case change.Withholds:
			found = &change.PolicyChange
		case change.Effect == api.EffectRevoked && change.Lacked():
			return nil
		}
	}
	return found
}

// InTheToken says which permissions a newer token brings, and which are not in a token.
const InTheToken = "Group memberships, app roles and directory roles are written into the token (groups, roles, " +
	"wids): only a newer token shows a change of these. Direct Azure RBAC role assignments are not in it: the " +
	"resource looks them up itself, within about 10 minutes, whatever the token."

const NotRecalled = "Tokens that are already in a module's hands cannot be recalled: they keep what they carry " +
	"until they expire."

// ChangeText writes a policy change as half a sentence: "permissions were granted at 11:20 (40m ago) to
// identity vision on https://vault.azure.net".
func (s Times) ChangeText(now time.Time, change api.PolicyChange) string {
	if change.Record != "" {
		text := RecordText(change.Record) + ", since " + s.AtRelative(now, change.RecordedOn) +
			": whether permissions changed before is not known"
		if change.Withholds {
			text += ", and tokens from before are withheld ([tokens] lost_record)"
		}
		return text
	}
	if change.Effect == api.EffectUnknown {
		return "the record of policy changes could not be read at " + s.AtRelative(now, change.At) +
			": whether permissions changed before is not known"
	}
	text := fmt.Sprintf("permissions were %s at %s", change.Effect, s.AtRelative(now, change.At))
	whose := "every identity"
	if change.Identity != "" {
		whose = "identity " + change.Identity
	}
	switch change.Effect {
	case api.EffectGranted:
		text += " to " + whose
	case api.EffectRevoked:
		text += " from " + whose
	default:
		text += " for " + whose
	}
	if change.Resource == "" {
		return text + " on every resource"
	}
	return text + " on " + change.Resource
}

func capitalized(text string) string { return strings.ToUpper(text[:1]) + text[1:] }

// RecordText says what is wrong with the record of policy changes.
func RecordText(is api.RecordState) string {
	if is == api.RecordUnread {
		return "the record of policy changes cannot be read"
	}
	return "the record of policy changes is lost"
}

// PrincipalText names the principal that an identity's tokens speak for, or is "" where it is not known.
func PrincipalText(p *api.Principal) string {
	if p == nil {
		return ""
	}
	var parts []string
	for _, claim := range []struct{ name, value string }{{"object ID", p.ObjectID}, {"tenant", p.TenantID}} {
		if claim.value != "" {
			parts = append(parts, claim.name+" "+claim.value)
		}
	}
	if p.ObjectID == "" && p.ClientID != "" {
		parts = append(parts, "client ID "+p.ClientID)
	}
	if p.Simulated {
		parts = append(parts, "simulated")
	}
	return strings.Join(parts, ", ")
}

// PrincipalOf returns the principal that a token speaks for; nil where its claims do not say.
func PrincipalOf(token api.TokenStatus) *api.Principal {
	c := token.Claims
	if c == nil || c.ObjectID == "" && c.TenantID == "" && c.ClientID == "" {
		return nil
	}
	return &api.Principal{ObjectID: c.ObjectID, TenantID: c.TenantID, ClientID: c.ClientID}
}

// ShortDigest returns the first digits of a token's digest, which are enough for people to tell two tokens apart.
func ShortDigest(digest string) string { return digest[:min(12, len(digest))] }
