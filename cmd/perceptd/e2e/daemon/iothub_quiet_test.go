package daemon

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"perceptd/agent/api"
	"perceptd/cmd/perceptd/e2e/harness"
)

// No connection string, key, signature, proxy password or text of the twin in anything that the daemon and its tool
// print, also when the daemon dies with all its stacks on stderr.
func TestCanaryOfTheHub(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	manager, told := harness.ListenAsSystemd(t)
	connectionString := s.CreateDevice("canary")
	_, key, _ := strings.Cut(connectionString, "SharedAccessKey=")
	const textOfTwin, password = "canary-of-the-twin-91d2", "canary-of-the-proxy-7c1e"
	section := s.byFile(t, "canary", connectionString)
	d := harness.LaunchDaemon(t, harness.SimulatedFor("vision")+section, "NOTIFY_SOCKET="+manager)
	awaitHub(t, d, "the connection", isConnected)
	tool := func(args ...string) *exec.Cmd {
		return exec.Command(harness.Binary(t, "perceptctl"), append([]string{"--socket", d.Token()}, args...)...)
	}
	var printed strings.Builder
	look := func() {
		for _, args := range [][]string{{"status"}, {"status", "--json"}, {"doctor"}, {"deny"}, {"policy-changes"}} {
			out, _ := tool(args...).CombinedOutput() // doctor finds fault with this device
			printed.Write(out)
		}
	}
	secretElsewhere, err := json.Marshal(map[string]any{"another": map[string]any{"password": textOfTwin}})
	must(t, err)
	_, err = s.UpdateDesired("canary", secretElsewhere)
	must(t, err)
	for _, percept := range []any{
		map[string]any{"deny": []any{map[string]any{"module": "vision"}}},
		map[string]any{"deny": []any{map[string]any{"modul": textOfTwin}}},
		map[string]any{"deny": textOfTwin},
	} {
		s.desire(t, "canary", nil)
		version := s.desire(t, "canary", percept)
		awaitHub(t, d, "the twin", func(h api.HubStatus) bool { return h.Desired.Version == version })
		look()
	}
	for _, fault := range []func(){
		func() { s.Faults.RefuseLogins.Store(true); s.DropAll() },
		func() { s.Faults.RefuseLogins.Store(false); s.Faults.RefuseSubscribes.Store(4); s.DropAll() },
		func() { s.secret(t, "canary", "HostName=h;DeviceId=d;SharedAccessKey="+key[:20]); s.DropAll() },
		func() { s.secret(t, "canary", key); s.DropAll() },
	} {
		since := d.Status(t).Hub.LastErrorOn
		fault()
		awaitHub(t, d, "the fault", func(h api.HubStatus) bool { return h.LastErrorOn.After(since) })
		look()
	}
	s.secret(t, "canary", connectionString)
	for _, wrong := range []string{
		"\n[iothub]\nconnection_string = \"" + connectionString + "\"\n",
		"\n[iothub]\nconnection_string_file = \"" + connectionString + "\"\n",
		"\n[iothub]\ncredential = \"" + connectionString + "\"\n",
		section + "proxy = \"http://user:" + password + "@127.0.0.1:1\"\n",
	} {
		status, body := d.Reload(t, harness.SimulatedFor("vision")+wrong)
		if status != 422 {
			t.Errorf("%d %s", status, body)
		}
		printed.WriteString(body)
		look()
		out, _ := exec.Command(harness.Binary(t, "perceptd"), "--check", "--config", d.Config).CombinedOutput()
		printed.Write(out)
	}
	withProxy := section + fmt.Sprintf("proxy = \"http://user@127.0.0.1:1\"\nproxy_password_file = %q\n",
		s.secret(t, "password", password))
	status, body := d.Reload(t, harness.SimulatedFor("vision")+withProxy)
	if status != 200 {
		t.Errorf("%d %s", status, body)
	}
	printed.WriteString(body)
	awaitHub(t, d, "the proxy to be missed", func(h api.HubStatus) bool { return h.Failure == api.HubFailureProxy })
	look()
	out, _ := exec.Command(harness.Binary(t, "perceptd"), "--check", "--config", d.Config).CombinedOutput()
	printed.Write(out)
	status, body = d.Reload(t, harness.SimulatedFor("vision")+section)
	if status != 200 {
		t.Errorf("%d %s", status, body)
	}
	printed.WriteString(body)
	awaitHub(t, d, "the connection", isConnected)
	arguments, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", d.Cmd.Process.Pid))
	must(t, err)
	printed.Write(arguments)
	must(t, d.Cmd.Process.Signal(syscall.SIGQUIT))
	<-d.Ended
	printed.WriteString(d.Text())
	for len(told) > 0 {
		printed.WriteString(<-told)
	}
	if !strings.Contains(d.Text(), "agent/iothub/link") || !strings.Contains(printed.String(), s.Name()) {
		t.Error("no stacks of the link, or no hub in the status: this test sees less than it should")
	}
	reported, err := json.Marshal(s.Reported("canary"))
	must(t, err)
	printed.Write(reported)
	for what, secret := range map[string]string{"the key": key, "a part of it": key[:20], "a signature": "&sig=",
		"a signature, escaped": "sig%3D", "text of the twin": textOfTwin, "the proxy's password": password} {
		if strings.Contains(printed.String(), secret) {
			t.Errorf("%s was printed", what)
		}
	}
}

