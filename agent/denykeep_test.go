package agent_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/deny"
	"perceptd/tokencache"
	"perceptd/tokencache/tokencachetest"
)

// denyDisk keeps deny rules as a disk and systemd do.
type denyDisk struct {
	mu     sync.Mutex
	record *deny.Record  // on the disk
	held   []deny.Record // by systemd
	fault  error         // of writing
	unread error         // of reading
	spoilt error         // what is there is no record
	noted  tokencache.Origin

	other      *deny.Record // in a folder that took the place of that of the disk; nil: none did
	otherFault error        // of reading that
}

func (d *denyDisk) set(change func(*denyDisk)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	change(d)
}

type spoiltError struct{ error }

func (spoiltError) Spoilt() bool { return true }

func (d *denyDisk) load() (*deny.Record, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case d.unread != nil:
		return nil, d.unread
	case d.spoilt != nil:
		return nil, spoiltError{d.spoilt}
	}
	return d.record, nil
}

func (d *denyDisk) save(record deny.Record) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.fault == nil {
		d.record, d.spoilt = &record, nil
	}
	return d.fault
}

func (d *denyDisk) loadOther() (record *deny.Record, isOther bool, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case errors.As(d.otherFault, new(spoiltError)):
		err, d.otherFault = d.otherFault, nil
		return nil, true, err
	case d.otherFault != nil:
		return nil, true, d.otherFault
	}
	record, d.other = d.other, nil
	return record, record != nil, nil
}

func (d *denyDisk) store() agent.DenyStore {
	record, err := d.load()
	kept := agent.DenyStore{Record: record, Noted: d.noted, Load: d.load, LoadOther: d.loadOther, Save: d.save}
	kept.HandOver = func(r deny.Record) error {
		d.set(func(d *denyDisk) { d.held = []deny.Record{r} })
		return nil
	}
	d.set(func(d *denyDisk) { kept.Copies = append(kept.Copies, d.held...) })
	if errors.As(err, new(spoiltError)) {
		kept.Lost = err
	} else {
		kept.Unread = err
	}
	return kept
}

// boot runs f with an agent on the device's disk. reboot says that systemd holds nothing any more.
func (d *denyDisk) boot(t *testing.T, reboot bool, f func(a *agent.Agent, logs *observer.ObservedLogs)) {
	t.Helper()
	if reboot {
		d.set(func(d *denyDisk) { d.held = nil })
	}
	core, logs := observer.New(zapcore.DebugLevel)
	a, err := agent.New(agent.Options{
		Fetch: new(tokencachetest.Source).Fetch, Rules: edge(), Log: zap.New(core), Deny: d.store(),
	})
	if err != nil {
		t.Fatal(err)
	}
	f(a, logs)
	a.Close()
}

func TestDenyRulesOutliveReboots(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		disk := new(denyDisk)
		disk.boot(t, false, func(a *agent.Agent, _ *observer.ObservedLogs) {
			if code := askFor(a, module, vault); code != "" {
				t.Errorf("a first start: %v", code)
			}
		})
		if disk.record != nil {
			t.Errorf("a device without rules keeps %+v", disk.record)
		}
		var id string
		disk.boot(t, false, func(a *agent.Agent, _ *observer.ObservedLogs) {
			id = mustDeny(t, a, api.DenyLocal, denyModule("vision")).ID
			if disk.record == nil || len(disk.record.Rules) != 1 {
				t.Error("Deny returned before the rule was on the disk")
			}
		})
		for _, reboot := range []bool{false, true, true} {
			disk.boot(t, reboot, func(a *agent.Agent, _ *observer.ObservedLogs) {
				if code := askFor(a, module, vault); code != api.CodeDenied {
					t.Errorf("reboot %v: %q", reboot, code)
				}
			})
		}
		disk.boot(t, true, func(a *agent.Agent, _ *observer.ObservedLogs) {
			if _, err := a.LiftDeny("uid 0", api.DenySide{Origin: api.DenyLocal}, id); err != nil {
				t.Error(err)
			}
		})
		disk.boot(t, true, func(a *agent.Agent, _ *observer.ObservedLogs) {
			if code := askFor(a, module, vault); code != "" {
				t.Errorf("after the lift: %q", code)
			}
		})
	})
}

