package agent

import (
	"errors"
	"fmt"
	"slices"

	"go.uber.org/zap"

	"perceptd/agent/api"
	"perceptd/agent/deny"
)

// IDs of the journal's entries about deny rules. They never change.
const (
	MessageDenyRuleSet    = "7d2c40f1b9e54a6f8c13e0a95b6d7f28" // a deny rule takes tokens away
	MessageDenyRuleLifted = "e85b1f3c6a0d4972b4c8d27e019f5a63" // it does no longer
	MessageHubSetAside    = "3fa9c6d2804b4e17a5d1b07c92e86f4d" // root set aside what IoT Hub sets
	MessageHubHeeded      = "c1047eb85d2f4b39908a6ef3d75c2b16" // it is heeded again
)

// changeDenyRules puts what change makes of the record in force, if that differs, and sees to it that it is saved. The
// error is that of change, or that the record could not be saved, with done for what is in force all the same.
func (a *Agent) changeDenyRules(done string, change func(deny.Record) (deny.Record, error)) error {
	if err := a.enforceDenyRules(change); err != nil {
		return err
	}
	a.deny.handOverNow(a.log)
	return a.notKept(done, a.deny.saver.save())
}

// KeepDenyRules waits until the rules in force are on the disk. The error is an *Error with CodeNotKept.
func (a *Agent) KeepDenyRules() error {
	return a.notKept("what is denied is denied", a.deny.saver.keep())
}

// notKept is the error for what is in force, and could not be saved; nil: it could.
func (a *Agent) notKept(done string, why error) error {
	if why == nil {
		return nil
	}
	return &Error{Code: api.CodeNotKept, Detail: done + ", and not on the disk: " + a.deny.unkept(why)}
}

// enforceDenyRules puts what change makes of the record in force, if that differs. It waits for nothing.
func (a *Agent) enforceDenyRules(change func(deny.Record) (deny.Record, error)) error {
	a.deny.mu.Lock()
	after, err := change(a.deny.record)
	if err != nil {
		a.deny.mu.Unlock()
		return err
	}
	isNew := !after.Equal(a.deny.record)
	if isNew {
		a.enforceLocked(after)
	}
	a.deny.mu.Unlock()
	if isNew {
		a.cache.Wake()
		a.changed()
	}
	return nil
}

// Deny takes tokens away at once, whatever the grants allow. by says who wants that, for the log and the record. A rule
// of the same side that denies the same already is returned as it is. The error is an *Error; with CodeNotKept the rule
// is in force all the same, and returned.
func (a *Agent) Deny(by string, side api.DenySide, r api.DenyRequest) (api.DenyRule, error) {
	if err := CheckDeny(r); err != nil {
		return api.DenyRule{}, err
	}
	a.NoteHub(side.Hub)
	var set deny.Rule
	var known bool
	err := a.changeDenyRules("the rule is in force", func(record deny.Record) (deny.Record, error) {
		if side.Origin != deny.Local && record.IsSetAside(side.Hub) {
			return record, errHubSetAside(record)
		}
		id := newID()
		for _, taken := record.Find(id); taken; _, taken = record.Find(id) {
			id = newID()
		}
		after, rule, err := record.Add(deny.Rule{
			ID: id, Target: r.DenyTarget, Origin: side.Origin, Note: r.Note, Since: api.Time(a.clock.Wall()), By: by,
			Hub: side.Hub,
		})
		if err != nil {
			return record, tooManyDenyRules(err)
		}
		set, known = rule, rule.ID != id
		return after, nil
	})
	if !known && set.ID != "" {
		a.logDenyRule("deny rule set", by, set, MessageDenyRuleSet)
	}
	return a.describeDenyRule(set), err
}

