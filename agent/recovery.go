package agent

import (
	"cmp"
	"crypto/rand"
	"fmt"
	"slices"
	"strings"

	"go.uber.org/zap"

	"perceptd/tokencache"
)

// recovered is the record that a start begins with.
type recovered struct {
	tokencache.Record
	why  string // why it is not the one on the disk; empty: it is
	lost bool   // there was a record, and neither it nor a copy of it could be read
}

// recordCopies is what snapshots have of the record. No token's text is in it.
type recordCopies struct {
	copies []tokencache.Record // those that are whole
	marks  []withheldMark
	torn   bool // a copy was left out of what was kept, so that the marks are all that is known of it
	blind  bool // a copy was kept while the record could not be read, and has what was known of it then
}

// withheldMark is a revocation that withholds a token, as the token's entry in a snapshot names it.
type withheldMark struct {
	id    string
	key   tokencache.Key
	of    tokencache.Record // which it is on: lineage, origins and generation alone
	taken tokencache.PolicyChange
}

// now returns the on-time at which the cache begins.
func (o *Options) now(clock tokencache.Clock) tokencache.Instant {
	boot := clock.Boot()
	return tokencache.Instant{On: o.On + boot, Boot: boot, BootID: o.BootID}
}

// recordCopies returns what o's snapshots have of the record.
func (o *Options) recordCopies() (k recordCopies) {
	all := o.Copies
	if all == nil && o.Snapshot != nil {
		all = []tokencache.Snapshot{*o.Snapshot}
	}
	for _, m := range all {
		k.blind = k.blind || slices.ContainsFunc(m.Record.Changes, isUnreadPlaceholder)
		if m.OnRecord > len(m.Record.Changes) {
			k.torn = true
		} else {
			k.copies = append(k.copies, copyIn(&m))
		}
		for _, r := range m.Keys {
			for _, id := range r.Withheld {
				k.marks = append(k.marks, withheldMarkOf(&m, r.Key, id))
			}
		}
	}
	return k
}

// copyIn returns the copy of the record in m, without the placeholder of a record that could not be read: it is as of
// the time before that.
func copyIn(m *tokencache.Snapshot) tokencache.Record {
	r := m.Record
	for _, p := range r.Changes {
		if p.ID == unreadID && p.Moment < r.On {
			r.On, r.Boot = p.Moment, r.Boot-(r.On-p.Moment)
		}
	}
	return withoutPlaceholder(r)
}

// withoutPlaceholder returns r as if no placeholder had been entered for a record that cannot be read. That is the
// first entry after a start. So where nothing else was noted, the result is the same as what r was taken from.
func withoutPlaceholder(r tokencache.Record) tokencache.Record {
	there := len(r.Changes)
	r.Changes = slices.DeleteFunc(slices.Clone(r.Changes), isUnreadPlaceholder)
	if len(r.Changes) < there && r.Generation > 0 {
		r.Generation--
	}
	return r
}

// withheldMarkOf returns a mark that withholds the token of one key alone. It dates from no earlier than the revocation
// that it stands for, which was on record when m was taken.
func withheldMarkOf(m *tokencache.Snapshot, key tokencache.Key, id string) withheldMark {
	of := withoutPlaceholder(m.Record)
	return withheldMark{
		id: id, key: key, of: tokencache.Record{Lineage: of.Lineage, Origins: of.Origins, Generation: of.Generation},
		taken: tokencache.PolicyChange{
			ID: id, Selector: key.Selector, Resource: key.Resource, Effect: tokencache.Revoked,
			At: m.Wall, RecordedAt: m.Wall, // and no moment: it is that of the start, which is later than the truth
			Note: "told by a mark on the token: the record of it is lost",
		},
	}
}

// recover returns the record to begin with: the newest of the one on the disk and its copies, and the revocations that
// only marks on tokens name. disk is nil where none was read; lost is why it never will be. The disk may have an older
// record, or none: a folder was mounted over the one that the record is in, an older one was put in its place, or the
// disk was full, while the tokens that the record withholds were saved elsewhere.
//
// The records that come in are as they were taken. The result is by the on-time of now, and begins a lineage.
func (k recordCopies) recover(disk *tokencache.Record, lost error, now tokencache.Instant, rules Rules) recovered {
	taken, copies := disk, make([]tokencache.Record, len(k.copies))
	for i, r := range k.copies {
		copies[i] = r.In(now)
	}
	if disk != nil {
		moved := disk.In(now)
		disk = &moved
	}
	found := newest(disk, lost, copies)
	found.lost = disk == nil && (k.blind || len(k.copies) == 0 && (lost != nil || k.torn))
	from := slices.Clone(copies)
	if disk != nil {
		from = append(from, *disk)
	}
	from = append(from, found.Record)
	if marked := k.unmet(disk, found.Changes, rules); len(marked) > 0 {
		found.Generation++
		found.Changes = slices.Concat(found.Changes, marked)
		found.why = cmp.Or(found.why,
			"marks on tokens name revocations that are not on record: they are in force for these tokens")
	}
	found.Record = anew(found.Record, from...)
	for _, r := range k.copies {
		found.Record = found.After(r, now)
	}
	if taken != nil {
		found.Record = found.After(*taken, now)
	}
	return found
}

