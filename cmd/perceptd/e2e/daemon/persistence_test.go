package daemon

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/simulator"
	"perceptd/cmd/perceptd/e2e/harness"
)

// startKeeping starts a daemon with a key for its file of tokens, and returns what it then holds.
func startKeeping(t *testing.T, config string, environment ...string) (*harness.Daemon, api.TokenStatus) {
	t.Helper()
	d := harness.NewDaemon(t, config)
	d.GiveKey(t, d.KeyFile(), 'k')
	d.Again(t, environment...)
	return d, d.Held(t)
}

// wantFetched checks that a start has used no token that was kept, and has said why.
func wantFetched(t *testing.T, d *harness.Daemon, says string) {
	t.Helper()
	if now := d.Held(t); now.Fetches != 1 {
		t.Errorf("%d fetches", now.Fetches)
	}
	if !strings.Contains(d.Text(), says) {
		t.Errorf("it does not say %q", says)
	}
}

// Through a restart and a crash tokens are with systemd, which needs no key.
func TestTokensOutliveACrash(t *testing.T) {
	t.Parallel()
	harness.Binary(t, "perceptd")
	store := newFDStore(t)
	d := harness.NewDaemon(t, harness.SimulatedFor())
	store.start(t, d)
	d.AwaitHealth(t)
	before := d.Held(t)
	if kept := d.Status(t).Kept; !kept.Restart || kept.Reboot ||
		!strings.Contains(kept.Why, "perceptctl cache-key make") {
		t.Errorf("%+v", kept)
	}
	harness.Until(t, "the cache to be stored", d.Ended, func() bool { return len(store.all()) == 1 })
	for _, end := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM, syscall.SIGKILL} {
		if err := d.Cmd.Process.Signal(end); err != nil {
			t.Fatal(err)
		}
		<-d.Ended
		store.start(t, d)
		d.AwaitHealth(t)
		d.MustBeSame(t, end.String(), before)
	}
	if all := store.all(); len(all) != 1 {
		t.Errorf("stored %q", all)
	}
}

// What systemd keeps and cannot be used is said, and costs a call to the back end.
func TestHandedOverNonsense(t *testing.T) {
	t.Parallel()
	harness.Binary(t, "perceptd")
	store := newFDStore(t)
	for _, name := range []string{fdCache + "7", fdCache + "x"} {
		null, err := os.Open(os.DevNull)
		if err != nil {
			t.Fatal(err)
		}
		store.put(renamed(t, null, name))
	}
	d := harness.NewDaemon(t, harness.SimulatedFor())
	store.start(t, d)
	d.AwaitHealth(t)
	wantFetched(t, d, "what systemd has kept of the cache is of no use")
	harness.Until(t, "the new one in the place of the others", d.Ended, func() bool {
		all := store.all()
		return len(all) == 1 && all[0] != fdCache+"7" && all[0] != fdCache+"x"
	})
}

// Through a stop they are in the file, for whoever has its key.
func TestTokensOutliveAStop(t *testing.T) {
	t.Parallel()
	d, before := startKeeping(t, harness.SimulatedFor())
	_, told := os.Lstat("/run/percept-cache-key/device")
	if kept := d.Status(t).Kept; !kept.Reboot || kept.Restart || kept.BoundTo == "" ||
		kept.Untold != errors.Is(told, fs.ErrNotExist) {
		t.Errorf("%+v, and what root tells of the device: %v", kept, told)
	}
	d.Stop(t)
	sealed, err := os.ReadFile(filepath.Join(d.Dir, "state", "tokens.sealed"))
	if err != nil || strings.Contains(string(sealed), "eyJ") || strings.Contains(string(sealed), harness.VaultURI) {
		t.Errorf("%d bytes, %v", len(sealed), err)
	}
	d.Again(t)
	d.MustBeSame(t, "after a stop", before)
	if err := d.Cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-d.Ended
	d.Again(t)
	d.MustBeSame(t, "after a crash", before)
	d.Stop(t)

	credentials := t.TempDir()
	d.GiveKey(t, filepath.Join(credentials, "percept-cache-key"), 'k')
	if err := os.Remove(d.KeyFile()); err != nil {
		t.Fatal(err)
	}
	d.Again(t, "CREDENTIALS_DIRECTORY="+credentials)
	d.MustBeSame(t, "with the key as systemd's credential", before)
	d.Stop(t)

	d.GiveKey(t, d.KeyFile(), 'x')
	d.Again(t)
	wantFetched(t, d, "the kept tokens cannot be used and are fetched anew")
	d.Stop(t) // so that the others are saved
	aside, _ := filepath.Glob(filepath.Join(d.Dir, "state", "tokens.sealed.unreadable-*"))
	if len(aside) != 1 {
		t.Errorf("moved aside: %q", aside)
	}
}

