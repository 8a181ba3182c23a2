//go:build system

package systemd_test

import (
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestSystemClock looks whether the daemon, as shipped, has the kernel's word on the clock. The containers share this
// machine's clock, which no test sets: what the kernel says is read here and there, and that it says the other is
// played by a drop-in of the unit that asks it.
func TestSystemClock(t *testing.T) {
	for _, release := range []string{"bullseye", "bookworm", "trixie"} {
		t.Run(release, func(t *testing.T) {
			// A container that may not set the clock may not read its state either, unless that is said. A device may.
			m := boot(t, kind{release: release, args: []string{"--system-call-filter=adjtimex"}})
			install(t, m)
			m.must(t, "systemctl", "enable", "--now", "perceptd.service")
			var state unix.Timex
			if _, err := unix.Adjtimex(&state); err != nil {
				t.Fatal(err)
			}
			known := map[bool]string{true: `"known":true,"by":"kernel"`, false: `"known":false,"by":"kernel"`}
			says := state.Status&unix.STA_UNSYNC == 0
			wants(t, compact(m.must(t, "perceptctl", "status", "--json")), `"clock":{`+known[says])
			wants(t, m.doctor(t), "synchronised, says the kernel")

			other := map[bool]string{true: "not synchronised", false: "synchronised"}[says]
			m.write(t, "/etc/systemd/system/perceptd-clock@.service.d/other.conf",
				"[Service]\nExecStart=\nExecStart=/bin/echo "+other+"\n")
			m.must(t, "systemctl", "daemon-reload")
			m.must(t, "systemctl", "restart", "perceptd") // a start asks at once
			wants(t, compact(m.must(t, "perceptctl", "status", "--json")), `"clock":{`+known[!says])

			// Nobody answers: nothing is known, and everything is served.
			m.must(t, "systemctl", "stop", "perceptd-clock.socket")
			m.must(t, "systemctl", "mask", "--runtime", "perceptd-clock.socket")
			m.must(t, "systemctl", "restart", "perceptd")
			if status := compact(m.must(t, "perceptctl", "status", "--json")); strings.Contains(status,
				`"by":"kernel"`) {
				t.Errorf("nobody can be asked, and the kernel is told to say so: %s", status)
			}
			wants(t, m.doctor(t), "nobody can be asked")
			if out, err := m.as(t, "edge", "perceptctl", "token", "--resource", "https://vault.azure.net",
				"--short"); err != nil {
				t.Errorf("no token: %v %s", err, out)
			}
			if out, err := m.as(t, "edge", "sh", "-c",
				"exec 3<>/dev/null; perceptctl clock; test -w /run/percept/clock.sock"); err == nil {
				t.Errorf("any user may have systemd start processes: %s", out)
			}
			failed, _ := m.run(t, "systemctl", "--failed", "--plain", "--no-legend")
			if strings.Contains(failed, "perceptd-clock") {
				t.Errorf("failed units are left: %s", failed)
			}
			if release != "bullseye" { // LogLevelMax= speaks for systemd's own lines since 247.6 or so
				journal, _ := m.run(t, "journalctl", "--no-pager", "-o", "cat", "-u", "perceptd-clock@*")
				if lines := strings.Count(journal, "\n"); lines > 4 {
					t.Errorf("each question is noted in the journal:\n%s", journal)
				}
			}
		})
	}
}

func compact(s string) string {
	return strings.Join(strings.FieldsFunc(s, func(r rune) bool { return r == '\n' || r == ' ' }), "")
}

// doctor returns what it says, which here is also that an administrator's command comes from outside of the container.
func (m *machine) doctor(t *testing.T) string {
	t.Helper()
	said, err := m.run(t, "perceptctl", "doctor")
	if status := exitOf(err); status != 0 && status != 5 {
		t.Errorf("doctor: %v", err)
	}
	return said
}
