package attest

import (
	"context"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"perceptd/agent/grants"
)

func TestAttestedCallers(t *testing.T) {
	t.Parallel()
	bothWays(t, func(t *testing.T, o Options) {
		s := newFixture(t, o)
		s.SetRules(Rules{Modules: map[string]Requirement{"vision": {}}})
		if s.Pidfd() == o.NoPidfd {
			t.Errorf("pidfd: %v", s.Pidfd())
		}
		groups, err := unix.Getgroups()
		if err != nil {
			t.Fatal(err)
		}
		for _, row := range []struct {
			cgroup string
			from   Socket
			want   grants.Caller
		}{
			{"/", Socket{}, grants.Caller{}},
			{"/user.slice/user-0.slice/session-1.scope", Socket{}, grants.Caller{}},
			{"/edge.slice/cam.service", Socket{}, grants.Caller{Unit: "cam.service"}},
			{"/edge.slice/cam.service", Socket{Module: "vision"}, grants.Caller{Module: "vision"}},
			{"/docker/" + idA, Socket{Module: "vision"}, grants.Caller{Module: "vision"}},
			{"/nobody/knows", Socket{Module: "vision"}, grants.Caller{Module: "vision"}},
			{"/nobody/knows", Socket{Restricted: true}, grants.Caller{}},
		} {
			got, err := s.callerIn(row.cgroup, row.from)
			if err != nil {
				t.Errorf("%s: %v", row.cgroup, err)
				continue
			}
			row.want.UID, row.want.GID, row.want.PID = uint32(os.Getuid()), uint32(os.Getgid()), int32(os.Getpid())
			if !slices.EqualFunc(got.Groups, groups, func(a uint32, b int) bool { return int(a) == b }) {
				t.Errorf("%s: groups %v, want %v", row.cgroup, got.Groups, groups)
			}
			got.Groups = nil
			if got.String() != row.want.String() || got.Unit != row.want.Unit || got.Container != nil ||
				got.GID != row.want.GID {
				t.Errorf("%s: %+v, want %+v", row.cgroup, got, row.want)
			}
		}
	})
}

func TestUnattestedCallers(t *testing.T) {
	t.Parallel()
	bothWays(t, func(t *testing.T, o Options) {
		s := newFixture(t, o)
		s.SetRules(Rules{Modules: map[string]Requirement{"vision": {Container: "vision"}}})
		for _, row := range []struct {
			cgroup string
			from   Socket
			want   string
		}{
			{"/system.slice/evil.service/docker-" + idA + ".scope", Socket{}, "no container's own"},
			{"/docker/" + idA + "/" + idB, Socket{}, "more than one container"},
			{"/../..", Socket{}, "outside of what the daemon can see"},
			{"/docker/" + idA, Socket{}, "no container engine is there to ask"},
			{"/docker/" + idA, Socket{Module: "vision"}, "no container engine is there to ask"},
			{"/", Socket{Module: "vision"}, "not out of a container named vision"},
			{"/system.slice/vision.service", Socket{Module: "vision"}, "not out of a container named vision"},
			{"/", Socket{Module: "gone"}, "no such module"},
		} {
			got, err := s.callerIn(row.cgroup, row.from)
			checkDenied(t, row.cgroup, err, row.want)
			if got.Module != "" || got.UID != uint32(os.Getuid()) || got.PID != int32(os.Getpid()) {
				t.Errorf("%s: %+v beside the error", row.cgroup, got)
			}
		}
	})
}

// A daemon that was started by hand in a container sees other processes of the same container.
func TestNeighboursOfTheDaemon(t *testing.T) {
	t.Parallel()
	s := &fixture{t: t, proc: newProc(t)}
	s.putProcess(1, "/")
	s.putProcess(os.Getpid(), "/docker/"+idA)
	s.open(Options{Proc: s.proc})
	if got, err := s.callerIn("/docker/"+idA, Socket{}); err != nil || got.Container != nil || got.Unit != "" {
		t.Errorf("%+v, %v", got, err)
	}
	_, err := s.callerIn("/docker/"+idB, Socket{})
	checkDenied(t, "another container", err, "no container engine")
	_, err = s.callerIn("/docker/"+idA+"/"+idB, Socket{})
	checkDenied(t, "a container in it", err, "more than one")
}

