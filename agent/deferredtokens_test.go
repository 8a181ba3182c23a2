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
	"golang.org/x/sys/unix"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/binding"
	"perceptd/tokencache"
	"perceptd/tokencache/tokencachetest"
)

// strikable is a device whose files cannot be read while struck, those whose names begin with one of the prefixes.
func strikable(t *testing.T, struck *atomic.Bool, prefixes ...string) *bootable {
	t.Helper()
	return &bootable{dir: t.TempDir(), back: &sticky{counts: true}, vouch: true, fails: func(name string) error {
		for _, prefix := range prefixes {
			if struck.Load() && strings.HasPrefix(name, prefix) {
				return unix.EACCES
			}
		}
		return nil
	}}
}

// Tokens that cannot be read at a start are there when they can be: in the same process, without a call, and in the
// file at the end.
func TestUnreadTokensAreReadAgain(t *testing.T) {
	t.Parallel()
	var struck atomic.Bool
	d := strikable(t, &struck, "tokens")
	synctest.Test(t, func(t *testing.T) {
		var held agent.Answer
		d.boot(t, true, func(a *agent.Agent) {
			held = mustHave(t, a)
			time.Sleep(time.Hour)
		})
		d.back.fails = errors.New("the back end is away")
		struck.Store(true)
		d.boot(t, true, func(a *agent.Agent) {
			if _, err := a.Token(t.Context(), root, requestFor(storage)); err == nil {
				t.Error("a token came from nowhere")
			}
			time.Sleep(2 * time.Hour)
			if trouble := strings.Join(a.Status().Trouble, "\n"); strings.Count(trouble,
				"the tokens that were kept cannot be read now") != 1 || strings.Contains(trouble, "not saved") {
				t.Errorf("%q", trouble)
			}
			struck.Store(false)
			time.Sleep(time.Minute)
			if got := mustHave(t, a); !got.Token.Text.Equal(held.Token.Text) || !got.ReceivedOn.Equal(held.ReceivedOn) {
				t.Errorf("another token: %+v, want %+v", got, held)
			}
			if trouble := strings.Join(a.Status().Trouble, "\n"); strings.Contains(trouble, "the tokens that") ||
				strings.Contains(trouble, "saved") {
				t.Errorf("%q", trouble)
			}
		})
		d.boot(t, true, func(a *agent.Agent) {
			if got := mustHave(t, a); !got.Token.Text.Equal(held.Token.Text) {
				t.Error("the good tokens were written over")
			}
		})
		names, err := filepath.Glob(filepath.Join(d.dir, "tokens*"))
		if err != nil || len(names) != 1 {
			t.Errorf("%q", names)
		}
	})
}

// Nor is anything lost where the device is not known at one start, and the back end is away then: the next that knows
// it has the tokens.
func TestUnopenedTokensAreOpenedLater(t *testing.T) {
	t.Parallel()
	var struck atomic.Bool
	d := strikable(t, &struck)
	synctest.Test(t, func(t *testing.T) {
		d.known = []binding.Binding{{Kind: binding.ProductUUID, ID: [32]byte{1}}}
		var held agent.Answer
		d.boot(t, true, func(a *agent.Agent) { held = mustHave(t, a) })
		known := d.known
		d.known, d.back.fails = nil, errors.New("the back end is away")
		d.boot(t, true, func(a *agent.Agent) {
			time.Sleep(2 * time.Hour)
			if _, err := a.Token(t.Context(), root, requestFor(storage)); err == nil {
				t.Error("a token came from nowhere")
			}
		})
		d.known = known
		for range 2 {
			d.boot(t, true, func(a *agent.Agent) {
				if got := mustHave(t, a); !got.Token.Text.Equal(held.Token.Text) {
					t.Error("another token")
				}
				time.Sleep(time.Minute)
			})
		}
	})
}

