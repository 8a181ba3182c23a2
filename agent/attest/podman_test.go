package attest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Cgroups of containers of root's Podman, as it makes them under systemd.
const (
	splitA   = "/system.slice/vision.service/libpod-payload-" + idA
	podScope = "/machine.slice/machine-libpod_pod_" + idB + ".slice/libpod-" + idA + ".scope"
	podPath  = "/libpod_parent/" + idB + "/libpod-" + idA
)

// newPodmanFixture returns a fixture with Podman as the engine, and a module that requires the container vision.
func newPodmanFixture(t *testing.T, o Options) (*fixture, *fakeEngine) {
	t.Helper()
	s, e := newFixture(t, o), newFakeEngine(t)
	e.become("4.3.1")
	s.SetRules(Rules{Engines: []string{e.path}, Modules: map[string]Requirement{"vision": {Container: "vision"}}})
	return s, e
}

// Containers that Quadlet's units start, those of pods, and those without an image are their modules.
func TestPodmanContainers(t *testing.T) {
	t.Parallel()
	bothWays(t, func(t *testing.T, o Options) {
		s, e := newPodmanFixture(t, o)
		for _, row := range []struct{ name, cgroup, named, pod, parent string }{
			{"Quadlet", splitA, splitA, "", ""},
			{"Quadlet, in nested slices", `/edge.slice/edge-m.slice/cam@3f\x2dx.service/libpod-payload-` + idA,
				`/edge.slice/edge-m.slice/cam@3f\x2dx.service/libpod-payload-` + idA, "", ""},
			// Podman reports the pod's cgroup as the parent, and does not use it.
			{"Quadlet, in a pod", splitA, splitA, idB, "machine.slice/machine-libpod_pod_" + idB + ".slice"},
			{"a pod", podScope, podScope, idB, "machine.slice/machine-libpod_pod_" + idB + ".slice"},
			{"a pod, by crun", podScope + "/container", podScope, idB,
				"machine.slice/machine-libpod_pod_" + idB + ".slice"},
			{"a pod, by the cgroupfs driver", podPath, podPath, idB, "/libpod_parent/" + idB},
			{"no pod", "/machine.slice/libpod-" + idA + ".scope/container",
				"/machine.slice/libpod-" + idA + ".scope", "", ""},
			{"no pod, by the cgroupfs driver", "/libpod_parent/libpod-" + idA, "/libpod_parent/libpod-" + idA, "", ""},
			{"an older Podman that does not name its cgroup", "/machine.slice/libpod-" + idA + ".scope", "", "", ""},
		} {
			s.putProcess(2, row.cgroup)
			answer := podmanAnswer(idA, "vision", row.named, row.pod, 2)
			answer.HostConfig["CgroupParent"] = row.parent
			e.answer(idA, answer)
			got, err := s.callerIn(row.cgroup, Socket{Module: "vision"})
			if err != nil || got.Module != "vision" || got.Unit != "" || got.Container.Digest != "sha256:"+idB {
				t.Errorf("%s: %+v, %v", row.name, got, err)
			}
		}
		rootfs := podmanAnswer(idA, "vision", splitA, "", 2)
		rootfs.Image, rootfs.Config["Image"] = "", ""
		e.answer(idA, rootfs)
		s.putProcess(2, splitA)
		got, err := s.callerIn(splitA, Socket{Module: "vision"})
		if err != nil || got.Module != "vision" || got.Container.Digest != "" || got.Container.RepoDigests != nil {
			t.Errorf("without an image: %+v, %v", got, err)
		}
	})
}

// The version that Podman names becomes part of a path.
func TestVersionsOfPodman(t *testing.T) {
	t.Parallel()
	for version, known := range map[string]bool{
		"3.0.0": true, "4.3.1": true, "5.4.2": true, "5.5.0-dev": true, "5.6.0-rc1": true,
		"5": false, "5.4": false, "5.4.2/../..": false, "5.4.2 x": false, "v5.4.2": false, "5.4.2-": false,
	} {
		e := newFakeEngine(t)
		e.become(version)
		client, err := dialEngine(context.Background(), e.path, newTrustedOwners(true))
		if (err == nil) != known || known && client.libpod != version {
			t.Errorf("%s: %+v, %v", version, client, err)
		}
	}
}

