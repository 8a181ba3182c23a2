package attest

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// containerA is the cgroup of container idA.
const containerA = "/docker/" + idA

// newEngineFixture returns a fixture with two containers, vision and speech, and modules that require them.
func newEngineFixture(t *testing.T, o Options) (*fixture, *fakeEngine) {
	t.Helper()
	s, e := newFixture(t, o), newFakeEngine(t)
	s.putProcess(2, containerA)
	s.putProcess(3, "/docker/"+idB)
	e.answer(idA, honestAnswer(idA, "vision", 2))
	e.answer(idB, honestAnswer(idB, "speech", 3))
	s.SetRules(Rules{
		Engines: []string{filepath.Join(shortFolder(t), "nobody"), e.path}, NeedsEngine: true,
		Modules: map[string]Requirement{"vision": {Container: "vision"}, "speech": {Container: "speech"}, "free": {}},
	})
	return s, e
}

func TestContainers(t *testing.T) {
	t.Parallel()
	bothWays(t, func(t *testing.T, o Options) {
		s, e := newEngineFixture(t, o)
		edge := honestAnswer(idB, "speech", 3)
		edge.Config["Labels"] = map[string]string{edgeOwner: edgeAgent}
		edge.Image = idB // as Podman writes it
		edge.Name = "speech"
		edge.HostConfig = map[string]any{"CgroupParent": "/docker", "PidMode": "private"}
		e.answer(idB, edge)
		got, err := s.callerIn(containerA, Socket{})
		if err != nil || got.Module != "" || got.Unit != "" || got.Container == nil {
			t.Fatalf("%+v, %v", got, err)
		}
		c := got.Container
		if c.ID != idA || c.Name != "vision" || c.Image != "vision:1" || c.Digest != "sha256:"+idB ||
			c.EdgeModule != "" || c.StartedOn.Format("15:04:05.0") != "08:00:00.5" ||
			len(c.RepoDigests) != 1 || c.RepoDigests[0] != "registry.example/vision@sha256:"+idA {
			t.Errorf("%+v", c)
		}
		got, err = s.callerIn("/docker/"+idB, Socket{Module: "speech"})
		if err != nil || got.Module != "speech" || got.Container.EdgeModule != "speech" ||
			got.Container.Digest != "sha256:"+idB {
			t.Errorf("%+v %+v, %v", got, got.Container, err)
		}
		if got, err = s.callerIn(containerA, Socket{Module: "vision"}); err != nil || got.Module != "vision" {
			t.Errorf("%+v, %v", got, err)
		}
		got, err = s.callerIn(containerA, Socket{Module: "speech"})
		checkDenied(t, "another's socket", err, "it runs in container vision, and the module's is named speech")
		if got.Module != "" || got.Container.Name != "vision" {
			t.Errorf("%+v beside the error", got)
		}
		before := e.questions()
		if _, err := s.callerIn(containerA, Socket{Module: "free"}); err != nil || e.questions() != before {
			t.Errorf("%v, %d questions about a module that needs none", err, e.questions()-before)
		}
	})
}

