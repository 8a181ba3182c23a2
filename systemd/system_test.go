//go:build system

package systemd_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"perceptd/cmd/perceptd/e2e/harness"
)

// TestSystem runs the installed daemon under real systemds, each in a container of its own, and looks at
// it as a technician and as local services do. 247 is the nearest to a Percept DK's that can be had.
func TestSystem(t *testing.T) {
	for _, release := range []string{"bullseye", "bookworm", "trixie"} { // systemd 247, 252, 257
		t.Run(release, func(t *testing.T) { testSystem(t, boot(t, kind{release: release})) })
	}
}

func testSystem(t *testing.T, machine *machine) {
	install(t, machine)

	t.Run("starts", func(t *testing.T) {
		machine.must(t, "systemctl", "enable", "--now", "perceptd.service")
		show := machine.must(t, "systemctl", "show", "perceptd", "-p", "ActiveState,StatusText,User,Result")
		wants(t, show, "ActiveState=active", "User=percept", "StatusText=SIMULATED; 2 identities, ")
		status := machine.must(t, "systemctl", "status", "perceptd", "--no-pager")
		wants(t, status, `Status: "SIMULATED; 2 identities`, "perceptd.socket", "perceptd-admin.socket")
		t.Log("\n" + status)
	})
	t.Run("sockets", func(t *testing.T) {
		modes := machine.must(t, "stat", "-c", "%n %a %U:%G", "/run/percept/token.sock", "/run/percept/admin.sock",
			"/run/percept/modules/vision/token.sock")
		wants(t, modes, "token.sock 666 ", "admin.sock 660 percept:percept-admin",
			"modules/vision/token.sock 666 percept:percept")
	})
	t.Run("serves whom a grant names", func(t *testing.T) {
		out, err := machine.as(t, "edge", "perceptctl", "token", "--resource", "https://vault.azure.net", "--short")
		if err != nil || !strings.HasPrefix(out, "eyJ") {
			t.Errorf("user edge: %v %s", err, out)
		}
		out, err = machine.as(t, "nobody", "perceptctl", "token", "--resource", "https://vault.azure.net", "--short")
		if exitOf(err) != 4 || !strings.Contains(out, "(uid 65534, ") {
			t.Errorf("user nobody: %v %s", err, out)
		}
		out, err = machine.as(t, "edge", "perceptctl", "--socket", "/run/percept/modules/vision/token.sock", "token",
			"--resource", "https://vault.azure.net")
		if exitOf(err) != 3 || !strings.Contains(out, "permission denied") {
			t.Errorf("user edge at a module's socket: %v %s", err, out)
		}
		out = machine.must(t, "perceptctl", "--socket", "/run/percept/modules/vision/token.sock", "token", "--resource",
			"https://vault.azure.net", "--json")
		wants(t, out, `"identity": "vision"`)
	})
	testCallers(t, machine)
	testSight(t, machine)
	testModuleSockets(t, machine)
	testLoopback(t, machine)
	t.Run("shows technicians, and only them, the status", func(t *testing.T) {
		wants(t, machine.must(t, "perceptctl", "status"), "ready", "https://vault.azure.net", "SIMULATED")
		out, err := machine.as(t, "technician", "perceptctl", "status")
		if err != nil {
			t.Errorf("a member of percept-admin: %v %s", err, out)
		}
		out, err = machine.as(t, "edge", "perceptctl", "status")
		if exitOf(err) != 3 || !strings.Contains(out, "percept-admin") {
			t.Errorf("user edge: %v %s", err, out)
		}
	})
	t.Run("reloads whole or not at all", func(t *testing.T) {
		machine.write(t, "/etc/percept/config.toml", config+grantFor("nobody"))
		machine.must(t, "systemctl", "reload", "perceptd")
		if out, err := machine.as(t, "nobody", "perceptctl", "token", "--resource", "https://vault.azure.net",
			"--short"); err != nil {
			t.Errorf("user nobody, granted by now: %v %s", err, out)
		}
		machine.write(t, "/etc/percept/config.toml", config+"[[grant]]\ncaler = { uid = 1 }\n")
		if out, err := machine.run(t, "systemctl", "reload", "perceptd"); err == nil {
			t.Errorf("a bad configuration was reloaded: %s", out)
		}
		wants(t, machine.must(t, "systemctl", "show", "perceptd", "-p", "StatusText,ActiveState"),
			"trouble: the last reload changed nothing", "ActiveState=active")
		out, err := machine.run(t, "perceptctl", "status")
		if exitOf(err) != 5 || !strings.Contains(out, "config.toml:") ||
			!strings.Contains(out, "unknown key grant.caler") {
			t.Errorf("status after a bad reload: %v %s", err, out)
		}
		if out, err := machine.as(t, "nobody", "perceptctl", "token", "--resource", "https://vault.azure.net",
			"--short"); err != nil {
			t.Errorf("the configuration before is no longer in force: %v %s", err, out)
		}
		machine.write(t, "/etc/percept/config.toml", config)
		machine.must(t, "systemctl", "reload", "perceptd")
		if out, err := machine.as(t, "nobody", "perceptctl", "token", "--resource", "https://vault.azure.net",
			"--short"); exitOf(err) != 4 {
			t.Errorf("the grant is gone: %v %s", err, out)
		}
	})
	t.Run("comes back from a crash", func(t *testing.T) {
		folder := machine.must(t, "stat", "-c", "%i", "/run/percept/modules/vision")
		before := machine.pid(t)
		machine.must(t, "systemctl", "kill", "-s", "KILL", "--kill-who=main", "perceptd")
		// The socket is systemd's: the request waits there until the next daemon answers.
		// One that the old daemon had accepted fails, and is repeated as SDKs do.
		machine.until(t, "a token after the crash", func() bool {
			_, err := machine.as(t, "edge", "perceptctl", "token", "--resource", "https://vault.azure.net", "--short")
			return err == nil
		})
		if after := machine.pid(t); after == before || after == "0" {
			t.Errorf("main process %s, was %s", after, before)
		}
		if again := machine.must(t, "stat", "-c", "%i", "/run/percept/modules/vision"); again != folder {
			t.Error("a module's folder is another: containers that mounted it see nothing any more")
		}
	})
	t.Run("is restarted when it stands still", func(t *testing.T) {
		machine.write(t, "/etc/systemd/system/perceptd.service.d/watchdog.conf", "[Service]\nWatchdogSec=2\n")
		machine.must(t, "systemctl", "daemon-reload")
		machine.must(t, "systemctl", "restart", "perceptd")
		before := machine.pid(t)
		machine.must(t, "systemctl", "kill", "-s", "STOP", "--kill-who=main", "perceptd")
		machine.until(t, "the watchdog's restart", func() bool {
			after := machine.pid(t)
			return after != "0" && after != before
		})
		machine.until(t, "the daemon's return", func() bool {
			out, _ := machine.run(t, "systemctl", "is-active", "perceptd")
			return strings.TrimSpace(out) == "active"
		})
		wants(t, machine.must(t, "journalctl", "-u", "perceptd", "--no-pager"), "Watchdog timeout")
	})
	t.Run("logs with fields, and no token", func(t *testing.T) {
		wants(t, machine.must(t, "journalctl", "PERCEPT_IDENTITY=device", "-o", "cat", "--no-pager"), "token fetched")
		wants(t, machine.must(t, "journalctl", "-u", "perceptd", "-p", "warning", "-o", "cat", "--no-pager"),
			"token denied", "SIMULATED")
		if journal := machine.must(t, "journalctl", "-o", "export", "--no-pager"); strings.Contains(journal,
			"eyJhbGciOi") {
			t.Error("token text in the journal")
		}
		if journal := machine.must(t, "journalctl", "-u", "perceptd", "-o", "cat",
			"--no-pager"); strings.Contains(journal, "self-check failed") {
			t.Error("the daemon's check of itself failed in its own sandbox")
		}
	})
	t.Run("stops in order", func(t *testing.T) {
		machine.must(t, "systemctl", "stop", "perceptd")
		wants(t, machine.must(t, "systemctl", "show", "perceptd", "-p", "Result,ExecMainStatus,ActiveState"),
			"Result=success", "ExecMainStatus=0", "ActiveState=inactive")
		machine.must(t, "test", "-S", "/run/percept/token.sock") // still there: the next client starts the daemon
		if out, err := machine.as(t, "edge", "perceptctl", "token", "--resource", "https://vault.azure.net",
			"--short"); err != nil {
			t.Errorf("started by its socket: %v %s", err, out)
		}
	})
	t.Run("verifies", func(t *testing.T) {
		out, err := machine.run(t, "systemd-analyze", "verify", "--man=no", "perceptd.service", "perceptd.socket",
			"perceptd-admin.socket", "perceptd-cache-key.service",
			"perceptd-clock.socket", "perceptd-clock@1.service", "perceptd-modules.socket",
			"perceptd-modules@1.service")
		for line := range strings.Lines(out) {
			// A key that is younger than this systemd is ignored, which is what it is meant to be.
			if strings.Contains(line, "perceptd") && !strings.Contains(line, "Unknown key ") {
				err = errors.Join(err, errors.New(line))
			}
		}
		if err != nil {
			t.Errorf("systemd-analyze verify: %v", err)
		}
		out = machine.must(t, "systemd-analyze", "security", "--no-pager", "perceptd.service")
		lines := strings.Split(strings.TrimSpace(out), "\n")
		t.Log(lines[len(lines)-1])
	})
}