// LiftDeny lifts a deny rule that the same side has set, and returns it as it was. by says who wants that, for the log.
// The error is an *Error; with CodeNotKept the rule is lifted all the same.
func (a *Agent) LiftDeny(by string, side api.DenySide, id string) (api.DenyRule, error) {
	var was deny.Rule
	err := a.changeDenyRules("the rule is lifted", func(record deny.Record) (deny.Record, error) {
		if side.Origin != deny.Local && record.IsSetAside(side.Hub) {
			return record, errHubSetAside(record)
		}
		after, rule, err := record.Lift(side.Origin, id)
		switch {
		case errors.Is(err, deny.ErrUnknown):
			return record, &Error{Code: api.CodeUnknownDenyRule, Detail: fmt.Sprintf(
				"no deny rule %q is on record", truncate(id, 64))}
		case err != nil:
			return record, badChange("deny rule %q is not lifted from here: %s", truncate(id, 64), liftedHow(rule))
		}
		was = rule
		return after, nil
	})
	if was.ID != "" {
		a.logDenyRule("deny rule lifted", by, was, MessageDenyRuleLifted)
	}
	return a.describeDenyRule(was), err
}

// TightenTwinDeny denies at once what the twin names besides what is denied already, as a notification says or a
// document of which the rest is wrong. It lifts nothing: SetTwinDeny does, when a document was read whole. hub is this
// device's identity there, and version that of the desired properties; whether a notification is an old one its callers
// see to. It waits for no disk: KeepDenyRules does, and what could not be kept is trouble in the status. Of more rules
// than there is room for those that fit deny, and noRoom is how many do not. The error is an *Error; then nothing was
// done.
func (a *Agent) TightenTwinDeny(hub string, targets []api.DenyRequest, version int64) (noRoom int, err error) {
	from := deny.HubSide{Hub: hub, Version: version}
	wanted, refusal := wantedRules(targets)
	if refusal != nil {
		return 0, refusal
	}
	err = a.changeTwinRules(func(record deny.Record) (deny.Record, error) {
		var after deny.Record
		after, noRoom = record.Tighten(from, wanted, api.Time(a.clock.Wall()))
		return after, nil
	}, from)
	return noRoom, err
}

// SetTwinDeny denies what the twin names, which was read whole, and lifts what it denied before and names no more. It
// ends that the record of deny rules is lost, unless root has set the hub aside: then the rules are kept and deny
// nothing. hub and version are as for TightenTwinDeny. What another identity of this device was set there is lifted.
// It waits for no disk either. The error is an *Error; then nothing was done.
func (a *Agent) SetTwinDeny(hub string, targets []api.DenyRequest, version int64) error {
	from := deny.HubSide{Hub: hub, Version: version}
	wanted, refusal := wantedRules(targets)
	if refusal != nil {
		return refusal
	}
	return a.changeTwinRules(func(record deny.Record) (deny.Record, error) {
		after, err := record.Replace(from, wanted, api.Time(a.clock.Wall()))
		if err == nil {
			a.deny.twinHub = hub
		}
		return after, err
	}, from)
}

// changeTwinRules changes the record as the twin wants it, and logs which rules came and went.
func (a *Agent) changeTwinRules(change func(deny.Record) (deny.Record, error), from deny.HubSide) error {
	var before, after deny.Record
	err := a.enforceDenyRules(func(record deny.Record) (deny.Record, error) {
		changed, err := change(record)
		if err != nil {
			return record, tooManyDenyRules(err)
		}
		before, after = record, changed
		return changed, nil
	})
	if err != nil {
		return err
	}
	a.deny.handOverSoon(a.hubLog)
	a.deny.saver.begin()
	a.logDifference("IoT Hub "+from.Hub, from.Version, before, after)
	a.logMissing(before, after)
	a.logMoved(before, after)
	return nil
}

// logMoved says that what hubs set is no longer set aside since this device has another identity, whose twin was read.
func (a *Agent) logMoved(before, after deny.Record) {
	if before.Aside == nil || after.Aside != nil {
		return
	}
	a.log.Warn("what IoT Hub sets is heeded again: this device has another identity there than when root set it aside",
		zap.String("by", "IoT Hub "+after.Hub), zap.Strings("set_aside", before.Aside.Hubs),
		zap.String("set_aside_on", formatTime(before.Aside.On)), zap.String("set_aside_by", before.Aside.By),
		zap.String("message_id", MessageHubHeeded))
}

