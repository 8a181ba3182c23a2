package agent_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/binding"
	"perceptd/tokencache"
)

// unseen is a way in which a start does not see the tokens, and the copy of the record that is beside them.
type unseen struct {
	name   string
	hasKey bool
	bound  bool // to what is known of the device
	late   bool // the record cannot be read in the first minute
}

var unseens = []unseen{
	{"without the key", false, true, false},
	{"not opened", true, false, false},
	{"not read", true, true, false},
	{"without the key, and the record is read late", false, true, true},
	{"not read, and the record is not at first", true, true, true},
}

// eachUnseen runs f with a device in each of these ways. What f is given boots it once so.
func eachUnseen(t *testing.T, f func(t *testing.T, d *bootable, blindly func(f func(a *agent.Agent)))) {
	for _, way := range unseens {
		t.Run(way.name, func(t *testing.T) {
			t.Parallel()
			d := &bootable{dir: t.TempDir(), back: &sticky{counts: true}, vouch: true,
				known: []binding.Binding{{Kind: binding.ProductUUID, ID: [32]byte{1}}}}
			var record, tokens atomic.Bool // cannot be read
			d.fails = func(name string) error {
				if record.Load() && strings.HasPrefix(name, "policy-changes") || tokens.Load() &&
					strings.HasPrefix(name, "tokens") {
					return unix.EIO
				}
				return nil
			}
			synctest.Test(t, func(t *testing.T) {
				f(t, d, func(f func(a *agent.Agent)) {
					known := d.known
					if !way.bound {
						d.known = nil
					}
					record.Store(way.late)
					tokens.Store(way.hasKey && way.bound)
					d.boot(t, way.hasKey, func(a *agent.Agent) {
						time.Sleep(time.Minute)
						record.Store(false)
						time.Sleep(2 * time.Minute) // and it is read again
						f(a)
					})
					d.known = known
					record.Store(false)
					tokens.Store(false)
				})
			})
		})
	}
}

// holdsRevocation boots d so that it sees all, and looks that it has the revocation in force.
func holdsRevocation(t *testing.T, d *bootable, id string) {
	t.Helper()
	d.boot(t, true, func(a *agent.Agent) {
		time.Sleep(time.Minute)
		if !isOnRecord(a, id) {
			t.Errorf("the acknowledged revocation is off the record: %+v", a.Changes())
		}
		if !withholds(t, a) {
			t.Error("the revoked token is served")
		}
	})
}

// A start that does not see the tokens goes on with the record alone, while the copy beside them may have more than
// that: what could not be written, and those who noted it were told so. What that start acknowledges stays in force
// when all is seen again, whichever has had more changes.
func TestRevocationOutlivesACopyThatWasNotSeen(t *testing.T) {
	t.Parallel()
	eachUnseen(t, func(t *testing.T, d *bootable, blindly func(f func(a *agent.Agent))) {
		stuck := filepath.Join(d.dir, "policy-changes.copy.json.new")
		d.boot(t, true, func(a *agent.Agent) {
			mustHave(t, a)
			note(t, a, api.PolicyChangeRequest{AllResources: true, Effect: tokencache.Granted})
			time.Sleep(time.Hour)
			mustHave(t, a)
			if err := os.MkdirAll(filepath.Join(stuck, "in the way"), 0o700); err != nil {
				t.Fatal(err)
			}
			for range 4 {
				if _, err := a.RecordChange("test",
					api.PolicyChangeRequest{AllResources: true,
						Effect: tokencache.Granted}); codeOf(err) != api.CodeNotKept {
					t.Fatal(err)
				}
			}
			time.Sleep(time.Minute)
		})
		if err := os.RemoveAll(stuck); err != nil {
			t.Fatal(err)
		}
		var id string
		blindly(func(a *agent.Agent) {
			id = note(t, a, api.PolicyChangeRequest{AllResources: true, Effect: tokencache.Revoked}).ID
			time.Sleep(time.Hour)
		})
		holdsRevocation(t, d, id)
		holdsRevocation(t, d, id)
	})
}