const config = harness.SimulatedIdentities + moduleVision + grantForEdge

const moduleVision = `
[[module]]
name = "vision"
require = "socket"

[[grant]]
caller = { module = "vision" }
identity = "vision"
resources = ["https://vault.azure.net"]
`

const grantForEdge = `
[[grant]]
caller = { user = "edge" }
identity = "device"
resources = ["https://vault.azure.net"]
prefetch = true
`

func grantFor(user string) string { return strings.Replace(grantForEdge, `"edge"`, `"`+user+`"`, 1) }

// unpack puts the built binaries and the units where a package would, and returns the commands that are to follow, the
// last of which are for over an earlier version.
func unpack(t *testing.T, m *machine) (next, over string) {
	t.Helper()
	repository, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	first, over := nextOf(t, mustRun(t, "make", "-C", repository, "install", "DESTDIR="+m.root))
	return strings.Join(first[:len(first)-2], " && "), over
}

// nextOf returns the commands that make install prints: those of a first installation, the last two of which write an
// example configuration and start the daemon, and the one that takes their place over a version that runs.
func nextOf(t *testing.T, said string) (first []string, over string) {
	t.Helper()
	isOver := false
	for line := range strings.Lines(said) {
		isOver = isOver || strings.HasPrefix(line, "over a version that runs")
		switch command, found := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "  "); {
		case found && isOver:
			over = command
		case found:
			first = append(first, command)
		}
	}
	if len(first) < 3 || over == "" {
		t.Fatalf("make install does not tell what is next:\n%s", said)
	}
	return first, over
}