// A sealed key that is opened while the daemon runs is taken then, and what was kept with it: nobody restarts anything.
func TestKeyIsTakenWhenItComes(t *testing.T) {
	t.Parallel()
	d, _ := startKeeping(t, harness.SimulatedFor())
	d.Stop(t)
	key := d.KeyFile()
	harness.Must(t, os.Remove(key))
	harness.Must(t, os.WriteFile(key+".cred", nil, 0o600))
	d.Again(t)
	status := d.Status(t)
	trouble := strings.Join(status.Trouble, "\n")
	if status.Kept.Reboot || status.Kept.BoundTo != "" || strings.Count(trouble, key+".cred, was not opened") != 1 ||
		!strings.Contains(trouble, "perceptctl cache-key show") {
		t.Errorf("%+v, %q", status.Kept, trouble)
	}
	d.GiveKey(t, key, 'k')
	harness.Until(t, "the key to be taken", d.Ended, func() bool {
		status := d.Status(t)
		return status.Kept.Reboot && status.Kept.BoundTo != "" && len(status.Trouble) == 0
	})
	d.Stop(t)
	d.Again(t)
	if now := d.Held(t); now.Fetches != 0 {
		t.Errorf("%d fetches by the start after that", now.Fetches)
	}
}

// Tokens of one source are of no use to another.
func TestTokensOfAnotherSource(t *testing.T) {
	t.Parallel()
	d, _ := startKeeping(t, harness.SimulatedFor())
	d.Stop(t)
	d.Rewrite(t, strings.Replace(harness.SimulatedFor(), `kind = "simulated"`,
		"kind = \"simulated\"\nendpoint = \"imds\"", 1))
	d.Again(t)
	wantFetched(t, d, "the kept tokens are of another source")
}

// A source is told from another by its address, too: what somebody's simulator gave is not served once it is gone. Nor
// is it while it is there without a word.
func TestTokensOfAnotherAddress(t *testing.T) {
	t.Parallel()
	_, first := harness.StartSimulator(t, "app-service")
	d, before := startKeeping(t, strings.Replace(harness.SimulatedFor(), `"simulated"`, `"managed-identity"`, 1),
		first...)
	if status := d.Status(t); !status.Simulated || status.Source.Kind != "managed-identity" {
		t.Errorf("simulated %v, of %+v", status.Simulated, status.Source)
	}
	doctor := exec.Command(harness.Binary(t, "perceptctl"), "doctor", "--socket", d.Token())
	said, _ := doctor.CombinedOutput() // which tells of a fault
	if text := strings.Join(strings.Fields(string(said)), " "); !strings.Contains(text,
		"FAIL source: SIMULATED: a token that is held says") {
		t.Errorf("doctor: %s", said)
	}
	d.Stop(t)

	d.Again(t, first...)
	d.MustBeSame(t, "at the same address", before)
	d.Stop(t)

	_, second := harness.StartSimulator(t, "app-service")
	d.Again(t, second...)
	wantFetched(t, d, "the kept tokens are of another source")
}

