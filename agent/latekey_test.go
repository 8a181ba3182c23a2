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

	"go.uber.org/zap/zaptest/observer"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/tokencache"
	"perceptd/tokencache/tokencachetest"
)

// tokenFor returns what a is asked for resource; a token that it does not have is an error.
func tokenFor(t *testing.T, a *agent.Agent, resource string) (agent.Answer, error) {
	t.Helper()
	return a.Token(t.Context(), root, requestFor(resource))
}

// A key that comes while the daemon runs, as that of a TPM that was locked out, opens what was kept: within a minute,
// without a call, put together with what was fetched meanwhile, and with the revocation that only the kept tokens have.
func TestKeyThatComesLate(t *testing.T) {
	t.Parallel()
	for _, after := range []time.Duration{2 * time.Second, 3 * time.Hour} {
		t.Run(after.String(), func(t *testing.T) {
			t.Parallel()
			d := &bootable{dir: t.TempDir(), back: &sticky{counts: true}, vouch: true, rules: edge()}
			d.rules.Grants[4].Resources = []string{storage, vault} // root's
			synctest.Test(t, func(t *testing.T) {
				var kept, fetched agent.Answer
				d.boot(t, true, func(a *agent.Agent) {
					kept = mustHave(t, a)
					time.Sleep(time.Minute)
				})
				d.late = new(atomic.Bool)
				d.boot(t, true, func(a *agent.Agent) {
					var err error
					if fetched, err = tokenFor(t, a, vault); err != nil {
						t.Fatal(err)
					}
					d.back.fails = errors.New("the back end is away")
					time.Sleep(after)
					trouble := strings.Join(a.Status().Trouble, "\n")
					if strings.Count(trouble, errKeyAway.Error()) != 1 || strings.Contains(trouble, "not saved") {
						t.Errorf("trouble: %q", trouble)
					}
					if _, err := tokenFor(t, a, storage); err == nil {
						t.Error("a token came from nowhere")
					}
					d.late.Store(true)
					time.Sleep(time.Minute)
					if got, err := tokenFor(t, a, storage); err != nil || !got.Token.Text.Equal(kept.Token.Text) {
						t.Errorf("the kept token: %v", err)
					}
					if trouble := strings.Join(a.Status().Trouble, "\n"); strings.Contains(trouble, "TPM") {
						t.Errorf("trouble: %q", trouble)
					}
				})
				d.late = nil
				d.boot(t, true, func(a *agent.Agent) {
					for resource, want := range map[string]agent.Answer{storage: kept, vault: fetched} {
						if got, err := tokenFor(t, a, resource); err != nil || !got.Token.Text.Equal(want.Token.Text) {
							t.Errorf("%s after the next boot: %v", resource, err)
						}
					}
				})
				if names, err := filepath.Glob(filepath.Join(d.dir, "tokens*")); err != nil || len(names) != 1 {
					t.Errorf("%q", names)
				}
			})
		})
	}
}

// What a revocation withholds stays withheld where its record is gone, and the copy beside the tokens comes with the
// key.
func TestRevocationThatComesWithTheKey(t *testing.T) {
	t.Parallel()
	d := &bootable{dir: t.TempDir(), back: &sticky{counts: true}, vouch: true}
	synctest.Test(t, func(t *testing.T) {
		var id string
		d.boot(t, true, func(a *agent.Agent) {
			mustHave(t, a)
			time.Sleep(time.Minute)
			id = note(t, a, api.PolicyChangeRequest{AllResources: true, Effect: tokencache.Revoked}).ID
			time.Sleep(time.Minute)
		})
		for _, name := range []string{"policy-changes.json", "policy-changes.copy.json"} {
			if err := os.Remove(filepath.Join(d.dir, name)); err != nil {
				t.Fatal(err)
			}
		}
		d.late = new(atomic.Bool)
		d.boot(t, true, func(a *agent.Agent) {
			if isOnRecord(a, id) {
				t.Error("it is known without the key")
			}
			time.Sleep(time.Hour)
			d.late.Store(true)
			time.Sleep(time.Minute)
			if !isOnRecord(a, id) || !withholds(t, a) {
				t.Errorf("the revocation is lost: %+v", a.Changes())
			}
		})
	})
}

