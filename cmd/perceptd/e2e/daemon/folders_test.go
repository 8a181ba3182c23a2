package daemon

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"perceptd/agent/api"
	"perceptd/agent/socket"
	"perceptd/cmd/perceptd/e2e/harness"
)

// nobody is the user who runs the daemon in these tests, as percept does on a device.
const nobody = 65534

// earlyFolder makes a module's folder as root, as a container engine does, and returns the path of the socket in it as
// its container sees it.
func earlyFolder(t *testing.T, d *harness.Daemon, module string) string {
	t.Helper()
	modules := filepath.Join(d.Dir, api.ModulesDirName)
	must(t, os.MkdirAll(modules, 0o700))
	must(t, os.Chown(modules, nobody, nobody))
	must(t, os.Mkdir(filepath.Join(modules, module), 0o755))
	return mount(t, filepath.Join(modules, module))
}

// giveAsRoot does what systemd and perceptctl module-folders do at perceptd-modules.socket.
func giveAsRoot(t *testing.T, d *harness.Daemon) {
	t.Helper()
	path := filepath.Join(d.Dir, api.FoldersSocketName)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	must(t, err)
	must(t, os.Chown(path, nobody, nobody))
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			given, _ := socket.GiveFolders(filepath.Join(d.Dir, api.ModulesDirName), api.TokenSocketName)
			for _, g := range given {
				fmt.Fprintln(conn, g)
			}
			_ = conn.Close()
		}
	}()
}

// TestFoldersOfAnEngine: modules whose containers were started before perceptd, or before their module was configured,
// get tokens in the folder that their engine made, without a person.
func TestFoldersOfAnEngine(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("needs root: an engine makes folders as root")
	}
	gets := func(d *harness.Daemon, at string) bool {
		status, _, err := d.Get(at, harness.VaultToken)
		return err == nil && status == 200
	}
	config := func(modules ...string) string {
		return strings.Replace(harness.SimulatedFor(modules...), "{ uid = 0 }", "{ uid = 65534 }", 1)
	}
	t.Run("before perceptd", func(t *testing.T) {
		t.Parallel()
		d := harness.NewDaemon(t, config("vision", "speech"))
		vision := earlyFolder(t, d, "vision")
		must(t, os.Mkdir(d.Module("vision"), 0o755)) // as where the socket itself is mounted
		giveAsRoot(t, d)
		d.Process = harness.Begin(t, nil, nobodys(t, d))
		d.AwaitHealth(t)
		if !gets(d, vision) || !gets(d, d.Module("speech")) {
			t.Errorf("no token: %q", d.Status(t).Trouble)
		}
		other := earlyFolder(t, d, "other")
		if status, body := d.Reload(t, config("vision", "speech", "other")); status != 200 || !gets(d, other) {
			t.Errorf("started before the reload: %d %s %q", status, body, d.Status(t).Trouble)
		}
		if trouble := d.Status(t).Trouble; len(trouble) != 0 {
			t.Errorf("trouble %q", trouble)
		}
		if !strings.Contains(d.Text(), "its engine made the module's folder: it is perceptd's now") {
			t.Error("the log does not say so")
		}
	})
	t.Run("root comes later", func(t *testing.T) {
		t.Parallel()
		d := harness.NewDaemon(t, config("vision"))
		vision := earlyFolder(t, d, "vision")
		manager, _ := harness.ListenAsSystemd(t)
		must(t, os.Chmod(filepath.Dir(manager), 0o755))
		must(t, os.Chmod(manager, 0o666))
		d.Process = harness.Begin(t, []string{"NOTIFY_SOCKET=" + manager, "WATCHDOG_USEC=200000"}, nobodys(t, d))
		d.AwaitHealth(t)
		trouble := strings.Join(d.Status(t).Trouble, "\n")
		for _, part := range []string{"module vision has no socket", "belongs to user 0", "started before perceptd",
			"sudo perceptctl module-folders"} {
			if !strings.Contains(trouble, part) {
				t.Errorf("trouble %q says nothing of %q", trouble, part)
			}
		}
		giveAsRoot(t, d)
		harness.Until(t, "a token", d.Ended, func() bool { return gets(d, vision) })
		if trouble := d.Status(t).Trouble; len(trouble) != 0 {
			t.Errorf("trouble %q", trouble)
		}
		if n := strings.Count(d.Text(), "a module has no socket"); n != 1 {
			t.Errorf("%d lines of the same trouble", n)
		}
	})
	t.Run("in use", func(t *testing.T) {
		t.Parallel()
		d := harness.NewDaemon(t, config("vision", "speech"))
		earlyFolder(t, d, "vision")
		must(t, os.WriteFile(filepath.Join(filepath.Dir(d.Module("vision")), "data"), nil, 0o600))
		giveAsRoot(t, d)
		d.Process = harness.Begin(t, nil, nobodys(t, d))
		d.AwaitHealth(t)
		trouble := strings.Join(d.Status(t).Trouble, "\n")
		for _, part := range []string{"module vision has no socket", `it holds "data"`,
			"stop its container, remove the folder"} {
			if !strings.Contains(trouble, part) {
				t.Errorf("trouble %q says nothing of %q", trouble, part)
			}
		}
		if !gets(d, d.Module("speech")) {
			t.Error("the other module gets no token")
		}
	})
}