// install makes a device with perceptd, though without a key for what it keeps.
func install(t *testing.T, m *machine) {
	t.Helper()
	unpack(t, m)
	m.write(t, "/etc/percept/config.toml", config)
	m.must(t, "systemd-sysusers")
	m.must(t, "systemd-tmpfiles", "--create")
	m.must(t, "useradd", "--no-create-home", "edge")
	m.must(t, "useradd", "--no-create-home", "--groups", "percept-admin", "technician")
	m.must(t, "systemctl", "daemon-reload")
}

// machine is a booted container.
type machine struct {
	root   string // its file system
	leader string // pid of its init, seen from here

	nspawn  *exec.Cmd // what holds it
	command func() *exec.Cmd
	log     *os.File // its console
}

// kind is what a container is made of.
type kind struct {
	release  string
	packages string   // beside the usual ones
	args     []string // of systemd-nspawn
	env      []string
}

// boot starts a copy of a Debian release. The pristine copy is made once and kept in PERCEPT_ROOTFS_CACHE,
// or in the user's cache folder.
func boot(t *testing.T, k kind) *machine {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("needs root: a container with its own systemd is booted")
	}
	root := filepath.Join(t.TempDir(), "root")
	mustRun(t, "cp", "-a", pristine(t, k), root)
	name := fmt.Sprintf("percept-%s-%d", k.release, os.Getpid())
	log, err := os.Create(filepath.Join(t.TempDir(), "console"))
	if err != nil {
		t.Fatal(err)
	}
	groups := cgroups(t, name)
	m := &machine{root: root, log: log, command: func() *exec.Cmd {
		join := `for g in $1; do echo $$ >"$g/cgroup.procs"; done; shift; exec "$@"`
		back := uptime(t) - 5*time.Second // as long as a device takes to get this far
		nspawn := exec.Command("setsid", append([]string{"sh", "-c", join, "sh", strings.Join(groups, " "),
			"unshare", "--time", fmt.Sprintf("--boottime=-%d", int(back.Seconds())), fmt.Sprintf("--monotonic=-%d",
				int(back.Seconds())),
			"systemd-nspawn", "--quiet", "--directory=" +
				root, "--boot", "--keep-unit", "--register=no", "--private-network",
			"--machine=" + name, "--console=pipe", "--kill-signal=SIGRTMIN+3"}, k.args...)...)
		nspawn.Env = append(os.Environ(), k.env...)
		nspawn.Stdout, nspawn.Stderr = log, log
		return nspawn
	}}
	t.Cleanup(func() {
		if t.Failed() {
			out, _ := os.ReadFile(log.Name())
			journal, _ := m.run(t, "journalctl", "--no-pager", "-u", "perceptd", "-u", "perceptd-cache-key", "-n",
				"100")
			t.Logf("console:\n%s\njournal:\n%s", out, journal)
		}
		_, _ = m.run(t, "systemctl", "poweroff")
		_ = m.nspawn.Wait()
		_ = log.Close()
		for _, group := range groups {
			removeGroup(group)
		}
	})
	m.begin(t)
	return m
}

