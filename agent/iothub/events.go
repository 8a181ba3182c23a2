package iothub

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"perceptd/agent/api"
	"perceptd/agent/explain"
)

const (
	// denialsBurst denials within denialsWindow are a burst.
	denialsBurst  = 20
	denialsWindow = 5 * time.Minute
	// sampleEvery is how far apart the remembered counts of denials are.
	sampleEvery = 15 * time.Second
	// clockPatience is how long a clock is not known to be right, as while a device starts, before that is trouble.
	clockPatience = 5 * time.Minute
	// clockTolerance is by how many seconds a clock may differ from the back end's.
	clockTolerance = 5 * 60
)

// tokenKey is a token as the status names it.
type tokenKey struct{ identity, resource string }

func (k tokenKey) compare(other tokenKey) int {
	return cmp.Or(strings.Compare(k.identity, other.identity), strings.Compare(k.resource, other.resource))
}

// denialCount is how many denials there had been at a time.
type denialCount struct {
	at    time.Duration
	count int64
}

// watched is what is remembered of a status, to see what has happened by the next. The zero value is before the first.
type watched struct {
	begun   bool
	trouble map[tokenKey]bool
	lacked  map[tokenKey][]string // IDs of the policy changes that the token held may lack

	denials []denialCount // of the last denialsWindow, the oldest first
	burst   bool

	clockWrong   bool
	clockSince   time.Duration // with clockWrong
	clockTrouble bool

	rules map[string]string // deny rules that are not the twin's, in words, by ID
	lost  bool
	aside bool
}

// next returns what is remembered of a status, and what has happened since w. at is when the status was taken, by a
// clock that is never set. Of what is so already when the first status is taken, trouble alone is an event.
func (w watched) next(status api.Status, at time.Duration) (watched, []api.HubEvent) {
	n := watched{begun: true}
	var events []api.HubEvent
	add := func(e api.HubEvent) {
		e.At = status.Now
		events = append(events, e)
	}
	n.tokens(w, status, add)
	n.current(w, status, add)
	n.denied(w, status, at, add)
	n.clock(w, status, at, add)
	n.denyRules(w, status, add)
	return n, events
}

// tokens notes where trouble with tokens has begun, and ended.
func (n *watched) tokens(w watched, status api.Status, add func(api.HubEvent)) {
	n.trouble = make(map[tokenKey]bool)
	there := make(map[tokenKey]bool)
	for _, token := range status.Tokens {
		key := tokenKey{token.Identity, token.Resource}
		there[key] = true
		if !token.InTrouble() {
			continue
		}
		n.trouble[key] = true
		if w.trouble[key] {
			continue
		}
		e := api.HubEvent{Type: api.HubEventTokenTrouble, Severity: api.SeverityWarning,
			Identity: key.identity, Resource: key.resource, Detail: token.LastError}
		if token.ExpiresIn == 0 {
			e.Severity = api.SeverityError
		}
		add(e)
	}
	for _, key := range slices.SortedFunc(maps.Keys(w.trouble), tokenKey.compare) {
		if n.trouble[key] {
			continue
		}
		e := api.HubEvent{Type: api.HubEventTokenTroubleEnded, Severity: api.SeverityInfo,
			Identity: key.identity, Resource: key.resource}
		if !there[key] {
			e.Detail = "nobody is to have this token any more"
		}
		add(e)
	}
}

// current notes which tokens carry policy changes now that they lacked before. A change that was withdrawn is no event.
func (n *watched) current(w watched, status api.Status, add func(api.HubEvent)) {
	onRecord := make(map[string]api.PolicyChange)
	for _, change := range status.Changes {
		onRecord[change.ID] = change
	}
	n.lacked = make(map[tokenKey][]string)
	for _, token := range status.Tokens {
		key := tokenKey{token.Identity, token.Resource}
		standing := make(map[string]api.PermissionState)
		for _, change := range token.Changes {
			standing[change.ID] = change.State
			if (explain.TokenChange{State: change.State}).Lacked() {
				n.lacked[key] = append(n.lacked[key], change.ID)
			}
		}
		for _, id := range w.lacked[key] {
			change, recorded := onRecord[id]
			state, listed := standing[id]
			if !listed && token.MoreChanges > 0 && explain.IsCurrent(token) {
				state = token.Permissions.State // of many, those that the token may lack are listed first
			}
			switch {
			case !recorded || slices.Contains(n.lacked[key], id):
			case state == api.PermissionsCurrent:
				add(api.HubEvent{Type: api.HubEventCurrent, Severity: api.SeverityInfo, Identity: key.identity,
					Resource: key.resource, Change: id, Detail: fmt.Sprintf("carries what was %s on %s", change.Effect,
						change.At.UTC().Format(time.RFC3339))})
			default: // there is no valid token now
				n.lacked[key] = append(n.lacked[key], id)
			}
		}
	}
}

