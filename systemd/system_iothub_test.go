//go:build system

package systemd_test

import (
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"perceptd/agent/iothub/hubtest"
)

// TestSystemIoTHub connects the installed daemon to a hub, with the sandbox that it ships with and the credential that
// systemd gives it, and looks whether what the hub denies outlives a reboot on which there is no hub.
func TestSystemIoTHub(t *testing.T) {
	for _, release := range []string{"bullseye", "bookworm", "trixie"} { // systemd 247, 252, 257
		t.Run(release, func(t *testing.T) {
			m := boot(t, kind{release: release})
			install(t, m)
			hub := m.hub(t)
			connectionString := hub.CreateDevice("percept-7")
			_, key, _ := strings.Cut(connectionString, "SharedAccessKey=")
			m.write(t, "/etc/percept/hub-ca.pem", string(hub.RootPEM()))
			m.write(t, "/etc/percept/config.d/iothub.toml", "[iothub]\ncredential = \"iothub\"\n"+
				"ca_file = \"/etc/percept/hub-ca.pem\"\nmax_backoff = \"1s\"\nreport_spread = \"0s\"\n")
			m.must(t, "install", "-D", "-m", "0644", "-t", "/etc/systemd/system/perceptd.service.d",
				"/usr/share/perceptd/iothub-credential.conf")
			m.must(t, "systemctl", "daemon-reload")
			m.must(t, "systemctl", "enable", "--now", "perceptd.service")
			if out, err := m.as(t, "edge", askForVault...); err != nil {
				t.Errorf("without the credential's file: %v %s", err, out)
			}
			m.until(t, "the daemon to miss its credential", func() bool {
				return strings.Contains(m.hubStatus(t), `"failure":"credentials"`)
			})

			m.write(t, "/etc/percept/iothub", connectionString+"\n")
			m.must(t, "chmod", "0600", "/etc/percept/iothub")
			m.must(t, "systemctl", "restart", "perceptd")
			m.until(t, "the connection", func() bool { return strings.Contains(m.hubStatus(t), `"connected":true`) })
			wants(t, m.must(t, "perceptd", "--check"), "systemd's credential iothub was not checked")
			if _, err := hub.UpdateDesired("percept-7",
				[]byte(`{"percept":{"deny":[{"module":"vision"}]}}`)); err != nil {
				t.Fatal(err)
			}
			vision := []string{"perceptctl", "--socket", "/run/percept/modules/vision/token.sock", "token",
				"--resource",
				"https://vault.azure.net", "--short"}
			denied := func() bool {
				_, err := m.run(t, vision...)
				return exitOf(err) == 4
			}
			m.until(t, "the denial", denied)
			hub.Close()
			m.reboot(t, "systemctl", "reboot")
			m.until(t, "the denial after a reboot", denied)
			if out, err := m.as(t, "edge", askForVault...); err != nil {
				t.Errorf("another caller: %v %s", err, out)
			}
			if journal := m.must(t, "journalctl", "-o", "export", "--no-pager"); strings.Contains(journal, key) {
				t.Error("the key is in the journal")
			}
		})
	}
}

var askForVault = []string{"perceptctl", "token", "--resource", "https://vault.azure.net", "--short"}

// hubStatus is the hub's part of the status.
func (m *machine) hubStatus(t *testing.T) string {
	t.Helper()
	out, _ := m.run(t, "perceptctl", "status", "--json") // by its exit status it needs a person while there is no hub
	_, hub, _ := strings.Cut(compact(out), `"hub":{`)
	return hub
}

// hub starts a hub on the container's loopback: its threads' network is the container's while they make the sockets.
func (m *machine) hub(t *testing.T) *hubtest.Hub {
	t.Helper()
	runtime.LockOSThread()
	own, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	other, err := os.Open(filepath.Join("/proc", m.leader, "ns/net"))
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if err := unix.Setns(int(other.Fd()), unix.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
	const address = "127.9.9.9"
	hub, err := hubtest.Start(hubtest.Options{Name: address, Address: address, Logf: t.Logf})
	if back := unix.Setns(int(own.Fd()), unix.CLONE_NEWNET); back != nil {
		t.Fatal(back) // and the thread ends with this goroutine
	}
	runtime.UnlockOSThread()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(hub.Close)
	return hub
}
