package agent

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"

	"go.uber.org/zap"

	"perceptd/tokencache"
)

// IDs of entries in the journal that tell of the record of policy changes.
const (
	MessageLostRecord   = "4f0c1d6be1a94b7c8b3a52d09e6f7712" // it is lost: nobody knows what was on it
	MessageUnreadRecord = "a8e3b7054c2f4d19b6d07c51f2e98a36" // it cannot be read now
	MessageRecordRead   = "d51b9c2e7f6840a3915e0b84c6a27f3d" // it was read after all
)

const (
	// unreadID is the ID of the change that stands for a record that cannot be read now. It is on no record that is kept.
	unreadID = "unread"
	// lostPrefix begins the IDs of changes that stand for a record that is lost.
	lostPrefix = "lost-"

	readAgainSoonest, readAgainLatest = time.Second, time.Minute
)

// standsForLost reports whether p stands for a record that is lost. Releases before this one gave it no ID of its own.
func standsForLost(p tokencache.PolicyChange) bool {
	return p.ID != unreadID && (p.Effect == tokencache.Unknown || strings.HasPrefix(p.ID, lostPrefix))
}

// lostEffect is what becomes of tokens from before when nobody knows what was on record.
func (r Rules) lostEffect() tokencache.Effect {
	if r.WithholdLost {
		return tokencache.Revoked
	}
	return tokencache.Unknown
}

// standIn is the policy change that stands for a record that could not be read.
func (r Rules) standIn(id, what string, why error) tokencache.PolicyChange {
	printable := strings.Map(func(c rune) rune {
		if unicode.IsPrint(c) {
			return c
		}
		return ' '
	}, why.Error())
	return tokencache.PolicyChange{ID: id, AllIdentities: true, Effect: r.lostEffect(), Note: cut(what+": "+printable, maxNote)}
}

// withLostEffect has the changes on r that stand for a lost record do what the rules want of them.
func (r Rules) withLostEffect(record tokencache.Record) (_ tokencache.Record, different bool) {
	record.Changes = slices.Clone(record.Changes)
	for i := range record.Changes {
		p := &record.Changes[i]
		if p.Joined > 0 && p.Effect == tokencache.Revoked {
			continue // it may stand for revocations as well
		}
		if (standsForLost(*p) || p.ID == unreadID) && p.Effect != r.lostEffect() {
			if standsForLost(*p) && !strings.HasPrefix(p.ID, lostPrefix) {
				p.ID = lostPrefix + p.ID // else it could not be told from a revocation
			}
			p.Effect, different = r.lostEffect(), true
		}
	}
	if different {
		record.Generation++
	}
	return record, different
}

// applyLostEffect has changes that stand for a lost record do what new rules want of them.
func (a *Agent) applyLostEffect(rules Rules) {
	a.naming.Lock()
	defer a.naming.Unlock()
	record, different := rules.withLostEffect(a.cache.Record())
	if different {
		a.cache.Replace(record)
		a.record.notice()
	}
}

// lost is the policy change that stands for a record that is lost.
func (r Rules) lost(why error) tokencache.PolicyChange {
	return r.standIn(lostPrefix+newID(), "the record of policy changes could not be read", why)
}

// noteLost puts on record that nobody knows what was on record before.
func (a *Agent) noteLost(rules Rules, why error) {
	p, err := a.enter(rules.lost(why))
	a.tellLost(p, why)
	if err != nil {
		a.log.Error("that could not be noted", zap.Error(err))
		return
	}
	_ = a.record.save() // why it failed is in the log and in the status
}

func (a *Agent) tellLost(p tokencache.PolicyChange, why error) {
	a.log.Error("the record of policy changes is lost: "+consequence(p), zap.Error(why), zap.String("message_id", MessageLostRecord))
}

func consequence(p tokencache.PolicyChange) string {
	if p.Effect == tokencache.Revoked {
		return "every token from before is withheld"
	}
	return "every token from before counts as uncertain"
}

