package agent

import (
	"fmt"
	"time"

	"perceptd/agent/api"
	"perceptd/agent/deny"
	"perceptd/agent/grants"
)

// deniedError says which rule takes a token away, and how it is lifted.
func deniedError(rule *deny.Rule, caller *grants.Caller, identity *grants.Identity, resource string) *Error {
	note := ""
	if rule.Note != "" {
		note = fmt.Sprintf(" (%s)", rule.Note)
	}
	why := fmt.Sprintf("%s denies %v since %s%s", setBy(rule), rule.Target, formatTime(rule.Since), note)
	if unknown := rule.Unknown(caller); unknown != "" {
		why += fmt.Sprintf("; the caller's %s is not known on the loopback listener, and may be that one: on the "+
			"token socket it is known", unknown)
	}
	return &Error{
		Code: api.CodeDenied, forAudit: fmt.Sprintf("deny rule %s: %s", rule.ID, why),
		Detail: fmt.Sprintf(
			"a deny rule takes tokens of identity %q for %s away from %v, whatever the grants allow: %s; %s",
			identity.Name, resource, *caller, why, liftedHow(*rule)),
	}
}

// setBy says which side set a rule.
func setBy(rule *deny.Rule) string {
	switch rule.Origin {
	case deny.Twin:
		return fmt.Sprintf("%s in IoT Hub, version %d,", twinOf(rule), rule.Twin)
	case deny.Method:
		return "a direct method from IoT Hub"
	}
	return "an administrator of this device"
}

// twinOf names the twin that set a rule, which may be a module's, or of an identity that this device had before.
func twinOf(rule *deny.Rule) string {
	if rule.Hub == "" {
		return "this device's twin"
	}
	return "the twin of " + rule.Hub
}

// liftedHow says what lifts a rule.
func liftedHow(rule deny.Rule) string {
	const aside = "where that cannot be, root can set the hub aside: perceptctl deny lift --from-hub"
	switch rule.Origin {
	case deny.Twin:
		return "take it out of percept.deny in the desired properties of that twin to lift it; " + aside
	case deny.Method:
		return fmt.Sprintf("the direct method percept.deny with \"lift\": %q lifts it; %s", rule.ID, aside)
	}
	return "perceptctl deny lift " + rule.ID + " on this device lifts it"
}

// lostError is what every request is answered while it is not known what is denied.
func lostError(why string) *Error {
	return &Error{Code: api.CodeDenyRulesLost, RetryAfter: lostRetryAfter, Detail: fmt.Sprintf(
		"which tokens are denied on this device is not known, so that none is handed out: %s; %s", why, lostMend)}
}

// lostRetryAfter is when to ask again while a record is lost: the hub may have answered by then.
const lostRetryAfter = 5 * time.Second

// missingMend says what a person does when rules are gone with a lost record.
func missingMend(m *deny.Missing) string {
	if m.Unread {
		return "mend that, and meanwhile deny again what is to stay denied; root can end this note with perceptctl " +
			"deny forget-lost"
	}
	return "deny again what is to stay denied, and then, as root: perceptctl deny forget-lost"
}

// lostMend says what ends that a record is lost.
const lostMend = "it ends when IoT Hub has answered, where [iothub] is configured and not set aside; else deny again " +
	"what is to stay denied, and then, as root: perceptctl deny forget-lost"
