package systemd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// WatchdogInterval returns how long systemd waits for a Ping before it kills the daemon (WatchdogSec=), and
// takes it out of the environment. It is 0 without a watchdog, or when the watchdog is another process's.
func WatchdogInterval() (time.Duration, error) {
	defer func() {
		_ = os.Unsetenv("WATCHDOG_USEC") // cannot err
		_ = os.Unsetenv("WATCHDOG_PID")
	}()
	// Whether it is ours comes first: go-systemd complains of a time that is meant for another process.
	if pid := os.Getenv("WATCHDOG_PID"); pid != "" && pid != strconv.Itoa(os.Getpid()) {
		return 0, nil
	}
	// It multiplies without looking, too. This many digits of microseconds are 31 years.
	if usec := os.Getenv("WATCHDOG_USEC"); len(usec) > 15 {
		return 0, fmt.Errorf("WATCHDOG_USEC=%q is no time to wait: set WatchdogSec= in the unit", usec)
	}
	interval, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		return 0, fmt.Errorf("%w: set WatchdogSec= in the unit", err)
	}
	return interval, nil
}

// Watch pings at once and then at each half of interval, so long as check returns nil in that time; it
// returns when ctx is done, at once when interval is 0. It runs check itself: a check that hangs stops the
// pings whatever it does with its context, and systemd restarts the daemon. report is given each failure
// of a check or a ping, for the log.
func (n Notify) Watch(ctx context.Context, interval time.Duration, check func(context.Context) error,
	report func(error)) {
	watch(ctx, interval, check, n.Ping, report)
}

var errSlowCheck = errors.New("it passed, but too late")

func watch(ctx context.Context, interval time.Duration, check func(context.Context) error, ping func() error,
	report func(error)) {
	if interval <= 0 {
		return
	}
	half := max(interval/2, 1)
	ticker := time.NewTicker(half)
	defer ticker.Stop()
	for ctx.Err() == nil {
		if err := checkWithin(ctx, half, check); err == nil {
			if err := ping(); err != nil {
				report(err)
			}
		} else if ctx.Err() == nil { // on the way out a check may well fail
			report(fmt.Errorf("watchdog check: %w", err))
		}
		select {
		case <-ctx.Done():
		case <-ticker.C:
		}
	}
}

func checkWithin(ctx context.Context, d time.Duration, check func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	if err := check(ctx); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return errSlowCheck
	}
	return nil
}
