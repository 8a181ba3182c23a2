package daemon

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"perceptd/agent/api"
	"perceptd/agent/simulator"
	"perceptd/cmd/perceptd/e2e/harness"
)

// No token, and no secret of an endpoint, in anything that the daemon and its tool print, also when the
// daemon dies with all its stacks on stderr.
func TestCanary(t *testing.T) {
	t.Parallel()
	for _, form := range []string{"app-service", "arc"} {
		t.Run(form, func(t *testing.T) {
			t.Parallel()
			if form == "arc" && os.Getuid() != 0 {
				t.Skip("needs root: azidentity takes Arc's key files from /var/opt/azcmagent/tokens only")
			}
			testCanary(t, form)
		})
	}
}

func testCanary(t *testing.T, form string) {
	_, environment := harness.StartSimulator(t, form)
	manager, told := harness.ListenAsSystemd(t)
	d := harness.LaunchDaemon(t, bothEnds(form), append(environment, "NOTIFY_SOCKET="+manager)...)
	tool := func(args ...string) *exec.Cmd {
		return exec.Command(harness.Binary(t, "perceptctl"), append([]string{"--socket", d.Token()}, args...)...)
	}
	var secrets []string
	for _, identity := range []string{"device", "vision", "speech"} {
		out, err := tool("token", "--resource", harness.VaultURI, "--identity", identity).Output()
		if err != nil {
			t.Fatal(err)
		}
		// The first part, the header, is the same for every token: its second and third are the canaries.
		parts := strings.SplitN(strings.TrimSpace(string(out)), ".", 2)
		secrets = append(secrets, parts[1][:40], parts[1][len(parts[1])-40:])
	}
	if form == "arc" {
		secrets = append(secrets, keysInUse(t, environment,
			tool("refresh", "--resource", harness.VaultURI, "--identity", "device"))...)
	}
	for _, variable := range environment {
		if value, ok := strings.CutPrefix(variable, "IDENTITY_HEADER="); ok {
			secrets = append(secrets, value)
		}
	}
	if len(secrets) < 7 {
		t.Fatalf("%d canaries", len(secrets))
	}
	printed := printEverything(t, d, environment, tool)
	if err := d.Cmd.Process.Signal(syscall.SIGQUIT); err != nil {
		t.Fatal(err)
	}
	<-d.Ended
	if !strings.Contains(d.Text(), "goroutine ") {
		t.Error("no stacks: this test sees less than it should")
	}
	printed += d.Text()
	for len(told) > 0 {
		printed += <-told
	}
	if !strings.Contains(printed, "STATUS=") {
		t.Error("no status text: this test sees less than it should")
	}
	for _, secret := range secrets {
		if len(secret) < 16 {
			t.Fatalf("a canary of %d characters", len(secret))
		}
		if strings.Contains(printed, secret) {
			t.Errorf("a secret was printed:\n%s", printed)
			return
		}
	}
}

// keysInUse runs a command that makes the daemon show a key of Arc's agent, and returns the keys that were
// there meanwhile: the key stays until the slow challenge is over.
func keysInUse(t *testing.T, environment []string, refresh *exec.Cmd) []string {
	t.Helper()
	harness.SimulatorDo(t, environment, "fault", "slow-body", "--challenge", "--every", "5ms")
	defer harness.SimulatorDo(t, environment, "fault", "--clear")
	p := harness.Begin(t, nil, refresh)
	var keys []string
	seen := make(map[string]bool)
	for ended := false; !ended; {
		select {
		case <-p.Ended:
			ended = true
		case <-time.After(10 * time.Millisecond):
		}
		files, err := filepath.Glob(filepath.Join(simulator.DefaultArcKeyDir, "*.key"))
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			// Another package's test may have a pipe there, which is not waited for.
			f, err := os.OpenFile(file, os.O_RDONLY|syscall.O_NONBLOCK, 0)
			if err != nil {
				continue // it was used since, and so is not ours: it went before we looked
			}
			key, err := io.ReadAll(f)
			f.Close()
			if err == nil && len(key) > 0 && !seen[string(key)] {
				seen[string(key)] = true
				keys = append(keys, string(key))
			}
		}
	}
	if len(keys) == 0 {
		t.Fatalf("no key was seen\n%s", p.Text())
	}
	return keys
}

// printEverything has the daemon and its tool say all that they can say, in good times and bad ones.
func printEverything(t *testing.T, d *harness.Daemon, environment []string, tool func(...string) *exec.Cmd) string {
	t.Helper()
	var printed strings.Builder
	note := func(args ...string) {
		out, _ := tool(args...).CombinedOutput()
		printed.Write(out)
	}
	noteBody := func(socket, method, path string) {
		_, body, err := d.Ask(socket, method, path, "")
		if err != nil {
			t.Fatal(err)
		}
		printed.WriteString(body)
	}
	note("status")
	note("refresh")
	note("reload")
	note("token", "--resource", harness.VaultURI, "--identity", "vision", "--short")
	note("token", "--resource", "https://graph.microsoft.com")
	note("token", "--resource", harness.VaultURI, "--identity", "nobody")
	noteBody(d.Admin(), "GET", api.PathStatus)
	noteBody(d.Token(), "GET", api.PathToken+"?resource=https://graph.microsoft.com")
	noteBody(d.Token(), "POST", api.PathToken)
	noteBody(d.Token(), "GET", api.PathIMDSToken+"?api-version=2018-02-01&resource=https://graph.microsoft.com")
	noteBody(d.Token(), "GET",
		api.PathAppServiceToken+"?api-version=2019-08-01&client_id=unknown&resource="+harness.VaultURI)
	for _, fault := range []string{"html", "not-json", "empty-token", "wrong-identity", "unavailable", "past-exp",
		"reset", "redirect"} {
		harness.SimulatorDo(t, environment, "fault", fault)
		note("refresh", "--resource", harness.VaultURI, "--identity", "device")
		note("token", "--resource", "https://storage.azure.com", "--identity", "vision", "--min-ttl", "24h")
		noteBody(d.Admin(), "GET", api.PathStatus)
		harness.SimulatorDo(t, environment, "fault", "--clear")
	}
	note("status")
	if status, _ := d.Reload(t, "[x]\n"); status != 422 {
		t.Errorf("a bad configuration: %d", status)
	}
	noteBody(d.Admin(), "GET", api.PathStatus)
	arguments, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", d.Cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	printed.Write(arguments)
	return printed.String()
}