// lostTrouble says what to do about a record that could not be read, which stays trouble until
// somebody did it.
func lostTrouble(p tokencache.PolicyChange) string {
	return fmt.Sprintf("%s; %s: %s", p.Note, consequence(p), lostMend(p))
}

// lostMend is what a person does about a lost record.
func lostMend(p tokencache.PolicyChange) string {
	return "enter the changes of the last two days again (perceptctl policy-changed), then: perceptctl policy-changes withdraw " + p.ID
}

// withheldForRecord returns what stands for the record, where that alone withholds the token of key, and no revocation that somebody noted.
func (a *Agent) withheldForRecord(key tokencache.Key) (standIn NotedChange, alone bool) {
	for _, p := range a.cache.Withholders(key) {
		c := NotedChange{Noted: tokencache.Noted{PolicyChange: p}}
		if c.Record, c.Mend = a.record.standsFor(p); c.Record == 0 {
			return NotedChange{}, false
		}
		if !alone {
			standIn, alone = c, true
		}
	}
	return standIn, alone
}

// standsFor tells what is wrong with the record where p stands for it, and what a person does about that; zero where somebody noted p.
func (r *record) standsFor(p tokencache.PolicyChange) (state RecordState, mend string) {
	switch why := r.unread.Load(); {
	case p.ID == unreadID && why != nil:
		return RecordUnread, unreadMend(*why)
	case standsForLost(p):
		return RecordLost, lostMend(p)
	}
	return 0, ""
}

// forgotten is m without the tokens, which are fetched anew. One that comes again was received when it was first.
func forgotten(m *tokencache.Memory) *tokencache.Memory {
	if m == nil {
		return nil
	}
	left := *m
	left.Keys, left.Bygones = slices.Clone(m.Keys), slices.Clone(m.Bygones)
	for i := range left.Keys {
		k := &left.Keys[i]
		if b, ok := k.Bygone(); ok {
			left.Bygones = append(left.Bygones, b)
		}
		k.Token = tokencache.Token{}
		if k.Next != tokencache.Never {
			k.Next = m.Boot
		}
	}
	return &left
}

// unread is a record that cannot be read now, and what is in force meanwhile.
type unread struct {
	load   func() (*tokencache.Record, error)                        // nil: the record was read, and only tokens were not
	tokens func() ([]tokencache.Memory, []*tokencache.Memory, error) // nil: they were read
	fault  error                                                     // why the tokens cannot be read now
	kept   kept

	// began is what was in force when it was found that it cannot be read, and then what was put in force when it was read. withdrawn is
	// what was withdrawn of it since. The agent's naming protects both.
	began     tokencache.Record
	withdrawn []tokencache.PolicyChange
}

// noteUnread has tokens from before count as uncertain until the record is read, and reads it again until it is.
func (a *Agent) noteUnread(rules Rules, u *unread, why error) {
	a.record.unread.Store(&why)
	p := rules.standIn(unreadID, unreadWhat, why)
	p.Alone = true // it goes when the record is read, and nothing else with it
	p, err := a.enter(p)
	a.log.Error("the record of policy changes cannot be read now, and is read again: what its copy and the marks on tokens withhold stays withheld, and "+consequence(p),
		zap.Error(why), zap.String("message_id", MessageUnreadRecord))
	if err != nil {
		a.log.Error("that could not be noted", zap.Error(err))
	}
}

// readAgain reads the record and the tokens until both can be, or the agent is closed.
func (a *Agent) readAgain(u *unread) {
	for wait := readAgainSoonest; (u.load != nil || u.tokens != nil) && a.record.pause(wait); wait = min(2*wait, readAgainLatest) {
		var read bool
		if u.tokens != nil {
			read = a.takeTokens(u)
		}
		if u.load != nil && a.takeRecord(u) {
			u.load, read = nil, true
		}
		if read {
			a.chase.restart(a.cache.Status())
			a.memory.notice(true)
			a.changed()
		}
	}
	if u.load == nil && u.tokens == nil {
		a.naming.Lock()
		a.unread = nil
		a.naming.Unlock()
	}
}

