package main

import (
	"fmt"
	"time"

	"perceptd/agent/api"
	"perceptd/cmd/perceptctl/term"
)

// isCurrent reports whether a valid token carries every policy change on record. A daemon that says nothing of them
// knows of none.
func isCurrent(token api.TokenStatus) bool {
	return token.Permissions.State == api.PermissionsCurrent || token.Permissions.State == ""
}

// verdict is a token's permissions in one word.
func verdict(permissions api.Permissions) string {
	if permissions.Withheld {
		return "withheld"
	}
	return string(permissions.State)
}

func permissionsCell(token api.TokenStatus) term.Cell {
	switch {
	case token.ExpiresIn <= 0:
		return term.Cell{Text: "none", Style: term.Faint}
	case token.Permissions.Withheld:
		return term.Cell{Text: verdict(token.Permissions), Style: term.Bad}
	case !isCurrent(token):
		return term.Cell{Text: verdict(token.Permissions), Style: term.Warning}
	}
	return term.Cell{Text: string(api.PermissionsCurrent), Style: term.Good}
}

// permissionsText writes permissions in a few words: "stale, current by 14:05".
func (s screen) permissionsText(now time.Time, p api.Permissions) string {
	text := term.Clean(verdict(p))
	if !p.CurrentBy.IsZero() {
		text += ", current by " + s.at(now, p.CurrentBy)
	}
	return text
}

// shortDigest returns the first digits of a token's digest, which are enough for people to tell two tokens apart.
func shortDigest(digest string) string { return digest[:min(12, len(digest))] }

// effects lists the effects of policy changes, each with what perceptd does about it.
const effects = `granted  more is permitted: tokens at hand are served on, labelled as not current
revoked  less is permitted: they are withheld until newer ones arrive, which can
         take a day and four hours
changed  both, or it is not known: as granted`

// inTheToken says which permissions a newer token brings, and which are not in a token.
const inTheToken = "Group memberships, app roles and directory roles are written into the token (groups, roles, " +
	"wids): only a newer token shows a change of these. Direct Azure RBAC role assignments are not in it: the " +
	"resource looks them up itself, within about 10 minutes, whatever the token."

const notRecalled = "Tokens that are already in a module's hands cannot be recalled: they keep what they carry " +
	"until they expire."

// changeText writes a policy change as half a sentence: "permissions were granted at 11:20 (40m ago) to
// identity vision on https://vault.azure.net".
func (s screen) changeText(now time.Time, change api.PolicyChange) string {
	if change.Record != "" {
		text := recordText(change.Record) + ", since " + s.atRelative(now, change.RecordedOn) +
			": whether permissions changed before is not known"
		if change.Withholds {
			text += ", and tokens from before are withheld ([tokens] lost_record)"
		}
		return text
	}
	if change.Effect == api.EffectUnknown {
		return "the record of policy changes could not be read at " + s.atRelative(now, change.At) +
			": whether permissions changed before is not known"
	}
	text := fmt.Sprintf("permissions were %s at %s", change.Effect, s.atRelative(now, change.At))
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

// recordText says what is wrong with the record of policy changes.
func recordText(is api.RecordState) string {
	if is == api.RecordUnread {
		return "the record of policy changes cannot be read"
	}
	return "the record of policy changes is lost"
}

// joinedText says that a change stands for others too, or "".
func joinedText(change api.PolicyChange) string {
	if change.Joined == 0 {
		return ""
	}
	return fmt.Sprintf("it stands for %d changes, which were joined since the record was full: they end, and are "+
		"withdrawn, as one", 1+change.Joined)
}

func waitingText(change api.PolicyChange) string {
	return fmt.Sprintf("%d of %d", change.Waiting, change.Touched)
}

// tokenChange is a policy change, and whether a token carries it.
type tokenChange struct {
	api.PolicyChange
	State api.PermissionState `json:"standing,omitempty"` // empty without a valid token
}

// lacked reports whether the token may lack the change.
func (c tokenChange) lacked() bool {
	return c.State == api.PermissionsStale || c.State == api.PermissionsUncertain
}

// changesOf returns the changes on record that touch a token, the latest first, as perceptd judges them.
func changesOf(token api.TokenStatus, onRecord []api.PolicyChange) []tokenChange {
	standing := make(map[string]api.PermissionState, len(token.Changes))
	for _, change := range token.Changes {
		standing[change.ID] = change.State
	}
	changes := []tokenChange{}
	for _, change := range onRecord {
		if standing, touches := standing[change.ID]; touches {
			changes = append(changes, tokenChange{change, standing})
		}
	}
	return changes
}

// lostRecord returns the change that stands for a lost record of policy changes and withholds a token, of those that
// touch it; nil where there is none, or a revocation on record withholds the token.
func lostRecord(changes []tokenChange) (found *api.PolicyChange) {
	for _, change := range changes {
		switch {
		case change.Withholds:
			found = &change.PolicyChange
		case change.Effect == api.EffectRevoked && change.lacked():
			return nil
		}
	}
	return found
}
