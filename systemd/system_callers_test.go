//go:build system

package systemd_test

import (
	"path/filepath"
	"strings"
	"testing"

	"perceptd/cmd/perceptd/e2e/harness"
)

const callersConfig = harness.SimulatedIdentities + `
[[grant]]
caller = { unit = "camera.service" }
identity = "vision"
resources = ["https://vault.azure.net"]

[[grant]]
caller = { unit = 'cam@3f\x2dx.service' }
identity = "vision"
resources = ["https://vault.azure.net"]

[[grant]]
caller = { group = "technicians" }
identity = "device"
resources = ["https://storage.azure.com"]
` + grantForEdge

const (
	askVault   = "https://vault.azure.net"
	askStorage = "https://storage.azure.com"
	forgedID   = "3f4e5d6c7b8a99887766554433221100ffeeddccbbaa99887766554433221100"
)

// forge is a script that makes a control group of the name given below its own, moves itself there and asks.
const forge = `set -e
for h in name=systemd: :; do
	at=$(sed -n "s/^[0-9]*:$h//p" /proc/self/cgroup | head -n1)
	for root in /sys/fs/cgroup/systemd /sys/fs/cgroup/unified /sys/fs/cgroup; do
		if [ -w "$root$at/cgroup.procs" ] && [ "$at" != / ]; then
			mkdir -p "$root$at/$1" && echo $$ >"$root$at/$1/cgroup.procs" || true
		fi
	done
done
cat /proc/self/cgroup >&2
status=0
perceptctl whoami || status=$?
perceptctl token --resource https://vault.azure.net --json || status=$?
exit $status`

// inUnit runs a command as a service of that name.
func (m *machine) inUnit(t *testing.T, unit, user string, more []string, command ...string) (string, error) {
	t.Helper()
	args := append([]string{"systemd-run", "--quiet", "--pipe", "--wait", "--collect", "--unit=" + unit,
		"--property=User=" + user}, more...)
	out, err := m.run(t, append(args, command...)...)
	return strings.Join(strings.Fields(out), " "), err // on one line, wherever it was wrapped
}

// configure puts a configuration in force.
func (m *machine) configure(t *testing.T, text string) {
	t.Helper()
	m.write(t, "/etc/percept/config.toml", text)
	m.must(t, "systemctl", "reload", "perceptd")
}

