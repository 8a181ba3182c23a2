package agent_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/binding"
	"perceptd/agent/store"
	"perceptd/tokencache"
)

// sticky is a back end that hands out one token for 24 hours, and whose clock is right.
type sticky struct {
	issued time.Time
	n      int
	counts bool // it counts the life that the token has left
	fails  error
}

func (s *sticky) Fetch(_ context.Context, key tokencache.Key) (tokencache.Fetched, error) {
	const life = 24 * time.Hour
	if s.fails != nil {
		return tokencache.Fetched{}, s.fails
	}
	if now := time.Now().Truncate(time.Second); s.n == 0 || !now.Before(s.issued.Add(life)) {
		s.issued, s.n = now, s.n+1
	}
	expires := s.issued.Add(life)
	return tokencache.Fetched{
		Token: tokencache.Token{
			Text: tokencache.NewSecret(fmt.Sprint("token-", s.n)), ExpiresOn: expires,
			Claims: tokencache.Claims{IssuedAt: s.issued.Add(-5 * time.Minute), Audience: key.Resource},
		},
		Left: time.Until(expires).Truncate(time.Second), Counted: s.counts,
	}, nil
}

// bootable is a device whose state is in a folder.
type bootable struct {
	dir   string
	fails func(name string) error // what reading a file of dir fails with; nil: nothing
	key   store.Key
	late  *atomic.Bool      // the key is away while it is false; nil: the key is there from the start on
	known []binding.Binding // what the device is known by
	back  *sticky
	rules agent.Rules // zero: edge

	vouch  bool          // the kernel says that the clock is right
	behind time.Duration // which it is by this
	boots  int
	began  time.Time // when the last boot did
}

// errKeyAway is why a key that comes late is not there yet.
var errKeyAway = errors.New("the TPM is locked out")

func (d *bootable) findKey() (*store.Key, []binding.Binding, error) {
	if d.late != nil && !d.late.Load() {
		return nil, nil, errKeyAway
	}
	return &d.key, d.known, nil
}

// fickle is a device's folder.
type fickle struct {
	store.Disk
	d *bootable
}

func (f fickle) Read(name string, refused fs.FileMode, most int) ([]byte, error) {
	if f.d.fails != nil {
		if err := f.d.fails(name); err != nil {
			return nil, err
		}
	}
	return f.Disk.Read(name, refused, most)
}

// boot runs an agent in a boot of its own, which began a minute ago, until f returns. Where hasKey is false the key
// cannot be had that the tokens on the disk are sealed with.
func (d *bootable) boot(t *testing.T, hasKey bool, f func(a *agent.Agent)) {
	t.Helper()
	d.began = time.Now()
	d.boots++
	d.start(t, hasKey, f)
}

// start runs an agent in the last boot until f returns.
func (d *bootable) start(t *testing.T, hasKey bool, f func(a *agent.Agent)) {
	t.Helper()
	began, behind, vouch := d.began, d.behind, d.vouch
	clock := tokencache.Clock{
		Wall:         func() time.Time { return time.Now().Round(0).Add(-behind) },
		Boot:         func() time.Duration { return time.Since(began) + time.Minute },
		Synchronised: func() bool { return vouch },
	}
	if d.rules.Identities == nil {
		d.rules = edge()
	}
	folder := fickle{store.Disk(d.dir), d}
	record := store.OpenPolicyChanges(folder, clock.Boot)
	var tokens *store.Tokens
	if hasKey {
		var err error
		if tokens, err = store.OpenTokens(folder, &d.key, d.known...); err != nil {
			t.Fatal(err)
		}
	}
	if d.late != nil {
		tokens = store.AwaitTokens(folder, d.findKey)
	}
	id := fmt.Sprint("boot ", d.boots)
	b := store.Recover(record, tokens, nil, func(*tokencache.Snapshot) bool { return true }, id)
	o := agent.Options{
		Fetch: d.back.Fetch, Rules: d.rules, Clock: clock, BootID: id,
		Record: b.Record, UnreadRecord: b.Unread, LostRecord: b.Lost, LoadRecord: record.Load, SaveRecord: record.Save,
		Snapshot: b.Snapshot, Unopened: b.Unopened, Copies: b.Copies, On: b.On,
	}
	if tokens != nil {
		o.Persistence.Save = tokens.Save
	}
	if _, _, away := d.findKey(); away != nil {
		b.UnreadTokens = away
	}
	if o.UnreadTokens = b.UnreadTokens; b.UnreadTokens != nil {
		o.LoadTokens = func() (all []tokencache.Snapshot, ours []*tokencache.Snapshot, err error) {
			all, err = tokens.LoadAgain()
			for i := range all {
				ours = append(ours, &all[i])
			}
			return all, ours, err
		}
	}
	a, err := agent.New(o)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	f(a)
}

