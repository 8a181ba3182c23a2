package agent

import (
	"cmp"
	"crypto/rand"
	"fmt"
	"slices"
	"time"

	"go.uber.org/zap"

	"perceptd/tokencache"
)

// recovered is the record to begin with.
type recovered struct {
	tokencache.Record
	why    string   // the record on the disk is not this one; empty: it is
	gained []string // ids of revocations that the record on the disk does not have
}

// anew returns r as the beginning of another lineage. What it was taken from may go on elsewhere, in a folder that comes back:
// by generations alone the one would seem to be the older one of the other, and what it has of its own would be lost.
func anew(r tokencache.Record) tokencache.Record {
	r.Lineage = rand.Text()
	return r
}

// recover returns the newer of the record and its copy in Memory. A folder may be mounted over the one that the record is in,
// an older one put in its place, or the disk may have been full, while the tokens that it withholds were kept elsewhere.
func (o *Options) recover(now time.Duration) recovered {
	disk, other := o.Record, o.copied(now)
	switch {
	case disk == nil && other.Generation == 0 && len(other.Changes) == 0:
		other.Lineage = cmp.Or(other.Lineage, rand.Text())
		return recovered{Record: other} // a first start, or nothing was ever noted
	case disk == nil && o.LostRecord != nil:
		return recovered{anew(other), "the record of policy changes could not be read: its copy beside the tokens is in force", revocations(other.Changes)}
	case disk == nil:
		return recovered{anew(other), "the record of policy changes was gone: its copy beside the tokens is in force", revocations(other.Changes)}
	}
	gained := lacking(disk.Changes, other.Changes)
	ordered := other.Lineage == disk.Lineage
	switch {
	case ordered && other.Generation > disk.Generation:
		return recovered{anew(other), "the record of policy changes was older than its copy beside the tokens: the copy is in force", revocations(gained)}
	case ordered && other.Generation < disk.Generation || len(gained) == 0:
		return recovered{Record: *disk}
	}
	// A change that was withdrawn may be back, which is on the safe side.
	both := anew(tokencache.Record{Generation: max(disk.Generation, other.Generation) + 1, Changes: slices.Concat(disk.Changes, gained)})
	if len(both.Changes) > tokencache.MaxChanges { // what withholds tokens goes first
		slices.SortStableFunc(both.Changes, func(x, y tokencache.PolicyChange) int { return cmp.Compare(leniency(x), leniency(y)) })
		both.Changes = both.Changes[:tokencache.MaxChanges]
	}
	return recovered{both, "the record of policy changes and its copy beside the tokens differ, and neither is newer: both are in force", revocations(gained)}
}

// copied is the record that Memory has, by this boot's clock.
func (o *Options) copied(now time.Duration) tokencache.Record {
	if o.Memory == nil {
		return tokencache.Record{}
	}
	r := o.Memory.Record
	r.Changes = slices.Clone(r.Changes)
	for i := range r.Changes {
		if p := &r.Changes[i]; p.Floating && (o.BootID == "" || o.Memory.BootID != o.BootID || p.BootAt > now) {
			p.BootAt = now // its boot is over: later than the truth, and so on the safe side
		}
	}
	return r
}

// lacking returns those of all that are not among there, by id: two starts may date a floating change differently.
func lacking(there, all []tokencache.PolicyChange) (left []tokencache.PolicyChange) {
	for _, p := range all {
		if !slices.ContainsFunc(there, func(q tokencache.PolicyChange) bool { return q.ID == p.ID }) {
			left = append(left, p)
		}
	}
	return left
}

func leniency(p tokencache.PolicyChange) int {
	switch p.Effect {
	case tokencache.Revoked:
		return 0
	case tokencache.Unknown:
		return 1
	}
	return 2
}

func revocations(all []tokencache.PolicyChange) (ids []string) {
	for _, p := range all {
		if p.Effect == tokencache.Revoked {
			ids = append(ids, p.ID)
		}
	}
	return ids
}

// restore says that the record on the disk is not what is in force, and keeps it anew.
func (r *record) restore(found recovered) {
	names := found.gained
	if more := len(names) - listed; more > 0 {
		names = append(slices.Clone(names[:listed]), fmt.Sprintf("and %d more", more))
	}
	r.log.Warn(found.why, zap.Int("changes", len(found.Changes)), zap.Strings("revocations", names))
	r.wrong = true // nobody else has r yet
	_ = r.save()   // why it failed is in the log and in the status
}