// What the disk does not take is in force, is told, outlives a restart and is written when the disk works again.
func TestDenyRulesOnADiskThatFails(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		disk := &denyDisk{fault: errors.New("no space left")}
		disk.boot(t, false, func(a *agent.Agent, _ *observer.ObservedLogs) {
			rule, err := a.Deny("uid 0", api.DenySide{Origin: api.DenyLocal}, denyModule("vision"))
			if codeOf(err) != api.CodeNotKept || rule.ID == "" {
				t.Errorf("%+v, %v", rule, err)
			}
			if code := askFor(a, module, vault); code != api.CodeDenied {
				t.Errorf("%q", code)
			}
			if trouble := strings.Join(a.Status().Trouble, "\n"); !strings.Contains(trouble, "not kept on the disk") {
				t.Errorf("%q", trouble)
			}
		})
		disk.boot(t, false, func(a *agent.Agent, _ *observer.ObservedLogs) {
			if code := askFor(a, module, vault); code != api.CodeDenied {
				t.Errorf("after a restart: %q", code)
			}
			disk.set(func(d *denyDisk) { d.fault = nil })
			time.Sleep(2 * time.Minute)
			synctest.Wait()
			if disk.record == nil || len(disk.record.Rules) != 1 {
				t.Errorf("the disk has %+v", disk.record)
			}
		})
	})
}

// A lost record denies everything, over restarts and whatever is denied besides, until one of the two ways out of it.
func TestLostDenyRules(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(a *agent.Agent) error{
		"root":     func(a *agent.Agent) error { return a.ForgetLostDenyRules("uid 0") },
		"the twin": func(a *agent.Agent) error { return a.SetTwinDeny(thisHub, nil, 1) },
	} {
		synctest.Test(t, func(t *testing.T) {
			disk := &denyDisk{spoilt: errors.New("it is not JSON")}
			for _, reboot := range []bool{false, true} {
				disk.boot(t, reboot, func(a *agent.Agent, logs *observer.ObservedLogs) {
					for range 2 {
						_, err := a.Token(context.Background(), module, agent.Request{})
						if codeOf(err) != api.CodeDenyRulesLost || !strings.Contains(err.Error(), "it is not JSON") ||
							!strings.Contains(err.Error(), "perceptctl deny forget-lost") {
							t.Fatalf("%s: %v", name, err)
						}
						mustDeny(t, a, api.DenyLocal, denyModule("other"))
					}
					if _, err := a.TightenTwinDeny(thisHub, nil, 1); err != nil {
						t.Error(err)
					}
					if s := a.Status(); s.Deny.Lost == "" || s.Deny.Mend == "" ||
						!strings.Contains(strings.Join(s.Trouble, "\n"), s.Deny.Lost) {
						t.Errorf("%s: the status says %+v, %q", name, s.Deny, s.Trouble)
					}
					if logs.FilterField(zap.String("message_id", agent.MessageDenyRulesLost)).Len() != 1 {
						t.Errorf("%s: the log does not say so once", name)
					}
				})
			}
			disk.boot(t, true, func(a *agent.Agent, _ *observer.ObservedLogs) {
				if err := end(a); err != nil {
					t.Error(err)
				}
				if code := askFor(a, module, vault); code != "" || a.DenyStatus().Lost != "" {
					t.Errorf("%s: still %q", name, code)
				}
			})
			disk.boot(t, true, func(a *agent.Agent, _ *observer.ObservedLogs) {
				if code := askFor(a, module, vault); code != "" || len(a.DenyStatus().Rules) != 1 {
					t.Errorf("%s: at the next start %q, %+v", name, code, a.DenyStatus())
				}
			})
		})
	}
}

