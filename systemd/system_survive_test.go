//go:build system

package systemd_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// TestSystemSurvival has clients ask without pause through all that ends a daemon in the field, on a back end of its
// own that counts its calls.
func TestSystemSurvival(t *testing.T) {
	for _, release := range []string{"bullseye", "bookworm", "trixie"} { // systemd 247, 252, 257
		t.Run(release, func(t *testing.T) {
			testSurvival(t, boot(t, kind{release: release, args: []string{"--system-call-filter=memfd_secret"}}),
				release != "bullseye")
		})
	}
}

const survivalConfig = `[source]
kind = "managed-identity"
endpoint = "app-service"

[[identity]]
name = "device"
default = true

[[grant]]
caller = { user = "edge" }
identity = "device"
resources = ["https://vault.azure.net", "https://storage.azure.com"]
prefetch = true
`

const (
	simulatorURL = "http://127.0.0.1:40441"
	tokenFile    = "/var/lib/percept/tokens.sealed"
)

// testSurvival is told whether the release knows memory that not even root can read.
func testSurvival(t *testing.T, m *machine, secret bool) {
	install(t, m)
	m.startSimulator(t)
	m.write(t, "/etc/percept/config.toml", survivalConfig)
	m.write(t, "/etc/systemd/system/perceptd.service.d/backend.conf", "[Service]\nEnvironmentFile=/etc/backend.env\n")
	m.write(t, "/etc/percept/cache-key", strings.Repeat("k", 32))
	m.must(t, "chown", "root:percept", "/etc/percept/cache-key")
	m.must(t, "chmod", "0640", "/etc/percept/cache-key")
	m.must(t, "systemctl", "daemon-reload")
	m.must(t, "systemctl", "enable", "--now", "perceptd.service")
	m.until(t, "both tokens", func() bool {
		out, _ := m.run(t, "perceptctl", "status")
		return strings.Count(out, " fresh ") == 2
	})
	wants(t, m.must(t, "perceptctl", "status"), "kept over a restart and a reboot")
	calls := m.backEndCalls(t)

	l := m.startLoad(t, 20)
	t.Run("restart", func(t *testing.T) {
		for range 3 {
			m.must(t, "systemctl", "restart", "perceptd")
			l.asked(t)
		}
	})
	t.Run("upgrade", func(t *testing.T) { // as a package does it: another file in its place, then a restart
		m.must(t, "sh", "-c",
			"cp /usr/bin/perceptd /usr/bin/perceptd.new && mv /usr/bin/perceptd.new /usr/bin/perceptd && systemctl "+
				"daemon-reload && systemctl try-restart perceptd")
		l.asked(t)
	})
	t.Run("another systemd", func(t *testing.T) {
		m.must(t, "systemctl", "daemon-reexec")
		l.asked(t)
		m.must(t, "systemctl", "restart", "perceptd")
		l.asked(t)
	})
	l.failures(t)
	l.retries(t)
	t.Run("crash", func(t *testing.T) {
		for range 3 {
			m.another(t, func() { m.must(t, "systemctl", "kill", "-s", "KILL", "--kill-who=main", "perceptd") })
			l.asked(t)
		}
	})
	t.Run("standstill", func(t *testing.T) {
		m.write(t, "/etc/systemd/system/perceptd.service.d/watchdog.conf", "[Service]\nWatchdogSec=2\n")
		m.must(t, "systemctl", "daemon-reload")
		m.must(t, "systemctl", "restart", "perceptd")
		m.another(t, func() { m.must(t, "systemctl", "kill", "-s", "STOP", "--kill-who=main", "perceptd") })
		l.asked(t)
		m.must(t, "rm", "/etc/systemd/system/perceptd.service.d/watchdog.conf")
		m.must(t, "systemctl", "daemon-reload")
	})
	l.failures(t)
	l.stop(t)
	if kept := m.must(t, "ls", "-l", "/proc/1/fd"); !strings.Contains(kept, "/secretmem") && secret {
		t.Errorf("what systemd keeps can be read:\n%s", kept)
	}
	if now := m.backEndCalls(t); now != calls {
		t.Errorf("%d calls to the back end through all this", now-calls)
	}

	m.must(t, "systemctl", "stop", "simulator")
	t.Run("stop and start, without the back end", func(t *testing.T) {
		m.must(t, "systemctl", "stop", "perceptd")
		m.must(t, "systemctl", "start", "perceptd")
		m.servesWithoutCalls(t)
	})
	t.Run("reboot, without the back end", func(t *testing.T) {
		m.reboot(t, "systemctl", "reboot")
		m.servesWithoutCalls(t)
	})
	t.Run("power cut, without the back end", func(t *testing.T) {
		m.reboot(t, "systemctl", "reboot", "--force", "--force")
		m.servesWithoutCalls(t)
	})
	t.Run("nothing is in the clear", func(t *testing.T) {
		file := m.must(t, "cat", tokenFile)
		if strings.Contains(file, "eyJ") || strings.Contains(file, "vault.azure.net") {
			t.Error("the cache's file can be read without its key")
		}
		if journal := m.must(t, "journalctl", "-o", "export", "--no-pager"); strings.Contains(journal, "eyJhbGciOi") {
			t.Error("token text in the journal")
		}
	})
	t.Run("another key", func(t *testing.T) {
		m.write(t, "/etc/percept/cache-key", strings.Repeat("x", 32))
		m.must(t, "systemctl", "stop", "perceptd")
		m.must(t, "systemctl", "start", "perceptd")
		out, err := m.as(t, "edge", "perceptctl", "token", "--resource", askVault, "--short")
		if err == nil {
			t.Errorf("a token by another key: %s", out)
		}
		wants(t, m.must(t, "journalctl", "-u", "perceptd", "-o", "cat", "--no-pager"),
			"cannot be used and are fetched anew")
		m.startSimulator(t) // with another secret in its environment
		m.must(t, "systemctl", "restart", "perceptd")
		m.until(t, "tokens fetched anew", func() bool {
			_, err := m.as(t, "edge", "perceptctl", "token", "--resource", askVault, "--short")
			return err == nil
		})
	})
}

