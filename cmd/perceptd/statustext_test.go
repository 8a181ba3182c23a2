package main

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// The daemon's text follows what comes and goes without an event, with each of its checks of itself.
func TestStatusTextFollows(t *testing.T) {
	t.Parallel()
	manager, told := listenAsSystemd(t)
	d := newFolder(t, simulatedFor("vision"))
	c := exec.Command(binary(t, "perceptd"), d.arguments()...)
	if os.Getuid() == 0 { // whom no mode keeps out
		if err := errors.Join(os.Chmod(filepath.Dir(manager), 0o755), os.Chmod(manager, 0o666)); err != nil {
			t.Fatal(err)
		}
		c = nobodys(t, d)
	}
	d.process = begin(t, []string{"NOTIFY_SOCKET=" + manager, "WATCHDOG_USEC=200000"}, c)
	const well = "STATUS=SIMULATED; 2 identities, "
	awaitMessages(t, told, well, "READY=1")
	for _, step := range []struct {
		do    func() error
		tells string
	}{
		{func() error { return os.Chmod(d.admin(), 0) }, "STATUS=SIMULATED; trouble: perceptd cannot check that it answers on " + d.admin()},
		{func() error { return os.Chmod(d.admin(), 0o660) }, well},
		{func() error { return os.Rename(d.module("vision"), d.module("vision")+".aside") }, "STATUS=SIMULATED; trouble: module vision has no socket any more"},
		{func() error { return os.Rename(d.module("vision")+".aside", d.module("vision")) }, well},
	} {
		if err := step.do(); err != nil {
			t.Fatal(err)
		}
		awaitMessages(t, told, step.tells)
	}
	awaitPings(t, told)
	awaitPings(t, told)
	if status := d.stop(t); status != 0 {
		t.Errorf("exit status %d", status)
	}
}
