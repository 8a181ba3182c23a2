//go:build system

package systemd_test

import (
	"encoding/binary"
	"regexp"
	"strings"
	"testing"
	"time"
	"unicode/utf16"
)

// TestSystemPlantedFaults plants faults on a device, one after the other: in its configuration, at its sockets, and in
// how it is installed. Each heals by itself, or by the commands that the device prints, which are taken off its screens
// and run word for word; where only an editor mends a file, the screen says where. Each leaves the device as it was.
func TestSystemPlantedFaults(t *testing.T) {
	m := boot(t, kind{release: "bookworm"})
	install(t, m)
	for name, text := range unitsOfFaults {
		m.write(t, "/etc/systemd/system/"+name, text)
	}
	m.must(t, "useradd", "--system", "himds")
	m.must(t, "cp", "/usr/share/perceptd/azure-arc.conf", "/etc/systemd/system/perceptd.service.d/")
	m.write(t, "/usr/bin/sudo", "#!/bin/sh\nexec \"$@\"\n") // all is run as root here
	m.must(t, "chmod", "0755", "/usr/bin/sudo")
	m.write(t, mainFile, identitiesOfFaults)
	m.write(t, grantsFile, grantsOfFaults)
	m.must(t, "systemctl", "daemon-reload")
	m.must(t, "systemctl", "start", "imds.service")
	m.await(t, "test", "-s", "/run/imds/env")
	m.must(t, "systemctl", "enable", "--now", "perceptd.service")
	m.isWhole(t)
	before := m.picture(t)

	for _, fault := range []struct {
		name  string
		plant func(*testing.T, *machine)
	}{
		{"a typo in a grant", faultTypo},
		{"a grant's user is deleted", faultUser},
		{"a file that perceptd cannot read", faultMode},
		{"a file that others may write", faultOwner},
		{"an endpoint that is not there yet", faultEndpoint},
		{"a file that is not TOML", faultSyntax},
		{"a file in UTF-16", faultEncoding},
		{"the main file is missing", faultMissing},
		{"a file of config.d is gone", faultGone},
		{"an engine made the module's folder", faultFolder},
		{"a module is taken out and put back", faultModule},
		{"another perceptd holds the state folder", faultState},
		{"another process holds the runtime folder", faultRuntime},
		{"a wrong command line", faultFlags},
		{"an earlier version runs", faultUpgrade},
	} {
		t.Run(fault.name, func(t *testing.T) {
			fault.plant(t, m)
			m.isWhole(t)
			if now := m.picture(t); now != before {
				t.Fatalf("the device is another:\n%s\nit was\n%s", now, before)
			}
		})
	}
}

// unitsOfFaults are the metadata service and the Arc agent that the device has, in their places, and a container.
var unitsOfFaults = map[string]string{
	"imds.service": `[Service]
User=nobody
RuntimeDirectory=imds
ExecStart=/usr/bin/perceptctl simulate --form imds --env-file /run/imds/env
`,
	"arc.service": `[Service]
User=himds
ExecStart=/usr/bin/perceptctl simulate --form arc --listen 127.0.0.1:40342
`,
	"perceptd.service.d/source.conf": "[Service]\nEnvironmentFile=/run/imds/env\n",
	"container@.service":             engineUnits["container@.service"],
}

const (
	identitiesOfFaults = `[[identity]]
name = "device"
default = true

[[identity]]
name = "vision"
client_id = "00000000-0000-0000-0000-000000000001"
`
	grantsOfFaults = moduleVision + grantForEdge + `
[[grant]]
caller = { unit = "camera.service" }
identity = "vision"
resources = ["https://vault.azure.net"]
`
)

