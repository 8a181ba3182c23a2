//go:build containers

package containers

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"perceptd/cmd/perceptd/e2e/harness"
)

// TestContainersOfPodmanPods: a container of a pod, and one without an image, is the module of its name, and not the
// module of its pod's name.
func TestContainersOfPodmanPods(t *testing.T) {
	e := harness.StartPodman(t)
	d := harness.LaunchDaemon(t, twoModules(e.Socket, e.Image("probe:1", "one")))
	e.Must("pod", "create", "--name", "speech", "--infra=false")
	inPod := append(d.Mount("vision"), "--pod", "speech", "--name", "vision")
	if out, err := e.Once(inPod, "probe:1", askVault()...); err != nil || harness.IdentityOf(out) != "vision" {
		t.Errorf("in a pod: %v %s", err, out)
	}
	other := append(d.Mount("speech"), "--pod", "speech", "--name", "vision")
	out, err := e.Once(other, "probe:1", "whoami")
	if harness.ExitStatus(err) != deniedExit || !strings.Contains(out, "it runs in container vision") {
		t.Errorf("on the socket of the module that has its pod's name: %v %s", err, out)
	}
	e.Stay("podded", append(d.Mount("vision"), "--pod", "speech"), "probe:1")
	below := "/libpod_parent/" + e.Must("inspect", "--format", "{{.Pod}}", "podded")
	out, err = e.Once(append(d.Mount("vision"), "--name", "vision", "--cgroup-parent", below), "probe:1", "whoami")
	if harness.ExitStatus(err) != deniedExit || !strings.Contains(out, "the engine names another pod") {
		t.Errorf("in the cgroup of a pod that it is not in: %v %s", err, out)
	}

	rootfs := t.TempDir()
	program, err := os.ReadFile(harness.Binary(t, "perceptctl"))
	harness.Must(t, err)
	harness.Must(t, harness.WriteProgram(filepath.Join(rootfs, "perceptctl"), program))
	options := append(d.Mount("vision"), "--name", "vision", "--rootfs", rootfs)
	if out, err = e.Once(options, "/perceptctl", askVault()...); err != nil || harness.IdentityOf(out) != "vision" {
		t.Errorf("without an image: %v %s", err, out)
	}
	everybody := []string{"-v", d.Token() + ":/run/percept/token.sock", "--rootfs", rootfs}
	if out, err = e.Once(everybody, "/perceptctl", askVault()...); harness.ExitStatus(err) != deniedExit ||
		!strings.Contains(out, "no [[grant]] lets container") {
		t.Errorf("without an image, by a grant for one: %v %s", err, out)
	}
}
