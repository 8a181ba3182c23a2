package main

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"perceptd/agent/api"
)

// simulatedFor lets this user and the named modules have tokens of the embedded simulated back end.
func simulatedFor(modules ...string) string {
	text := fmt.Sprintf(`[source]
kind = "simulated"

[[identity]]
name = "device"
default = true

[[identity]]
name = "vision"
client_id = "00000000-0000-0000-0000-000000000001"

[[grant]]
caller = { uid = %d }
identity = "device"
resources = ["https://vault.azure.net"]
prefetch = true
`, os.Getuid())
	for _, module := range modules {
		text += fmt.Sprintf("\n[[grant]]\ncaller = { module = %q }\nidentity = \"vision\"\nresources = [%q]\n", module, vaultURI)
	}
	return text
}

const vaultToken = api.PathToken + "?resource=" + vaultURI

func TestSockets(t *testing.T) {
	t.Parallel()
	d := launchDaemon(t, simulatedFor("vision"))
	for path, want := range map[string]os.FileMode{d.token(): 0o666, d.admin(): 0o660, d.module("vision"): 0o666} {
		info, err := os.Lstat(path)
		if err != nil || info.Mode() != want|os.ModeSocket {
			t.Errorf("%s: %v, %v", path, info.Mode(), err)
		}
	}
	for socket, identity := range map[string]string{d.token(): "device", d.module("vision"): "vision"} {
		status, body, err := d.get(socket, vaultToken)
		if err != nil || status != 200 || !strings.Contains(body, `"identity":"`+identity+`"`) {
			t.Errorf("%s: %d %s %v", socket, status, body, err)
		}
	}
	// Whoever comes in on a module's socket is that module, root or not.
	if status, body, _ := d.get(d.module("vision"), vaultToken+"&identity=device"); status != 403 {
		t.Errorf("the module vision got a token of device: %d %s", status, body)
	}
	if status := d.stop(t); status != 0 {
		t.Errorf("exit status %d", status)
	}
	if _, err := os.Lstat(d.token()); err == nil {
		t.Error("the token socket is still there")
	}
	if _, err := os.Stat(filepath.Dir(d.module("vision"))); err != nil {
		t.Errorf("a module's folder is gone with the daemon, and what has it mounted sees nothing any more: %v", err)
	}
}

// A module is known by its socket, so that no other user of the device may get to it. What mounts its
// folder elsewhere is root's business.
func TestModuleSocketsAreShut(t *testing.T) {
	t.Parallel()
	d := launchDaemon(t, simulatedFor("vision"))
	info, err := os.Stat(filepath.Join(d.dir, api.ModulesDirName))
	if err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("%v %v", info.Mode(), err)
	}
	if os.Getuid() != 0 {
		return // only root can be somebody else
	}
	for _, dir := range []string{d.dir, filepath.Dir(binary(t, "perceptctl"))} {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for socket, status := range map[string]int{d.module("vision"): 3, d.token(): 4} {
		c := exec.Command(binary(t, "perceptctl"), "--socket", socket, "token", "--resource", vaultURI)
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		if out, _ := c.CombinedOutput(); c.ProcessState.ExitCode() != status {
			t.Errorf("another user at %s: exit status %d, want %d\n%s", socket, c.ProcessState.ExitCode(), status, out)
		}
	}
}

// What one module has done to its own folder is its own trouble.
func TestSpoiltModuleFolder(t *testing.T) {
	t.Parallel()
	d := launchDaemon(t, simulatedFor())
	if err := os.MkdirAll(d.module("vision"), 0o755); err != nil { // a folder in the socket's place
		t.Fatal(err)
	}
	if err := os.WriteFile(d.config, []byte(simulatedFor("vision", "speech")), 0o644); err != nil {
		t.Fatal(err)
	}
	if status, body, err := d.ask(d.admin(), "POST", api.PathReload, ""); status != 200 {
		t.Errorf("%d %s %v", status, body, err)
	}
	if status, _, err := d.get(d.module("speech"), vaultToken); status != 200 {
		t.Errorf("the other module: %d %v", status, err)
	}
	if got := d.status(t).Trouble; len(got) != 1 || !strings.Contains(got[0], "module vision has no socket") {
		t.Errorf("trouble %q", got)
	}
	if err := os.Remove(d.module("vision")); err != nil {
		t.Fatal(err)
	}
	if status, body, err := d.ask(d.admin(), "POST", api.PathReload, ""); status != 200 {
		t.Errorf("%d %s %v", status, body, err)
	}
	if status, _, err := d.get(d.module("vision"), vaultToken); status != 200 || len(d.status(t).Trouble) != 0 {
		t.Errorf("mended: %d %v %q", status, err, d.status(t).Trouble)
	}
}