// wantedRules checks what a twin denies, whole.
func wantedRules(targets []api.DenyRequest) ([]deny.Wanted, error) {
	var wanted []deny.Wanted
	for i, r := range targets {
		if err := CheckDeny(r); err != nil {
			return nil, badChange("deny rule %d of the twin: %v", i+1, err)
		}
		wanted = append(wanted, deny.Wanted{Target: r.DenyTarget, Note: r.Note})
	}
	return wanted, nil
}

// SetHubAside has nothing denied that a hub sets, by the twin or by methods: neither that at which this device is now,
// nor those that have set rules before. That ends when HeedHub is called, or the twin of another hub was read. Its
// callers see to it that root asks for it. The error is an *Error with CodeNotKept: it is done all the same.
func (a *Agent) SetHubAside(by string) error {
	done := false
	err := a.changeDenyRules("the hub is set aside", func(record deny.Record) (deny.Record, error) {
		after := record.SetAside(by, api.Time(a.clock.Wall()), a.deny.hub)
		done = !after.Equal(record)
		return after, nil
	})
	if done {
		a.log.Warn("what IoT Hub sets is set aside: its deny rules deny nothing", zap.String("by", by),
			zap.String("message_id", MessageHubSetAside))
	}
	return err
}

// HeedHub takes back what SetHubAside did: what the hub has set denies again. Its error is as there.
func (a *Agent) HeedHub(by string) error {
	done := false
	err := a.changeDenyRules("the hub is heeded", func(record deny.Record) (deny.Record, error) {
		done = record.Aside != nil
		return record.Heed(), nil
	})
	if done {
		a.log.Warn("what IoT Hub sets is heeded again", zap.String("by", by),
			zap.String("message_id", MessageHubHeeded))
	}
	return err
}

// ForgetLostDenyRules ends that nothing is handed out since the record of deny rules is lost, or cannot be read now.
// What was on a lost record denies nothing any more; one that can be read later is in force then. Where a twin took the
// place of a lost record, it ends that the status says so. Its callers see to it that root asks for it. The error is an
// *Error with CodeNotKept: it is done all the same.
func (a *Agent) ForgetLostDenyRules(by string) error {
	var before deny.Record
	err := a.changeDenyRules("tokens are handed out again", func(record deny.Record) (deny.Record, error) {
		before = record
		return record.Forget(), nil
	})
	switch {
	case before.Lost != "":
		a.log.Warn("the lost record of deny rules is given up: tokens are handed out again", zap.String("by", by),
			zap.String("lost", before.Lost), zap.String("message_id", MessageDenyRulesForgotten))
	case before.Missing != nil:
		a.log.Warn("that deny rules are gone with a lost record is known, and shown no more", zap.String("by", by),
			zap.String("lost", before.Missing.Why), zap.String("message_id", MessageDenyRulesForgotten))
	}
	return err
}

// DenyStatus returns the deny rules on record, the latest first, and whether they are all that there were.
func (a *Agent) DenyStatus() api.DenyStatus {
	_ = a.rulesNow()
	a.deny.mu.Lock()
	record, list, hub := a.deny.record, a.rules.Load().denied, a.deny.hub
	a.deny.mu.Unlock()
	s := api.DenyStatus{Rules: []api.DenyRule{}, Lost: list.Lost()}
	for _, rule := range slices.Backward(record.Rules) {
		s.Rules = append(s.Rules, describeDenyRule(record, list, rule))
	}
	if record.IsSetAside(hub) {
		s.HubSetAsideOn = record.Aside.On
	}
	switch {
	case s.Lost != "":
		s.Mend = lostMend
	case record.Missing != nil:
		s.Missing, s.Mend = missingText(record.Missing), missingMend(record.Missing)
	}
	return s
}