// Where a twin takes the place of a lost record, the device says that others' rules may be gone, and of which file,
// over restarts and further reads of the twin, until root ends it.
func TestTwinLeavesRulesMissing(t *testing.T) {
	t.Parallel()
	for _, late := range []bool{false, true} { // it is found lost only after the twin was read
		synctest.Test(t, func(t *testing.T) {
			disk := new(denyDisk)
			disk.boot(t, false, func(a *agent.Agent, _ *observer.ObservedLogs) {
				mustDeny(t, a, api.DenyLocal, denyModule("vision"))
			})
			disk.set(func(d *denyDisk) { d.spoilt = errors.New("deny-rules.json: it is not JSON") })
			if late {
				disk.set(func(d *denyDisk) { d.unread = errors.New("input/output error") })
			}
			isSaid := func(a *agent.Agent) bool {
				s := a.Status()
				said := strings.Contains(s.Deny.Missing, "deny-rules.json: it is not JSON")
				trouble := strings.Join(s.Trouble, "\n")
				if said && (!strings.Contains(trouble, s.Deny.Missing) || !strings.Contains(trouble, "forget-lost") ||
					!strings.Contains(s.Deny.Mend, "forget-lost")) {
					t.Errorf("the status says %+v, %q", s.Deny, s.Trouble)
				}
				if (s.Deny.Missing != "") != said || s.Deny.Lost != "" {
					t.Errorf("the status says %+v", s.Deny)
				}
				return said
			}
			disk.boot(t, true, func(a *agent.Agent, logs *observer.ObservedLogs) {
				if err := a.SetTwinDeny(thisHub, nil, 1); err != nil && codeOf(err) != api.CodeNotKept {
					t.Error(err)
				}
				if late {
					s := a.Status()
					if trouble := strings.Join(s.Trouble, "\n"); !strings.Contains(s.Deny.Missing,
						"not in force, and what") ||
						!strings.Contains(s.Deny.Missing, "input/output error") || s.Deny.Lost != "" ||
						strings.Count(trouble, "input/output error") != 1 || !strings.Contains(trouble, s.Deny.Mend) {
						t.Errorf("while it cannot be read: %+v, %q", s.Deny, s.Trouble)
					}
					disk.set(func(d *denyDisk) { d.unread = nil })
					time.Sleep(2 * time.Minute)
					synctest.Wait()
				}
				if err := a.SetTwinDeny(thisHub, nil, 1); err != nil {
					t.Error(err)
				}
				warned := logs.FilterLevelExact(zapcore.WarnLevel).
					FilterField(zap.String("message_id", agent.MessageDenyRulesMissing)).Len()
				want := 1
				if late {
					want = 2 // that it cannot be read, and that it is lost
				}
				if code := askFor(a, module, vault); code != "" || !isSaid(a) || warned != want {
					t.Errorf("late %v: %q, said %v, %d warnings", late, code, isSaid(a), warned)
				}
			})
			since := ""
			for _, reboot := range []bool{false, true} {
				disk.boot(t, reboot, func(a *agent.Agent, _ *observer.ObservedLogs) {
					if err := a.SetTwinDeny(thisHub, nil, 2); err != nil || !isSaid(a) {
						t.Errorf("late %v, reboot %v: it is said no more (%v)", late, reboot, err)
					}
					if said := a.DenyStatus().Missing; since != "" && said != since {
						t.Errorf("%q, and before %q", said, since)
					} else {
						since = said
					}
				})
			}
			disk.boot(t, true, func(a *agent.Agent, logs *observer.ObservedLogs) {
				if err := a.ForgetLostDenyRules("uid 0"); err != nil || isSaid(a) {
					t.Errorf("root has ended it, and it is said (%v)", err)
				}
				if logs.FilterField(zap.String("message_id", agent.MessageDenyRulesForgotten)).Len() != 1 {
					t.Error("the log does not say who ended it")
				}
			})
			disk.boot(t, true, func(a *agent.Agent, _ *observer.ObservedLogs) {
				if isSaid(a) {
					t.Error("it is said again")
				}
			})
		})
	}
}

