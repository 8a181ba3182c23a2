package main

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

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/simulator"
	"perceptd/cmd/perceptd/e2e/perceptdtest"
)

// giveKey writes a key that is the same byte over and over.
func (d *daemonProcess) giveKey(t *testing.T, path string, b byte) {
	t.Helper()
	if err := os.WriteFile(path, []byte(strings.Repeat(string(b), 32)), 0o400); err != nil {
		t.Fatal(err)
	}
}

// again starts the daemon once more, in the folder that it had.
func (d *daemonProcess) again(t *testing.T, environment ...string) {
	t.Helper()
	d.process = launch(t, environment, "perceptd", d.arguments()...)
	d.awaitHealth(t)
}

// held returns what the daemon holds of its only token.
func (d *daemonProcess) held(t *testing.T) api.TokenStatus {
	t.Helper()
	var tokens []api.TokenStatus
	until(t, "the token", d.ended, func() bool {
		tokens = d.status(t).Tokens
		return len(tokens) == 1 && tokens[0].ExpiresIn > 0
	})
	return tokens[0]
}

// mustBeSame checks that the token is the one from before, and that the back end was not asked.
func (d *daemonProcess) mustBeSame(t *testing.T, when string, before api.TokenStatus) {
	t.Helper()
	if now := d.held(t); now.SHA256 != before.SHA256 || now.Fetches != 0 || now.Unconfirmed {
		t.Errorf("%s: token %s after %d fetches, was %s", when, now.SHA256, now.Fetches, before.SHA256)
	}
	if status, _, err := d.get(d.token(), vaultToken); status != 200 {
		t.Errorf("%s: %d %v", when, status, err)
	}
}

// Through a restart and a crash tokens are with systemd, which needs no key.
func TestTokensOutliveACrash(t *testing.T) {
	t.Parallel()
	binary(t, "perceptd")
	store := newFDStore(t)
	d := newFolder(t, simulatedFor())
	store.start(t, d)
	d.awaitHealth(t)
	before := d.held(t)
	if kept := d.status(t).Kept; !kept.Restart || kept.Reboot || !strings.Contains(kept.Why, "perceptctl cache-key make") {
		t.Errorf("%+v", kept)
	}
	until(t, "the cache to be stored", d.ended, func() bool { return len(store.all()) == 1 })
	for _, end := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM, syscall.SIGKILL} {
		if err := d.cmd.Process.Signal(end); err != nil {
			t.Fatal(err)
		}
		<-d.ended
		store.start(t, d)
		d.awaitHealth(t)
		d.mustBeSame(t, end.String(), before)
	}
	if all := store.all(); len(all) != 1 {
		t.Errorf("stored %q", all)
	}
}

// What systemd keeps and cannot be used is said, and costs a call to the back end.
func TestCarriedNonsense(t *testing.T) {
	t.Parallel()
	binary(t, "perceptd")
	store := newFDStore(t)
	for _, name := range []string{storedCache + "7", storedCache + "x"} {
		null, err := os.Open(os.DevNull)
		if err != nil {
			t.Fatal(err)
		}
		store.put(renamed(t, null, name))
	}
	d := newFolder(t, simulatedFor())
	store.start(t, d)
	d.awaitHealth(t)
	if held := d.held(t); held.Fetches != 1 {
		t.Errorf("%d fetches", held.Fetches)
	}
	if n := strings.Count(d.text(), "what systemd has kept of the cache is of no use"); n == 0 {
		t.Errorf("said %d times", n)
	}
	until(t, "the new one in the place of the others", d.ended, func() bool {
		all := store.all()
		return len(all) == 1 && all[0] != storedCache+"7" && all[0] != storedCache+"x"
	})
}

