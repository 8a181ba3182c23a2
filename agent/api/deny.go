package api

import (
	"slices"
	"time"

	"perceptd/agent/deny"
)

// Paths on the admin socket. On the last two the caller is root.
const (
	PathDeny     = "/v1/deny"      // GET lists deny rules, POST adds one, DELETE ?id= lifts one
	PathDenyHub  = "/v1/deny/hub"  // DELETE sets aside what IoT Hub denies, POST heeds it again
	PathDenyLost = "/v1/deny/lost" // DELETE ends what a lost record causes: denying all, or being shown
)

const (
	// CodeDenied is 403: a deny rule takes the token away, whatever the grants allow.
	CodeDenied Code = "denied"
	// CodeDenyRulesLost is 503: the record of deny rules is lost, and what was on it is not known yet.
	CodeDenyRulesLost Code = "deny_rules_lost"
	// CodeUnknownDenyRule is 404: there is no deny rule of that ID.
	CodeUnknownDenyRule Code = "unknown_deny_rule"
	// CodeTooManyDenyRules is 422: that side may set no more, and none of what it wanted is set.
	CodeTooManyDenyRules Code = "too_many_deny_rules"
	// CodeNotRoot is 403: that is for root on this device alone.
	CodeNotRoot Code = "not_root"
)

// MaxDenyRules is how many deny rules each side may set.
const MaxDenyRules = deny.MaxRules

// DenyTarget says which tokens a deny rule takes away.
type DenyTarget = deny.Target

// DenyOrigin is who set a deny rule, and so who lifts it; DenySide says of a hub's also as whom it knows this device.
type (
	DenyOrigin = deny.Origin
	DenySide   = deny.Side
)

const (
	DenyLocal  = deny.Local
	DenyTwin   = deny.Twin
	DenyMethod = deny.Method
)

// DenyRequest is the body of POST /v1/deny.
type DenyRequest struct {
	DenyTarget
	Note string `json:"note,omitempty"`
}

// DenyRule is a deny rule on record.
type DenyRule struct {
	ID string `json:"id"`
	DenyTarget
	Origin DenyOrigin `json:"origin"`
	Note   string     `json:"note,omitempty"`
	Since  time.Time  `json:"since"`          // when this device took it
	By     string     `json:"by,omitempty"`   // who: "uid 0 (pid 7)", or the hub's identity of this device
	Twin   int64      `json:"twin,omitempty"` // with DenyTwin: the version of the desired properties that set it
	// root on this device has set aside what the hub sets: it denies nothing
	SetAside bool   `json:"set_aside,omitempty"`
	Idle     string `json:"idle,omitempty"` // why it matches nothing here now: what it names is not configured

	// Resources are the canonical forms of all that goes by the name of the rule's resource here, itself included: they
	// are denied alike. Absent: it has no other names.
	Resources []string `json:"resources,omitempty"`
}

// DenyAnswer is the answer of POST and DELETE /v1/deny: the rule that they are about.
type DenyAnswer struct {
	DenyRule
	Now time.Time `json:"now"` // by the clock that the rule's time is of
}

// DenyRules is the answer of GET /v1/deny, and of a request to /v1/deny/hub and /v1/deny/lost: what holds after it.
type DenyRules struct {
	Now time.Time `json:"now"` // by the clock that the rules' times are of
	DenyStatus
}

// DenyStatus says what deny rules there are, and whether they are known.
type DenyStatus struct {
	Rules []DenyRule `json:"rules"` // the latest first

	// HubSetAsideOn is when root set aside what the hub sets; absent: nobody has.
	HubSetAsideOn time.Time `json:"hub_set_aside_on,omitzero"`

	// Lost is why the record of deny rules is not known: then every request is refused. Empty: it is known.
	Lost string `json:"lost,omitempty"`
	// Missing says which rules are gone, or not in force while the record cannot be read, since the twin took its
	// place, until root has acknowledged that (PathDenyLost). Tokens are handed out. Empty: none are.
	Missing string `json:"missing,omitempty"`
	// Mend is what ends Lost or Missing, in a sentence.
	Mend string `json:"mend,omitempty"`
}

// IsLost reports whether the record of deny rules is not known, so that every request is refused.
func (d *DenyStatus) IsLost() bool { return d != nil && d.Lost != "" }

// AreMissing reports whether deny rules are gone, and root has not acknowledged that.
func (d *DenyStatus) AreMissing() bool { return d != nil && d.Missing != "" }

// IsHubSetAside reports whether root on this device has set aside what the hub sets, so that nothing of it is heeded.
func (d *DenyStatus) IsHubSetAside() bool { return d != nil && !d.HubSetAsideOn.IsZero() }

// InForce returns the rules that are not set aside: those that deny everything, then the others that deny something
// now, then the idle ones; among each the latest first. A nil d has none.
func (d *DenyStatus) InForce() []DenyRule {
	if d == nil {
		return nil
	}
	rules := slices.DeleteFunc(slices.Clone(d.Rules), func(rule DenyRule) bool { return rule.SetAside })
	slices.SortStableFunc(rules, func(a, b DenyRule) int { return a.rank() - b.rank() })
	return rules
}

// rank is how little a rule denies now.
func (r DenyRule) rank() int {
	switch {
	case r.Idle != "":
		return 2
	case r.All:
		return 0
	}
	return 1
}

// DeniesAll reports whether a deny rule denies everything; it is then the first that is in force.
func (d *DenyStatus) DeniesAll() bool {
	rules := d.InForce()
	return len(rules) > 0 && rules[0].All && rules[0].Idle == ""
}
