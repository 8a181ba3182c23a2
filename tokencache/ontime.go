package tokencache

import (
	"slices"
	"time"
)

// On-time is the time that the device is known to have been on, summed over its boots. Within a boot it goes with the boot
// clock; over a reboot it goes on from the latest of it that anything kept has seen. So it never goes back: what has the
// lower on-time happened earlier, whatever a wall clock said. The time between the last keeping and the end of a boot is
// not in it, nor is the time that the device was off: more time than that has truly passed.

// Taken says when something that is kept was taken.
type Taken struct {
	On     time.Duration // on-time; 0: kept by a release that had none
	Boot   time.Duration // boot time of the boot that BootID names
	BootID string        // empty: not known
}

// OnAtBoot returns the on-time that it was when this boot's boot clock was zero, by all that was kept: for Options.On. bootID
// names this boot, empty when that is not known, and now is its boot time.
//
// What was taken in this boot tells it exactly, also where an older file stands beside it, or a later one of another
// life of the device. Else the boot went on from the latest on-time that anything has seen. What may or may not be of this
// boot, since one of the two has no ID, was taken no later than now, and that is all it tells.
func OnAtBoot(bootID string, now time.Duration, kept ...Taken) time.Duration {
	var latest, own time.Duration
	known := false
	for _, k := range kept {
		switch {
		case k.On <= 0:
		case bootID == "" || k.BootID == "":
			latest = max(latest, k.On-now)
		case k.BootID == bootID && k.Boot <= now:
			own, known = max(own, k.On-k.Boot), true
		default:
			latest = max(latest, k.On)
		}
	}
	if known {
		return own
	}
	return latest
}

// takenLocked stamps what is taken from c now.
func (c *Cache) takenLocked() Taken {
	now := c.clock.Boot()
	return Taken{On: c.on + now, Boot: now, BootID: c.bootID}
}

// After returns r where the changes that kept lacks, an older copy of it, are from no earlier than that was taken: they were
// noted later, in a boot that may not have known of kept, and so went on from a lower on-time. What both have is from no
// earlier than either says.
func (r Record) After(kept Record) Record {
	r.Changes = slices.Clone(r.Changes)
	for i := range r.Changes {
		p, moment, by := &r.Changes[i], kept.On, kept.On
		if j := slices.IndexFunc(kept.Changes, func(q PolicyChange) bool { return q.ID == p.ID }); j >= 0 {
			moment, by = kept.Changes[j].Moment, kept.Changes[j].By
		}
		if p.Moment != 0 && moment != 0 { // else that is not known
			p.Moment, p.By = max(p.Moment, moment), max(p.By, by)
		}
	}
	return r
}

// GoOn has on-time go on from where kept was taken, which could not be read when c began: what happened in this boot happened
// later than all that was kept in the boots before.
func (c *Cache) GoOn(kept Taken) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.clock.Boot()
	began := c.on
	more := OnAtBoot(c.bootID, now, kept) - began
	if more <= 0 {
		return
	}
	c.on += more
	for _, ch := range c.changes {
		if ch.By >= began {
			ch.Moment, ch.By = ch.Moment+more, ch.By+more
		}
	}
	for _, e := range c.entries {
		e.receipt.goOn(began, more)
	}
	for i := range c.bygones {
		c.bygones[i].receipt.goOn(began, more)
	}
	c.rejudgeLocked(now)
}

// goOn has the receipt be later by more, if it was in the boot that began then.
func (r *receipt) goOn(began, more time.Duration) {
	if r.on >= began {
		r.on, r.from, r.to = r.on+more, r.from+more, r.to+more
	}
}