// Through a stop they are in the file, for whoever has its key.
func TestTokensOutliveAStop(t *testing.T) {
	t.Parallel()
	d := newFolder(t, simulatedFor())
	d.giveKey(t, d.keyFile(), 'k')
	d.again(t)
	before := d.held(t)
	_, told := os.Lstat(readDevice)
	if kept := d.status(t).Kept; !kept.Reboot || kept.Restart || kept.BoundTo == "" || kept.Untold != errors.Is(told, fs.ErrNotExist) {
		t.Errorf("%+v, and what root tells of the device: %v", kept, told)
	}
	d.stop(t)
	sealed, err := os.ReadFile(filepath.Join(d.dir, "state", "tokens.sealed"))
	if err != nil || strings.Contains(string(sealed), "eyJ") || strings.Contains(string(sealed), perceptdtest.VaultURI) {
		t.Errorf("%d bytes, %v", len(sealed), err)
	}
	d.again(t)
	d.mustBeSame(t, "after a stop", before)
	if err := d.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-d.ended
	d.again(t)
	d.mustBeSame(t, "after a crash", before)
	d.stop(t)

	credentials := t.TempDir()
	d.giveKey(t, filepath.Join(credentials, cacheCredential), 'k')
	if err := os.Remove(d.keyFile()); err != nil {
		t.Fatal(err)
	}
	d.again(t, "CREDENTIALS_DIRECTORY="+credentials)
	d.mustBeSame(t, "with the key as systemd's credential", before)
	d.stop(t)

	d.giveKey(t, d.keyFile(), 'x')
	d.again(t)
	if now := d.held(t); now.Fetches != 1 {
		t.Errorf("%d fetches with another key", now.Fetches)
	}
	if !strings.Contains(d.text(), "the kept tokens cannot be used and are fetched anew") {
		t.Error("it is not said that the file cannot be used")
	}
	d.stop(t) // so that the others are saved
	aside, _ := filepath.Glob(filepath.Join(d.dir, "state", "tokens.sealed.unreadable-*"))
	if len(aside) != 1 {
		t.Errorf("moved aside: %q", aside)
	}
}

// Tokens of one source are of no use to another.
func TestTokensOfAnotherSource(t *testing.T) {
	t.Parallel()
	d := newFolder(t, simulatedFor())
	d.giveKey(t, d.keyFile(), 'k')
	d.again(t)
	d.held(t)
	d.stop(t)
	d.rewrite(t, strings.Replace(simulatedFor(), `kind = "simulated"`, "kind = \"simulated\"\nendpoint = \"imds\"", 1))
	d.again(t)
	if now := d.held(t); now.Fetches != 1 {
		t.Errorf("%d fetches", now.Fetches)
	}
	if !strings.Contains(d.text(), "the kept tokens are of another source") {
		t.Error("it is not said")
	}
}

// A source is told from another by its address, too: what somebody's simulator gave is not served once it is gone. Nor is it
// while it is there without a word.
func TestTokensOfAnotherAddress(t *testing.T) {
	t.Parallel()
	d := newFolder(t, strings.Replace(simulatedFor(), `"simulated"`, `"managed-identity"`, 1))
	d.giveKey(t, d.keyFile(), 'k')
	_, first := startSimulator(t, "app-service")
	d.again(t, first...)
	before := d.held(t)
	if status := d.status(t); !status.Simulated || status.Source.Kind != "managed-identity" {
		t.Errorf("simulated %v, of %+v", status.Simulated, status.Source)
	}
	doctor := exec.Command(binary(t, "perceptctl"), "doctor", "--socket", d.token())
	said, _ := doctor.CombinedOutput() // which tells of a fault
	if text := strings.Join(strings.Fields(string(said)), " "); !strings.Contains(text, "FAIL source: SIMULATED: a token that is held says") {
		t.Errorf("doctor: %s", said)
	}
	d.stop(t)

	d.again(t, first...)
	d.mustBeSame(t, "at the same address", before)
	d.stop(t)

	_, second := startSimulator(t, "app-service")
	d.again(t, second...)
	if now := d.held(t); now.Fetches != 1 {
		t.Errorf("%d fetches at another address", now.Fetches)
	}
	if !strings.Contains(d.text(), "the kept tokens are of another source") {
		t.Error("it is not said")
	}
}

