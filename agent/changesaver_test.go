package agent

import (
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"

	"perceptd/tokencache"
)

// A change that the cache makes by itself while a failed save is tried again is saved soon after, and while saves fail
// such changes cause no more of them.
func TestChangeDuringARetryIsSaved(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		begun := time.Now()
		clock := tokencache.Clock{Boot: func() time.Duration { return time.Hour + time.Since(begun) }}.OrRuntime()
		var generation atomic.Uint64
		generation.Store(1)
		var tries atomic.Int32
		var mu sync.Mutex
		var saved []uint64
		write := func(r tokencache.Record) error {
			if tries.Add(1) == 1 {
				return errors.New("no space left on device")
			}
			time.Sleep(100 * time.Millisecond) // the disk takes its time
			mu.Lock()
			defer mu.Unlock()
			saved = append(saved, r.Generation)
			return nil
		}
		var c changeSaver
		c.open(write, func() tokencache.Record {
			return tokencache.Record{Lineage: "one", Generation: generation.Load()}
		}, clock, zap.NewNop(), func() {})
		defer c.close()
		c.renew()
		for range 20 { // a fetch ends every two seconds
			time.Sleep(2 * time.Second)
			c.notice()
		}
		synctest.Wait()
		if n := tries.Load(); n != 1 {
			t.Errorf("%d saves within 40 s of a failed one, want none besides", n)
		}
		time.Sleep(20*time.Second + 50*time.Millisecond) // the second try is under way
		generation.Store(2)
		c.notice()
		time.Sleep(saveRequestInterval + time.Second)
		synctest.Wait()
		mu.Lock()
		defer mu.Unlock()
		if !slices.Equal(saved, []uint64{1, 2}) {
			t.Errorf("saved generations %v, want 1 and then 2", saved)
		}
	})
}