// A process that makes a cgroup with a container's ID in its path is not that container, and neither is another
// container of its name.
func TestAttackPodmanContainers(t *testing.T) {
	t.Parallel()
	bothWays(t, func(t *testing.T, o Options) {
		s, e := newPodmanFixture(t, o)
		s.putProcess(2, splitA)
		s.putProcess(3, podScope)
		s.putProcess(4, "/system.slice/evil.service/libpod-payload-"+idA)
		s.putProcess(5, "/user.slice/user-1000.slice/user@1000.service/app.slice/vision.service/libpod-payload-"+idA)
		honest := func() inspectAnswer { return podmanAnswer(idA, "vision", splitA, "", 2) }
		inPod := func() inspectAnswer { return podmanAnswer(idA, "vision", podScope, idB, 3) }
		with := func(answer inspectAnswer, change func(*inspectAnswer)) inspectAnswer {
			change(&answer)
			return answer
		}
		for _, row := range []struct {
			name, cgroup string
			answer       inspectAnswer
			want         string
		}{
			{"another service's cgroup of that name", "/system.slice/evil.service/libpod-payload-" + idA, honest(),
				"the engine says that its container is in cgroup " + splitA},
			{"another slice's", "/evil.slice/vision.service/libpod-payload-" + idA, honest(),
				"the engine says that its container is in cgroup"},
			{"a pod's container elsewhere", splitA, inPod(), "the engine says that its container is in cgroup"},
			{"a container elsewhere, in the cgroup of a pod", podScope, honest(),
				"the engine says that its container is in cgroup"},
			{"the first process is elsewhere", splitA,
				with(honest(), func(c *inspectAnswer) { c.State["Pid"] = 4 }), "first process is in cgroup"},
			{"the first process is a user's", splitA,
				with(honest(), func(c *inspectAnswer) { c.State["Pid"] = 5 }), "first process is in cgroup"},
			{"both are a user's",
				"/user.slice/user-1000.slice/user@1000.service/app.slice/vision.service/libpod-payload-" + idA,
				with(honest(), func(c *inspectAnswer) {
					c.State["Pid"] = 5
					c.State["CgroupPath"] =
						"/user.slice/user-1000.slice/user@1000.service/app.slice/vision.service/libpod-payload-" + idA
				}), "a rootless engine proves nothing"},
			{"no cgroup is named", splitA, with(honest(), func(c *inspectAnswer) { c.State["CgroupPath"] = "" }),
				"does not name its container's"},
			{"no cgroup is named, of a pod", podScope,
				with(inPod(), func(c *inspectAnswer) { c.State["CgroupPath"] = "" }), "does not name its container's"},
			{"another pod", podScope, with(inPod(), func(c *inspectAnswer) { c.Pod = idA }), "another pod"},
			{"a cgroup parent that looks like a pod", podScope, with(inPod(), func(c *inspectAnswer) { c.Pod = "" }),
				"another pod"},
			{"a renamed container", splitA, podmanAnswer(idA, "old-vision", splitA, "", 2),
				"it runs in container old-vision"},
			{"an ended container", splitA, with(honest(), func(c *inspectAnswer) { c.State["Running"] = false }),
				"does not run"},
			{"the host's processes", splitA,
				with(honest(), func(c *inspectAnswer) { c.HostConfig["PidMode"] = "host" }),
				"--pid host"},
			{"below the container", splitA + "/init.scope", honest(), "no container's own"},
			{"another container below it", splitA + "/libpod-payload-" + idB, honest(), "more than one container"},
			{"Podman's own process", "/system.slice/vision.service/runtime", honest(), "made below its own"},
			{"the unit itself", "/system.slice/vision.service", honest(), "not out of a container named vision"},
		} {
			e.answer(idA, row.answer)
			got, err := s.callerIn(row.cgroup, Socket{Module: "vision"})
			checkDenied(t, row.name, err, row.want)
			if got.Module != "" {
				t.Errorf("%s: %+v", row.name, got)
			}
		}
		e.serve(idA, nil)
		_, err := s.callerIn(splitA, Socket{Module: "vision"})
		checkDenied(t, "the engine does not know it", err, "knows no container")
		var why *Error
		if !errors.As(err, &why) || !strings.Contains(why.Hint, `require = "socket"`) {
			t.Errorf("hint %q", why.Hint)
		}
		s.engine.reset()
		e.become("") // it is Docker, and does not name cgroups
		docker := honestAnswer(idA, "vision", 2)
		e.answer(idA, docker)
		_, err = s.callerIn(splitA, Socket{Module: "vision"})
		checkDenied(t, "Docker's word", err, "does not name its container's")
	})
}