// startSimulator starts a back end that outlives the daemon, and writes where it is.
func (m *machine) startSimulator(t *testing.T) {
	t.Helper()
	m.must(t, "systemd-run", "--quiet", "--unit=simulator", "perceptctl", "simulate", "--form", "app-service",
		"--env-file", "/run/backend.env",
		"--listen", strings.TrimPrefix(simulatorURL, "http://"))
	m.until(t, "the simulated back end", func() bool {
		_, err := m.run(t, "perceptctl", "simulate", "state", "--at", simulatorURL)
		return err == nil
	})
	m.must(t, "cp", "/run/backend.env", "/etc/backend.env")
}

// backEndCalls is how many requests the simulated back end has had.
func (m *machine) backEndCalls(t *testing.T) int {
	t.Helper()
	for line := range strings.Lines(m.must(t, "perceptctl", "simulate", "state", "--at", simulatorURL)) {
		if rest, ok := strings.CutPrefix(line, "requests"); ok {
			count, _, _ := strings.Cut(strings.TrimSpace(rest), ",")
			n, err := strconv.Atoi(count)
			if err != nil {
				t.Fatal(line)
			}
			return n
		}
	}
	t.Fatal("the back end does not tell its calls")
	return 0
}

// another waits until end has led to another process that serves.
func (m *machine) another(t *testing.T, end func()) {
	t.Helper()
	before := m.pid(t)
	end()
	m.until(t, "the daemon's return", func() bool { // systemd learns of the end in its own time
		out, _ := m.run(t, "systemctl", "is-active", "perceptd")
		now := m.pid(t)
		return strings.TrimSpace(out) == "active" && now != before && now != "0"
	})
}

// servesWithoutCalls checks that both tokens are there, and that nothing was asked of a back end that is not there.
func (m *machine) servesWithoutCalls(t *testing.T) {
	t.Helper()
	for _, resource := range []string{askVault, askStorage} {
		out, err := m.as(t, "edge", "perceptctl", "token", "--resource", resource, "--short")
		if err != nil || !strings.HasPrefix(out, "eyJ") {
			t.Errorf("%s: %v %s", resource, err, out)
		}
	}
	status := m.must(t, "perceptctl", "status", "--json")
	if strings.Count(status, `"fetches": 0`) != 2 || strings.Contains(status, "last_error") {
		t.Errorf("the back end was asked:\n%s", status)
	}
}

// load is clients that ask without pause.
type load struct {
	m *machine
	n int
}

const loadScript = `cd /run/load
ask() { perceptctl token --resource https://vault.azure.net --short >/dev/null 2>why.$1; }
client() {
	n=0
	while [ ! -e enough ]; do
		ask $1 || { [ -e retry ] && ask $1; } || echo "client $1, request $n: $(cat why.$1)" >>failed
		n=$((n+1)); echo $n >count.new.$1; mv count.new.$1 count.$1
	done
}
for i in $(seq $1); do client $i & done
wait`

func (m *machine) startLoad(t *testing.T, clients int) *load {
	t.Helper()
	l := &load{m, clients}
	m.must(t, "install", "-d", "-o", "edge", "/run/load")
	m.must(t, "systemd-run", "--quiet", "--unit=load.service", "--property=User=edge", "sh", "-c", loadScript, "sh",
		fmt.Sprint(clients))
	l.asked(t)
	return l
}

func (l *load) counts() (all []int) {
	for i := range l.n {
		text, _ := os.ReadFile(filepath.Join("/proc", l.m.leader, "root/run/load", fmt.Sprintf("count.%d", i+1)))
		n, _ := strconv.Atoi(strings.TrimSpace(string(text)))
		all = append(all, n)
	}
	return all
}

// asked waits until every client has been answered twice, so that one of its requests was begun by now.
func (l *load) asked(t *testing.T) {
	t.Helper()
	before := l.counts()
	l.m.until(t, "answers to every client", func() bool {
		for i, n := range l.counts() {
			if n < before[i]+2 {
				return false
			}
		}
		return true
	})
}

// retries has clients repeat a request that failed once, as SDKs do.
func (l *load) retries(t *testing.T) { l.m.must(t, "touch", "/run/load/retry") }

func (l *load) failures(t *testing.T) {
	t.Helper()
	if out, err := l.m.run(t, "cat", "/run/load/failed"); err == nil {
		t.Errorf("requests failed:\n%s", out)
	}
}

func (l *load) stop(t *testing.T) {
	t.Helper()
	l.m.must(t, "touch", "/run/load/enough")
	l.m.until(t, "the last request", func() bool {
		out, _ := l.m.run(t, "systemctl", "is-active", "load.service")
		return strings.TrimSpace(out) != "active"
	})
	sum := 0
	for _, n := range l.counts() {
		sum += n
	}
	t.Logf("%d requests of %d clients", sum, l.n)
}
