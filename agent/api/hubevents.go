package api

import "time"

// HubEventType says what happened. It is a property of the message too, so that IoT Hub can route by it.
type HubEventType string

const (
	HubEventTokenTrouble      HubEventType = "token_trouble_begun"
	HubEventTokenTroubleEnded HubEventType = "token_trouble_ended"
	HubEventCurrent           HubEventType = "permissions_current" // a token carries a policy change that it lacked
	HubEventDenials           HubEventType = "denials_burst"       // many requests were denied within a few minutes
	HubEventClockTrouble      HubEventType = "clock_trouble_begun"
	HubEventClockTroubleEnded HubEventType = "clock_trouble_ended"
	HubEventDenyRuleSet       HubEventType = "deny_rule_set" // but for the twin's, of which the twin says itself
	HubEventDenyRuleLifted    HubEventType = "deny_rule_lifted"
	HubEventDenyRulesLost     HubEventType = "deny_rules_lost" // the record of deny rules cannot be read
	HubEventDenyRulesKnown    HubEventType = "deny_rules_known"
	HubEventSetAside          HubEventType = "hub_set_aside" // root on the device has set aside what the hub sets
	HubEventHeeded            HubEventType = "hub_heeded"
	HubEventSuppressed        HubEventType = "events_suppressed"
)

// HubSeverity says how much a person needs to know of an event.
type HubSeverity string

const (
	SeverityError   HubSeverity = "error"
	SeverityWarning HubSeverity = "warning"
	SeverityInfo    HubSeverity = "info"
)

// HubEvent is the body of a device-to-cloud message: JSON, less than 1 KB. What does not apply is absent.
type HubEvent struct {
	Type     HubEventType `json:"type"`
	Severity HubSeverity  `json:"severity"`
	At       time.Time    `json:"at"` // by the device's clock
	Identity string       `json:"identity,omitempty"`
	Resource string       `json:"resource,omitempty"`
	Change   string       `json:"change,omitempty"` // ID of the policy change
	Rule     string       `json:"rule,omitempty"`   // ID of the deny rule
	Count    int64        `json:"count,omitempty"`  // denials, or events that were not sent
	Detail   string       `json:"detail,omitempty"` // in words; long ones are cut
}