// takeTokens takes over what was kept of the tokens as far as it can be read, with the copies of the record and the marks that are in
// it, and reports whether anything changed: something was read, or nothing is unread any more.
func (a *Agent) takeTokens(u *unread) bool {
	a.memory.saving.Lock()
	defer a.memory.saving.Unlock()
	if a.memory.closed {
		return false
	}
	copies, ours, err := u.tokens()
	if u.fault = err; err != nil {
		a.memory.unread.Store(&err)
	} else {
		a.memory.unread.Store(nil)
		u.tokens = nil
	}
	if err != nil && len(copies) == 0 {
		return false
	}
	late := (&Options{Copies: copies}).told()
	a.takeCopies(u, late)
	rules := a.rules.Load()
	for _, m := range ours {
		a.cache.Recall(rules.allowed(m))
	}
	a.log.Info("tokens that were kept were read after all", zap.Int("copies", len(copies)), zap.NamedError("still_unread", err))
	return true
}

// takeCopies puts what late tells of the record in force, which was read later than the record that the agent began with, or than what
// there was of one. What is older than that tells nothing.
func (a *Agent) takeCopies(u *unread, late kept) {
	older := func(of tokencache.Record) bool { return u.load == nil && u.began.Has(of) }
	late.copies = slices.DeleteFunc(late.copies, older)
	late.marks = slices.DeleteFunc(late.marks, func(m mark) bool { return older(m.of) })
	u.kept = kept{
		copies: append(u.kept.copies, late.copies...), marks: append(u.kept.marks, late.marks...),
		torn: u.kept.torn || late.torn, blind: u.kept.blind || late.blind,
	}
	if len(late.copies)+len(late.marks) == 0 {
		return
	}
	a.naming.Lock()
	defer a.naming.Unlock()
	rules := a.rules.Load().rules
	for _, r := range late.copies {
		a.cache.GoOn(r.Taken)
	}
	now := a.cache.Record()
	found := late.recover(&now, nil, now.Taken, rules)
	if found.why == "" {
		return
	}
	found.Changes = slices.DeleteFunc(found.Changes, func(p tokencache.PolicyChange) bool { return rules.haveGone(u.withdrawn, p) })
	u.began.Changes = slices.Concat(u.began.Changes, added(found.Changes, now.Changes))
	found.Record, _ = rules.withLostEffect(found.Record)
	found.Generation++ // also without what stands for a record that cannot be read, it is more than it was taken from
	a.cache.Replace(found.Record)
	logJoined(a.log, found.Changes)
	a.log.Warn(found.why, zap.Int("changes", len(found.Changes)), zap.Strings("revocations", revocations(found.Changes)))
	a.record.renew()
}

// takeRecord puts the record in force if it can be read, with what was noted and withdrawn meanwhile.
func (a *Agent) takeRecord(u *unread) bool {
	var (
		found    recovered
		why      error
		noted    []tokencache.PolicyChange
		standsIn tokencache.PolicyChange
	)
	rules := a.rules.Load().rules
	a.naming.Lock() // nothing is noted or withdrawn meanwhile
	read := a.record.read(u.loadRecord, func(disk *tokencache.Record, lost error) {
		if disk != nil {
			a.cache.GoOn(disk.Taken)
		}
		now := a.cache.Record()
		why, found = lost, u.kept.recover(disk, lost, now.Taken, rules)
		noted = added(now.Changes, u.began.Changes)
		record := found.Record
		record.Changes = slices.DeleteFunc(tokencache.Both(noted, record.Changes), func(p tokencache.PolicyChange) bool { return rules.haveGone(u.withdrawn, p) })
		record = anew(record, withoutStandIn(now), found.Record)
		found.Record, _ = rules.withLostEffect(record)
		if found.lost {
			standsIn = rules.lost(why)
			found.Changes = append(found.Changes, standsIn)
			found.Generation++
		}
		a.cache.Replace(found.Record)
		u.began = found.Record
	})
	a.naming.Unlock()
	logJoined(a.log, found.Changes)
	switch {
	case !read:
		return false
	case found.lost:
		a.tellLost(standsIn, why)
		a.cache.DropTokens()
		a.record.renew()
		return true
	}
	a.log.Info("the record of policy changes was read after all, and is in force", zap.Int("changes", len(found.Changes)),
		zap.Int("noted_meanwhile", len(noted)), zap.String("message_id", MessageRecordRead))
	a.record.renew()
	return true
}

