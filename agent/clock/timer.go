package clock

import (
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// timer returns a channel that is sent the wall time once d of CLOCK_BOOTTIME has gone by, and a
// function that frees the timer and reports whether it did so before the timer fired.
func timer(d time.Duration) (<-chan time.Time, func() bool) {
	fired := make(chan time.Time, 1)
	if d <= 0 {
		fired <- wall()
		return fired, func() bool { return false }
	}
	file, err := timerFile(d)
	if err != nil {
		// Out of descriptors or of kernel memory: a timer that is late after a suspend is better than
		// none. Go's own has no error to give.
		t := time.NewTimer(d)
		return t.C, t.Stop
	}

	var done atomic.Bool
	go func() {
		defer file.Close()
		var expirations [8]byte
		// The error is that stop closed the file: a one-shot timerfd has no other.
		if _, err := file.Read(expirations[:]); err == nil && done.CompareAndSwap(false, true) {
			fired <- wall()
		}
	}()
	return fired, func() bool {
		if !done.CompareAndSwap(false, true) {
			return false
		}
		_ = file.Close() // wakes the goroutine
		return true
	}
}

// timerFile arms a timer descriptor; it does not block, so that Go's poller waits and not a thread.
func timerFile(d time.Duration) (*os.File, error) {
	fd, err := unix.TimerfdCreate(unix.CLOCK_BOOTTIME, unix.TFD_NONBLOCK|unix.TFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("timerfd_create", err)
	}
	file := os.NewFile(uintptr(fd), "timerfd")
	spec := unix.ItimerSpec{Value: unix.NsecToTimespec(int64(d))}
	if err := unix.TimerfdSettime(fd, 0, &spec, nil); err != nil {
		_ = file.Close()
		return nil, os.NewSyscallError("timerfd_settime", err)
	}
	return file, nil
}
