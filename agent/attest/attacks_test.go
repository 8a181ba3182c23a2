package attest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"perceptd/cmd/perceptd/e2e/harness"
)

// The published attacks on attestation, each by a real process on a real socket, with SO_PEERPIDFD and without it.

// realFixture returns a fixture that uses the kernel's own /proc.
func realFixture(t *testing.T, o Options) *fixture {
	t.Helper()
	s := &fixture{t: t}
	s.open(o)
	return s
}

// needsRoot skips a test that needs root.
func needsRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("choosing the next pid and entering cgroups needs root")
	}
}

// reusePID starts another process under the process ID pid, which is free.
func reusePID(t *testing.T, pid int) {
	t.Helper()
	for range 200 {
		// Another program may take it in between. It is then freed and tried again.
		if err := os.WriteFile("/proc/sys/kernel/ns_last_pid", []byte(strconv.Itoa(pid-1)), 0); err != nil {
			t.Fatal(err)
		}
		victim := exec.Command("/proc/self/exe")
		victim.Env = append(os.Environ(), quickEnd, "CALLER_TEST_ROLE=idle")
		in, err := victim.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := victim.Start(); err != nil {
			t.Fatal(err)
		}
		end := func() { in.Close(); _ = victim.Wait() }
		if victim.Process.Pid == pid {
			t.Cleanup(end)
			return
		}
		end()
	}
	t.Fatalf("nobody got pid %d", pid)
}

// A caller connects, leaves its connection to an accomplice and ends. A process with more rights gets its process ID.
func TestAttackPidReuse(t *testing.T) {
	needsRoot(t)
	for _, o := range []Options{{}, {NoPidfd: true}} {
		for _, row := range []struct {
			name            string
			accept, request bool // before the caller ends
		}{
			{"while it waits to be accepted", false, false},
			{"after it was accepted", true, false},
			{"after a request", true, true},
		} {
			t.Run(fmt.Sprintf("%s, pidfd %v", row.name, !o.NoPidfd), func(t *testing.T) {
				s := realFixture(t, o)
				a := s.start("connect")
				accomplice := a.done()
				var attestation *Attestation
				if row.accept {
					s.ageCallers()
					attestation, _ = s.accept(Socket{})
				}
				if row.request {
					a.do('w')
					a.done()
					got, err := attestation.Caller(context.Background())
					if err != nil || int(got.PID) != a.cmd.Process.Pid {
						t.Fatalf("%+v, %v", got, err)
					}
				}
				a.end()
				reusePID(t, a.cmd.Process.Pid)
				if !row.accept {
					attestation, _ = s.accept(Socket{})
				}
				_, err := attestation.Caller(context.Background())
				checkDenied(t, "the number is another's", err, "")
				_, _ = accomplice.Write([]byte("GET"))
				if got, err := attestation.Caller(context.Background()); err == nil {
					t.Errorf("attested at the second try: %+v", got)
				}
			})
		}
	}
}

// Without SO_PEERPIDFD, the process of a caller that has waited during a restart of the daemon may not be the one
// that connected. The caller is attested by connecting again, or by its next request.
func TestYoungCallerRetries(t *testing.T) {
	t.Parallel()
	s := realFixture(t, Options{NoPidfd: true})
	a := s.start("connect") // younger than the last poll of the queue
	a.done()
	a.do('w')
	a.done()
	waiting, conn := s.accept(Socket{})
	asksAgain := func(when string) {
		t.Helper()
		_, err := waiting.Caller(context.Background())
		checkDenied(t, when, err, "may have started after")
		if e := new(Error); !asError(err, &e) || !e.Retryable || e.Hint == "" {
			t.Errorf("%s: %+v", when, err)
		}
	}
	asksAgain("at first")
	if waiting.AttestByNextRequest() {
		t.Error("what it had written before proves it")
	}
	read := func() {
		t.Helper()
		if n, err := conn.Read(make([]byte, 8)); n != 1 || err != nil {
			t.Fatal(n, err)
		}
	}
	read()
	asksAgain("after what it had written before")
	if !waiting.AttestByNextRequest() {
		t.Fatal("its next request does not prove it")
	}
	asksAgain("before it")
	a.do('w')
	a.done()
	read()
	if got, err := waiting.Caller(context.Background()); err != nil || int(got.PID) != a.cmd.Process.Pid {
		t.Errorf("%+v, %v", got, err)
	}
	s.ageCallers() // as the next Accept records, a moment later
	another := s.start("connect")
	another.done()
	again, _ := s.accept(Socket{})
	if _, err := again.Caller(context.Background()); err != nil {
		t.Error(err)
	}
	another.end()
	if again.AttestByNextRequest() { // the process has ended
		_, err := again.Caller(context.Background())
		checkDenied(t, "who has ended", err, "has ended")
	}
}

