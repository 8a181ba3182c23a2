//go:build system

package systemd_test

import (
	"strings"
	"testing"

	"perceptd/cmd/perceptd/e2e/harness"
)

// TestSystemBoot boots devices whose container engine is first: it makes modules' folders as root, and as the root of a
// user namespace, before perceptd and while perceptd waits for the key of its tokens. What runs in them has its folder
// mounted from then on, as a container has. Each module gets its token there, without a person.
func TestSystemBoot(t *testing.T) {
	for _, release := range []string{"bookworm", "trixie"} { // systemd 252, 257
		t.Run(release, func(t *testing.T) { testBoot(t, boot(t, kind{release: release})) })
	}
}

// earlyModules are those whose containers are started before perceptd.
var earlyModules = []string{"vision", "remapped", "inner", "midway"}

// engineUnits are an engine, and what starts containers beside the order that perceptd has set.
var engineUnits = map[string]string{
	// An engine that perceptd.service does not name, before everything that is perceptd's.
	"early.service": `[Unit]
DefaultDependencies=no
After=systemd-tmpfiles-setup.service
Before=perceptd.socket perceptd-cache-key.service perceptd.service
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=mkdir -m 0755 /run/percept/modules/vision /run/percept/modules/remapped /run/percept/modules/inner
ExecStart=mkdir -m 0755 /run/percept/modules/inner/token.sock
ExecStart=chown 100000:100000 /run/percept/modules/remapped
[Install]
WantedBy=sysinit.target
`,
	"midway.service": `[Unit]
DefaultDependencies=no
After=systemd-tmpfiles-setup.service
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=sh -c 'until [ "$(systemctl is-active perceptd-cache-key.service)" = activating ]; do sleep 0.2; done'
ExecStart=mkdir -m 0755 /run/percept/modules/midway
[Install]
WantedBy=multi-user.target
`,
	"container@.service": `[Unit]
DefaultDependencies=no
[Service]
Type=notify
NotifyAccess=all
ExecStart=unshare --mount --propagation private sh -c 'mount --bind /run/percept/modules/%i /mnt && \
  systemd-notify --ready && exec sleep infinity'
`,
	"containers.service": `[Unit]
DefaultDependencies=no
After=early.service
Before=perceptd-cache-key.service perceptd.service
Wants=container@vision.service container@remapped.service container@inner.service
After=container@vision.service container@remapped.service container@inner.service
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=true
[Install]
WantedBy=sysinit.target
`,
	"container@vision.service.d/order.conf":   "[Unit]\nAfter=early.service\n",
	"container@remapped.service.d/order.conf": "[Unit]\nAfter=early.service\n",
	"container@inner.service.d/order.conf":    "[Unit]\nAfter=early.service\n",
	"container@midway.service": `[Unit]
DefaultDependencies=no
After=midway.service
[Service]
ExecStart=unshare --mount --propagation private sh -c 'mount --bind /run/percept/modules/midway /mnt && \
  exec sleep infinity'
[Install]
WantedBy=multi-user.target
`,
	// Docker's own units, as Debian has them but for the program: it notes what it finds.
	"docker.socket": `[Socket]
ListenStream=/run/docker.sock
[Install]
WantedBy=sockets.target
`,
	"docker.service": `[Unit]
After=network-online.target docker.socket containerd.service
Wants=network-online.target containerd.service
Requires=docker.socket
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=sh -c 'ls /run/percept/modules/*/token.sock >/run/docker-found 2>&1; true'
[Install]
WantedBy=multi-user.target
`,
	"containerd.service": `[Unit]
After=network.target local-fs.target
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=true
[Install]
WantedBy=multi-user.target
`,
	"perceptd-cache-key.service.d/slow.conf": "[Service]\nExecStartPre=sleep 10\n",
}

func moduleOfBoot(name string) string {
	return strings.NewReplacer(`name = "vision"`, `name = "`+name+`"`,
		`module = "vision"`, `module = "`+name+`"`).Replace(moduleVision)
}

