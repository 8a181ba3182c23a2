package attest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"perceptd/agent/grants"
	"slices"
	"strings"
	"testing"
)

const (
	idA = "3f4e5d6c7b8a99887766554433221100ffeeddccbbaa99887766554433221100"
	idB = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"
)

// inAllHierarchies returns the cgroup file of a process that is at p in every hierarchy, as on a device with cgroups
// v1.
func inAllHierarchies(p string) string {
	return "12:cpuset:" + p + "\n3:cpu,cpuacct:" + p + "\n1:name=systemd:" + p + "\n0::" + p + "\n"
}

func unified(p string) string { return "0::" + p + "\n" }

func TestParseCgroup(t *testing.T) {
	t.Parallel()
	const podA = "/machine.slice/machine-libpod_pod_" + idB + ".slice"
	parents := map[string]bool{"/edge": true, "/edge.slice": true, "/a.slice/a-b.slice": true,
		"/user.slice/user-1000.slice/user@1000.service/user.slice": true, "/user.slice": true}
	for _, row := range []struct {
		path            string
		kind            locationKind
		unit, container string
	}{
		{"/", onHost, "", ""},
		{"/init.scope", onHost, "", ""},
		{"/user.slice/user-1000.slice/session-3.scope", onHost, "", ""},
		{"/user.slice/user-1000.slice/user@1000.service/app.slice/cam.service", onHost, "", ""},
		{"/user.slice/user-1000.slice/user@1000.service/init.scope", onHost, "", ""},
		{"/system.slice/run-r1f.scope", onHost, "", ""},
		{"/system.slice/cam.service", inUnit, "cam.service", ""},
		{`/edge.slice/edge-modules.slice/cam@3f\x2dx.service`, inUnit, `cam@3f\x2dx.service`, ""},
		{"/user.slice/user-1000.slice/user@1000.service", inUnit, "user@1000.service", ""},

		{"/docker/" + idA, inContainer, "", idA},
		{"/system.slice/docker-" + idA + ".scope", inContainer, "", idA},
		{"/libpod_parent/libpod-" + idA, inContainer, "", idA},
		{"/machine.slice/libpod-" + idA + ".scope", inContainer, "", idA},
		{"/machine.slice/libpod-" + idA + ".scope/container", inContainer, "", idA},
		{"/default/" + idA, inContainer, "", idA},
		{"/system.slice/nerdctl-" + idA + ".scope", inContainer, "", idA},
		{"/edge/" + idA, inContainer, "", idA},
		{"/edge.slice/docker-" + idA + ".scope", inContainer, "", idA},
		{"/a.slice/a-b.slice/docker-" + idA + ".scope", inContainer, "", idA},

		// Podman's pods, by each driver, and containers that it split from the cgroup of a service (Quadlet).
		{podA + "/libpod-" + idA + ".scope", inContainer, "", idA},
		{podA + "/libpod-" + idA + ".scope/container", inContainer, "", idA},
		{"/libpod_parent/" + idB + "/libpod-" + idA, inContainer, "", idA},
		{"/system.slice/cam.service/libpod-payload-" + idA, inContainer, "", idA},
		{`/edge.slice/edge-modules.slice/cam@3f\x2dx.service/libpod-payload-` + idA, inContainer, "", idA},

		// Podman's own processes: of such a service, of a pod, and of a container.
		{"/system.slice/cam.service/runtime", unclear, "", ""},
		{"/system.slice/cam.service/supervisor", unclear, "", ""},
		{podA + "/libpod-conmon-" + idA + ".scope", unclear, "", ""},
		{podA, unclear, "", ""},
		// Nearly a pod, or nearly split.
		{podA + "/docker-" + idA + ".scope", unclear, "", ""},
		{podA + "/libpod-" + idA, unclear, "", ""},
		{podA + "/libpod-payload-" + idA, unclear, "", ""},
		{podA + "/libpod-" + idA + ".scope/init.scope", unclear, "", ""},
		{podA + "/libpod-" + idA + ".scope/container/libpod-" + idA, unclear, "", ""},
		{"/system.slice" + podA + "/libpod-" + idA + ".scope", unclear, "", ""},
		{"/machine.slice/machine-libpod_pod_x.slice/libpod-" + idA + ".scope", unclear, "", ""},
		{"/libpod_parent/" + idB + "/libpod-" + idA + "/container", unclear, "", ""},
		{"/libpod_parent/libpod-" + idB + "/libpod-" + idA, unclear, "", ""},
		{"/docker/" + idB + "/libpod-" + idA, unclear, "", ""},
		{"/system.slice/cam.service/libpod-payload-" + idA + "/container", unclear, "", ""},
		{"/system.slice/cam.service/libpod-payload-" + idA + "/libpod-payload-" + idB, unclear, "", ""},
		{"/system.slice/cam.service/libpod-payload-" + idA + "/libpod-payload-" + idA, unclear, "", ""},
		{"/system.slice/cam.service/x/libpod-payload-" + idA, unclear, "", ""},
		{"/system.slice/evil.service/system.slice/cam.service/libpod-payload-" + idA, unclear, "", ""},
		{"/system.slice/cam.service/libpod-" + idA, unclear, "", ""},
		{"/system.slice/cam.service/libpod-payload-" + idA + ".scope", unclear, "", ""},
		{"/system.slice/cam@.service/libpod-payload-" + idA, unclear, "", ""},
		{"/system.slice/cam.scope/libpod-payload-" + idA, unclear, "", ""},
		{"/system.slice/libpod-payload-" + idA, unclear, "", ""},
		{"/libpod-payload-" + idA, unclear, "", ""},
		// A user who logged in made it: a rootless engine's container, or what looks like one of root's.
		{"/user.slice/user-1000.slice/user@1000.service/libpod-payload-" + idA, unclear, "", ""},
		{"/user.slice/user-1000.slice/user@1000.service/app.slice/cam.service/libpod-payload-" + idA, unclear,
			"", ""},
		{"/user.slice/user-0.slice/user@0.service/app.slice/cam.service/libpod-payload-" + idA, unclear, "", ""},
		{"/user.slice/user-1000.slice/user@1000.service/user.slice/user-libpod_pod_" + idB + ".slice/libpod-" + idA +
			".scope/container", unclear, "", ""},
		{"/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-" + idA + ".scope", unclear, "", ""},
		{"/user.slice/user-1000.slice/user@1000.service" + podA + "/libpod-" + idA + ".scope", unclear, "", ""},
		{"/user.slice/docker-" + idA + ".scope", unclear, "", ""},

		// A container that was placed below another's cgroup, by each driver.
		{"/docker/" + idA + "/" + idB, unclear, "", ""},
		{"/docker.slice/docker-" + idA + ".slice/docker-" + idB + ".scope", unclear, "", ""},
		// A container where its creator wanted it.
		{"/foo/" + idA, unclear, "", ""},
		{"/evil.slice/docker-" + idA + ".scope", unclear, "", ""},
		{"/user.slice/user-1000.slice/user@1000.service/" + idA, unclear, "", ""},
		{"/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-" + idA + ".scope/container",
			unclear, "", ""},
		// A service that made cgroups of its own, under names that it chose.
		{"/system.slice/evil.service/docker-" + idA + ".scope", unclear, "", ""},
		{"/system.slice/evil.service/system.slice/docker-" + idA + ".scope", unclear, "", ""},
		{"/system.slice/evil.service/docker/" + idA, unclear, "", ""},
		{"/system.slice/evil.service/victim.service", unclear, "", ""},
		{"/system.slice/evil.service/system.slice/victim.service", unclear, "", ""},
		{"/system.slice/evil.service/init.scope", unclear, "", ""},
		{"/system.slice/evil.service/user.slice/user-1000.slice/user@1000.service/x", unclear, "", ""},
		{"/user.slice/user-1000.slice/user@0.service/x", unclear, "", ""},
		{"/user.slice/user-1000.slice/session-3.scope/victim.service", unclear, "", ""},
		// A container that made cgroups of its own.
		{"/docker/" + idA + "/init.scope", unclear, "", ""},
		{"/system.slice/docker-" + idA + ".scope/system.slice/victim.service", unclear, "", ""},
		{"/docker/" + idA + "/container", unclear, "", ""},
		// From another cgroup namespace.
		{"/..", unclear, "", ""},
		{"/../..", unclear, "", ""},
		{"/../system.slice/cam.service", unclear, "", ""},
		{"/system.slice/../cam.service", unclear, "", ""},
		// Names that are nearly right.
		{"/docker/" + strings.ToUpper(idA), unclear, "", ""},
		{"/docker/" + idA[:63], unclear, "", ""},
		{"/docker/" + idA + "0", unclear, "", ""},
		{"/docker/x" + idA, unclear, "", ""},
		{"/docker/" + idA + " (deleted)", unclear, "", ""},
		{"/docker/" + idA + "/", unclear, "", ""},
		{"//docker/" + idA, unclear, "", ""},
		{"/docker/docker-" + idA, unclear, "", ""},
		{"/system.slice/docker-" + idA + ".scope.scope", unclear, "", ""},
		{"/system.slice/docker-" + idA + ".service", unclear, "", ""},
		{"/system.slice/libpod-conmon-" + idA + ".scope", unclear, "", ""},
		{"/system.slice/cam.service (deleted)", unclear, "", ""},
		{"/system.slice", unclear, "", ""},
		{"/cam.service/", unclear, "", ""},
		{"/system.slice/.service", unclear, "", ""},
		{"/system.slice/cam@.service", unclear, "", ""},
		{"/system.slice/c m.service", unclear, "", ""},
		{"/foo/cam.service", unclear, "", ""},
		{"/machine.slice/machine-x.scope", unclear, "", ""},
		{"/lxc.payload.x", unclear, "", ""},
		{"/kubepods/besteffort/pod1/x", unclear, "", ""},
		{"system.slice/cam.service", unclear, "", ""},
	} {
		for form, file := range map[string]string{
			"v1": inAllHierarchies(row.path), "v2": unified(row.path),
			"hybrid": "1:name=systemd:" + row.path + "\n0::/\n",
		} {
			got := parseCgroup(file, parents)
			if got.kind != row.kind || got.unit != row.unit || got.container != row.container {
				t.Errorf("%s %s: %+v", form, row.path, got)
			}
			if got.kind == unclear && got.why == "" {
				t.Errorf("%s %s: no reason", form, row.path)
			}
		}
	}
}