// Where a twin was read before a record that cannot be read now, the device says that others' rules are not in force,
// over restarts, until the record was read or is found lost, or root ends it.
func TestTwinWhileDenyRulesAreUnread(t *testing.T) {
	t.Parallel()
	for _, lost := range []bool{false, true} {
		for _, restarts := range []int{0, 1, 2} { // before it is read; after the second the twin is not read again
			synctest.Test(t, func(t *testing.T) {
				disk := new(denyDisk)
				disk.boot(t, false, func(a *agent.Agent, _ *observer.ObservedLogs) {
					mustDeny(t, a, api.DenyLocal, denyModule("vision"))
				})
				disk.set(func(d *denyDisk) { d.unread = errors.New("input/output error") })
				reboot := true // systemd's store has nothing
				for i := range restarts + 1 {
					disk.boot(t, reboot, func(a *agent.Agent, logs *observer.ObservedLogs) {
						if i < 2 {
							if err := a.SetTwinDeny(thisHub, nil, 1); err != nil && codeOf(err) != api.CodeNotKept {
								t.Error(err)
							}
						}
						if s := a.DenyStatus(); !strings.Contains(s.Missing, "not in force") || s.Lost != "" {
							t.Errorf("start %d: %+v", i+1, s)
						}
						if code := askFor(a, module, vault); code != "" {
							t.Errorf("the hub has answered: %q", code)
						}
						if i < restarts {
							return
						}
						disk.set(func(d *denyDisk) {
							if d.unread = nil; lost {
								d.spoilt = errors.New("it is not JSON")
							}
						})
						time.Sleep(2 * time.Minute)
						synctest.Wait()
						s, code := a.DenyStatus(), askFor(a, module, vault)
						isFound := s.Missing == "" && code == api.CodeDenied
						isLost := strings.Contains(s.Missing, "it is not JSON") && code == ""
						if lost && !isLost || !lost && !isFound {
							t.Errorf("lost %v, after %d restarts: %q, %+v", lost, restarts, code, s)
						}
					})
					reboot = false
				}
				disk.boot(t, true, func(a *agent.Agent, _ *observer.ObservedLogs) {
					if s := a.DenyStatus(); (s.Missing != "") != lost || (askFor(a, module, vault) == "") != lost {
						t.Errorf("lost %v, at the next boot: %+v", lost, s)
					}
				})
			})
		}
	}
}

// A hub that root has set aside does not end that a record is lost.
func TestSetAsideHubDoesNotEndALoss(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		disk := &denyDisk{spoilt: errors.New("it is not JSON")}
		disk.boot(t, false, func(a *agent.Agent, _ *observer.ObservedLogs) {
			if err := errors.Join(a.SetHubAside("uid 0"), a.SetTwinDeny(thisHub, nil, 1)); err != nil {
				t.Error(err)
			}
			if code := askFor(a, module, vault); code != api.CodeDenyRulesLost {
				t.Errorf("%q", code)
			}
			if err := a.ForgetLostDenyRules("uid 0"); err != nil {
				t.Error(err)
			}
			if code := askFor(a, module, vault); code != "" {
				t.Errorf("%q", code)
			}
		})
	})
}

// A record that cannot be read now counts as lost until it can be, and what was set meanwhile joins it.
func TestUnreadDenyRules(t *testing.T) {
	t.Parallel()
	kept := deny.Record{Lineage: "l", Generation: 4, Rules: []deny.Rule{
		{ID: "old", Target: deny.Target{Module: "vision"}, Origin: deny.Local},
	}}
	for _, forgotten := range []bool{false, true} {
		for _, restarted := range []bool{false, true} {
			synctest.Test(t, func(t *testing.T) {
				disk := &denyDisk{record: &kept, unread: errors.New("input/output error")}
				begin := func(f func(a *agent.Agent)) {
					disk.boot(t, false, func(a *agent.Agent, _ *observer.ObservedLogs) { f(a) })
				}
				check := func(a *agent.Agent) {
					synctest.Wait()
					if code := askFor(a, module, vault); code != api.CodeDenied {
						t.Errorf("when it was read: %q", code)
					}
					if s := a.DenyStatus(); len(s.Rules) != 2 || s.Lost != "" {
						t.Errorf("when it was read: %+v", s)
					}
				}
				begin(func(a *agent.Agent) {
					if code := askFor(a, module, vault); code != api.CodeDenyRulesLost {
						t.Errorf("%q", code)
					}
					_, err := a.Deny("uid 0", api.DenySide{Origin: api.DenyLocal}, denyModule("other"))
					if codeOf(err) != api.CodeNotKept {
						t.Errorf("%v", err)
					}
					if forgotten {
						_ = a.ForgetLostDenyRules("uid 0")
						if code := askFor(a, module, vault); code != "" {
							t.Errorf("root gave it up: %q", code)
						}
					}
					time.Sleep(5 * time.Minute)
					if disk.record != &kept {
						t.Error("what cannot be read was overwritten")
					}
					if !restarted {
						disk.set(func(d *denyDisk) { d.unread = nil })
						time.Sleep(2 * time.Minute)
						check(a)
					}
				})
				disk.set(func(d *denyDisk) { d.unread = nil })
				begin(check)
				if disk.record == &kept {
					t.Error("what was set meanwhile is not on the disk")
				}
			})
		}
	}
}