func testBoot(t *testing.T, m *machine) {
	install(t, m)
	for name, text := range engineUnits {
		m.write(t, "/etc/systemd/system/"+name, text)
	}
	config := harness.SimulatedIdentities
	for _, module := range earlyModules {
		config += moduleOfBoot(module)
	}
	m.write(t, "/etc/percept/config.toml", config)
	m.write(t, "/etc/percept/cache-key", strings.Repeat("k", 32))
	m.must(t, "chown", "root:percept", "/etc/percept/cache-key")
	m.must(t, "chmod", "0640", "/etc/percept/cache-key")
	m.must(t, "systemctl", "daemon-reload")
	m.must(t, "systemctl", "enable", "perceptd.service", "early.service", "midway.service", "containers.service",
		"container@midway.service", "docker.socket", "docker.service", "containerd.service")

	t.Run("an engine first, and a slow key", func(t *testing.T) {
		m.reboot(t, "systemctl", "reboot")
		m.reached(t, earlyModules...)
		wants(t, m.must(t, "cat", "/run/docker-found"), "vision/token.sock", "remapped/token.sock", "midway/token.sock")
		journal := m.must(t, "journalctl", "-b", "-o", "cat", "--no-pager")
		if strings.Contains(journal, "ordering cycle") {
			t.Error("the units' order is a cycle")
		}
		wants(t, journal, "its engine made the module's folder: it is perceptd's now")
		if status, err := m.run(t, "perceptctl", "status"); strings.Contains(status, "has no socket") {
			t.Errorf("%v\n%s", err, status)
		}
	})
	t.Run("a container of a module that is configured later", func(t *testing.T) {
		m.must(t, "mkdir", "-m", "0755", "/run/percept/modules/late")
		m.must(t, "systemctl", "start", "container@late.service")
		m.write(t, "/etc/percept/config.toml", config+moduleOfBoot("late"))
		m.must(t, "perceptctl", "reload")
		m.reached(t, "late")
	})
	t.Run("taken out and put back, over a restart", func(t *testing.T) {
		m.write(t, "/etc/percept/config.toml", config)
		m.must(t, "perceptctl", "reload")
		m.must(t, "systemctl", "restart", "perceptd")
		m.write(t, "/etc/percept/config.toml", config+moduleOfBoot("late"))
		m.must(t, "perceptctl", "reload")
		m.reached(t, append(earlyModules, "late")...)
	})
	t.Run("a folder in use is left, and named", func(t *testing.T) {
		m.must(t, "mkdir", "-p", "/run/percept/modules/full/data")
		m.write(t, "/etc/percept/config.toml", config+moduleOfBoot("full"))
		m.must(t, "perceptctl", "reload")
		status, _ := m.run(t, "perceptctl", "status")
		wants(t, strings.Join(strings.Fields(status), " "), "module full has no socket",
			`it holds "data"`, "remove the folder")
		m.must(t, "rm", "-r", "/run/percept/modules/full") // as the status says
		m.must(t, "perceptctl", "reload")
		m.must(t, "test", "-S", "/run/percept/modules/full/token.sock")
	})
	t.Run("a faulty file, mended later", func(t *testing.T) {
		m.write(t, "/etc/percept/config.toml", config+
			strings.Replace(moduleOfBoot("typo"), "resources", "resuorces", 1))
		m.reboot(t, "systemctl", "reboot")
		m.must(t, "cat", "/run/docker-found") // which waits for no mend
		m.write(t, "/etc/percept/config.toml", config+moduleOfBoot("typo"))
		m.must(t, "perceptctl", "reload")
		m.reached(t, earlyModules...)
		m.must(t, "test", "-S", "/run/percept/modules/typo/token.sock")
	})
	t.Run("perceptd cannot start", func(t *testing.T) {
		m.write(t, "/etc/systemd/system/perceptd.service.d/broken.conf",
			"[Service]\nExecStart=\nExecStart=/bin/false\n")
		m.reboot(t, "systemctl", "reboot")
		m.until(t, "the engine, which an attempt to start holds up and no failure does", func() bool {
			_, err := m.run(t, "cat", "/run/docker-found")
			return err == nil
		})
		m.must(t, "rm", "/etc/systemd/system/perceptd.service.d/broken.conf")
		m.must(t, "systemctl", "daemon-reload") // and it is started again by itself
		m.until(t, "perceptd", func() bool {
			out, _ := m.run(t, "systemctl", "is-active", "perceptd")
			return strings.TrimSpace(out) == "active"
		})
		m.reached(t, earlyModules...)
	})
}

// reached shows that each of the modules gets its token at what its container has mounted since before perceptd was
// there.
func (m *machine) reached(t *testing.T, modules ...string) {
	t.Helper()
	for _, module := range modules {
		pid := strings.TrimSpace(m.must(t, "systemctl", "show", "container@"+module, "-p", "MainPID", "--value"))
		if pid == "0" {
			t.Errorf("the container of %s does not run", module)
			continue
		}
		out, err := m.run(t, "nsenter", "-t", pid, "-m", "perceptctl", "--socket", "/mnt/token.sock", "token",
			"--resource", "https://vault.azure.net", "--short")
		if err != nil || !strings.HasPrefix(out, "eyJ") {
			t.Errorf("%s: %v %s", module, err, out)
		}
	}
}