// loadRecord reads the record. One that is lost, for all that is known, counts as unread while a copy of it may yet be read.
func (u *unread) loadRecord() (*tokencache.Record, error) {
	disk, err := u.load()
	if disk != nil || u.tokens == nil || err != nil && !isSpoilt(err) {
		return disk, err
	}
	return nil, fmt.Errorf("%v; a copy of it may be where it cannot be read now: %w", cmp.Or(err, errGone), u.fault)
}

// added returns those of now, the changes in force, that are not among what was in force before, and those that stand for more
// by now. What is there no more may only have been joined, and says nothing.
func added(now, before []tokencache.PolicyChange) []tokencache.PolicyChange {
	return slices.DeleteFunc(slices.Clone(now), func(p tokencache.PolicyChange) bool {
		known := func(q tokencache.PolicyChange) bool { return q.ID == p.ID && q.Joined == p.Joined }
		return p.ID == unreadID || slices.ContainsFunc(before, known)
	})
}

// haveGone reports whether p is one of those that were withdrawn, or what stands for it by a mark on a token, and stands for no others by now
// that were not withdrawn with it.
func (r Rules) haveGone(withdrawn []tokencache.PolicyChange, p tokencache.PolicyChange) bool {
	return slices.ContainsFunc(withdrawn, func(w tokencache.PolicyChange) bool {
		return w.ID == p.ID && r.aboutAll(w, p) && p.Joined <= w.Joined
	})
}

// errNoCopy is why a record is lost whose files are gone.
var errNoCopy = errors.New("it is gone, and there was no copy of it beside the tokens")

// unreadError is why nothing can be kept yet.
type unreadError struct{ why error }

func (e *unreadError) Error() string {
	return fmt.Sprintf("the record of policy changes cannot be read now, and is not overwritten before it was: %v", e.why)
}

func (e *unreadError) Unwrap() error { return e.why }

// unkept says what holds of something that is in force and could not be kept on the disk.
func (a *Agent) unkept(done string, err error) *Error {
	if unread, ok := errors.AsType[*unreadError](err); ok {
		return &Error{Reason: NotKept, Detail: fmt.Sprintf("%s, and %v; it is put on it when that is read, and till then %s; %s", done, err, a.memory.outlives(true), unreadMend(unread.why))}
	}
	return &Error{Reason: NotKept, Detail: fmt.Sprintf("%s, and not on the disk: %v; %s; %s; %s", done, err, a.memory.outlives(false), mendOf(err), triedAgain)}
}

// unreadWhat is what is wrong while the record cannot be read.
const unreadWhat = "the record of policy changes cannot be read now"

// unreadMend is what a person does about a record that cannot be read now, if it must be for good.
func unreadMend(why error) string {
	return mendOf(why) + "; it is read again every minute, and at once by perceptctl reload. If it never can be, move its two files (policy-changes.json, policy-changes.copy.json), and whatever begins with tokens.sealed and cannot be read either, " +
		"out of the state folder while perceptd runs. What no copy tells of is lost then, and the status says what to do about that"
}
