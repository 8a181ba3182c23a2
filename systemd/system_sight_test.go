//go:build system

package systemd_test

import (
	"strings"
	"testing"

	"perceptd/cmd/perceptd/e2e/harness"
)

// sightConfig has a grant of each kind that surroundings could have somebody else be taken for.
const sightConfig = harness.SimulatedIdentities + moduleVision + `
[[grant]]
caller = { unit = "camera.service" }
identity = "vision"
resources = ["https://vault.azure.net"]

[[grant]]
caller = { user = "nobody" }
identity = "vision"
resources = ["https://vault.azure.net"]

[[grant]]
caller = { group = "nogroup" }
identity = "device"
resources = ["https://storage.azure.com"]
` + grantForEdge

// asker is a service that asks, and what comes of it.
type asker struct {
	unit, user, resource string
	want                 string // identity; empty: denied
}

func (m *machine) ask(t *testing.T, when string, all []asker) {
	t.Helper()
	for _, a := range all {
		out, err := m.inUnit(t, a.unit, a.user, nil, "perceptctl", "token", "--resource", a.resource, "--json")
		switch {
		case a.want != "" && (err != nil || !strings.Contains(out, `"identity": "`+a.want+`"`)):
			t.Errorf("%s, %s of %s is not served: %v %s", when, a.unit, a.user, err, out)
		case a.want == "" && (exitOf(err) != 4 || strings.Contains(out, "eyJ")):
			t.Errorf("%s, %s of %s is not denied %s: %v %s", when, a.unit, a.user, a.resource, err, out)
		}
	}
}

// testSight takes away from the daemon what it sees its callers by. It says so, serves whom it knows all the same, and
// takes nobody for somebody else.
func testSight(t *testing.T, m *machine) {
	const drop = "/etc/systemd/system/perceptd.service.d/sight.conf"
	m.configure(t, sightConfig)
	restart := func() {
		m.must(t, "systemctl", "daemon-reload")
		m.must(t, "systemctl", "restart", "perceptd")
	}
	defer func() {
		m.must(t, "rm", "-f", drop)
		m.write(t, "/etc/percept/config.toml", config)
		restart()
	}()
	all := []asker{
		{"camera.service", "edge", askVault, "vision"},
		{"other.service", "edge", askVault, "device"},
		{"other.service", "nobody", askVault, "vision"},
		{"other.service", "technician", askVault, ""},
		{"other.service", "technician", askStorage, ""},
	}
	m.ask(t, "seeing all", all)
	for _, row := range []struct {
		key, why string
		callers  []asker
	}{
		{"ProtectProc=invisible", "ProtectProc=", []asker{ // whose unit is told by /proc
			{"camera.service", "edge", askVault, ""},
			{"camera.service", "nobody", askVault, ""},
			{"other.service", "edge", askVault, ""},
			{"other.service", "nobody", askVault, ""},
			{"other.service", "technician", askStorage, ""},
		}},
		{"PrivateUsers=yes", "user namespace", []asker{ // in which all others look like nobody of nogroup
			{"other.service", "edge", askVault, ""},
			{"other.service", "technician", askVault, ""},
			{"other.service", "technician", askStorage, ""},
		}},
	} {
		t.Run("with "+row.key, func(t *testing.T) {
			m.write(t, drop, "[Service]\n"+row.key+"\n")
			restart()
			m.ask(t, row.key, row.callers)
			out, err := m.inUnit(t, "other.service", "technician", nil, "perceptctl", "whoami")
			if exitOf(err) != 4 || !strings.Contains(out, "not proved") {
				t.Errorf("whoami: %v %s", err, out)
			}
			// Root is root in every one of these, and a module's socket needs nothing but itself.
			out = m.must(t, "perceptctl", "--socket", "/run/percept/modules/vision/token.sock", "token", "--resource",
				askVault, "--json")
			wants(t, out, `"identity": "vision"`)

			wants(t, m.must(t, "systemctl", "show", "perceptd", "-p", "StatusText"), "trouble: ", "cannot be told")
			status, err := m.run(t, "perceptctl", "status")
			if exitOf(err) != 5 {
				t.Errorf("the status is in no trouble: %v", err)
			}
			wants(t, strings.Join(strings.Fields(status), " "), row.why, "who cannot be proved is denied")
			invocation := strings.TrimSpace(m.must(t, "systemctl", "show", "perceptd", "-p", "InvocationID", "--value"))
			wants(t, m.must(t, "journalctl", "_SYSTEMD_INVOCATION_ID="+invocation, "-o", "cat", "--no-pager"),
				"callers cannot be proved", "caller not proved")
		})
	}
	m.must(t, "rm", drop)
	restart()
	m.ask(t, "seeing all again", all)
	if out := m.must(t, "systemctl", "show", "perceptd", "-p", "StatusText"); strings.Contains(out, "trouble") {
		t.Error(out)
	}
}
