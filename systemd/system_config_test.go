//go:build system

package systemd_test

import (
	"strings"
	"testing"

	"perceptd/cmd/perceptd/e2e/harness"
)

const (
	mainFile   = "/etc/percept/config.toml"
	grantsFile = "/etc/percept/config.d/grants.toml"
	copyFile   = "/var/lib/percept-config/last.json"
)

// TestSystemConfig breaks the configuration of a device: the daemon goes on with the one last in force, from the copy
// that root keeps, and with no other one.
func TestSystemConfig(t *testing.T) {
	m := boot(t, kind{release: "bookworm"})
	install(t, m)
	m.write(t, mainFile, harness.SimulatedIdentities)
	m.write(t, grantsFile, moduleVision+grantForEdge+grantFor("root"))
	m.must(t, "systemctl", "enable", "--now", "perceptd.service")
	m.gets(t, "root")
	m.awaitCopy(t)
	m.must(t, "cp", "-a", copyFile, "/root/older.json")

	t.Run("a grant that was removed stays gone", func(t *testing.T) {
		m.write(t, grantsFile, moduleVision+grantForEdge)
		m.must(t, "perceptctl", "reload")
		m.awaitCopy(t)
		m.write(t, grantsFile, moduleVision+grantForEdge+grantFor("root")+"[[grant\n")
		m.must(t, "systemctl", "restart", "perceptd")
		m.goesOn(t, "grants.toml:")
	})
	t.Run("after a reboot", func(t *testing.T) {
		m.reboot(t, "systemctl", "reboot")
		m.goesOn(t, "grants.toml:")
		m.until(t, "the module's socket", func() bool {
			_, err := m.run(t, "test", "-S", visionSocket)
			return err == nil
		})
	})
	t.Run("a file that percept cannot read", func(t *testing.T) {
		m.write(t, grantsFile, moduleVision+grantForEdge+grantFor("root"))
		m.must(t, "chmod", "0600", grantsFile)
		m.must(t, "systemctl", "restart", "perceptd")
		m.goesOn(t, "chmod 644 "+grantsFile)
		m.must(t, "chmod", "0644", grantsFile)
	})
	t.Run("a file that has lost what it said", func(t *testing.T) {
		for _, emptied := range []string{grantsFile, mainFile} {
			m.must(t, "cp", "-a", emptied, "/root/whole.toml")
			m.must(t, "truncate", "-s", "0", emptied)
			m.must(t, "systemctl", "restart", "perceptd")
			m.goesOn(t, emptied+": nothing is in it")
			m.must(t, "cp", "-a", "/root/whole.toml", emptied)
		}
	})
	t.Run("a refused reload says what a restart would do", func(t *testing.T) {
		m.write(t, grantsFile, moduleVision+grantForEdge+"[[grant\n")
		out, err := m.run(t, "perceptctl", "reload")
		if said := inLine(out); err == nil || !strings.Contains(said, "grants.toml:") ||
			!strings.Contains(said, "a restart would go on with the last configuration") {
			t.Errorf("%v %s", err, out)
		}
	})
	t.Run("a mended file heals", func(t *testing.T) {
		m.write(t, grantsFile, moduleVision+grantForEdge)
		m.must(t, "perceptctl", "reload")
		m.gets(t, "edge")
		m.awaitCopy(t)
		if out, err := m.run(t, "perceptctl", "status"); err != nil {
			t.Errorf("%v %s", err, out)
		}
	})
	t.Run("no other copy goes on", func(t *testing.T) { testOtherCopies(t, m) })
	t.Run("a source that is not there", func(t *testing.T) {
		m.write(t, mainFile, strings.Replace(harness.SimulatedIdentities, `kind = "simulated"`, `endpoint = "arc"`, 1))
		m.must(t, "systemctl", "restart", "perceptd")
		out, err := m.as(t, "edge", "perceptctl", "token", "--resource", askVault, "--short")
		if said := inLine(out); err == nil ||
			!strings.Contains(said, "endpoint arc cannot be used") {
			t.Errorf("%v %s", err, out)
		}
	})
}

