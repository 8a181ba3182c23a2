package agent

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"

	"perceptd/agent/api"
	"perceptd/agent/grants"
	"perceptd/tokencache"
)

const (
	// listed is how many of the resources that the grants name an error lists.
	listed = 8

	// twinPrefix begins the IDs of the policy changes that the twin lists.
	twinPrefix = api.TwinChangePrefix
)

// RecordChange puts a policy change on record and in force. by says who reports it, for the log: "uid 0 (pid 7)". The
// error is an *Error; with CodeNotKept the change is in force all the same, and returned.
func (a *Agent) RecordChange(by string, c api.PolicyChangeRequest) (api.PolicyChange, error) {
	p, refusal := a.rules.Load().policyChange(c)
	if refusal != nil {
		return api.PolicyChange{}, refusal
	}
	recorded, err := a.enter(p)
	if err != nil {
		return api.PolicyChange{}, a.changeError(p, err)
	}
	a.logChange("policy change noted", by, recorded.PolicyChange)
	a.snapshotSaver.notice(true)
	a.changed()
	if err := a.changeSaver.save(); err != nil {
		return a.describeChange(recorded), a.unkept("the change is in force", err)
	}
	return a.describeChange(recorded), nil
}

// WithdrawChange takes a policy change off the record, as if it had never been recorded, and returns it as it was. The
// error is an *Error; with CodeNotKept the change is withdrawn all the same. What stands for a record that cannot be
// read now is not withdrawn: what is on it may withhold tokens.
func (a *Agent) WithdrawChange(by, id string) (api.PolicyChange, error) {
	if why := a.changeSaver.unread.Load(); why != nil && id == unreadID {
		return api.PolicyChange{}, badChange("%q stands for the record of policy changes, which cannot be read now, "+
			"and ends when that is read: %v; %s", id, *why, unreadRemedy(*why))
	}
	if refusal := a.ownedByTwin(id); refusal != nil {
		return api.PolicyChange{}, refusal
	}
	recorded, found := a.withdraw(id)
	a.forgetTwinChange(id)
	if !found {
		return api.PolicyChange{}, &Error{Code: api.CodeUnknownChange, Detail: fmt.Sprintf(
			"no policy change %q is on record", truncate(id, 64))}
	}
	a.stale.reset(a.cache.Status())
	a.logChange("policy change withdrawn", by, recorded.PolicyChange)
	a.snapshotSaver.notice(true)
	a.changed()
	if err := a.changeSaver.save(); err != nil {
		return a.describeChange(recorded), a.unkept("the change is withdrawn", err)
	}
	return a.describeChange(recorded), nil
}

// ownedByTwin refuses to withdraw here what the twin lists, since it would be there again with the next version.
func (a *Agent) ownedByTwin(id string) *Error {
	if !strings.HasPrefix(id, twinPrefix) || a.IsHubSetAside("") {
		return nil
	}
	return badChange("policy change %s is listed by this device's twin in IoT Hub: take it out of "+
		"percept.policyChanges there; where the hub cannot be reached any more, root sets aside what it says (sudo "+
		"perceptctl deny lift --from-hub), and then withdraws it", truncate(id, 64))
}

// forgetTwinChange has a change that the twin lists be on record again when the twin is heeded again.
func (a *Agent) forgetTwinChange(id string) {
	a.twin.Lock()
	defer a.twin.Unlock()
	delete(a.twinSeen, id)
}

// unkept returns the error for something that is in force and could not be written to the disk.
func (a *Agent) unkept(done string, err error) *Error {
	if unread, ok := errors.AsType[*unreadError](err); ok {
		return &Error{Code: api.CodeNotKept, Detail: fmt.Sprintf("%s, and %v; it is put on it when that is read, and "+
			"till then %s; %s", done, err, a.snapshotSaver.outlives(true), unreadRemedy(unread.why))}
	}
	return &Error{Code: api.CodeNotKept, Detail: fmt.Sprintf("%s, and not on the disk: %v; %s; %s; %s",
		done, err, a.snapshotSaver.outlives(false), remedyFor(err), triedAgain)}
}

// withdraw takes a change off the record, and off the record that is read later. That has no change recorded since.
func (a *Agent) withdraw(id string) (tokencache.RecordedChange, bool) {
	a.naming.Lock()
	defer a.naming.Unlock()
	recorded, found := a.cache.Withdraw(id)
	isIt := func(p tokencache.PolicyChange) bool { return p.ID == id }
	if u := a.deferred; found && u != nil && slices.ContainsFunc(u.began.Changes, isIt) {
		u.withdrawn = append(u.withdrawn, recorded.PolicyChange)
	}
	return recorded, found
}

// Changes returns the policy changes on record, the latest first.
func (a *Agent) Changes() []api.PolicyChange {
	recorded := a.cache.Changes()
	all := make([]api.PolicyChange, len(recorded))
	for i, r := range recorded {
		all[i] = a.describeChange(r)
	}
	return all
}

