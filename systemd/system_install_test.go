//go:build system

package systemd_test

import (
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"perceptd/cmd/perceptd/e2e/harness"
)

// TestSystemInstall goes the way of somebody who tries perceptd: an ordinary user builds it from a repository of their
// own, and root, who has no Go, an empty environment and no trust in that repository, installs it, runs what is printed
// word for word, upgrades, and takes it away again. Nothing is left.
func TestSystemInstall(t *testing.T) {
	dev := newDeveloper(t)
	m := boot(t, kind{release: "bookworm", packages: "make,git", args: []string{"--bind=" + dev.tree + ":/src"}})
	before := m.traces(t)

	t.Run("says what is missing", func(t *testing.T) {
		out, err := m.make(t, "install")
		if err == nil || !strings.Contains(out, "bin/perceptd is not there, and root has no Go: run make build") {
			t.Errorf("%v\n%s", err, out)
		}
		if out, err := dev.run("make", "install"); err == nil || !strings.Contains(out, "sudo make install") {
			t.Errorf("as an ordinary user: %v\n%s", err, out)
		}
		if now := m.traces(t); now != before {
			t.Errorf("it has installed\n%s", now)
		}
	})
	dev.build(t, "v1.2.3")
	t.Run("knows the version in a repository that root's git does not trust", func(t *testing.T) {
		out, err := m.run(t, "env", "-i", "git", "-C", "/src", "describe")
		if !strings.Contains(out, "dubious ownership") {
			t.Errorf("git: %v %s", err, out)
		}
		out, err = m.make(t, "build", "--dry-run")
		if err != nil {
			t.Errorf("make: %v", err)
		}
		wants(t, out, "-X main.version=v1.2.3 -X main.commit="+dev.commit(t))
	})
	t.Run("under a folder, as an ordinary user", func(t *testing.T) { testDestination(t, dev) })

	var first []string
	var over string
	t.Run("installs", func(t *testing.T) {
		out := m.mustMake(t, "install")
		wants(t, out, "installed: perceptd v1.2.3 (commit "+dev.commit(t))
		first, over = nextOf(t, out)
		for _, command := range first {
			t.Log("$ " + command + "\n" + m.must(t, "sh", "-c", command))
		}
		wants(t, m.must(t, "systemctl", "is-active", "perceptd", "perceptd.socket", "perceptd-admin.socket"),
			strings.Repeat("active\n", 3))
		status, err := m.run(t, "perceptctl", "status", "--json") // of the example, which grants nothing yet
		wants(t, status, `"version": "v1.2.3"`, `"ready": true`, "no [[grant]] is configured", `"tokens": []`)
		if exitOf(err) != 5 || strings.Count(status, `"trouble"`) != 1 {
			t.Errorf("%v\n%s", err, status)
		}
	})
	t.Run("serves", func(t *testing.T) {
		m.must(t, "useradd", "--no-create-home", "edge")
		m.write(t, "/etc/percept/config.toml", harness.SimulatedIdentities+grantForEdge)
		m.must(t, "systemctl", "restart", "perceptd")
		m.hasToken(t)
	})
	t.Run("keeps to what was built", func(t *testing.T) {
		main := filepath.Join(dev.tree, "cmd/perceptd/main.go")
		later := time.Now().Add(time.Minute)
		harness.Must(t, os.Chtimes(main, later, later))
		out, err := m.make(t, "install")
		if err == nil || !strings.Contains(out, "bin/perceptd is older than cmd/perceptd/main.go, and root has no Go") {
			t.Errorf("%v\n%s", err, out)
		}
		past := later.Add(-time.Hour)
		harness.Must(t, os.Chtimes(main, past, past))
		dev.record(t, "documents alone")
		out, err = m.make(t, "install")
		if err == nil || !strings.Contains(out, "bin/ is of another commit than the repository, and root has no Go") {
			t.Errorf("%v\n%s", err, out)
		}
	})
	t.Run("upgrades", func(t *testing.T) {
		pid := m.pid(t)
		dev.build(t, "v1.2.4")
		out := m.mustMake(t, "install")
		for _, command := range append(first[:len(first)-2:len(first)-2], over) {
			wants(t, out, "+ "+command+"\n")
		}
		wants(t, m.must(t, "perceptctl", "status", "--json"), `"version": "v1.2.4"`, `"fetches": 0`) // carried over
		if now := m.pid(t); now == pid || now == "0" {
			t.Errorf("main process %s, was %s", now, pid)
		}
		m.hasToken(t)
		m.must(t, "sh", "-c", over) // as it was printed for those that unpack a package
		m.hasToken(t)
	})
	t.Run("uninstalls", func(t *testing.T) {
		out := m.mustMake(t, "uninstall")
		wants(t, out, "stays: /etc/percept /var/lib/percept", "make uninstall PURGE=1", "userdel percept")
		if units := m.must(t, "systemctl", "list-units", "--all", "--plain", "--no-legend", "percept*"); units != "" {
			t.Errorf("units are left:\n%s", units)
		}
		for path := range strings.Lines(m.traces(t)) {
			if !strings.HasPrefix(path, "/etc/percept") && !strings.HasPrefix(path, "/var/lib/percept") {
				t.Errorf("left: %s", path)
			}
		}
	})
	t.Run("installs again over what stayed", func(t *testing.T) {
		again, _ := nextOf(t, m.mustMake(t, "install"))
		m.must(t, "sh", "-ec", strings.Join(again, "\n"))
		m.hasToken(t)
		m.write(t, "/etc/systemd/system/perceptd.service.d/azure-arc.conf", "[Service]\n")
	})
	t.Run("leaves nothing", func(t *testing.T) {
		out := m.mustMake(t, "uninstall", "PURGE=1")
		if now := m.traces(t); now != before {
			t.Errorf("left:\n%s", now)
		}
		next := false
		for line := range strings.Lines(out) {
			if command, found := strings.CutPrefix(line, "  "); found {
				m.must(t, "sh", "-c", command)
				next = true
			}
		}
		if out, err := m.run(t, "getent", "passwd", "percept"); !next || err == nil {
			t.Errorf("the user is left: %s", out)
		}
		if out, err := m.run(t, "getent", "group", "percept", "percept-admin"); err == nil {
			t.Errorf("groups are left: %s", out)
		}
		m.mustMake(t, "uninstall", "PURGE=1") // where nothing is installed
	})
}