// Who may make cgroups below a service's may give one any container's name: a user to whom systemd gave the service's
// cgroup (Delegate=), as for a container whose ID an engine still holds for running, and whose first process's number
// is another's by now.
func TestAttackDelegatedCgroup(t *testing.T) {
	t.Parallel()
	service := filepath.Dir(splitA)
	for _, row := range []struct {
		name, want string
		change     func(s *fixture)
	}{
		{"others may make cgroups below the service's", "mode 0777", func(s *fixture) { s.putCgroup(service, 0o777) }},
		{"a group may", "mode 0775", func(s *fixture) { s.putCgroup(service, 0o775) }},
		{"others may move processes", "mode 0757", func(s *fixture) { s.putCgroup(splitA, 0o757) }},
		{"others may move processes by the file", "cgroup.procs has mode 0666", func(s *fixture) {
			procs := filepath.Join(s.cgroups, "systemd", splitA, "cgroup.procs")
			if err := errors.Join(os.WriteFile(procs, nil, 0o666), os.Chmod(procs, 0o666)); err != nil {
				t.Fatal(err)
			}
		}},
		{"in the other hierarchy", "mode 0777", func(s *fixture) {
			dir := filepath.Join(s.cgroups, "unified", service)
			if err := errors.Join(os.MkdirAll(dir, 0o755), os.Chmod(dir, 0o777)); err != nil {
				t.Fatal(err)
			}
		}},
		{"no hierarchy is there", "cannot be looked at", func(s *fixture) { s.kernel.cgroups += "/none" }},
	} {
		s, e := newPodmanFixture(t, Options{})
		s.putProcess(2, splitA)
		e.answer(idA, podmanAnswer(idA, "vision", splitA, "", 2))
		row.change(s)
		s.putProcessFiles(os.Getpid(), splitA)
		attestation, _, _ := s.dial(Socket{Module: "vision"})
		got, err := attestation.Caller(context.Background())
		checkDenied(t, row.name, err, row.want)
		if got.Module != "" || e.asked > 0 {
			t.Errorf("%s: %+v, after %d questions", row.name, got, e.asked)
		}
	}
}

// A process in the cgroup of the unit that runs a container is the unit's, as ExecStartPre= is, and not the container;
// and the container is not the unit.
func TestQuadletUnit(t *testing.T) {
	t.Parallel()
	s, e := newPodmanFixture(t, Options{})
	s.putProcess(2, splitA)
	e.answer(idA, podmanAnswer(idA, "vision", splitA, "", 2))
	got, err := s.callerIn("/system.slice/vision.service", Socket{})
	if err != nil || got.Unit != "vision.service" || got.Container != nil {
		t.Errorf("the unit: %+v, %v", got, err)
	}
	if got, err = s.callerIn(splitA, Socket{}); err != nil || got.Unit != "" || got.Container.Name != "vision" {
		t.Errorf("the container: %+v, %v", got, err)
	}
	_, err = s.callerIn("/system.slice/vision.service/runtime", Socket{})
	checkDenied(t, "Podman's own process", err, "made below its own")
}

// A rootless engine is never asked, since its user can have it say anything. Its containers are served on the sockets
// of modules that require no more, and every hint says so.
func TestAttackRootlessEngine(t *testing.T) {
	t.Parallel()
	bothWays(t, func(t *testing.T, o Options) {
		s, lying := newPodmanFixture(t, o)
		users := "/user.slice/user-1000.slice/user@1000.service"
		forged := users + "/app.slice/vision.service/libpod-payload-" + idA
		s.SetRules(Rules{
			Engines: []string{lying.path}, Parents: []string{users + "/user.slice", "/user.slice"},
			Modules: map[string]Requirement{"vision": {Container: "vision"}, "open": {}},
		})
		for _, cgroup := range []string{
			forged,
			users + "/user.slice/libpod-" + idA + ".scope/container",
			users + "/user.slice/libpod-" + idA + ".scope",
			users + "/user.slice/user-libpod_pod_" + idB + ".slice/libpod-" + idA + ".scope/container",
			users + podScope,
			"/user.slice/user-0.slice/user@0.service/app.slice/vision.service/libpod-payload-" + idA,
			"/user.slice/libpod-" + idA + ".scope",
		} {
			s.putProcess(2, cgroup)
			answer := podmanAnswer(idA, "vision", strings.TrimSuffix(cgroup, "/container"), "", 2)
			if strings.Contains(cgroup, idB) {
				answer.Pod = idB
			}
			lying.answer(idA, answer)
			for _, from := range []Socket{{Module: "vision"}, {}} {
				got, err := s.callerIn(cgroup, from)
				checkDenied(t, cgroup, err, "a rootless engine proves nothing")
				var why *Error
				if !errors.As(err, &why) || why.Hint != rootlessHint || got.Module != "" {
					t.Errorf("%s: %+v, %+v", cgroup, got, why)
				}
			}
			if got, err := s.callerIn(cgroup, Socket{Module: "open"}); err != nil || got.Module != "open" {
				t.Errorf("%s, a module by its socket: %+v, %v", cgroup, got, err)
			}
		}
		if lying.questions() != 0 {
			t.Errorf("the engine was asked %d times about containers of users", lying.questions())
		}
		s.write(os.Getpid(), "status", statusOf("17\t1"))
		s.write(os.Getpid(), "cgroup", inAllHierarchies("/user.slice/user-1000.slice/session-3.scope"))
		attestation, _, _ := s.dial(Socket{})
		_, err := attestation.Caller(context.Background())
		var why *Error
		if !errors.As(err, &why) || why.Hint != rootlessHint {
			t.Errorf("a rootless container without a cgroup of its own: %+v", err)
		}
	})
}