// newest returns the newest of the record on the disk and its copies, or all that they have where none is.
func newest(disk *tokencache.Record, lost error, copies []tokencache.Record) recovered {
	other := together(copies)
	switch {
	case disk == nil && other.Generation == 0 && len(other.Changes) == 0:
		return recovered{Record: other} // a first start, or nothing was ever noted
	case disk == nil && lost != nil:
		const why = "the record of policy changes could not be read: its copy beside the tokens is in force"
		return recovered{Record: other, why: why}
	case disk == nil:
		const why = "the record of policy changes was gone: its copy beside the tokens is in force"
		return recovered{Record: other, why: why}
	case len(copies) == 0:
		return recovered{Record: *disk}
	}
	switch {
	case disk.Has(other) && standsFor(disk.Changes, other.Changes):
		return recovered{Record: *disk}
	case other.IsNewer(*disk):
		const why = "the record of policy changes was older than its copy beside the tokens: the copy is in force"
		return recovered{Record: other, why: why}
	case disk.IsNewer(other), standsFor(disk.Changes, other.Changes):
		return recovered{Record: *disk}
	}
	return recovered{
		Record: both(*disk, other),
		why: "the record of policy changes and its copy beside the tokens differ, and neither is newer: " +
			"both are in force",
	}
}

// together returns the newest of the copies, or all that they have where none is the newest.
func together(copies []tokencache.Record) (all tokencache.Record) {
	for i, r := range copies {
		switch {
		case i == 0, r.IsNewer(all):
			all = r
		case all.IsNewer(r), standsFor(all.Changes, r.Changes):
		case len(all.Changes) == 0 && all.Generation == 0:
			all = r
		default:
			all = both(all, r)
		}
	}
	return all
}

// unmet returns revocations for the marks whose own are not among those there, or are about other keys there, since
// they were joined with others that nobody knows. A record at least as new as a mark that does not have its revocation
// shows that it was withdrawn or is over.
func (k recordCopies) unmet(
	disk *tokencache.Record, there []tokencache.PolicyChange, rules Rules,
) (all []tokencache.PolicyChange) {
	records := k.copies
	if disk != nil {
		records = append(slices.Clone(records), *disk)
	}
	for _, m := range k.marks {
		known := func(p tokencache.PolicyChange) bool { return p.ID == m.id && rules.touches(p, m.key) }
		newer := func(r tokencache.Record) bool { return r.Has(m.of) }
		same := func(p tokencache.PolicyChange) bool {
			return p.Selector == m.taken.Selector && p.Resource == m.taken.Resource && strings.HasPrefix(p.ID, m.id)
		}
		switch {
		case m.id == unreadID, slices.ContainsFunc(there, known), slices.ContainsFunc(records, newer):
			continue
		case slices.ContainsFunc(there, same), slices.ContainsFunc(all, same):
			continue
		}
		p := m.taken
		taken := func(o tokencache.PolicyChange) bool { return o.ID == p.ID }
		for n := 2; slices.ContainsFunc(there, taken) || slices.ContainsFunc(all, taken); n++ { // IDs are unique
			p.ID = truncate(m.id, 56) + fmt.Sprintf("-%d", n)
		}
		all = append(all, p)
	}
	return all
}

// anew returns r, taken from those records, as the beginning of a lineage. Each start begins one, since the record that
// it read may have changed elsewhere: in a copy beside tokens that cannot be read now, or in a folder that comes back.
// By generations alone, one of the two would seem to be an older version of the other, and its own changes would be
// lost.
func anew(r tokencache.Record, from ...tokencache.Record) tokencache.Record {
	return r.WithLineage(rand.Text(), from...)
}

// both returns a record that has the changes of x and of y. A change that was withdrawn may be back, which is on the
// safe side. There may be more than there is room for: the cache then joins some, and leaves none out.
func both(x, y tokencache.Record) tokencache.Record {
	return anew(tokencache.Record{
		Generation: max(x.Generation, y.Generation) + 1, Changes: tokencache.Both(x.Changes, y.Changes),
	}, x, y)
}

// standsFor reports whether each of all is among those there, and means no more than there.
func standsFor(there, all []tokencache.PolicyChange) bool {
	for _, p := range all {
		if !slices.ContainsFunc(there, func(q tokencache.PolicyChange) bool { return q.ID == p.ID && q.StandsFor(p) }) {
			return false
		}
	}
	return true
}

// touches reports whether p is about the token of key.
func (r Rules) touches(p tokencache.PolicyChange, key tokencache.Key) bool {
	return r.aboutAll(p, tokencache.PolicyChange{Selector: key.Selector, Resource: key.Resource})
}

// aboutAll reports whether p is about all that o is about.
func (r Rules) aboutAll(p, o tokencache.PolicyChange) bool {
	if r.AnyAlternate || tokencache.GoesBy(r.OtherNames(), o.Resource, p.Resource) {
		o.Resource = p.Resource
	}
	return p.AboutAll(o)
}

func revocations(all []tokencache.PolicyChange) (ids []string) {
	for _, p := range all {
		if p.Effect == tokencache.Revoked {
			ids = append(ids, p.ID)
		}
	}
	return ids
}

// logJoined says that the cache had no room for as many changes as there were.
func logJoined(log *zap.Logger, there []tokencache.PolicyChange) {
	if len(there) > tokencache.MaxChanges {
		log.Warn(fmt.Sprintf("%d policy changes are more than there is room for, which is %d: "+
			"the oldest were joined, and none was left out; the status names what stands for others",
			len(there), tokencache.MaxChanges))
	}
}

// saveRecovered logs that the record on the disk is not the one in force, and saves the latter.
func (c *changeSaver) saveRecovered(found recovered) {
	names := revocations(found.Changes)
	if more := len(names) - listed; more > 0 {
		names = append(slices.Clone(names[:listed]), fmt.Sprintf("and %d more", more))
	}
	c.log.Warn(found.why, zap.Int("changes", len(found.Changes)), zap.Strings("revocations", names))
	_ = c.save() // why it failed is in the log and in the status
}
