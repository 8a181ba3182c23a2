//go:build containers || clients

package harness

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

// Engine is a real container engine on a socket of its own, with its storage in a folder that goes with the test.
type Engine struct {
	*Process
	T      *testing.T
	Socket string
	CLI    []string          // the command that drives it
	IDs    map[string]string // of containers that stay, by name
}

// StartDocker starts Debian's dockerd, without a network.
func StartDocker(t *testing.T, args ...string) *Engine {
	t.Helper()
	return StartDockerIn(t, []string{"/usr/bin/env"}, args...)
}

// InCgroup2 runs a command where the unified hierarchy of cgroups is all there is.
var InCgroup2 = []string{"/usr/bin/unshare", "-m", "--propagation", "private", "sh", "-c",
	`umount -R /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup && exec "$@"`, "sh"}

// StartDockerIn starts it by a wrapping command.
func StartDockerIn(t *testing.T, wrapper []string, args ...string) *Engine {
	t.Helper()
	dir := engineFolder(t)
	socket := filepath.Join(dir, "docker.sock")
	e := &Engine{T: t, Socket: socket, CLI: []string{"/usr/bin/docker", "-H", "unix://" + socket}}
	e.Begin(dir, exec.Command(wrapper[0], append(append(wrapper[1:len(wrapper):len(wrapper)], "/usr/sbin/dockerd",
		"--iptables=false", "--ip6tables=false", "--bridge=none", "--storage-driver=vfs",
		"--data-root="+filepath.Join(dir, "data"), "--exec-root="+filepath.Join(dir, "exec"),
		"-p", filepath.Join(dir, "docker.pid"), "-H", "unix://"+socket), args...)...))
	return e
}

// podman is Debian's.
const podman = "/usr/bin/podman"

// podmanCommand is Podman with its storage in dir.
func podmanCommand(dir, runtime string) []string {
	return []string{podman, "--root", filepath.Join(dir, "data"), "--runroot", filepath.Join(dir, "run"), "--runtime",
		runtime,
		"--cgroup-manager=cgroupfs", "--storage-driver=vfs", "--events-backend=file", "--tmpdir", filepath.Join(dir,
			"tmp")}
}

// PodmanAlone is Podman without a service, which nobody can ask, with a runtime that can do without cgroups.
func PodmanAlone(t *testing.T) *Engine {
	t.Helper()
	for _, program := range []string{podman, "/usr/bin/crun"} {
		if _, err := os.Stat(program); err != nil {
			t.Fatalf("%v: make test-containers installs it", err)
		}
	}
	return &Engine{T: t, CLI: append(InCgroup2[:len(InCgroup2):len(InCgroup2)],
		podmanCommand(engineFolder(t), "crun")...)}
}