// describeDenyRule returns a rule as the wire has it. No rule stays none.
func (a *Agent) describeDenyRule(rule deny.Rule) api.DenyRule {
	if rule.ID == "" {
		return api.DenyRule{}
	}
	a.deny.mu.Lock()
	record, list := a.deny.record, a.rules.Load().denied
	a.deny.mu.Unlock()
	return describeDenyRule(record, list, rule)
}

func describeDenyRule(record deny.Record, list *deny.List, rule deny.Rule) api.DenyRule {
	return api.DenyRule{
		ID: rule.ID, DenyTarget: rule.Target, Origin: rule.Origin, Note: rule.Note, Since: rule.Since, By: rule.By,
		Twin: rule.Twin, SetAside: rule.Origin != deny.Local && record.IsSetAside(rule.Hub), Idle: list.Idle(rule.ID),
		Resources: list.NamesOfResource(rule.ID),
	}
}

// CheckDeny returns what is wrong with a rule that is to be set, as an *Error, or nil. It looks no names up.
func CheckDeny(r api.DenyRequest) error {
	if err := r.Check(); err != nil {
		return badChange("the deny rule: %v", err)
	}
	if fault := checkNote(r.Note); fault != nil {
		return fault
	}
	return nil
}

func errHubSetAside(record deny.Record) *Error {
	return &Error{Code: api.CodeHubSetAside, Detail: fmt.Sprintf(
		"root on this device set aside what IoT Hub sets, on %s: it changes nothing here until "+
			"perceptctl deny heed-hub takes that back", formatTime(record.Aside.On))}
}

// tooManyDenyRules returns what is answered for an error of the record.
func tooManyDenyRules(err error) error {
	if !errors.Is(err, deny.ErrTooMany) {
		return err
	}
	return &Error{Code: api.CodeTooManyDenyRules, Detail: fmt.Sprintf(
		"%v, and none of these was set: lift some, or deny more with one rule", err)}
}

// logDifference logs the rules that one record has and the other has not: those that are new in one line, and those
// that are gone in another.
func (a *Agent) logDifference(by string, version int64, before, after deny.Record) {
	a.logDenyRules("deny rule", "set", by, version, missingFrom(before, after), MessageDenyRuleSet)
	a.logDenyRules("deny rule", "lifted", by, version, missingFrom(after, before), MessageDenyRuleLifted)
}

// missingFrom returns the rules of one record that the other has not.
func missingFrom(other, record deny.Record) (all []deny.Rule) {
	for _, rule := range record.Rules {
		if _, known := other.Find(rule.ID); !known {
			all = append(all, rule)
		}
	}
	return all
}

// namedRules is how many rules a line about more of them names.
const namedRules = 4

// logDenyRules writes a line about rules that a version of the twin set or lifted, if there are any.
func (a *Agent) logDenyRules(what, done, by string, version int64, rules []deny.Rule, id string) {
	switch len(rules) {
	case 0:
		return
	case 1:
		a.logDenyRule(what+" "+done, by, rules[0], id, zap.Int64("version", version))
		return
	}
	var targets []string
	for _, rule := range rules[:min(len(rules), namedRules)] {
		targets = append(targets, truncate(rule.Target.String(), maxNote))
	}
	fields := []zap.Field{zap.Int("rules", len(rules)), zap.Strings("denies", targets)}
	if more := len(rules) - namedRules; more > 0 {
		fields = append(fields, zap.Int("more", more))
	}
	a.hubLog.Warn(what+"s "+done, append(fields, zap.String("by", by), zap.Int64("version", version),
		zap.String("origin", string(deny.Twin)), zap.String("message_id", id))...)
}

func (a *Agent) logDenyRule(message, by string, rule deny.Rule, id string, more ...zap.Field) {
	log := a.hubLog
	if rule.Origin == deny.Local {
		log = a.log
	}
	log.Warn(message, append(more, zap.String("id", rule.ID), zap.Stringer("denies", rule.Target), zap.String("by", by),
		zap.String("origin", string(rule.Origin)), zap.String("note", rule.Note), zap.String("message_id", id))...)
}
