//go:build containers

package containers

import (
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"perceptd/cmd/perceptd/e2e/harness"
)

// TestContainersOfAnUntrustedEngine has a real engine's answers come with more than was asked for, and then its socket
// be another user's.
func TestContainersOfAnUntrustedEngine(t *testing.T) {
	e := harness.StartDocker(t)
	image := e.Image("probe:1", "one")
	d := harness.NewDaemon(t, "")
	socket := filepath.Join(d.Dir, "engine.sock")
	harness.Talk(t, harness.ListenOn(t, "unix", socket), harness.Excesses["twice"],
		func(q *http.Request) []byte { return harness.PassOn(t, "unix", e.Socket, q) })
	d = harness.LaunchDaemon(t, twoModules(socket, image))
	e.Stay("vision", d.Mount("vision"), "probe:1")
	ask := append([]string{"exec", "vision", "/perceptctl"}, askVault()...)

	if out, err := e.Run(ask...); err != nil || harness.IdentityOf(out) != "vision" {
		t.Errorf("%v %s", err, out)
	}
	if text := d.Text(); strings.Contains(text, "canary") {
		t.Errorf("printed:\n%s", text)
	}
	if err := os.Chown(socket, 4242, -1); err != nil {
		t.Fatal(err)
	}
	if out, err := e.Run(ask...); harness.ExitStatus(err) != deniedExit {
		t.Errorf("%v %s", err, out)
	}
	if out, err := e.Run("exec", "vision", "/perceptctl", "whoami"); harness.ExitStatus(err) != deniedExit ||
		!strings.Contains(out, "believed only if it is root's") {
		t.Errorf("%v %s", err, out)
	}
	if trouble := strings.Join(d.Status(t).Trouble, "\n"); !strings.Contains(trouble,
		"engine.sock belongs to user 4242") || !strings.Contains(trouble, "root's own engine") {
		t.Errorf("trouble: %s", trouble)
	}
}
