package main

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"perceptd/systemd"
)

// serviceManager returns what tells a service manager of its own, the path of that one's socket, and a function that returns
// what was told since its last call.
func serviceManager(t *testing.T) (notify systemd.Notify, path string, told func() []string) {
	dir, err := os.MkdirTemp("", "notify")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	path = filepath.Join(dir, "n")
	manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = manager.Close() })
	t.Setenv("NOTIFY_SOCKET", path)
	notify, err = systemd.NotifyFromEnvironment()
	if err != nil {
		t.Fatal(err)
	}
	raw, err := manager.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	return notify, path, func() (all []string) {
		message := make([]byte, 4096)
		for {
			n := -1
			if err := raw.Read(func(fd uintptr) bool { n, _, _ = syscall.Recvfrom(int(fd), message, syscall.MSG_DONTWAIT); return true }); err != nil {
				t.Fatal(err)
			}
			if n < 0 {
				return all
			}
			all = append(all, string(message[:n]))
		}
	}
}

// The text is sent when it differs from what systemd took, and only then. Where nothing else looks, trouble has it looked at
// again each minute, until there is none.
func TestStatusTeller(t *testing.T) {
	notify, _, told := serviceManager(t)
	synctest.Test(t, func(t *testing.T) {
		text, troubled, looked := "fine", false, 0
		s := &statusTeller{notify: notify, text: func() (string, bool) { looked++; return text, troubled }}
		tell := func() {
			if err := s.tell(); err != nil {
				t.Error(err)
			}
		}
		s.again = tell
		becomes := func(now string, trouble bool) {
			s.mu.Lock()
			defer s.mu.Unlock()
			text, troubled = now, trouble
		}
		pass := func(d time.Duration) { time.Sleep(d); synctest.Wait() }
		wants := func(what string, looks int, want ...string) {
			t.Helper()
			got := told()
			s.mu.Lock()
			defer s.mu.Unlock()
			for i := range want {
				if len(got) != len(want) || !strings.HasPrefix(got[i], "STATUS="+want[i]+"\n") {
					break
				}
				got[i] = ""
			}
			if strings.Join(got, "") != "" || len(got) != len(want) || looked != looks {
				t.Errorf("%s: looked %d times, want %d, and told %q, want %q", what, looked, looks, got, want)
			}
			looked = 0
		}
		tell()
		tell()
		wants("at first", 2, "fine")
		pass(time.Hour)
		wants("without trouble", 0)
		becomes("trouble: connections", true)
		tell()
		wants("trouble", 1, "trouble: connections")
		pass(5*lookEvery + lookEvery/2)
		wants("trouble that stays", 5)
		becomes("fine", false)
		pass(lookEvery)
		wants("its end", 1, "fine")
		pass(time.Hour)
		wants("after it", 0)
		becomes("trouble: again", true)
		tell()
		s.stop()
		pass(time.Hour)
		wants("a stop", 1, "trouble: again")
	})
}

// What systemd did not take is sent again.
func TestStatusTellerWithoutManager(t *testing.T) {
	notify, path, told := serviceManager(t)
	s := &statusTeller{notify: notify, text: func() (string, bool) { return "fine", false }}
	if err := os.Rename(path, path+".aside"); err != nil {
		t.Fatal(err)
	}
	if err := s.tell(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("told nobody: %v", err)
	}
	if err := os.Rename(path+".aside", path); err != nil {
		t.Fatal(err)
	}
	if err := s.tell(); err != nil {
		t.Error(err)
	}
	if got := told(); len(got) != 1 || !strings.HasPrefix(got[0], "STATUS=fine\n") {
		t.Errorf("told %q", got)
	}
}

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
