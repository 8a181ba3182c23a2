package main

import (
	"context"
	"fmt"
	"slices"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"perceptd/agent/attest"
)

// lookAround finds out what of callers cannot be seen here, and says so once.
func (d *daemon) lookAround(ctx context.Context) {
	blind := d.callers.Blindness(ctx)
	d.mu.Lock()
	before := d.blind
	d.blind = blind
	d.mu.Unlock()
	for _, b := range blind {
		if !slices.Contains(before, b) {
			d.log.Warn("callers cannot be proved", zap.String("what", b.What), zap.String("why", b.Why), zap.String("hint", b.Hint))
		}
	}
	if len(blind) == 0 && len(before) > 0 {
		d.log.Info("callers can be proved again")
	}
}

// kernelRelease is what uname -r prints, or "".
func kernelRelease() string {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return "" // which it never does
	}
	return unix.ByteSliceToString(name.Release[:])
}

// blindText is a blindness as the status tells it.
func blindText(b attest.Blindness) string {
	return fmt.Sprintf("%s cannot be told, and who cannot be proved is denied: %s: %s", b.What, b.Why, b.Hint)
}