// Of two files of tokens that cannot be read at a start the one that can be first is of use at once: what its copy of
// the record has is in force, while the other still cannot be read, and the status says so.
func TestUnreadTokensComeOneByOne(t *testing.T) {
	t.Parallel()
	const file, aside = "tokens.sealed", "tokens.sealed.unopened-product-uuid"
	for _, first := range []string{file, aside} {
		t.Run(first, func(t *testing.T) {
			t.Parallel()
			var struck, left atomic.Bool // all that is kept cannot be read, or what does not come first
			d := &bootable{dir: t.TempDir(), back: &sticky{counts: true}, vouch: true, fails: func(name string) error {
				if !strings.HasPrefix(name, "tokens") && !strings.HasPrefix(name, "policy") || !struck.Load() &&
					(!left.Load() || name == first) {
					return nil
				}
				return unix.EIO
			}}
			known := []binding.Binding{{Kind: binding.ProductUUID, ID: [32]byte{1}}}
			revoke := func(a *agent.Agent) string {
				id := note(t, a, api.PolicyChangeRequest{AllResources: true, Effect: tokencache.Revoked}).ID
				time.Sleep(time.Minute)
				return id
			}
			synctest.Test(t, func(t *testing.T) {
				ids := make(map[string]string)
				d.known = known
				d.boot(t, true, func(a *agent.Agent) {
					mustHave(t, a)
					time.Sleep(time.Hour)
					ids[aside] = revoke(a)
				})
				for _, name := range []string{"policy-changes.json", "policy-changes.copy.json"} {
					if err := os.Remove(filepath.Join(d.dir, name)); err != nil {
						t.Fatal(err)
					}
				}
				d.known = nil
				d.boot(t, true, func(a *agent.Agent) {
					time.Sleep(time.Hour)
					ids[file] = revoke(a)
				})
				d.known = known
				struck.Store(true)
				left.Store(true)
				d.boot(t, true, func(a *agent.Agent) {
					time.Sleep(time.Hour)
					for _, id := range ids {
						if isOnRecord(a, id) {
							t.Error("what cannot be read is on record")
						}
					}
					struck.Store(false)
					time.Sleep(2 * time.Minute)
					for name, id := range ids {
						if isOnRecord(a, id) != (name == first) {
							t.Errorf("of %s on record: %v", name, name != first)
						}
					}
					if trouble := strings.Join(a.Status().Trouble, "\n"); !strings.Contains(trouble,
						"the tokens that were kept cannot be read now") {
						t.Errorf("%q", trouble)
					}
					left.Store(false)
					time.Sleep(2 * time.Minute)
					for name, id := range ids {
						if !isOnRecord(a, id) {
							t.Errorf("of %s nothing is on record", name)
						}
					}
					if trouble := strings.Join(a.Status().Trouble, "\n"); strings.Contains(trouble,
						"read again every minute") {
						t.Errorf("%q", trouble)
					}
				})
			})
		})
	}
}

// While a copy of the record may yet be read the record is not lost, whatever became of it; what the copy has is in
// force from then on.
func TestUnreadCopyOfTheRecord(t *testing.T) {
	t.Parallel()
	for name, row := range map[string]struct {
		prefixes []string             // of what cannot be read
		before   func([]string) error // what becomes of the record
		then     func([]string) error // of its files while neither can be read
	}{
		"gone, and the copy not read":            {[]string{"tokens"}, each(os.Remove), nil},
		"zeros, and the copy not read":           {[]string{"tokens"}, each(zeros), nil},
		"neither read, then zeros":               {[]string{"tokens", "policy"}, nil, each(zeros)},
		"neither read, then gone":                {[]string{"tokens", "policy"}, nil, each(os.Remove)},
		"neither read, then both":                {[]string{"tokens", "policy"}, nil, nil},
		"an older one read, and the copy is not": {[]string{"tokens"}, nil, nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var struck atomic.Bool
			d := strikable(t, &struck, row.prefixes...)
			files := []string{filepath.Join(d.dir, "policy-changes.json"),
				filepath.Join(d.dir, "policy-changes.copy.json")}
			synctest.Test(t, func(t *testing.T) {
				var id, later string
				d.boot(t, true, func(a *agent.Agent) {
					mustHave(t, a)
					time.Sleep(time.Hour)
					before, err := os.ReadFile(files[0])
					if err != nil {
						t.Fatal(err)
					}
					id = note(t, a, api.PolicyChangeRequest{AllResources: true, Effect: tokencache.Revoked}).ID
					time.Sleep(time.Minute)
					if strings.HasPrefix(name, "an older") {
						row.before = each(func(path string) error { return os.WriteFile(path, before, 0o600) })
					}
				})
				if row.before != nil {
					if err := row.before(files); err != nil {
						t.Fatal(err)
					}
				}
				struck.Store(true)
				d.boot(t, true, func(a *agent.Agent) {
					time.Sleep(time.Minute)
					_, _ = a.Token(t.Context(), root, requestFor(storage))
					later = note2(t, a).ID
					time.Sleep(10 * time.Minute)
					if row.then != nil {
						if err := row.then(files); err != nil {
							t.Fatal(err)
						}
					}
					struck.Store(false)
					time.Sleep(2 * time.Minute)
					if !withholds(t, a) || !isOnRecord(a, id) || !isOnRecord(a, later) || len(a.Changes()) != 2 {
						t.Errorf("on record: %+v", a.Changes())
					}
				})
				for range 2 {
					d.boot(t, true, func(a *agent.Agent) {
						time.Sleep(time.Minute)
						if !withholds(t, a) || len(a.Changes()) != 2 {
							t.Errorf("the next start, on record: %+v", a.Changes())
						}
					})
				}
			})
		})
	}
}