func TestAttestWithoutConnection(t *testing.T) {
	t.Parallel()
	s := newFixture(t, Options{})
	pipe, other := net.Pipe()
	defer pipe.Close()
	defer other.Close()
	for name, conn := range map[string]net.Conn{
		"no Unix socket": pipe, "no connection": nil, "not accepted by the attestor": new(net.UnixConn),
	} {
		ctx := s.NewContext(context.Background(), conn, Socket{Module: "vision"})
		attestation, err := FromContext(ctx)
		if err != nil {
			t.Fatal(err)
		}
		got, err := attestation.Caller(ctx)
		checkDenied(t, name, err, "not come in on a Unix socket")
		if got.UID != grants.NoID || got.PID != 0 || got.Module != "" {
			t.Errorf("%s: %+v beside the error", name, got)
		}
		if _, err := attestation.Unconfirmed(); err == nil {
			t.Errorf("%s: seen", name)
		}
	}
	if _, err := FromContext(context.Background()); err == nil {
		t.Error("a context without an attestation has one")
	}
	attestation, _, conn := s.dial(Socket{})
	conn.Close()
	_, err := attestation.Caller(context.Background())
	checkDenied(t, "closed", err, "has ended")
	conn.Close()
}

// Unconfirmed returns what is known without asking an engine.
func TestUnconfirmed(t *testing.T) {
	t.Parallel()
	s := newFixture(t, Options{})
	s.SetRules(Rules{Modules: map[string]Requirement{"vision": {Container: "vision"}}})
	for _, row := range []struct {
		cgroup          string
		from            Socket
		unit, container string
		attested        bool
	}{
		{"/system.slice/cam.service", Socket{}, "cam.service", "", true},
		{"/docker/" + idA, Socket{}, "", idA, true},
		{"/docker/" + idA, Socket{Module: "vision"}, "", "", true},
		{"/elsewhere", Socket{}, "", "", false},
	} {
		s.putProcess(os.Getpid(), row.cgroup)
		attestation, _, _ := s.dial(row.from)
		got, err := attestation.Unconfirmed()
		container := ""
		if got.Container != nil {
			container = got.Container.ID
		}
		if (err == nil) != row.attested || got.Unit != row.unit || container != row.container ||
			got.Module != row.from.Module || got.PID == 0 {
			t.Errorf("%s: %+v, %v", row.cgroup, got, err)
		}
	}
}

// New rules apply to connections that were made before.
func TestRulesChange(t *testing.T) {
	t.Parallel()
	bothWays(t, func(t *testing.T, o Options) {
		ctx := context.Background()
		s := newFixture(t, o)
		s.SetRules(Rules{Modules: map[string]Requirement{"vision": {}}})
		attestation, _, _ := s.dial(Socket{Module: "vision"})
		if _, err := attestation.Caller(ctx); err != nil {
			t.Fatal(err)
		}
		s.SetRules(Rules{Modules: map[string]Requirement{"vision": {Container: "vision"}}})
		_, err := attestation.Caller(ctx)
		checkDenied(t, "the module must be a container now", err, "not out of a container")
		s.SetRules(Rules{})
		_, err = attestation.Caller(ctx)
		checkDenied(t, "the module is gone", err, "no such module")
		s.SetRules(Rules{Modules: map[string]Requirement{"vision": {}}})
		if got, err := attestation.Caller(ctx); err != nil || got.Module != "vision" {
			t.Errorf("%+v, %v", got, err)
		}
	})
}

// A process that moves to another cgroup is attested again within locationTTL.
func TestMovedCaller(t *testing.T) {
	t.Parallel()
	bothWays(t, func(t *testing.T, o Options) {
		ctx := context.Background()
		s := newFixture(t, o)
		s.putProcess(os.Getpid(), "/system.slice/cam.service")
		attestation, _, _ := s.dial(Socket{})
		if got, err := attestation.Caller(ctx); err != nil || got.Unit != "cam.service" {
			t.Fatalf("%+v, %v", got, err)
		}
		for _, row := range []struct {
			cgroup, unit, want string
		}{
			{"/system.slice/other.service", "other.service", ""},
			{"/system.slice/other.service/x", "", "made below its own"},
			{"/system.slice/cam.service", "cam.service", ""},
			{"/docker/" + idA, "", "no container engine"},
		} {
			s.putProcess(os.Getpid(), row.cgroup)
			attestation.locatedAt = time.Now().Add(-locationTTL)
			got, err := attestation.Caller(ctx)
			if row.want != "" {
				checkDenied(t, row.cgroup, err, row.want)
			} else if err != nil || got.Unit != row.unit {
				t.Errorf("%s: %+v, %v", row.cgroup, got, err)
			}
		}
	})
}

