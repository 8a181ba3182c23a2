//go:build system

package systemd_test

import (
	"strconv"
	"strings"
	"testing"
	"time"
)

// TestSystemStarts has clients ask while the daemon cannot start or crashes again and again: that leads to no limit
// after which an administrator has to come. And it has the daemon's own user, outside of the sandbox, try to make PID 1
// change what is not percept's.
func TestSystemStarts(t *testing.T) {
	for _, release := range []string{"bullseye", "bookworm", "trixie"} { // systemd 247, 252, 257
		t.Run(release, func(t *testing.T) { testStarts(t, boot(t, kind{release: release}), release != "bullseye") })
	}
}

const (
	visionFolder = "/run/percept/modules/vision"
	visionSocket = visionFolder + "/token.sock"
)

// testStarts is told whether the release knows NoExecPaths=.
func testStarts(t *testing.T, m *machine, noExec bool) {
	install(t, m)
	m.must(t, "systemctl", "enable", "--now", "perceptd.service")
	t.Run("PID 1 as percept's hand", func(t *testing.T) { testByPath(t, m) })
	t.Run("no other program", func(t *testing.T) {
		out, err := m.run(t, "nsenter", "-t", m.pid(t), "-m", "/bin/true")
		if noExec && (err == nil || !strings.Contains(out, "Permission denied")) {
			t.Errorf("another program runs in the sandbox: %v %s", err, out)
		}
	})
	t.Run("another user's lock", func(t *testing.T) {
		for _, path := range []string{"/run/percept/modules", "/var/lib/percept"} {
			if out, err := m.as(t, "nobody", "flock", "-n", path, "true"); err == nil ||
				!strings.Contains(out, "Permission denied") {
				t.Errorf("user nobody locks %s: %v %s", path, err, out)
			}
		}
		m.must(t, "systemd-run", "--quiet", "--unit=locker", "--property=User=nobody", "flock", "/run/percept", "sleep",
			"600")
		m.must(t, "systemctl", "restart", "perceptd")
		m.must(t, "systemctl", "stop", "locker")
	})
	t.Run("a socket of an earlier version", func(t *testing.T) { testOlderSocket(t, m) })
	t.Run("a configuration of percept's own", func(t *testing.T) {
		m.write(t, "/etc/percept/config.d/10.toml", "# nothing\n")
		m.must(t, "systemctl", "reload", "perceptd")
		m.must(t, "chown", "percept", "/etc/percept/config.d/10.toml")
		if out, err := m.run(t, "perceptctl", "reload"); err == nil ||
			!strings.Contains(strings.Join(strings.Fields(out), " "),
				"10.toml: its owner, user percept (mode 0644), could change who gets tokens: chown root "+
					"/etc/percept/config.d/10.toml") {
			t.Errorf("under systemd percept's files are in force: %v %s", err, out)
		}
		m.must(t, "rm", "-r", "/etc/percept/config.d")
		m.must(t, "systemctl", "reload", "perceptd")
	})
	inode := m.must(t, "stat", "-c", "%i", visionSocket)
	t.Run("a wrong command line", func(t *testing.T) { testWrongFlags(t, m) })
	t.Run("crashes without end", func(t *testing.T) {
		m.write(t, "/etc/systemd/system/perceptd.service.d/soon.conf", "[Service]\nRestartSec=50ms\nRestartSteps=0\n")
		m.must(t, "systemctl", "daemon-reload")
		for range 40 { // the default limits are 5 starts in 10 seconds, and 20 triggers in 2
			m.another(t, func() { m.must(t, "systemctl", "kill", "-s", "KILL", "--kill-who=main", "perceptd") })
		}
		m.must(t, "rm", "/etc/systemd/system/perceptd.service.d/soon.conf")
		m.must(t, "systemctl", "daemon-reload")
		if out, err := m.as(t, "edge", "perceptctl", "token", "--resource", askVault, "--short"); err != nil {
			t.Errorf("after the crashes: %v %s", err, out)
		}
		m.socketsListen(t)
	})
	if now := m.must(t, "stat", "-c", "%i", visionSocket); now != inode {
		t.Errorf("the module's socket is another: systemd's store was emptied meanwhile")
	}
}

// socketsListen checks that neither socket has failed.
func (m *machine) socketsListen(t *testing.T) {
	t.Helper()
	for _, unit := range []string{"perceptd.socket", "perceptd-admin.socket"} {
		wants(t, m.must(t, "systemctl", "show", unit, "-p", "ActiveState,Result"), "ActiveState=active",
			"Result=success")
	}
}