// footprint is what a process has of its own.
type footprint struct {
	goroutines int
	anonymous  int // kB
	stacks     string
}

// dumped has a daemon die with its stacks, and returns its footprint from just before.
func dumped(t *testing.T, d *harness.Daemon) footprint {
	t.Helper()
	f := footprint{anonymous: anonymous(t, d)}
	must(t, d.Cmd.Process.Signal(syscall.SIGQUIT))
	<-d.Ended
	_, f.stacks, _ = strings.Cut(d.Text(), "SIGQUIT: quit")
	if f.goroutines = strings.Count(f.stacks, "\ngoroutine "); f.goroutines == 0 {
		t.Fatal("no stacks: this test sees less than it should")
	}
	return f
}

// anonymous returns RssAnon of a daemon, in kB.
func anonymous(t *testing.T, d *harness.Daemon) int {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(d.Cmd.Process.Pid), "status"))
	must(t, err)
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, "RssAnon:"); ok {
			kB, err := strconv.Atoi(strings.TrimSuffix(strings.TrimSpace(value), " kB"))
			must(t, err)
			return kB
		}
	}
	t.Fatal("no RssAnon")
	return 0
}

// Without [iothub] nothing of it runs. What a reload ends is looked at in the process: TestReloadOfIoTHub of
// cmd/perceptd.
func TestWithoutIoTHub(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	connected := harness.LaunchDaemon(t, harness.SimulatedFor()+s.byFile(t, "on", s.CreateDevice("on")))
	awaitHub(t, connected, "the connection", isConnected)
	without := harness.LaunchDaemon(t, harness.SimulatedFor())
	without.AwaitReady(t)
	if without.Status(t).Hub != nil {
		t.Error("its status has a hub")
	}
	on, off := dumped(t, connected), dumped(t, without)
	if !strings.Contains(on.stacks, "agent/iothub") || !strings.Contains(on.stacks, "paho") {
		t.Fatal("a connection cannot be told by its stacks: this test sees less than it should")
	}
	if strings.Contains(off.stacks, "iothub") || strings.Contains(off.stacks, "paho") {
		t.Errorf("something of it runs:\n%s", off.stacks)
	}
	t.Logf("%d goroutines and %d kB, with a hub %d and %d", off.goroutines, off.anonymous, on.goroutines, on.anonymous)
}

// ofTheHub finds the packages that a device without a hub has no use for.
var ofTheHub = regexp.MustCompile(`iothub|agent/deny|perceptd/config|paho|gorilla|x/net/proxy`)

// What belongs to the hub allocates next to nothing while a program begins that may never have one. Regular expressions
// with lengths in them do.
func TestIoTHubCostsNothingAtTheStart(t *testing.T) {
	t.Parallel()
	version := exec.Command(harness.Binary(t, "perceptd"), "--version")
	version.Env = append(os.Environ(), "GODEBUG=inittrace=1")
	out, err := version.CombinedOutput()
	must(t, err)
	of := regexp.MustCompile(`(?m)^init (\S+) .* (\d+) bytes, \d+ allocs$`)
	bytes, packages := 0, 0
	for _, line := range of.FindAllStringSubmatch(string(out), -1) {
		if packages++; !ofTheHub.MatchString(line[1]) {
			continue
		}
		n, err := strconv.Atoi(line[2])
		must(t, err)
		bytes += n
	}
	if packages < 20 {
		t.Fatalf("%d packages: this test sees less than it should: %s", packages, out)
	}
	if bytes > 100_000 {
		t.Errorf("%d bytes are allocated for the hub before anything begins:\n%s", bytes, out)
	}
}

// Connections that come and go, and a twin that changes, leave no goroutine and no memory behind.
func TestTheHubLeavesNothingBehind(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	fresh := harness.LaunchDaemon(t, harness.SimulatedFor("vision")+s.byFile(t, "fresh", s.CreateDevice("fresh")))
	awaitHub(t, fresh, "the connection", isConnected)
	d := harness.LaunchDaemon(t, harness.SimulatedFor("vision")+s.byFile(t, "used", s.CreateDevice("used")))
	use := func(rounds int) {
		for range rounds {
			before := s.Counters("used").Connects
			s.Drop("used")
			harness.Until(t, "another connection", d.Ended, func() bool { return s.Counters("used").Connects > before })
			for _, percept := range []any{map[string]any{"deny": []any{deniedModule}}, map[string]any{"deny": nil}} {
				version := s.desire(t, "used", percept)
				awaitHub(t, d, "the twin", func(h api.HubStatus) bool { return h.Desired.Applied == version })
			}
		}
	}
	awaitHub(t, d, "the connection", isConnected)
	use(3)
	before := anonymous(t, d)
	use(10)
	if after := anonymous(t, d); after > before+4<<10 {
		t.Errorf("%d kB are %d kB after 10 more connections", before, after)
	}
	used, fewest := dumped(t, d), dumped(t, fresh)
	if used.goroutines > fewest.goroutines+5 {
		t.Errorf("%d goroutines, and %d at first:\n%s", used.goroutines, fewest.goroutines, used.stacks)
	}
}
