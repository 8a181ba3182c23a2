package config

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"perceptd/cmd/perceptd/e2e/harness"
)

// loadIoTHub reads a configuration whose [iothub] begins at line 18.
func loadIoTHub(t *testing.T, text string) (Config, error) {
	t.Helper()
	return Load(harness.WriteConfig(t, map[string]string{"config.toml": harness.GoodConfig + "\n" + text}))
}

func TestIoTHubIsRead(t *testing.T) {
	t.Parallel()
	const certificate = "certificate_file = \"/etc/percept/device.pem\"\nhub = \"h.azure-devices.net\"\n" +
		"device = \"percept-7\"\n"
	for _, row := range []struct {
		text string
		want IoTHub
		says string
	}{
		{"", IoTHub{}, ""},
		{"[iothub]\nconnection_string_file = \"/etc/percept/iothub\"\n",
			IoTHub{ConnectionString: Secret{File: "/etc/percept/iothub"}},
			"by the connection string in /etc/percept/iothub, over MQTT (port 8883)"},
		{"[iothub]\ncredential = \"iothub\"\ntransport = \"mqtt\"\n",
			IoTHub{ConnectionString: Secret{Credential: "iothub"}},
			"by the connection string in systemd's credential iothub, over MQTT (port 8883)"},
		{"[iothub]\n" + certificate + "key_file = \"/etc/percept/device.key\"\ntransport = \"websocket\"\n",
			IoTHub{Certificate: Certificate{File: "/etc/percept/device.pem",
				Key: Secret{File: "/etc/percept/device.key"},
				Hub: "h.azure-devices.net", Device: "percept-7"}, WebSocket: true},
			"as percept-7 of h.azure-devices.net, by the certificate in /etc/percept/device.pem with the key in " +
				"/etc/percept/device.key, over WebSocket (port 443)"},
		{"[iothub]\n" + certificate + "key_credential = \"iothub-key\"\nmodule = \"percept\"\ngateway = " +
			"\"edge:18883\"\n",
			IoTHub{Certificate: Certificate{File: "/etc/percept/device.pem", Key: Secret{Credential: "iothub-key"},
				Hub: "h.azure-devices.net", Gateway: "edge:18883", Device: "percept-7", Module: "percept"}},
			"as percept-7/percept of h.azure-devices.net, by the certificate in /etc/percept/device.pem with the key " +
				"in systemd's credential iothub-key, at edge:18883, over MQTT (port 8883)"},
		{"[iothub]\nidentity_service = true\nidentity_socket = \"/run/a.sock\"\nkey_socket = \"/run/b.sock\"\n" +
			"proxy = \"http://user@proxy.example:3128\"\nproxy_password_file = \"/etc/percept/proxy\"\n" +
			"ca_file = \"/etc/percept/ca.pem\"\ntoken_life = \"12h\"\nkeep_alive = \"2m\"\nmax_backoff = \"30m\"\n" +
			"report_spread = \"10m\"\nevents = true\n",
			IoTHub{IdentityService: IdentityService{On: true, IdentitySocket: "/run/a.sock", KeySocket: "/run/b.sock"},
				Proxy: "http://user@proxy.example:3128", ProxyPassword: Secret{File: "/etc/percept/proxy"},
				CAFile: "/etc/percept/ca.pem", TokenLife: 12 * time.Hour, KeepAlive: 2 * time.Minute,
				MaxBackoff: 30 * time.Minute, ReportSpread: 10 * time.Minute, Events: true},
			"by what IoT Edge's identity service says, at /run/a.sock, with keys of /run/b.sock, over MQTT (port " +
				"8883), through the proxy http://user@proxy.example:3128, with the password in /etc/percept/proxy, " +
				"trusting the certificates in /etc/percept/ca.pem, token_life 12h0m0s, keep_alive 2m0s, max_backoff " +
				"30m0s, report_spread 10m0s, with events"},
		{"[iothub]\ncredential = \"iothub\"\nreport_spread = \"0s\"\n",
			IoTHub{ConnectionString: Secret{Credential: "iothub"}, ReportSpread: noSpread},
			"by the connection string in systemd's credential iothub, over MQTT (port 8883), report_spread 0s"},
	} {
		c, err := loadIoTHub(t, row.text)
		if err != nil || c.IoTHub != row.want || c.IoTHub.Configured() != (row.text != "") {
			t.Errorf("%s: %v, %+v", row.text, err, c.IoTHub)
		}
		if line := "\nIoT Hub: " + row.says + "\n"; strings.Contains(c.Describe(), line) != (row.says != "") {
			t.Errorf("%s: %q in\n%s", row.text, line, c.Describe())
		}
	}
}