// uptime is how long this machine is up: a container's clocks go on where it began, unless they are set back.
func uptime(t *testing.T) time.Duration {
	t.Helper()
	text, err := os.ReadFile("/proc/uptime")
	if err != nil {
		t.Fatal(err)
	}
	seconds, _, _ := strings.Cut(string(text), " ")
	up, err := strconv.ParseFloat(seconds, 64)
	if err != nil {
		t.Fatal(err)
	}
	return max(5*time.Second, time.Duration(up*float64(time.Second)))
}

// reboot has the container's init end by that command, and starts it again on the same files.
func (m *machine) reboot(t *testing.T, command ...string) {
	t.Helper()
	_, _ = m.run(t, command...) // it may be cut off
	_ = m.nspawn.Wait()         // it says by its status that it wants to be started again
	m.begin(t)
}

// begin starts the container and waits until its init has started everything.
func (m *machine) begin(t *testing.T) {
	t.Helper()
	m.nspawn = m.command()
	if err := m.nspawn.Start(); err != nil {
		t.Fatal(err)
	}
	m.until(t, "the container's init", func() bool {
		children, _ := os.ReadFile(fmt.Sprintf("/proc/%[1]d/task/%[1]d/children", m.nspawn.Process.Pid))
		m.leader = strings.TrimSpace(string(children))
		_, err := os.Stat(filepath.Join("/proc", m.leader, "root/run/systemd/private"))
		return m.leader != "" && err == nil
	})
	m.until(t, "the container's boot", func() bool {
		state, _ := m.run(t, "systemctl", "is-system-running")
		state = strings.TrimSpace(state)
		return state == "running" || state == "degraded"
	})
}

