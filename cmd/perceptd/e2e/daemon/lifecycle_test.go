package daemon

import (
	"errors"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"perceptd/agent/api"
	"perceptd/agent/simulator"
	"perceptd/cmd/perceptd/e2e/harness"
)

// A token goes with the last grant that allows it, and does not come back with the next.
func TestReloadTakesTokens(t *testing.T) {
	t.Parallel()
	d := harness.LaunchDaemon(t, harness.SimulatedFor())
	_, before, err := d.Get(d.Token(), harness.VaultToken)
	if err != nil || !strings.Contains(before, `"access_token"`) {
		t.Fatalf("%s %v", before, err)
	}
	without := harness.SimulatedFor()
	without = without[:strings.Index(without, "[[grant]]")]
	if status, body := d.Reload(t, without); status != 200 || !strings.Contains(body, "no longer granted: uid") {
		t.Errorf("%d %s", status, body)
	}
	if status, body, _ := d.Get(d.Token(), harness.VaultToken); status != 403 ||
		!strings.Contains(body, string(api.CodeNotGranted)) {
		t.Errorf("%d %s", status, body)
	}
	if got := d.Status(t); len(got.Tokens) != 0 || len(got.Trouble) != 1 ||
		!strings.Contains(got.Trouble[0], "every caller is denied") {
		t.Errorf("%+v", got)
	}
	if status, body := d.Reload(t, harness.SimulatedFor()); status != 200 {
		t.Errorf("%d %s", status, body)
	}
	if status, _, err := d.Get(d.Token(), harness.VaultToken); status != 200 {
		t.Errorf("granted again: %d %v", status, err)
	}
	if got := d.Status(t).Tokens; len(got) != 1 || got[0].Fetches != 1 {
		t.Errorf("granted again: %+v", got)
	}
}

// Requests that wait for a back end which does not answer are told to come back, not cut off.
func TestStopAnswersWhoWaits(t *testing.T) {
	t.Parallel()
	_, environment := harness.StartSimulator(t, "imds", "--fault", "hang")
	d := harness.LaunchDaemon(t, manyResources(), environment...)
	answered := make(chan int)
	go func() {
		status, _, _ := d.Get(d.Token(), api.PathToken+"?resource=api://1")
		answered <- status
	}()
	harness.Until(t, "the request", d.Ended, func() bool { return len(d.Status(t).Tokens) == 1 })
	status := d.Stop(t)
	if got := <-answered; got != 503 || status != 0 {
		t.Errorf("the request got %d, the daemon ended with %d", got, status)
	}
}

func TestSecondDaemon(t *testing.T) {
	t.Parallel()
	d := harness.LaunchDaemon(t, harness.SimulatedFor())
	out, err := exec.Command(harness.Binary(t, "perceptd"), "--config", d.Config, "--runtime-dir",
		d.Dir).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "another perceptd") {
		t.Errorf("%v %s", err, out)
	}
	if status, _, err := d.Get(d.Token(), harness.VaultToken); status != 200 {
		t.Errorf("the first one is harmed: %d %v", status, err)
	}
}

func TestReload(t *testing.T) {
	t.Parallel()
	d := harness.LaunchDaemon(t, harness.SimulatedFor("vision"))
	if status, body := d.Reload(t, harness.SimulatedFor("speech")); status != 200 ||
		!strings.Contains(body, "no longer granted: module vision") {
		t.Errorf("%d %s", status, body)
	}
	if status, _, err := d.Get(d.Module("speech"), harness.VaultToken); status != 200 {
		t.Errorf("the new module: %d %v", status, err)
	}
	if _, err := os.Stat(d.Module("vision")); err == nil {
		t.Error("the old module's socket is still there")
	}
	if _, err := os.Stat(filepath.Dir(d.Module("vision"))); err != nil {
		t.Error("the old module's folder, which a container may have mounted, is gone")
	}
	for _, row := range []struct{ text, says string }{
		{harness.SimulatedFor("speech", "vision") + "[x]\n", "unknown key x"},
		{strings.Replace(harness.SimulatedFor("speech", "vision"), `"simulated"`, `"simulated"`+"\nspeed = 9.0", 1),
			"[source] cannot change"},
	} {
		if status, body := d.Reload(t, row.text); status != 422 || !strings.Contains(body, row.says) ||
			!strings.Contains(body, string(api.CodeInvalidConfig)) {
			t.Errorf("%d %s", status, body)
		}
		if got := d.Status(t); !strings.Contains(got.Config.Error, row.says) || len(got.Trouble) != 1 {
			t.Errorf("status after %q: %+v", row.says, got.Config)
		}
		if _, err := os.Stat(d.Module("vision")); err == nil {
			t.Error("half of a bad configuration is in force")
		}
		if status, _, err := d.Get(d.Module("speech"), harness.VaultToken); status != 200 {
			t.Errorf("the configuration before is no longer in force: %d %v", status, err)
		}
	}
	more := filepath.Join(filepath.Dir(d.Config), "config.d", "more.toml")
	if err := errors.Join(os.Mkdir(filepath.Dir(more), 0o755), os.WriteFile(more, nil, 0o644)); err != nil {
		t.Fatal(err)
	}
	if status, body := d.Reload(t, harness.SimulatedFor("speech")); status != 200 ||
		!strings.Contains(body, "read from "+d.Config+", "+more+", was "+d.Config+`"`) {
		t.Errorf("one file more: %d %s", status, body)
	}
	d.Rewrite(t, harness.SimulatedFor("vision"))
	if err := d.Cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	harness.Until(t, "the reload by signal", d.Ended, func() bool {
		status, _, _ := d.Get(d.Module("vision"), harness.VaultToken)
		return status == 200
	})
	harness.Until(t, "a status without trouble", d.Ended, func() bool { return len(d.Status(t).Trouble) == 0 })
}

// A request that is under way when the daemon is told to stop gets its answer: the back end's comes after that.
func TestStopDrains(t *testing.T) {
	t.Parallel()
	_, environment := harness.StartSimulator(t, "imds", "--fault", "hang")
	d := harness.LaunchDaemon(t, manyResources(), environment...)
	type answer struct {
		status int
		err    error
	}
	answered := make(chan answer)
	go func() {
		status, _, err := d.Get(d.Token(), api.PathToken+"?resource=api://1")
		answered <- answer{status, err}
	}()
	harness.Until(t, "the request", d.Ended, func() bool {
		tokens := d.Status(t).Tokens
		return len(tokens) == 1 && tokens[0].State == api.StateFetching
	})
	if err := d.Cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	harness.Until(t, "it stops", d.Ended, func() bool { return strings.Contains(d.Text(), "\tstopping\t") })
	letGo, err := http.NewRequestWithContext(t.Context(), http.MethodDelete,
		harness.ValueOf(environment, simulator.URLVariable)+"/simulator/faults", nil)
	if err != nil {
		t.Fatal(err)
	}
	letGo.Header.Set("Simulator-Control", "true")
	response, err := http.DefaultClient.Do(letGo)
	if err != nil {
		t.Fatal(err)
	}
	_ = response.Body.Close()
	if response.StatusCode != http.StatusNoContent {
		t.Fatalf("the back end hangs on: %s", response.Status)
	}
	got := <-answered
	<-d.Ended
	if status := d.Cmd.ProcessState.ExitCode(); got.status != 200 || status != 0 {
		t.Errorf("the request under way got %d %v, the daemon ended with %d", got.status, got.err, status)
	}
}
