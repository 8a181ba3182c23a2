package tokencache

import (
	"time"
)

// On-time is the time that the device is known to have been on, summed over its boots. Within a boot it goes with the boot
// clock; over a reboot it goes on from the latest of it that anything kept has seen. So it never goes back: what has the
// lower on-time happened earlier, whatever a wall clock said. The time between the last keeping and the end of a boot is
// not in it, nor is the time that the device was off: more time than that has truly passed.

// Taken says when something that is kept was taken.
type Instant struct {
	On     time.Duration `json:"on_ns,omitempty"`   // on-time; 0: kept by a release that had none
	Boot   time.Duration `json:"boot_ns,omitempty"` // boot time of the boot that BootID names
	BootID string        `json:"boot_id"`           // empty: not known
}

// OnAtBoot returns the on-time that it was when this boot's boot clock was zero, by all that was kept: for Options.On. bootID
// names this boot, empty when that is not known, and now is its boot time.
//
// The boot went on from the latest on-time that anything has seen in the boots before. What was taken in this boot tells how much of it
// had been seen by then. It may be less than there is: what was kept may have been in a folder that could not be read yet, or was not
// mounted. Then what was taken before is moved: see Taken.In. What may or may not be of this boot, since one of the two has no ID,
// was taken no later than now, and that is all it tells.
func OnAtBoot(bootID string, now time.Duration, kept ...Instant) time.Duration {
	var latest time.Duration
	for _, k := range kept {
		switch {
		case k.On <= 0:
		case bootID == "" || k.BootID == "":
			latest = max(latest, k.On-now)
		case k.ofBoot(bootID, now):
			latest = max(latest, k.On-k.Boot)
		default:
			latest = max(latest, k.On)
		}
	}
	return latest
}

// ofBoot reports whether k was taken in that boot, and not later in it than now.
func (k Instant) ofBoot(id string, now time.Duration) bool {
	return k.BootID != "" && k.BootID == id && k.Boot <= now
}

// In returns k by the on-time of now, which is of this boot: what was taken earlier in it, while less was known of the boots before,
// was taken at a later on-time than it says.
func (k Instant) In(now Instant) Instant {
	_, more := k.behind(now)
	k.On += more
	return k
}

// behind returns the on-time at which this boot began as it was known when k was taken, and how much later it is known to have begun
// now. 0 more: k tells nothing of this boot, or as much as is known now.
func (k Instant) behind(now Instant) (began, more time.Duration) {
	if k.On <= 0 || !k.ofBoot(now.BootID, now.Boot) {
		return 0, 0
	}
	began = k.On - k.Boot
	return began, max(0, now.On-now.Boot-began)
}

// takenLocked stamps what is taken from c now.
func (c *Cache) instantLocked() Instant {
	now := c.now()
	return Instant{On: c.onAt(now), Boot: time.Duration(now), BootID: c.bootID}
}

// GoOn has on-time go on from where kept was taken, which could not be read when c began: what happened in this boot happened
// later than all that was kept in the boots before.
func (c *Cache) ContinueFrom(kept Instant) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.now()
	began := c.on
	more := OnAtBoot(c.bootID, time.Duration(now), kept) - began
	if more <= 0 {
		return
	}
	c.on += more
	for _, ch := range c.changes {
		ch.shift(began, more)
	}
	for _, e := range c.entries {
		e.token.receipt.shift(began, more)
	}
	if c.countedOn > began {
		c.countedOn += more
	}
	for i := range c.tombstones {
		r := &c.tombstones[i]
		if r.receipt.shift(began, more); r.cameOn > began {
			r.cameOn += more
		}
	}
	c.rejudgeLocked(now)
}

// goOn has the change be later by more, if it was noted in the boot that began then, for whatever time.
func (p *PolicyChange) shift(began, more time.Duration) {
	if p.By > began || p.By == began && p.Moment < began {
		p.Moment, p.By = p.Moment+more, p.By+more
	}
}