func faultTypo(t *testing.T, m *machine) {
	const named = "caller = { unit = \"camera.service\" }\nidentit"
	m.write(t, grantsFile, strings.Replace(grantsOfFaults, named, named+"t", 1))
	m.must(t, "systemctl", "restart", "perceptd")
	m.gets(t, "edge")
	m.moduleGets(t)
	out, err := m.asCamera(t) // whose user is granted device
	if exitOf(err) != 4 {
		t.Errorf("camera.service has a faulty grant: %v %s", err, out)
	}
	wants(t, out, "is faulty and gives nothing: unknown key grant.identitty")

	wants(t, m.troubled(t), "grant 3 is idle: unknown key grant.identitty")
	check, err := m.run(t, "sh", "-ec", m.printed(t, out, `sudo perceptd --check`)) // by the denial's hint
	place := regexp.MustCompile(`(/\S+):(\d+): unknown key grant\.(\w+):`).FindStringSubmatch(check)
	if exitOf(err) != 1 || place == nil {
		t.Fatalf("the place is not printed: %v\n%s", err, check)
	}
	m.must(t, "sed", "-i", place[2]+"s/"+place[3]+"/identity/", place[1])
	m.follow(t, out, `sudo perceptctl reload`)
}

func faultUser(t *testing.T, m *machine) {
	const file = "/etc/percept/config.d/gone.toml"
	m.must(t, "useradd", "--system", "gone")
	m.write(t, file, grantFor("gone"))
	m.must(t, "perceptctl", "reload")
	m.gets(t, "gone")
	m.must(t, "userdel", "gone")
	m.must(t, "systemctl", "restart", "perceptd")
	m.servesAll(t)

	m.follow(t, m.troubled(t), `useradd [^)]*`)
	m.follow(t, m.doctorSays(t), `perceptctl reload`)
	m.gets(t, "gone")
	m.must(t, "rm", file)
	m.must(t, "userdel", "gone")
	m.must(t, "perceptctl", "reload")
}

func faultMode(t *testing.T, m *machine) {
	m.awaitCopy(t)
	m.must(t, "chmod", "0600", mainFile)
	m.must(t, "systemctl", "restart", "perceptd")
	m.servesAll(t)
	wants(t, m.troubled(t), "the last configuration goes on", "is still in force")
	m.follow(t, m.statusText(t), `chmod [^;]*`)
	m.follow(t, m.doctorSays(t), `perceptctl reload`)
}

func faultOwner(t *testing.T, m *machine) {
	for _, row := range []struct{ plant, printed string }{
		{"chown edge " + mainFile, `chown root \S*`},
		{"chgrp percept " + mainFile + " && chmod 0664 " + mainFile, `chmod g-w \S*`},
	} {
		m.awaitCopy(t)
		m.must(t, "sh", "-ec", row.plant)
		refused, err := m.run(t, "perceptctl", "reload")
		if err == nil {
			t.Errorf("another user's file is in force: %s", refused)
		}
		m.must(t, "systemctl", "restart", "perceptd")
		m.servesAll(t)
		wants(t, m.troubled(t), "the last configuration goes on")
		m.follow(t, refused, row.printed)
		m.follow(t, m.doctorSays(t), `perceptctl reload`)
	}
	m.must(t, "chgrp", "root", mainFile) // which is nobody's fault
}

func faultEndpoint(t *testing.T, m *machine) {
	m.write(t, mainFile, "[source]\nendpoint = \"arc\"\n\n"+identitiesOfFaults)
	m.must(t, "systemctl", "restart", "perceptd")
	pid := m.pid(t)
	out, err := m.as(t, "edge", "perceptctl", "token", "--resource", askVault, "--short")
	if exitOf(err) != 1 {
		t.Errorf("%v %s", err, out)
	}
	const reason = "endpoint arc cannot be used"
	wants(t, inLine(out), reason)
	wants(t, m.troubled(t), reason, "install the agent")

	m.must(t, "install", "-d", "-o", "himds", "-g", "himds", "-m", "2750", "/var/opt/azcmagent/tokens")
	m.must(t, "install", "-D", "/dev/null", "/opt/azcmagent/bin/himds")
	m.must(t, "systemctl", "start", "arc")
	m.servesAll(t)
	if now := m.pid(t); now != pid {
		t.Errorf("main process %s, was %s", now, pid)
	}
	m.must(t, "systemctl", "stop", "arc")
	m.must(t, "rm", "-r", "/opt/azcmagent", "/var/opt/azcmagent")

	m.write(t, mainFile, identitiesOfFaults)
	refused, err := m.run(t, "perceptctl", "reload")
	if err == nil {
		t.Errorf("a source that gave tokens was replaced: %s", refused)
	}
	m.follow(t, refused, `systemctl restart perceptd`)
}

