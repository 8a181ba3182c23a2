//go:build containers

package main

import (
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestContainersOfAnUntrustedEngine has a real engine's answers come with more than was asked for, and then its socket be
// another user's.
func TestContainersOfAnUntrustedEngine(t *testing.T) {
	e := startDocker(t)
	image := e.image("probe:1", "one")
	d := newFolder(t, "")
	socket := filepath.Join(d.dir, "engine.sock")
	talk(t, listenOn(t, "unix", socket), excesses["twice"], func(q *http.Request) []byte { return passOn(t, "unix", e.socket, q) })
	d = launchDaemon(t, twoModules(socket, image))
	e.stay("vision", d.mount("vision"), "probe:1")
	ask := append([]string{"exec", "vision", "/perceptctl"}, askVault()...)

	if out, err := e.run(ask...); err != nil || identityOf(out) != "vision" {
		t.Errorf("%v %s", err, out)
	}
	if text := d.text(); strings.Contains(text, "canary") {
		t.Errorf("printed:\n%s", text)
	}
	if err := os.Chown(socket, 4242, -1); err != nil {
		t.Fatal(err)
	}
	if out, err := e.run(ask...); exitStatus(err) != deniedExit {
		t.Errorf("%v %s", err, out)
	}
	if out, err := e.run("exec", "vision", "/perceptctl", "whoami"); exitStatus(err) != deniedExit || !strings.Contains(out, "believed only if it is root's") {
		t.Errorf("%v %s", err, out)
	}
	if trouble := strings.Join(d.status(t).Trouble, "\n"); !strings.Contains(trouble, "engine.sock belongs to user 4242") || !strings.Contains(trouble, "root's own engine") {
		t.Errorf("trouble: %s", trouble)
	}
}
