//go:build containers

package containers

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"perceptd/cmd/perceptd/e2e/harness"
)

// resident is a process in a container's cgroup that its engine has not started and does not stop with it.
type resident struct {
	t     *testing.T
	stdin io.Writer
	said  *bufio.Reader
}

// newResident puts a process into a container of Docker's that asks on a socket whenever it is told to, whatever has
// become of the engine and of the container.
func newResident(e *harness.Engine, container, socket string) *resident {
	e.T.Helper()
	const script = `for f in "$@"; do [ -e "$f" ] && echo $$ >"$f"; done; while read -r args; do "$PERCEPTCTL" ` +
		`--socket "$SOCKET" $args; echo "exit status $?"; done`
	var procs, cgroups []string
	for _, hierarchy := range []string{"/sys/fs/cgroup/systemd", "/sys/fs/cgroup/unified", "/sys/fs/cgroup"} {
		cgroup := filepath.Join(hierarchy, "docker", e.IDs[container])
		cgroups, procs = append(cgroups, cgroup), append(procs, filepath.Join(cgroup, "cgroup.procs"))
	}
	command := exec.Command("sh", append([]string{"-c", script, "sh"}, procs...)...)
	command.Env = append(os.Environ(), "PERCEPTCTL="+harness.Binary(e.T, "perceptctl"), "SOCKET="+socket)
	stdin, err := command.StdinPipe()
	if err != nil {
		e.T.Fatal(err)
	}
	out, in, err := os.Pipe()
	if err != nil {
		e.T.Fatal(err)
	}
	command.Stdout, command.Stderr = in, in
	if err := command.Start(); err != nil {
		e.T.Fatal(err)
	}
	e.T.Cleanup(func() {
		_ = in.Close()
		_ = command.Process.Kill()
		_ = command.Wait()
		_ = out.Close()
		_, _ = e.Run("rm", "-f", container)
		for _, cgroup := range cgroups { // which could not be removed while somebody was in it
			_ = os.Remove(cgroup)
		}
	})
	return &resident{e.T, stdin, bufio.NewReader(out)}
}

// ask runs perceptctl there, and returns on one line what it said and how it ended.
func (r *resident) ask(perceptctl ...string) string {
	r.t.Helper()
	if _, err := fmt.Fprintln(r.stdin, strings.Join(perceptctl, " ")); err != nil {
		r.t.Fatal(err)
	}
	var all []string
	for {
		line, err := r.said.ReadString('\n')
		if err != nil {
			r.t.Fatalf("%v after %q", err, all)
		}
		all = append(all, strings.Fields(line)...)
		if strings.HasPrefix(line, "exit status ") {
			return strings.Join(all, " ")
		}
	}
}

// wants has r ask who it is, and looks for each of the parts in what it is told.
func (r *resident) wants(when string, parts ...string) {
	r.t.Helper()
	out := r.ask("whoami")
	for _, part := range parts {
		if !strings.Contains(out, part) {
			r.t.Errorf("%s: no %q in %s", when, part, out)
		}
	}
}

// TestContainersComeAndGo: what a container may have lasts as long as the engine says that it runs, and goes to no
// other of its name that is made of another image.
func TestContainersComeAndGo(t *testing.T) {
	e := harness.StartDocker(t)
	image := e.Image("probe:1", "one")
	e.Image("probe:2", "two")
	d := harness.LaunchDaemon(t, twoModules(e.Socket, image))
	e.Stay("vision", d.Mount("vision"), "probe:1")
	ask := append([]string{"exec", "vision", "/perceptctl"}, askVault()...)
	left := newResident(e, "vision", d.Module("vision"))

	t.Run("one that was paused is served again", func(t *testing.T) {
		e.Must("pause", "vision")
		e.Must("unpause", "vision")
		if out, err := e.Run(ask...); err != nil || harness.IdentityOf(out) != "vision" {
			t.Errorf("%v %s", err, out)
		}
	})
	t.Run("one that was stopped is nobody, even to a process that was left in it", func(t *testing.T) {
		left.wants("running", "module vision", "exit status 0")
		e.Must("stop", "-t", "0", "vision")
		left.wants("stopped", "not proved", "its container does not run", "exit status 4")
		e.Must("start", "vision")
		left.wants("started again", "module vision", "exit status 0")
		e.Must("rm", "-f", "vision")
		left.wants("removed", "not proved", "the engine knows no container "+e.IDs["vision"][:12], "exit status 4")
	})
	t.Run("one of the same name has not the other's cgroup, and is served for itself", func(t *testing.T) {
		gone := e.IDs["vision"]
		e.Stay("vision", d.Mount("vision"), "probe:1")
		if e.IDs["vision"] == gone {
			t.Fatal("a new container has the ID of the old one")
		}
		if out, err := e.Run(ask...); err != nil || harness.IdentityOf(out) != "vision" {
			t.Errorf("%v %s", err, out)
		}
		left.wants("beside it", "not proved", "the engine knows no container "+gone[:12], "exit status 4")
	})
	t.Run("a grant for an image is not for the next container of that name", func(t *testing.T) {
		everybody := []string{"-v", d.Token() + ":/run/percept/token.sock", "--name", "camera"}
		if out, err := e.Once(everybody, "probe:1", askVault()...); err != nil || harness.IdentityOf(out) != "vision" {
			t.Errorf("%v %s", err, out)
		}
		out, err := e.Once(everybody, "probe:2", askVault()...)
		if harness.ExitStatus(err) != deniedExit || !strings.Contains(out, "no [[grant]] lets container camera") {
			t.Errorf("made of another image: %v %s", err, out)
		}
		if out, err := e.Once(everybody, "probe:1", askVault()...); err != nil || harness.IdentityOf(out) != "vision" {
			t.Errorf("made of the first again: %v %s", err, out)
		}
		if said := d.Text(); !strings.Contains(said, "token denied") {
			t.Errorf("the log does not tell of it: %s", said)
		}
	})
}