// A key that never comes costs the tokens over a reboot and nothing else: what was kept stays as it is, at every start.
func TestKeyThatNeverComes(t *testing.T) {
	t.Parallel()
	d := &bootable{dir: t.TempDir(), back: &sticky{counts: true}, vouch: true}
	synctest.Test(t, func(t *testing.T) {
		var kept agent.Answer
		d.boot(t, true, func(a *agent.Agent) { kept = mustHave(t, a) })
		d.late = new(atomic.Bool)
		for range 3 {
			d.boot(t, true, func(a *agent.Agent) {
				mustHave(t, a)
				time.Sleep(30 * time.Minute)
			})
		}
		d.late = nil
		d.back.fails = errors.New("the back end is away")
		d.boot(t, true, func(a *agent.Agent) {
			if got := mustHave(t, a); !got.Token.Text.Equal(kept.Token.Text) {
				t.Error("what was kept was written over")
			}
		})
	})
}

// Kept tokens that come with a late key, and note that there were deny rules, have none handed out where the start
// found no record of them: nobody knows what they denied. Where the start found one, that counts.
func TestDenyRulesNotedByTokensThatComeLate(t *testing.T) {
	t.Parallel()
	set := func(a *agent.Agent) error {
		_, err := a.Deny("uid 0", api.DenySide{Origin: api.DenyLocal}, denyModule("speech"))
		return err
	}
	for name, row := range map[string]struct {
		noted, there bool
		meanwhile    func(a *agent.Agent) error
		lost         bool
	}{
		"nothing noted":            {lost: false},
		"noted":                    {noted: true, lost: true},
		"noted and there":          {noted: true, there: true, lost: false},
		"a rule was set meanwhile": {noted: true, lost: true, meanwhile: set},
		"the twin was read meanwhile": {noted: true, lost: false, meanwhile: func(a *agent.Agent) error {
			return a.SetTwinDeny(thisHub, nil, 1)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				disk := new(denyDisk)
				if row.there {
					disk.boot(t, false, func(a *agent.Agent, _ *observer.ObservedLogs) {
						if err := set(a); err != nil {
							t.Error(err)
						}
					})
				}
				var away atomic.Bool
				away.Store(true)
				a, err := agent.New(agent.Options{
					Fetch: new(tokencachetest.Source).Fetch, Rules: edge(), Deny: disk.store(),
					UnreadTokens: errKeyAway,
					LoadTokens: func() (all []tokencache.Snapshot, _ []*tokencache.Snapshot, err error) {
						if away.Load() {
							return nil, nil, errKeyAway
						}
						return []tokencache.Snapshot{{DenyRules: row.noted}}, nil, nil
					},
				})
				if err != nil {
					t.Fatal(err)
				}
				defer a.Close()
				if _, err := a.Token(t.Context(), module, agent.Request{}); codeOf(err) == api.CodeDenyRulesLost {
					t.Errorf("a key that is away costs tokens: %v", err)
				}
				if row.meanwhile != nil {
					if err := row.meanwhile(a); err != nil {
						t.Fatal(err)
					}
				}
				away.Store(false)
				time.Sleep(2 * time.Minute)
				synctest.Wait()
				_, err = a.Token(t.Context(), module, agent.Request{})
				lost := codeOf(err) == api.CodeDenyRulesLost
				if lost != row.lost || (a.DenyStatus().Lost != "") != lost {
					t.Errorf("%v, %+v", err, a.DenyStatus())
				}
				rules := len(a.DenyStatus().Rules)
				if isSet := row.there || strings.HasPrefix(name, "a rule"); (rules == 1) != isSet {
					t.Errorf("%d rules", rules)
				}
				if row.lost {
					if err := a.ForgetLostDenyRules("uid 0"); err != nil {
						t.Error(err)
					}
					_, err := a.Token(t.Context(), module, agent.Request{})
					if codeOf(err) == api.CodeDenyRulesLost {
						t.Errorf("root has given it up: %v", err)
					}
				}
			})
		})
	}
}
