//go:build containers

package containers

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"perceptd/cmd/perceptd/e2e/harness"
)

const (
	storageURI = "https://storage.azure.com"
	deniedExit = 4 // of perceptctl
)

// twoModules is a configuration with two modules in containers, each with a grant of its own, one module by its socket
// alone, and grants for an image and for this user.
func twoModules(engine, image string) string {
	return fmt.Sprintf(`[source]
kind = "simulated"

[callers]
engine = %q

[[identity]]
name = "device"
default = true

[[identity]]
name = "vision"
client_id = "00000000-0000-0000-0000-000000000001"

[[identity]]
name = "speech"
client_id = "00000000-0000-0000-0000-000000000002"

[[module]]
name = "open"
require = "socket"

[[grant]]
caller = { module = "vision" }
identity = "vision"
resources = [%[2]q]

[[grant]]
caller = { module = "speech" }
identity = "speech"
resources = [%[2]q]

[[grant]]
caller = { module = "open" }
identity = "device"
resources = [%[2]q, %[3]q]

[[grant]]
caller = { uid = 0 }
identity = "device"
resources = [%[2]q, %[3]q]

[[grant]]
caller = { container_image = %[4]q }
identity = "vision"
resources = [%[2]q, %[3]q]
`, engine, harness.VaultURI, storageURI, image)
}

func askVault(more ...string) []string {
	return append([]string{"token", "--resource", harness.VaultURI, "--json"}, more...)
}

