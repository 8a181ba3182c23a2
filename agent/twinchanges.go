package agent

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"perceptd/agent/api"
	"perceptd/agent/grants"
	"perceptd/tokencache"
)

// MaxTwinChanges is how many policy changes a twin lists at most.
const MaxTwinChanges = 100

// CheckTwinChanges returns what is wrong with the policy changes that a twin lists, whatever is configured here; nil:
// nothing. Each must have its time, since the time at which the twin is read says nothing.
func CheckTwinChanges(all []api.PolicyChangeRequest) error {
	if len(all) > MaxTwinChanges {
		return fmt.Errorf("policyChanges lists %d: at most %d can be, take out those that are over", len(all),
			MaxTwinChanges)
	}
	for i, c := range all {
		fault := checkChange(c)
		if fault == nil && c.At.IsZero() {
			fault = badChange("its time is missing: write at, such as \"2026-11-28T08:00:00Z\"")
		}
		if fault != nil {
			return fmt.Errorf("policyChanges[%d]: %s", i, fault.Detail)
		}
	}
	return nil
}

// SetTwinChanges replaces the twin's policy changes on record by these, which CheckTwinChanges has found to be sound.
// hub is the device's identity in IoT Hub, and version that of the desired properties. idle says in words which of them
// concern nothing here. It waits for no disk: KeepPolicyChanges does. The error says why nothing was changed.
func (a *Agent) SetTwinChanges(
	hub string, all []api.PolicyChangeRequest, version int64,
) (idle []string, err error) {
	a.twin.Lock()
	defer a.twin.Unlock()
	by := fmt.Sprintf("iothub %s twin version %d", hub, version)
	onRecord := make(map[string]bool)
	for _, r := range a.cache.Changes() {
		if strings.HasPrefix(r.ID, twinPrefix) {
			onRecord[r.ID] = true
		}
	}
	listed, idle := a.twinChanges(all, onRecord)
	var entered []tokencache.RecordedChange
	for _, c := range listed {
		if onRecord[c.change.ID] || a.twinSeen[c.change.ID] {
			continue
		}
		recorded, err := a.enter(c.change)
		if err != nil {
			for _, r := range entered {
				a.withdraw(r.ID)
			}
			return nil, fmt.Errorf("policyChanges[%d]: %w", c.index, a.twinChangeError(c.change, err))
		}
		entered = append(entered, recorded)
	}
	differs := len(entered) > 0
	for _, recorded := range entered {
		a.logChange("policy change noted", by, recorded.PolicyChange)
	}
	a.twinSeen = make(map[string]bool)
	for _, c := range listed {
		a.twinSeen[c.change.ID] = true
	}
	for id := range onRecord {
		if a.twinSeen[id] {
			continue
		}
		if recorded, found := a.withdraw(id); found {
			differs = true
			a.logChange("policy change withdrawn", by, recorded.PolicyChange)
		}
	}
	if !differs {
		return idle, nil
	}
	a.stale.reset(a.cache.Status())
	a.snapshotSaver.notice(true)
	a.changed()
	a.changeSaver.begin()
	return idle, nil
}

// KeepPolicyChanges waits until the policy changes on record are on the disk. The error is an *Error with CodeNotKept.
func (a *Agent) KeepPolicyChanges() error {
	if err := a.changeSaver.keep(); err != nil {
		return a.unkept("what is on record of policy changes is in force", err)
	}
	return nil
}

// listedChange is a policy change that a twin lists.
type listedChange struct {
	index  int // in the twin's list
	change tokencache.PolicyChange
}

// twinChanges returns which of all changes are to be on record, each once, and in words which of them concern nothing
// here. onRecord are the IDs of those that are already: the cache ends them, and they stay while the rules have faults
// and may name what they are about.
func (a *Agent) twinChanges(
	all []api.PolicyChangeRequest, onRecord map[string]bool,
) (listed []listedChange, idle []string) {
	rules := a.rules.Load()
	known := make(map[string]bool)
	for i, c := range all {
		p, unknown := rules.named(c)
		p.ID = twinID(c)
		switch {
		case unknown != nil && onRecord[p.ID] && rules.mayKnow():
			known[p.ID] = true
			listed = append(listed, listedChange{i, p}) // it stays as it is on record
		case unknown != nil && p.Resource == "" && !c.AllResources:
			idle = append(idle, fmt.Sprintf("policyChanges[%d]: no grant names resource %s", i, c.Resource))
		case unknown != nil:
			idle = append(idle, fmt.Sprintf("policyChanges[%d]: %s", i, unknown.Detail))
		case !onRecord[p.ID] && a.cache.IsOver(c.At):
			idle = append(idle, fmt.Sprintf("policyChanges[%d]: it is over, since every token from before %s has "+
				"expired",
				i, formatTime(c.At)))
		case !known[p.ID]:
			known[p.ID] = true
			listed = append(listed, listedChange{i, p})
		}
	}
	return listed, idle
}

// twinChangeError returns what is reported for an error of the cache about a policy change that a twin lists.
func (a *Agent) twinChangeError(p tokencache.PolicyChange, err error) error {
	if future, is := errors.AsType[*tokencache.FutureError](err); is {
		return &Error{Code: api.CodeFutureChange, Detail: fmt.Sprintf("it is dated %v ahead, on %s, by this device's "+
			"clock, which is synchronised and says %s: it is tried again when that has come",
			future.Ahead.Round(time.Second), formatTime(p.At), formatTime(a.clock.Wall()))}
	}
	return a.changeError(p, err)
}

// twinID returns the ID of a policy change that a twin lists: the same for the same content, whatever the version, so
// that it is on record once, also after a restart.
func twinID(c api.PolicyChangeRequest) string {
	content := sha256.Sum256(fmt.Appendf(nil, "%q %t %q %d %q %q", grants.TrimScope(c.Resource), c.AllResources,
		c.Identity, c.At.UnixNano(), c.Effect, c.Note))
	return twinPrefix + hex.EncodeToString(content[:8])
}
