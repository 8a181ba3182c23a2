package agent

import (
	"perceptd/agent/api"
	"perceptd/agent/grants"
)

// recentDenials returns the latest denials for administrators, the latest first, with what helps by these rules.
func (a *Agent) recentDenials(rules *ruleset) []api.Denial {
	all := []api.Denial{}
	for _, entry := range a.audit.recentDenials() {
		denial := entry.Denial
		if denial.Code == api.CodeNotGranted || denial.Code == api.CodeFaultyGrant {
			d := rules.Decide(&entry.caller, entry.request)
			denial.NearMiss, denial.GrantedNow = NearMissOf(d.NearMiss, false), d.Allowed
			if d.Denial != nil {
				denial.Suggestion = SuggestionOf(d.Denial.Suggestion, false)
			}
		}
		all = append(all, denial)
	}
	return all
}

// DenialsOf returns the latest denials of a caller that the grants in force deny still, the latest first, as the caller
// may know them: not those of other users' processes in the same service, container or module.
func (a *Agent) DenialsOf(caller grants.Caller) []api.Denial {
	rules, key := a.rules.Load(), auditKeyOf(&caller)
	var all []api.Denial
	for _, entry := range a.audit.recentDenials() {
		if entry.auditKey != key || entry.processUID != caller.UID || entry.Code != api.CodeNotGranted {
			continue
		}
		_, refusal := rules.Authorize(&caller, entry.request)
		if refusal == nil || refusal.Err != grants.ErrNotGranted {
			continue
		}
		denial := entry.Denial
		denial.Caller, denial.Reason = caller.String(), refusal.Detail
		denial.NearMiss = NearMissOf(refusal.NearMiss, true)
		denial.Suggestion = SuggestionOf(refusal.Suggestion, true)
		all = append(all, denial)
	}
	return all
}
