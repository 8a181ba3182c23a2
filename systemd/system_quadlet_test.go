//go:build system

package systemd_test

import (
	"os"
	"regexp"
	"strings"
	"testing"

	"perceptd/cmd/perceptd/e2e/harness"
)

// TestSystemQuadlet is a device whose modules are containers of root's Podman, set up with the commands and the sample
// of docs/modules/podman.md: units that Quadlet's own generator writes, pods, containers without an image, and who
// pretends to be one of them.
func TestSystemQuadlet(t *testing.T) {
	m := boot(t, kind{release: "trixie", packages: "crun,podman", // with Podman 5.4; bookworm's has no Quadlet
		args: []string{"--capability=all", "--system-call-filter=add_key keyctl bpf"},
		env:  []string{"SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1"}})
	install(t, m)
	m.write(t, "/etc/containers/storage.conf", "[storage]\ndriver = \"vfs\"\n"+
		"graphroot = \"/var/lib/containers/storage\"\nrunroot = \"/run/containers/storage\"\n")
	m.write(t, "/etc/containers/containers.conf", // what Podman cannot limit in a container
		"[containers]\npids_limit = 0\ndefault_ulimits = [\"nofile=20000:20000\", \"nproc=1000:1000\"]\n")
	m.must(t, "sh", "-c",
		`tar -C /usr/bin -c perceptctl | podman import --change 'ENTRYPOINT ["/perceptctl"]' - probe:1`)

	letAsk, bindFolder := documented(t, "podman.socket.conf"), documented(t, "mount --bind")
	atOldPath := []string{"podman", "--remote", "--url", "unix:///run/podman/podman.sock", "ps"}
	m.must(t, "systemctl", "enable", "--now", "podman.socket") // which root's clients have used
	m.must(t, atOldPath...)
	m.must(t, "sh", "-ec", letAsk)
	m.must(t, atOldPath...)
	m.write(t, "/etc/percept/config.toml", podmanConfig)
	m.must(t, "systemctl", "enable", "--now", "perceptd.service")
	if status, err := m.run(t, "perceptctl", "status"); err != nil || strings.Contains(status, "trouble") {
		t.Errorf("%v %s", err, status)
	}
	q := &quadlet{machine: m}
	q.start(t)
	q.testUnit(t)
	q.testPretenders(t)
	q.testPods(t)
	q.testUsers(t, bindFolder)
}

const podmanConfig = harness.SimulatedIdentities + `
[callers]
engine = "auto"

[[grant]]
caller = { unit = "vision.service" }
identity = "device"
resources = ["https://storage.azure.com"]

[[grant]]
caller = { module = "vision" }
identity = "vision"
resources = ["https://vault.azure.net"]

[[grant]]
caller = { module = "podded" }
identity = "vision"
resources = ["https://vault.azure.net"]

[[grant]]
caller = { module = "split" }
identity = "vision"
resources = ["https://vault.azure.net"]

[[grant]]
caller = { module = "rooted" }
identity = "vision"
resources = ["https://vault.azure.net"]
`

// documented returns the commands of docs/modules/podman.md in whose block these words are.
func documented(t *testing.T, words string) string {
	t.Helper()
	page, err := os.ReadFile("../docs/modules/podman.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, block := range regexp.MustCompile("(?s)```sh\n(.*?)```").FindAllStringSubmatch(string(page), -1) {
		if strings.Contains(block[1], words) {
			return block[1]
		}
	}
	t.Fatalf("the page has no commands with %q", words)
	return ""
}

// quadlet is a device whose module vision is a unit that Quadlet's generator has written of the sample.
type quadlet struct{ *machine }

