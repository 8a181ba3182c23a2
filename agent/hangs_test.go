package agent_test

import (
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/deny"
	"perceptd/agent/grants"
	"perceptd/tokencache"
	"perceptd/tokencache/tokencachetest"
)

// A save that hangs is shown, of whatever it is: since when, and what to do, until it is over. All is in force
// meanwhile.
func TestSavesThatHang(t *testing.T) {
	t.Parallel()
	for what, hang := range map[string]func(o *agent.Options, wait func()){
		"saving the record of deny rules": func(o *agent.Options, wait func()) {
			o.Deny.Save = func(deny.Record) error { wait(); return nil }
		},
		"saving the record of policy changes": func(o *agent.Options, wait func()) {
			o.SaveRecord = func(tokencache.Record) error { wait(); return nil }
		},
		"saving tokens": func(o *agent.Options, wait func()) {
			o.Persistence.Save = func(tokencache.Snapshot) error { wait(); return nil }
		},
		"saving what systemd keeps": func(o *agent.Options, wait func()) {
			o.Persistence.HandOver = func(tokencache.Snapshot) error { wait(); return nil }
		},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				release := make(chan struct{})
				var hangs atomic.Bool
				var changed atomic.Int64
				o := agent.Options{
					Fetch: (&tokencachetest.Source{Life: 24 * time.Hour}).Fetch, Changed: func() { changed.Add(1) },
					Rules: agent.Rules{Rules: grants.Rules{Identities: []grants.Identity{{Name: "edge",
						Default: true}}}},
				}
				hang(&o, func() {
					if hangs.Load() {
						<-release
					}
				})
				a, err := agent.New(o)
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(a.Close)
				time.Sleep(time.Minute)
				said := func() bool {
					return strings.Contains(strings.Join(a.Status().Trouble, "\n"),
						what+" has hung since ")
				}
				if said() {
					t.Error("it is said to hang before it does")
				}
				hangs.Store(true)
				began := time.Now()
				go func() {
					_, _ = a.Deny("uid 0", api.DenySide{Origin: api.DenyLocal},
						api.DenyRequest{DenyTarget: api.DenyTarget{Module: "vision"}})
				}()
				go func() {
					_, _ = a.RecordChange("uid 0", api.PolicyChangeRequest{AllResources: true,
						Effect: tokencache.Changed})
				}()
				time.Sleep(20 * time.Second)
				synctest.Wait()
				before := changed.Load()
				if said() {
					t.Error("a slow save is said to hang")
				}
				time.Sleep(20 * time.Second)
				synctest.Wait()
				if !said() || changed.Load() == before {
					t.Errorf("40 s after %v: %q, %d news", began, a.Status().Trouble, changed.Load()-before)
				}
				if denied := a.DenyStatus(); len(denied.InForce()) != 1 || len(a.Changes()) != 1 {
					t.Error("what hangs is not in force")
				}
				before = changed.Load()
				close(release)
				synctest.Wait()
				if said() || changed.Load() == before {
					t.Errorf("it is over: %q", a.Status().Trouble)
				}
			})
		})
	}
}

// Who denies, lifts, or notes a change while the disk hangs has it in force at once, and an answer in time, which says
// that it is not known to be kept; once the disk is known to hang, at once.
func TestDenyingWhileTheDiskHangs(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		var kept atomic.Int64
		a, err := agent.New(agent.Options{
			Fetch: (&tokencachetest.Source{Life: 24 * time.Hour}).Fetch,
			Rules: agent.Rules{Rules: grants.Rules{Identities: []grants.Identity{{Name: "edge", Default: true}}}},
			Deny: agent.DenyStore{Save: func(r deny.Record) error {
				<-release
				kept.Store(int64(len(r.Rules)))
				return nil
			}},
			SaveRecord: func(tokencache.Record) error { <-release; return nil },
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(a.Close)
		var rule api.DenyRule
		for i, do := range []func() error{
			func() (err error) { rule, err = a.Deny("uid 0", thisMethod, denyModule("vision")); return err },
			func() error { _, err := a.Deny("uid 0", thisMethod, denyModule("log")); return err },
			func() error { _, err := a.LiftDeny("uid 0", thisMethod, rule.ID); return err },
			func() error { return a.SetHubAside("uid 0") },
			func() error { return a.HeedHub("uid 0") },
			func() error { return a.ForgetLostDenyRules("uid 0") },
			func() error {
				_, err := a.RecordChange("uid 0", api.PolicyChangeRequest{AllResources: true,
					Effect: tokencache.Changed})
				return err
			},
			func() error { _, err := a.WithdrawChange("uid 0", a.Changes()[0].ID); return err },
		} {
			began := time.Now()
			err := do()
			if codeOf(err) != api.CodeNotKept || !strings.Contains(err.Error(),
				"saving has not ended after 5s, and goes on") {
				t.Errorf("%d: %v", i, err)
			}
			synctest.Wait() // it is known by now how long the disk takes
			if took := time.Since(began); took > 5*time.Second || i > 0 && i != 6 && took > 0 {
				t.Errorf("%d took %v", i, took)
			}
		}
		if rules := a.DenyStatus().Rules; len(rules) != 1 || rules[0].Module != "log" || len(a.Changes()) != 0 {
			t.Errorf("in force: %+v, %+v", rules, a.Changes())
		}
		close(release)
		synctest.Wait()
		if err := a.KeepDenyRules(); err != nil || kept.Load() != 1 {
			t.Errorf("%v, %d rules are kept", err, kept.Load())
		}
	})
}