// TestContainersOfDocker has real containers ask a real daemon, which asks a real engine.
func TestContainersOfDocker(t *testing.T) {
	e := harness.StartDocker(t)
	image := e.Image("probe:1", "one")
	other := e.Image("probe:2", "two")
	d := harness.LaunchDaemon(t, twoModules(e.Socket, image))
	testContainers(t, e, d, image, other)
	e.ReportSpeed(t, "vision")

	t.Run("a container that was put below another's cgroup is nobody", func(t *testing.T) {
		id := e.Must("inspect", "--format", "{{.Id}}", "vision")
		out, err := e.Once(append(d.Mount("vision"), "--cgroup-parent", "/docker/"+id), "probe:1", "whoami")
		if harness.ExitStatus(err) != deniedExit || !strings.Contains(out, "more than one container") {
			t.Errorf("%v %s", err, out)
		}
		out, err = e.Once(append(d.Mount("vision"), "--cgroup-parent", "/elsewhere"), "probe:1", "whoami")
		if harness.ExitStatus(err) != deniedExit ||
			!strings.Contains(out, "not where container engines put containers by themselves") {
			t.Errorf("%v %s", err, out)
		}
	})
	t.Run("docker exec is the container", func(t *testing.T) {
		if out, err := e.Run("exec", "vision", "/perceptctl", "token", "--resource", harness.VaultURI,
			"--json"); err != nil || harness.IdentityOf(out) != "vision" {
			t.Errorf("%v %s", err, out)
		}
	})
	t.Run("a paused engine keeps its containers waiting, and nobody else", func(t *testing.T) {
		if err := e.Cmd.Process.Signal(syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		inVision := whoamiInside(t, e, "vision", d)
		if status, body, err := d.Get(d.Token(), harness.VaultToken); status != 200 {
			t.Errorf("this user: %d %s %v", status, body, err)
		}
		if status, body, err := d.Get(d.Module("open"), harness.VaultToken); status != 200 {
			t.Errorf("a module by its socket: %d %s %v", status, body, err)
		}
		if out := <-inVision; !strings.Contains(out, "no answer in time") {
			t.Errorf("the module in a container: %s", out)
		}
		status := d.Status(t)
		if !strings.Contains(strings.Join(status.Trouble, "\n"), "no answer in time") {
			t.Errorf("the status says %q", status.Trouble)
		}
		if err := e.Cmd.Process.Signal(syscall.SIGCONT); err != nil {
			t.Fatal(err)
		}
		if out, err := e.Run("exec", "vision", "/perceptctl", "token", "--resource", harness.VaultURI,
			"--json"); err != nil || harness.IdentityOf(out) != "vision" {
			t.Errorf("afterwards: %v %s", err, out)
		}
		if trouble := d.Status(t).Trouble; len(trouble) != 0 {
			t.Errorf("afterwards the status says %q", trouble)
		}
	})
}

// whoamiInside runs whoami in a container without asking its engine, which may be stopped.
func whoamiInside(t *testing.T, e *harness.Engine, container string, d *harness.Daemon) <-chan string {
	t.Helper()
	said := make(chan string, 1)
	go func() {
		var procs []string
		for _, hierarchy := range []string{"/sys/fs/cgroup/systemd", "/sys/fs/cgroup/unified", "/sys/fs/cgroup"} {
			procs = append(procs, filepath.Join(hierarchy, "docker", e.IDs[container], "cgroup.procs"))
		}
		// A shell enters the container's cgroup and asks on its socket: as what runs in it would.
		script := `for f in "$@"; do [ -e "$f" ] && echo $$ >"$f"; done; exec "$PERCEPTCTL" --socket "$SOCKET" whoami`
		command := exec.Command("sh", append([]string{"-c", script, "sh"}, procs...)...)
		command.Env = append(os.Environ(), "PERCEPTCTL="+harness.Binary(t, "perceptctl"), "SOCKET="+d.Module(container))
		out, _ := command.CombinedOutput()
		said <- string(out)
	}()
	return said
}

// testContainers is what holds for every engine.
func testContainers(t *testing.T, e *harness.Engine, d *harness.Daemon, image, other string) {
	e.Stay("vision", d.Mount("vision"), "probe:1")

	t.Run("each module gets its own tokens, and no other's", func(t *testing.T) {
		for _, name := range []string{"vision", "speech"} {
			e.Must("rm", "-f", name)
			out, err := e.Once(append(d.Mount(name), "--name", name), "probe:1", askVault()...)
			if err != nil || harness.IdentityOf(out) != name {
				t.Errorf("%s: %v %s", name, err, out)
			}
			out, err = e.Once(append(d.Mount(name), "--name", name), "probe:1", askVault("--identity", "device")...)
			if harness.ExitStatus(err) != deniedExit || !strings.Contains(out, "not_granted") &&
				!strings.Contains(out, "no [[grant]]") {
				t.Errorf("%s asks for another identity: %v %s", name, err, out)
			}
		}
		e.Stay("vision", d.Mount("vision"), "probe:1")
	})
	t.Run("another module's socket is of no use", func(t *testing.T) {
		out, err := e.Once(append(d.Mount("vision"), "--name", "speech"), "probe:1", askVault()...)
		if harness.ExitStatus(err) != deniedExit {
			t.Errorf("%v %s", err, out)
		}
		out, err = e.Once(append(d.Mount("vision"), "--name", "speech"), "probe:1", "whoami")
		if harness.ExitStatus(err) != deniedExit ||
			!strings.Contains(out, "it runs in container speech, and the module's is named vision") {
			t.Errorf("%v %s", err, out)
		}
	})
	t.Run("root of the device at a module's socket is not the module", func(t *testing.T) {
		if status, body, err := d.Get(d.Module("vision"), harness.VaultToken); status != 403 {
			t.Errorf("%d %s %v", status, body, err)
		}
	})
	t.Run("a module by its socket needs no name", func(t *testing.T) {
		out, err := e.Once(d.Mount("open"), "probe:2", askVault()...)
		if err != nil || harness.IdentityOf(out) != "device" {
			t.Errorf("%v %s", err, out)
		}
	})
	t.Run("on the token socket an image has its grant, and root in a container is not root", func(t *testing.T) {
		everybody := []string{"-v", d.Token() + ":/run/percept/token.sock"}
		out, err := e.Once(everybody, "probe:1", askVault()...)
		if err != nil || harness.IdentityOf(out) != "vision" {
			t.Errorf("%v %s", err, out)
		}
		out, err = e.Once(everybody, "probe:2", askVault()...)
		if harness.ExitStatus(err) != deniedExit || !strings.Contains(out, "no [[grant]] lets container ") {
			t.Errorf("another image: %v %s", err, out)
		}
	})
	t.Run("the host's processes are not seen as a container's", func(t *testing.T) {
		out, err := e.Once(append(d.Mount("speech"), "--pid", "host", "--name", "speech"), "probe:1", "whoami")
		if harness.ExitStatus(err) != deniedExit || !strings.Contains(out, "--pid host") {
			t.Errorf("%v %s", err, out)
		}
		out, err = e.Once(append(d.Mount("speech"), "--pid", "container:vision", "--name", "speech"), "probe:1",
			"whoami")
		if harness.ExitStatus(err) != deniedExit || !strings.Contains(out, "--pid container:") {
			t.Errorf("%v %s", err, out)
		}
	})
	t.Run("a caller sees how it is seen", func(t *testing.T) {
		out, err := e.Once(append(d.Mount("speech"), "--name", "speech", "--label",
			"net.azure-devices.edge.owner=Microsoft.Azure.Devices.Edge.Agent"), "probe:1", "whoami")
		for _, want := range []string{"speech", image[:19], "edge module speech"} {
			if err != nil || !strings.Contains(out, want) {
				t.Errorf("%q: %v\n%s", want, err, out)
			}
		}
		t.Log("\n" + out)
	})
	t.Run("a restarted container is served, and a recreated one is known as another", func(t *testing.T) {
		ask := []string{"exec", "vision", "/perceptctl", "token", "--resource", harness.VaultURI, "--json"}
		if out, err := e.Run(ask...); err != nil || harness.IdentityOf(out) != "vision" {
			t.Fatalf("%v %s", err, out)
		}
		e.Must("restart", "-t", "0", "vision")
		if out, err := e.Run(ask...); err != nil || harness.IdentityOf(out) != "vision" {
			t.Errorf("restarted: %v %s", err, out)
		}
		e.Must("rm", "-f", "vision")
		e.Stay("vision", d.Mount("vision"), "probe:2")
		if out, err := e.Run(ask...); err != nil || harness.IdentityOf(out) != "vision" {
			t.Errorf("recreated: %v %s", err, out)
		}
		if said := d.Text(); !strings.Contains(said, "caller changed") || !strings.Contains(said, other) {
			t.Errorf("the log does not tell of it: %s", said)
		}
	})
	t.Run("the log has who got what, and no token", func(t *testing.T) {
		said := d.Text()
		for _, want := range []string{"token granted for the first time", "token denied", "caller not proved"} {
			if !strings.Contains(said, want) {
				t.Errorf("no %q", want)
			}
		}
		if strings.Contains(said, "eyJ") {
			t.Error("the log has a token")
		}
	})
}

// TestContainersOfPodman is the same with Podman.
func TestContainersOfPodman(t *testing.T) {
	e := harness.StartPodman(t)
	image := e.Image("probe:1", "one")
	other := e.Image("probe:2", "two")
	d := harness.LaunchDaemon(t, twoModules(e.Socket, image))
	testContainers(t, e, d, image, other)
	e.ReportSpeed(t, "vision")
}

// TestContainersOfCgroup2 is the same where cgroups v2 are all that the engine has.
func TestContainersOfCgroup2(t *testing.T) {
	e := harness.StartDockerIn(t, harness.InCgroup2)
	image := e.Image("probe:1", "one")
	other := e.Image("probe:2", "two")
	testContainers(t, e, harness.LaunchDaemon(t, twoModules(e.Socket, image)), image, other)
}

// TestContainersWithoutCgroup: root of a container that was started in no cgroup of its own is not root of the device,
// though it is where this user's processes are.
func TestContainersWithoutCgroup(t *testing.T) {
	e := harness.PodmanAlone(t)
	d := harness.LaunchDaemon(t, twoModules("auto", e.Image("probe:1", "one")))
	everybody := []string{"-v", d.Token() + ":/run/percept/token.sock", "--cgroups=disabled"}
	out, err := e.Once(everybody, "probe:1", askVault()...)
	if harness.ExitStatus(err) != deniedExit || strings.Contains(out, "eyJ") {
		t.Errorf("%v %s", err, out)
	}
	out, err = e.Once(everybody, "probe:1", "whoami")
	if harness.ExitStatus(err) != deniedExit ||
		!strings.Contains(out, "it is in cgroup /, and in a pid namespace of its own") {
		t.Errorf("%v %s", err, out)
	}
	out, err = e.Once(append(d.Mount("open"), "--cgroups=disabled"), "probe:1", askVault()...)
	if err != nil || harness.IdentityOf(out) != "device" {
		t.Errorf("a module by its socket: %v %s", err, out)
	}
	if status, body, err := d.Get(d.Token(), harness.VaultToken); status != 200 {
		t.Errorf("this user: %d %s %v", status, body, err)
	}
}

// TestContainersOfRemappedUsers: root of such a container is some other uid of the device.
func TestContainersOfRemappedUsers(t *testing.T) {
	e := harness.StartDocker(t, "--userns-remap=default")
	image := e.Image("probe:1", "one")
	d := harness.LaunchDaemon(t, twoModules(e.Socket, image))
	out, err := e.Once(append(d.Mount("vision"), "--name", "vision"), "probe:1", askVault()...)
	if err != nil || harness.IdentityOf(out) != "vision" {
		t.Errorf("%v %s", err, out)
	}
	out, err = e.Once(append(d.Mount("speech"), "--name", "vision"), "probe:1", "whoami")
	if harness.ExitStatus(err) != deniedExit || strings.Contains(out, "uid 0") {
		t.Errorf("%v %s", err, out)
	}
}

// TestContainersOfNoEngine: where no engine can be asked, callers in containers are denied, and the status says so.
func TestContainersOfNoEngine(t *testing.T) {
	e := harness.StartDocker(t)
	image := e.Image("probe:1", "one")
	nowhere := filepath.Join(harness.ShortFolder(t), "engine.sock")
	d := harness.LaunchDaemon(t, twoModules(nowhere, image))
	if trouble := strings.Join(d.Status(t).Trouble, "\n"); !strings.Contains(trouble, nowhere+" is no socket") {
		t.Errorf("the status says %q", trouble)
	}
	out, err := e.Once(append(d.Mount("vision"), "--name", "vision"), "probe:1", "whoami")
	if harness.ExitStatus(err) != deniedExit || !strings.Contains(out, "no container engine is there to ask") {
		t.Errorf("%v %s", err, out)
	}
	if out, err := e.Once(d.Mount("open"), "probe:1", "token", "--resource", storageURI, "--json"); err != nil ||
		harness.IdentityOf(out) != "device" {
		t.Errorf("a module by its socket: %v %s", err, out)
	}
	if status, body := d.Reload(t, twoModules(e.Socket, image)); status != 200 {
		t.Fatal(body)
	}
	out, err = e.Once(append(d.Mount("vision"), "--name", "vision"), "probe:1", askVault()...)
	if err != nil || harness.IdentityOf(out) != "vision" {
		t.Errorf("after a reload: %v %s", err, out)
	}
	if trouble := d.Status(t).Trouble; len(trouble) != 0 {
		t.Errorf("the status says %q", trouble)
	}
}