// testDestination installs for a package, as an ordinary user, whose umask may be tight, and takes that away again.
func testDestination(t *testing.T, dev *developer) {
	destination := filepath.Join(dev.home, "package")
	out := dev.must(t, "sh", "-c", "umask 077; make install DESTDIR="+destination)
	nextOf(t, out)
	found := 0
	err := filepath.WalkDir(destination, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || path == destination {
			return err
		}
		info, err := entry.Info()
		want := fs.FileMode(0o644)
		if entry.IsDir() || filepath.Base(filepath.Dir(path)) == "bin" {
			want = 0o755
		}
		if err == nil && info.Mode().Perm() != want {
			t.Errorf("%s has mode %v", path, info.Mode())
		}
		found++
		return err
	})
	if err != nil || found < 20 {
		t.Errorf("%d files and folders, %v", found, err)
	}
	dev.must(t, "make", "uninstall", "DESTDIR="+destination)
	left := dev.must(t, "find", destination, "-type", "f")
	if left != "" {
		t.Errorf("left:\n%s", left)
	}
}

// developer is an ordinary user of this machine, without a name, who has a repository of their own and Go's caches.
type developer struct{ home, tree string }

const developerID = 54321

func newDeveloper(t *testing.T) *developer {
	t.Helper()
	home := t.TempDir()
	harness.Must(t, os.Chmod(filepath.Dir(home), 0o755)) // which is for its owner alone
	dev := &developer{home: home, tree: filepath.Join(home, "perceptd")}
	for kept, to := range map[string]string{"GOCACHE": ".cache/go-build", "GOMODCACHE": "go/pkg/mod"} {
		from := strings.TrimSpace(mustRun(t, "go", "env", kept))
		to = filepath.Join(home, to)
		harness.Must(t, os.MkdirAll(filepath.Dir(to), 0o755))
		if out, err := exec.Command("cp", "-al", from, to).CombinedOutput(); err != nil { // another file system
			t.Logf("%s", out)
			mustRun(t, "sh", "-c", `rm -rf "$1" && cp -a "$0" "$1"`, from, to)
		}
	}
	repository, err := filepath.Abs("..")
	harness.Must(t, err)
	mustRun(t, "sh", "-ec", `mkdir "$1" && cd "$0" && git ls-files -z --cached --others --exclude-standard |
		xargs -0 cp --parents -t "$1"`, repository, dev.tree)
	mustRun(t, "find", home, "-type", "d", "-exec", "chown", fmt.Sprint(developerID, ":", developerID), "{}", "+")
	mustRun(t, "chown", "-R", fmt.Sprint(developerID, ":", developerID), dev.tree)
	dev.must(t, "git", "init", "--quiet")
	dev.must(t, "git", "add", "--all")
	return dev
}

