package server

import (
	"context"
	"sync"
	"time"
)

// dueContext is a request's context that also ends when the answer is due. Unlike context.WithDeadline it
// starts its timer only when somebody waits, which no request does whose token is there.
type dueContext struct {
	context.Context // the request's
	due             time.Time

	once   sync.Once
	timed  context.Context
	cancel context.CancelFunc
}

func (c *dueContext) start() {
	c.timed, c.cancel = context.WithDeadline(c.Context, c.due)
}

// extend puts off when the answer is due. Nobody may wait yet.
func (c *dueContext) extend(by time.Duration) { c.due = c.due.Add(by) }

// Deadline returns when the answer is due.
func (c *dueContext) Deadline() (time.Time, bool) { return c.due, true }

// Done starts the timer.
func (c *dueContext) Done() <-chan struct{} {
	c.once.Do(c.start)
	return c.timed.Done()
}

// Err agrees with Done.
func (c *dueContext) Err() error {
	c.once.Do(c.start)
	return c.timed.Err()
}

// waited reports whether somebody has waited. Nobody may wait any more.
func (c *dueContext) waited() bool { return c.cancel != nil }

// stop frees the timer. Nobody may wait any more.
func (c *dueContext) stop() {
	if c.cancel != nil {
		c.cancel()
	}
}