// note2 notes a change of no consequence for what is withheld, which cannot be kept yet where the record cannot be
// read.
func note2(t *testing.T, a *agent.Agent) api.PolicyChange {
	t.Helper()
	noted, err := a.RecordChange("uid 0 (pid 7)", api.PolicyChangeRequest{Resource: vault, Effect: tokencache.Granted})
	if err != nil && codeOf(err) != api.CodeNotKept {
		t.Fatal(err)
	}
	for _, c := range a.Changes() {
		if c.Effect == tokencache.Granted {
			return c
		}
	}
	return noted
}

func zeros(path string) error { return os.WriteFile(path, make([]byte, 512), 0o600) }

func each(f func(path string) error) func([]string) error {
	return func(paths []string) (err error) {
		for _, path := range paths {
			err = errors.Join(err, f(path))
		}
		return err
	}
}

// What is gone when it could be read is lost then.
func TestUnreadCopyIsGone(t *testing.T) {
	t.Parallel()
	var struck atomic.Bool
	d := strikable(t, &struck, "tokens")
	synctest.Test(t, func(t *testing.T) {
		d.boot(t, true, func(a *agent.Agent) {
			mustHave(t, a)
			note(t, a, api.PolicyChangeRequest{AllResources: true, Effect: tokencache.Revoked})
			time.Sleep(time.Minute)
		})
		names, err := filepath.Glob(filepath.Join(d.dir, "policy*"))
		if err := errors.Join(err, each(os.Remove)(names)); err != nil || len(names) != 2 {
			t.Fatal(names, err)
		}
		struck.Store(true)
		d.boot(t, true, func(a *agent.Agent) {
			time.Sleep(time.Minute)
			if all := a.Changes(); len(all) != 1 || all[0].ID != "unread" {
				t.Errorf("%+v", all)
			}
			if err := os.Remove(filepath.Join(d.dir, "tokens.sealed")); err != nil {
				t.Fatal(err)
			}
			struck.Store(false)
			time.Sleep(2 * time.Minute)
			if all := a.Changes(); len(all) != 1 || !strings.HasPrefix(all[0].ID, "lost-") {
				t.Errorf("%+v", all)
			}
		})
	})
}

// What was withdrawn stays so when tokens are read late whose copy of the record has it: where the record was read
// before, which it was withdrawn from, also at the next start, with something noted meanwhile; and where that was an
// older one than the copy, whose other changes are in force then.
func TestLateCopyBringsNothingBack(t *testing.T) {
	t.Parallel()
	for name, row := range map[string]struct{ older, noted, reboot bool }{
		"in the same process": {}, "at the next start": {noted: true, reboot: true}, "an older record": {older: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var record, tokens atomic.Bool
			d := &bootable{dir: t.TempDir(), back: &sticky{counts: true}, vouch: true}
			d.fails = func(name string) error {
				if name == "tokens.sealed" && tokens.Load() || filepath.Ext(name) == ".json" && record.Load() {
					return unix.EACCES
				}
				return nil
			}
			files := []string{filepath.Join(d.dir, "policy-changes.json"),
				filepath.Join(d.dir, "policy-changes.copy.json")}
			synctest.Test(t, func(t *testing.T) {
				var id, later string
				restore := func([]string) error { return nil }
				d.boot(t, true, func(a *agent.Agent) {
					mustHave(t, a)
					id = note(t, a, api.PolicyChangeRequest{AllResources: true, Effect: tokencache.Revoked}).ID
					time.Sleep(time.Minute)
					before, err := os.ReadFile(files[0])
					if err != nil {
						t.Fatal(err)
					}
					if row.older {
						later = note2(t, a).ID
						time.Sleep(time.Minute)
						restore = each(func(path string) error { return os.WriteFile(path, before, 0o600) })
					}
				})
				if err := restore(files); err != nil {
					t.Fatal(err)
				}
				check := func(a *agent.Agent) {
					time.Sleep(2 * time.Minute)
					if isOnRecord(a, id) || row.older && !isOnRecord(a, later) {
						t.Errorf("what was withdrawn, and kept so, is in force again, or what was not is not: %+v",
							a.Changes())
					}
				}
				record.Store(!row.older)
				tokens.Store(true)
				d.boot(t, true, func(a *agent.Agent) {
					time.Sleep(time.Minute)
					if row.noted {
						note2(t, a)
					}
					record.Store(false)
					time.Sleep(2 * time.Minute)
					if !isOnRecord(a, id) {
						t.Fatal("the record was not read")
					}
					if _, err := a.WithdrawChange("uid 0 (pid 7)", id); err != nil {
						t.Fatal(err)
					}
					time.Sleep(time.Minute)
					if !row.reboot {
						tokens.Store(false)
						check(a)
					}
				})
				tokens.Store(false)
				d.boot(t, true, check)
			})
		})
	}
}