// testWrongFlags has clients by the dozen connect while the daemon cannot start, since its command line is wrong, and
// one wait on each socket until it can. None of them has it started more often than systemd's pauses allow.
func testWrongFlags(t *testing.T, m *machine) {
	m.write(t, "/etc/systemd/system/perceptd.service.d/flags.conf",
		"[Service]\nExecStart=\nExecStart=/usr/bin/perceptd --confg /etc/percept/config.toml\n")
	m.must(t, "systemctl", "daemon-reload")
	if out, err := m.run(t, "systemctl", "restart", "perceptd"); err == nil {
		t.Errorf("started with a wrong command line: %s", out)
	}
	began := time.Now()
	before := m.restarts(t)
	m.must(t, "systemd-run", "--quiet", "--unit=crowd", "--property=User=nobody", "sh", "-c",
		`for i in $(seq 80); do timeout 2 perceptctl token --resource https://vault.azure.net --short & [ $((i % 20)) = 0 ] && wait; done; wait`)
	wait := func(unit, user, socket string) {
		m.must(t, "systemd-run", "--quiet", "--unit="+unit, "--property=User="+user, "--property=RemainAfterExit=yes",
			"sh", "-c",
			`until perceptctl --socket "$0" token --resource https://vault.azure.net --short; do sleep 0.1; done`, socket)
	}
	wait("waits-token", "edge", "/run/percept/token.sock")
	wait("waits-module", "root", visionSocket)
	m.until(t, "some restarts", func() bool { return m.restarts(t) >= before+3 })
	m.until(t, "the crowd's end", func() bool {
		out, _ := m.run(t, "systemctl", "is-active", "crowd")
		return strings.TrimSpace(out) != "active"
	})
	m.socketsListen(t)
	most := 1 + int(time.Since(began)/(2*time.Second)) // RestartSec=
	if n := m.restarts(t) - before; n > most {
		t.Errorf("%d starts in %v: clients have it started", n, time.Since(began))
	}
	m.until(t, "doctor's reason", func() bool {
		out, err := m.run(t, "perceptctl", "doctor")
		said := strings.Join(strings.Fields(out), " ")
		return exitOf(err) == 5 && strings.Contains(said, "systemd starts it, and it ends")
	})
	m.until(t, "another restart", func() bool { // between two it is being started
		show := m.must(t, "systemctl", "show", "perceptd", "-p", "ExecMainStatus,SubState")
		return strings.Contains(show, "ExecMainStatus=78") && strings.Contains(show, "SubState=auto-restart")
	})
	m.must(t, "rm", "/etc/systemd/system/perceptd.service.d/flags.conf")
	m.must(t, "systemctl", "daemon-reload") // and no more is asked of the administrator
	for _, unit := range []string{"waits-token", "waits-module"} {
		m.until(t, "the token of "+unit, func() bool {
			out, _ := m.run(t, "systemctl", "show", unit, "-p", "SubState")
			return strings.TrimSpace(out) == "SubState=exited"
		})
	}
	wants(t, m.must(t, "systemctl", "show", "perceptd", "-p", "ActiveState"), "ActiveState=active")
}

// renew starts the daemon with sockets that are made anew.
func (m *machine) renew(t *testing.T) {
	t.Helper()
	m.must(t, "systemctl", "stop", "perceptd.service", "perceptd.socket", "perceptd-admin.socket")
	m.must(t, "systemctl", "start", "perceptd.service")
}

