package explain

import (
	"cmp"
	"slices"
	"strconv"
	"strings"
	"time"

	"perceptd/agent/api"
)

// RulesOn returns the deny rules that deny a token to some caller now, or to all: first those that deny
// everything, among each kind the latest first.
func RulesOn(d *api.DenyStatus, token api.TokenStatus) []api.DenyRule {
	return slices.DeleteFunc(d.InForce(), func(rule api.DenyRule) bool {
		return rule.Idle != "" || !Covers(rule, token.Identity, token.Resource)
	})
}

// Covers reports whether a deny rule is about an identity's token for a resource: it denies that to the callers that it
// names, or to all where it names none. It compares as the daemon does.
func Covers(rule api.DenyRule, identity, resource string) bool {
	return rule.All || (rule.Identity == "" || rule.Identity == identity) &&
		rule.IsForResource(resource, rule.Resources)
}

// NamesCaller reports whether a deny rule is about some callers only.
func NamesCaller(rule api.DenyRule) bool {
	return rule.Module != "" || rule.Unit != "" || rule.User != ""
}

// DeniedToAll reports whether no caller whatever gets a token, by a deny rule or since their record is lost.
func DeniedToAll(d *api.DenyStatus, token api.TokenStatus) bool {
	isForAll := func(rule api.DenyRule) bool { return !NamesCaller(rule) }
	return d.IsLost() || slices.ContainsFunc(RulesOn(d, token), isForAll)
}

func (t explainer) deniedToAll() bool { return DeniedToAll(t.deny, t.token) }

// denied lists the deny rules that take the token from some callers or from all.
func (t explainer) denied() []string {
	var texts []string
	if t.deny.IsLost() {
		texts = append(texts, "What is denied is not known: "+t.deny.Lost+".")
	}
	rules := RulesOn(t.deny, t.token)
	for _, rule := range rules[:min(ShownChanges, len(rules))] {
		texts = append(texts, capitalized(t.DenyText(t.now, rule))+" (ID "+rule.ID+").")
	}
	if more := len(rules) - ShownChanges; more > 0 {
		texts = append(texts, "There are "+Counted(more, "more rule")+": perceptctl deny lists them.")
	}
	return texts
}

// othersDenied says that some callers get less than others, or ""; behind said, what modules get.
func (t explainer) othersDenied(said string) string {
	if t.deniedToAll() || len(RulesOn(t.deny, t.token)) == 0 {
		return ""
	}
	text := "Callers that a deny rule names, as above, are refused (403, denied)."
	if !strings.Contains(said, NotRecalled) {
		text += " " + NotRecalled
	}
	return text
}

// endDenial says who ends what denies the token to everybody.
func (t explainer) endDenial() string {
	if t.deny.IsLost() {
		return cmp.Or(t.deny.Mend, LostNext) + "."
	}
	return t.endDenialBy(func(rule api.DenyRule) bool { return !NamesCaller(rule) })
}

// endSomeDenials says who ends what denies the token to some callers, or "".
func (t explainer) endSomeDenials() string {
	if t.deniedToAll() {
		return ""
	}
	return t.endDenialBy(NamesCaller)
}

// endDenialBy says who ends what the rules of a kind deny, or "".
func (t explainer) endDenialBy(isOfKind func(api.DenyRule) bool) string {
	var ids []string
	byHub := false
	for _, rule := range RulesOn(t.deny, t.token) {
		switch {
		case !isOfKind(rule):
		case IsOfHub(rule):
			byHub = true
		default:
			ids = append(ids, rule.ID)
		}
	}
	text := ""
	if len(ids) > 0 {
		text = "When the denial is over: perceptctl deny lift " + strings.Join(ids, " ") + "."
	}
	if byHub {
		text += " What IoT Hub denies is lifted in IoT Hub; where that cannot be: sudo perceptctl deny lift --from-hub."
	}
	return strings.TrimSpace(text)
}

// LostNext is what ends the denial of everything that a lost record of deny rules causes, whatever the hub does.
const LostNext = "sudo perceptctl deny forget-lost ends that: what was on the lost record then denies nothing"

// SetBy says who set a deny rule: "IoT Hub, version 12 of the twin of hub.example/percept-7", "IoT Hub, direct method
// to hub.example/percept-7", "uid 0 (pid 7)". This device may have another identity by now, and a module has a twin of
// its own beside the device's.
func SetBy(rule api.DenyRule) string {
	of, _, _ := strings.Cut(strings.TrimPrefix(rule.By, "iothub "), " ")
	switch {
	case rule.Origin == api.DenyTwin && of != "" && rule.Twin > 0:
		return "IoT Hub, version " + strconv.FormatInt(rule.Twin, 10) + " of the twin of " + of
	case rule.Origin == api.DenyTwin && of != "":
		return "IoT Hub, the twin of " + of
	case rule.Origin == api.DenyTwin && rule.Twin > 0:
		return "IoT Hub, twin version " + strconv.FormatInt(rule.Twin, 10)
	case rule.Origin == api.DenyTwin:
		return "IoT Hub, twin"
	case rule.Origin == api.DenyMethod && of != "":
		return "IoT Hub, direct method to " + of
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

// NoRoom says how many entries of the twin's deny have no room, and deny nothing, or "".
func NoRoom(d api.DesiredStatus) string {
	switch d.NoRoom {
	case 0:
		return ""
	case 1:
		return "one entry of its deny has no room, and denies nothing"
	}
	return strconv.Itoa(d.NoRoom) + " entries of its deny have no room, and deny nothing"
}

// DeniesAllTheSame says how many deny entries of a refused version of the twin are in force, as a clause behind "; ",
// or "".
func DeniesAllTheSame(d api.DesiredStatus) string {
	switch {
	case d.Refused == "" || d.Denies == 0:
		return ""
	case d.Denies == 1:
		return "; one entry of its deny is in force all the same"
	}
	return "; " + strconv.Itoa(d.Denies) + " entries of its deny are in force all the same"
}