func TestParseOddCgroupFiles(t *testing.T) {
	t.Parallel()
	const unit = "/system.slice/cam.service"
	for _, row := range []struct {
		name, file string
		kind       locationKind
	}{
		{"unified in use only", "1:name=systemd:/\n0::" + unit + "\n", inUnit},
		{"a container by the unified one alone",
			"9:name=systemd:/\n4:memory:/elsewhere\n0::/docker/" + idA + "\n", inContainer},
		{"named only", "1:name=systemd:" + unit + "\n", inUnit},
		{"other controllers do not count", "5:memory:/docker/" + idA + "\n0::" + unit + "\n", inUnit},
		{"other named ones do not count", "5:name=other:/docker/" + idA + "\n0::" + unit + "\n", inUnit},
		{"two that differ", "1:name=systemd:" + unit + "\n0::/docker/" + idA + "\n", unclear},
		{"two services", "1:name=systemd:" + unit + "\n0::/system.slice/other.service\n", unclear},
		{"one below the other", "1:name=systemd:" + unit + "\n0::" + unit + "/docker-" + idA + ".scope\n", unclear},
		{"twice", "0::" + unit + "\n0::/\n", unclear},
		{"named twice", "1:name=systemd:/\n2:name=systemd:" + unit + "\n", unclear},
		{"nothing", "", unclear},
		{"no hierarchy of systemd's", "4:memory:/\n", unclear},
		{"no path", "0::\n", unclear},
		{"no line", "nonsense\n", unclear},
		{"a number that is not the unified one's", "7::" + unit + "\n", unclear},
		{"colons in the path", "0::/a:b/c\n", unclear},
		{"a service with a colon", "0::/system.slice/a:b.service\n", inUnit},
		{"a carriage return", "0::" + unit + "\r\n", unclear},
		{"a zero byte", "0::" + unit + "\x00\n", unclear},
	} {
		if got := parseCgroup(row.file, nil); got.kind != row.kind {
			t.Errorf("%s: %+v", row.name, got)
		}
	}
}