// TestContainersOutliveTheirEngine: an engine that was stopped can vouch for nobody, and for everybody again when it is
// back; who does not need its word notices neither.
func TestContainersOutliveTheirEngine(t *testing.T) {
	e := harness.StartDocker(t, "--live-restore")
	image := e.Image("probe:1", "one")
	d := harness.LaunchDaemon(t, twoModules(e.Socket, image))
	e.Stay("vision", d.Mount("vision"), "probe:1")
	e.Stay("any", d.Mount("open"), "probe:1")
	module, open := newResident(e, "vision", d.Module("vision")), newResident(e, "any", d.Module("open"))
	module.wants("with its engine", "module vision", "exit status 0")

	e.Stop(t) // its containers run on
	module.wants("without its engine", "not proved", e.Socket, "exit status 4")
	if out := module.ask(askVault()...); strings.Contains(out, "eyJ") || !strings.Contains(out, "exit status 4") {
		t.Errorf("without its engine: %s", out)
	}
	open.wants("a module by its socket", "module open", "exit status 0")
	if status, body, err := d.Get(d.Token(), harness.VaultToken); status != 200 {
		t.Errorf("this user: %d %s %v", status, body, err)
	}
	harness.Until(t, "the status to tell of it", d.Ended,
		func() bool { return strings.Contains(strings.Join(d.Status(t).Trouble, "\n"), e.Socket) })

	e.Begin(filepath.Dir(e.Socket), exec.Command(e.Cmd.Path, e.Cmd.Args[1:]...))
	module.wants("with its engine again", "module vision", "exit status 0")
	harness.Until(t, "the status to be at peace", d.Ended, func() bool { return len(d.Status(t).Trouble) == 0 })
}

// TestContainersReachNoOther: a container finds the sockets that it was handed, and no others.
func TestContainersReachNoOther(t *testing.T) {
	e := harness.StartDocker(t)
	image := e.Image("probe:1", "one")
	d := harness.LaunchDaemon(t, twoModules(e.Socket, image))
	const unreachable = 3 // of perceptctl
	for name, options := range map[string][]string{
		"nothing mounted":           {"--network", "none"},
		"the host's network":        {"--network", "host"},
		"the host's ipc and uts":    {"--network", "host", "--ipc", "host", "--uts", "host"},
		"another module's folder":   append([]string{"--network", "none", "--name", "vision"}, d.Mount("speech")...),
		"a folder beside the other": append([]string{"--network", "host", "--name", "vision"}, d.Mount("vision")...),
	} {
		for _, socket := range []string{d.Token(), d.Admin(), d.Module("speech"), "/run/percept/../speech/token.sock",
			"/run/percept/admin.sock", "@" + d.Token()} {
			args := append(append([]string{"run", "--rm"}, options...), "probe:1", "--socket", socket, "whoami")
			if out, err := e.Run(args...); harness.ExitStatus(err) != unreachable {
				t.Errorf("%s, at %s: %v %s", name, socket, err, out)
			}
		}
	}
	for _, options := range [][]string{{"--cgroupns", "host"}, {"--cgroupns", "private"}, {"--user", "1234:1234"},
		{"--hostname", "speech"}, {"--label", "module=speech"}} {
		args := append(append(options, "--name", "vision"), d.Mount("vision")...)
		if out, err := e.Once(args, "probe:1", askVault()...); err != nil || harness.IdentityOf(out) != "vision" {
			t.Errorf("%v changes who it is: %v %s", options, err, out)
		}
	}
}

// TestContainersBelowAnothers: below the cgroup of another module's container nobody is that module, whichever engine,
// driver and hierarchy put it there, and the other is served on.
func TestContainersBelowAnothers(t *testing.T) {
	for _, row := range []struct {
		name, below string
		start       func(t *testing.T) *harness.Engine
	}{
		{"Docker", "/docker/", func(t *testing.T) *harness.Engine { return harness.StartDocker(t) }},
		{"Docker on cgroups v2", "/docker/",
			func(t *testing.T) *harness.Engine { return harness.StartDockerIn(t, harness.InCgroup2) }},
		{"Podman", "/libpod_parent/libpod-", harness.StartPodman},
	} {
		t.Run(row.name, func(t *testing.T) {
			e := row.start(t)
			d := harness.LaunchDaemon(t, twoModules(e.Socket, e.Image("probe:1", "one")))
			e.Stay("vision", d.Mount("vision"), "probe:1")
			victim := row.below + e.IDs["vision"]
			for _, name := range []string{"vision2", "speech"} {
				options := append(d.Mount("vision"), "--cgroup-parent", victim, "--name", name)
				out, err := e.Once(options, "probe:1", "whoami")
				if harness.ExitStatus(err) != deniedExit || !strings.Contains(out, "names more than one container") {
					t.Errorf("%s: %v %s", name, err, out)
				}
				if out, err = e.Once(options, "probe:1", askVault()...); harness.ExitStatus(err) != deniedExit ||
					strings.Contains(out, "eyJ") {
					t.Errorf("%s: %v %s", name, err, out)
				}
			}
			if out, err := e.Run(append([]string{"exec", "vision", "/perceptctl"}, askVault()...)...); err != nil ||
				harness.IdentityOf(out) != "vision" {
				t.Errorf("the module itself: %v %s", err, out)
			}
		})
	}
}
