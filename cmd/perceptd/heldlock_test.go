package main

import (
	"io"
	"os"
	"strconv"
	"syscall"
	"testing"

	"perceptd/agent/api"
	"perceptd/agent/socket"
	"perceptd/agent/store"
	"perceptd/cmd/perceptd/e2e/harness"
)

// A folder that another process holds is waited for under systemd, which is told of that process, and the daemon serves
// once it is free.
func TestInsideWaitsForFolders(t *testing.T) {
	for name, hold := range map[string]func(*harness.Daemon) (io.Closer, error){
		"is serving in ": func(d *harness.Daemon) (io.Closer, error) {
			return socket.Lock(d.Dir, api.ModulesDirName)
		},
		"keeps its state in ": func(d *harness.Daemon) (io.Closer, error) { return store.Lock(d.StateDir()) },
	} {
		t.Run(name, func(t *testing.T) {
			manager, told := harness.ListenAsSystemd(t)
			t.Setenv("NOTIFY_SOCKET", manager)
			folder := harness.NewDaemon(t, harness.SimulatedFor())
			held, err := hold(folder)
			if err != nil {
				t.Fatal(err)
			}
			d := runInsideIn(t, folder)
			harness.AwaitMessages(t, told, "EXTEND_TIMEOUT_USEC=35000000",
				"STATUS=waiting: program perceptd.test (process "+
					strconv.Itoa(os.Getpid())+") "+name,
				": kill "+strconv.Itoa(os.Getpid())+" ends it; ")
			if err := held.Close(); err != nil {
				t.Fatal(err)
			}
			if err := syscall.Kill(os.Getpid(), syscall.SIGHUP); err != nil { // tries at once
				t.Fatal(err)
			}
			harness.AwaitMessages(t, told, "READY=1")
			if got := d.end(); got != exitOK {
				t.Errorf("exit status %d", got)
			}
		})
	}
}

// A daemon that waits ends when it is asked to.
func TestInsideEndsWhileItWaits(t *testing.T) {
	manager, told := harness.ListenAsSystemd(t)
	t.Setenv("NOTIFY_SOCKET", manager)
	folder := harness.NewDaemon(t, harness.SimulatedFor())
	held, err := socket.Lock(folder.Dir, api.ModulesDirName)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	d := runInsideIn(t, folder)
	harness.AwaitMessages(t, told, "STATUS=waiting: ")
	if got := d.end(); got != exitOK {
		t.Errorf("exit status %d\n%s", got, d.Text())
	}
}