func faultSyntax(t *testing.T, m *machine) {
	m.write(t, grantsFile, grantsOfFaults+grantFor("root"))
	m.must(t, "perceptctl", "reload")
	m.gets(t, "root")
	m.write(t, grantsFile, grantsOfFaults)
	m.follow(t, m.status(t), `perceptctl reload`) // it was edited and not reloaded
	m.awaitCopy(t)
	m.write(t, grantsFile, grantsOfFaults+grantFor("root")+"[[grant\n")
	m.must(t, "systemctl", "restart", "perceptd")
	m.servesAll(t)
	m.isDenied(t, "root")

	status := m.troubled(t)
	place := regexp.MustCompile(`(/\S+):(\d+):\d+: expected '\]\]'`).FindStringSubmatch(status)
	if place == nil {
		t.Fatalf("the place is not printed:\n%s", status)
	}
	m.must(t, "sed", "-i", place[2]+"d", place[1])
	m.follow(t, m.doctorSays(t), `perceptctl reload`)
	m.gets(t, "root")
	m.write(t, grantsFile, grantsOfFaults)
	m.follow(t, m.status(t), `perceptctl reload`)
	m.isDenied(t, "root")
}

func faultEncoding(t *testing.T, m *machine) {
	m.awaitCopy(t)
	var text []byte
	for _, c := range utf16.Encode([]rune("\ufeff" + grantsOfFaults)) {
		text = binary.LittleEndian.AppendUint16(text, c)
	}
	m.write(t, grantsFile, string(text))
	m.must(t, "systemctl", "restart", "perceptd")
	m.servesAll(t)
	m.follow(t, m.troubled(t), `iconv \S+ \S+ \S+ \S+ \S+ \S+ \S+ && mv \S+ \S+`)
	m.follow(t, m.doctorSays(t), `perceptctl reload`)
}

func faultMissing(t *testing.T, m *machine) {
	m.must(t, "mv", mainFile, "/root/main")
	m.must(t, "systemctl", "restart", "perceptd")
	m.isDenied(t, "edge") // there is no identity
	wants(t, m.troubled(t), mainFile+" is not there, and what needs it is idle")
	m.must(t, "mv", "/root/main", mainFile)
	m.follow(t, m.statusText(t), `perceptctl reload`)
	m.isWhole(t)

	m.must(t, "mv", mainFile, "/root/main")
	m.must(t, "mv", grantsFile, "/root/grants")
	m.must(t, "systemctl", "restart", "perceptd")
	for _, user := range []string{"edge", "root"} {
		out, err := m.as(t, user, "perceptctl", "token", "--resource", askVault, "--short")
		if exitOf(err) != 1 {
			t.Errorf("%s: %v %s", user, err, out)
		}
		wants(t, inLine(out), "no configuration is in force", mainFile+" is not there")
	}
	m.must(t, "mv", "/root/main", mainFile)
	m.must(t, "mv", "/root/grants", grantsFile)
	m.follow(t, m.troubled(t), `perceptctl reload`)
}

func faultGone(t *testing.T, m *machine) {
	m.must(t, "mv", grantsFile, "/root/grants")
	m.must(t, "systemctl", "restart", "perceptd")
	m.isDenied(t, "edge")
	m.must(t, "mv", "/root/grants", grantsFile)
	wants(t, m.doctorSays(t), grantsFile+" was in force and is gone")
	m.follow(t, m.troubled(t), `perceptctl reload`)
}

func faultFolder(t *testing.T, m *machine) {
	m.must(t, "systemctl", "stop", "perceptd")
	m.must(t, "rm", "-r", visionFolder)
	m.must(t, "mkdir", "-m", "0755", visionFolder, visionSocket)
	m.must(t, "systemctl", "start", "container@vision")
	m.must(t, "systemctl", "start", "perceptd")
	m.reached(t, "vision")
	m.must(t, "systemctl", "stop", "container@vision")
}

