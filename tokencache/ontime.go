package tokencache

import (
	"time"
)

// On-time is the time that the device is known to have been on, summed over its boots. Within a boot it goes with the
// boot clock; over a reboot it goes on from the latest of it that anything kept has seen. So it never goes back: what
// has the lower on-time happened earlier, whatever a wall clock said. The time between the last keeping and the end of
// a boot is not in it, nor is the time that the device was off: more time than that has truly passed.

// Instant says when something that is kept was taken.
type Instant struct {
	On     time.Duration `json:"on_ns,omitempty"`   // on-time; 0: kept by a release without on-time
	Boot   time.Duration `json:"boot_ns,omitempty"` // boot time of the boot that BootID names
	BootID string        `json:"boot_id"`           // empty: not known
}

// OnAtBoot returns the on-time at which this boot began, by everything that was kept: for Options.On. bootID names this
// boot, empty if it is not known, and now is its boot time.
//
// The boot began at the latest on-time that was kept in earlier boots. What was kept in this boot shows how much of
// that was known then. It may have been less: a folder may not have been readable or mounted yet. Then Instant.In
// shifts what was kept. If one of the two has no boot ID, so that the boots may be the same or not, what was kept shows
// only that it was kept no later than now.
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

// ofBoot reports whether k was taken in that boot, and no later in it than now.
func (k Instant) ofBoot(id string, now time.Duration) bool {
	return k.BootID != "" && k.BootID == id && k.Boot <= now
}

// In returns k by the on-time of now, which is of this boot. If k was taken earlier in this boot, while less was known
// of the boots before, it was taken at a later on-time than it says.
func (k Instant) In(now Instant) Instant {
	_, more := k.behind(now)
	k.On += more
	return k
}

// behind returns the on-time at which this boot began as it was known when k was taken, and how much later it began as
// is known now. more is 0 if k says nothing about this boot, or as much as is known now.
func (k Instant) behind(now Instant) (began, more time.Duration) {
	if k.On <= 0 || !k.ofBoot(now.BootID, now.Boot) {
		return 0, 0
	}
	began = k.On - k.Boot
	return began, max(0, now.On-now.Boot-began)
}

// instantLocked returns the present moment, as what is taken from c is stamped with.
func (c *Cache) instantLocked() Instant {
	now := c.now()
	return Instant{On: c.onAt(now), Boot: time.Duration(now), BootID: c.bootID}
}

// ContinueFrom continues on-time from where kept was taken, which could not be read when c began: everything in this
// boot happened later than everything that was kept in earlier boots.
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

// shift moves p later by more, if it was recorded in the boot that began then.
func (p *PolicyChange) shift(began, more time.Duration) {
	if p.By > began || p.By == began && p.Moment < began {
		p.Moment, p.By = p.Moment+more, p.By+more
	}
}