// A copy is not taken for an older one since what could not be read then and what was noted meanwhile have as many
// generations as it has.
func TestNotedMeanwhileIsNoNewerCopy(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d, known := life(t) // a revocation, noted first of all
		eio := errors.New("input/output error")
		never := *known
		never.Record.Changes, never.OnRecord, never.Record.Generation, never.Keys = nil, 0, 0, nil
		d.there = &tokencache.Record{Instant: known.Record.Instant, Lineage: known.Record.Lineage}
		d.become(eio)
		var read atomic.Bool
		d.start(t, func(o *agent.Options) {
			o.UnreadRecord, o.UnreadTokens, o.Copies = eio, eio, []tokencache.Snapshot{never}
			o.LoadTokens = func() ([]tokencache.Snapshot, []*tokencache.Snapshot, error) {
				if !read.Load() {
					return nil, nil, eio
				}
				return []tokencache.Snapshot{*known}, nil, nil
			}
		}, func(a *agent.Agent, _ *observer.ObservedLogs) {
			for range 3 {
				note2(t, a)
			}
			d.become(nil)
			time.Sleep(2 * time.Minute)
			read.Store(true)
			time.Sleep(2 * time.Minute)
			if id := known.Record.Changes[0].ID; !isOnRecord(a, id) || len(a.Changes()) != 4 {
				t.Errorf("%s is not on record: %+v", id, a.Changes())
			}
		})
	})
}

// Nor does it come back by a mark on a token that is read late, of a resource that the withdrawn change was about as
// its alternate.
func TestLateMarkBringsNothingBack(t *testing.T) {
	t.Parallel()
	for _, alternates := range []map[string][]string{{storage: {vault}}, {vault: {storage + "/"}}, nil} {
		synctest.Test(t, func(t *testing.T) {
			rules := edge()
			rules.Alternates = alternates
			noted := tokencache.PolicyChange{ID: "noted", AllIdentities: true, Resource: storage,
				Effect: tokencache.Revoked, At: time.Now(), RecordedAt: time.Now()}
			late := tokencache.Snapshot{
				BootID: "before", OnRecord: 1, Record: tokencache.Record{Lineage: "late", Generation: 2},
				Keys: []tokencache.SnapshotEntry{{Key: tokencache.Key{Resource: vault}, Withheld: []string{noted.ID}}},
			}
			var read atomic.Bool
			a, err := agent.New(agent.Options{
				Fetch: new(tokencachetest.Source).Fetch, Rules: rules, BootID: "this",
				Record: &tokencache.Record{
					Lineage: "read", Generation: 1, Changes: []tokencache.PolicyChange{noted},
				},
				UnreadTokens: unix.EIO,
				LoadTokens: func() ([]tokencache.Snapshot, []*tokencache.Snapshot, error) {
					if !read.Load() {
						return nil, nil, unix.EIO
					}
					return []tokencache.Snapshot{late}, nil, nil
				},
			})
			if err != nil {
				t.Fatal(err)
			}
			defer a.Close()
			if _, err := a.WithdrawChange("test", noted.ID); err != nil {
				t.Fatal(err)
			}
			read.Store(true)
			time.Sleep(2 * time.Minute)
			if back := len(a.Changes()) > 0; back != (alternates == nil) { // then it was another of that ID
				t.Errorf("alternates %v: on record: %+v", alternates, a.Changes())
			}
		})
	}
}
