package agent

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strings"

	"perceptd/agent/api"
	"perceptd/agent/grants"
	"perceptd/tokencache"
)

// MaxTwinChanges is how many policy changes a twin lists at most.
const MaxTwinChanges = 100

// CheckTwinChanges returns what is wrong with the policy changes that a twin lists, whatever is configured here; nil:
// nothing. Each needs its time: that at which the twin is read says nothing.
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

// SetTwinChanges has the twin's policy changes on record be these, which CheckTwinChanges has found to be sound. hub is
// the device's identity in IoT Hub, and version that of the desired properties. It returns in words which of them
// concern nothing here. The error says why nothing was changed or, with CodeNotKept, that it is in force and not on the
// disk.
func (a *Agent) SetTwinChanges(
	hub string, all []api.PolicyChangeRequest, version int64,
) (idle []string, err error) {
	a.twin.Lock()
	defer a.twin.Unlock()
	by := fmt.Sprintf("iothub %s twin version %d", hub, version)
	wanted, idle := a.twinChanges(all)
	onRecord := make(map[string]bool)
	for _, r := range a.cache.Changes() {
		if strings.HasPrefix(r.ID, twinPrefix) {
			onRecord[r.ID] = true
		}
	}
	var entered []tokencache.RecordedChange
	for _, id := range slices.Sorted(maps.Keys(wanted)) {
		if onRecord[id] || a.twinSeen[id] {
			continue
		}
		recorded, err := a.enter(wanted[id])
		if err != nil {
			for _, r := range entered {
				a.withdraw(r.ID)
			}
			return nil, fmt.Errorf("policyChanges: %w", a.changeError(wanted[id], err))
		}
		entered = append(entered, recorded)
	}
	differs := len(entered) > 0
	for _, recorded := range entered {
		a.logChange("policy change noted", by, recorded.PolicyChange)
	}
	a.twinSeen = make(map[string]bool)
	for id := range wanted {
		a.twinSeen[id] = true
	}
	for id := range onRecord {
		if _, listed := wanted[id]; listed {
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
	if err := a.changeSaver.save(); err != nil {
		return idle, a.unkept("what the twin says of policy changes is in force", err)
	}
	return idle, nil
}

// twinChanges returns by ID the changes that are to be on record, and which of all concern nothing here.
func (a *Agent) twinChanges(all []api.PolicyChangeRequest) (wanted map[string]tokencache.PolicyChange, idle []string) {
	rules := a.rules.Load()
	wanted = make(map[string]tokencache.PolicyChange)
	for i, c := range all {
		p, unknown := rules.named(c)
		switch {
		case unknown != nil && p.Resource == "" && !c.AllResources:
			idle = append(idle, fmt.Sprintf("policyChanges[%d]: no grant names resource %s", i, c.Resource))
		case unknown != nil:
			idle = append(idle, fmt.Sprintf("policyChanges[%d]: %s", i, unknown.Detail))
		case a.cache.IsOver(c.At):
			idle = append(idle, fmt.Sprintf("policyChanges[%d]: it is over, since every token from before %s has expired",
				i, formatTime(c.At)))
		default:
			p.ID = twinID(c)
			wanted[p.ID] = p
		}
	}
	return wanted, idle
}

// twinID returns the ID of a policy change that a twin lists: the same for the same content, whatever the version, so
// that it is on record once, also after a restart.
func twinID(c api.PolicyChangeRequest) string {
	content := sha256.Sum256(fmt.Appendf(nil, "%q %t %q %d %q %q", grants.TrimScope(c.Resource), c.AllResources,
		c.Identity, c.At.UnixNano(), c.Effect, c.Note))
	return twinPrefix + hex.EncodeToString(content[:8])
}