// If young processes are refused, a process is attested once it is old enough, or has written after it was opened.
func TestRefuseYoung(t *testing.T) {
	t.Parallel()
	s := realFixture(t, Options{NoPidfd: true})
	s.SetRules(Rules{RefuseYoung: true, Modules: map[string]Requirement{"open": {}, "vision": {Container: "vision"}}})
	for _, row := range []struct {
		name   string
		from   Socket
		age    time.Duration // when it was accepted, as /proc has it
		refuse bool          // Rules.RefuseYoung
		want   string        // in the error; empty: attested
	}{
		{"born that moment", Socket{}, 0, true, "is younger than 20ms: it may have started after"},
		{"young", Socket{}, 19 * time.Millisecond, true, "is younger than 20ms"},
		{"young, as its start is known to a hundredth of a second", Socket{}, 29 * time.Millisecond, true,
			"is younger than 20ms"},
		{"older", Socket{}, 30 * time.Millisecond, true, ""},
		{"young, and nobody is refused", Socket{}, 0, false, ""},
		{"a module by its socket", Socket{Module: "open"}, 0, true, ""},
		{"a module by its container", Socket{Module: "vision"}, 0, true, "is younger than 20ms"},
		{"an administrator", Socket{Restricted: true}, 0, true, ""},
		{"one of before", Socket{}, -tick, true, "has started after"},
	} {
		rules := *s.rules.Load()
		rules.RefuseYoung = row.refuse
		s.SetRules(rules.Rules)
		a := s.start("connect")
		a.done()
		s.ageCallers()
		attestation, conn := s.accept(row.from)
		stat, err := s.kernel.readFile(int32(a.cmd.Process.Pid), "stat")
		if err != nil {
			t.Fatal(err)
		}
		started, err := parseStartTime(stat)
		if err != nil {
			t.Fatal(err)
		}
		attestation.conn.acceptedAt = started + row.age // independent of this machine's speed
		got, err := attestation.Caller(context.Background())
		if row.want == "" {
			if err != nil || got.Nested {
				t.Errorf("%s: %+v, %v", row.name, got, err)
			}
			continue
		}
		checkDenied(t, row.name, err, row.want)
		hears := attestation.AttestByNextRequest()
		a.do('w')
		a.done()
		if _, readErr := conn.Read(make([]byte, 1)); !hears || readErr != nil {
			t.Fatal(hears, readErr)
		}
		_, err = attestation.Caller(context.Background())
		switch {
		case row.age < 0:
			checkDenied(t, row.name+", again", err, "has started after")
		case row.from.Module != "":
			checkDenied(t, row.name+", again", err, "not out of a container")
		case err != nil:
			t.Errorf("%s, again: %v", row.name, err)
		}
	}
}