// One that is found lost when it can be read is lost from then on.
func TestUnreadDenyRulesThatAreLost(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		disk := &denyDisk{unread: errors.New("input/output error")}
		disk.boot(t, false, func(a *agent.Agent, _ *observer.ObservedLogs) {
			disk.set(func(d *denyDisk) { d.unread = nil })
			time.Sleep(2 * time.Minute)
			synctest.Wait()
			if s := a.DenyStatus(); !strings.Contains(s.Lost, "is lost") {
				t.Errorf("%+v", s)
			}
			if err := a.ForgetLostDenyRules("uid 0"); err != nil {
				t.Error(err)
			}
		})
	})
}

// Where systemd holds the record, a disk that cannot be read, or is spoilt, denies nobody anything.
func TestHandedOverDenyRulesAreKnown(t *testing.T) {
	t.Parallel()
	for name, spoil := range map[string]func(*denyDisk){
		"unread": func(d *denyDisk) { d.unread = errors.New("input/output error") },
		"spoilt": func(d *denyDisk) { d.spoilt = errors.New("it is not JSON") },
		"gone":   func(d *denyDisk) { d.record = nil },
	} {
		synctest.Test(t, func(t *testing.T) {
			disk := new(denyDisk)
			disk.boot(t, false, func(a *agent.Agent, _ *observer.ObservedLogs) {
				mustDeny(t, a, api.DenyLocal, denyModule("vision"))
			})
			disk.set(spoil)
			disk.boot(t, false, func(a *agent.Agent, _ *observer.ObservedLogs) {
				if code := askFor(a, module, vault); code != api.CodeDenied {
					t.Errorf("%s: what is denied: %q", name, code)
				}
				if code := askFor(a, root, storage); code != "" {
					t.Errorf("%s: what is not: %q", name, code)
				}
				disk.set(func(d *denyDisk) { d.unread = nil })
				time.Sleep(2 * time.Minute)
				synctest.Wait()
			})
			if disk.record == nil || len(disk.record.Rules) != 1 {
				t.Errorf("%s: the disk has %+v", name, disk.record)
			}
		})
	}
}

// Where starts went on apart from one record, what was denied in either is denied, whichever of the two has more.
func TestDenyRecordsThatWentOnApart(t *testing.T) {
	t.Parallel()
	for _, row := range []struct{ onDisk, beneath []string }{
		{[]string{"vision"}, []string{"a", "b", "c"}},
		{[]string{"a", "b", "c"}, []string{"vision"}},
	} {
		synctest.Test(t, func(t *testing.T) {
			denyAll := func(modules []string) func(*agent.Agent, *observer.ObservedLogs) {
				return func(a *agent.Agent, _ *observer.ObservedLogs) {
					for _, name := range modules {
						mustDeny(t, a, api.DenyLocal, denyModule(name))
					}
				}
			}
			disk := new(denyDisk)
			disk.boot(t, false, denyAll([]string{"other"}))
			beneath := &denyDisk{record: disk.record}
			disk.boot(t, true, denyAll(row.onDisk))
			beneath.boot(t, true, denyAll(row.beneath))
			disk.held = beneath.held
			for i := range 2 {
				disk.boot(t, i > 0, func(a *agent.Agent, logs *observer.ObservedLogs) {
					if code := askFor(a, module, vault); code != api.CodeDenied {
						t.Errorf("%v, start %d: %q", row, i, code)
					}
					if rules := a.DenyStatus().Rules; len(rules) != 5 {
						t.Errorf("%v, start %d: %+v", row, i, rules)
					}
					said := logs.FilterField(zap.String("message_id", agent.MessageDenyRulesJoined)).Len()
					if said != 1-i {
						t.Errorf("%v, start %d: it is said %d times", row, i, said)
					}
				})
			}
		})
	}
}

// Starts without changes are no forks, however many there are, and what was lifted stays so.
func TestLiftedRulesStayLifted(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		disk := new(denyDisk)
		for i := range 40 {
			before := disk.record
			disk.boot(t, i%3 == 0, func(a *agent.Agent, logs *observer.ObservedLogs) {
				if rules := a.DenyStatus().Rules; len(rules) != 0 {
					t.Fatalf("start %d: %+v", i, rules)
				}
				if i%5 == 0 {
					rule := mustDeny(t, a, api.DenyLocal, denyModule("vision"))
					if _, err := a.LiftDeny("uid 0", api.DenySide{Origin: api.DenyLocal}, rule.ID); err != nil {
						t.Fatal(err)
					}
				}
				if logs.FilterField(zap.String("message_id", agent.MessageDenyRulesJoined)).Len() != 0 {
					t.Errorf("start %d: a fork", i)
				}
			})
			if i%7 == 1 { // what the last process wrote did not come to the disk
				disk.record = before
			}
		}
	})
}

