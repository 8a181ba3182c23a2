package iothub

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"perceptd/agent"
	"perceptd/agent/api"
)

// applyAgain is how soon a document is applied again of which something concerns nothing here, or could not be: what is
// configured, the clock and the disk may be others by then.
const applyAgain = 10 * time.Minute

// desired puts in force what the twin says. It keeps the last document that was read whole, since a part of it may be
// of use later.
type desired struct {
	agent      *agent.Agent
	level      zap.AtomicLevel
	configured zapcore.Level // the level where the twin says nothing
	log        *zap.Logger
	changed    func() // its status differs

	applying sync.Mutex // one document at a time; protects what follows
	last     *document
	readOn   time.Time // when last was read
	aside    bool      // root had set the hub aside when last was applied

	denying sync.Mutex // one change of what is denied at a time; protects what follows
	heard   int64      // the number of the latest notification

	noRoom atomic.Int64 // entries of deny that had no room when rules were added last

	mu      sync.Mutex // protects what follows
	hub     string     // whose twin status is about
	status  api.DesiredStatus
	current bool // that twin was read since the device connected last: later versions are higher
}

// document is the desired properties of a twin, with whose twin it is.
type document struct {
	hub     string
	version int64
	text    json.RawMessage
	asked   int64 // of a full read: which notifications it has, by the number of the latest
}

// errSetAside is why a twin's document is not in force.
var errSetAside = errors.New("root on this device has set aside what IoT Hub says: perceptctl deny heed-hub takes " +
	"that back")

// read takes the desired properties as a full read of the twin has them, which is the truth. A read that was begun
// before the last one, which had heard of more, is an old one.
func (d *desired) read(doc document) {
	d.applying.Lock()
	defer d.applying.Unlock()
	if d.last != nil && doc.asked < d.last.asked {
		return
	}
	d.last, d.readOn = &doc, api.Time(time.Now())
	d.mu.Lock()
	d.current = true
	d.mu.Unlock()
	d.agent.NoteHub(doc.hub)
	d.apply()
}

// connecting says that the device connects anew: the twin may be another one by the time, whose versions begin at 1.
func (d *desired) connecting() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.current = false
}

// again applies the last document once more where something else may come of it, as after a reload.
func (d *desired) again() {
	d.applying.Lock()
	defer d.applying.Unlock()
	if d.canApplyAgain() {
		d.apply()
	}
}

// canApplyAgain reports whether there is a last document of the hub that this device is at now: one of the hub before
// would lift what the new one denies.
func (d *desired) canApplyAgain() bool { return d.last != nil && d.agent.IsAtHub(d.last.hub) }

// notice applies the last document again when root has set the hub aside, or heeds it again.
func (d *desired) notice() {
	d.applying.Lock()
	defer d.applying.Unlock()
	if d.canApplyAgain() && d.aside != d.agent.IsHubSetAside(d.last.hub) {
		d.apply()
	}
}

// apply puts the last document in force, whole or not at all, and notes what came of it. It waits for no disk, so that
// a later document is not held up: keep does.
func (d *desired) apply() {
	doc := *d.last
	wanted, err := readDesired(doc.text)
	isSound := err == nil
	d.aside = d.agent.IsHubSetAside(doc.hub)
	if isSound && d.aside {
		// Rules that are set aside deny nothing. They are kept up to date for when the hub is heeded again, and the
		// twin of another hub ends that the former one is set aside.
		err = d.deny(doc, wanted.Deny)
		d.aside = d.agent.IsHubSetAside(doc.hub)
	}
	var idle []string
	denies := 0
	switch {
	case !isSound:
		denies = d.denyOnly(doc, soundDeny(doc.text))
	case d.aside:
		err = cmp.Or(err, errSetAside)
	default:
		if idle, err = d.put(doc, wanted); err != nil {
			denies = d.denyOnly(doc, wanted.Deny)
		}
	}
	if d.aside { // what else the twin had set; policy changes stay on record, and root may withdraw them now
		_, _ = d.agent.SetPrefetch(nil)
		d.level.SetLevel(d.configured)
	}
	d.mu.Lock()
	before := d.status
	if d.hub != doc.hub { // what was applied of another identity's twin is no version of this one's
		d.hub, before = doc.hub, api.DesiredStatus{}
	}
	d.status = api.DesiredStatus{
		Version: doc.version, ReadOn: d.readOn, Applied: before.Applied, NoRoom: int(d.noRoom.Load()),
	}
	if err != nil {
		d.status.Refused, d.status.Denies = err.Error(), denies
	} else {
		d.status.Applied, d.status.Idle = doc.version, append(strayKeys(doc.text), idle...)
	}
	now := d.status
	d.mu.Unlock()
	d.logOutcome(before, now)
	d.logNoRoom(now.NoRoom, doc.version)
	d.changed()
}

// denyOnly denies what a document denies, of which nothing else is put in force since it is wrong: that is meant to
// stop something. It returns how many of its entries are in force so.
func (d *desired) denyOnly(doc document, entries []api.DenyRequest) (inForce int) {
	_ = d.tightenDeny(doc, entries) // each entry is sound
	rules := d.agent.DenyStatus()
	for _, entry := range entries {
		if slices.ContainsFunc(rules.InForce(), func(rule api.DenyRule) bool {
			return rule.Origin == api.DenyTwin && rule.By == doc.hub && rule.DenyTarget == entry.DenyTarget
		}) {
			inForce++
		}
	}
	return inForce
}