// denied notes that a burst of denials has begun.
func (n *watched) denied(w watched, status api.Status, at time.Duration, add func(api.HubEvent)) {
	count := status.Requests.Denied
	recent := slices.DeleteFunc(slices.Clone(w.denials), func(c denialCount) bool { return at-c.at > denialsWindow })
	if len(recent) == 0 || at-recent[len(recent)-1].at >= sampleEvery {
		recent = append(recent, denialCount{at, count})
	}
	n.denials = recent
	within := count - recent[0].count
	n.burst = within >= denialsBurst
	if !n.burst || w.burst {
		return
	}
	e := api.HubEvent{Type: api.HubEventDenials, Severity: api.SeverityWarning, Count: within}
	if len(status.Denials) > 0 {
		latest := status.Denials[0]
		e.Identity, e.Resource = latest.Identity, latest.Resource
		e.Detail = "the latest: " + latest.Caller + ": " + latest.Reason
	}
	add(e)
}

// clock notes that trouble with the clock has begun, or ended.
func (n *watched) clock(w watched, status api.Status, at time.Duration, add func(api.HubEvent)) {
	off := status.Clock.Skew != nil && max(*status.Clock.Skew, -*status.Clock.Skew) >= clockTolerance
	n.clockWrong = !status.Clock.Known || off
	n.clockSince = at
	if w.clockWrong {
		n.clockSince = w.clockSince
	}
	n.clockTrouble = n.clockWrong && (w.clockTrouble || at-n.clockSince >= clockPatience)
	switch {
	case n.clockTrouble && !w.clockTrouble:
		e := api.HubEvent{Type: api.HubEventClockTrouble, Severity: api.SeverityWarning,
			Detail: "the clock is not known to be right"}
		if off {
			e.Detail = fmt.Sprintf("the clock is %d s ahead of the back end's", *status.Clock.Skew)
		}
		add(e)
	case w.clockTrouble && !n.clockTrouble:
		add(api.HubEvent{Type: api.HubEventClockTroubleEnded, Severity: api.SeverityInfo})
	}
}

// denyRules notes which rules have come and gone, whether their record was lost or is known again, and whether root has
// set the hub aside or heeds it again.
func (n *watched) denyRules(w watched, status api.Status, add func(api.HubEvent)) {
	n.rules = make(map[string]string)
	var deny api.DenyStatus
	if status.Deny != nil {
		deny = *status.Deny
	}
	n.lost, n.aside = deny.Lost != "", !deny.HubSetAsideOn.IsZero()
	for _, rule := range deny.Rules {
		if rule.Origin == api.DenyTwin {
			continue
		}
		n.rules[rule.ID] = fmt.Sprintf("%v, set by %s", rule.DenyTarget, rule.By)
		if _, known := w.rules[rule.ID]; w.begun && !known && !w.lost {
			add(api.HubEvent{Type: api.HubEventDenyRuleSet, Severity: api.SeverityWarning, Rule: rule.ID,
				Identity: rule.Identity, Resource: rule.Resource, Detail: n.rules[rule.ID]})
		}
	}
	for _, id := range slices.Sorted(maps.Keys(w.rules)) {
		if _, still := n.rules[id]; !still && !n.lost {
			add(api.HubEvent{Type: api.HubEventDenyRuleLifted, Severity: api.SeverityInfo, Rule: id,
				Detail: w.rules[id]})
		}
	}
	switch {
	case n.lost && !w.lost:
		add(api.HubEvent{Type: api.HubEventDenyRulesLost, Severity: api.SeverityError, Detail: deny.Lost})
	case w.lost && !n.lost:
		e := api.HubEvent{Type: api.HubEventDenyRulesKnown, Severity: api.SeverityInfo}
		if deny.AreMissing() {
			e.Severity, e.Detail = api.SeverityWarning, deny.Missing
		}
		add(e)
	}
	switch {
	case w.begun && n.aside && !w.aside:
		add(api.HubEvent{Type: api.HubEventSetAside, Severity: api.SeverityWarning})
	case w.aside && !n.aside:
		add(api.HubEvent{Type: api.HubEventHeeded, Severity: api.SeverityInfo})
	}
}