// pristine returns the folder of a release's untouched file system, made if need be.
func pristine(t *testing.T, k kind) string {
	t.Helper()
	cache := os.Getenv("PERCEPT_ROOTFS_CACHE")
	if cache == "" {
		user, err := os.UserCacheDir()
		if err != nil {
			user = "/var/cache"
		}
		cache = filepath.Join(user, "perceptd-rootfs")
	}
	root := filepath.Join(cache, k.release)
	include := "systemd,systemd-sysv,dbus"
	if k.packages != "" {
		root += "+" + strings.ReplaceAll(k.packages, ",", "+")
		include += "," + k.packages
	}
	if _, err := os.Stat(root); err == nil {
		return root
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		t.Fatal(err)
	}
	making := fmt.Sprintf("%s.%d", root, os.Getpid())
	mustRun(t, "mmdebstrap", "--quiet", "--variant=minbase", "--include="+include, k.release, making)
	if err := os.Rename(making, root); err != nil {
		t.Fatal(err)
	}
	return root
}

// cgroups makes a control group of the container's own in each hierarchy that systemd uses: two
// containers in one group disturb each other.
func cgroups(t *testing.T, name string) []string {
	t.Helper()
	var groups []string
	for _, hierarchy := range []string{"/sys/fs/cgroup/systemd", "/sys/fs/cgroup/unified", "/sys/fs/cgroup"} {
		if _, err := os.Stat(filepath.Join(hierarchy, "cgroup.procs")); err != nil {
			continue
		}
		group := filepath.Join(hierarchy, name)
		if err := os.Mkdir(group, 0o755); err != nil {
			t.Fatal(err)
		}
		groups = append(groups, group)
	}
	return groups
}

func removeGroup(group string) {
	var all []string
	_ = filepath.WalkDir(group, func(path string, entry os.DirEntry, err error) error {
		if err == nil && entry.IsDir() {
			all = append(all, path)
		}
		return nil
	})
	for i := len(all) - 1; i >= 0; i-- {
		_ = os.Remove(all[i])
	}
}

// run runs an administrator's command in the container and returns what it printed.
func (m *machine) run(t *testing.T, command ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 90*time.Second)
	defer cancel()
	c := exec.CommandContext(ctx, "nsenter", append([]string{"-t", m.leader, "-a", "--"}, command...)...)
	c.Env = []string{"PATH=/usr/bin:/usr/sbin:/bin:/sbin", "LANG=C.UTF-8", "TERM=dumb"}
	var out bytes.Buffer
	c.Stdout, c.Stderr = &out, &out
	err := c.Run()
	return out.String(), err
}

func (m *machine) must(t *testing.T, command ...string) string {
	t.Helper()
	out, err := m.run(t, command...)
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(command, " "), err, out)
	}
	return out
}

// as runs a command in a unit of its own, as a local service of that user.
func (m *machine) as(t *testing.T, user string, command ...string) (string, error) {
	t.Helper()
	return m.run(t, append([]string{"systemd-run", "--quiet", "--pipe", "--wait", "--collect", "--property=User=" +
		user}, command...)...)
}

func (m *machine) write(t *testing.T, path, text string) {
	t.Helper()
	file := filepath.Join(m.root, path)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func (m *machine) pid(t *testing.T) string {
	t.Helper()
	return strings.TrimSpace(m.must(t, "systemctl", "show", "perceptd", "-p", "MainPID", "--value"))
}

// until polls: what happens in the container happens in its own time.
func (m *machine) until(t *testing.T, what string, reached func() bool) {
	t.Helper()
	for deadline := time.Now().Add(60 * time.Second); !reached(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited a minute for %s", what)
		}
	}
}

func mustRun(t *testing.T, command ...string) string {
	t.Helper()
	out, err := exec.Command(command[0], command[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(command, " "), err, out)
	}
	return string(out)
}

func exitOf(err error) int {
	var exit *exec.ExitError
	if err == nil {
		return 0
	}
	if errors.As(err, &exit) {
		return exit.ExitCode()
	}
	return -1
}

func wants(t *testing.T, text string, parts ...string) {
	t.Helper()
	for _, part := range parts {
		if !strings.Contains(text, part) {
			t.Errorf("%q is missing in:\n%s", part, text)
		}
	}
}