// put puts a document in force that was found to be sound, and returns in words what of it concerns nothing here.
func (d *desired) put(doc document, wanted api.DesiredProperties) (idle []string, err error) {
	// What is denied waits for nothing. What is denied no more waits until it is known that the rest can be put in
	// force.
	if err := d.tightenDeny(doc, wanted.Deny); err != nil {
		return nil, err
	}
	changes, err := d.agent.SetTwinChanges(doc.hub, wanted.PolicyChanges, doc.version)
	if err != nil {
		return nil, fmt.Errorf("percept.%w", err)
	}
	if err := d.deny(doc, wanted.Deny); err != nil {
		return nil, err
	}
	prefetched, err := d.agent.SetPrefetch(wanted.Prefetch)
	if err != nil {
		return nil, err
	}
	level := d.configured
	if wanted.LogLevel != "" {
		_ = level.Set(string(wanted.LogLevel)) // readDesired has checked it
	}
	d.level.SetLevel(level)
	idle = slices.Concat(d.idleRules(wanted.Deny), changes, prefetched)
	for i := range idle {
		idle[i] = "percept." + idle[i]
	}
	return idle, nil
}

// deny denies what a document that was read whole denies. It lifts the rest, unless the document may lack what a later
// notification denies: then that waits for the read that follows each notification.
func (d *desired) deny(doc document, rules []api.DenyRequest) error {
	d.denying.Lock()
	defer d.denying.Unlock()
	if doc.asked < d.heard {
		return d.tightenDeny(doc, rules)
	}
	err := d.agent.SetTwinDeny(doc.hub, rules, doc.version)
	if err == nil {
		d.noRoom.Store(0)
	}
	return err
}

// tightenDeny denies what a document or a notification denies besides, and notes how many of its entries have no room.
func (d *desired) tightenDeny(doc document, rules []api.DenyRequest) error {
	noRoom, err := d.agent.TightenTwinDeny(doc.hub, rules, doc.version)
	if err != nil {
		return err
	}
	d.noRoom.Store(int64(noRoom))
	return nil
}

// idleRules returns in words which of the deny rules of the twin, which are in force, match nothing here.
func (d *desired) idleRules(rules []api.DenyRequest) (idle []string) {
	why := make(map[api.DenyTarget]string)
	for _, rule := range d.agent.DenyStatus().Rules {
		if rule.Origin == api.DenyTwin {
			why[rule.DenyTarget] = rule.Idle
		}
	}
	for i, rule := range rules {
		if why[rule.DenyTarget] != "" {
			idle = append(idle, fmt.Sprintf("deny[%d]: %s", i, why[rule.DenyTarget]))
		}
	}
	return idle
}

// keep waits until what is in force is on the disk, and reports whether it is. That it cannot be written is trouble of
// this device, which its status tells, and none of the twin.
func (d *desired) keep() bool {
	return errors.Join(d.agent.KeepDenyRules(), d.agent.KeepPolicyChanges()) == nil
}

// logOutcome writes a line when a version is in force or refused that was not so before.
func (d *desired) logOutcome(before, now api.DesiredStatus) {
	switch {
	case now.Refused != "" && (now.Version != before.Version || now.Refused != before.Refused):
		message := "the twin's desired properties were refused, and nothing of them is in force"
		if now.Denies > 0 {
			message = "the twin's desired properties were refused, and only what is right in percept.deny is in force"
		}
		d.log.Warn(message, zap.Int64("version", now.Version), zap.String("why", now.Refused),
			zap.Int("denies", now.Denies))
	case now.Refused == "" && (now.Applied != before.Applied || before.Refused != ""):
		d.log.Info("the twin's desired properties are in force", zap.Int64("version", now.Applied),
			zap.Strings("idle", now.Idle))
	}
}

// tighten takes a notification of desired properties that were changed. What it adds to deny is denied at once; all
// else waits for a full read, since a notification does not say what is gone. One that is no later than what was read
// is an old one. number counts the notifications.
func (d *desired) tighten(doc document, number int64) {
	d.denying.Lock()
	defer d.denying.Unlock()
	d.heard = max(d.heard, number)
	d.agent.NoteHub(doc.hub)
	d.mu.Lock()
	old := d.current && doc.hub == d.hub && doc.version > 0 && doc.version <= d.status.Version
	d.mu.Unlock()
	rules := soundDeny(doc.text)
	if old || len(rules) == 0 {
		return
	}
	if err := d.tightenDeny(doc, rules); err != nil {
		d.log.Warn("what the twin denies is not in force yet", zap.Int64("version", doc.version), zap.Error(err))
	}
	noRoom := int(d.noRoom.Load())
	d.mu.Lock()
	d.status.NoRoom = noRoom
	d.mu.Unlock()
	d.logNoRoom(noRoom, doc.version)
	d.changed()
}

// logNoRoom writes a line where entries of deny have no room.
func (d *desired) logNoRoom(entries int, version int64) {
	if entries > 0 {
		d.log.Error("the twin denies more than there is room for: entries of percept.deny deny nothing; deny more "+
			"with fewer entries, or everything with one", zap.Int64("version", version), zap.Int("no_room", entries))
	}
}

// describe says what became of the twin that was read last.
func (d *desired) describe() api.DesiredStatus {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.status
}

// describeOf is describe of the twin of an identity of this device; zero: another's was read last.
func (d *desired) describeOf(hub string) api.DesiredStatus {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.hub != hub {
		return api.DesiredStatus{}
	}
	return d.status
}

// unfinished reports whether something else may come of the last document later.
func (d *desired) unfinished() bool {
	s := d.describe()
	return len(s.Idle) > 0 || s.Refused != ""
}