// testCallers has services, scopes and whoever forges them ask under real systemd.
func testCallers(t *testing.T, m *machine) {
	m.must(t, "groupadd", "--system", "technicians")
	m.must(t, "usermod", "-aG", "technicians", "technician")
	m.configure(t, callersConfig)
	defer m.configure(t, config)

	token := func(resource string) []string {
		return []string{"perceptctl", "token", "--resource", resource, "--json"}
	}
	t.Run("a service is told by its whole path", func(t *testing.T) {
		for _, row := range []struct {
			name, unit, user string
			more             []string
			resource, want   string
		}{
			{"by its name", "camera.service", "nobody", nil, askVault, `"identity": "vision"`},
			{"in nested slices", "camera.service", "nobody", []string{"--slice=edge-modules.slice"}, askVault,
				`"identity": "vision"`},
			{"by an escaped instance", `cam@3f\x2dx.service`, "edge", nil, askVault, `"identity": "vision"`},
			{"its grant narrows its user's", "camera.service", "edge", nil, askVault, `"identity": "vision"`},
			{"another one is its user", "other.service", "edge", nil, askVault, `"identity": "device"`},
			{"by its group", "other.service", "technician", nil, askStorage, `"identity": "device"`},
			{"the group's grant is for its resource", "other.service", "technician",
				nil, askVault, "no [[grant]] lets"},
			{"nobody", "other.service", "nobody", nil, askVault, "no [[grant]] lets unit other.service"},
			{"nearly its name", "camera2.service", "nobody", nil, askVault, "no [[grant]] lets"},
		} {
			out, err := m.inUnit(t, row.unit, row.user, row.more, token(row.resource)...)
			if !strings.Contains(out, row.want) || (err == nil) != strings.Contains(row.want, "identity") {
				t.Errorf("%s: %v %s", row.name, err, out)
			}
		}
	})
	t.Run("a scope is its user", func(t *testing.T) {
		out := m.must(t, "systemd-run", "--quiet", "--scope", "--unit=camera", "--uid=edge", "perceptctl", "token",
			"--resource", askVault, "--json")
		wants(t, out, `"identity": "device"`)
	})
	t.Run("a caller sees how it is seen", func(t *testing.T) {
		out, err := m.inUnit(t, "camera.service", "edge", nil, "perceptctl", "whoami")
		if err != nil {
			t.Error(err)
		}
		wants(t, out, "camera.service", "edge", "vision")
		wants(t, m.must(t, "perceptctl", "grants", "check", "--unit", "camera", "--user", "edge", "--resource",
			askVault), "vision", "camera.service")
	})
	m.write(t, "/usr/local/bin/forge", forge) // a file: systemd-run has its own idea of what $ means
	t.Run("a service cannot forge another, nor a container, below its own cgroup", func(t *testing.T) {
		for _, forged := range []string{"camera.service", "docker-" + forgedID + ".scope"} {
			out, err := m.inUnit(t, "evil.service", "nobody", []string{"--property=Delegate=yes"}, "sh",
				"/usr/local/bin/forge", forged)
			if err == nil || !strings.Contains(out, "evil.service/"+forged) || !strings.Contains(out, "not proved") ||
				strings.Contains(out, "eyJ") {
				t.Errorf("%s: %v %s", forged, err, out)
			}
		}
	})
	t.Run("the journal has who got what", func(t *testing.T) {
		for message, want := range map[string]string{
			"51a68065337a311afdae5715d2c88a40": "PERCEPT_UNIT=camera.service",
			"b9bd9252ad6b85f84e3147969fbf07b8": "PERCEPT_UNIT=other.service",
			"84819a3f40d0fd6a5272f8deb3a657b1": "PERCEPT_DECISION=denied",
		} {
			out := m.must(t, "journalctl", "MESSAGE_ID="+message, "-o", "export", "--no-pager")
			wants(t, out, want, "PERCEPT_REASON=", "PERCEPT_CALLER=", "PERCEPT_UID=")
		}
		wants(t, m.must(t, "perceptctl", "status"), "denied")
	})
	t.Run("a user's own services are that user, under whatever name", func(t *testing.T) {
		uid := strings.TrimSpace(m.must(t, "id", "-u", "edge"))
		// The unit of users' own service managers, which may arrange what is below it, with a forger in the manager's
		// place.
		unit := "user@" + uid + ".service"
		m.write(t, "/etc/systemd/system/"+unit+".d/forge.conf",
			"[Service]\nType=oneshot\nPAMName=\nDelegateSubgroup=\nStandardOutput=file:/run/own\nStandardError=inherit\nExecStart=\n"+
				"ExecStart=/bin/sh /usr/local/bin/forge app.slice/camera.service\n")
		m.must(t, "systemctl", "daemon-reload")
		m.must(t, "systemctl", "start", unit)
		out := strings.Join(strings.Fields(m.must(t, "cat", "/run/own")), " ")
		wants(t, out, "/user.slice/user-"+uid+".slice/"+unit+"/app.slice/camera.service", "user edge ("+uid+")",
			`"identity": "device"`)
		if strings.Contains(out, "unit ") {
			t.Errorf("it is taken for a unit: %s", out)
		}
	})
	t.Run("in a pid namespace of its own a service is known by its name alone", func(t *testing.T) {
		apart := []string{"unshare", "-p", "-f", "-m"}
		out, err := m.inUnit(t, "camera.service", "root", nil, append(apart, token(askVault)...)...)
		if err != nil || !strings.Contains(out, `"identity": "vision"`) {
			t.Errorf("the service: %v %s", err, out)
		}
		edge := append(apart, "setpriv", "--reuid=edge", "--clear-groups")
		out, err = m.inUnit(t, "other.service", "root", nil, append(edge, token(askVault)...)...)
		if exitOf(err) != 4 || strings.Contains(out, "eyJ") ||
			!strings.Contains(out, "whose uid and groups say nothing there") {
			t.Errorf("its user: %v %s", err, out)
		}
		out, err = m.run(t, append(edge, token(askVault)...)...) // wherever the machine's commands run
		if exitOf(err) != 4 || strings.Contains(out, "eyJ") {
			t.Errorf("a shell's user: %v %s", err, out)
		}
		if strings.HasPrefix(m.must(t, "systemctl", "--version"), "systemd 257") {
			out, err = m.inUnit(t, "camera.service", "edge", []string{"--property=PrivatePIDs=yes"}, "perceptctl",
				"whoami")
			if err != nil || !strings.Contains(out, "a pid namespace of its own") || !strings.Contains(out, "vision") {
				t.Errorf("PrivatePIDs=: %v %s", err, out)
			}
		}
	})
	t.Run("a container below a user's manager is not that user", func(t *testing.T) {
		uid := strings.TrimSpace(m.must(t, "id", "-u", "edge"))
		unit := "user@" + uid + ".service"
		m.write(t, "/etc/systemd/system/"+unit+".d/forge.conf",
			"[Service]\nType=oneshot\nPAMName=\nDelegateSubgroup=\nStandardOutput=file:/run/nested\nStandardError=inherit\nExecStart=\n"+
				"ExecStart=-/usr/bin/unshare -U -r -p -f -m /bin/sh /usr/local/bin/forge app.slice/camera.service\n")
		m.must(t, "systemctl", "daemon-reload")
		m.must(t, "systemctl", "restart", unit)
		out := strings.Join(strings.Fields(m.must(t, "cat", "/run/nested")), " ")
		wants(t, out, unit+"/app.slice/camera.service", "not proved",
			"in a pid namespace of its own, as in a container: its uid says nothing")
		if strings.Contains(out, "eyJ") {
			t.Errorf("it has a token: %s", out)
		}
	})
	t.Run("a service of a user made for it is told by its name", func(t *testing.T) {
		out, err := m.run(t, "systemd-run", "--quiet", "--pipe", "--wait", "--collect", "--unit=camera.service",
			"--property=DynamicUser=yes",
			"perceptctl", "token", "--resource", askVault, "--json")
		if err != nil || !strings.Contains(out, `"identity": "vision"`) {
			t.Errorf("%v %s", err, out)
		}
	})
}

