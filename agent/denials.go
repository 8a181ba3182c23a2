package agent

import (
	"errors"
	"sync"

	"go.uber.org/zap"
	"golang.org/x/time/rate"
)

// denialLog writes denials to the log, at most ten at once and one a second, so that a caller in a
// loop cannot fill the disk; the next line written counts those left out.
type denialLog struct {
	log *zap.Logger

	mu      sync.Mutex // protects what follows
	limit   *rate.Limiter
	skipped int
}

func (d *denialLog) note(caller Caller, resource string, why *Error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.limit == nil {
		d.limit = rate.NewLimiter(1, 10)
	}
	if !d.limit.Allow() {
		d.skipped++
		return
	}
	fields := []zap.Field{
		zap.Stringer("caller", caller),
		zap.Uint32("uid", caller.UID),
		zap.String("resource", resource),
		zap.String("reason", why.Detail),
	}
	if caller.Module != "" {
		fields = append(fields, zap.String("module", caller.Module))
	}
	if d.skipped > 0 {
		fields = append(fields, zap.Int("left_out", d.skipped))
		d.skipped = 0
	}
	d.log.Warn("token denied", fields...)
}

// logDenial writes err to the log if it is a denial.
func (a *Agent) logDenial(caller Caller, resource string, err error) {
	var refusal *Error
	if errors.As(err, &refusal) && refusal.Reason == NotGranted {
		a.denials.note(caller, resource, refusal)
	}
}
