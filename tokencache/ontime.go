package tokencache

import "time"

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
