package agent

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"

	"go.uber.org/zap"

	"perceptd/agent/api"
	"perceptd/agent/deny"
	"perceptd/tokencache"
)

// DenyStore is how deny rules are kept. Zero: they are not, and there are none at the start.
type DenyStore struct {
	// Record is what is on the disk; nil: nothing is. Copies are what earlier processes handed over.
	Record *deny.Record
	Copies []deny.Record
	// Noted is the record that is known, from elsewhere, to have been on the disk; zero: that is not known. One that has
	// not all of it counts as lost beside its rules.
	Noted tokencache.Origin
	// Lost is why what is on the disk can never be read. Without Copies nothing is handed out then, until the hub's twin
	// was read or ForgetLostDenyRules is called.
	Lost error
	// Unread is why it cannot be read now. Load then reads it again, as store.DenyRules does, until it returns a record
	// or an error whose method Spoilt returns true. Until then Save is not called, and without Copies it counts as lost.
	Unread error
	Load   func() (*deny.Record, error)
	// LoadOther returns what Load would in a folder that took the place of the one that was read, and whether one did.
	// Nil: none can.
	LoadOther func() (record *deny.Record, isOther bool, err error)
	// Save saves the whole record each time it differs. One goroutine at a time calls it, and it may block. Nil: the
	// record is not saved.
	Save func(deny.Record) error
	// HandOver hands the record over to the next process each time it differs. One goroutine at a time calls it. Nil: it
	// is not handed over.
	HandOver func(deny.Record) error
}

// begin returns the record to begin with, which begins a lineage, and whether records that went on apart were joined
// in it.
func (s *DenyStore) begin(now time.Time) (record deny.Record, isJoined bool) {
	record, isJoined = s.found()
	if record.Lineage == "" {
		return record, false
	}
	from := slices.Clone(s.Copies)
	if s.Record != nil {
		from = append(from, *s.Record)
	}
	from = append(from, record)
	if s.Noted != (tokencache.Origin{}) && record.Lost == "" && !record.Has(s.Noted) {
		record.Lost, record.Generation = lostDenyText(errOlder), record.Generation+1
	}
	if record.Lost != "" && record.LostOn.IsZero() { // it is found out now
		record.LostOn, record.Generation = now, record.Generation+1
	}
	return record.Anew(from...), isJoined
}

// errOlder is why a record is lost in whose place an older one is.
var errOlder = errors.New("its files are older than those that were there before: what is in them denies, and rules " +
	"that were set later are gone")

// found returns what was kept, as a new record where nobody knows, and whether it is joined from records that went on
// apart.
func (s *DenyStore) found() (record deny.Record, isJoined bool) {
	for i, r := range s.Copies {
		if i == 0 {
			record = r
		} else {
			isJoined = isJoined || deny.AreForks(record, r)
			record = deny.Newest(record, r)
		}
	}
	isRead := s.Record != nil
	if isRead {
		isJoined = isJoined || record.Lineage != "" && !record.Unread && deny.AreForks(*s.Record, record)
		record = record.Found()
	}
	switch found := record.Lineage != ""; {
	case isRead && found:
		return deny.Newest(*s.Record, record), isJoined
	case isRead:
		return *s.Record, false
	case found && !record.Unread:
		if m := record.Missing; s.Lost != nil && m != nil && m.Unread { // what it waited for will not come
			record.Missing = &deny.Missing{Why: lostDenyText(s.Lost), LostOn: m.LostOn, TwinOn: m.TwinOn, Hub: m.Hub}
			record.Generation++
		}
		return record, isJoined
	case s.Unread != nil:
		record.Lost, record.Unread, record.LostOn = unreadDenyText(s.Unread), true, time.Time{}
	case s.Lost != nil || found:
		record.Lost, record.Unread, record.LostOn = lostDenyText(cmp.Or(s.Lost, errGone)), false, time.Time{}
	default:
		return deny.Record{}, false
	}
	record.Generation++
	return record.Anew(s.Copies...), isJoined
}