// A simulator was at the real back end's address: once nothing leads there any more, a start drops what it gave, and
// says so.
func TestSimulatedTokensAreDropped(t *testing.T) {
	t.Parallel()
	_, environment := harness.StartSimulator(t, "app-service")
	d, _ := startKeeping(t, strings.Replace(harness.SimulatedFor(), `"simulated"`, `"managed-identity"`, 1),
		environment...)
	if n := strings.Count(d.Text(), agent.MessageSimulated); n != 1 {
		t.Errorf("warned %d times of a simulated back end", n)
	}
	d.Stop(t)
	// Whoever answers there from now on, this start is not led to a simulator knowingly.
	d.Again(t, slices.DeleteFunc(environment,
		func(v string) bool { return strings.HasPrefix(v, simulator.URLVariable+"=") })...)
	wantFetched(t, d, "kept tokens are dropped and fetched anew: a simulated back end made them")
}

// A key that is none is said, and nothing is written by it.
func TestUselessKey(t *testing.T) {
	t.Parallel()
	d := harness.NewDaemon(t, harness.SimulatedFor())
	if err := os.WriteFile(d.KeyFile(), []byte("short"), 0o400); err != nil {
		t.Fatal(err)
	}
	d.Again(t)
	d.Held(t)
	if kept := d.Status(t).Kept; kept.Reboot || !strings.Contains(kept.Why, "5 bytes") {
		t.Errorf("%+v", kept)
	}
	d.Stop(t)
	if _, err := os.Stat(filepath.Join(d.Dir, "state", "tokens.sealed")); err == nil {
		t.Error("something was written")
	}
}

// A clock that runs by itself makes times of no use to the next start.
func TestFastClockKeepsNothing(t *testing.T) {
	t.Parallel()
	d, _ := startKeeping(t, strings.Replace(harness.SimulatedFor(), `kind = "simulated"`,
		"kind = \"simulated\"\nspeed = 60", 1))
	if kept := d.Status(t).Kept; kept.Reboot || kept.Restart || kept.Why == "" {
		t.Errorf("%+v", kept)
	}
}

// A simulated back end in a process of its own has a clock that perceptd lives by: what is kept is of use to the next
// start, also while the back end is down, and once it is back it is asked again.
func TestBackEndOfAnotherProcess(t *testing.T) {
	t.Parallel()
	backEnd, environment := harness.StartSimulator(t, "app-service", "--speed", "1440")
	d, before := startKeeping(t, harness.SimulatedFor(), environment...)
	first := d.Status(t)
	if !first.Simulated || !first.Kept.Reboot {
		t.Errorf("simulated %v, %+v", first.Simulated, first.Kept)
	}
	harness.Until(t, "the simulated clock to be ahead", d.Ended, func() bool {
		return time.Until(d.Status(t).Now) > time.Minute
	})
	d.Stop(t)
	backEnd.Stop(t)
	d.Again(t, environment...)
	if now := d.Held(t); now.SHA256 != before.SHA256 {
		t.Errorf("holds %s, not %s", now.SHA256, before.SHA256)
	}
	if status, _, err := d.Get(d.Token(), harness.VaultToken); status != 200 {
		t.Errorf("a token while the back end is down: %d %v", status, err)
	}
	if now := d.Status(t).Now; !now.After(first.Now) {
		t.Errorf("the clock went back from %v to %v", first.Now, now)
	}
	if out, err := d.Tool(t, "refresh"); err == nil {
		t.Errorf("a back end that is down was asked:\n%s", out)
	}
	harness.Launch(t, environment, "perceptctl", "simulate", "--resume")
	harness.Until(t, "the back end to be back", d.Ended, func() bool {
		_, err := d.Tool(t, "refresh")
		return err == nil
	})
	if now := d.Held(t); now.SHA256 == before.SHA256 {
		t.Errorf("%+v", now)
	}
}