// A user's engine that answers every question as an attacker wants is refused before it is asked any, wherever the
// configuration names it, and also where the container looks like one of root's.
func TestAttackUsersLyingEngine(t *testing.T) {
	needsRoot(t)
	t.Parallel()
	e := newFakeEngine(t)
	e.become("4.3.1")
	if err := os.Chown(e.path, 1000, 1000); err != nil {
		t.Fatal(err)
	}
	s := newFixture(t, Options{})
	s.SetRules(Rules{Engines: []string{e.path}, Modules: map[string]Requirement{"vision": {Container: "vision"}}})
	for _, cgroup := range []string{splitA, podScope, "/machine.slice/libpod-" + idA + ".scope"} {
		s.putProcess(2, cgroup)
		e.answer(idA, podmanAnswer(idA, "vision", cgroup, "", 2))
		_, err := s.callerIn(cgroup, Socket{Module: "vision"})
		checkDenied(t, cgroup, err, "believed only if it is root's")
		var why *Error
		if !errors.As(err, &why) || !strings.Contains(why.Hint, `require = "socket"`) {
			t.Errorf("%s: %+v", cgroup, why)
		}
	}
	if e.questions() != 0 {
		t.Errorf("it was asked %d times", e.questions())
	}
}

// A process below a service with Delegate=yes makes a cgroup that is named as that of a real container.
func TestAttackForgedPayload(t *testing.T) {
	needsRoot(t)
	bothWays(t, func(t *testing.T, o Options) {
		e := newFakeEngine(t)
		e.become("5.4.2")
		s := realFixture(t, o)
		s.SetRules(Rules{Engines: []string{e.path}, Modules: map[string]Requirement{"vision": {Container: "vision"}}})
		name := fmt.Sprintf("percepttest-payload-%d-%v", os.Getpid(), o.NoPidfd)
		real := "/system.slice/" + name + ".service/libpod-payload-" + idA
		forged := "/system.slice/" + name + "-evil.service/libpod-payload-" + idA

		first := s.start("connect")
		if !moveToCgroup(t, real, first.cmd.Process.Pid) {
			return
		}
		first.done()
		s.ageCallers()
		ofFirst, _ := s.accept(Socket{Module: "vision"})
		e.answer(idA, podmanAnswer(idA, "vision", real, "", first.cmd.Process.Pid))
		if got, err := ofFirst.Caller(context.Background()); err != nil || got.Module != "vision" {
			t.Errorf("the container itself: %+v, %v", got, err)
		}
		for _, row := range []struct{ cgroup, want string }{
			{forged, "the engine says that its container is in cgroup"},
			{forged + "/" + filepath.Base(real), "more than one container"},
			{real + "/below", "no container's own"},
			{filepath.Dir(real) + "/runtime", "made below its own"},
			{filepath.Dir(real), "not out of a container named vision"},
		} {
			a := s.start("connect")
			if !moveToCgroup(t, row.cgroup, a.cmd.Process.Pid) {
				return
			}
			a.done()
			s.ageCallers()
			attestation, _ := s.accept(Socket{Module: "vision"})
			_, err := attestation.Caller(context.Background())
			checkDenied(t, row.cgroup, err, row.want)
			a.end()
		}
		for _, hierarchy := range s.kernel.hierarchies() { // as systemd does for a service with User= and Delegate=
			err := os.Chown(hierarchy+filepath.Dir(real), 65534, 65534)
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				t.Fatal(err)
			}
		}
		s.SetRules(s.rules.Load().Rules)
		_, err := ofFirst.Caller(context.Background())
		checkDenied(t, "the service is a user's", err, "belongs to user 65534")
	})
}
