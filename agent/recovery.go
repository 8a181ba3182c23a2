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

// recovered is the record to begin with.
type recovered struct {
	tokencache.Record
	why  string // the record on the disk is not this one; empty: it is
	lost bool   // there was a record, and neither it nor a copy of it could be read
}

// kept is what the copies of what a cache knew tell of the record. No token's text is in it.
type recordCopies struct {
	copies []tokencache.Record // whole ones
	marks  []withheldMark
	torn   bool // a copy was left out of what was kept, so that the marks are all that is known of it
	blind  bool // a copy was kept while the record could not be read, and has what was known of it then
}

// mark is a revocation that withholds a token, by the token.
type withheldMark struct {
	id    string
	key   tokencache.Key
	of    tokencache.Record // which it is on: lineage, origins and generation alone
	taken tokencache.PolicyChange
}

// now is this moment in on-time, by which the cache begins.
func (o *Options) now(clock tokencache.Clock) tokencache.Instant {
	boot := clock.Boot()
	return tokencache.Instant{On: o.On + boot, Boot: boot, BootID: o.BootID}
}

// told is what o's copies tell.
func (o *Options) recordCopies() (k recordCopies) {
	all := o.Copies
	if all == nil && o.Snapshot != nil {
		all = []tokencache.Snapshot{*o.Snapshot}
	}
	for _, m := range all {
		k.blind = k.blind || slices.ContainsFunc(m.Record.Changes, func(p tokencache.PolicyChange) bool { return p.ID == unreadID })
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

// copyIn is the record that m has. What was on the record while that could not be read is not on it: it is as of before.
func copyIn(m *tokencache.Snapshot) tokencache.Record {
	r := m.Record
	for _, p := range r.Changes {
		if p.ID == unreadID && p.Moment < r.On {
			r.On, r.Boot = p.Moment, r.Boot-(r.On-p.Moment)
		}
	}
	return withoutPlaceholder(r)
}

// withoutStandIn is r as if nothing had been entered for a record that cannot be read, which is the first that is after a start. So where
// nothing else was noted it is the same as what it was taken from.
func withoutPlaceholder(r tokencache.Record) tokencache.Record {
	there := len(r.Changes)
	r.Changes = slices.DeleteFunc(slices.Clone(r.Changes), func(p tokencache.PolicyChange) bool { return p.ID == unreadID })
	if len(r.Changes) < there && r.Generation > 0 {
		r.Generation--
	}
	return r
}

// markOf has the token's key alone withheld, from no earlier than the revocation that it stands for, which was on record when m
// was taken.
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

// recover returns the record to begin with: the newest of that on the disk, nil where none was read, and its copies, and what the
// marks on tokens tell beyond them. A folder may be mounted over the one that the record is in, an older one put in its place,
// or the disk may have been full, while the tokens that it withholds were kept elsewhere. lost says that what is on
// the disk is no record any more. What was kept is as it was taken; what is returned is by the on-time of now, and the beginning of a lineage.
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
		found.why = cmp.Or(found.why, "marks on tokens name revocations that are not on record: they are in force for these tokens")
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

// newest returns the newer of the record and its copies.
func newest(disk *tokencache.Record, lost error, copies []tokencache.Record) recovered {
	other := together(copies)
	switch {
	case disk == nil && other.Generation == 0 && len(other.Changes) == 0:
		return recovered{Record: other} // a first start, or nothing was ever noted
	case disk == nil && lost != nil:
		return recovered{Record: other, why: "the record of policy changes could not be read: its copy beside the tokens is in force"}
	case disk == nil:
		return recovered{Record: other, why: "the record of policy changes was gone: its copy beside the tokens is in force"}
	case len(copies) == 0:
		return recovered{Record: *disk}
	}
	switch {
	case disk.Has(other) && standsFor(disk.Changes, other.Changes):
		return recovered{Record: *disk}
	case other.IsNewer(*disk):
		return recovered{Record: other, why: "the record of policy changes was older than its copy beside the tokens: the copy is in force"}
	case disk.IsNewer(other), standsFor(disk.Changes, other.Changes):
		return recovered{Record: *disk}
	}
	return recovered{
		Record: both(*disk, other),
		why:    "the record of policy changes and its copy beside the tokens differ, and neither is newer: both are in force",
	}
}

// together returns the newest of the copies, or all that they have where none is.
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

// unmet returns what stands for the marks whose revocations are not among those there, or are about other keys there: what joined them is
// not known then. A record that is at least as new as the mark and has no such revocation tells that it was withdrawn, or is over.
func (k recordCopies) unmet(disk *tokencache.Record, there []tokencache.PolicyChange, rules Rules) (all []tokencache.PolicyChange) {
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
		if m.id == unreadID || slices.ContainsFunc(there, known) || slices.ContainsFunc(records, newer) || slices.ContainsFunc(slices.Concat(there, all), same) {
			continue
		}
		p := m.taken
		taken := func(o tokencache.PolicyChange) bool { return o.ID == p.ID }
		for n := 2; slices.ContainsFunc(there, taken) || slices.ContainsFunc(all, taken); n++ { // a change has an ID of its own
			p.ID = cut(m.id, 56) + fmt.Sprintf("-%d", n)
		}
		all = append(all, p)
	}
	return all
}

// anew returns r, taken from those records, as the beginning of another lineage. Each start begins one, since what its record was taken from
// may have gone on elsewhere: in a copy beside tokens that cannot be read now, or in a folder that comes back. By generations alone the one
// would seem to be the older one of the other, and what it has of its own would be lost.
func anew(r tokencache.Record, from ...tokencache.Record) tokencache.Record {
	return r.Begun(rand.Text(), from...)
}

// both is what stands for x and for y. A change that was withdrawn may be back, which is on the safe side. It may be more than there is
// room for: the cache joins some then, and leaves none out.
func both(x, y tokencache.Record) tokencache.Record {
	return anew(tokencache.Record{
		Generation: max(x.Generation, y.Generation) + 1, Changes: tokencache.Both(x.Changes, y.Changes),
	}, x, y)
}

// standsFor reports whether each of all is among those there, and means no more than it does there.
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
	if tokencache.GoesBy(r.Alternates, o.Resource, p.Resource) {
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
		log.Warn(fmt.Sprintf("%d policy changes are more than there is room for, which is %d: the oldest were joined, and none was left out; the status names what stands for others",
			len(there), tokencache.MaxChanges))
	}
}

// restore says that the record on the disk is not what is in force, and keeps it anew.
func (c *changeSaver) restore(found recovered) {
	names := revocations(found.Changes)
	if more := len(names) - listed; more > 0 {
		names = append(slices.Clone(names[:listed]), fmt.Sprintf("and %d more", more))
	}
	c.log.Warn(found.why, zap.Int("changes", len(found.Changes)), zap.Strings("revocations", names))
	_ = c.save() // why it failed is in the log and in the status
}