// FuzzParseCgroup: no cgroup that a caller could have created below its own is taken for a service or a container.
func FuzzParseCgroup(f *testing.F) {
	for _, seed := range []string{
		inAllHierarchies("/docker/" + idA), unified("/system.slice/docker-" + idA + ".scope"),
		inAllHierarchies("/system.slice/cam.service"), unified("/../.."),
		"1:name=systemd:/\n0::/machine.slice/libpod-" + idA + ".scope/container\n",
		unified("/system.slice/evil.service/docker-" + idA + ".scope"),
		unified("/system.slice/cam.service/libpod-payload-" + idA), unified("/system.slice/cam.service/runtime"),
		inAllHierarchies("/machine.slice/machine-libpod_pod_" + idB + ".slice/libpod-" + idA + ".scope"),
		unified("/libpod_parent/" + idB + "/libpod-" + idA),
		unified("/user.slice/user-1000.slice/user@1000.service/app.slice/cam.service/libpod-payload-" + idA),
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, file string) {
		got := parseCgroup(file, nil)
		switch got.kind {
		case unclear:
			if got.why == "" || got.unit != "" || got.container != "" {
				t.Errorf("%q: %+v", file, got)
			}
		case inUnit:
			if strings.Count(got.path, ".service") < 1 || !strings.HasSuffix(got.path, "/"+got.unit) ||
				strings.Contains(strings.TrimSuffix(got.path, got.unit), ".service/") {
				t.Errorf("%q: %+v", file, got)
			}
		case inContainer:
			above, below, _ := strings.Cut(got.path, got.container)
			isRoots := len(got.container) == 64 && strings.HasPrefix(got.path, got.parent+"/") &&
				!strings.HasPrefix(got.path, "/user.slice/")
			switch {
			case got.split: // of one service, and nothing between or below
				isRoots = isRoots && got.pod == "" && above == got.parent+"/libpod-payload-" && below == "" &&
					classifyHost(got.parent).kind == inUnit && strings.Count(got.parent, ".service/") == 0
			case got.pod != "":
				above, below, _ = strings.Cut(strings.TrimPrefix(got.path, got.parent), got.container)
				isRoots = isRoots && len(got.pod) == 64 && above == "/libpod-" &&
					(got.parent == "/libpod_parent/"+got.pod && below == "" ||
						got.parent == "/machine.slice/machine-libpod_pod_"+got.pod+".slice" &&
							strings.TrimSuffix(below, "/container") == ".scope")
			default:
				isRoots = isRoots && strings.Count(got.path, got.container) == 1 &&
					strings.Count(got.path, "/") <= 3 && defaultParents[got.parent]
			}
			if !isRoots {
				t.Errorf("%q: %+v", file, got)
			}
		case onHost:
			if containerID.MatchString(got.path) || strings.Contains(got.path, "..") &&
				!strings.Contains(got.path, "...") && strings.HasPrefix(got.path, "/..") {
				t.Errorf("%q: %+v", file, got)
			}
		}
		again := parseCgroup(file, nil)
		if again != got {
			t.Errorf("%q: %+v, then %+v", file, got, again)
		}
	})
}