// start starts the sample, with an image that is there, and has the unit ask before its container runs.
func (q *quadlet) start(t *testing.T) {
	t.Helper()
	sample, err := os.ReadFile("../deploy/vision.container")
	if err != nil {
		t.Fatal(err)
	}
	text := string(sample)
	for _, change := range [][2]string{
		{"Image=registry.example/vision:1\n", "Image=localhost/probe:1\nExec=simulate\nNetwork=none\n"},
		{"[Service]\n", "[Service]\nExecStartPre=/bin/sh -c 'perceptctl whoami >/run/unit 2>&1; " +
			"perceptctl token --resource https://storage.azure.com --json >>/run/unit 2>&1; " +
			"perceptctl --socket " + visionSocket + " whoami >/run/unit-at-module 2>&1; true'\n"},
	} {
		if !strings.Contains(text, change[0]) {
			t.Fatalf("the sample has no %q", change[0])
		}
		text = strings.Replace(text, change[0], change[1], 1)
	}
	q.write(t, "/etc/containers/systemd/vision.container", text)
	q.must(t, "systemctl", "daemon-reload")
	q.must(t, "systemctl", "start", "vision")
	wants(t, q.must(t, "systemctl", "cat", "vision"), "--cgroups=split", "Delegate=yes", "Type=notify")
}

// inspect returns what Podman says of a container.
func (q *quadlet) inspect(t *testing.T, name, field string) string {
	t.Helper()
	return strings.TrimSpace(q.must(t, "podman", "inspect", name, "--format", "{{"+field+"}}"))
}

// asRoot runs a command below the device's own systemd, in whose cgroups all its processes then are.
func (q *quadlet) asRoot(t *testing.T, command ...string) (string, error) {
	t.Helper()
	out, err := q.run(t, append([]string{"systemd-run", "--quiet", "--pipe", "--wait", "--collect",
		"--property=KillMode=process"}, command...)...)
	return strings.Join(strings.Fields(out), " "), err
}

// ask runs perceptctl in a container.
func (q *quadlet) ask(t *testing.T, container string, perceptctl ...string) (string, error) {
	t.Helper()
	return q.asRoot(t, append([]string{"podman", "exec", container, "/perceptctl"}, perceptctl...)...)
}

// isVision checks that a container gets a token of the identity vision.
func (q *quadlet) isVision(t *testing.T, what, container string) {
	t.Helper()
	if out, err := q.ask(t, container, "token", "--resource", askVault, "--json"); err != nil ||
		!strings.Contains(out, `"identity": "vision"`) {
		t.Errorf("%s: %v %s", what, err, out)
	}
}

func (q *quadlet) testUnit(t *testing.T) {
	t.Run("the container of a unit is its module", func(t *testing.T) {
		id := q.inspect(t, "vision", ".Id")
		cgroup := q.must(t, "cat", "/proc/"+q.inspect(t, "vision", ".State.Pid")+"/cgroup")
		wants(t, cgroup, "/system.slice/vision.service/libpod-payload-"+id)
		q.isVision(t, "the module", "vision")
		q.must(t, "systemctl", "restart", "vision")
		if again := q.inspect(t, "vision", ".Id"); again == id {
			t.Error("a restarted unit has the container from before")
		}
		q.isVision(t, "the unit was restarted", "vision")
		q.must(t, "systemctl", "restart", "perceptd")
		q.isVision(t, "perceptd was restarted", "vision")
	})
	t.Run("the unit is not the container, nor the container the unit", func(t *testing.T) {
		wants(t, q.must(t, "cat", "/run/unit"), "vision.service", `"identity": "device"`)
		wants(t, strings.Join(strings.Fields(q.must(t, "cat", "/run/unit-at-module")), " "),
			"not out of a container named vision")
		out, err := q.ask(t, "vision", "token", "--resource", askStorage, "--json")
		if exitOf(err) != 4 || !strings.Contains(out, "no [[grant]] lets module vision") {
			t.Errorf("the container, for what the unit was granted: %v %s", err, out)
		}
	})
	t.Run("a renamed container is not the module", func(t *testing.T) {
		q.must(t, "podman", "rename", "vision", "other")
		if out, err := q.ask(t, "other", "whoami"); exitOf(err) != 4 ||
			!strings.Contains(out, "it runs in container other") {
			t.Errorf("%v %s", err, out)
		}
		q.must(t, "podman", "rename", "other", "vision")
		q.isVision(t, "renamed back", "vision")
	})
}

