package agent_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/simulator"
	"perceptd/agent/store"
	"perceptd/tokencache"
)

// bootClock is what a device's clock shows when it boots.
type bootClock struct {
	name    string
	wall    func(now time.Time) time.Time
	vouched bool // the kernel says that it is right
}

func rightClock(now time.Time) time.Time { return now }

// wrongClocks are those of devices without a battery for the clock, and of one whose clock was set by somebody. The
// kernel vouches for none of them: one that it vouches for is believed.
var wrongClocks = []bootClock{
	{"1970", func(time.Time) time.Time { return time.Unix(0, 0) }, false},
	{"the day of the build", func(now time.Time) time.Time { return now.AddDate(-2, 0, 0) }, false},
	{"an hour behind", func(now time.Time) time.Time { return now.Add(-time.Hour) }, false},
	{"20 years ahead", func(now time.Time) time.Time { return now.AddDate(20, 0, 0) }, false},
}

// rebooting is a device with a disk that boots again and again.
type rebooting struct {
	t     *testing.T
	dir   string
	key   store.Key
	z     *azure
	boots int
}

// boot runs an agent on what is on the disk, by that clock, until f returns.
func (d *rebooting) boot(c bootClock, f func(a *agent.Agent)) {
	d.t.Helper()
	began, shown := time.Now(), c.wall(time.Now())
	d.boots++
	clock := tokencache.Clock{
		Wall:         func() time.Time { return shown.Add(time.Since(began)).Round(0) },
		Boot:         func() time.Duration { return 20*time.Second + time.Since(began) },
		Synchronised: func() bool { return c.vouched },
	}
	record := store.OpenPolicyChanges(store.Disk(d.dir), clock.Boot)
	before, lost := record.Load()
	tokens, err := store.OpenTokens(store.Disk(d.dir), &d.key)
	if err != nil {
		d.t.Fatal(err)
	}
	memory, err := tokens.Load()
	if err != nil {
		d.t.Fatal(err)
	}
	a, err := agent.New(agent.Options{
		Fetch: d.z.Fetch, Rules: edge(), Clock: clock, Record: before, LostRecord: lost, SaveRecord: record.Save,
		BootID: fmt.Sprint("boot-", d.boots), Snapshot: memory, Persistence: agent.Persistence{Save: tokens.Save},
	})
	if err != nil {
		d.t.Fatal(err)
	}
	f(a)
	a.Close()
	// The record names the kernel's boot, of which this test has one only.
	path := filepath.Join(d.dir, "policy-changes.json")
	if text, err := os.ReadFile(path); err == nil {
		other := strings.Replace(string(text), store.BootID(), fmt.Sprintf("00000000-0000-0000-0000-%012d", d.boots), 1)
		if err := os.WriteFile(path, []byte(other), 0o600); err != nil {
			d.t.Fatal(err)
		}
	}
}

// mustWithhold checks that the module's token for the vault is not handed out.
func (d *rebooting) mustWithhold(when string, a *agent.Agent) {
	d.t.Helper()
	if answer, err := a.Token(d.t.Context(), module, requestFor(vault)); codeOf(err) != api.CodeRevoked {
		d.t.Errorf("%s: a token from before the revocation is handed out (%v left, %+v), %v", when, answer.Left,
			answer.Permissions, err)
	}
	if n := len(a.Changes()); n != 1 {
		d.t.Errorf("%s: %d policy changes are on record", when, n)
	}
}

// onDevice runs f in virtual time with a device that has booted nothing yet.
func onDevice(t *testing.T, f func(d *rebooting)) {
	t.Helper()
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		time.Sleep(26 * 365 * 24 * time.Hour) // tokens are from no year before 1970, whatever the clock shows
		f(&rebooting{t: t, dir: dir,
			z: &azure{Backend: simulator.New(simulator.Options{Identities: []simulator.Identity{
				{Name: "vision", ClientID: guid1, ObjectID: guid3},
			}})}})
	})
}

var right = bootClock{"right", rightClock, true}

// TestBootClocks: whatever the clock shows at a boot without a network, no token from before a revocation is handed
// out, the other tokens are not lost, and none outlives its end.
func TestBootClocks(t *testing.T) {
	t.Parallel()
	for _, c := range wrongClocks {
		t.Run("noted before, "+c.name,
			func(t *testing.T) { t.Parallel(); onDevice(t, func(d *rebooting) { d.noteAndBoot(c) }) })
		t.Run("noted by it, "+c.name, func(t *testing.T) {
			t.Parallel()
			onDevice(t,
				func(d *rebooting) { d.bootAndNote(c) })
		})
	}
}

// noteAndBoot has a revocation noted by a right clock, and then boots by c.
func (d *rebooting) noteAndBoot(c bootClock) {
	d.t.Helper()
	var first string
	d.boot(right, func(a *agent.Agent) {
		ask(d.t, a, module, requestFor(vault))
		first = ask(d.t, a, module, requestFor(storage)).Token.Text.SHA256()
		note(d.t, a, revoked)
		d.mustWithhold("at the note", a)
		time.Sleep(time.Hour)
	})
	isKept := func(when string, a *agent.Agent) {
		d.t.Helper()
		if answer, err := a.Token(d.t.Context(), module, requestFor(storage)); err != nil ||
			answer.Token.Text.SHA256() != first {
			d.t.Errorf("%s, the token that was kept: %v", when, err)
		}
	}
	d.z.breakDown(&tokencache.FetchError{Kind: tokencache.Unreachable, Detail: "down"})
	d.boot(c, func(a *agent.Agent) {
		for range 3 {
			d.mustWithhold("after the boot", a)
			isKept("after the boot", a)
			time.Sleep(40 * time.Minute)
		}
	})
	d.boot(right, func(a *agent.Agent) {
		d.mustWithhold("with the clock right again", a)
		isKept("with the clock right again", a)
		time.Sleep(22 * time.Hour)
		if answer, err := a.Token(d.t.Context(), module, requestFor(storage)); err == nil {
			d.t.Errorf("a token is handed out when it is over, %v left", answer.Left)
		}
	})
	d.z.breakDown(nil)
	d.boot(right, func(a *agent.Agent) {
		time.Sleep(30 * time.Hour)
		ask(d.t, a, module, requestFor(vault))
		ask(d.t, a, module, requestFor(storage))
	})
}

// bootAndNote boots by c, has a revocation noted, and boots by a right clock and by c again.
func (d *rebooting) bootAndNote(c bootClock) {
	d.t.Helper()
	d.boot(c, func(a *agent.Agent) {
		ask(d.t, a, module, requestFor(vault))
		note(d.t, a, revoked)
		d.mustWithhold("at the note", a)
		time.Sleep(time.Hour)
		d.mustWithhold("an hour later", a)
	})
	d.z.breakDown(&tokencache.FetchError{Kind: tokencache.Unreachable, Detail: "down"})
	for _, next := range []bootClock{right, c, right} {
		d.boot(next, func(a *agent.Agent) {
			d.mustWithhold("after another boot, by the clock "+next.name, a)
			time.Sleep(time.Hour)
			d.mustWithhold("an hour after another boot, by the clock "+next.name, a)
		})
	}
}