func unreadDenyText(why error) string {
	return fmt.Sprintf("the record of deny rules cannot be read now: %v; it is read again every minute, and at once by "+
		"perceptctl reload; %s", why, remedyFor(why))
}

func lostDenyText(why error) string { return fmt.Sprintf("the record of deny rules is lost: %v", why) }

// IDs of the journal's entries about the record of deny rules. They never change.
const (
	MessageDenyRulesLost      = "5e93a17c8bd24f06a1c7f4802d6e9b3a" // it is lost, or cannot be read now
	MessageDenyRulesRead      = "0b7f2e4d9a8c46f1b35d60e2c91a784f" // it was read after all
	MessageDenyRulesForgotten = "94c6d02fb1e74a3f8e5a27d1630bc9e8" // root gave up what was on it
	MessageDenyRulesJoined    = "6f0c8b4e2a9d4713b5e1d7a3c4980f26" // two records went on apart: both are in force
	MessageDenyRulesMissing   = "1d7be4a05f3c4c62a90e8b61d2f57c34" // the twin took its place: others' rules are gone
)

// open takes over what was kept.
func (d *denyRules) open(kept DenyStore, clock tokencache.Clock, log *zap.Logger, changed func()) {
	d.accounts.open(clock)
	var isJoined bool
	d.record, isJoined = kept.begin(api.Time(clock.Wall()))
	d.none = d.record.Lineage == ""
	d.saver.what = "the record of deny rules"
	d.saver.now = func() deny.Record {
		d.mu.Lock()
		defer d.mu.Unlock()
		return d.record
	}
	d.saver.origin = deny.Record.Origin
	d.noted = kept.Noted
	save := kept.Save
	if save != nil {
		save = func(record deny.Record) error {
			err := kept.Save(record)
			if note := d.note.Load(); err == nil && note != nil && d.noted != record.Named() {
				(*note)(d.noted == tokencache.Origin{})
				d.noted = record.Named()
			}
			return err
		}
	}
	d.saver.open(save, clock, log, "the deny rules could not be kept", "the deny rules are kept again", changed)
	if kept.Unread != nil {
		d.saver.unread.Store(&kept.Unread)
		d.load = kept.Load
	}
	d.handOver = kept.HandOver
	d.handOverNow(log)
	d.saver.renew()
	if isJoined {
		logForks(log)
	}
	if d.record.Lost != "" {
		logLostDenyRules(log, d.record)
	}
}

// logForks says that records which went on apart were joined.
func logForks(log *zap.Logger) {
	log.Warn("two records of deny rules went on apart, as where a folder was mounted over the other: what either denies "+
		"is in force, also what was lifted in one of them alone", zap.String("message_id", MessageDenyRulesJoined))
}

// handOverSoon has the record handed over, and waits for nothing.
func (d *denyRules) handOverSoon(log *zap.Logger) {
	if d.handOver == nil || d.waiting.Swap(true) {
		return
	}
	d.handers.Go(func() { d.handOverNow(log) })
}

// handOverNow hands the record over, if there is one that was not.
func (d *denyRules) handOverNow(log *zap.Logger) {
	if d.handOver == nil {
		return
	}
	d.handing.Lock()
	defer d.handing.Unlock()
	d.waiting.Store(false)
	record := d.saver.now()
	origin := d.saver.origin(record)
	if record.Lineage == "" || origin == d.handed {
		return
	}
	if err := d.handOver(record); err != nil {
		log.Warn("the deny rules could not be handed over to the next process", zap.Error(err))
		return
	}
	d.handed = origin
}

// readDenyRulesAgain tries to read the record until that works or the agent is closed.
func (a *Agent) readDenyRulesAgain() {
	for wait := readAgainSoonest; ; wait = min(2*wait, readAgainLatest) {
		if !a.rereading.pause(wait) || a.takeDenyRules() {
			return
		}
	}
}