// enter gives p an ID of its own, unless it has one, and puts it on record.
func (a *Agent) enter(p tokencache.PolicyChange) (tokencache.RecordedChange, error) {
	a.naming.Lock()
	defer a.naming.Unlock()
	taken := a.cache.Changes()
	for p.ID == "" || slices.ContainsFunc(taken, func(r tokencache.RecordedChange) bool { return r.ID == p.ID }) {
		p.ID = newID()
	}
	recorded, err := a.cache.RecordChange(p)
	if err == nil {
		a.stale.reset(a.cache.Status())
	}
	return recorded, err
}

// changeError returns what is answered for an error of the cache about a policy change.
func (a *Agent) changeError(p tokencache.PolicyChange, err error) error {
	var future *tokencache.FutureError
	switch {
	case errors.As(err, &future):
		return &Error{Code: api.CodeFutureChange, Detail: fmt.Sprintf(
			"the policy change is dated %v ahead, on %s: this device's clock is synchronised and says %s; note a "+
				"change when it has happened, or leave its time out for now",
			future.Ahead.Round(time.Second), formatTime(p.At), formatTime(a.clock.Wall()))}
	case errors.Is(err, tokencache.ErrTooManyChanges):
		return &Error{Code: api.CodeTooManyChanges, Detail: fmt.Sprintf(
			"%d policy changes are on record, which is all that can be, and no two that are no revocations are of "+
				"one identity and resource: withdraw some on the device, or note one change for "+
				"all resources, which takes in those that are no revocations", tokencache.MaxChanges)}
	}
	return err
}

// joinedTrouble says that a change stands for others as well, and what that means.
func joinedTrouble(c api.PolicyChange) string {
	of, on := "every identity", "every resource"
	if c.Identity != "" {
		of = fmt.Sprintf("identity %q", c.Identity)
	}
	if c.Resource != "" {
		on = c.Resource
	}
	return fmt.Sprintf("the record of policy changes was full: %s stands for %d more, and is about %s and %s until "+
		"the last of them is over: note one change for many resources rather than one for each, and withdraw those "+
		"that are over (perceptctl policy-changes)",
		c.ID, c.Joined, of, on)
}

func (a *Agent) logChange(message, by string, p tokencache.PolicyChange) {
	identity, resource := a.rules.Load().nameOf(p), p.Resource
	if identity == "" {
		identity = "all"
	}
	if resource == "" {
		resource = "all"
	}
	log := a.log
	if strings.HasPrefix(by, "iothub ") {
		log = a.hubLog
	}
	log.Info(message, zap.String("by", by), zap.String("id", p.ID), zap.String("effect", string(p.Effect)),
		zap.String("identity", identity), zap.String("resource", resource), zap.Time("at", p.At),
		zap.String("note", p.Note))
}

// policyChange checks a reported policy change. It refuses unknown names: a change for a misspelt one would touch
// nothing, and that would not be noticed.
func (s *ruleset) policyChange(c api.PolicyChangeRequest) (tokencache.PolicyChange, *Error) {
	if fault := checkChange(c); fault != nil {
		return tokencache.PolicyChange{}, fault
	}
	return s.named(c)
}

// checkChange checks a policy change without looking names up.
func checkChange(c api.PolicyChangeRequest) *Error {
	resource := grants.TrimScope(c.Resource)
	switch {
	case (resource == "") != c.AllResources:
		return badChange("a policy change names a resource, or says all_resources, and not both")
	case c.Effect != tokencache.Granted && c.Effect != tokencache.Revoked && c.Effect != tokencache.Changed:
		return badChange("the effect of a policy change is granted, revoked or changed")
	case !tokencache.Plausible(c.At):
		return badChange("the policy change is dated in the year %d: "+
			"give the time at which it happened", c.At.Year())
	}
	if fault := checkNote(c.Note); fault != nil {
		return fault
	}
	if c.AllResources {
		return nil
	}
	if err := grants.CheckResource(resource); err != nil {
		return badChange("%v", err)
	}
	return nil
}

// named looks up what a policy change names, which checkChange has found to be sound. Of an idle identity it is not
// known what the source is asked with for it.
func (s *ruleset) named(c api.PolicyChangeRequest) (tokencache.PolicyChange, *Error) {
	p := tokencache.PolicyChange{AllIdentities: c.Identity == "", At: c.At, Effect: c.Effect, Note: c.Note}
	if !c.AllResources {
		resource := grants.TrimScope(c.Resource)
		if p.Resource = s.Spelling(resource); p.Resource == "" && (s.NoRules != "" || s.MayNameAny()) {
			p.Resource = resource // what is not understood may name it
		}
		if p.Resource == "" {
			return p, badChange("no grant names resource %q, so nothing would come of the change: the grants name "+
				"%s; name one of these, or note it for all resources", resource, s.resourceList())
		}
	}
	if c.Identity == "" {
		return p, nil
	}
	identity := s.Named(c.Identity)
	if identity == nil {
		return p, s.unknownIdentity(c.Identity)
	}
	if identity.Fault != "" {
		return p, &Error{Code: api.CodeFaultyGrant, Detail: fmt.Sprintf(
			"%s; then note the change, or note it now for all identities", identity.WhyIdle())}
	}
	p.Selector = identity.Selector()
	return p, nil
}