// atClocks runs f for each clock and back end that a device may have.
func atClocks(t *testing.T, f func(t *testing.T, d *bootable)) {
	t.Helper()
	for _, vouch := range []bool{true, false} {
		for _, counts := range []bool{true, false} {
			t.Run(fmt.Sprintf("vouched %v, counted %v", vouch, counts), func(t *testing.T) {
				t.Parallel()
				dir := t.TempDir()
				synctest.Test(t, func(t *testing.T) {
					f(t, &bootable{dir: dir, back: &sticky{counts: counts}, vouch: vouch})
				})
			})
		}
	}
}

func isOnRecord(a *agent.Agent, id string) bool {
	return slices.ContainsFunc(a.Changes(), func(c api.PolicyChange) bool { return c.ID == id })
}

// A revocation that is noted in a boot which cannot read the tokens, since their key cannot be had, withholds them in
// the next boot that can, though the device had been on for longer than the boot between knew of.
func TestRevocationNotedWithoutTheTokens(t *testing.T) {
	t.Parallel()
	for _, crash := range []bool{false, true} {
		t.Run(fmt.Sprintf("crash %v", crash), func(t *testing.T) {
			t.Parallel()
			atClocks(t, func(t *testing.T, d *bootable) {
				d.boot(t, true, func(a *agent.Agent) {
					mustHave(t, a)
					time.Sleep(10*24*time.Hour + 2*time.Hour)
					mustHave(t, a)
				})
				if crash { // nothing tells how long the device was on but the tokens
					record := store.OpenPolicyChanges(store.Disk(d.dir), func() time.Duration { return 0 })
					r, err := record.Load()
					if err != nil {
						t.Fatal(err)
					}
					r.Instant = tokencache.Instant{On: 2 * time.Minute, Boot: 2 * time.Minute, BootID: "boot 1"}
					if err := record.Save(*r); err != nil {
						t.Fatal(err)
					}
				}
				var id string
				d.boot(t, false, func(a *agent.Agent) {
					time.Sleep(30 * time.Minute)
					id = note(t, a, api.PolicyChangeRequest{AllResources: true, Effect: tokencache.Revoked}).ID
					time.Sleep(time.Minute)
				})
				for range 2 { // what it was put right to is kept
					time.Sleep(time.Minute)
					d.boot(t, true, func(a *agent.Agent) {
						time.Sleep(time.Second)
						synctest.Wait()
						if !withholds(t, a) {
							t.Error("a token from before the revocation is handed out")
						}
						if !isOnRecord(a, id) {
							t.Error("the revocation is off the record")
						}
					})
				}
			})
		})
	}
}

// The record tells how long the device was on though no change was ever noted.
func TestOnTimeIsKeptWithoutChanges(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		d := &bootable{dir: dir, back: &sticky{counts: true}, vouch: true}
		on := func() time.Duration {
			t.Helper()
			r, err := store.OpenPolicyChanges(store.Disk(dir), func() time.Duration { return 0 }).Load()
			if err != nil {
				t.Fatal(err)
			}
			return r.On
		}
		d.boot(t, false, func(a *agent.Agent) {
			time.Sleep(50*time.Hour + time.Minute)
			synctest.Wait()
			if got := on(); got < 49*time.Hour {
				t.Errorf("after 50 hours the record tells of %v", got)
			}
			time.Sleep(30 * time.Minute)
		})
		if got := on(); got < 50*time.Hour+30*time.Minute {
			t.Errorf("after the end the record tells of %v", got)
		}
	})
}

// On a device that is never on for an hour, and then loses its power, a change ends when it was on for long enough: of
// each boot at least the half is known.
func TestChangeEndsThoughEachBootIsShort(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		d := &bootable{dir: dir, back: &sticky{counts: true}, vouch: true}
		const on = 50 * time.Minute
		const lasts = 53*time.Hour + 15*time.Minute
		var id string
		d.cut(t, func(a *agent.Agent) {
			id = note(t, a, api.PolicyChangeRequest{AllResources: true, Effect: tokencache.Revoked}).ID
			time.Sleep(on)
		})
		for lived, ended := on, false; !ended; lived += on {
			time.Sleep(24*time.Hour - on)
			d.cut(t, func(a *agent.Agent) {
				ended = !isOnRecord(a, id)
				_ = withholds(t, a)
				time.Sleep(on)
			})
			switch {
			case ended && lived < lasts:
				t.Errorf("it ended when the device had been on for %v", lived)
			case !ended && lived > 2*lasts:
				t.Fatalf("the device was on for %v, and it has not ended", lived)
			}
		}
	})
}

