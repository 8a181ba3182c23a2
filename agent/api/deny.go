package api

import (
	"time"

	"perceptd/agent/deny"
)

// PathDeny is on the admin socket: GET lists the deny rules, POST adds one, DELETE ?id= lifts one. DELETE ?from=hub sets
// aside all that IoT Hub has set, POST ?from=hub takes that back, and DELETE ?lost=true ends the denial of everything
// that a lost record causes; for these three the caller is root.
const PathDeny = "/v1/deny"

const (
	// CodeDenied is 403: a deny rule takes the token away, whatever the grants allow.
	CodeDenied Code = "denied"
	// CodeDenyRulesLost is 503: the record of deny rules is lost, and what was on it is not known yet.
	CodeDenyRulesLost Code = "deny_rules_lost"
	// CodeUnknownDenyRule is 404: there is no deny rule of that ID.
	CodeUnknownDenyRule Code = "unknown_deny_rule"
)

// DenyTarget says which tokens a deny rule takes away.
type DenyTarget = deny.Target

// DenyOrigin is who set a deny rule, and so who lifts it.
type DenyOrigin = deny.Origin

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
	Origin   DenyOrigin `json:"origin"`
	Note     string     `json:"note,omitempty"`
	Since    time.Time  `json:"since"`               // when this device took it
	By       string     `json:"by,omitempty"`        // who: "uid 0 (pid 7)", or the hub's identity of this device
	Twin     int64      `json:"twin,omitempty"`      // with DenyTwin: the version of the desired properties that set it
	SetAside bool       `json:"set_aside,omitempty"` // root on this device has set aside what the hub sets: it denies nothing
	Idle     string     `json:"idle,omitempty"`      // why it matches nothing here now: what it names is not configured
}

// DenyStatus is the answer of GET /v1/deny, and part of the status.
type DenyStatus struct {
	Rules []DenyRule `json:"rules"` // the latest first

	// HubSetAsideOn is when root set aside what the hub sets; absent: nobody has.
	HubSetAsideOn time.Time `json:"hub_set_aside_on,omitzero"`

	// Lost is why the record of deny rules is not known: then every request is refused. Empty: it is known.
	Lost string `json:"lost,omitempty"`
	// Mend is what ends that, in a sentence.
	Mend string `json:"mend,omitempty"`
}