// within runs perceptctl as root in a cgroup that is made if need be.
func (q *quadlet) within(t *testing.T, cgroup string, perceptctl ...string) (string, error) {
	t.Helper()
	q.write(t, "/usr/local/bin/within", // a file: systemd-run has its own idea of what $ means
		`mkdir -p "/sys/fs/cgroup$1" && echo $$ >"/sys/fs/cgroup$1/cgroup.procs" && shift && exec perceptctl "$@"`)
	return q.asRoot(t, append([]string{"sh", "/usr/local/bin/within", cgroup}, perceptctl...)...)
}

func (q *quadlet) testPretenders(t *testing.T) {
	id := q.inspect(t, "vision", ".Id")
	const unit = "/system.slice/vision.service"
	for _, row := range []struct{ name, cgroup, want string }{
		{"Podman's own process", unit + "/runtime", "made below its own"},
		{"below the container", unit + "/libpod-payload-" + id + "/init.scope", "no container's own"},
		{"another container's ID below it", unit + "/libpod-payload-" + id + "/libpod-payload-" + forgedID,
			"more than one container"},
		{"an ID that is no container's", unit + "/libpod-payload-" + forgedID, "the engine knows no container"},
		{"the container's ID in a pod",
			"/machine.slice/machine-libpod_pod_" + forgedID + ".slice/libpod-" + id + ".scope",
			"the engine says that its container is in cgroup"},
		{"the container's ID where containers are", "/machine.slice/libpod-" + id + ".scope",
			"the engine says that its container is in cgroup"},
	} {
		t.Run(row.name, func(t *testing.T) {
			out, err := q.within(t, row.cgroup, "--socket", visionSocket, "whoami")
			if exitOf(err) != 4 || !strings.Contains(out, row.want) {
				t.Errorf("%v %s", err, out)
			}
		})
	}
	t.Run("a service that makes a cgroup with the container's ID", func(t *testing.T) {
		q.write(t, "/usr/local/bin/forge", forge)
		out, err := q.inUnit(t, "evil.service", "nobody", []string{"--property=Delegate=yes"}, "sh",
			"/usr/local/bin/forge", "libpod-payload-"+id)
		if exitOf(err) != 4 || strings.Contains(out, "eyJ") ||
			!strings.Contains(out, "its cgroup /system.slice/evil.service belongs to user ") {
			t.Errorf("%v %s", err, out)
		}
	})
	q.isVision(t, "the module beside them", "vision")
}

func (q *quadlet) testPods(t *testing.T) {
	command := func(name string, more ...string) []string {
		return append([]string{"run", "-d", "--network", "none", "--name", name,
			"-v", "/run/percept/modules/" + name + ":/run/percept:ro"}, more...)
	}
	run := func(t *testing.T, command ...string) {
		t.Helper()
		if out, err := q.asRoot(t, append([]string{"podman"}, command...)...); err != nil {
			t.Fatalf("%v: %v %s", command, err, out)
		}
	}
	t.Run("a container of a pod", func(t *testing.T) {
		run(t, "pod", "create", "--name", "pod", "--infra=false")
		run(t, command("podded", "--pod", "pod", "probe:1", "simulate")...)
		cgroup := q.must(t, "cat", "/proc/"+q.inspect(t, "podded", ".State.Pid")+"/cgroup")
		wants(t, cgroup, "/machine.slice/machine-libpod_pod_"+q.inspect(t, "podded", ".Pod")+".slice/libpod-")
		q.isVision(t, "the module", "podded")
	})
	t.Run("a container of a pod, by the cgroupfs driver", func(t *testing.T) {
		run(t, "rm", "-f", "-t", "0", "podded")
		run(t, "--cgroup-manager=cgroupfs", "pod", "create", "--name", "pod2", "--infra=false")
		run(t, append([]string{"--cgroup-manager=cgroupfs"},
			command("podded", "--pod", "pod2", "probe:1", "simulate")...)...)
		cgroup := q.must(t, "cat", "/proc/"+q.inspect(t, "podded", ".State.Pid")+"/cgroup")
		wants(t, cgroup, "/libpod_parent/"+q.inspect(t, "podded", ".Pod")+"/libpod-")
		q.isVision(t, "the module", "podded")
	})
	t.Run("a container of a pod in a unit's cgroup", func(t *testing.T) {
		q.must(t, append([]string{"systemd-run", "--quiet", "--unit=split.service", "--property=Type=notify",
			"--property=NotifyAccess=all", "--property=Delegate=yes", "podman"},
			command("split", "--cgroups=split", "--sdnotify=conmon", "--pod", "pod", "probe:1", "simulate")...)...)
		cgroup := q.must(t, "cat", "/proc/"+q.inspect(t, "split", ".State.Pid")+"/cgroup")
		wants(t, cgroup, "/system.slice/split.service/libpod-payload-")
		q.isVision(t, "the module", "split")
	})
	t.Run("a container without an image", func(t *testing.T) {
		q.must(t, "sh", "-c", "mkdir -p /srv/rootfs && cp /usr/bin/perceptctl /srv/rootfs/")
		run(t, command("rooted", "--rootfs", "/srv/rootfs", "/perceptctl", "simulate")...)
		q.isVision(t, "the module", "rooted")
		out, err := q.ask(t, "rooted", "whoami")
		if err != nil || !strings.Contains(out, "rooted") {
			t.Errorf("%v %s", err, out)
		}
	})
}

