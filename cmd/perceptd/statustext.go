package main

import (
	"fmt"
	"strings"
	"time"

	"perceptd/agent"
	"perceptd/tokencache"
)

// statusText is what systemctl status shows of the daemon: trouble first, then what it holds.
func statusText(s agent.Status, simulatedBackEnd bool, trouble []string) string {
	var parts []string
	if simulatedBackEnd {
		parts = append(parts, "SIMULATED")
	}
	trouble = append(trouble, s.Trouble...)
	switch len(trouble) {
	case 0:
	case 1:
		parts = append(parts, "trouble: "+trouble[0])
	default:
		parts = append(parts, fmt.Sprintf("trouble: %s (and %d more, see perceptctl status)", trouble[0], len(trouble)-1))
	}
	valid, withheld := 0, 0
	var next time.Time
	for _, key := range s.Keys {
		if key.Left > 0 {
			valid++
		}
		if key.Permissions.Withheld {
			withheld++
		}
		if key.State != tokencache.Idle && !key.NextRefresh.IsZero() && (next.IsZero() || key.NextRefresh.Before(next)) {
			next = key.NextRefresh
		}
	}
	held := fmt.Sprintf("%s, %s", count(len(s.Identities), "identity", "identities"), count(valid, "token", "tokens"))
	if s.Stale > 0 {
		held += fmt.Sprintf(", %d stale", s.Stale)
	}
	if withheld > 0 {
		held += fmt.Sprintf(" (%d withheld)", withheld)
	}
	if !next.IsZero() {
		held += ", next refresh " + next.UTC().Format("Jan 2 15:04 UTC")
	}
	return strings.Join(append(parts, held), "; ")
}

func count(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}
