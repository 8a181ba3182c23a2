package agent

import (
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/time/rate"
)

const (
	linesBurst  = 50 // lines of one message in the log at once, and then
	linesSecond = 5  // a second
	maxMessages = 64 // messages that are counted by themselves; the others share a budget
)

// BoundedLog returns log with bounds for how often it writes each message, for what others can cause as often as they
// like: 50 lines at once, and then 5 a second. A line says with left_out how many of its message were left out before
// it. nil is a log that writes nothing.
func BoundedLog(log *zap.Logger) *zap.Logger {
	if log == nil {
		return zap.NewNop()
	}
	budgets := &lineBudgets{of: make(map[string]*lineBudget)}
	return log.WithOptions(zap.WrapCore(func(core zapcore.Core) zapcore.Core { return &boundedCore{core, budgets} }))
}

// boundedCore writes a line where there is a budget for it.
type boundedCore struct {
	zapcore.Core
	budgets *lineBudgets
}

func (c *boundedCore) With(fields []zapcore.Field) zapcore.Core {
	return &boundedCore{c.Core.With(fields), c.budgets}
}

func (c *boundedCore) Check(e zapcore.Entry, to *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) {
		return to.AddCore(e, c)
	}
	return to
}

func (c *boundedCore) Write(e zapcore.Entry, fields []zapcore.Field) error {
	skipped, write := c.budgets.take(e.Message, e.Time)
	if !write {
		return nil
	}
	if to := c.Core.Check(e, nil); to != nil {
		to.Write(append(slices.Clip(fields), leftOut(skipped)...)...)
	}
	return nil
}

// lineBudgets are the budgets of all messages.
type lineBudgets struct {
	mu sync.Mutex // protects what follows
	of map[string]*lineBudget
}

type lineBudget struct {
	limit   *rate.Limiter
	skipped int // lines left out since the last one
}

// take reports whether a line may be written at that time, and how many of its message were left out before it.
func (b *lineBudgets) take(message string, at time.Time) (skipped int, write bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.of[message] == nil && len(b.of) >= maxMessages {
		message = "" // that no line has
	}
	budget := b.of[message]
	if budget == nil {
		budget = &lineBudget{limit: rate.NewLimiter(linesSecond, linesBurst)}
		b.of[message] = budget
	}
	if !budget.limit.AllowN(at, 1) {
		budget.skipped++
		return 0, false
	}
	skipped, budget.skipped = budget.skipped, 0
	return skipped, true
}