func (m *machine) restarts(t *testing.T) int {
	t.Helper()
	n, err := strconv.Atoi(strings.TrimSpace(m.must(t, "systemctl", "show", "perceptd", "-p", "NRestarts", "--value")))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// testOlderSocket has the daemon not let in on its admin socket, as an earlier version's unit made it: it goes on, and
// says what to do. An upgrade by the commands that make install prints mends that, a second one as well, and leaves
// each socket where clients wait.
func testOlderSocket(t *testing.T, m *machine) {
	m.write(t, "/etc/systemd/system/perceptd-admin.socket.d/older.conf", "[Socket]\nSocketUser=root\n")
	m.write(t, "/etc/systemd/system/perceptd.service.d/watchdog.conf", "[Service]\nWatchdogSec=2\n")
	m.must(t, "systemctl", "daemon-reload")
	m.renew(t)
	pid, pings, last := m.pid(t), 0, ""
	m.until(t, "the watchdog's pings", func() bool {
		if at := m.must(t, "systemctl", "show", "perceptd", "-p", "WatchdogTimestampMonotonic", "--value"); at != last {
			last = at
			pings++
		}
		return pings > 4
	})
	if now := m.pid(t); now != pid {
		t.Errorf("the watchdog ended the daemon: process %s, was %s", now, pid)
	}
	out, err := m.run(t, "perceptctl", "status")
	if exitOf(err) != 5 || !strings.Contains(strings.Join(strings.Fields(out), " "),
		"perceptd cannot check that it answers on /run/percept/admin.sock") {
		t.Errorf("status: %v %s", err, out)
	}
	m.until(t, "the trouble in systemctl status", func() bool {
		return strings.Contains(m.must(t, "systemctl", "show", "perceptd", "-p", "StatusText"),
			"cannot check that it answers")
	})
	m.must(t, "rm", "/etc/systemd/system/perceptd-admin.socket.d/older.conf")
	sockets := m.must(t, "stat", "-c", "%n %i", "/run/percept/token.sock", "/run/percept/admin.sock", visionSocket)
	for range 2 {
		next, _ := unpack(t, m)
		m.must(t, "sh", "-c", next)
	}
	m.until(t, "a text without trouble", func() bool { // with no restart so far
		return !strings.Contains(m.must(t, "systemctl", "show", "perceptd", "-p", "StatusText"), "trouble")
	})
	m.must(t, "rm", "/etc/systemd/system/perceptd.service.d/watchdog.conf")
	m.must(t, "systemctl", "daemon-reload")
	m.must(t, "systemctl", "restart", "perceptd")
	wants(t, m.must(t, "stat", "-c", "%a %U:%G", "/run/percept/admin.sock"), "660 percept:percept-admin")
	if now := m.must(t, "stat", "-c", "%n %i", "/run/percept/token.sock", "/run/percept/admin.sock",
		visionSocket); now != sockets {
		t.Errorf("the upgrade made sockets anew:\n%sbefore:\n%s", now, sockets)
	}
	m.must(t, "rm", "-f", sealedKey, clearKey)
	m.until(t, "a status that needs no person", func() bool { // the first token takes a moment
		_, err := m.run(t, "perceptctl", "status")
		return err == nil
	})
}

// testByPath has percept, outside of its sandbox, put links where PID 1 gives files away by path.
func testByPath(t *testing.T, m *machine) {
	const secrets = "/etc/shadow /etc/percept/config.toml /run/of-root"
	m.must(t, "install", "-m", "0600", "/dev/null", "/run/of-root")
	look := func() string {
		return m.must(t, "sh", "-c",
			"stat -c '%n %a %U:%G' "+secrets+" /run/percept /run/percept/admin.sock /run/percept/modules")
	}
	before := look()
	wants(t, before, "/run/percept 755 root:root", "/run/percept/admin.sock 660 percept:percept-admin",
		"/run/percept/modules 700 percept:percept")
	for _, try := range []string{
		"mv /run/percept/admin.sock /run/percept/aside", "rm -f /run/percept/admin.sock",
		"ln -s /etc/shadow /run/percept/x",
		"mv /run/percept/modules /run/percept/aside", "touch /run/percept/x",
	} {
		if out, err := m.as(t, "percept", "sh", "-c", try); err == nil || !strings.Contains(out, "Permission denied") {
			t.Errorf("percept can do %q: %v %s", try, err, out)
		}
	}
	// What is percept's own it can fill with links and give to a group of its own, so that PID 1 goes through it at the
	// next start.
	out, err := m.run(t, "systemd-run", "--quiet", "--pipe", "--wait", "--collect", "--property=User=percept",
		"--property=SupplementaryGroups=percept-admin",
		"sh", "-c", `mkdir /run/percept/modules/x && cd /run/percept/modules/x && for f in `+secrets+`; do ln -s $f .; ln $f hard; done; chgrp -h percept-admin . * ..; chmod 0777 ..`)
	if !strings.Contains(out, "Operation not permitted") && !strings.Contains(out, "cross-device") {
		t.Errorf("percept's hard links: %v %s", err, out)
	}
	m.renew(t)
	m.must(t, "systemd-tmpfiles", "--create", "perceptd.conf")
	m.must(t, "systemctl", "restart", "perceptd.service")
	if after := look(); after != before {
		t.Errorf("PID 1 was made to change\n%sto\n%s", before, after)
	}
	m.must(t, "rm", "-r", "/run/percept/modules/x")
}
