package main

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"time"

	"go.uber.org/zap"

	"perceptd/agent/lock"
)

const (
	// heldInterval is how often a folder is tried that another process has locked.
	heldInterval = 5 * time.Second
	// heldTries is how often. Then the daemon ends, and systemd starts it again, spaced out too: units that are ordered
	// after it, as the container engines, do not wait for longer.
	heldTries = 12
	// heldGrace is how much longer systemd waits for the start with each try.
	heldGrace = 30 * time.Second
)

// errAskedToEnd ends a start that waits.
var errAskedToEnd = errors.New("asked to end while it waited")

// whileHeld takes a folder's lock. While another process holds it, it is tried again, and systemd and the journal name
// that process: to end instead would have each client on a socket start the daemon again at once. By hand nothing is
// waited for: the error names it.
func (d *daemon) whileHeld(ctx context.Context, take func() error) error {
	var before lock.HeldError
	for tries := 1; ; tries++ {
		err := take()
		held, isHeld := errors.AsType[lock.HeldError](err)
		if !isHeld || !d.notify.Enabled() || tries > heldTries {
			return err
		}
		if held != before {
			before = held
			d.log.Error("waiting for a folder that another process has locked: "+mendOfHeld(held),
				zap.Int("process", held.Process), zap.String("program", held.Program), zap.Error(err))
		}
		d.told(d.notify.Extend(heldInterval + heldGrace))
		d.told(d.notify.Status(fmt.Sprintf("waiting: %s: %s; it is tried again every %v",
			held.Holder(), mendOfHeld(held), heldInterval)))
		if !d.wait(ctx, heldInterval) {
			return errAskedToEnd
		}
	}
}

// mendOfHeld says how to end the process that has a folder locked.
func mendOfHeld(held lock.HeldError) string {
	if held.Process == 0 {
		return "end that process"
	}
	return fmt.Sprintf("kill %d ends it", held.Process)
}

// wait returns after so long, or at once where a reload is asked for; false: the daemon is asked to end.
func (d *daemon) wait(ctx context.Context, long time.Duration) bool {
	timer := time.NewTimer(long)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	case s := <-d.signals:
		return s == syscall.SIGHUP
	}
}
