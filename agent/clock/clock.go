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
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"perceptd/tokencache"
)

// syncCheck is how long an answer about synchronisation is reused: it is asked for at each token
// request, and the kernel's answer changes within minutes at the earliest.
const syncCheck = 5 * time.Second

// Word is what is known of whether the wall clock is right.
type Word struct {
	Synchronised bool   // by somebody who says so
	By           string // who said the one or the other: ByKernel, ByTimesyncd; empty: nobody can be asked
}

const (
	ByKernel    = "kernel"
	ByTimesyncd = "systemd-timesyncd"
)

// Device returns the device's clock, and what tells who vouches for it. Where the kernel cannot be asked directly it
// waits for the first word of perceptd-clock.socket, 2 seconds at most; what the clock and word tell later waits for
// nothing.
func Device() (c tokencache.Clock, word func() Word) {
	by := &witness{boot: boot, wall: wall, ask: func() (bool, error) { return askSocket(Socket) }}
	if _, err := Kernel(); err != nil {
		by.inquire()
	}
	word = func() Word { return wordOf(unix.Adjtimex, by, "/run/systemd/timesync/synchronized") }
	start := time.Now()
	// Elapsed by Go's clock, which costs no system call: a suspend only makes an answer last a little longer.
	sync := &synchronisation{elapsed: func() time.Duration { return time.Since(start) },
		read: func() bool { return word().Synchronised }}
	return tokencache.Clock{Wall: wall, Boot: boot, Synchronised: sync.known, Timer: timer}, word
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

// synchronisation remembers the answer for syncCheck.
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

// wordOf goes by the kernel: asked directly, and where that is withheld through the witness. Where there is none the
// marker tells, which systemd-timesyncd makes when it has set the clock, and which goes when it stops. What nobody says
// is unknown, so not synchronised.
func wordOf(adjtimex func(*unix.Timex) (int, error), by *witness, marker string) Word {
	if synchronised, err := kernel(adjtimex); err == nil {
		return Word{synchronised, ByKernel}
	}
	if synchronised, told := by.word(); told {
		return Word{synchronised, ByKernel}
	}
	if unix.Access(marker, unix.F_OK) == nil {
		return Word{true, ByTimesyncd}
	}
	return Word{}
}
