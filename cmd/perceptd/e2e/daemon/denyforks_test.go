package daemon

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"perceptd/agent/api"
	"perceptd/cmd/perceptd/e2e/harness"
)

func denyName(t *testing.T, d *harness.Daemon, name string) {
	t.Helper()
	if status, body, err := d.Ask(d.Admin(), "POST", api.PathDeny, `{"module":"`+name+`"}`); status != 200 {
		t.Fatalf("%d %s %v", status, body, err)
	}
}

// The state folder's partition is not mounted at one start, and an older record is beneath. Rules that are set
// meanwhile are in force beside those on the partition when it is there again, whichever of the two has more.
func TestDenyRulesOfAFolderThatComesBack(t *testing.T) {
	t.Parallel()
	harness.Binary(t, "perceptd")
	for name, row := range map[string]struct{ onDisk, beneath []string }{
		"more was set beneath":     {[]string{"vision"}, []string{"a", "b", "c"}},
		"more was set on the disk": {[]string{"a", "b", "c"}, []string{"vision"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			held := newFDStore(t)
			d := harness.NewDaemon(t, harness.SimulatedFor("vision"))
			held.start(t, d)
			d.AwaitReady(t)
			denyName(t, d, "other")
			d.Stop(t)
			held.clear()
			beneath, real := d.StateDir()+".beneath", d.StateDir()+".real"
			if out, err := exec.Command("cp", "-a", d.StateDir(), beneath).CombinedOutput(); err != nil {
				t.Fatalf("%s %v", out, err)
			}
			held.start(t, d)
			d.AwaitHealth(t)
			for _, module := range row.onDisk {
				denyName(t, d, module)
			}
			d.Stop(t) // a reboot
			held.clear()
			must(t, os.Rename(d.StateDir(), real))
			must(t, os.Rename(beneath, d.StateDir()))
			held.start(t, d)
			d.AwaitHealth(t)
			for _, module := range row.beneath {
				denyName(t, d, module)
			}
			must(t, d.Cmd.Process.Kill())
			<-d.Ended
			must(t, os.Rename(d.StateDir(), beneath))
			must(t, os.Rename(real, d.StateDir()))
			held.start(t, d)
			d.AwaitHealth(t)
			denies(t, "acknowledged and on the disk", d, api.CodeDenied, "")
			if rules := d.Status(t).Deny.Rules; len(rules) != 5 {
				t.Errorf("%+v", rules)
			}
			d.Stop(t)
		})
	}
}

// An older copy of both files of deny rules is put back while the daemon is stopped, and all else is as it was left:
// the record counts as lost.
func TestOlderDenyRulesPutBack(t *testing.T) {
	t.Parallel()
	d := harness.LaunchDaemon(t, harness.SimulatedFor("vision"))
	d.AwaitReady(t)
	denyName(t, d, "other")
	old := make(map[string][]byte)
	for _, path := range denyFiles(d) {
		text, err := os.ReadFile(path)
		must(t, err)
		old[path] = text
	}
	denyVision(t, d)
	for range 2 { // restarts without changes lose nothing
		d.Stop(t)
		d = d.Restart(t)
		d.AwaitHealth(t)
		denies(t, "after a restart", d, api.CodeDenied, "")
	}
	d.Stop(t)
	for path, text := range old {
		must(t, os.WriteFile(path, text, 0o600))
	}
	d = d.Restart(t)
	d.AwaitHealth(t)
	denies(t, "an older copy", d, api.CodeDenyRulesLost, api.CodeDenyRulesLost)
	if s := d.Status(t); s.Deny == nil || !strings.Contains(s.Deny.Lost, "older") || len(s.Trouble) != 1 {
		t.Errorf("%+v, trouble %q", s.Deny, s.Trouble)
	}
	d.Stop(t)
}

// The state folder's partition is mounted over the folder that the daemon began with. A rule that is set then does not
// overwrite what is on record there: both are in force, at once and after a restart.
func TestDenyRulesOfAFolderMountedLate(t *testing.T) {
	t.Parallel()
	d := harness.LaunchDaemon(t, harness.SimulatedFor("vision"))
	d.AwaitReady(t)
	denyVision(t, d)
	d.Stop(t)
	must(t, os.Rename(d.StateDir(), d.StateDir()+".real"))
	d = d.Restart(t)
	d.AwaitHealth(t)
	denies(t, "nothing beneath", d, "", "")
	must(t, os.Rename(d.StateDir(), d.StateDir()+".beneath"))
	must(t, os.Rename(d.StateDir()+".real", d.StateDir()))
	denyName(t, d, "other")
	denies(t, "mounted late", d, api.CodeDenied, "")
	d.Stop(t)
	d = d.Restart(t)
	d.AwaitHealth(t)
	denies(t, "after a restart", d, api.CodeDenied, "")
	if rules := d.Status(t).Deny.Rules; len(rules) != 2 {
		t.Errorf("%+v", rules)
	}
	d.Stop(t)
}