// Requests that wait for a back end which does not answer are told to come back, not cut off.
func TestStopAnswersWhoWaits(t *testing.T) {
	t.Parallel()
	_, environment := startSimulator(t, "imds", "--fault", "hang")
	d := launchDaemon(t, manyResources(), environment...)
	answered := make(chan int)
	go func() {
		status, _, _ := d.get(d.token(), api.PathToken+"?resource=api://1")
		answered <- status
	}()
	until(t, "the request", d.ended, func() bool { return len(d.status(t).Tokens) == 1 })
	status := d.stop(t)
	if got := <-answered; got != 503 || status != 0 {
		t.Errorf("the request got %d, the daemon ended with %d", got, status)
	}
}

func TestSecondDaemon(t *testing.T) {
	t.Parallel()
	d := launchDaemon(t, simulatedFor())
	out, err := exec.Command(binary(t, "perceptd"), "--config", d.config, "--runtime-dir", d.dir).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "another perceptd") {
		t.Errorf("%v %s", err, out)
	}
	if status, _, err := d.get(d.token(), vaultToken); status != 200 {
		t.Errorf("the first one is harmed: %d %v", status, err)
	}
}

func TestReload(t *testing.T) {
	t.Parallel()
	d := launchDaemon(t, simulatedFor("vision"))
	rewrite := func(text string) {
		t.Helper()
		if err := os.WriteFile(d.config, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	reload := func() (int, string) {
		t.Helper()
		status, body, err := d.ask(d.admin(), "POST", api.PathReload, "")
		if err != nil {
			t.Fatal(err)
		}
		return status, body
	}
	rewrite(simulatedFor("speech"))
	if status, body := reload(); status != 200 || !strings.Contains(body, "no longer granted: module vision") {
		t.Errorf("%d %s", status, body)
	}
	if status, _, err := d.get(d.module("speech"), vaultToken); status != 200 {
		t.Errorf("the new module: %d %v", status, err)
	}
	if _, err := os.Stat(d.module("vision")); err == nil {
		t.Error("the old module's socket is still there")
	}
	if _, err := os.Stat(filepath.Dir(d.module("vision"))); err != nil {
		t.Errorf("the old module's folder is gone, and a container that has it mounted is cut off for ever: %v", err)
	}
	for _, row := range []struct{ text, says string }{
		{simulatedFor("speech", "vision") + "[x]\n", "unknown key x"},
		{strings.Replace(simulatedFor("speech", "vision"), `"simulated"`, `"simulated"`+"\nspeed = 9.0", 1), "[source] cannot change"},
	} {
		rewrite(row.text)
		if status, body := reload(); status != 422 || !strings.Contains(body, row.says) || !strings.Contains(body, string(api.CodeInvalidConfig)) {
			t.Errorf("%d %s", status, body)
		}
		if got := d.status(t); !strings.Contains(got.Config.Error, row.says) || len(got.Trouble) != 1 {
			t.Errorf("status after %q: %+v", row.says, got.Config)
		}
		if _, err := os.Stat(d.module("vision")); err == nil {
			t.Error("half of a bad configuration is in force")
		}
		if status, _, err := d.get(d.module("speech"), vaultToken); status != 200 {
			t.Errorf("the configuration before is no longer in force: %d %v", status, err)
		}
	}
	rewrite(simulatedFor("vision"))
	if err := d.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	until(t, "the reload by signal", d.ended, func() bool {
		status, _, _ := d.get(d.module("vision"), vaultToken)
		return status == 200
	})
	until(t, "a status without trouble", d.ended, func() bool { return len(d.status(t).Trouble) == 0 })
}

// A request that is under way when the daemon is told to stop gets its answer.
func TestStopDrains(t *testing.T) {
	t.Parallel()
	_, environment := startSimulator(t, "imds")
	d := launchDaemon(t, manyResources(), environment...)
	simulatorDo(t, environment, "fault", "slow-body", "--every", "1ms")
	type answer struct {
		status int
		err    error
	}
	answered := make(chan answer)
	go func() {
		status, _, err := d.get(d.token(), api.PathToken+"?resource=api://1")
		answered <- answer{status, err}
	}()
	until(t, "the request", d.ended, func() bool {
		tokens := d.status(t).Tokens
		return len(tokens) == 1 && tokens[0].State == api.StateFetching
	})
	status := d.stop(t)
	if got := <-answered; got.status != 200 || status != 0 {
		t.Errorf("the request under way got %d %v, the daemon ended with %d", got.status, got.err, status)
	}
}

// What systemd is told, over its real protocol.
func TestNotify(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("", "notify")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "n"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer manager.Close()
	told := make(chan string, 1000)
	go func() {
		message := make([]byte, 4096)
		for {
			n, err := manager.Read(message)
			if err != nil {
				return
			}
			told <- string(message[:n])
		}
	}()
	var heard []string // since the last mark
	awaits := func(part string) {
		t.Helper()
		limit := time.After(time.Minute)
		for !slices.ContainsFunc(heard, func(message string) bool { return strings.Contains(message, part) }) {
			select {
			case message := <-told:
				heard = append(heard, message)
			case <-limit:
				t.Fatalf("systemd was never told %q, but %q", part, heard)
			}
		}
	}
	d := launchDaemon(t, simulatedFor(), "NOTIFY_SOCKET="+filepath.Join(dir, "n"), "WATCHDOG_USEC=200000")
	awaits("READY=1")
	awaits("WATCHDOG=1")
	awaits("STATUS=SIMULATED; 2 identities, 1 token, next refresh ")
	heard = nil
	if err := os.WriteFile(d.config, []byte("[x]\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := d.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	awaits("RELOADING=1\nMONOTONIC_USEC=")
	awaits("STATUS=SIMULATED; trouble: the last reload changed nothing")
	awaits("READY=1")
	awaits("WATCHDOG=1")
	if status := d.stop(t); status != 0 {
		t.Errorf("exit status %d", status)
	}
	awaits("STOPPING=1")
}

// No token, and no secret of an endpoint, in anything that the daemon and its tool print, also when the
// daemon dies with all its stacks on stderr.
func TestCanary(t *testing.T) {
	t.Parallel()
	_, environment := startSimulator(t, "app-service")
	d := launchDaemon(t, bothEnds("app-service"), environment...)
	var secrets []string
	for _, variable := range environment {
		if value, ok := strings.CutPrefix(variable, "IDENTITY_HEADER="); ok {
			secrets = append(secrets, value)
		}
	}
	tool := func(args ...string) *exec.Cmd {
		return exec.Command(binary(t, "perceptctl"), append([]string{"--socket", d.token()}, args...)...)
	}
	for _, identity := range []string{"device", "vision", "speech"} {
		out, err := tool("token", "--resource", vaultURI, "--identity", identity).Output()
		if err != nil {
			t.Fatal(err)
		}
		// The first part, the header, is the same for every token: its second and third are the canaries.
		parts := strings.SplitN(strings.TrimSpace(string(out)), ".", 2)
		secrets = append(secrets, parts[1][:40], parts[1][len(parts[1])-40:])
	}
	var printed strings.Builder
	note := func(args ...string) {
		out, _ := tool(args...).CombinedOutput()
		printed.Write(out)
	}
	note("status")
	note("status", "--json")
	note("refresh")
	note("reload")
	note("token", "--resource", vaultURI, "--identity", "vision", "--short")
	note("token", "--resource", "https://graph.microsoft.com")
	note("token", "--resource", vaultURI, "--identity", "nobody")
	for _, fault := range []string{"html", "not-json", "empty-token", "wrong-identity", "reset", "redirect"} {
		simulatorDo(t, environment, "fault", fault)
		note("refresh", "--resource", vaultURI)
		note("token", "--resource", "https://storage.azure.com", "--identity", "vision", "--min-ttl", "24h")
		note("status")
		simulatorDo(t, environment, "fault", "--clear")
	}
	arguments, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", d.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	printed.Write(arguments)
	if err := d.cmd.Process.Signal(syscall.SIGQUIT); err != nil {
		t.Fatal(err)
	}
	<-d.ended
	if !strings.Contains(d.text(), "goroutine ") {
		t.Error("no stacks: this test sees less than it should")
	}
	all := printed.String() + d.text()
	for _, secret := range secrets {
		if len(secret) < 16 {
			t.Fatalf("a canary of %d characters", len(secret))
		}
		if strings.Contains(all, secret) {
			t.Errorf("a secret was printed:\n%s", all)
			return
		}
	}
	if len(secrets) != 7 {
		t.Errorf("%d canaries", len(secrets))
	}
}