// The engine is asked once for each connection.
func TestAttestedConnectionAsksOnce(t *testing.T) {
	t.Parallel()
	s, e := newEngineFixture(t, Options{})
	s.putProcess(os.Getpid(), containerA)
	attestation, _, _ := s.dial(Socket{Module: "vision"})
	for range 5 {
		if _, err := attestation.Caller(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
	if e.questions() != 2 { // the container, and its image
		t.Errorf("%d questions", e.questions())
	}
	if _, err := s.callerIn(containerA, Socket{Module: "vision"}); err != nil || e.questions() != 3 {
		t.Errorf("%v, %d questions after another connection", err, e.questions())
	}
}

func TestAttackLyingEngine(t *testing.T) {
	t.Parallel()
	bothWays(t, func(t *testing.T, o Options) {
		s, e := newEngineFixture(t, o)
		s.putProcess(4, "/docker/"+idB)
		for _, row := range []struct {
			name, want string
			lie        func(*inspectAnswer)
		}{
			{"another container", "answered for", func(c *inspectAnswer) { c.ID = idB }},
			{"a short ID", "answered for", func(c *inspectAnswer) { c.ID = idA[:12] }},
			{"no ID", "answered for", func(c *inspectAnswer) { c.ID = "" }},
			{"not running", "does not run", func(c *inspectAnswer) { c.State["Running"] = false }},
			{"restarting", "does not run", func(c *inspectAnswer) { c.State["Restarting"] = true }},
			{"dead", "does not run", func(c *inspectAnswer) { c.State["Dead"] = true }},
			{"no process", "does not run", func(c *inspectAnswer) { c.State["Pid"] = 0 }},
			{"a negative process", "does not run", func(c *inspectAnswer) { c.State["Pid"] = -4 }},
			{"no state", "no State", func(c *inspectAnswer) { c.State = nil }},
			{"no host configuration", "no State", func(c *inspectAnswer) { c.HostConfig = nil }},
			{"no configuration", "no State", func(c *inspectAnswer) { c.Config = nil }},
			{"no start", "a StartedAt that is no time", func(c *inspectAnswer) { c.State["StartedAt"] = "" }},
			{"an odd start", "StartedAt", func(c *inspectAnswer) { c.State["StartedAt"] = "yesterday" }},
			{"no name", "no name", func(c *inspectAnswer) { c.Name = "/" }},
			{"another name", "named vision", func(c *inspectAnswer) { c.Name = "/other" }},
			{"a name with a path", "named vision", func(c *inspectAnswer) { c.Name = "//vision" }},
			{"a cgroup parent", "cgroup parent of its own", func(c *inspectAnswer) {
				c.HostConfig["CgroupParent"] = "/docker/" + idB
			}},
			{"a slice as parent", "cgroup parent of its own", func(c *inspectAnswer) {
				c.HostConfig["CgroupParent"] = "evil.slice"
			}},
			{"the host's processes", "--pid host", func(c *inspectAnswer) { c.HostConfig["PidMode"] = "host" }},
			{"another's processes", "--pid container:x", func(c *inspectAnswer) {
				c.HostConfig["PidMode"] = "container:x"
			}},
			{"a process elsewhere", "first process is in cgroup", func(c *inspectAnswer) { c.State["Pid"] = 4 }},
			{"a process of the host", "first process is in cgroup", func(c *inspectAnswer) { c.State["Pid"] = 1 }},
			{"a process that is not there", "cannot be looked at", func(c *inspectAnswer) { c.State["Pid"] = 99 }},
			{"a long name", "name of more than", func(c *inspectAnswer) { c.Name = strings.Repeat("a", 1000) }},
			{"an image with a path", "no sha256", func(c *inspectAnswer) { c.Image = "sha256:../../" + idB }},
			{"a pid that is too large", "not one of Docker's API", func(c *inspectAnswer) { c.State["Pid"] = 1 << 40 }},
			{"a long ID", "answered for", func(c *inspectAnswer) { c.ID = strings.Repeat("a", 100_000) }},
		} {
			lie := honestAnswer(idA, "vision", 2)
			row.lie(&lie)
			e.answer(idA, lie)
			got, err := s.callerIn(containerA, Socket{Module: "vision"})
			checkDenied(t, row.name, err, row.want)
			if got.Module != "" || len(err.Error()) > 700 {
				t.Errorf("%s: %+v beside %.900v", row.name, got, err)
			}
		}
	})
}

// A container that takes over another's name is another container. The attestation of the first ends with its
// processes.
func TestAttackRecreatedContainer(t *testing.T) {
	t.Parallel()
	bothWays(t, func(t *testing.T, o Options) {
		ctx := context.Background()
		s, e := newEngineFixture(t, o)
		a := s.start("connect")
		s.putProcess(a.cmd.Process.Pid, containerA)
		a.done()
		s.ageCallers()
		first, _ := s.accept(Socket{Module: "vision"})
		before, err := first.Caller(ctx)
		if err != nil {
			t.Fatal(err)
		}
		a.end()
		if o.NoPidfd {
			s.write(a.cmd.Process.Pid, "statm", "0 0 0 0 0 0 0\n")
		}
		e.serve(idA, nil)
		other := honestAnswer(idB, "vision", 3)
		other.Image = "sha256:" + idA
		e.answer(idB, other)
		_, err = first.Caller(ctx)
		checkDenied(t, "the first container's connection", err, "has ended")
		_, err = s.callerIn(containerA, Socket{Module: "vision"})
		checkDenied(t, "the first container's cgroup", err, "knows no container")
		second, err := s.callerIn("/docker/"+idB, Socket{Module: "vision"})
		if err != nil || second.Container.ID == before.Container.ID || second.Container.Digest != "sha256:"+idA {
			t.Errorf("%+v, %v", second.Container, err)
		}
	})
}

// Podman reports a pid mode and a cgroup parent for every container. They are not the reason why a stopped container
// fails.
func TestContainerHints(t *testing.T) {
	t.Parallel()
	s, e := newEngineFixture(t, Options{})
	for _, row := range []struct {
		pidMode string
		running bool
		hinted  bool
	}{{"private", false, false}, {"private", true, false}, {"host", true, true}} {
		answer := honestAnswer(idA, "vision", 3) // whose first process is in another cgroup
		answer.State["Running"] = row.running
		answer.HostConfig["PidMode"], answer.HostConfig["CgroupParent"] = row.pidMode, "/docker"
		e.answer(idA, answer)
		_, err := s.callerIn(containerA, Socket{})
		var why *Error
		if !errors.As(err, &why) || (why.Hint != "") != row.hinted {
			t.Errorf("%+v: %+v", row, why)
		}
	}
}

// Rules that change while the engine is asked apply to the caller that waits.
func TestRulesChangeDuringAttestation(t *testing.T) {
	t.Parallel()
	s, e := newEngineFixture(t, Options{})
	asked, release := e.slow(idA, honestAnswer(idA, "vision", 2))
	s.putProcess(os.Getpid(), containerA)
	attestation, _, _ := s.dial(Socket{Module: "vision"})
	result := make(chan error)
	go func() {
		_, err := attestation.Caller(context.Background())
		result <- err
	}()
	<-asked
	s.SetRules(Rules{Engines: []string{e.path}, Modules: map[string]Requirement{"vision": {Container: "camera"}}})
	close(release)
	checkDenied(t, "the module is another container now", <-result, "the module's is named camera")
}