func faultModule(t *testing.T, m *machine) {
	m.must(t, "systemctl", "start", "container@vision")
	m.reached(t, "vision")
	m.write(t, grantsFile, strings.Replace(grantsOfFaults, moduleVision, "", 1))
	m.follow(t, m.status(t), `perceptctl reload`)
	if out, err := m.run(t, "test", "-e", visionSocket); err == nil {
		t.Errorf("the module has its socket still: %s", out)
	}
	m.write(t, grantsFile, grantsOfFaults)
	m.follow(t, m.status(t), `perceptctl reload`)
	m.reached(t, "vision")
	m.must(t, "systemctl", "stop", "container@vision")
}

func faultState(t *testing.T, m *machine) {
	m.must(t, "systemctl", "stop", "perceptd")
	m.must(t, "systemd-run", "--quiet", "--collect", "--unit=other", "--property=User=percept",
		"--property=RuntimeDirectory=other", "perceptd", "--runtime-dir", "/run/other", "--state-dir",
		"/var/lib/percept")
	m.await(t, "test", "-S", "/run/other/token.sock")
	m.isHeld(t, "another perceptd")
}

func faultRuntime(t *testing.T, m *machine) {
	m.must(t, "systemctl", "stop", "perceptd")
	m.must(t, "systemd-run", "--quiet", "--collect", "--unit=other", "--property=User=percept",
		"flock", "--close", "/run/percept/modules", "sleep", "600")
	m.until(t, "the lock", func() bool {
		_, err := m.run(t, "flock", "--nonblock", "/run/percept/modules", "true")
		return err != nil
	})
	m.isHeld(t, "program flock")
}

// isHeld starts the device's perceptd while a process of unit other has one of its folders locked: it waits, until that
// one is ended as its screens say.
func (m *machine) isHeld(t *testing.T, who string) {
	t.Helper()
	other := strings.TrimSpace(m.must(t, "systemctl", "show", "other", "-p", "MainPID", "--value"))
	m.must(t, "systemctl", "start", "--no-block", "perceptd")
	m.until(t, "the holder in systemctl status", func() bool {
		return strings.Contains(m.statusText(t), "waiting: "+who+" (process "+other+")")
	})
	wants(t, m.doctorSays(t), "kill "+other+" ends it")
	m.follow(t, m.statusText(t), `kill \d+`)
	m.await(t, "systemctl", "is-active", "perceptd")
}

func faultFlags(t *testing.T, m *machine) {
	m.write(t, "/etc/systemd/system/perceptd.service.d/flags.conf",
		"[Service]\nExecStart=\nExecStart=/usr/bin/perceptd --confg /etc/percept/config.toml\n")
	m.must(t, "systemctl", "daemon-reload")
	if out, err := m.run(t, "systemctl", "restart", "perceptd"); err == nil {
		t.Errorf("started with a wrong command line: %s", out)
	}
	began, before := time.Now(), m.restarts(t)
	_, _ = m.as(t, "nobody", "sh", "-c", "for i in 1 2 3; do for j in 1 2 3 4 5; do "+
		"timeout 1 perceptctl token --resource "+askVault+" & done; wait; done")
	most := 1 + int(time.Since(began)/(2*time.Second)) // RestartSec=
	if n := m.restarts(t) - before; n > most {
		t.Errorf("%d starts in %v: a client has it started", n, time.Since(began))
	}
	var said string
	m.until(t, "doctor's reason", func() bool { // between two it is being started
		said = m.doctorSays(t)
		return strings.Contains(said, "its command line is wrong")
	})
	wants(t, m.must(t, "journalctl", "-u", "perceptd", "-n", "100", "--no-pager"), "status=78", "-confg")

	units := m.follow(t, said, `systemctl cat perceptd`)
	place := regexp.MustCompile(`(?s)# (/etc/\S+\.conf)\n[^#]*--confg`).FindStringSubmatch(units)
	if place == nil {
		t.Fatalf("the drop-in is not printed:\n%s", units)
	}
	m.must(t, "rm", place[1])
	m.follow(t, said, `systemctl daemon-reload`)
	m.await(t, "systemctl", "is-active", "perceptd")
}