// testModuleSockets has clients ask without pause through restarts and a crash, on a socket that is no socket unit's.
func testModuleSockets(t *testing.T, m *machine) {
	const path = "/run/percept/modules/vision/token.sock"
	const load = `rm -f /tmp/count /tmp/failed /tmp/enough
ask() {
	perceptctl --socket /run/percept/modules/vision/token.sock token --resource https://vault.azure.net --short >/dev/null 2>/tmp/why && return
	echo "request $n: $(cat /tmp/why)" >>/tmp/said
	return 1
}
n=0
while [ ! -e /tmp/enough ]; do
	ask || { [ -e /tmp/retry ] && ask; } || echo "$n, $([ -e /tmp/retry ] && echo after a crash || echo at a restart)" >>/tmp/failed
	n=$((n+1)); echo $n >/tmp/count
done`
	t.Run("modules' clients wait through restarts and crashes", func(t *testing.T) {
		m.must(t, "systemd-run", "--quiet", "--unit=load.service", "sh", "-c", load)
		inode := m.must(t, "stat", "-c", "%i", path)
		asked := func() {
			before := strings.TrimSpace(m.must(t, "cat", "/tmp/count"))
			m.until(t, "more requests", func() bool {
				now := strings.TrimSpace(m.must(t, "cat", "/tmp/count"))
				return len(now) > len(before) || now > before && len(now) == len(before)
			})
		}
		m.until(t, "the first request",
			func() bool { _, err := m.run(t, "test", "-s", "/tmp/count"); return err == nil })
		for range 5 {
			m.must(t, "systemctl", "restart", "perceptd")
			asked()
		}
		m.must(t, "touch", "/tmp/retry") // a request that the daemon had begun to answer is repeated, as SDKs do
		for range 3 {
			before := m.pid(t)
			m.must(t, "systemctl", "kill", "-s", "KILL", "--kill-who=main", "perceptd")
			// as another process: systemd learns of the end in its own time
			m.until(t, "the daemon's return", func() bool {
				out, _ := m.run(t, "systemctl", "is-active", "perceptd")
				return strings.TrimSpace(out) == "active" && m.pid(t) != before
			})
			asked()
		}
		m.must(t, "touch", "/tmp/enough")
		m.until(t, "the last request", func() bool {
			out, _ := m.run(t, "systemctl", "is-active", "load.service")
			return strings.TrimSpace(out) != "active"
		})
		if out, err := m.run(t, "cat", "/tmp/failed"); err == nil {
			said, _ := m.run(t, "cat", "/tmp/said")
			t.Errorf("requests failed: %s\n%s", out, said)
		}
		t.Logf("%s requests", strings.TrimSpace(m.must(t, "cat", "/tmp/count")))
		if again := m.must(t, "stat", "-c", "%i", path); again != inode {
			t.Errorf("socket %s, was %s", again, inode)
		}
	})
	t.Run("a module's folder stays", func(t *testing.T) {
		inode := m.must(t, "stat", "-c", "%i", filepath.Dir(path))
		m.configure(t, callersConfig)
		if _, err := m.run(t, "test", "-e", path); err == nil {
			t.Error("its socket is still there")
		}
		m.configure(t, config)
		m.must(t, "test", "-S", path)
		if again := m.must(t, "stat", "-c", "%i", filepath.Dir(path)); again != inode {
			t.Error("it is another, and no container sees it")
		}
	})
}