// A caller writes its requests, leaves the connection to an accomplice and ends. Within a moment, before it is
// attested, a process with more rights gets its process ID. Without SO_PEERPIDFD only Rules.RefuseYoung detects that:
// what was written before attests nothing, however it is divided into reads, and the accomplice is another process.
func TestAttackPidReuseByTheYoung(t *testing.T) {
	needsRoot(t)
	for _, refuse := range []bool{false, true} {
		for _, early := range []int{0, 1} { // bytes that are read before the first attestation
			s := realFixture(t, Options{NoPidfd: true})
			s.SetRules(Rules{RefuseYoung: refuse})
			a := s.start("connect")
			accomplice := a.done()
			for range 2 {
				a.do('w')
				a.done()
			}
			a.end()
			reusePID(t, a.cmd.Process.Pid)
			s.ageCallers() // the daemon was idle
			attestation, conn := s.accept(Socket{})
			if stat, err := s.kernel.readFile(int32(a.cmd.Process.Pid), "stat"); err != nil {
				t.Fatal(err)
			} else if started, err := parseStartTime(stat); err != nil {
				t.Fatal(err)
			} else {
				attestation.conn.acceptedAt = started + tick
			}
			read := func(n int) {
				t.Helper()
				for range n {
					if _, err := conn.Read(make([]byte, 1)); err != nil {
						t.Fatal(err)
					}
				}
			}
			read(early)
			got, err := attestation.Caller(context.Background())
			if !refuse {
				if err != nil || int(got.PID) != a.cmd.Process.Pid {
					t.Errorf("docs/security.md says that this cannot be told: %+v, %v", got, err)
				}
				continue
			}
			checkDenied(t, "the number is another's", err, "is younger than 20ms")
			if attestation.AttestByNextRequest() {
				t.Error("what is there already is to prove it")
			}
			read(2 - early)
			_, err = attestation.Caller(context.Background())
			checkDenied(t, "what was written before", err, "is younger than 20ms")
			if !attestation.AttestByNextRequest() {
				t.Error("nothing more is there")
			}
			if _, err := accomplice.Write([]byte("GET")); err != nil {
				t.Fatal(err)
			}
			read(1)
			_, err = attestation.Caller(context.Background())
			checkDenied(t, "the accomplice", err, "another process")
		}
	}
}

// A caller connects and executes another program, which somebody trusts. The program is not part of an attestation.
func TestAttackExecAfterConnect(t *testing.T) {
	t.Parallel()
	bothWays(t, func(t *testing.T, o Options) {
		ctx := context.Background()
		s := realFixture(t, o)
		a := s.start("connect")
		a.done()
		s.ageCallers()
		attestation, _ := s.accept(Socket{})
		before, err := attestation.Caller(ctx)
		if err != nil {
			t.Fatal(err)
		}
		a.do('x')
		a.do('w')
		a.done()
		name, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", a.cmd.Process.Pid))
		if err != nil || string(name) != "victim\x00" {
			t.Fatalf("it runs as %q, %v", name, err)
		}
		after, err := attestation.Caller(ctx)
		if err != nil || after.String() != before.String() || after.Unit != before.Unit || after.Container != nil {
			t.Errorf("%+v became %+v, %v", before, after, err)
		}
		fresh, err := s.callerIn("", Socket{})
		if err != nil || fresh.String() == after.String() {
			t.Errorf("%+v, %v", fresh, err)
		}
	})
}

// A user connects and executes a program that runs as root. The caller stays the user who connected.
func TestAttackSetuidAfterConnect(t *testing.T) {
	needsRoot(t)
	const user = 65534
	folder := shortFolder(t)
	if err := os.Chmod(folder, 0o711); err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	plain, setuid := filepath.Join(folder, "plain"), filepath.Join(folder, "setuid")
	if err := errors.Join(
		harness.WriteProgram(plain, program), harness.WriteProgram(setuid, program),
		os.Chmod(setuid, 0o755|os.ModeSetuid),
	); err != nil {
		t.Fatal(err)
	}
	bothWays(t, func(t *testing.T, o Options) {
		ctx := context.Background()
		s := realFixture(t, o)
		if err := errors.Join(os.Chmod(s.path, 0o666), os.Chmod(filepath.Dir(s.path), 0o711)); err != nil {
			t.Fatal(err)
		}
		a := s.start("connect", func(c *exec.Cmd) {
			c.Path = plain // the user can read it
			c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: user, Gid: user}}
			c.Env = append(c.Env, "CALLER_TEST_SETUID="+setuid)
		})
		a.done()
		s.ageCallers()
		attestation, _ := s.accept(Socket{})
		if before, err := attestation.Caller(ctx); err != nil || before.UID != user {
			t.Fatalf("%+v, %v", before, err)
		}
		a.do('s')
		a.do('w')
		a.done()
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", a.cmd.Process.Pid))
		if err != nil || !strings.Contains(string(status), fmt.Sprintf("Uid:\t%d\t0\t0\t0", user)) {
			t.Fatalf("it does not run as root: %s, %v", status, err)
		}
		if after, err := attestation.Caller(ctx); err != nil || after.UID != user || after.GID != user {
			t.Errorf("%+v, %v", after, err)
		}
	})
}

