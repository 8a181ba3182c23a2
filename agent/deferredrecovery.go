package agent

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"go.uber.org/zap"

	"perceptd/tokencache"
)

// IDs of the journal's entries about the record of policy changes.
const (
	MessageLostRecord   = "4f0c1d6be1a94b7c8b3a52d09e6f7712" // it is lost: nobody knows what was on it
	MessageUnreadRecord = "a8e3b7054c2f4d19b6d07c51f2e98a36" // it cannot be read now
	MessageRecordRead   = "d51b9c2e7f6840a3915e0b84c6a27f3d" // it was read after all
)

// applyLostEffect changes the placeholders on record to what new rules want.
func (a *Agent) applyLostEffect(rules Rules) {
	a.naming.Lock()
	defer a.naming.Unlock()
	record, different := rules.withLostEffect(a.cache.Record())
	if different {
		a.cache.ReplaceRecord(record)
		a.changeSaver.notice()
	}
}

// lost returns the placeholder of a record that is lost.
func (r Rules) lost(why error) tokencache.PolicyChange {
	return r.placeholder(lostPrefix+newID(), "the record of policy changes could not be read", why)
}

// recordLost puts the placeholder of a lost record on record.
func (a *Agent) recordLost(rules Rules, why error) {
	p := rules.lost(why)
	_, err := a.enter(p)
	a.logLost(p, why)
	if err != nil {
		a.log.Error("that could not be noted", zap.Error(err))
		return
	}
	_ = a.changeSaver.save() // why it failed is in the log and in the status
}

// logLost says that p stands for a record that is lost, and why it is.
func (a *Agent) logLost(p tokencache.PolicyChange, why error) {
	a.log.Error("the record of policy changes is lost: "+consequence(p.Effect == tokencache.Revoked),
		zap.Error(why), zap.String("message_id", MessageLostRecord))
}

// forgotten returns m without its tokens, which are fetched anew. One that comes again counts as received when it first
// was.
func forgotten(m *tokencache.Snapshot) *tokencache.Snapshot {
	if m == nil {
		return nil
	}
	left := *m
	left.Keys, left.Tombstones = slices.Clone(m.Keys), slices.Clone(m.Tombstones)
	for i := range left.Keys {
		k := &left.Keys[i]
		if b, ok := k.Tombstone(); ok {
			left.Tombstones = append(left.Tombstones, b)
		}
		k.Token = tokencache.Token{}
		if k.Next != nil {
			k.Next = new(m.Boot)
		}
	}
	return &left
}

// deferredRecovery is what could not be read at the start, and what is in force until it can be.
type deferredRecovery struct {
	load   func() (*tokencache.Record, error)                            // reads the record; nil: it was read
	tokens func() ([]tokencache.Snapshot, []*tokencache.Snapshot, error) // reads the tokens; nil: they were read
	fault  error                                                         // why the tokens cannot be read now
	kept   recordCopies

	// began is the record that was in force when this began, and later the one that was put in force when it was read.
	// withdrawn is what was withdrawn of it since. The agent's naming protects both.
	began     tokencache.Record
	withdrawn []tokencache.PolicyChange
}

// recordUnread puts the placeholder of an unread record on record: until that is read, tokens from before count as
// uncertain.
func (a *Agent) recordUnread(rules Rules, u *deferredRecovery, why error) {
	a.changeSaver.unread.Store(&why)
	p := rules.placeholder(unreadID, unreadWhat, why)
	p.Alone = true // it goes when the record is read, and nothing else with it
	_, err := a.enter(p)
	a.log.Error("the record of policy changes cannot be read now, and is read again: "+
		"what its copy and the marks on tokens withhold stays withheld, and "+
		consequence(p.Effect == tokencache.Revoked),
		zap.Error(why), zap.String("message_id", MessageUnreadRecord))
	if err != nil {
		a.log.Error("that could not be noted", zap.Error(err))
	}
}

// readAgain tries to read the record and the tokens until both are read or the agent is closed.
func (a *Agent) readAgain(u *deferredRecovery) {
	for wait := readAgainSoonest; u.load != nil || u.tokens != nil; wait = min(2*wait, readAgainLatest) {
		if !a.rereading.pause(wait) {
			break
		}
		var read bool
		if u.tokens != nil {
			read = a.takeTokens(u)
		}
		if u.load != nil && a.takeRecord(u) {
			u.load, read = nil, true
		}
		if read {
			a.stale.reset(a.cache.Status())
			a.snapshotSaver.notice(true)
			a.changed()
		}
	}
	if u.load == nil && u.tokens == nil {
		a.naming.Lock()
		a.deferred = nil
		a.naming.Unlock()
	}
}

// takeTokens takes over the saved tokens as far as they can be read, and the copies of the record and the marks beside
// them. It reports whether anything changed: something was read, or nothing is left to be read.
func (a *Agent) takeTokens(u *deferredRecovery) (changed bool) {
	a.snapshotSaver.whilePaused(func() { changed = a.takeTokensUnsaved(u) })
	return changed
}

// takeTokensUnsaved is takeTokens while nothing is saved.
func (a *Agent) takeTokensUnsaved(u *deferredRecovery) bool {
	copies, ours, err := u.tokens()
	if u.fault = err; err != nil {
		a.snapshotSaver.unread.Store(&err)
	} else {
		a.snapshotSaver.unread.Store(nil)
		u.tokens = nil
	}
	if err != nil && len(copies) == 0 {
		return false
	}
	late := (&Options{Copies: copies}).recordCopies()
	a.takeCopies(u, late)
	if slices.ContainsFunc(copies, func(m tokencache.Snapshot) bool { return m.DenyRules }) {
		a.missDenyRules()
	}
	rules := a.rules.Load()
	for _, m := range ours {
		a.cache.Restore(rules.allowed(m))
	}
	if len(copies) == 0 {
		a.log.Info("of the tokens that were kept none can be used: they are fetched anew")
		return true
	}
	a.log.Info("tokens that were kept were read after all",
		zap.Int("copies", len(copies)), zap.NamedError("still_unread", err))
	return true
}