// A token of an earlier boot that comes again, after a reload took its grant away and gave it back, is kept like any
// other.
func TestTokenThatCameAgainIsKept(t *testing.T) {
	t.Parallel()
	atClocks(t, func(t *testing.T, d *bootable) {
		d.boot(t, true, func(a *agent.Agent) { mustHave(t, a); time.Sleep(time.Hour) })
		time.Sleep(10 * time.Hour) // off
		d.boot(t, true, func(a *agent.Agent) {
			time.Sleep(time.Hour)
			mustHave(t, a)
			for _, rules := range []agent.Rules{edgeWithout(storage), edge()} {
				if _, err := a.Apply(rules); err != nil {
					t.Fatal(err)
				}
			}
			mustHave(t, a)
			time.Sleep(time.Minute)
		})
		tokens, err := store.OpenTokens(store.Disk(d.dir), &d.key)
		if err != nil {
			t.Fatal(err)
		}
		if m, err := tokens.Load(); err != nil || len(m.Keys) != 1 {
			t.Errorf("%+v is kept, %v", m, err)
		}
	})
}

// A token whose grant was gone at a start was received when it was first, should it come again.
func TestTokenWithoutAGrantComesAgain(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		d := &bootable{dir: dir, back: &sticky{}, vouch: true, behind: 20 * time.Minute}
		d.boot(t, true, func(a *agent.Agent) {
			mustHave(t, a)
			time.Sleep(time.Minute)
			note(t, a, api.PolicyChangeRequest{AllResources: true, Effect: tokencache.Revoked})
			time.Sleep(time.Minute)
		})
		d.behind, d.rules = 0, edgeWithout(storage)
		d.boot(t, true, func(a *agent.Agent) {
			if _, err := a.Apply(edge()); err != nil {
				t.Fatal(err)
			}
			time.Sleep(12 * time.Minute)
			if !withholds(t, a) {
				t.Error("a token from before the revocation is handed out")
			}
		})
	})
}

// So was one that was dropped since the record is lost.
func TestTokenDroppedForALostRecordComesAgain(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		back, s := new(sticky), new(shelf)
		var behind atomic.Int64
		behind.Store(int64(20 * time.Minute))
		o := agent.Options{
			Fetch: back.Fetch, Rules: edge(), BootID: "one", Persistence: s.keeping(),
			Clock: tokencache.Clock{Wall: func() time.Time {
				return time.Now().Round(0).Add(-time.Duration(behind.Load()))
			}},
		}
		a, err := agent.New(o)
		if err != nil {
			t.Fatal(err)
		}
		mustHave(t, a)
		time.Sleep(time.Minute)
		a.Close()
		o.Snapshot = s.lastSaved()
		o.Snapshot.OnRecord = 1 // there was no room for a copy of the record
		o.BootID, o.On, o.LostRecord = "two", o.Snapshot.On, errors.New("torn")
		if a, err = agent.New(o); err != nil {
			t.Fatal(err)
		}
		defer a.Close()
		time.Sleep(time.Second)
		behind.Store(0)
		time.Sleep(12 * time.Minute)
		if got := mustHave(t, a).Permissions.State; got != tokencache.Uncertain {
			t.Errorf("a token from before the record was lost is %v", got)
		}
	})
}

// A device is on for so long each day, and then its power is cut. A revocation withholds until the next token, or the
// one after it, also where nobody counts lives and no clock is known to be right.
func TestPowerCutEveryDay(t *testing.T) {
	t.Parallel()
	for _, on := range []time.Duration{50 * time.Minute, 3 * time.Hour} {
		t.Run(on.String(), func(t *testing.T) {
			t.Parallel()
			atClocks(t, func(t *testing.T, d *bootable) {
				const days = 4
				start := time.Now()
				for day := range days {
					served := false
					d.cut(t, func(a *agent.Agent) {
						if day == 0 {
							mustHave(t, a)
							time.Sleep(10 * time.Minute)
							note(t, a, api.PolicyChangeRequest{AllResources: true, Effect: tokencache.Revoked})
						}
						for time.Since(start) < time.Duration(day)*24*time.Hour+on {
							time.Sleep(5 * time.Minute)
							served = served || !withholds(t, a)
						}
					})
					if day == 0 && served {
						t.Error("a token from before the revocation is handed out")
					}
					if day == days-1 && !served {
						t.Errorf("on day %d tokens are still withheld", day)
					}
					time.Sleep(time.Until(start.Add(time.Duration(day+1) * 24 * time.Hour)))
				}
			})
		})
	}
}

// cut is boot, for a boot that ends with the power: nothing is written at its end.
func (d *bootable) cut(t *testing.T, f func(a *agent.Agent)) {
	t.Helper()
	files := make(map[string][]byte)
	d.boot(t, true, func(a *agent.Agent) {
		f(a)
		synctest.Wait()
		names, err := filepath.Glob(filepath.Join(d.dir, "*"))
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range names {
			if files[name], err = os.ReadFile(name); err != nil {
				t.Fatal(err)
			}
		}
	})
	for name, text := range files {
		if err := os.WriteFile(name, text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}
