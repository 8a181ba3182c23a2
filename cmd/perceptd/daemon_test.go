package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"perceptd/agent/api"
	"perceptd/cmd/perceptd/e2e/perceptdtest"
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
		text += fmt.Sprintf("\n[[module]]\nname = %q\nrequire = \"socket\"\n\n[[grant]]\ncaller = { module = %q }\nidentity = \"vision\"\nresources = [%q]\n", module, module, perceptdtest.VaultURI)
	}
	return text
}

const vaultToken = api.PathToken + "?resource=" + perceptdtest.VaultURI

// A token goes with the last grant that allows it, and does not come back with the next.
func TestReloadTakesTokens(t *testing.T) {
	t.Parallel()
	d := launchDaemon(t, simulatedFor())
	_, before, err := d.get(d.token(), vaultToken)
	if err != nil || !strings.Contains(before, `"access_token"`) {
		t.Fatalf("%s %v", before, err)
	}
	without := simulatedFor()
	without = without[:strings.Index(without, "[[grant]]")]
	if status, body := d.reload(t, without); status != 200 || !strings.Contains(body, "no longer granted: uid") {
		t.Errorf("%d %s", status, body)
	}
	if status, body, _ := d.get(d.token(), vaultToken); status != 403 || !strings.Contains(body, string(api.CodeNotGranted)) {
		t.Errorf("%d %s", status, body)
	}
	if got := d.status(t); len(got.Tokens) != 0 || len(got.Trouble) != 1 || !strings.Contains(got.Trouble[0], "every caller is denied") {
		t.Errorf("%+v", got)
	}
	if status, body := d.reload(t, simulatedFor()); status != 200 {
		t.Errorf("%d %s", status, body)
	}
	if status, _, err := d.get(d.token(), vaultToken); status != 200 {
		t.Errorf("granted again: %d %v", status, err)
	}
	if got := d.status(t).Tokens; len(got) != 1 || got[0].Fetches != 1 {
		t.Errorf("granted again: %+v", got)
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
	if status, body := d.reload(t, simulatedFor("speech")); status != 200 || !strings.Contains(body, "no longer granted: module vision") {
		t.Errorf("%d %s", status, body)
	}
	if status, _, err := d.get(d.module("speech"), vaultToken); status != 200 {
		t.Errorf("the new module: %d %v", status, err)
	}
	if _, err := os.Stat(d.module("vision")); err == nil {
		t.Error("the old module's socket is still there")
	}
	if _, err := os.Stat(filepath.Dir(d.module("vision"))); err == nil {
		t.Error("the old module's folder is still there")
	}
	for _, row := range []struct{ text, says string }{
		{simulatedFor("speech", "vision") + "[x]\n", "unknown key x"},
		{strings.Replace(simulatedFor("speech", "vision"), `"simulated"`, `"simulated"`+"\nspeed = 9.0", 1), "[source] cannot change"},
	} {
		if status, body := d.reload(t, row.text); status != 422 || !strings.Contains(body, row.says) || !strings.Contains(body, string(api.CodeInvalidConfig)) {
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
	more := filepath.Join(filepath.Dir(d.config), "config.d", "more.toml")
	if err := errors.Join(os.Mkdir(filepath.Dir(more), 0o755), os.WriteFile(more, nil, 0o644)); err != nil {
		t.Fatal(err)
	}
	if status, body := d.reload(t, simulatedFor("speech")); status != 200 || !strings.Contains(body, "read from "+d.config+", "+more+", was "+d.config+`"`) {
		t.Errorf("one file more: %d %s", status, body)
	}
	d.rewrite(t, simulatedFor("vision"))
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
	simulatorDo(t, environment, "fault", "slow-body", "--every", "200us")
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

// listenAsSystemd returns the path of a notification socket, and what is told there.
func listenAsSystemd(t testing.TB) (path string, told <-chan string) {
	t.Helper()
	path = filepath.Join(perceptdtest.ShortFolder(t), "n")
	manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	messages := make(chan string, 1000)
	var reading sync.WaitGroup
	reading.Go(func() {
		message := make([]byte, 4096)
		for {
			n, err := manager.Read(message)
			if err != nil {
				return
			}
			select {
			case messages <- string(message[:n]):
			default: // nobody listens, which must not hold the daemon up
			}
		}
	})
	t.Cleanup(func() {
		_ = manager.Close()
		reading.Wait()
	})
	return path, messages
}

// awaitMessages waits until systemd was told each of the parts, in any order, since the last call.
func awaitMessages(t testing.TB, told <-chan string, parts ...string) {
	t.Helper()
	var heard []string
	limit := time.After(time.Minute)
	for {
		missing := slices.IndexFunc(parts, func(part string) bool {
			return !slices.ContainsFunc(heard, func(message string) bool { return strings.Contains(message, part) })
		})
		if missing < 0 {
			return
		}
		select {
		case message := <-told:
			heard = append(heard, message)
		case <-limit:
			t.Fatalf("systemd was never told %q, but %q", parts[missing], heard)
		}
	}
}

// awaitPings waits until the watchdog was fed by a check that began after the call.
func awaitPings(t testing.TB, told <-chan string) {
	t.Helper()
	for len(told) > 0 {
		<-told
	}
	limit := time.After(time.Minute)
	for pings := 0; pings < 2; { // the first may be of a check that began before
		select {
		case message := <-told:
			pings += strings.Count(message, "WATCHDOG=1")
		case <-limit:
			t.Fatal("systemd would have restarted the daemon")
		}
	}
}

// What systemd is told, over its real protocol.
func TestNotify(t *testing.T) {
	t.Parallel()
	manager, told := listenAsSystemd(t)
	d := launchDaemon(t, simulatedFor(), "NOTIFY_SOCKET="+manager, "WATCHDOG_USEC=200000")
	awaitMessages(t, told, "READY=1", "WATCHDOG=1", "STATUS=SIMULATED; 2 identities, 1 token, next refresh ")
	d.rewrite(t, "[x]\n")
	if err := d.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	awaitMessages(t, told, "RELOADING=1\nMONOTONIC_USEC=", "STATUS=SIMULATED; trouble: the last reload changed nothing", "READY=1", "WATCHDOG=1")
	if status := d.stop(t); status != 0 {
		t.Errorf("exit status %d", status)
	}
	awaitMessages(t, told, "STOPPING=1")
}