// So it does where an older record was put back, from before what the copy has, at a start that does not see that.
func TestRevocationOutlivesARecordThatWasPutBack(t *testing.T) {
	t.Parallel()
	eachUnseen(t, func(t *testing.T, d *bootable, blindly func(f func(a *agent.Agent))) {
		kept := make(map[string][]byte)
		d.boot(t, true, func(a *agent.Agent) {
			mustHave(t, a)
			note(t, a, api.PolicyChangeRequest{AllResources: true, Effect: tokencache.Granted})
			for _, name := range []string{"policy-changes.json", "policy-changes.copy.json"} {
				text, err := os.ReadFile(filepath.Join(d.dir, name))
				if err != nil {
					t.Fatal(err)
				}
				kept[name] = text
			}
			time.Sleep(time.Hour)
			for range 4 {
				note(t, a, api.PolicyChangeRequest{AllResources: true, Effect: tokencache.Granted})
			}
			mustHave(t, a)
			time.Sleep(time.Minute)
		})
		for name, text := range kept {
			if err := os.WriteFile(filepath.Join(d.dir, name), text, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		var id string
		blindly(func(a *agent.Agent) {
			id = note(t, a, api.PolicyChangeRequest{AllResources: true, Effect: tokencache.Revoked}).ID
			time.Sleep(time.Hour)
		})
		holdsRevocation(t, d, id)
	})
}

// A revocation that was withdrawn, which a start that saw no tokens acknowledged, does not come back from the copy
// beside them, however often the device has started since and seen none.
func TestWithdrawnStaysSoAfterManyStarts(t *testing.T) {
	t.Parallel()
	eachUnseen(t, func(t *testing.T, d *bootable, blindly func(f func(a *agent.Agent))) {
		var id string
		d.boot(t, true, func(a *agent.Agent) {
			mustHave(t, a)
			id = note(t, a, api.PolicyChangeRequest{AllResources: true, Effect: tokencache.Revoked}).ID
			time.Sleep(time.Minute)
		})
		blindly(func(a *agent.Agent) {
			if _, err := a.WithdrawChange("test", id); err != nil {
				t.Error(err)
			}
		})
		for range 2 * tokencache.MaxOrigins {
			blindly(func(*agent.Agent) {})
		}
		d.boot(t, true, func(a *agent.Agent) {
			time.Sleep(time.Minute)
			if isOnRecord(a, id) || withholds(t, a) {
				t.Errorf("it is back: %+v", a.Changes())
			}
		})
	})
}

// So it does where no start failed to read anything: another folder, with a copy of all that is kept, was mounted over
// the state for a boot, in which more was noted, and its tokens come back.
func TestRevocationOutlivesAFolderThatWasGone(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d := &bootable{dir: t.TempDir(), back: &sticky{counts: true}, vouch: true}
		d.boot(t, true, func(a *agent.Agent) {
			mustHave(t, a)
			note(t, a, api.PolicyChangeRequest{AllResources: true, Effect: tokencache.Granted})
			time.Sleep(time.Minute)
		})
		below, above := d.dir, t.TempDir()
		if err := os.CopyFS(above, os.DirFS(below)); err != nil {
			t.Fatal(err)
		}
		d.dir = above
		var id string
		d.boot(t, true, func(a *agent.Agent) {
			time.Sleep(time.Minute)
			for range 3 {
				note(t, a, api.PolicyChangeRequest{AllResources: true, Effect: tokencache.Granted})
			}
			time.Sleep(time.Minute)
		})
		d.dir = below
		d.boot(t, true, func(a *agent.Agent) {
			time.Sleep(time.Minute)
			id = note(t, a, api.PolicyChangeRequest{AllResources: true, Effect: tokencache.Revoked}).ID
			time.Sleep(time.Minute)
		})
		tokens, err := os.ReadFile(filepath.Join(above, "tokens.sealed")) // that alone comes back
		if err := errors.Join(err, os.WriteFile(filepath.Join(below, "tokens.sealed"), tokens, 0o600)); err != nil {
			t.Fatal(err)
		}
		holdsRevocation(t, d, id)
	})
}