// A process of a container that was started without an engine does not count as its user on the device, whether it is
// in a scope, in a session, below a user's service manager, or in no cgroup of its own. In a service it counts as
// that service, and its user is ignored.
func TestContainersInScopes(t *testing.T) {
	t.Parallel()
	bothWays(t, func(t *testing.T, o Options) {
		s := newFixture(t, o)
		for _, row := range []struct {
			cgroup, numbers string
			want            string // in the error; empty: attested
			unit            string
		}{
			{"/system.slice/runc-cam.scope", "17\t1", "in a pid namespace of its own", ""},
			{"/user.slice/user-0.slice/session-3.scope", "17\t1", "in a pid namespace of its own", ""},
			{"/user.slice/user-1000.slice/user@1000.service/app.slice/app-x.scope", "17\t1",
				"in a pid namespace of its own", ""},
			{"/user.slice/user-1000.slice/user@1000.service/app.slice/cam.service", "17\t4\t1",
				"in a pid namespace of its own", ""},
			{"/init.scope", "17\t1", "in a pid namespace of its own", ""},
			{"/", "17\t1", "in cgroup /, and in a pid namespace of its own", ""},
			{"/system.slice/cam.service", "17\t1", "", "cam.service"},
			{"/user.slice/user-1000.slice/user@1000.service", "17\t1", "", "user@1000.service"},
			{"/system.slice/cam.service", "", "its pid namespace cannot be read", ""},
			{"/", "", "its pid namespace cannot be read", ""},
			{"/system.slice/run-r1f.scope", "17", "", ""},
			{"/user.slice/user-0.slice/session-3.scope", "17", "", ""},
			{"/user.slice/user-1000.slice/user@1000.service/app.slice/cam.service", "17", "", ""},
			{"/", "17", "", ""},
		} {
			s.putProcess(os.Getpid(), row.cgroup)
			s.write(os.Getpid(), "status", statusOf(row.numbers))
			attestation, _, _ := s.dial(Socket{})
			got, err := attestation.Caller(context.Background())
			switch {
			case row.want != "":
				checkDenied(t, row.cgroup, err, row.want)
				if seen, err := attestation.Unconfirmed(); err == nil || seen.UID != uint32(os.Getuid()) {
					t.Errorf("%s: seen as %+v, %v", row.cgroup, seen, err)
				}
			case err != nil || got.Unit != row.unit || got.Nested != (row.unit != "") || got.HasUser() == got.Nested:
				t.Errorf("%s: %+v, %v", row.cgroup, got, err)
			}
		}
	})
}