// takeCopies puts in force what late has of the record. It was read later than what the agent began with; what is older
// than that is ignored.
func (a *Agent) takeCopies(u *deferredRecovery, late recordCopies) {
	older := func(of tokencache.Record) bool { return u.load == nil && u.began.Has(of) }
	late.copies = slices.DeleteFunc(late.copies, older)
	late.marks = slices.DeleteFunc(late.marks, func(m withheldMark) bool { return older(m.of) })
	u.kept = recordCopies{
		copies: append(u.kept.copies, late.copies...), marks: append(u.kept.marks, late.marks...),
		torn: u.kept.torn || late.torn, blind: u.kept.blind || late.blind,
	}
	if len(late.copies)+len(late.marks) == 0 {
		return
	}
	a.naming.Lock()
	defer a.naming.Unlock()
	rules := a.rules.Load().Rules
	for _, r := range late.copies {
		a.cache.ContinueFrom(r.Instant)
	}
	now := a.cache.Record()
	found := late.recover(&now, nil, now.Instant, rules)
	if found.why == "" {
		return
	}
	found.Changes = rules.withoutWithdrawn(found.Changes, u.withdrawn)
	u.began.Changes = slices.Concat(u.began.Changes, added(found.Changes, now.Changes))
	found.Record, _ = rules.withLostEffect(found.Record)
	found.Generation++ // also without a placeholder it has more than what it was taken from
	a.cache.ReplaceRecord(found.Record)
	logJoined(a.log, found.Changes)
	a.log.Warn(found.why,
		zap.Int("changes", len(found.Changes)), zap.Strings("revocations", revocations(found.Changes)))
	a.changeSaver.renew()
}

// takeRecord puts the record in force if it can be read, with the changes that were noted and withdrawn meanwhile.
func (a *Agent) takeRecord(u *deferredRecovery) bool {
	var (
		found       recovered
		why         error
		noted       []tokencache.PolicyChange
		placeholder tokencache.PolicyChange
	)
	rules := a.rules.Load().Rules
	a.naming.Lock() // nothing is noted or withdrawn meanwhile
	read := a.changeSaver.read(u.loadRecord, func(disk *tokencache.Record, lost error) {
		if disk != nil {
			a.cache.ContinueFrom(disk.Instant)
		}
		now := a.cache.Record()
		why, found = lost, u.kept.recover(disk, lost, now.Instant, rules)
		noted = added(now.Changes, u.began.Changes)
		record := found.Record
		record.Changes = rules.withoutWithdrawn(tokencache.Both(noted, record.Changes), u.withdrawn)
		record = anew(record, withoutPlaceholder(now), found.Record)
		found.Record, _ = rules.withLostEffect(record)
		if found.lost {
			placeholder = rules.lost(why)
			found.Changes = append(found.Changes, placeholder)
			found.Generation++
		}
		a.cache.ReplaceRecord(found.Record)
		u.began = found.Record
	})
	a.naming.Unlock()
	logJoined(a.log, found.Changes)
	switch {
	case !read:
		return false
	case found.lost:
		a.logLost(placeholder, why)
		a.cache.DropTokens()
		a.changeSaver.renew()
		return true
	}
	a.log.Info("the record of policy changes was read after all, and is in force",
		zap.Int("changes", len(found.Changes)), zap.Int("noted_meanwhile", len(noted)),
		zap.String("message_id", MessageRecordRead))
	a.changeSaver.renew()
	return true
}

// loadRecord reads the record. One that seems to be lost counts as unread while a copy of it may yet be read.
func (u *deferredRecovery) loadRecord() (*tokencache.Record, error) {
	disk, err := u.load()
	if disk != nil || u.tokens == nil || err != nil && !isSpoilt(err) {
		return disk, err
	}
	return nil, fmt.Errorf("%v; a copy of it may be where it cannot be read now: %w", cmp.Or(err, errGone), u.fault)
}

// added returns those of the changes now in force that were not in force before, or that stand for more by now. One
// that was in force before and is not now may only have been joined with another.
func added(now, before []tokencache.PolicyChange) []tokencache.PolicyChange {
	return slices.DeleteFunc(slices.Clone(now), func(p tokencache.PolicyChange) bool {
		known := func(q tokencache.PolicyChange) bool { return q.ID == p.ID && q.Joined == p.Joined }
		return p.ID == unreadID || slices.ContainsFunc(before, known)
	})
}

// withoutWithdrawn returns all without those that were withdrawn, also where a mark on a token stands for one. One that
// stands for others by now, which were not withdrawn with it, stays.
func (r Rules) withoutWithdrawn(all, withdrawn []tokencache.PolicyChange) []tokencache.PolicyChange {
	return slices.DeleteFunc(all, func(p tokencache.PolicyChange) bool {
		return slices.ContainsFunc(withdrawn, func(w tokencache.PolicyChange) bool {
			return w.ID == p.ID && r.aboutAll(w, p) && p.Joined <= w.Joined
		})
	})
}

// errNoCopy is why a record is lost whose files are gone.
var errNoCopy = errors.New("it is gone, and there was no copy of it beside the tokens")

// unreadWhat says what is wrong while the record cannot be read.
const unreadWhat = "the record of policy changes cannot be read now"
