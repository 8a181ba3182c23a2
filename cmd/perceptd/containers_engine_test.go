//go:build containers || clients

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// engine is a real container engine on a socket of its own, with its storage in a folder that goes with the test.
type engineProcess struct {
	*process
	t      *testing.T
	socket string
	cli    []string          // the command that drives it
	ids    map[string]string // of containers that stay, by name
}

// startDocker starts Debian's dockerd, without a network.
func startDocker(t *testing.T, args ...string) *engineProcess {
	t.Helper()
	return startDockerIn(t, []string{"/usr/bin/env"}, args...)
}

// inCgroup2 runs a command where the unified hierarchy of cgroups is all there is.
var inCgroup2 = []string{"/usr/bin/unshare", "-m", "--propagation", "private", "sh", "-c",
	`umount -R /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup && exec "$@"`, "sh"}

// startDockerIn starts it by a wrapping command.
func startDockerIn(t *testing.T, wrapper []string, args ...string) *engineProcess {
	t.Helper()
	dir := engineFolder(t)
	socket := filepath.Join(dir, "docker.sock")
	e := &engineProcess{t: t, socket: socket, cli: []string{"/usr/bin/docker", "-H", "unix://" + socket}}
	e.begin(dir, exec.Command(wrapper[0], append(append(wrapper[1:len(wrapper):len(wrapper)], "/usr/sbin/dockerd",
		"--iptables=false", "--ip6tables=false", "--bridge=none", "--storage-driver=vfs",
		"--data-root="+filepath.Join(dir, "data"), "--exec-root="+filepath.Join(dir, "exec"),
		"-p", filepath.Join(dir, "docker.pid"), "-H", "unix://"+socket), args...)...))
	return e
}

// podman is Debian's.
const podman = "/usr/bin/podman"

// podmanCommand is Podman with its storage in dir.
func podmanCommand(dir, runtime string) []string {
	return []string{podman, "--root", filepath.Join(dir, "data"), "--runroot", filepath.Join(dir, "run"), "--runtime", runtime,
		"--cgroup-manager=cgroupfs", "--storage-driver=vfs", "--events-backend=file", "--tmpdir", filepath.Join(dir, "tmp")}
}

// podmanAlone is Podman without a service, which nobody can ask, with a runtime that can do without cgroups.
func podmanAlone(t *testing.T) *engineProcess {
	t.Helper()
	for _, program := range []string{podman, "/usr/bin/crun"} {
		if _, err := os.Stat(program); err != nil {
			t.Fatalf("%v: make test-containers installs it", err)
		}
	}
	return &engineProcess{t: t, cli: append(inCgroup2[:len(inCgroup2):len(inCgroup2)], podmanCommand(engineFolder(t), "crun")...)}
}

// startPodman starts Podman's service with Docker's API.
func startPodman(t *testing.T) *engineProcess {
	t.Helper()
	dir := engineFolder(t)
	socket := filepath.Join(dir, "podman.sock")
	global := podmanCommand(dir, "runc")
	command := exec.Command(global[0], append(global[1:len(global):len(global)], "system", "service", "--time=0", "unix://"+socket)...)
	e := &engineProcess{t: t, socket: socket, cli: global}
	e.begin(dir, command)
	return e
}