// Variables that lead to a simulated back end lead to that one alone; else there is no source, and the status says what
// is wrong with them.
func TestBackEndOfAnotherProcessIsAsked(t *testing.T) {
	t.Parallel()
	const url = simulator.URLVariable + "=http://127.0.0.1:1"
	hasNoSource := func(config, why string, environment []string) {
		t.Helper()
		d := harness.LaunchDaemon(t, config, environment...)
		if trouble := strings.Join(d.Status(t).Trouble, "\n"); !strings.Contains(trouble, why) {
			t.Errorf("%v: trouble %q", environment, trouble)
		}
		if status, body, err := d.Get(d.Token(), harness.VaultToken); status != 503 {
			t.Errorf("%v: a token: %d %s %v", environment, status, body, err)
		}
	}
	for why, environment := range map[string][]string{
		"do not lead to":     {url},
		"lead to that":       {url, "IDENTITY_ENDPOINT=http://127.0.0.1:11/msi/token", "IDENTITY_HEADER=secret"},
		"is not a simulated": {simulator.URLVariable + "=http://192.0.2.1:1"},
		"two times in nanosec": {url, "IDENTITY_ENDPOINT=http://127.0.0.1:1/msi/token", "IDENTITY_HEADER=secret",
			simulator.ClockVariable + "=fast"},
	} {
		hasNoSource(harness.SimulatedFor(), why, environment)
	}
	_, environment := harness.StartSimulator(t, "app-service")
	hasNoSource(strings.Replace(harness.SimulatedFor(), `kind = "simulated"`, "kind = \"simulated\"\nspeed = 60", 1),
		"give them to perceptctl simulate", environment)
}

// A state folder that is gone is trouble that is told, keeps nobody from a token, and passes when there is one again.
func TestLostStateFolder(t *testing.T) {
	t.Parallel()
	d, _ := startKeeping(t, harness.SimulatedFor())
	state := filepath.Join(d.Dir, "state")
	awaitRecorded(t, d)
	must(t, os.RemoveAll(state))
	d.Reload(t, harness.SimulatedFor()) // after which all is saved
	harness.Until(t, "the trouble", d.Ended, func() bool {
		return strings.Contains(strings.Join(d.Status(t).Trouble, "\n"),
			"tokens are not saved, and lost at the next reboot")
	})
	if status, _, err := d.Get(d.Token(), harness.VaultToken); status != 200 {
		t.Errorf("a token: %d %v", status, err)
	}
	if err := os.Mkdir(state, 0o700); err != nil {
		t.Fatal(err)
	}
	d.Reload(t, harness.SimulatedFor())
	harness.Until(t, "the trouble to be over", d.Ended, func() bool { return len(d.Status(t).Trouble) == 0 })
	if _, err := os.Stat(filepath.Join(state, "tokens.sealed")); err != nil {
		t.Error(err)
	}
}

// Without room for another descriptor tokens are handed out all the same, and what could not be kept is kept later.
func TestNoRoomForDescriptors(t *testing.T) {
	t.Parallel()
	d := harness.NewDaemon(t, harness.SimulatedFor())
	d.GiveKey(t, d.KeyFile(), 'k')
	c := exec.Command("/bin/sh", append([]string{"-c", `ulimit -n 64; exec "$0" "$@"`, harness.Binary(t, "perceptd")},
		d.Arguments()...)...)
	d.Process = harness.Begin(t, nil, c)
	d.AwaitHealth(t)
	d.Held(t)
	var held []net.Conn
	for range 128 { // more than there can be; each is held as long as it may
		conn, err := net.Dial("unix", d.Token())
		if err != nil {
			break
		}
		held = append(held, conn)
	}
	for _, conn := range held {
		conn.Close()
	}
	harness.Until(t, "a token", d.Ended, func() bool {
		status, _, _ := d.Get(d.Token(), harness.VaultToken)
		return status == 200
	})
	for _, trouble := range d.Status(t).Trouble {
		if !strings.HasPrefix(trouble, "connections to the token socket are turned away") { // they were
			t.Errorf("trouble %q", trouble)
		}
	}
}
