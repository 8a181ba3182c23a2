package main

import (
	"fmt"
	"time"

	"perceptd/agent/api"
	"perceptd/agent/explain"
	"perceptd/cmd/perceptctl/term"
)

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
	case !explain.IsCurrent(token):
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

// effects lists the effects of policy changes, each with what perceptd does about it.
const effects = `granted  more is permitted: tokens at hand are served on, labelled as not current
revoked  less is permitted: they are withheld until newer ones arrive, which can
         take a day and four hours
changed  both, or it is not known: as granted`

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
