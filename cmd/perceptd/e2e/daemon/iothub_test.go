package daemon

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"perceptd/agent/api"
	"perceptd/agent/iothub/hubtest"
	"perceptd/cmd/perceptd/e2e/harness"
)

// site is a hub, and the network on the way to it.
type site struct {
	*hubtest.Hub
	network *relay
	folder  string // of files that devices need
}

// hubPort is where a hub listens for MQTT, whatever a connection string says.
const hubPort = 8883

// newSite starts a hub whose name is the address of the network on the way to it.
func newSite(t *testing.T) *site {
	t.Helper()
	s := &site{folder: harness.ShortFolder(t), network: newRelay(t, hubPort)}
	var err error
	s.Hub, err = hubtest.Start(hubtest.Options{Name: s.network.host})
	must(t, err)
	t.Cleanup(s.Close)
	s.network.passTo(t, s.MQTTAddress())
	must(t, os.WriteFile(s.path("ca.pem"), s.RootPEM(), 0o644))
	return s
}

// path is a file for devices.
func (s *site) path(name string) string { return filepath.Join(s.folder, name) }

// secret writes a secret into a file and returns its path.
func (s *site) secret(t *testing.T, name, text string) string {
	t.Helper()
	must(t, os.WriteFile(s.path(name), []byte(text), 0o600))
	return s.path(name)
}

// section is an [iothub] that tries again soon and reports at once.
func (s *site) section(credentials string) string {
	return fmt.Sprintf("\n[iothub]\n%s\nca_file = %q\nmax_backoff = \"1s\"\nreport_spread = \"0s\"\n",
		credentials, s.path("ca.pem"))
}

// byFile is the [iothub] of an identity whose connection string is in a file.
func (s *site) byFile(t *testing.T, name, connectionString string) string {
	t.Helper()
	return s.section(fmt.Sprintf("connection_string_file = %q", s.secret(t, name, connectionString)))
}

// awaitHub waits until the hub's part of a daemon's status is so.
func awaitHub(t *testing.T, d *harness.Daemon, what string, reached func(api.HubStatus) bool) api.HubStatus {
	t.Helper()
	var last api.HubStatus
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("while it waited for %s, the hub's last status was %+v", what, last)
		}
	})
	harness.Until(t, what, d.Ended, func() bool {
		if s := d.Status(t).Hub; s != nil {
			last = *s
			return reached(last)
		}
		return false
	})
	return last
}

func isConnected(s api.HubStatus) bool { return s.Connected }

// awaitReported waits until the twin says so of the device, in percept of its reported properties.
func (s *site) awaitReported(t *testing.T, d *harness.Daemon, id, what string, reached func(map[string]any) bool) {
	t.Helper()
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("reported: %v", s.Reported(id))
		}
	})
	harness.Until(t, what+" in the reported properties", d.Ended, func() bool {
		percept, _ := s.Reported(id)["percept"].(map[string]any)
		return percept != nil && reached(percept)
	})
}

// desire changes the desired properties of percept, and returns their version.
func (s *site) desire(t *testing.T, id string, percept any) int64 {
	t.Helper()
	text, err := json.Marshal(map[string]any{"percept": percept})
	must(t, err)
	version, err := s.UpdateDesired(id, text)
	must(t, err)
	return version
}

// A device is known by each kind of credential, and shows its tokens in its twin.
func TestIoTHubCredentials(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	for name, connect := range map[string]func(t *testing.T) (id, section string, environment []string){
		"a file": func(t *testing.T) (string, string, []string) {
			return "a-file", s.byFile(t, "a-file", s.CreateDevice("a-file")), nil
		},
		"a module's": func(t *testing.T) (string, string, []string) {
			s.CreateDevice("a-device")
			return "a-device/percept", s.byFile(t, "a-module", s.CreateModule("a-device", "percept")), nil
		},
		"systemd's credential": func(t *testing.T) (string, string, []string) {
			credentials := t.TempDir()
			must(t, os.WriteFile(filepath.Join(credentials, "iothub"), []byte(s.CreateDevice("a-credential")+"\n"),
				0o400))
			return "a-credential", s.section(`credential = "iothub"`), []string{"CREDENTIALS_DIRECTORY=" + credentials}
		},
		"a certificate": func(t *testing.T) (string, string, []string) {
			certificate, certPEM, keyPEM, err := s.NewClientCertificate("a-certificate")
			must(t, err)
			s.CreateCertificateDevice("a-certificate", leaf(t, certificate))
			must(t, os.WriteFile(s.path("device.pem"), certPEM, 0o644))
			return "a-certificate", s.section(fmt.Sprintf(
				"certificate_file = %q\nkey_file = %q\nhub = %q\ndevice = \"a-certificate\"", s.path("device.pem"),
				s.secret(t, "device.key", string(keyPEM)), s.Name())), nil
		},
		"the identity service": func(t *testing.T) (string, string, []string) {
			s.CreateDevice("an-edge")
			service := startIdentityService(t, s.CreateModule("an-edge", "percept"))
			return "an-edge/percept", s.section(fmt.Sprintf(
				"identity_service = true\nidentity_socket = %q\nkey_socket = %q", service.identitySocket,
				service.keySocket)), nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			id, section, environment := connect(t)
			d := harness.LaunchDaemon(t, harness.SimulatedFor()+section, environment...)
			hub := awaitHub(t, d, "the connection", isConnected)
			device, module, _ := strings.Cut(id, "/")
			if hub.Hub != s.Name() || hub.Device != device || hub.Module != module || hub.Transport != "mqtt" {
				t.Errorf("%+v", hub)
			}
			s.awaitReported(t, d, id, "its version", func(percept map[string]any) bool {
				return percept["version"] == d.Status(t).Version
			})
			if status := d.Stop(t); status != 0 {
				t.Errorf("it ended with %d", status)
			}
		})
	}
}

// leaf is the certificate itself.
func leaf(t *testing.T, of tls.Certificate) *x509.Certificate {
	t.Helper()
	certificate, err := x509.ParseCertificate(of.Certificate[0])
	must(t, err)
	return certificate
}