func faultUpgrade(t *testing.T, m *machine) {
	m.must(t, "sh", "-ec", "cd /usr/bin && cp perceptd older && echo older >>older && mv older perceptd")
	m.must(t, "systemctl", "restart", "perceptd")
	m.servesAll(t)
	next, over := unpack(t, m)
	m.must(t, "sh", "-ec", next)
	if out, err := m.run(t, "cmp", "/proc/"+m.pid(t)+"/exe", "/usr/bin/perceptd"); err == nil {
		t.Errorf("the earlier version does not run: %s", out)
	}
	m.must(t, "sh", "-ec", over)
	m.must(t, "cmp", "/proc/"+m.pid(t)+"/exe", "/usr/bin/perceptd")
	m.isWhole(t)
	m.must(t, "rm", "-f", clearKey, sealedKey) // which one of the commands has made
	m.must(t, "sh", "-ec", over)
}

// printed returns the first command of a form that a screen prints.
func (m *machine) printed(t *testing.T, screen, form string) string {
	t.Helper()
	command := regexp.MustCompile(form).FindString(inLine(screen))
	if command == "" {
		t.Fatalf("no command %q is printed:\n%s", form, screen)
	}
	t.Log("$ " + command)
	return command
}

// follow runs such a command, word for word.
func (m *machine) follow(t *testing.T, screen, form string) string {
	t.Helper()
	return m.must(t, "sh", "-ec", m.printed(t, screen, form))
}

// status is what perceptctl status prints, on one line.
func (m *machine) status(t *testing.T) string {
	t.Helper()
	out, _ := m.run(t, "perceptctl", "status")
	return inLine(out)
}

// troubled is status, of a device that needs a person.
func (m *machine) troubled(t *testing.T) string {
	t.Helper()
	out, err := m.run(t, "perceptctl", "status")
	if exitOf(err) != 5 {
		t.Errorf("status: %v\n%s", err, out)
	}
	return inLine(out)
}

// doctorSays is what perceptctl doctor prints, on one line.
func (m *machine) doctorSays(t *testing.T) string {
	t.Helper()
	out, _ := m.run(t, "perceptctl", "doctor")
	return inLine(out)
}

func (m *machine) statusText(t *testing.T) string {
	t.Helper()
	return m.must(t, "systemctl", "show", "perceptd", "-p", "StatusText", "--value")
}

// await waits until a command ends well.
func (m *machine) await(t *testing.T, command ...string) {
	t.Helper()
	m.until(t, strings.Join(command, " "), func() bool {
		_, err := m.run(t, command...)
		return err == nil
	})
}

// asCamera asks for a token as camera.service, of user edge.
func (m *machine) asCamera(t *testing.T) (string, error) {
	t.Helper()
	return m.inUnit(t, "camera.service", "edge", nil, "perceptctl", "token", "--resource", askVault, "--json")
}

// moduleGets has the module vision be given its token on its socket.
func (m *machine) moduleGets(t *testing.T) {
	t.Helper()
	m.await(t, "perceptctl", "--socket", visionSocket, "token", "--resource", askVault, "--short")
}

// servesAll has each caller be given the token of the identity that it is granted.
func (m *machine) servesAll(t *testing.T) {
	t.Helper()
	m.gets(t, "edge")
	m.moduleGets(t)
	var out string
	m.until(t, "the token of camera.service", func() (served bool) {
		var err error
		out, err = m.asCamera(t)
		return err == nil
	})
	wants(t, out, `"identity": "vision"`)
}

func (m *machine) isDenied(t *testing.T, user string) {
	t.Helper()
	out, err := m.as(t, user, "perceptctl", "token", "--resource", askVault, "--short")
	if exitOf(err) != 4 {
		t.Errorf("user %s: %v %s", user, err, out)
	}
}

// isWhole shows that all is served, and that the status needs no person and names no edit that waits.
func (m *machine) isWhole(t *testing.T) {
	t.Helper()
	m.servesAll(t)
	m.until(t, "a status without trouble", func() bool {
		out, err := m.run(t, "perceptctl", "status")
		return err == nil && !strings.Contains(inLine(out), "not reloaded")
	})
}

// picture is what a fault may have left: files with their owners and modes, and what they say.
func (m *machine) picture(t *testing.T) string {
	t.Helper()
	return m.must(t, "sh", "-ec", `find /etc/percept /etc/systemd/system /run/percept -printf '%p %M %u:%g\n' | sort
		find /etc/percept /etc/systemd/system /usr/bin/percept* -type f -exec cksum {} + | sort`)
}
