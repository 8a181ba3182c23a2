package agent

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"perceptd/agent/api"
	"perceptd/tokencache"
)

// cachedKey is a key of the cache under the name that its identity is configured by.
type cachedKey struct {
	identity string
	tokencache.Status
	refused time.Time // when a caller last reported that a resource refused the token held; zero: never
}

// Status returns the agent's part of the status, ordered by identity and resource.
func (a *Agent) Status() api.Status {
	rules := a.rules.Load()
	s := api.Status{
		Ready: rules.NoRules == "", Identities: a.identities(rules), Tokens: []api.TokenStatus{}, Changes: a.Changes(),
		Requests: a.Counts(), Denials: a.recentDenials(rules), Clock: clockStatusOf(a.cache.ClockStatus()),
	}
	denied := a.DenyStatus()
	s.Deny = &denied
	switch {
	case denied.Lost != "":
		s.Trouble = append(s.Trouble, "every request is refused: "+denied.Lost)
	case denied.Missing != "":
		s.Trouble = append(s.Trouble, denied.Missing+"; "+denied.Mend)
	}
	keys := a.cachedKeys(rules)
	for _, key := range keys {
		status := tokenStatusOf(key)
		status.Denied = rules.deniesAll(key.Key)
		s.Tokens = append(s.Tokens, status)
		if key.Prefetch && key.Left == 0 {
			s.Ready = false
		}
		s.Simulated = s.Simulated || key.Left > 0 && key.Claims.Simulated()
		if trouble := key.trouble(); trouble != "" {
			s.Trouble = append(s.Trouble, trouble)
		}
	}
	s.Trouble = append(s.Trouble, oddities(keys)...)
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
	s.Trouble = append(s.Trouble, a.deny.trouble()...)
	switch {
	case rules.NoRules != "":
		s.Trouble = append(s.Trouble, noRulesError(rules.NoRules).Detail)
	case len(rules.Grants) == 0:
		s.Trouble = append(s.Trouble, "no [[grant]] is configured: every caller is denied")
	}
	return s
}

// identities returns the configured identities, how many grants name each, and whom its tokens speak for.
func (a *Agent) identities(rules *ruleset) []api.IdentityStatus {
	principals := make(map[tokencache.Selector]api.Principal)
	for _, p := range a.cache.Principals() {
		principals[p.Selector] = api.Principal(p.Current)
	}
	all := []api.IdentityStatus{}
	for _, identity := range rules.Identities {
		status := api.IdentityStatus{Name: identity.Name, Default: identity.Default && identity.Fault == "",
			Selector: identity.Selector().String(), Place: identity.Place, Fault: identity.Fault}
		if !identity.IsSelectorKnown() {
			status.Selector = "not understood"
		}
		for _, grant := range rules.Grants {
			if grant.Identity == identity.Name {
				status.Grants++
			}
		}
		principal := principals[identity.Selector()]
		if identity.IsSelectorKnown() && principal != (api.Principal{}) {
			status.Principal = &principal
		}
		all = append(all, status)
	}
	return all
}

func (a *Agent) cachedKeys(rules *ruleset) []cachedKey {
	var keys []cachedKey
	for _, key := range a.cache.Status() {
		if identity := rules.IdentityOf(key.Key); identity != nil { // else a reload has just dropped it
			keys = append(keys, cachedKey{identity.Name, key, a.reports.refusedOn(key.Key, key.SHA256)})
		}
	}
	slices.SortFunc(keys, func(x, y cachedKey) int {
		return strings.Compare(x.identity+"\x00"+x.Key.Resource, y.identity+"\x00"+y.Key.Resource)
	})
	return keys
}

// trouble returns what a technician should look at, or "".
func (k cachedKey) trouble() string {
	name := k.name()
	switch {
	case !tokenStatusOf(k).InTrouble():
		return ""
	case k.Left == 0:
		return fmt.Sprintf("no token of %s: %v", name, k.LastError)
	}
	return fmt.Sprintf("refreshing %s failed %d times, its token is good for another %v: %v",
		name, k.Failures, k.Left.Round(time.Second), k.LastError)
}