// takeDenyRules puts the record in force if it can be read, beside what was set meanwhile.
func (a *Agent) takeDenyRules() bool {
	d := &a.deny
	var before, after deny.Record
	read := d.saver.read(d.load, func(disk *deny.Record, why error) {
		d.mu.Lock()
		defer d.mu.Unlock()
		before = d.record
		a.enforceLocked(d.joined(disk, why, api.Time(a.clock.Wall())))
		after = d.record
	})
	if !read {
		return false
	}
	a.cache.Wake()
	d.handOverNow(a.log)
	d.saver.renew()
	a.changed()
	switch {
	case after.Lost != "":
		logLostDenyRules(a.log, after)
	case a.logMissing(before, after):
	default:
		a.log.Info("the record of deny rules was read after all, and is in force", zap.Int("rules", len(after.Rules)),
			zap.String("message_id", MessageDenyRulesRead))
	}
	return true
}

// missDenyRules puts in force that the record is lost, where the start found none and kept tokens that were read late
// note that there was one. What was set meanwhile stays; what a full read of the twin has ended meanwhile stays ended.
func (a *Agent) missDenyRules() {
	d := &a.deny
	d.mu.Lock()
	isMissed := d.none
	before := d.record
	if d.none = false; isMissed {
		d.record.Unread = d.twinHub == ""
		a.enforceLocked(d.joined(nil, errGone, api.Time(a.clock.Wall())))
	}
	after := d.record
	d.mu.Unlock()
	if !isMissed {
		return
	}
	a.cache.Wake()
	d.handOverNow(a.log)
	d.saver.renew()
	if !a.logMissing(before, after) {
		logLostDenyRules(a.log, after)
	}
}

func logLostDenyRules(log *zap.Logger, record deny.Record) {
	log.Error("which tokens are denied is not known, and none is handed out", zap.String("why", record.Lost),
		zap.String("message_id", MessageDenyRulesLost))
}

// joinOtherDenyRules puts in force also what is in a folder that took the place of the one that was read, as one that is
// mounted late does. The error says why that cannot be read now. Who saves calls it, before anything is written there.
func (a *Agent) joinOtherDenyRules(load func() (*deny.Record, bool, error)) error {
	disk, isOther, why := load()
	switch {
	case !isOther:
		return nil
	case disk == nil && why == nil: // an empty one
		return nil
	case disk == nil && !isSpoilt(why):
		return why
	}
	d, wall := &a.deny, api.Time(a.clock.Wall())
	d.mu.Lock()
	before := d.record
	after := before
	if disk != nil {
		after = d.joined(disk, nil, wall)
		why = nil
		if disk.Lost != "" && d.twinHub == "" {
			after.Lost, after.LostOn = cmp.Or(after.Lost, disk.Lost), wall
		}
	} else if d.twinHub != "" {
		after.Missing = &deny.Missing{Why: lostDenyText(why), LostOn: wall, TwinOn: wall, Hub: d.twinHub}
	} else if after.Lost == "" {
		after.Lost, after.LostOn = lostDenyText(why), wall
	}
	isNew := !after.Equal(before)
	if isNew {
		a.enforceLocked(after)
	} else if disk != nil { // what is there is in it
		d.record = before.Anew(*disk, before)
	}
	d.mu.Unlock()
	a.log.Warn("another folder took the place of the state folder, as one that is mounted late: its deny rules are in "+
		"force beside those from before", zap.Bool("news", isNew), zap.String("message_id", MessageDenyRulesJoined))
	if isNew {
		a.cache.Wake()
		d.handOverSoon(a.log)
		a.changed()
	}
	a.logMissing(before, after)
	if after.Lost != "" && before.Lost == "" {
		a.log.Error("which tokens are denied is not known, and none is handed out", zap.String("why", after.Lost),
			zap.String("message_id", MessageDenyRulesLost))
	}
	return nil
}