// A simulator was at the real back end's address: once nothing leads there any more, a start drops what it gave, and says so.
func TestSimulatedTokensAreDropped(t *testing.T) {
	t.Parallel()
	d := newFolder(t, strings.Replace(simulatedFor(), `"simulated"`, `"managed-identity"`, 1))
	d.giveKey(t, d.keyFile(), 'k')
	_, environment := startSimulator(t, "app-service")
	d.again(t, environment...)
	d.held(t)
	if n := strings.Count(d.text(), agent.MessageSimulated); n != 1 {
		t.Errorf("warned %d times of a simulated back end", n)
	}
	d.stop(t)
	// Whoever answers there from now on, this start is not led to a simulator knowingly.
	d.again(t, slices.DeleteFunc(environment, func(v string) bool { return strings.HasPrefix(v, simulator.URLVariable+"=") })...)
	if now := d.held(t); now.Fetches != 1 {
		t.Errorf("%d fetches", now.Fetches)
	}
	if !strings.Contains(d.text(), "kept tokens are dropped and fetched anew: a simulated back end made them") {
		t.Error("it is not said")
	}
}

// A key that is none is said, and nothing is written by it.
func TestUselessKey(t *testing.T) {
	t.Parallel()
	d := newFolder(t, simulatedFor())
	if err := os.WriteFile(d.keyFile(), []byte("short"), 0o400); err != nil {
		t.Fatal(err)
	}
	d.again(t)
	d.held(t)
	if kept := d.status(t).Kept; kept.Reboot || !strings.Contains(kept.Why, "5 bytes") {
		t.Errorf("%+v", kept)
	}
	d.stop(t)
	if _, err := os.Stat(filepath.Join(d.dir, "state", "tokens.sealed")); err == nil {
		t.Error("something was written")
	}
}

// A clock that runs by itself makes times of no use to the next start.
func TestFastClockKeepsNothing(t *testing.T) {
	t.Parallel()
	d := newFolder(t, strings.Replace(simulatedFor(), `kind = "simulated"`, "kind = \"simulated\"\nspeed = 60", 1))
	d.giveKey(t, d.keyFile(), 'k')
	d.again(t)
	d.held(t)
	if kept := d.status(t).Kept; kept.Reboot || kept.Restart || kept.Why == "" {
		t.Errorf("%+v", kept)
	}
}

// A state folder that is gone is trouble that is told, keeps nobody from a token, and passes when there is one again.
func TestLostStateFolder(t *testing.T) {
	t.Parallel()
	d := newFolder(t, simulatedFor())
	d.giveKey(t, d.keyFile(), 'k')
	d.again(t)
	d.held(t)
	state := filepath.Join(d.dir, "state")
	d.recorded(t)
	must(t, os.RemoveAll(state))
	d.reload(t, simulatedFor()) // after which all is saved
	until(t, "the trouble", d.ended, func() bool {
		return strings.Contains(strings.Join(d.status(t).Trouble, "\n"), "tokens are not saved, and lost at the next reboot")
	})
	if status, _, err := d.get(d.token(), vaultToken); status != 200 {
		t.Errorf("a token: %d %v", status, err)
	}
	if err := os.Mkdir(state, 0o700); err != nil {
		t.Fatal(err)
	}
	d.reload(t, simulatedFor())
	until(t, "the trouble to be over", d.ended, func() bool { return len(d.status(t).Trouble) == 0 })
	if _, err := os.Stat(filepath.Join(state, "tokens.sealed")); err != nil {
		t.Error(err)
	}
}

// Without room for another descriptor tokens are handed out all the same, and what could not be kept is kept later.
func TestNoRoomForDescriptors(t *testing.T) {
	t.Parallel()
	d := newFolder(t, simulatedFor())
	d.giveKey(t, d.keyFile(), 'k')
	c := exec.Command("/bin/sh", append([]string{"-c", `ulimit -n 64; exec "$0" "$@"`, binary(t, "perceptd")}, d.arguments()...)...)
	d.process = begin(t, nil, c)
	d.awaitHealth(t)
	d.held(t)
	var held []net.Conn
	for range 128 { // more than there can be; each is held as long as it may
		conn, err := net.Dial("unix", d.token())
		if err != nil {
			break
		}
		held = append(held, conn)
	}
	for _, conn := range held {
		conn.Close()
	}
	until(t, "a token", d.ended, func() bool {
		status, _, _ := d.get(d.token(), vaultToken)
		return status == 200
	})
	for _, trouble := range d.status(t).Trouble {
		if !strings.HasPrefix(trouble, "connections to the token socket are turned away") { // they were
			t.Errorf("trouble %q", trouble)
		}
	}
}