// testOtherCopies puts copies in the place of the one of what was in force last. With none that counts, no
// configuration is in force, and each request says so, until the file is mended.
func testOtherCopies(t *testing.T, m *machine) {
	m.must(t, "cp", "-a", copyFile, "/root/right.json")
	m.must(t, "systemctl", "mask", "--runtime", "--now", "perceptd-config.path", "perceptd-config.service")
	for name, row := range map[string]struct{ put, says string }{
		"an older one": {"cp -a /root/older.json " + copyFile, "not of the one last in force"},
		"another device's": {`sed -i 's/"machine":"[0-9a-f]*"/"machine":"` + strings.Repeat("a", 32) + `"/' ` +
			copyFile,
			"of another device"},
		"percept's own": {"chown percept " + copyFile, "its owner, user percept"},
		"none":          {"rm " + copyFile, "there is no copy"},
	} {
		t.Run(name, func(t *testing.T) {
			m.must(t, "cp", "-a", "/root/right.json", copyFile)
			m.must(t, "sh", "-c", row.put)
			m.write(t, grantsFile, "[[grant\n")
			m.must(t, "systemctl", "restart", "perceptd")
			for _, user := range []string{"edge", "root"} {
				out, err := m.as(t, user, "perceptctl", "token", "--resource", askVault, "--short")
				if err == nil || !strings.Contains(inLine(out), "no configuration is in force") {
					t.Errorf("%s: %v %s", user, err, out)
				}
			}
			out, err := m.run(t, "perceptctl", "status")
			if said := inLine(out); exitOf(err) != 5 || !strings.Contains(said, row.says) {
				t.Errorf("status: %v %s", err, out)
			}
			m.write(t, grantsFile, moduleVision+grantForEdge)
			m.must(t, "perceptctl", "reload")
			m.gets(t, "edge")
		})
	}
	t.Run("killed before root has copied", func(t *testing.T) {
		m.must(t, "cp", "-a", "/root/older.json", copyFile) // with root's grant
		m.must(t, "perceptctl", "reload")
		m.write(t, grantsFile, "[[grant\n")
		m.another(t, func() { m.must(t, "systemctl", "kill", "-s", "KILL", "--kill-who=main", "perceptd") })
		m.until(t, "an answer", func() bool {
			out, err := m.as(t, "root", "perceptctl", "token", "--resource", askVault, "--short")
			return err != nil && strings.Contains(inLine(out), "no configuration is in force")
		})
	})
	m.write(t, grantsFile, moduleVision+grantForEdge)
	m.must(t, "systemctl", "unmask", "--runtime", "perceptd-config.path", "perceptd-config.service")
	m.must(t, "perceptctl", "reload")
	m.must(t, "systemctl", "reload", "perceptd") // has the copy made where the path unit is not there
	m.awaitCopy(t)
}

// inLine is a text without its line ends.
func inLine(text string) string { return strings.Join(strings.Fields(text), " ") }

// gets has a user be given a token.
func (m *machine) gets(t *testing.T, user string) {
	t.Helper()
	m.until(t, "a token for "+user, func() bool {
		_, err := m.as(t, user, "perceptctl", "token", "--resource", askVault, "--short")
		return err == nil
	})
}

// awaitCopy waits until root's copy is of what the daemon has recorded.
func (m *machine) awaitCopy(t *testing.T) {
	t.Helper()
	m.until(t, "root's copy", func() bool {
		_, err := m.run(t, "sh", "-c",
			`grep -qF "$(grep -o '"sha256":"[0-9a-f]*"' /var/lib/percept/config-in-force.json)" `+copyFile)
		return err == nil
	})
	wants(t, m.must(t, "stat", "-c", "%a %U:%G", copyFile, "/var/lib/percept-config"),
		"640 root:percept", "750 root:percept")
}

// goesOn checks that the last configuration is in force, and that all places say so, and why.
func (m *machine) goesOn(t *testing.T, why string) {
	t.Helper()
	m.gets(t, "edge")
	if out, err := m.as(t, "root", "perceptctl", "token", "--resource", askVault, "--short"); err == nil ||
		!strings.Contains(inLine(out), "no [[grant]]") {
		t.Errorf("a grant that was removed is in force: %v %s", err, out)
	}
	out, err := m.run(t, "perceptctl", "status")
	if said := inLine(out); exitOf(err) != 5 || !strings.Contains(said, why) ||
		!strings.Contains(said, "the last configuration goes on") || !strings.Contains(said, "still in force") {
		t.Errorf("status: %v %s", err, out)
	}
	m.until(t, "systemctl status", func() bool {
		return strings.Contains(m.must(t, "systemctl", "show", "perceptd", "-p", "StatusText"),
			"the last configuration goes on")
	})
	wants(t, m.must(t, "journalctl", "--no-pager", "-u", "perceptd", "-n", "200"), "the last configuration goes on")
}
