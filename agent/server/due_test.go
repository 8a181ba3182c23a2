package server

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

func TestDueContext(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		due := time.Now().Add(9 * time.Second)
		c := &dueContext{Context: t.Context(), due: due}
		if at, ok := c.Deadline(); !ok || !at.Equal(due) {
			t.Errorf("deadline %v, %v", at, ok)
		}
		if err := c.Err(); err != nil {
			t.Errorf("ended before its time: %v", err)
		}
		<-c.Done()
		if !time.Now().Equal(due) || !errors.Is(c.Err(), context.DeadlineExceeded) {
			t.Errorf("ended at %v with %v", time.Now(), c.Err())
		}
		c.stop()
		if !errors.Is(c.Err(), context.DeadlineExceeded) {
			t.Errorf("stop changes the error to %v", c.Err())
		}
	})
	gone, cancel := context.WithCancel(context.Background())
	c := &dueContext{Context: gone, due: time.Now().Add(time.Hour)}
	cancel()
	<-c.Done()
	if !errors.Is(c.Err(), context.Canceled) {
		t.Errorf("a caller that has gone: %v", c.Err())
	}
	c.stop()
	(&dueContext{Context: gone, due: time.Now()}).stop() // never waited for
}