// The caller is the same process whichever of its threads connects or writes.
func TestThreadsAreTheirProcess(t *testing.T) {
	t.Parallel()
	onOne := func(t *testing.T, do func() error) { // on a new thread, which ends afterwards
		t.Helper()
		done := make(chan error)
		go func() {
			runtime.LockOSThread()
			done <- do()
		}()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
	bothWays(t, func(t *testing.T, o Options) {
		s := realFixture(t, o)
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		onOne(t, func() error { return unix.Connect(fd, &unix.SockaddrUnix{Name: s.path}) })
		attestation, accepted := s.accept(Socket{})
		onOne(t, func() error { _, err := unix.Write(fd, []byte("x")); return err })
		if n, err := accepted.Read(make([]byte, 1)); n != 1 || err != nil {
			t.Fatal(n, err)
		}
		got, err := attestation.Caller(context.Background())
		if err != nil || int(got.PID) != os.Getpid() || got.Nested {
			t.Errorf("%+v, %v", got, err)
		}
	})
}

// A caller passes its connection on to another process, and keeps running.
func TestAttackSocketPassedOn(t *testing.T) {
	t.Parallel()
	bothWays(t, func(t *testing.T, o Options) {
		ctx := context.Background()
		s := realFixture(t, o)
		a := s.start("connect")
		passed := a.done()
		s.ageCallers()
		attestation, conn := s.accept(Socket{})
		a.do('w')
		a.done()
		b := make([]byte, 1)
		if _, err := conn.Read(b); err != nil {
			t.Fatal(err)
		}
		if got, err := attestation.Caller(ctx); err != nil || int(got.PID) != a.cmd.Process.Pid {
			t.Fatalf("%+v, %v", got, err)
		}
		if _, err := passed.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Read(b); err != nil {
			t.Fatal(err)
		}
		_, err := attestation.Caller(ctx)
		checkDenied(t, "another process writes", err, fmt.Sprintf("another process (pid %d) writes", os.Getpid()))
		a.do('w')
		a.done()
		if _, err := conn.Read(b); err != nil {
			t.Fatal(err)
		}
		_, err = attestation.Caller(ctx)
		checkDenied(t, "the first one writes again", err, "another process")
	})
}

// A service creates cgroups below its own, and a container creates some below another container's, under forged
// names.
func TestAttackForgedCgroups(t *testing.T) {
	needsRoot(t)
	bothWays(t, func(t *testing.T, o Options) {
		e := newFakeEngine(t)
		s := realFixture(t, o)
		s.SetRules(Rules{Engines: []string{e.path}})
		unit := fmt.Sprintf("/system.slice/percepttest-%d-%v.service", os.Getpid(), o.NoPidfd)
		for _, row := range []struct{ cgroup, want string }{
			{unit, ""},
			{unit + "/docker-" + idA + ".scope", "no container's own"},
			{unit + "/victim.service", "made below its own"},
			{fmt.Sprintf("/percepttest-%d-%v/%s", os.Getpid(), o.NoPidfd, idA),
				"not where container engines put containers"},
			{fmt.Sprintf("/percepttest-%d-%v/%s/%s", os.Getpid(), o.NoPidfd, idA, idB), "more than one container"},
		} {
			a := s.start("connect")
			if !moveToCgroup(t, row.cgroup, a.cmd.Process.Pid) {
				return
			}
			a.done()
			s.ageCallers()
			attestation, _ := s.accept(Socket{})
			got, err := attestation.Caller(context.Background())
			a.end()
			switch {
			case row.want != "":
				checkDenied(t, row.cgroup, err, row.want)
			case err != nil || got.Unit != filepath.Base(unit):
				t.Errorf("%s: %+v, %v", row.cgroup, got, err)
			}
		}
		if e.questions() != 0 {
			t.Errorf("the engine was asked %d times about forged containers", e.questions())
		}
	})
}

// A process in a pid namespace of its own, which every user who may create containers can make, looks like its user.
// Root in it looks like root of the device.
func TestAttackPidNamespaces(t *testing.T) {
	needsRoot(t)
	own, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	flags := func(flags uintptr) func(*exec.Cmd) {
		return func(c *exec.Cmd) { c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flags} }
	}
	users := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}}
	bothWays(t, func(t *testing.T, o Options) {
		s := realFixture(t, o)
		name := fmt.Sprintf("percepttest-nested-%d-%v", os.Getpid(), o.NoPidfd)
		for _, row := range []struct {
			name, cgroup string
			change       func(*exec.Cmd)
			unit, want   string
		}{
			{"its first process", "", flags(unix.CLONE_NEWPID), "", "in a pid namespace of its own"},
			{"with mounts and users of its own", "", func(c *exec.Cmd) {
				c.SysProcAttr = &syscall.SysProcAttr{
					Cloneflags:  unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWUSER,
					UidMappings: users, GidMappings: users,
				}
			}, "", "in a pid namespace of its own"},
			{"another process, in two", "", func(c *exec.Cmd) {
				c.Path = "/usr/bin/unshare"
				c.Args = []string{
					"unshare", "-p", "-f", "unshare", "-p", "-f", "-m", "--mount-proc", "sh", "-c", own + "; true",
				}
			}, "", "in a pid namespace of its own"},
			{"below a user's manager", "/user.slice/user-0.slice/user@0.service/" + name, flags(unix.CLONE_NEWPID),
				"", "in a pid namespace of its own"},
			{"in a service", "/system.slice/" + name + ".service", flags(unix.CLONE_NEWPID), name + ".service", ""},
			{"in a service, with mounts alone", "/system.slice/" + name + ".service", flags(unix.CLONE_NEWNS),
				name + ".service", ""},
		} {
			a := s.start("connect", row.change)
			if row.cgroup != "" && !moveToCgroup(t, row.cgroup, a.cmd.Process.Pid) {
				return
			}
			a.done()
			s.ageCallers()
			attestation, _ := s.accept(Socket{})
			got, err := attestation.Caller(context.Background())
			admin := s.start("connect", row.change)
			admin.done()
			s.ageCallers()
			shut, _ := s.accept(Socket{Restricted: true})
			atAdmin, errAdmin := shut.Caller(context.Background())
			a.end()
			admin.end()
			nested := row.name != "in a service, with mounts alone"
			if errAdmin != nil || atAdmin.HasUser() == nested || atAdmin.UID != 0 {
				t.Errorf("%s, on the admin socket: %+v, %v", row.name, atAdmin, errAdmin)
			}
			switch {
			case row.want != "":
				checkDenied(t, row.name, err, row.want)
			case err != nil || got.Unit != row.unit || got.HasUser() == nested:
				t.Errorf("%s: %+v, %v", row.name, got, err)
			}
		}
	})
}

// moveToCgroup moves a process into a cgroup of systemd's hierarchy that is created for the test.
func moveToCgroup(t *testing.T, cgroup string, pid int) bool {
	t.Helper()
	root := "/sys/fs/cgroup"
	for _, named := range []string{"/sys/fs/cgroup/systemd", "/sys/fs/cgroup/unified"} {
		if _, err := os.Stat(filepath.Join(named, "cgroup.procs")); err == nil {
			root = named
			break
		}
	}
	if err := unix.Access(root, unix.W_OK); err != nil {
		t.Skipf("cgroups cannot be made in %s here: %v", root, err)
	}
	dir := filepath.Join(root, cgroup)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Skipf("cgroups cannot be made in %s here: %v", root, err)
	}
	t.Cleanup(func() {
		for d := dir; d != root && os.Remove(d) == nil; d = filepath.Dir(d) {
		}
	})
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0); err != nil {
		t.Fatal(err)
	}
	return true
}