// What a later file says counts, also that what an earlier one says does not.
func TestIoTHubInTwoFiles(t *testing.T) {
	t.Parallel()
	files := map[string]string{
		"config.toml": harness.GoodConfig + "\n[iothub]\ncredential = \"iothub\"\nevents = true\n" +
			"proxy = \"http://p:1\"\n",
		"config.d/a.toml": "[iothub]\nevents = false\nproxy = \"\"\nmax_backoff = \"20m\"\n",
	}
	before, err := Load(harness.WriteConfig(t, files))
	want := IoTHub{ConnectionString: Secret{Credential: "iothub"}, MaxBackoff: 20 * time.Minute}
	if err != nil || before.IoTHub != want {
		t.Fatalf("%+v %v", before.IoTHub, err)
	}
	files["config.d/a.toml"] = ""
	after, err := Load(harness.WriteConfig(t, files))
	if err != nil {
		t.Fatal(err)
	}
	without, err := loadIoTHub(t, "")
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		now, was Config
		want     string
	}{
		{after, before, "[connects to IoT Hub anew by the connection string in systemd's credential iothub, over " +
			"MQTT (port 8883), through the proxy http://p:1, with events, was by the connection string in systemd's " +
			"credential iothub, over MQTT (port 8883), max_backoff 20m0s]"},
		{without, after, "[not connected to IoT Hub any more, was by the connection string in systemd's credential " +
			"iothub, over MQTT (port 8883), through the proxy http://p:1, with events]"},
		{before, without, "[connects to IoT Hub by the connection string in systemd's credential iothub, over MQTT " +
			"(port 8883), max_backoff 20m0s]"},
		{after, after, "[]"},
	} {
		if got := fmt.Sprint(row.now.iothubChanges(row.was)); got != row.want {
			t.Errorf("%s\nwant %s", got, row.want)
		}
	}
}

// The hash is that of the files' bytes in their order, as sha256sum has it.
func TestHashOfTheConfiguration(t *testing.T) {
	t.Parallel()
	c, err := Load(harness.WriteConfig(t, map[string]string{
		"config.toml": "[[identity]]\nname = \"a\"\n", "config.d/a.toml": "# a\n", "config.d/b.toml": "# b\n",
		"config.d/c.txt": "not read",
	}))
	const want = "577671b0bcaa560580afa7608ef6c10a11da90adede908b01435567df4bb5227"
	if err != nil || c.SHA256 != want {
		t.Errorf("%s %v", c.SHA256, err)
	}
}

// secretInIt is what nobody may read in an error.
const secretInIt = "canarySharedKey0123456789"