// An attestation ends when its caller ends, and when the daemon can no longer read the caller's files in /proc.
func TestUnreadableProc(t *testing.T) {
	t.Parallel()
	bothWays(t, func(t *testing.T, o Options) {
		s := newFixture(t, o)
		for _, row := range []struct {
			name, file, text, want string
			procOnly               bool
		}{
			{"no cgroup", "cgroup", "", "cannot be read", false},
			{"a long cgroup", "cgroup", strings.Repeat("4:x:/\n", maxProcFile/6+1), "longer than", false},
			{"no statm", "statm", "", "has ended", true},
			{"no stat", "stat", "", "no such file", true},
			{"no status", "status", "", "no such file", true},
			{"odd stat", "stat", "1 (x) S 0", "stat of a process", true},
			{"a zombie", "statm", "0 0 0 0 0 0 0\n", "has ended", true},
			{"another user's", "status", "Uid:\t4294967290\t1\t1\t1\n", "another user's", true},
			{"no uid in status", "status", "Name:\tx\n", "another user's", true},
			{"too young", "stat", "1 (x) S" + strings.Repeat(" 0", 18) + " 99999999999 0\n",
				"after the connection was made", true},
		} {
			if row.procOnly && !o.NoPidfd {
				continue
			}
			s.putProcess(os.Getpid(), "/")
			if row.text == "" {
				if err := os.Remove(s.kernel.path(int32(os.Getpid()), row.file)); err != nil {
					t.Fatal(err)
				}
			} else {
				s.write(os.Getpid(), row.file, row.text)
			}
			attestation, _, _ := s.dial(Socket{})
			_, err := attestation.Caller(context.Background())
			checkDenied(t, row.name, err, row.want)
		}
	})
}

// After a caller's process has ended, nothing more is read of it. Another process may have its ID, whose service or
// container would be counted, logged and reported instead.
func TestNothingLeaksOfReusedPID(t *testing.T) {
	t.Parallel()
	const dead = "0 0 0 0 0 0 0\n"
	ctx := context.Background()
	for _, cgroup := range []string{"/system.slice/victim.service", containerA, "/system.slice/victim.service/below"} {
		s, e := newEngineFixture(t, Options{NoPidfd: true})
		isPeer := func(when string, got grants.Caller, err error) {
			t.Helper()
			checkDenied(t, when, err, "has ended")
			if got.Unit != "" || got.Container != nil || got.Module != "" || got.PID == 0 {
				t.Errorf("%s, %s: %+v", cgroup, when, got)
			}
		}
		attestation, _, _ := s.dial(Socket{})
		s.putProcess(os.Getpid(), cgroup)
		s.write(os.Getpid(), "statm", dead)
		attestation.locatedAt = time.Time{}
		got, err := attestation.Caller(ctx)
		isPeer("ended before its request", got, err)
		before := e.questions()
		again, _, _ := s.dial(Socket{})
		got, err = again.Unconfirmed()
		isPeer("ended before it was accepted", got, err)
		got, err = again.Caller(ctx)
		isPeer("ended before it was accepted, proved", got, err)
		if e.questions() != before {
			t.Errorf("%s: the engine was asked about it", cgroup)
		}
	}
	s := newFixture(t, Options{NoPidfd: true})
	s.putProcess(os.Getpid(), "/system.slice/cam.service")
	attestation, _, _ := s.dial(Socket{})
	if _, err := attestation.Caller(ctx); err != nil {
		t.Fatal(err)
	}
	s.putProcess(os.Getpid(), "/system.slice/victim.service")
	s.write(os.Getpid(), "statm", dead)
	attestation.locatedAt = time.Time{}
	got, err := attestation.Caller(ctx)
	checkDenied(t, "ended after its proof", err, "has ended")
	if got.Unit != "cam.service" {
		t.Errorf("%+v", got)
	}
}