// engineFolder is on a path short enough for sockets below it.
func engineFolder(t *testing.T) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("a container engine needs root")
	}
	dir, err := os.MkdirTemp("/tmp", "eng")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o711); err != nil { // remapped users of containers go through it
		t.Fatal(err)
	}
	t.Cleanup(func() {
		endLeft(dir)
		unmountBelow(dir)
		for _, pattern := range []string{"/sys/fs/cgroup/docker", "/sys/fs/cgroup/*/docker", "/sys/fs/cgroup/*/libpod_parent", "/sys/fs/cgroup/*/elsewhere"} {
			left, _ := filepath.Glob(pattern)
			for _, cgroup := range left {
				_ = os.Remove(cgroup) // stays where somebody else's container is in it
			}
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// endLeft ends the containers of an engine that could not do it: their shims have its folder among their arguments.
func endLeft(dir string) {
	shims, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, file := range shims {
		arguments, _ := os.ReadFile(file)
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		if err != nil || !bytes.Contains(arguments, []byte("\x00"+dir+"/")) {
			continue
		}
		children, _ := os.ReadFile(filepath.Join(filepath.Dir(file), "task", strconv.Itoa(pid), "children"))
		for _, child := range strings.Fields(string(children)) {
			if child, err := strconv.Atoi(child); err == nil {
				_ = syscall.Kill(child, syscall.SIGKILL)
			}
		}
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
}

// unmountBelow takes away what an engine has left mounted.
func unmountBelow(dir string) {
	mounts, _ := os.ReadFile("/proc/self/mounts")
	lines := strings.Split(string(mounts), "\n")
	for i := len(lines) - 1; i >= 0; i-- {
		if fields := strings.Fields(lines[i]); len(fields) > 1 && strings.HasPrefix(fields[1], dir+"/") {
			_ = unix.Unmount(fields[1], unix.MNT_DETACH)
		}
	}
}

func (e *engineProcess) begin(dir string, command *exec.Cmd) {
	e.t.Helper()
	if _, err := os.Stat(command.Path); err != nil {
		e.t.Fatalf("%v: make test-containers installs it", err)
	}
	command.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	e.process = begin(e.t, nil, command)
	e.t.Cleanup(func() { // before the process is killed, so that its own children end with it
		_ = e.cmd.Process.Signal(syscall.SIGCONT)
		if out, err := e.run("ps", "-aq"); err == nil && out != "" {
			_, _ = e.run(append([]string{"rm", "-f"}, strings.Fields(out)...)...)
		}
		_ = e.cmd.Process.Signal(syscall.SIGTERM)
		<-e.ended
	})
	until(e.t, "the engine", e.ended, func() bool {
		conn, err := net.Dial("unix", e.socket)
		if err != nil {
			return false
		}
		conn.Close()
		_, err = e.run("ps")
		return err == nil
	})
}

// run runs a command of the engine's and returns what it printed, with an error all of it on one line.
func (e *engineProcess) run(args ...string) (string, error) {
	command := exec.Command(e.cli[0], append(e.cli[1:len(e.cli):len(e.cli)], args...)...)
	var out, said bytes.Buffer
	command.Stdout, command.Stderr = &out, &said
	err := command.Run()
	text := strings.TrimSpace(out.String())
	if err != nil { // on one line, wherever it was wrapped
		text = strings.Join(strings.Fields(text+" "+said.String()), " ")
	}
	return text, err
}

func (e *engineProcess) must(args ...string) string {
	e.t.Helper()
	out, err := e.run(args...)
	if err != nil {
		e.t.Fatalf("%v: %v: %s", args, err, out)
	}
	return out
}

// image makes an image that holds perceptctl and nothing else, and returns its ID. The label makes it another.
func (e *engineProcess) image(name, label string) string {
	e.t.Helper()
	tar := exec.Command("tar", "-C", filepath.Dir(binary(e.t, "perceptctl")), "-c", "perceptctl")
	archive, err := tar.Output()
	if err != nil {
		e.t.Fatal(err)
	}
	args := append(e.cli[1:len(e.cli):len(e.cli)], "import", "--change", `ENTRYPOINT ["/perceptctl"]`, "--change", "LABEL is="+label, "-", name)
	load := exec.Command(e.cli[0], args...)
	load.Stdin = bytes.NewReader(archive)
	if out, err := load.CombinedOutput(); err != nil {
		e.t.Fatalf("%v: %s", err, out)
	}
	id := e.must("inspect", "--format", "{{.Id}}", name)
	if !strings.HasPrefix(id, "sha256:") {
		id = "sha256:" + id
	}
	return id
}

// module is how a container is started that has a module's folder.
func (d *daemonProcess) mount(module string) []string {
	return []string{"-v", filepath.Dir(d.module(module)) + ":/run/percept"}
}

// limits are what podman cannot raise here.
func (e *engineProcess) limits() []string {
	if slices.Contains(e.cli, podman) {
		return []string{"--ulimit", "nofile=20000:20000", "--ulimit", "nproc=1000:1000"}
	}
	return nil
}

// once runs perceptctl in a container that ends with it.
func (e *engineProcess) once(options []string, image string, perceptctl ...string) (string, error) {
	args := append([]string{"run", "--rm", "--network", "none"}, e.limits()...)
	args = append(args, options...)
	return e.run(append(append(args, image), perceptctl...)...)
}

// stay starts a container that stays, in which `exec` runs perceptctl.
func (e *engineProcess) stay(name string, options []string, image string) {
	e.t.Helper()
	args := append([]string{"run", "-d", "--network", "none", "--name", name}, e.limits()...)
	args = append(args, options...)
	id := e.must(append(args, image, "simulate")...)
	if e.ids == nil {
		e.ids = make(map[string]string)
	}
	e.ids[name] = id
}

// identityOf returns whose token an answer of `perceptctl token --json` is.
func identityOf(text string) string {
	var token struct{ Identity string }
	if err := json.Unmarshal([]byte(text), &token); err != nil {
		return fmt.Sprintf("%v in %q", err, text)
	}
	return token.Identity
}

// exitStatus of a command that ended by itself.
func exitStatus(err error) int {
	var ended *exec.ExitError
	if errors.As(err, &ended) {
		return ended.ExitCode()
	}
	return 0
}

// reportSpeed logs how long the engine takes to tell of a container, which is what a proof of a new connection waits for.
func (e *engineProcess) reportSpeed(t *testing.T, name string) {
	t.Helper()
	var took []time.Duration
	client := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", e.socket)
	}}}
	defer client.CloseIdleConnections()
	for range 100 {
		began := time.Now()
		answer, err := client.Get("http://engine/containers/" + name + "/json")
		if err != nil {
			t.Fatal(err)
		}
		_, err = io.Copy(io.Discard, answer.Body)
		if answer.Body.Close(); err != nil || answer.StatusCode != http.StatusOK {
			t.Fatal(answer.Status, err)
		}
		took = append(took, time.Since(began))
	}
	slices.Sort(took)
	t.Logf("the engine tells of a container in %v at the median, %v at the 99th percentile", took[50], took[99])
}