// StartPodman starts Podman's service with Docker's API.
func StartPodman(t *testing.T) *Engine {
	t.Helper()
	dir := engineFolder(t)
	socket := filepath.Join(dir, "podman.sock")
	global := podmanCommand(dir, "runc")
	command := exec.Command(global[0], append(global[1:len(global):len(global)], "system", "service", "--time=0",
		"unix://"+socket)...)
	e := &Engine{T: t, Socket: socket, CLI: global}
	e.Begin(dir, command)
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
		for _, pattern := range []string{
			"/sys/fs/cgroup/docker", "/sys/fs/cgroup/*/docker", "/sys/fs/cgroup/*/libpod_parent",
			"/sys/fs/cgroup/*/elsewhere",
		} {
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

// Begin starts the engine, and waits until it answers.
func (e *Engine) Begin(dir string, command *exec.Cmd) {
	e.T.Helper()
	if _, err := os.Stat(command.Path); err != nil {
		e.T.Fatalf("%v: make test-containers installs it", err)
	}
	command.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	e.Process = Begin(e.T, nil, command)
	e.T.Cleanup(func() { // before the process is killed, so that its own children end with it
		_ = e.Cmd.Process.Signal(syscall.SIGCONT)
		if out, err := e.Run("ps", "-aq"); err == nil && out != "" {
			_, _ = e.Run(append([]string{"rm", "-f"}, strings.Fields(out)...)...)
		}
		_ = e.Cmd.Process.Signal(syscall.SIGTERM)
		<-e.Ended
	})
	Until(e.T, "the engine", e.Ended, func() bool {
		conn, err := net.Dial("unix", e.Socket)
		if err != nil {
			return false
		}
		conn.Close()
		_, err = e.Run("ps")
		return err == nil
	})
}

// Run runs a command of the engine's and returns what it printed, with an error all of it on one line.
func (e *Engine) Run(args ...string) (string, error) {
	command := exec.Command(e.CLI[0], append(e.CLI[1:len(e.CLI):len(e.CLI)], args...)...)
	var out, said bytes.Buffer
	command.Stdout, command.Stderr = &out, &said
	err := command.Run()
	text := strings.TrimSpace(out.String())
	if err != nil { // on one line, wherever it was wrapped
		text = strings.Join(strings.Fields(text+" "+said.String()), " ")
	}
	return text, err
}

// Must is Run, where it has to end well.
func (e *Engine) Must(args ...string) string {
	e.T.Helper()
	out, err := e.Run(args...)
	if err != nil {
		e.T.Fatalf("%v: %v: %s", args, err, out)
	}
	return out
}

// Image makes an image that holds perceptctl and nothing else, and returns its ID. The label makes it another.
func (e *Engine) Image(name, label string) string {
	e.T.Helper()
	tar := exec.Command("tar", "-C", filepath.Dir(Binary(e.T, "perceptctl")), "-c", "perceptctl")
	archive, err := tar.Output()
	if err != nil {
		e.T.Fatal(err)
	}
	args := append(e.CLI[1:len(e.CLI):len(e.CLI)], "import", "--change", `ENTRYPOINT ["/perceptctl"]`, "--change",
		"LABEL is="+label, "-", name)
	load := exec.Command(e.CLI[0], args...)
	load.Stdin = bytes.NewReader(archive)
	if out, err := load.CombinedOutput(); err != nil {
		e.T.Fatalf("%v: %s", err, out)
	}
	id := e.Must("inspect", "--format", "{{.Id}}", name)
	if !strings.HasPrefix(id, "sha256:") {
		id = "sha256:" + id
	}
	return id
}

// Mount is how a container is started that has a module's folder.
func (d *Daemon) Mount(module string) []string {
	return []string{"-v", filepath.Dir(d.Module(module)) + ":/run/percept"}
}

// Limits are what podman cannot raise here.
func (e *Engine) Limits() []string {
	if slices.Contains(e.CLI, podman) {
		return []string{"--ulimit", "nofile=20000:20000", "--ulimit", "nproc=1000:1000"}
	}
	return nil
}

// Once runs perceptctl in a container that ends with it.
func (e *Engine) Once(options []string, image string, perceptctl ...string) (string, error) {
	args := append([]string{"run", "--rm", "--network", "none"}, e.Limits()...)
	args = append(args, options...)
	return e.Run(append(append(args, image), perceptctl...)...)
}

// Stay starts a container that stays, in which `exec` runs perceptctl.
func (e *Engine) Stay(name string, options []string, image string) {
	e.T.Helper()
	args := append([]string{"run", "-d", "--network", "none", "--name", name}, e.Limits()...)
	args = append(args, options...)
	id := e.Must(append(args, image, "simulate")...)
	if e.IDs == nil {
		e.IDs = make(map[string]string)
	}
	e.IDs[name] = id
}

// IdentityOf returns whose token an answer of `perceptctl token --json` is.
func IdentityOf(text string) string {
	var token struct{ Identity string }
	if err := json.Unmarshal([]byte(text), &token); err != nil {
		return fmt.Sprintf("%v in %q", err, text)
	}
	return token.Identity
}

// ExitStatus of a command that ended by itself.
func ExitStatus(err error) int {
	var ended *exec.ExitError
	if errors.As(err, &ended) {
		return ended.ExitCode()
	}
	return 0
}

// ReportSpeed logs how long the engine takes to tell of a container, which is what a proof of a new connection waits
// for.
func (e *Engine) ReportSpeed(t *testing.T, name string) {
	t.Helper()
	var took []time.Duration
	var dialer net.Dialer
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return dialer.DialContext(ctx, "unix", e.Socket)
	}
	client := http.Client{Transport: &http.Transport{DialContext: dial}}
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
