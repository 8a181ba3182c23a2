package daemon

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"perceptd/agent/api"
	"perceptd/cmd/perceptd/e2e/harness"
)

// denies checks what the module vision, and another caller, get.
func denies(t *testing.T, when string, d *harness.Daemon, module, other api.Code) {
	t.Helper()
	for _, row := range []struct {
		socket string
		want   api.Code
	}{{d.Module("vision"), module}, {d.Token(), other}} {
		status, body, err := d.Get(row.socket, harness.VaultToken)
		if err != nil || row.want == "" && status != 200 || row.want != "" &&
			(status != api.StatusOf[row.want] || !strings.Contains(body, string(row.want))) {
			t.Errorf("%s: on %s %d %s %v, want %q", when, filepath.Base(row.socket), status, body, err, row.want)
		}
	}
}

func denyVision(t *testing.T, d *harness.Daemon) {
	t.Helper()
	if status, body, err := d.Ask(d.Admin(), "POST", api.PathDeny, `{"module":"vision"}`); status != 200 {
		t.Fatalf("%d %s %v", status, body, err)
	}
}

func denyFiles(d *harness.Daemon) []string {
	return []string{filepath.Join(d.StateDir(), "deny-rules.json"),
		filepath.Join(d.StateDir(), "deny-rules.copy.json")}
}

// A rule that was acknowledged outlives a crash and a stop, with systemd and without.
func TestDenyRulesOutliveTheDaemon(t *testing.T) {
	t.Parallel()
	harness.Binary(t, "perceptd")
	held := newFDStore(t)
	d := harness.NewDaemon(t, harness.SimulatedFor("vision"))
	held.start(t, d)
	d.AwaitHealth(t)
	denies(t, "at first", d, "", "")
	denyVision(t, d)
	for _, end := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM, syscall.SIGKILL} {
		must(t, d.Cmd.Process.Signal(end))
		<-d.Ended
		held.start(t, d)
		d.AwaitHealth(t)
		denies(t, "with systemd, after "+end.String(), d, api.CodeDenied, "")
	}
	for _, path := range denyFiles(d) { // what systemd holds is as good
		must(t, os.Remove(path))
	}
	must(t, d.Cmd.Process.Kill())
	<-d.Ended
	held.start(t, d)
	d.AwaitHealth(t)
	denies(t, "without its files", d, api.CodeDenied, "")
	harness.Until(t, "the files to be written anew", d.Ended, func() bool {
		_, err := os.Stat(denyFiles(d)[0])
		return err == nil
	})
	d.Stop(t)
	held.clear()
	held.start(t, d)
	d.AwaitHealth(t)
	denies(t, "after a stop, with which systemd drops what it holds", d, api.CodeDenied, "")
}

// Where both files are spoilt, or gone, nobody gets a token, over restarts too, until root says so. One spoilt file
// does no harm, and a device that never had a rule serves.
func TestLostDenyRules(t *testing.T) {
	t.Parallel()
	for name, row := range map[string]struct {
		strike func(t *testing.T, files []string)
		lost   bool
	}{
		"one is all zeros": {func(t *testing.T, files []string) { must(t, zero(files[1])) }, false},
		"one is gone":      {func(t *testing.T, files []string) { must(t, os.Remove(files[0])) }, false},
		"both are all zeros": {func(t *testing.T, files []string) {
			must(t, zero(files[0]))
			must(t, zero(files[1]))
		}, true},
		"both are gone": {func(t *testing.T, files []string) {
			must(t, os.Remove(files[0]))
			must(t, os.Remove(files[1]))
		}, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := harness.LaunchDaemon(t, harness.SimulatedFor("vision"))
			d.AwaitReady(t)
			denyVision(t, d)
			d.Stop(t)
			row.strike(t, denyFiles(d))
			for range 2 {
				d = d.Restart(t)
				d.AwaitHealth(t)
				if !row.lost {
					denies(t, name, d, api.CodeDenied, "")
					d.Stop(t)
					continue
				}
				denies(t, name, d, api.CodeDenyRulesLost, api.CodeDenyRulesLost)
				s := d.Status(t)
				if s.Deny == nil || s.Deny.Lost == "" || !strings.Contains(s.Deny.Mend, "deny forget-lost") ||
					len(s.Trouble) != 1 || !strings.Contains(s.Trouble[0], s.Deny.Lost) {
					t.Errorf("%+v, trouble %q", s.Deny, s.Trouble)
				}
				d.Stop(t)
			}
			if !row.lost || os.Getuid() != 0 {
				return
			}
			d = d.Restart(t)
			if out, err := d.Tool(t, "deny", "forget-lost"); err != nil {
				t.Fatalf("%s %v", out, err)
			}
			denies(t, "given up", d, "", "")
			d.Stop(t)
			d = d.Restart(t)
			denies(t, "given up, and started again", d, "", "")
		})
	}
}

// A record that cannot be read now denies everything until it can be read, and then what is on it.
func TestUnreadDenyRules(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("files are covered by mounts: run it as root")
	}
	d := harness.LaunchDaemon(t, harness.SimulatedFor("vision"))
	d.AwaitReady(t)
	denyVision(t, d)
	d.Stop(t)
	for _, path := range denyFiles(d) {
		must(t, unread(path))
		t.Cleanup(func() { _ = uncover(path) })
	}
	d = d.Restart(t)
	d.AwaitHealth(t)
	denies(t, "EIO", d, api.CodeDenyRulesLost, api.CodeDenyRulesLost)
	for _, path := range denyFiles(d) {
		must(t, uncover(path))
	}
	harness.Until(t, "the record to be read", d.Ended, func() bool { return d.Status(t).Deny.Lost == "" })
	denies(t, "read after all", d, api.CodeDenied, "")
}
