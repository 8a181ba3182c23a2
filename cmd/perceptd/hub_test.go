package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"perceptd/agent/api"
	"perceptd/agent/iothub/hubtest"
	"perceptd/cmd/perceptd/config"
	"perceptd/cmd/perceptd/e2e/harness"
)

func TestHubTroubles(t *testing.T) {
	t.Parallel()
	since := time.Date(2026, 11, 28, 8, 0, 0, 0, time.UTC)
	refused := api.DesiredStatus{Version: 7, Applied: 6, Refused: "percept.deny[0]: unknown key modul"}
	const refusal = "what IoT Hub sets is refused, version 7 of the twin's desired properties: percept.deny[0]: " +
		"unknown key modul"
	for _, row := range []struct {
		name string
		of   api.HubStatus
		why  error
		now  time.Time
		want []string
	}{
		{"connected", api.HubStatus{Connected: true, Since: since, LastError: "EOF"}, nil, since.Add(time.Hour), nil},
		{"away for a moment", api.HubStatus{Since: since, LastError: "EOF"}, nil, since.Add(api.HubPatience - 1), nil},
		{"away", api.HubStatus{Since: since, LastError: "connection refused"}, nil, since.Add(api.HubPatience),
			[]string{"IoT Hub is not connected since Nov 28 08:00 UTC: connection refused"}},
		{"refused at once", api.HubStatus{Since: since, LastError: "CONNACK 5", Failure: api.HubFailureRefused}, nil,
			since,
			[]string{"IoT Hub is not connected since Nov 28 08:00 UTC: CONNACK 5"}},
		{"two with one identity", api.HubStatus{Since: since, LastError: "EOF", Failure: api.HubFailureReplaced}, nil,
			since,
			[]string{"the connections to IoT Hub do not last: EOF"}},
		{"two, and connected for now", api.HubStatus{Connected: true, Since: since, LastError: "EOF",
			Failure: api.HubFailureReplaced}, nil, since.Add(api.HubStable - 1),
			[]string{"the connections to IoT Hub do not last: EOF"}},
		{"two before", api.HubStatus{Connected: true, Since: since, LastError: "EOF", Failure: api.HubFailureReplaced},
			nil,
			since.Add(api.HubStable), nil},
		{"a name at a start", api.HubStatus{Since: since, LastError: "no such host", Failure: api.HubFailureName}, nil,
			since.Add(29 * time.Second), nil},
		{"a name", api.HubStatus{Since: since, LastError: "no such host", Failure: api.HubFailureName}, nil,
			since.Add(30 * time.Second), []string{"IoT Hub is not connected since Nov 28 08:00 UTC: no such host"}},
		{"a name that was found before", api.HubStatus{Since: since, LastError: "no such host",
			Failure: api.HubFailureName, Reported: since}, nil, since.Add(api.HubPatience - 1), nil},
		{"away without a word", api.HubStatus{Since: since}, nil, since.Add(time.Hour),
			[]string{"IoT Hub is not connected since Nov 28 08:00 UTC: it does not answer"}},
		{"a file is not there", api.HubStatus{Since: since}, errors.New("/ca.pem: file does not exist"), since,
			[]string{"IoT Hub: what [iothub] names cannot be used: /ca.pem: file does not exist: mend it, then " +
				"perceptctl reload"}},
		{"refused", api.HubStatus{Connected: true, Since: since, Desired: refused}, nil, since,
			[]string{refusal}},
		{"without room", api.HubStatus{Connected: true, Since: since,
			Desired: api.DesiredStatus{Version: 7, NoRoom: 1}}, nil,
			since, []string{"the twin in IoT Hub denies too much: one entry of its deny has no room, and denies " +
				"nothing"}},
		{"refused, and away since", api.HubStatus{Since: since, LastError: "EOF", Desired: refused}, nil,
			since.Add(time.Hour), []string{"IoT Hub is not connected since Nov 28 08:00 UTC: EOF", refusal}},
	} {
		if got := hubTroubles(row.of, false, row.why, row.now); !slices.Equal(got, row.want) {
			t.Errorf("%s: %q", row.name, got)
		}
	}
	denying := refused
	denying.Denies = 2
	if got := hubTroubles(api.HubStatus{Connected: true, Desired: denying}, false, nil, since); len(got) != 1 ||
		!strings.HasSuffix(got[0], denying.Refused+"; 2 entries of its deny are in force all the same") {
		t.Errorf("refused, and denying: %q", got)
	}
	if got := hubTroubles(api.HubStatus{Connected: true, Desired: refused}, true, nil, since); got != nil {
		t.Errorf("set aside: %q", got)
	}
}