func TestIoTHubFaults(t *testing.T) {
	t.Parallel()
	const (
		byFile      = "[iothub]\ncredential = \"iothub\"\n"
		certificate = "[iothub]\ncertificate_file = \"/c.pem\"\n"
		whole       = "\"HostName=h.azure-devices.net;DeviceId=d;SharedAccessKey=" + secretInIt + "\"\n"
	)
	for _, row := range []struct{ name, text, want string }{
		{"nothing in it", "[iothub]\n", "config.toml:18: [iothub] does not say who the device is: write " +
			"connection_string_file, credential, certificate_file with key_file, hub and device, or " +
			"identity_service = true, or take [iothub] out"},
		{"not by the identity service", "[iothub]\nidentity_service = false\n",
			"config.toml:18: [iothub] does not say who the device is"},
		{"a connection string", "[iothub]\nconnection_string = " + whole,
			"config.toml:19: unknown key iothub.connection_string: a connection string is a secret, and this file is " +
				"none: keep the secret in a file of its own (owner root, group percept, mode 0640), and name that as " +
				"connection_string_file"},
		{"a connection string for its file", "[iothub]\nconnection_string_file = " + whole,
			"config.toml:19: iothub.connection_string_file must be an absolute path"},
		{"one that looks like a path", "[iothub]\nconnection_string_file = \"/SharedAccessKey=" + secretInIt + "\"\n",
			"config.toml:19: iothub.connection_string_file must be an absolute path"},
		{"a connection string for the hub", certificate + "key_file = \"/k\"\ndevice = \"d\"\nhub = " + whole,
			"config.toml:22: iothub.hub must be the hub's host name"},
		{"a connection string for a credential", "[iothub]\ncredential = " + whole,
			"config.toml:19: iothub.credential must be the name of a credential that systemd gives the service"},
		{"a key that is not known", "[iothub]\nconection_string_file = \"/x\"\n",
			"config.toml:19: unknown key iothub.conection_string_file: [iothub] has connection_string_file, " +
				"credential, "},
		{"a password", byFile + "proxy = \"http://u@p:1\"\nproxy_password = \"" + secretInIt + "\"\n",
			"config.toml:21: unknown key iothub.proxy_password: a password is a secret, and this file is none: keep " +
				"it in a file of its own (owner root, group percept, mode 0640), and name that as proxy_password_file"},
		{"two brackets", "[[iothub]]\ncredential = \"iothub\"\n", "config.toml:18"},
		{"two", byFile + "connection_string_file = \"/etc/percept/iothub\"\n",
			"config.toml:19: iothub.credential beside iothub.connection_string_file: one of them says who the device " +
				"is"},
		{"two others", byFile + "identity_service = true\n",
			"config.toml:20: iothub.identity_service beside iothub.credential: one of them"},
		{"a relative path", "[iothub]\nconnection_string_file = \"iothub\"\n",
			"config.toml:19: iothub.connection_string_file must be an absolute path, such as /etc/percept/iothub"},
		{"a path that leads up", byFile + "ca_file = \"/etc/../ca.pem\"\n",
			"config.toml:20: iothub.ca_file must be an absolute path"},
		{"a credential in a folder", "[iothub]\ncredential = \"../iothub\"\n",
			"config.toml:19: iothub.credential must be the name of a credential"},
		{"no key", certificate, "config.toml:19: iothub.certificate_file lacks its key: write key_file, or " +
			"key_credential"},
		{"two keys", certificate + "key_file = \"/k\"\nkey_credential = \"k\"\n",
			"config.toml:21: iothub.key_credential beside iothub.key_file: take one of them out"},
		{"no hub", certificate + "key_file = \"/k\"\n",
			"config.toml:19: iothub.hub must be the hub's host name beside certificate_file, such as"},
		{"no device", certificate + "key_file = \"/k\"\nhub = \"h\"\n",
			"config.toml:19: iothub.device must be the device's ID in the hub beside certificate_file"},
		{"a device that would be two topics", certificate + "key_file = \"/k\"\nhub = \"h\"\ndevice = \"a/b\"\n",
			"config.toml:22: iothub.device must be"},
		{"a module that is no ID", certificate + "key_file = \"/k\"\nhub = \"h\"\ndevice = \"a\"\nmodule = \"#\"\n",
			"config.toml:23: iothub.module must be a module's ID"},
		{"a gateway that is a URL", certificate + "key_file = \"/k\"\nhub = \"h\"\ndevice = \"a\"\ngateway = " +
			"\"tls://h\"\n",
			"config.toml:23: iothub.gateway must be the host name"},
		{"a device beside a connection string", byFile + "device = \"d\"\n",
			"config.toml:20: iothub.device belongs to certificate_file, and iothub.credential says all of that itself"},
		{"a socket of nothing", byFile + "key_socket = \"/run/k.sock\"\n",
			"config.toml:20: iothub.key_socket has no effect without identity_service = true"},
		{"transport", byFile + "transport = \"amqp\"\n",
			`config.toml:20: iothub.transport is "amqp": it must be "mqtt" (port 8883) or "websocket" (port 443)`},
		{"proxy", byFile + "proxy = \"proxy.example:3128\"\n",
			"config.toml:20: iothub.proxy must be a URL of http, https or socks5 with a host and a port"},
		{"a proxy that is no URL", byFile + "proxy = \"http://u:" + secretInIt + "@%%\"\n",
			"config.toml:20: iothub.proxy must be a URL"},
		{"a password in the proxy", byFile + "proxy = \"http://u:" + secretInIt + "@p:1\"\n",
			"config.toml:20: iothub.proxy has a password in it, and this file is no secret: keep it in " +
				"a file of its own (owner root, group percept, mode 0640), and name that as proxy_password_file"},
		{"a password of nobody", byFile + "proxy = \"http://p:1\"\nproxy_password_file = \"/p\"\n",
			"config.toml:20: iothub.proxy names no user whose password there is"},
		{"two passwords", byFile +
			"proxy = \"http://u@p:1\"\nproxy_password_file = \"/p\"\nproxy_password_credential = \"p\"\n",
			"config.toml:22: iothub.proxy_password_credential beside iothub.proxy_password_file"},
		{"a password without a proxy", byFile + "proxy_password_file = \"/p\"\n",
			"config.toml:18: [iothub] has a proxy's password and no proxy"},
		{"a life without a unit", byFile + "token_life = 24\n",
			"config.toml:20: iothub.token_life is 24: write a duration"},
		{"a life of nothing", byFile + "token_life = \"0s\"\n",
			"config.toml:20: iothub.token_life is 0s: it must be between 1m0s and 8760h0m0s"},
		{"a keep-alive that the hub refuses", byFile + "keep_alive = \"20m\"\n",
			"config.toml:20: iothub.keep_alive is 20m0s: it must be between 10s and 19m37s"},
		{"back-off", byFile + "max_backoff = \"-1m\"\n",
			"config.toml:20: iothub.max_backoff is -1m0s: it must be between 1s and 24h0m0s"},
		{"spread", byFile + "report_spread = \"25h\"\n",
			"config.toml:20: iothub.report_spread is 25h0m0s: it must be between 0s and 24h0m0s"},
		{"events", byFile + "events = \"yes\"\n",
			"config.toml:20: iothub.events must be true or false, without quotes, and is a text"},
	} {
		_, err := loadIoTHub(t, row.text)
		if err == nil || !strings.Contains(err.Error(), row.want) {
			t.Errorf("%s: %v\nwant %s", row.name, err, row.want)
		}
		if err != nil && strings.Contains(err.Error(), secretInIt) {
			t.Errorf("%s: the secret is in the error: %v", row.name, err)
		}
	}
}

