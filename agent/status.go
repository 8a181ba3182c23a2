package agent

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"perceptd/agent/api"
	"perceptd/agent/grants"
	"perceptd/tokencache"
)

// Status is what a technician may know: no token text is in it.
type Status struct {
	Ready      bool     // every token that is to be prefetched is there
	Trouble    []string // what needs a person, in sentences
	Identities []IdentityStatus
	Keys       []KeyStatus
	Counts     Counts
	Changes    []api.PolicyChange // policy changes on record, the latest first
	Stale      int                // valid tokens whose permissions are not current
	Denials    []Denial           // the latest denials, the latest first
	Clock      tokencache.ClockStatus
}

// Simulated reports whether a token that is held says that a simulated back end made it.
func (s *Status) Simulated() bool {
	return slices.ContainsFunc(s.Keys, func(k KeyStatus) bool { return k.Left > 0 && k.Claims.Simulated() })
}

// IdentityStatus is a configured identity and the number of grants that name it.
type IdentityStatus struct {
	grants.Identity
	Grants int

	Principal tokencache.Principal // that its tokens speak for; zero: none has said so
}

// KeyStatus is a cached key under the name that its identity is configured by.
type KeyStatus struct {
	Identity string
	tokencache.Status

	// Refused is when a caller last reported that a resource refused the token held; zero: nobody did.
	Refused time.Time
}

// RefreshResult says what one refresh brought.
type RefreshResult struct {
	Identity, Resource string
	Outcome            tokencache.Outcome
	Err                error // with tokencache.Failed
}

// Status returns the state of everything, ordered by identity and resource.
func (a *Agent) Status() Status {
	rules := a.rules.Load()
	s := Status{Ready: true, Counts: a.Counts(), Changes: a.Changes(), Denials: a.audit.recentDenials(), Clock: a.cache.ClockStatus()}
	principals := make(map[tokencache.Selector]tokencache.Principal)
	for _, p := range a.cache.Principals() {
		principals[p.Selector] = p.Current
	}
	for _, identity := range rules.Identities {
		grants := 0
		for _, grant := range rules.Grants {
			if grant.Identity == identity.Name {
				grants++
			}
		}
		s.Identities = append(s.Identities, IdentityStatus{Identity: identity, Grants: grants, Principal: principals[identity.Selector()]})
	}
	for _, key := range a.cache.Status() {
		identity := rules.IdentityOf(key.Key)
		if identity == nil {
			continue // dropped by a reload between the two looks
		}
		s.Keys = append(s.Keys, KeyStatus{Identity: identity.Name, Status: key, Refused: a.reports.refusedOn(key.Key, key.SHA256)})
		if key.Left > 0 && key.Permissions.State != tokencache.Current {
			s.Stale++
		}
		if key.Prefetch && key.Left == 0 {
			s.Ready = false
		}
	}
	slices.SortFunc(s.Keys, func(x, y KeyStatus) int {
		return strings.Compare(x.Identity+"\x00"+x.Key.Resource, y.Identity+"\x00"+y.Key.Resource)
	})
	for _, key := range s.Keys {
		if trouble := key.trouble(); trouble != "" {
			s.Trouble = append(s.Trouble, trouble)
		}
	}
	s.Trouble = append(s.Trouble, oddities(s.Keys)...)
	for _, change := range s.Changes {
		if change.Record == api.RecordLost {
			s.Trouble = append(s.Trouble, lostTrouble(change))
		}
		if change.Joined > 0 {
			s.Trouble = append(s.Trouble, joinedTrouble(change))
		}
	}
	s.Trouble = append(s.Trouble, a.changeSaver.trouble(a.snapshotSaver.outlives(false))...)
	s.Trouble = append(s.Trouble, a.snapshotSaver.trouble()...)
	if len(rules.Grants) == 0 {
		s.Trouble = append(s.Trouble, "no [[grant]] is configured: every caller is denied")
	}
	return s
}

// trouble returns what a technician should look at, or "". A single failed refresh of a token with
// much life left is weather, not trouble.
func (k KeyStatus) trouble() string {
	name := k.name()
	switch {
	case k.LastOutcome != tokencache.Failed:
		return ""
	case k.Left == 0:
		return fmt.Sprintf("no token of %s: %v", name, k.LastError)
	case k.Failures > 2 || k.Left < time.Hour:
		return fmt.Sprintf("refreshing %s failed %d times, its token is good for another %v: %v",
			name, k.Failures, k.Left.Round(time.Second), k.LastError)
	}
	return ""
}