// Where systemd gives the credential a restart mends what is wrong with it, and not a reload.
func TestMendOfACredential(t *testing.T) {
	t.Parallel()
	file := config.IoTHub{ConnectionString: config.Secret{File: "/etc/percept/iothub"}}
	given := config.IoTHub{ConnectionString: config.Secret{Credential: "iothub"}}
	password := fmt.Errorf("the proxy's password: %w", &config.NotGivenError{Name: "proxy"})
	for _, row := range []struct {
		name    string
		failure api.HubFailure
		conf    config.IoTHub
		why     error
		want    string // is in it; empty: it is empty
	}{
		{"a file", api.HubFailureCredentials, file, nil, ""},
		{"a credential", api.HubFailureCredentials, given, nil, "LoadCredential=iothub:FILE"},
		{"a credential that the hub refuses", api.HubFailureRefused, given, nil, "LoadCredential=iothub:;"},
		{"the network", api.HubFailureNetwork, given, nil, ""},
		{"another's file", api.HubFailureCredentials, given, errors.New("/ca.pem: file does not exist"), ""},
		{"another credential", api.HubFailureCredentials, file, password, "LoadCredential=proxy:FILE"},
	} {
		got := mendFor(row.failure, row.conf, row.why)
		if (got == "") != (row.want == "") || !strings.Contains(got, row.want) ||
			got != "" && !strings.Contains(got, "then sudo systemctl restart perceptd") {
			t.Errorf("%s: %q", row.name, got)
		}
	}
	if got := hubTroubles(api.HubStatus{}, false, password, time.Now()); len(got) != 1 ||
		strings.Contains(got[0], "perceptctl reload") || !strings.Contains(got[0], "then systemctl restart perceptd") {
		t.Errorf("%q", got)
	}
}

// A reload connects the device, connects it anew where that is configured otherwise, and leaves nothing of it behind
// where [iothub] is taken out. What is wrong in it changes nothing.
func TestReloadOfIoTHub(t *testing.T) {
	hub, err := hubtest.Start(hubtest.Options{Name: hubAddress, Address: hubAddress})
	if err != nil {
		t.Fatal(err)
	}
	defer hub.Close()
	folder := harness.ShortFolder(t)
	section := func(device string) string {
		for name, text := range map[string]string{device: hub.CreateDevice(device), "ca.pem": string(hub.RootPEM())} {
			if err := os.WriteFile(filepath.Join(folder, name), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		return fmt.Sprintf("\n[iothub]\nconnection_string_file = %q\nca_file = %q\nmax_backoff = \"1s\"\n",
			filepath.Join(folder, device), filepath.Join(folder, "ca.pem"))
	}
	d := runInside(t, harness.SimulatedFor())
	d.AwaitHealth(t)
	connected := func(device string) {
		t.Helper()
		harness.Until(t, "the connection of "+device, d.Ended, func() bool {
			s := d.Status(t).Hub
			return s != nil && s.Connected && s.Device == device && hub.IsConnected(device)
		})
	}
	reload := func(config string, want int, says string) {
		t.Helper()
		if status, body := d.Reload(t, harness.SimulatedFor()+config); status != want || !strings.Contains(body, says) {
			t.Errorf("%d %s", status, body)
		}
	}
	one, other := section("one"), section("other")
	reload(one, 200, "connects to IoT Hub by the connection string in "+filepath.Join(folder, "one"))
	connected("one")
	reload(one, 200, `"changes":[]`)
	credential, err := os.ReadFile(filepath.Join(folder, "one"))
	if err != nil {
		t.Fatal(err)
	}
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(folder, "one"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("no connection string")
	reload(one, 200, "the credential for IoT Hub cannot be read, and a connection that there is goes on")
	devices, texts, tries := []string{"next", "one"}, []string{hub.CreateDevice("next"), string(credential)}, 0
	// The link may have read a file by itself already: each reload has it look some time later.
	harness.Until(t, "a reload that says that the credential differs", d.Ended, func() bool {
		write(texts[tries%2])
		tries++
		_, body := d.Reload(t, harness.SimulatedFor()+one)
		return strings.Contains(body, "the credential for IoT Hub was read again, and differs: connects anew")
	})
	connected(devices[(tries-1)%2])
	write(string(credential))
	reload(one, 200, "")
	connected("one")
	reload(one+"transport = \"amqp\"\n", 422, "iothub.transport is")
	reload(strings.Replace(other, "/other", "/nothing", 1), 422, "nothing: file does not exist")
	connected("one")
	reload(other, 200, "connects to IoT Hub anew")
	connected("other")
	if hub.IsConnected("one") {
		t.Error("the identity from before is connected still")
	}
	if !ofTheHub.MatchString(stacks()) {
		t.Fatal("a connection cannot be told by its stacks: this test sees less than it should")
	}
	if _, err := hub.UpdateDesired("other", []byte(`{"percept":{"deny":[{"module":"vision"}]}}`)); err != nil {
		t.Fatal(err)
	}
	harness.Until(t, "the twin's denial", d.Ended, func() bool { return len(d.Status(t).Deny.InForce()) == 1 })
	reload("", 200, "not connected to IoT Hub any more")
	if s := d.Status(t); s.Hub != nil || len(s.Deny.InForce()) != 1 {
		t.Errorf("%+v, and what the twin denied: %+v", s.Hub, s.Deny)
	}
	harness.Until(t, "everything of the hub to end", d.Ended, func() bool { return !ofTheHub.MatchString(stacks()) })
	if got := d.end(); got != exitOK {
		t.Errorf("exit status %d", got)
	}
}

// hubAddress is a loopback address that no other process's test has.
var hubAddress = fmt.Sprintf("127.%d.%d.77", 1+os.Getpid()>>8%250, os.Getpid()&0xff)

// ofTheHub finds what keeps a device connected among stacks.
var ofTheHub = regexp.MustCompile(`agent/iothub\.|agent/iothub/link|paho`)

// stacks returns those of every goroutine.
func stacks() string {
	text := make([]byte, 4<<20)
	return string(text[:runtime.Stack(text, true)])
}
