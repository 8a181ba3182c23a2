package harness

import (
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
)

// A program that this process has written is executed, though this process starts others all the while.
func TestWriteProgram(t *testing.T) {
	ended := make(chan struct{})
	var others sync.WaitGroup
	for range 4 {
		others.Go(func() {
			for {
				select {
				case <-ended:
					return
				default:
				}
				if err := exec.Command("/bin/true").Run(); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	program, busy := filepath.Join(t.TempDir(), "program"), 0
	for range 300 {
		Must(t, WriteProgram(program, []byte("#!/bin/sh\n")))
		if err := exec.Command(program).Run(); err != nil {
			busy++
			t.Log(err)
		}
	}
	close(ended)
	others.Wait()
	if busy > 0 {
		t.Errorf("of 300 times that it was written and executed, %d failed", busy)
	}
}