// The files of secrets are as perceptd can read them wherever a person is told how they are to be.
func TestAdviceOnTheFilesOfSecrets(t *testing.T) {
	t.Parallel()
	example, err := os.ReadFile("../../../deploy/config.example.toml")
	if err != nil {
		t.Fatal(err)
	}
	if text := strings.ReplaceAll(string(example), "\n# ", " "); !strings.Contains(text, "each is in "+ownFile) {
		t.Error("config.example.toml does not say " + ownFile)
	}
	page, err := os.ReadFile("../../../docs/iothub.md")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(page), "install -m 0640 -o root -g "+serviceUser+" /dev/stdin /etc/percept/iothub") {
		t.Error("iothub.md makes another file than " + ownFile)
	}
}

// docs/iothub.md has each key of [iothub], and the bounds that hold. Defaults are held by who has them, agent/iothub
// and agent/iothub/link.
func TestDocumentedKeysOfIoTHub(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("../../../docs/iothub.md")
	if err != nil {
		t.Fatal(err)
	}
	_, text, found := strings.Cut(string(page), "\n## The keys of `[iothub]`\n")
	text, _, _ = strings.Cut(text, "\n## ")
	rows := make(map[string]string)
	for _, row := range regexp.MustCompile("(?m)^\\| `(\\w+)` \\|.*\\| (.*) \\|$").FindAllStringSubmatch(text, -1) {
		rows[row[1]] = row[2]
	}
	if !found || len(rows) != len(iothubKeys) {
		t.Errorf("%d keys are in the table, of %d", len(rows), len(iothubKeys))
	}
	for _, key := range iothubKeys {
		if rows[key] == "" {
			t.Errorf("the table lacks %s", key)
		}
	}
	for key, bounds := range map[string][2]time.Duration{
		"token_life": {minTokenLife, maxTokenLife}, "keep_alive": {minKeepAlive, maxKeepAlive},
		"max_backoff": {minMaxBackoff, maxMaxBackoff}, "report_spread": {0, maxReportSpread},
	} {
		shown := regexp.MustCompile("^`(.*?)` to `(.*?)`").FindStringSubmatch(rows[key])
		for i, bound := range bounds {
			if shown == nil {
				t.Errorf("%s has no bounds: %q", key, rows[key])
				break
			}
			if is, err := time.ParseDuration(shown[i+1]); err != nil || is != bound {
				t.Errorf("%s: %s is shown, it is %v", key, shown[i+1], bound)
			}
		}
	}
}
