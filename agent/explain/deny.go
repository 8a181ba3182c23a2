package explain

import (
	"slices"
	"strconv"
	"time"

	"perceptd/agent/api"
	"perceptd/tokencache"
)

// RulesInForce returns the deny rules that deny something now, the latest first: those that are not set aside.
func RulesInForce(d *api.DenyStatus) []api.DenyRule {
	if d == nil {
		return nil
	}
	return slices.DeleteFunc(slices.Clone(d.Rules), func(rule api.DenyRule) bool { return rule.SetAside })
}

// RulesOn returns the deny rules in force that deny a token to some caller, or to all, the latest first.
func RulesOn(d *api.DenyStatus, token api.TokenStatus) []api.DenyRule {
	return slices.DeleteFunc(RulesInForce(d), func(rule api.DenyRule) bool { return !Covers(rule, token) })
}

// Covers reports whether a deny rule denies a token to the callers that it names, or to all where it names none.
func Covers(rule api.DenyRule, token api.TokenStatus) bool {
	return rule.All || (rule.Identity == "" || rule.Identity == token.Identity) &&
		(rule.Resource == "" || tokencache.Canonical(rule.Resource) == tokencache.Canonical(token.Resource))
}

// NamesCaller reports whether a deny rule is about some callers only.
func NamesCaller(rule api.DenyRule) bool {
	return rule.Module != "" || rule.Unit != "" || rule.User != ""
}

// DeniedToAll reports whether no caller whatever gets a token, by a deny rule or since their record is lost.
func DeniedToAll(d *api.DenyStatus, token api.TokenStatus) bool {
	return d != nil && d.Lost != "" ||
		slices.ContainsFunc(RulesOn(d, token), func(rule api.DenyRule) bool { return !NamesCaller(rule) })
}

// SetBy says who set a deny rule: "IoT Hub, twin version 12", "IoT Hub, direct method", "uid 0 (pid 7)".
func SetBy(rule api.DenyRule) string {
	switch {
	case rule.Origin == api.DenyTwin && rule.Twin > 0:
		return "IoT Hub, twin version " + strconv.FormatInt(rule.Twin, 10)
	case rule.Origin == api.DenyTwin:
		return "IoT Hub, twin"
	case rule.Origin == api.DenyMethod:
		return "IoT Hub, direct method"
	case rule.By == "":
		return "this device"
	}
	return rule.By
}

// IsOfHub reports whether IoT Hub has set a deny rule, by the twin or by a direct method.
func IsOfHub(rule api.DenyRule) bool {
	return rule.Origin == api.DenyTwin || rule.Origin == api.DenyMethod
}

// DenyText writes a deny rule as a clause: "module vision, since 12:20 (40m ago) by uid 0 (pid 7): stolen".
func (s Times) DenyText(now time.Time, rule api.DenyRule) string {
	text := rule.String() + ", since " + s.AtRelative(now, rule.Since) + " by " + SetBy(rule)
	if rule.Note != "" {
		text += ": " + rule.Note
	}
	return text
}
