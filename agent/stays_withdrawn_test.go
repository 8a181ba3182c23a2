package agent_test

import (
	"fmt"
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
	"perceptd/tokencache"
)

// unreadable has the device fail to open the files of that prefix while the switch that it returns is on.
func (d *bootable) unreadable(prefix string) *atomic.Bool {
	var on atomic.Bool
	d.fails = func(name string) error {
		if on.Load() && strings.HasPrefix(name, prefix) {
			return unix.EIO
		}
		return nil
	}
	return &on
}

func withdraw(t *testing.T, a *agent.Agent, id string) {
	t.Helper()
	if _, err := a.WithdrawChange("test", id); err != nil {
		t.Error(err)
	}
}

// mustStayWithdrawn boots, and looks that the change is neither on record nor withholds anything.
func (d *bootable) mustStayWithdrawn(t *testing.T, id string) {
	t.Helper()
	d.boot(t, true, func(a *agent.Agent) {
		time.Sleep(time.Minute)
		if isOnRecord(a, id) || withholds(t, a) {
			t.Errorf("it was withdrawn, and is back: %+v", a.Changes())
		}
	})
}

// A withdrawn revocation does not come back from tokens that many starts in a row cannot read, though the clocks and
// the back end tell something about the changes on record at each: what that is changes the record seldom.
func TestWithdrawnStaysSoInUse(t *testing.T) {
	t.Parallel()
	for _, boots := range []bool{false, true} {
		for _, dated := range []bool{false, true} { // the clock is vouched for once the changes are noted
			t.Run(fmt.Sprintf("boots %v, dated %v", boots, dated), func(t *testing.T) {
				t.Parallel()
				atClocks(t, func(t *testing.T, d *bootable) {
					tokens := d.unreadable("tokens")
					var id string
					d.boot(t, true, func(a *agent.Agent) {
						mustHave(t, a)
						time.Sleep(time.Minute)
						note(t, a, api.PolicyChangeRequest{AllResources: true, Effect: tokencache.Granted})
						id = note(t, a, api.PolicyChangeRequest{AllResources: true, Effect: tokencache.Revoked}).ID
						time.Sleep(time.Minute)
					})
					d.vouch = d.vouch || dated
					tokens.Store(true)
					start := d.start
					if boots {
						start = d.boot
					}
					start(t, true, func(a *agent.Agent) {
						time.Sleep(time.Minute)
						withdraw(t, a, id)
						time.Sleep(time.Minute)
					})
					for range tokencache.MaxOrigins + 4 {
						start(t, true, func(a *agent.Agent) {
							time.Sleep(5 * time.Minute)
							_, _ = a.Token(t.Context(), root, requestFor(storage))
							time.Sleep(10 * time.Minute)
						})
						time.Sleep(time.Hour)
					}
					tokens.Store(false)
					d.mustStayWithdrawn(t, id)
				})
			})
		}
	}
}

// Nor by the mark on a token that was saved while the record could not be read, where no tokens could be saved since.
func TestMarkOfAnUnreadRecordBringsNothingBack(t *testing.T) {
	t.Parallel()
	dir, after := t.TempDir(), t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		d := &bootable{dir: dir, back: &sticky{counts: true}, vouch: true}
		record := d.unreadable("policy-changes")
		var id string
		d.boot(t, true, func(a *agent.Agent) {
			mustHave(t, a)
			time.Sleep(time.Hour)
			id = note(t, a, api.PolicyChangeRequest{AllResources: true, Effect: tokencache.Revoked}).ID
			time.Sleep(time.Minute)
		})
		record.Store(true)
		d.boot(t, true, func(a *agent.Agent) {
			time.Sleep(3 * time.Minute)
			if err := os.MkdirAll(filepath.Join(dir, "tokens.sealed.new", "in the way"), 0o700); err != nil {
				t.Fatal(err)
			}
			record.Store(false)
			time.Sleep(2 * time.Minute)
			withdraw(t, a, id)
			time.Sleep(time.Minute)
			if err := os.CopyFS(after, os.DirFS(dir)); err != nil { // the power is cut
				t.Fatal(err)
			}
		})
		if err := os.RemoveAll(filepath.Join(after, "tokens.sealed.new")); err != nil {
			t.Fatal(err)
		}
		d.dir = after
		d.mustStayWithdrawn(t, id)
	})
}
