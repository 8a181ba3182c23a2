// Package clock reads the device's clocks for tokencache.
//
// Go's own timers run on CLOCK_MONOTONIC, which stands still while the device is suspended, so that a
// token would be kept past its expiry by as long as the device slept. Here elapsed time and timers run
// on CLOCK_BOOTTIME, and a timer that came due during a suspend fires on resume.
//
// The caller stops the timers that it no longer needs: each holds a file descriptor until it fires or
// is stopped.
package clock

import (
	"math"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"perceptd/tokencache"
)

// syncCheck is how long an answer about synchronisation is reused: it is asked for at each token
// request, and the kernel's answer changes within minutes at the earliest.
const syncCheck = 5 * time.Second

// Device returns the device's clock.
func Device() tokencache.Clock {
	start := time.Now()
	// Elapsed by Go's clock, which costs no system call: a suspend only makes an answer last a little longer.
	sync := &synchronisation{elapsed: func() time.Duration { return time.Since(start) }, read: func() bool {
		return synchronised(unix.Adjtimex, "/run/systemd/timesync/synchronized")
	}}
	return tokencache.Clock{Wall: wall, Boot: boot, Synchronised: sync.known, Timer: timer}
}

// Fast returns the device's clock running speed times faster from now on, for the simulated back end:
// Wall and Boot begin at the device's and then run ahead of them, Timer fires speed times sooner, and
// the clock counts as synchronised with itself. A step of the device's wall clock does not move it.
// A speed that is not a positive finite number counts as 1.
func Fast(speed float64) tokencache.Clock {
	if !(speed > 0) || math.IsInf(speed, 1) {
		speed = 1
	}
	startWall, startBoot := wall(), boot()
	elapsed := func() time.Duration { return scale(boot()-startBoot, speed) }
	return tokencache.Clock{
		Wall:         func() time.Time { return startWall.Add(elapsed()) },
		Boot:         func() time.Duration { return startBoot + elapsed() },
		Synchronised: func() bool { return true },
		Timer: func(d time.Duration) (<-chan time.Time, func() bool) {
			return timer(scale(d, 1/speed))
		},
	}
}

// wall strips the monotonic reading, which would make Sub and Before ignore suspended time and steps.
func wall() time.Time { return time.Now().Round(0) }

func boot() time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &t); err != nil {
		// Linux has had this clock since 2.6.39; without it no deadline could be kept.
		panic("clock: CLOCK_BOOTTIME: " + err.Error())
	}
	return time.Duration(t.Nano())
}

// scale multiplies d, rounding away from zero so that a scaled timer never fires early, and stops at
// the longest duration there is, half of it to leave room for adding a start.
func scale(d time.Duration, by float64) time.Duration {
	const longest = time.Duration(math.MaxInt64 / 2)
	x := float64(d) * by
	switch {
	case x >= float64(longest):
		return longest
	case x <= -float64(longest):
		return -longest
	case x < 0:
		return time.Duration(math.Floor(x))
	}
	return time.Duration(math.Ceil(x))
}

// synchronisation remembers the kernel's answer for syncCheck.
type synchronisation struct {
	elapsed func() time.Duration // since some start
	read    func() bool

	// last is the elapsed time in nanoseconds at which the answer was read, negated when the answer was
	// no; zero before the first. One word, so that requests share it without a lock.
	last atomic.Int64
}

func (s *synchronisation) known() bool {
	now := s.elapsed()
	if last := s.last.Load(); last != 0 && now-time.Duration(max(last, -last)) < syncCheck {
		return last > 0
	}
	yes := s.read()
	at := max(int64(now), 1)
	if !yes {
		at = -at
	}
	s.last.Store(at)
	return yes
}

// synchronised asks the kernel whether a time daemon keeps the wall clock right. Seccomp filters, systemd's
// ProtectClock= among them, often withhold adjtimex even to read; then the marker tells, which systemd-timesyncd
// makes when it has set the clock since it started. What neither says is unknown, so false.
func synchronised(adjtimex func(*unix.Timex) (int, error), marker string) bool {
	var t unix.Timex // no Modes: nothing is set
	state, err := adjtimex(&t)
	if err != nil {
		return unix.Access(marker, unix.F_OK) == nil
	}
	return state != unix.TIME_ERROR && t.Status&unix.STA_UNSYNC == 0
}