// logMissing says that a twin took the place of a lost record, if that is news.
func (a *Agent) logMissing(before, after deny.Record) (news bool) {
	if after.Missing == nil || before.Missing != nil && *before.Missing == *after.Missing {
		return false
	}
	a.log.Warn(missingText(after.Missing), zap.String("message_id", MessageDenyRulesMissing))
	return true
}

// missingText says what became of a record that was lost, and where it may still be looked at.
func missingText(m *deny.Missing) string {
	if m.Unread {
		return fmt.Sprintf("deny rules that were set on this device or by direct methods are not in force, and what they "+
			"deny is handed out, since what the twin of %s denies was taken on %s: %s", m.Hub, formatTime(m.TwinOn), m.Why)
	}
	return fmt.Sprintf("deny rules that were set on this device or by direct methods before %s may be gone, and what "+
		"they denied is handed out: %s; what the twin of %s denies was taken again on %s",
		formatTime(m.LostOn), m.Why, m.Hub, formatTime(m.TwinOn))
}

// joined returns what is in force when disk was read, or is lost. What was set meanwhile stays. What root, or a full
// read of the twin, has ended meanwhile stays ended.
func (d *denyRules) joined(disk *deny.Record, why error, wall time.Time) deny.Record {
	isWaiting, now := d.record.Unread, d.record.Found()
	if disk == nil {
		switch {
		case isWaiting:
			now.Lost, now.LostOn = lostDenyText(why), wall
		case d.twinHub != "": // root, or the twin alone, has ended the wait
			now.Missing = &deny.Missing{Why: lostDenyText(why), LostOn: wall, TwinOn: wall, Hub: d.twinHub}
		case d.record.Missing != nil: // the twin has, in a process before
			m := d.record.Missing
			now.Missing = &deny.Missing{Why: lostDenyText(why), LostOn: m.LostOn, TwinOn: m.TwinOn, Hub: m.Hub}
		}
		return now
	}
	switch {
	case now.IsNewer(*disk):
		return now
	case disk.IsNewer(now):
		return disk.Anew(now, *disk)
	}
	kept := *disk
	if hub := d.twinHub; hub != "" { // of its twin, and of other hubs, all is known
		kept.Rules = slices.DeleteFunc(slices.Clone(kept.Rules), func(r deny.Rule) bool {
			return r.Origin == deny.Twin || r.Origin == deny.Method && r.Hub != "" && r.Hub != hub
		})
	}
	both := deny.Both(now, kept)
	both.Lost, both.LostOn = now.Lost, now.LostOn
	if both.Aside = now.Aside; now.Aside == nil && kept.IsSetAside(now.Hub) {
		both.Aside = kept.Aside
	}
	if isWaiting {
		if both.Lost, both.LostOn = disk.Lost, disk.LostOn; both.Lost != "" && both.LostOn.IsZero() {
			both.LostOn = wall
		}
	}
	return both
}

// unkept returns the text of what became of the deny rules that could not be saved.
func (d *denyRules) unkept(why error) string {
	const until = "the next process takes them from systemd; a stop or a reboot loses the difference"
	return fmt.Sprintf("%v; %s; %s; %s", why, until, remedyFor(why), triedAgain)
}

// trouble says what a technician should know of the record, in sentences.
func (d *denyRules) trouble() []string {
	if since := d.saver.saver.hangsSince(); !since.IsZero() {
		return []string{hangsText(d.saver.what, since, "what was set or lifted since is in force; the next process takes it "+
			"from systemd; a stop or a reboot loses the difference")}
	}
	if fault := d.saver.failure(); fault != nil {
		return []string{"deny rules are not kept on the disk: " + d.unkept(fault)}
	}
	if why := d.saver.unread.Load(); why != nil {
		if record := d.saver.now(); record.Lost == "" && record.Missing == nil {
			return []string{unreadDenyText(*why)}
		}
	}
	return nil
}