// TestSystemContainers is a whole device: systemd, the hardened unit, and Docker with systemd's cgroup driver.
func TestSystemContainers(t *testing.T) {
	m := boot(t, kind{release: "bookworm", packages: "docker.io",
		args: []string{"--capability=all", "--system-call-filter=add_key keyctl bpf"},
		env:  []string{"SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1"}})
	install(t, m)
	m.write(t, "/etc/docker/daemon.json",
		`{"iptables":false,"ip6tables":false,"bridge":"none","storage-driver":"vfs","exec-opts":["native.cgroupdriver=systemd"]}`)
	m.must(t, "systemctl", "restart", "docker")
	m.write(t, "/etc/percept/config.toml", strings.Replace(config, `require = "socket"`, `require = "socket+container"`,
		1))
	m.must(t, "systemctl", "enable", "--now", "perceptd.service")
	status, _ := m.run(t, "perceptctl", "status")
	status = strings.Join(strings.Fields(status), " ")
	wants(t, status, "permission denied", "container-engine.conf")

	m.must(t, "mkdir", "-p", "/etc/systemd/system/perceptd.service.d")
	m.must(t, "cp", "/usr/share/perceptd/container-engine.conf", "/etc/systemd/system/perceptd.service.d/")
	m.must(t, "systemctl", "daemon-reload")
	m.must(t, "systemctl", "restart", "perceptd")
	if status := m.must(t, "perceptctl", "status"); strings.Contains(status, "trouble") {
		t.Error(status)
	}
	m.must(t, "sh", "-c",
		`tar -C /usr/bin -c perceptctl | docker import --change 'ENTRYPOINT ["/perceptctl"]' - probe:1`)
	run := func(name string, more ...string) (string, error) {
		args := append([]string{"docker", "run", "--rm", "--network", "none", "--name", name, "-v",
			"/run/percept/modules/vision:/run/percept"}, more...)
		out, err := m.run(t, args...)
		return strings.Join(strings.Fields(out), " "), err
	}
	if out, err := run("vision", "probe:1", "token", "--resource", askVault, "--json"); err != nil ||
		!strings.Contains(out, `"identity": "vision"`) {
		t.Errorf("the module: %v %s", err, out)
	}
	if out, err := run("speech", "probe:1", "whoami"); err == nil ||
		!strings.Contains(out, "it runs in container speech") {
		t.Errorf("another container: %v %s", err, out)
	}
	m.must(t, "docker", "run", "-d", "--network", "none", "--name", "victim", "probe:1", "simulate")
	id := strings.TrimSpace(m.must(t, "docker", "inspect", "--format", "{{.Id}}", "victim"))
	if out, err := run("vision", "--cgroup-parent", "docker-"+id+".slice", "probe:1", "whoami"); err == nil ||
		!strings.Contains(out, "more than one container") {
		t.Errorf("a container below another's name: %v %s", err, out)
	}
	if out, err := run("vision", "--cgroup-parent", "evil.slice", "probe:1", "whoami"); err == nil ||
		!strings.Contains(out, "not where container engines put containers") {
		t.Errorf("a container in a slice of its own: %v %s", err, out)
	}
	wants(t, m.must(t, "cat", "/proc/1/cgroup"), "init.scope")
	t.Run("a container that was started before perceptd", func(t *testing.T) {
		m.must(t, "systemctl", "stop", "perceptd.service", "perceptd.socket", "perceptd-admin.socket")
		m.must(t, "rm", "-r", "/run/percept/modules/vision") // as after a boot
		m.must(t, "docker", "run", "-d", "--network", "none", "--name", "vision", "-v",
			"/run/percept/modules/vision:/run/percept:ro", "probe:1", "simulate")
		wants(t, m.must(t, "stat", "-c", "%U", "/run/percept/modules/vision"), "root")
		m.must(t, "systemctl", "start", "perceptd")
		wants(t, m.must(t, "docker", "exec", "vision", "/perceptctl", "token", "--resource", askVault, "--json"),
			`"identity": "vision"`)
	})
	// the module's socket and the cache
	if kept := m.must(t, "systemctl", "show", "perceptd", "-p", "NFileDescriptorStore"); !strings.Contains(kept, "=2") {
		t.Errorf("systemd keeps %s", kept)
	}
}