// run runs a command as the developer in the repository, with Go and little else in the environment.
func (d *developer) run(command ...string) (string, error) {
	goes, err := exec.LookPath("go")
	if err != nil {
		return "", err
	}
	c := exec.Command(command[0], command[1:]...)
	c.Dir = d.tree
	c.Env = []string{"HOME=" + d.home, "PATH=" + filepath.Dir(goes) + ":/usr/bin:/bin", "GOTOOLCHAIN=local",
		"GOPROXY=off"}
	c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: developerID, Gid: developerID}}
	out, err := c.CombinedOutput()
	return string(out), err
}

func (d *developer) must(t *testing.T, command ...string) string {
	t.Helper()
	out, err := d.run(command...)
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(command, " "), err, out)
	}
	return out
}

// build makes a version of the developer's and builds it.
func (d *developer) build(t *testing.T, version string) {
	t.Helper()
	d.record(t, version)
	d.must(t, "git", "tag", version)
	d.must(t, "make", "build")
}

// record makes a commit.
func (d *developer) record(t *testing.T, message string) {
	t.Helper()
	d.must(t, "git", "-c", "user.name=d", "-c", "user.email=d@localhost", "commit", "--quiet", "--allow-empty", "-m",
		message)
}

func (d *developer) commit(t *testing.T) string {
	t.Helper()
	return strings.TrimSpace(d.must(t, "git", "rev-parse", "--short=12", "HEAD"))
}

// make runs make on the device as root, as sudo does: with a PATH and nothing else.
func (m *machine) make(t *testing.T, arguments ...string) (string, error) {
	t.Helper()
	return m.run(t, append([]string{"env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "make", "-C", "/src",
		"--no-print-directory"}, arguments...)...)
}

func (m *machine) mustMake(t *testing.T, arguments ...string) string {
	t.Helper()
	out, err := m.make(t, arguments...)
	if err != nil {
		t.Fatalf("make %s: %v\n%s", strings.Join(arguments, " "), err, out)
	}
	t.Logf("\n# make %s\n%s", strings.Join(arguments, " "), out)
	return out
}

// traces lists what on the device has perceptd's name.
func (m *machine) traces(t *testing.T) string {
	t.Helper()
	return m.must(t, "sh", "-c", `find / /run -xdev -path /src -prune -o -path /var/log -prune \
		-o -name "*percept*" -print | sort -u`)
}

// hasToken has a local service fetch a token.
func (m *machine) hasToken(t *testing.T) {
	t.Helper()
	if out, err := m.as(t, "edge", "perceptctl", "token", "--resource", askVault, "--short"); err != nil {
		t.Errorf("no token: %v %s", err, out)
	}
}