// An older record in the place of the one that was there last denies what it denies, and counts as lost beside that,
// unless systemd holds what it lacks.
func TestOlderDenyRecordPutBack(t *testing.T) {
	t.Parallel()
	for _, isHeld := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			disk := new(denyDisk)
			disk.boot(t, false, func(a *agent.Agent, _ *observer.ObservedLogs) {
				mustDeny(t, a, api.DenyLocal, denyModule("other"))
			})
			old := disk.record
			disk.boot(t, true, func(a *agent.Agent, _ *observer.ObservedLogs) {
				mustDeny(t, a, api.DenyLocal, denyModule("vision"))
			})
			disk.noted, disk.record = disk.record.Named(), old
			disk.boot(t, !isHeld, func(a *agent.Agent, _ *observer.ObservedLogs) {
				want := api.CodeDenyRulesLost
				if isHeld {
					want = api.CodeDenied
				}
				if code := askFor(a, module, vault); code != want {
					t.Errorf("held %v: %q", isHeld, code)
				}
				s := a.DenyStatus()
				if isHeld != (s.Lost == "") || isHeld != (len(s.Rules) == 2) || !isHeld &&
					!strings.Contains(s.Lost, "older") {
					t.Errorf("held %v: %+v", isHeld, s)
				}
				if err := a.ForgetLostDenyRules("uid 0"); err != nil {
					t.Error(err)
				}
			})
			disk.noted = disk.record.Named()
			disk.boot(t, true, func(a *agent.Agent, _ *observer.ObservedLogs) {
				if s := a.DenyStatus(); s.Lost != "" {
					t.Errorf("held %v: it is lost again: %s", isHeld, s.Lost)
				}
			})
		})
	}
}

// What is in a folder that took the place of the one that was read is in force before it is overwritten; where it
// cannot be read now nothing is, and where it is spoilt the record is lost.
func TestDenyRulesMountedLate(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		late, disk := new(denyDisk), new(denyDisk)
		late.boot(t, false, func(a *agent.Agent, _ *observer.ObservedLogs) {
			mustDeny(t, a, api.DenyLocal, denyModule("vision"))
		})
		disk.boot(t, false, func(a *agent.Agent, logs *observer.ObservedLogs) {
			mustDeny(t, a, api.DenyLocal, denyModule("first"))
			disk.set(func(d *denyDisk) { d.other, d.otherFault = late.record, errors.New("input/output error") })
			_, err := a.Deny("uid 0", api.DenySide{Origin: api.DenyLocal}, denyModule("other"))
			if codeOf(err) != api.CodeNotKept {
				t.Errorf("where it cannot be read: %v", err)
			}
			disk.set(func(d *denyDisk) { d.otherFault = nil })
			time.Sleep(2 * time.Minute)
			synctest.Wait()
			if code := askFor(a, module, vault); code != api.CodeDenied {
				t.Errorf("what the other folder denies: %q", code)
			}
			if disk.record == nil || len(disk.record.Rules) != 3 {
				t.Errorf("the disk has %+v", disk.record)
			}
			if n := logs.FilterField(zap.String("message_id", agent.MessageDenyRulesJoined)).Len(); n != 1 {
				t.Errorf("it is said %d times", n)
			}
		})
		disk.boot(t, true, func(a *agent.Agent, _ *observer.ObservedLogs) {
			if code := askFor(a, module, vault); code != api.CodeDenied {
				t.Errorf("after a reboot: %q", code)
			}
			disk.set(func(d *denyDisk) { d.otherFault = spoiltError{errors.New("it is not JSON")} })
			_ = a.KeepDenyRules()
			mustDeny(t, a, api.DenyLocal, denyModule("more"))
			if s := a.DenyStatus(); !strings.Contains(s.Lost, "not JSON") {
				t.Errorf("another folder's files are spoilt: %+v", s)
			}
		})
	})
}
