package main

import (
	"fmt"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
)

// Nobody who connects anew for each request notices that the daemon is restarted.
func TestRestartsFailNobody(t *testing.T) {
	t.Parallel()
	binary(t, "perceptd")
	store := newFDStore(t)
	d := newFolder(t, simulatedFor("vision"))
	store.start(t, d)
	d.awaitHealth(t)
	until(t, "the socket to be stored", d.ended, func() bool { return len(store.names()) == 1 })

	var asking sync.WaitGroup
	var answered atomic.Int64
	enough, failed := make(chan struct{}), make(chan string, 1)
	path := d.module("vision")
	ask := d.get
	for range 4 {
		asking.Go(func() {
			for {
				select {
				case <-enough:
					return
				default:
				}
				status, body, err := ask(path, vaultToken)
				if status == 200 {
					answered.Add(1)
					continue
				}
				select {
				case failed <- fmt.Sprintf("%d %s %v", status, body, err):
				default:
				}
			}
		})
	}
	for range 10 {
		if err := d.cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		<-d.ended
		store.start(t, d)
		before := answered.Load()
		until(t, "more answers", d.ended, func() bool { return answered.Load() > before+20 })
	}
	close(enough)
	asking.Wait()
	select {
	case what := <-failed:
		t.Errorf("a request failed: %s", what)
	default:
	}
}
