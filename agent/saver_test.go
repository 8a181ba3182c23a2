package agent_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/tokencache"
	"perceptd/tokencache/tokencachetest"
)

// slowDisk counts what is written, each of which takes its time.
type slowDisk struct {
	takes time.Duration

	mu          sync.Mutex // protects what follows
	kept, saved int
	there       tokencache.Record
	fault       error
}

func (d *slowDisk) keep(r tokencache.Record) error {
	time.Sleep(d.takes)
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.kept++; d.fault == nil {
		d.there = r
	}
	return d.fault
}

func (d *slowDisk) save(tokencache.Snapshot) error {
	time.Sleep(d.takes)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.saved++
	return d.fault
}

func (d *slowDisk) become(fault error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.fault = fault
}

// count returns how often the record and the tokens were written, or tried to be, since it was called last.
func (d *slowDisk) count() (kept, saved int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	kept, saved = d.kept, d.saved
	d.kept, d.saved = 0, 0
	return kept, saved
}

func (d *slowDisk) has(id string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.ContainsFunc(d.there.Changes, func(p tokencache.PolicyChange) bool { return p.ID == id })
}

// on runs an agent that keeps all on d and was started a minute ago. The back end gives another token at each call.
func (d *slowDisk) on(t *testing.T, f func(a *agent.Agent)) {
	t.Helper()
	var calls atomic.Int64
	a, err := agent.New(agent.Options{
		Fetch: func(context.Context, tokencache.Key) (tokencache.Fetched, error) {
			n := calls.Add(1)
			token := tokencache.Token{Text: tokencache.NewSecret(fmt.Sprint(canary, n)),
				ExpiresOn: time.Now().Add(24 * time.Hour)}
			return tokencache.Fetched{Token: token, Left: 24 * time.Hour}, nil
		},
		Rules: edge(), BootID: "this", SaveRecord: d.keep, Persistence: agent.Persistence{Save: d.save},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	time.Sleep(time.Minute)
	d.count()
	f(a)
}

// 512 policy changes at once are a few writes, and each is on the disk when it is acknowledged. One alone is written at
// once.
func TestPolicyChangesAreWrittenTogether(t *testing.T) {
	t.Parallel()
	const changes = 512 // and no more are on record, so that none is joined to another
	for _, takes := range []time.Duration{5 * time.Millisecond, 50 * time.Millisecond} {
		for _, row := range []struct{ callers, most int }{{1, changes}, {16, 100}, {changes, 10}} {
			synctest.Test(t, func(t *testing.T) {
				d := &slowDisk{takes: takes}
				d.on(t, func(a *agent.Agent) {
					began := time.Now()
					var all sync.WaitGroup
					for i := range row.callers {
						all.Go(func() {
							for range changes / row.callers {
								time.Sleep(time.Duration(1+i%7) * time.Millisecond)
								noted, err := a.RecordChange("test", api.PolicyChangeRequest{AllResources: true,
									Effect: tokencache.Revoked})
								if err != nil || !d.has(noted.ID) {
									t.Errorf("%v, on the disk %v", err, d.has(noted.ID))
								}
							}
						})
					}
					all.Wait()
					took := time.Since(began)
					time.Sleep(10 * time.Second)
					synctest.Wait()
					if kept, saved := d.count(); kept > row.most || saved > 3+int(took/(3*time.Second)) {
						t.Errorf("by %d on a disk that takes %v: the record was written %d times, "+
							"the tokens %d times, in %v", row.callers, takes, kept, saved, took)
					}
					if most := time.Duration(changes/row.callers) * (100*time.Millisecond + 7*time.Millisecond +
						2*takes); took > most {
						t.Errorf("by %d on a disk that takes %v: it took %v", row.callers, takes, took)
					}
					time.Sleep(time.Minute)
					began = time.Now()
					_, err := a.WithdrawChange("test", a.Changes()[0].ID)
					if took := time.Since(began); err != nil || took != takes {
						t.Errorf("one alone took %v, %v", took, err)
					}
				})
			})
		}
	}
}

// Tokens that come one after the other are saved every few seconds: the first at once, the last soon.
func TestFetchesAreSavedTogether(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d := new(slowDisk)
		d.on(t, func(a *agent.Agent) {
			fetch := func() {
				if _, err := a.Refresh(t.Context(), "", storage, true); err != nil {
					t.Error(err)
				}
				synctest.Wait()
			}
			fetch()
			if _, saved := d.count(); saved != 1 {
				t.Errorf("the first was saved %d times", saved)
			}
			began := time.Now()
			for range 512 {
				time.Sleep(99 * time.Millisecond)
				fetch()
			}
			if kept, saved := d.count(); kept > 2 || saved < int(time.Since(began)/(4*time.Second)) ||
				saved > int(time.Since(began)/(3*time.Second)) {
				t.Errorf("saved %d times in %v, and the record %d times", saved, time.Since(began), kept)
			}
			time.Sleep(4 * time.Second)
			if _, saved := d.count(); saved != 1 {
				t.Errorf("the last was saved %d times", saved)
			}
		})
	})
}

// What cannot be saved is tried again on time however often fetches bring something newer, and no oftener than that.
func TestFailedSavesWhileFetchesGoOn(t *testing.T) {
	t.Parallel()
	for _, every := range []time.Duration{100 * time.Millisecond, 4 * time.Second, 7 * time.Second, 50 * time.Second,
		70 * time.Second} {
		synctest.Test(t, func(t *testing.T) {
			d := new(slowDisk)
			d.on(t, func(a *agent.Agent) {
				full := errors.New("no space left on device")
				d.become(full)
				if _, err := a.RecordChange("test", api.PolicyChangeRequest{AllResources: true,
					Effect: tokencache.Granted}); codeOf(err) != api.CodeNotKept {
					t.Error(err)
				}
				d.count()
				fetch := func(until time.Duration) {
					for began := time.Now(); time.Since(began) < until; time.Sleep(every) {
						_, _ = a.Refresh(t.Context(), "", storage, true)
					}
				}
				fetch(10 * time.Minute)
				if kept, saved := d.count(); kept < 9 || kept > 10*60+1 || saved < 9 || saved > 10*60/3+1 {
					t.Errorf("with a fetch every %v: tried %d and %d times in ten minutes", every, kept, saved)
				}
				d.become(nil)
				fetch(time.Minute)
				synctest.Wait()
				if kept, saved := d.count(); kept == 0 || saved == 0 || len(a.Status().Trouble) != 0 {
					t.Errorf("with a fetch every %v: written %d and %d times, %q", every, kept, saved,
						a.Status().Trouble)
				}
			})
		})
	}
}

// A change that is noted while the agent is closed is on the disk once it is acknowledged, and the end writes what
// there is beside it.
func TestChangesNotedAtTheEnd(t *testing.T) {
	t.Parallel()
	for range 20 {
		d := new(slowDisk)
		a, err := agent.New(agent.Options{Fetch: new(tokencachetest.Source).Fetch, Rules: edge(), SaveRecord: d.keep})
		if err != nil {
			t.Fatal(err)
		}
		var noting sync.WaitGroup
		for range 4 {
			noting.Go(func() {
				for range 20 {
					noted, err := a.RecordChange("test", api.PolicyChangeRequest{AllResources: true,
						Effect: tokencache.Granted})
					if err != nil || !d.has(noted.ID) {
						t.Errorf("%s, %v: it is on the disk: %v", noted.ID, err, d.has(noted.ID))
					}
				}
			})
		}
		a.Close()
		noting.Wait()
	}
}
