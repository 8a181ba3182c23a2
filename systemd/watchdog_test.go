package systemd

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"perceptd/cmd/perceptd/e2e/harness"
)

// Not parallel: the environment is the process's.
func TestWatchdogInterval(t *testing.T) {
	me := strconv.Itoa(os.Getpid())
	for _, row := range []struct {
		usec, pid string
		want      time.Duration
		err       string
	}{
		{"", "", 0, ""},
		{"30000000", me, 30 * time.Second, ""},
		{"30000000", "", 30 * time.Second, ""},
		{"30000000", "1", 0, ""},
		{"nonsense", "1", 0, ""}, // another process's nonsense
		{"nonsense", me, 0, "WatchdogSec="},
		{"0", me, 0, "WatchdogSec="},
		{"-5", me, 0, "WatchdogSec="},
		{"9223372036854775807", me, 0, "is no time to wait"}, // nanoseconds overflow
		{"30000000", "x", 0, ""},
	} {
		t.Setenv("WATCHDOG_USEC", row.usec)
		t.Setenv("WATCHDOG_PID", row.pid)
		got, err := WatchdogInterval()
		if got != row.want || (err == nil) != (row.err == "") ||
			(err != nil && !strings.Contains(err.Error(), row.err)) {
			t.Errorf("WATCHDOG_USEC=%s WATCHDOG_PID=%s: %v, %v", row.usec, row.pid, got, err)
		}
		for _, name := range []string{"WATCHDOG_USEC", "WATCHDOG_PID"} {
			if value, there := os.LookupEnv(name); there {
				t.Errorf("%s=%s is left to children", name, value)
			}
		}
	}
}

func TestWatch(t *testing.T) {
	t.Parallel()
	const interval = 10 * time.Second
	sick := errors.New("the cache does not answer")
	for name, row := range map[string]struct {
		check   func(context.Context) error
		ping    error
		pings   int // in three intervals
		reports []error
	}{
		"well": {check: func(context.Context) error { return nil }, pings: 6},
		"sick": {check: func(context.Context) error { return sick },
			reports: []error{sick, sick, sick, sick, sick, sick}},
		"late": {
			check:   func(context.Context) error { time.Sleep(9 * time.Second); return nil },
			reports: []error{errSlowCheck, errSlowCheck, errSlowCheck},
		},
		"heeds its deadline": {
			check: func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() },
			reports: []error{context.DeadlineExceeded, context.DeadlineExceeded, context.DeadlineExceeded,
				context.DeadlineExceeded, context.DeadlineExceeded},
		},
		"hangs": {check: func(context.Context) error { time.Sleep(time.Hour); return nil }},
		"nobody there": {check: func(context.Context) error { return nil }, ping: sick, pings: 6,
			reports: []error{sick, sick, sick, sick, sick, sick}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), 3*interval-1)
				defer cancel()
				var reports []error
				pings := 0
				watch(ctx, interval, row.check, func() error { pings++; return row.ping },
					func(err error) { reports = append(reports, err) })
				if pings != row.pings || len(reports) != len(row.reports) {
					t.Fatalf("%d pings, reports %v", pings, reports)
				}
				for i, want := range row.reports {
					if !errors.Is(reports[i], want) {
						t.Errorf("report %v, want %v", reports[i], want)
					}
				}
			})
		})
	}
}

func TestWatchPingsSystemd(t *testing.T) {
	t.Parallel()
	path := filepath.Join(harness.ShortFolder(t), "notify")
	conn := receiver(t, path)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		Notify{address: path}.Watch(ctx, time.Hour, func(context.Context) error { return nil },
			func(err error) { t.Error(err) })
	}()
	if got := receive(t, conn); got != "WATCHDOG=1" {
		t.Errorf("received %q", got)
	}
	cancel()
	<-done
}

func TestWatchWithoutWatchdog(t *testing.T) {
	t.Parallel()
	Notify{}.Watch(t.Context(), 0, func(context.Context) error { t.Error("checked"); return nil }, func(error) {})
}