// testUsers has a rootless container of a user ask at the folder of a module that root has bound to where that user
// alone may go.
func (q *quadlet) testUsers(t *testing.T, bindFolder string) {
	q.must(t, "install", "-d", "-m", "0700", "-o", "edge", "/home/edge", "/run/edge")
	q.must(t, "sh", "-ec", bindFolder)
	q.must(t, "cp", "-r", "/srv/rootfs", "/home/edge/rootfs")
	q.must(t, "chown", "-R", "edge", "/home/edge/rootfs")
	q.must(t, "truncate", "-s", "0", "/etc/subuid", "/etc/subgid") // the device has no newuidmap
	run := []string{"podman", "--storage-driver=vfs", "--cgroup-manager=cgroupfs", "run", "--rm", "--cgroups=split",
		"--network", "none", "--name", "vision", "-v", "/home/edge/percept:/run/percept",
		"--rootfs", "/home/edge/rootfs", "/perceptctl"}
	ask := func(perceptctl ...string) (string, error) {
		out, err := q.as(t, "edge", append(append([]string{"--property=Delegate=yes", "--setenv=HOME=/home/edge",
			"--setenv=XDG_RUNTIME_DIR=/run/edge"}, run...), perceptctl...)...)
		return strings.Join(strings.Fields(out), " "), err
	}
	token := []string{"token", "--resource", askVault, "--json"}

	t.Run("a rootless container of the module's name is not the module", func(t *testing.T) {
		out, err := ask("whoami")
		if exitOf(err) != 4 || !strings.Contains(out, " belongs to user 1000") ||
			!strings.Contains(out, rootlessHint) {
			t.Errorf("%v %s", err, out)
		}
		if out, err = ask(token...); exitOf(err) != 4 || strings.Contains(out, "eyJ") {
			t.Errorf("%v %s", err, out)
		}
	})
	t.Run("nor in the cgroups of a user's manager", func(t *testing.T) {
		cgroup := "/user.slice/user-1000.slice/user@1000.service/app.slice/vision.service/libpod-payload-" +
			q.inspect(t, "vision", ".Id")
		out, err := q.within(t, cgroup, "--socket", visionSocket, "whoami")
		if exitOf(err) != 4 || !strings.Contains(out, "a rootless engine proves nothing") ||
			!strings.Contains(out, rootlessHint) {
			t.Errorf("%v %s", err, out)
		}
	})
	t.Run("it gets tokens on the module's socket alone", func(t *testing.T) {
		q.configure(t, podmanConfig+"\n[[module]]\nname = \"vision\"\nrequire = \"socket\"\n")
		if out, err := ask(token...); err != nil || !strings.Contains(out, `"identity": "vision"`) {
			t.Errorf("%v %s", err, out)
		}
		out, err := q.as(t, "nobody", "perceptctl", "--socket", "/home/edge/percept/token.sock", "whoami")
		if exitOf(err) != 3 || !strings.Contains(out, "permission denied") {
			t.Errorf("another user: %v %s", err, out)
		}
	})
}

// rootlessHint is what every denial of a rootless container says.
const rootlessHint = "a rootless engine's container gets tokens on its module's socket alone: " +
	`choose require = "socket" in its [[module]]`