// statusOf returns the status file of a process of this user with these process IDs.
func statusOf(numbers string) string {
	return fmt.Sprintf("Name:\tNSpid:\t1\t1\nUid:\t%d\t%[1]d\t%[1]d\t%[1]d\nNSpid:\t%s\n", os.Getuid(), numbers)
}

// A container without a cgroup of its own may have been started in the same place as the daemon.
func TestContainersBesideTheDaemon(t *testing.T) {
	t.Parallel()
	for _, own := range []string{"/", "/user.slice/user-0.slice/session-3.scope", "/docker/" + idA} {
		s := &fixture{t: t, proc: newProc(t)}
		s.putProcess(os.Getpid(), own)
		s.open(Options{Proc: s.proc})
		if got, err := s.callerIn(own, Socket{}); err != nil || !got.HasUser() {
			t.Errorf("%s: %+v, %v", own, got, err)
		}
		s.write(os.Getpid(), "status", statusOf("17\t1"))
		attestation, _, _ := s.dial(Socket{})
		_, err := attestation.Caller(context.Background())
		checkDenied(t, own, err, "in a pid namespace of its own")
	}
}

// The admin socket's permissions decide who may connect. But root of a container in which the socket is mounted is
// not root of the device.
func TestNestedAdministrator(t *testing.T) {
	t.Parallel()
	bothWays(t, func(t *testing.T, o Options) {
		s := newFixture(t, o)
		for numbers, nested := range map[string]bool{"17": false, "17\t1": true, "": true} {
			s.write(os.Getpid(), "status", statusOf(numbers))
			attestation, _, _ := s.dial(Socket{Restricted: true})
			got, err := attestation.Caller(context.Background())
			if err != nil || got.Nested != nested || got.HasUser() == nested {
				t.Errorf("%q: %+v, %v", numbers, got, err)
			}
		}
		s.SetRules(Rules{Modules: map[string]Requirement{"vision": {}}})
		s.write(os.Getpid(), "status", statusOf("17\t1"))
		attestation, _, _ := s.dial(Socket{Module: "vision"})
		if got, err := attestation.Caller(context.Background()); err != nil || got.Module != "vision" {
			t.Errorf("a module by its socket: %+v, %v", got, err)
		}
	})
}

// If /proc shows other processes than the kernel reports for sockets, no location is read from it.
func TestProcOfAnotherNamespace(t *testing.T) {
	t.Parallel()
	bothWays(t, func(t *testing.T, o Options) {
		for _, self := range []string{"1", "1234567", ""} {
			s := &fixture{t: t, proc: t.TempDir()}
			if self != "" {
				if err := os.Symlink(self, filepath.Join(s.proc, "self")); err != nil {
					t.Fatal(err)
				}
			}
			s.putProcess(1, "/init.scope")
			o.Proc = s.proc
			s.open(o)
			_, err := s.callerIn("/system.slice/cam.service", Socket{})
			checkDenied(t, self, err, s.proc)
			limitations := s.Limitations(context.Background())
			if !slices.ContainsFunc(limitations, func(l Limitation) bool { return l.Hint == procHint }) {
				t.Errorf("%q: %+v", self, limitations)
			}
		}
	})
}

// Everything below a user's slice belongs to that user, whatever user it runs as. Nothing else belongs to a user.
func TestSessionOwners(t *testing.T) {
	t.Parallel()
	for path, want := range map[string]uint32{
		"/user.slice/user-1000.slice/session-3.scope":                                 1000,
		"/user.slice/user-1000.slice/user@1000.service/app.slice/a.service":           1000,
		"/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-x.scope/any": 1000,
		"/user.slice/user-0.slice/session-1.scope":                                    0,
		"/user.slice/user-1000.slice":                                                 grants.NoID,
		"/system.slice/user.slice/user-1000.slice/a":                                  grants.NoID,
		"/system.slice/cron.service":                                                  grants.NoID,
		"/user.slice/user-99999999999.slice/session-3.scope":                          grants.NoID,
		"": grants.NoID,
	} {
		at := location{path: path}
		if got := at.owner(); got != want {
			t.Errorf("%s: %d, want %d", path, got, want)
		}
	}
}
