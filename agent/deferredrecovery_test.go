package agent_test

import (
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/tokencache"
)

// spoilt is an error of a record that is none any more.
type spoilt struct{ error }

func (spoilt) Spoilt() bool { return true }

// disk is a record that cannot be read until the fault is over.
type disk struct {
	device
	fault error
	there *tokencache.Record
	reads int
}

func (d *disk) load() (*tokencache.Record, error) {
	d.disk.Lock()
	defer d.disk.Unlock()
	if d.reads++; d.fault != nil {
		return nil, d.fault
	}
	return d.there, nil
}

func (d *disk) become(fault error) {
	d.disk.Lock()
	defer d.disk.Unlock()
	d.fault = fault
}

// start runs an agent that begins without the record, and with copies of what a cache knew.
func (d *disk) start(t *testing.T, change func(*agent.Options), f func(a *agent.Agent, logs *observer.ObservedLogs)) {
	t.Helper()
	core, logs := observer.New(zapcore.InfoLevel)
	o := agent.Options{Fetch: d.Fetch, Rules: edge(), Log: zap.New(core), BootID: "this", LoadRecord: d.load,
		SaveRecord: d.keep, Persistence: d.shelf.keeping()}
	change(&o)
	a, err := agent.New(o)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	f(a, logs)
}

// life is what there is after a token was fetched and a revocation noted: the record, and what the cache knows.
func life(t *testing.T) (*disk, *tokencache.Snapshot) {
	t.Helper()
	d := new(disk)
	var known *tokencache.Snapshot
	d.run(t, nil, nil, nil, func(a *agent.Agent) {
		mustHave(t, a)
		note(t, a, api.PolicyChangeRequest{Resource: storage, Effect: tokencache.Revoked})
		time.Sleep(3 * time.Second) // saves are as far apart
		synctest.Wait()
		known = d.shelf.lastSaved()
	})
	d.there = d.record()
	d.kept = nil
	fail(&d.Source, &tokencache.FetchError{Kind: tokencache.Unreachable, Detail: "down"})
	return d, known
}

// withoutCopy is m with the copy of the record left out, so that the marks are all that tells of it.
func withoutCopy(m *tokencache.Snapshot) *tokencache.Snapshot {
	left := *m
	left.Record.Changes = nil
	return &left
}

// A record that cannot be read now is read again until it can be. Meanwhile what its copy or the marks on tokens
// withhold stays withheld, nothing is written over it, and what is noted and withdrawn is put together with it
// afterwards.
func TestRecordThatCannotBeReadNow(t *testing.T) {
	t.Parallel()
	eio := errors.New("input/output error")
	for name, copied := range map[string]func(*tokencache.Snapshot) *tokencache.Snapshot{
		"a copy":     func(m *tokencache.Snapshot) *tokencache.Snapshot { return m },
		"marks only": withoutCopy,
		"nothing":    func(*tokencache.Snapshot) *tokencache.Snapshot { return nil },
	} {
		synctest.Test(t, func(t *testing.T) {
			d, known := life(t)
			d.become(eio)
			if name == "nothing" {
				fail(&d.Source, nil)
			}
			unread := func(o *agent.Options) { o.UnreadRecord, o.Snapshot = eio, copied(known) }
			d.start(t, unread, func(a *agent.Agent, logs *observer.ObservedLogs) {
				switch {
				case name == "nothing":
					if got := mustHave(t, a).Permissions.State; got != tokencache.Uncertain {
						t.Errorf("%s: it is %v", name, got)
					}
				case !withholds(t, a):
					t.Errorf("%s: the token is handed out", name)
				}
				trouble := strings.Join(a.Status().Trouble, "\n")
				if !strings.Contains(trouble, "cannot be read now: input/output error") ||
					len(a.Status().Trouble) != 1 {
					t.Errorf("%s: trouble %q", name, trouble)
				}
				noted, err := a.RecordChange("test", api.PolicyChangeRequest{AllResources: true,
					Effect: tokencache.Granted})
				if codeOf(err) != api.CodeNotKept || !strings.Contains(err.Error(),
					"is not overwritten before it was") {
					t.Errorf("%s: %v", name, err)
				}
				passing, _ := a.RecordChange("test", api.PolicyChangeRequest{AllResources: true,
					Effect: tokencache.Granted})
				if _, err := a.WithdrawChange("test", passing.ID); codeOf(err) != api.CodeNotKept {
					t.Errorf("%s: %v", name, err)
				}
				time.Sleep(10 * time.Minute)
				synctest.Wait()
				if d.record() != nil {
					t.Errorf("%s: written over what was not read: %+v", name, d.record())
				}
				if d.reads < 10 || d.reads > 20 {
					t.Errorf("%s: read %d times in ten minutes", name, d.reads)
				}
				d.become(nil)
				time.Sleep(time.Minute)
				synctest.Wait()
				var ids []string
				for _, c := range a.Changes() {
					ids = append(ids, c.ID)
				}
				slices.Sort(ids)
				want := []string{d.there.Changes[0].ID, noted.ID}
				slices.Sort(want)
				if !slices.Equal(ids, want) || len(a.Status().Trouble) != 0 {
					t.Errorf("%s: in force %q, want %q; trouble %q", name, ids, want, a.Status().Trouble)
				}
				if r := d.record(); r == nil || len(r.Changes) != 2 {
					t.Errorf("%s: on the disk %+v", name, r)
				}
				if !withholds(t, a) {
					t.Errorf("%s: the record was read, and the token is handed out", name)
				}
				if n := logs.FilterField(zap.String("message_id", agent.MessageRecordRead)).Len(); n != 1 {
					t.Errorf("%s: told %d times that it was read", name, n)
				}
			})
			if last := d.shelf.lastSaved(); slices.ContainsFunc(d.record().Changes,
				func(p tokencache.PolicyChange) bool { return p.ID == "unread" }) || last.OnRecord != 2 {
				t.Errorf("%s: kept %+v, %+v", name, d.record(), last.Record)
			}
		})
	}
}

// Whoever has mended what keeps the record from being read, or written, need not wait: a reload and a refresh have it
// tried again at once, as often as somebody asks.
func TestReloadReadsTheRecordAgain(t *testing.T) {
	t.Parallel()
	eio := errors.New("input/output error")
	for name, ask := range map[string]func(t *testing.T, a *agent.Agent){
		"reload": func(t *testing.T, a *agent.Agent) {
			if _, err := a.Apply(edge()); err != nil {
				t.Error(err)
			}
		},
		"refresh": func(t *testing.T, a *agent.Agent) { _, _ = a.Refresh(t.Context(), "", "", false) },
		"forget":  func(t *testing.T, a *agent.Agent) { _, _ = a.Forget(t.Context(), "", "", false) },
	} {
		synctest.Test(t, func(t *testing.T) {
			d, known := life(t)
			d.become(eio)
			d.start(t, func(o *agent.Options) { o.UnreadRecord, o.Snapshot = eio, known },
				func(a *agent.Agent, _ *observer.ObservedLogs) {
					time.Sleep(10*time.Minute + time.Second) // it is read once a minute by now
					synctest.Wait()
					before := d.reads
					for range 3 {
						ask(t, a)
						synctest.Wait()
						time.Sleep(time.Second)
					}
					time.Sleep(time.Second)
					if d.reads != before+3 || d.record() != nil {
						t.Errorf("%s: read %d times", name, d.reads-before)
					}
					d.become(nil)
					began := time.Now()
					ask(t, a)
					synctest.Wait()
					if r := d.record(); len(a.Status().Trouble) != 0 || r == nil || time.Since(began) != 0 {
						t.Errorf("%s: %q, on the disk %+v", name, a.Status().Trouble, r)
					}
					time.Sleep(time.Minute)
					d.fill(eio)
					_, _ = a.RecordChange("test",
						api.PolicyChangeRequest{AllResources: true, Effect: tokencache.Granted})
					time.Sleep(time.Second)
					d.fill(nil)
					ask(t, a)
					synctest.Wait()
					if r := d.record(); len(a.Status().Trouble) != 0 || len(r.Changes) != 2 {
						t.Errorf("%s: %q, on the disk %+v", name, a.Status().Trouble, r)
					}
				})
		})
	}
}

// Nothing of the time in which the record could not be read is left where nothing happened meanwhile: a change that was
// withdrawn before, and is in an older copy alone, does not come back.
func TestReadRecordWins(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d, known := life(t)
		later := *d.there
		later.Generation++
		later.Changes = nil
		d.there = &later
		eio := errors.New("input/output error")
		d.start(t, func(o *agent.Options) { o.UnreadRecord, o.Snapshot = eio, known },
			func(a *agent.Agent, _ *observer.ObservedLogs) {
				if !withholds(t, a) {
					t.Error("the copy is not in force")
				}
				time.Sleep(2 * time.Second)
				synctest.Wait()
				if withholds(t, a) || len(a.Changes()) != 0 {
					t.Errorf("withdrawn, and back: %+v", a.Changes())
				}
			})
	})
}

// What was withdrawn while the record could not be read is not brought back by it.
func TestWithdrawnBeforeTheRecordIsRead(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d, known := life(t)
		eio := errors.New("input/output error")
		d.become(eio)
		d.start(t, func(o *agent.Options) { o.UnreadRecord, o.Snapshot = eio, known },
			func(a *agent.Agent, _ *observer.ObservedLogs) {
				if _, err := a.WithdrawChange("test", d.there.Changes[0].ID); codeOf(err) != api.CodeNotKept {
					t.Error(err)
				}
				d.become(nil)
				time.Sleep(time.Minute)
				synctest.Wait()
				if r := d.record(); withholds(t, a) || len(a.Changes()) != 0 || r == nil || len(r.Changes) != 0 {
					t.Errorf("withdrawn, and back: %+v, on the disk %+v", a.Changes(), r)
				}
			})
	})
}

// What is joined while a full record cannot be read is not taken for withdrawn when it is: every revocation is in
// force, of those before and of those that were noted meanwhile, and what stood for the record stands for none of them.
func TestJoinedBeforeTheRecordIsRead(t *testing.T) {
	t.Parallel()
	for _, withhold := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			d, known := life(t)
			full := *d.there
			for i := range tokencache.MaxChanges - 1 {
				p := full.Changes[0]
				p.ID, p.Resource = fmt.Sprint("before-", i), fmt.Sprint("api://", i)
				full.Changes = append(full.Changes, p)
			}
			d.there, known.Record = &full, full
			eio := errors.New("input/output error")
			d.become(eio)
			unread := func(o *agent.Options) {
				o.UnreadRecord, o.Snapshot, o.Rules.WithholdLost = eio, known, withhold
			}
			d.start(t, unread, func(a *agent.Agent, _ *observer.ObservedLogs) {
				time.Sleep(time.Second)
				for range 30 {
					_, _ = a.RecordChange("test", api.PolicyChangeRequest{Resource: vault, Effect: tokencache.Revoked})
				}
				d.become(nil)
				time.Sleep(time.Minute)
				synctest.Wait()
				about := make(map[string]int)
				for _, c := range a.Changes() {
					about[c.Resource] += 1 + c.Joined
				}
				for _, p := range full.Changes {
					if about[p.Resource] == 0 && about[""] == 0 {
						t.Errorf("withhold %v: %s of %s is gone", withhold, p.ID, p.Resource)
					}
				}
				if about[vault] < 30 || about[""] > 30 || len(a.Changes()) != tokencache.MaxChanges {
					t.Errorf("withhold %v: of the vault %d, of all %d, %d in all", withhold, about[vault], about[""],
						len(a.Changes()))
				}
				if slices.ContainsFunc(a.Changes(), func(c api.PolicyChange) bool { return c.ID == "unread" }) {
					t.Errorf("withhold %v: what stood for the record is still there", withhold)
				}
			})
		})
	}
}

// The process may end before the record is read: it is as it was, and the next start finds what was noted in the copy.
func TestRecordThatIsNeverRead(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d, known := life(t)
		eio := errors.New("input/output error")
		d.become(eio)
		unread := func(o *agent.Options) { o.UnreadRecord, o.Snapshot = eio, known }
		d.start(t, unread, func(a *agent.Agent, _ *observer.ObservedLogs) {
			_, _ = a.RecordChange("test", api.PolicyChangeRequest{AllResources: true, Effect: tokencache.Granted})
			synctest.Wait()
		})
		if d.record() != nil {
			t.Fatalf("written: %+v", d.record())
		}
		known = d.shelf.lastSaved()
		d.start(t, func(o *agent.Options) { o.Record, o.Snapshot = d.there, known },
			func(a *agent.Agent, _ *observer.ObservedLogs) {
				if !withholds(t, a) || len(a.Changes()) != 2 {
					t.Errorf("%+v", a.Changes())
				}
			})
	})
}

// Only when neither the record nor a copy of it can be read is it lost. Tokens from before are gone then, and what
// comes is uncertain, or withheld where that is configured. The command that the trouble names ends either.
func TestRecordThatIsLost(t *testing.T) {
	t.Parallel()
	torn := spoilt{errors.New("policy-changes.json: it is not JSON")}
	for _, row := range []struct {
		name     string
		withhold bool
		begin    func(o *agent.Options, known *tokencache.Snapshot)
		marked   bool
	}{
		{"spoilt", false, func(o *agent.Options, _ *tokencache.Snapshot) { o.LostRecord = torn }, false},
		{"spoilt, to be withheld", true, func(o *agent.Options, _ *tokencache.Snapshot) { o.LostRecord = torn }, false},
		{"spoilt, with marks", false, func(o *agent.Options, known *tokencache.Snapshot) {
			o.LostRecord, o.Snapshot = torn, withoutCopy(known)
		}, true},
		{"gone, with marks", false, func(o *agent.Options, known *tokencache.Snapshot) {
			o.Snapshot = withoutCopy(known)
		}, true},
		{"spoilt when it could be read at last", false, func(o *agent.Options, _ *tokencache.Snapshot) {
			o.UnreadRecord = errors.New("EIO")
		}, false},
	} {
		synctest.Test(t, func(t *testing.T) {
			d, known := life(t)
			fail(&d.Source, nil)
			d.become(torn)
			before := d.Count()
			begin := func(o *agent.Options) {
				o.Rules.WithholdLost = row.withhold
				row.begin(o, known)
			}
			d.start(t, begin, func(a *agent.Agent, logs *observer.ObservedLogs) {
				time.Sleep(2 * time.Second)
				synctest.Wait()
				for _, key := range a.Status().Tokens {
					if row.marked && key.SHA256 != "" { // the others begin without any
						t.Errorf("%s: the token from before is held", row.name)
					}
				}
				if row.marked && d.Count() > before { // what stands for the record would withhold it
					t.Errorf("%s: one was fetched", row.name)
				}
				answer, err := a.Token(t.Context(), root, requestFor(storage))
				switch {
				case row.withhold || row.marked:
					if codeOf(err) != api.CodeRevoked {
						t.Errorf("%s: %v", row.name, err)
					}
				case err != nil || answer.Permissions.State != tokencache.Uncertain:
					t.Errorf("%s: %+v, %v", row.name, answer.Permissions, err)
				}
				if logs.FilterField(zap.String("message_id", agent.MessageLostRecord)).Len() != 1 {
					t.Errorf("%s: not told", row.name)
				}
				trouble := a.Status().Trouble
				if len(trouble) != 1 || !strings.Contains(trouble[0], "perceptctl policy-changes withdraw lost-") {
					t.Fatalf("%s: trouble %q", row.name, trouble)
				}
				says := "counts as uncertain"
				if row.withhold {
					says = "is withheld"
				}
				if !strings.Contains(trouble[0], "every token from before "+says) {
					t.Errorf("%s: trouble %q", row.name, trouble)
				}
				other := edge()
				other.WithholdLost = !row.withhold
				if _, err := a.Apply(other); err != nil {
					t.Fatal(err)
				}
				if !row.marked {
					if _, err := a.Token(t.Context(), root,
						requestFor(storage)); (codeOf(err) == api.CodeRevoked) == row.withhold {
						t.Errorf("%s, and configured the other way: %v", row.name, err)
					}
				}
				id := trouble[0][strings.LastIndex(trouble[0], " ")+1:]
				if _, err := a.WithdrawChange("test", id); err != nil || len(a.Status().Trouble) != 0 {
					t.Errorf("%s: %v, trouble %q", row.name, err, a.Status().Trouble)
				}
				if withholds(t, a) != row.marked {
					t.Errorf("%s: withheld is not %v", row.name, row.marked)
				}
			})
		})
	}
}

// A mark holds where its revocation is on no record, unless a record that is as new tells that it was withdrawn, and
// for the token that has it alone.
func TestMarksOnTokens(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name       string
		lineage    string
		generation int // beside the mark's
		withheld   bool
	}{
		{"the record is older", "", -1, true},
		{"the record is as new, so that it was withdrawn", "", 0, false},
		{"the record is newer, so that it was withdrawn", "", 1, false},
		{"the record is another", "elsewhere", 5, true},
	} {
		synctest.Test(t, func(t *testing.T) {
			d, known := life(t)
			r := tokencache.Record{Lineage: known.Record.Lineage, Generation: uint64(int(known.Record.Generation) +
				row.generation)}
			if row.lineage != "" {
				r.Lineage = row.lineage
			}
			d.start(t, func(o *agent.Options) { o.Record, o.Snapshot = &r, withoutCopy(known) },
				func(a *agent.Agent, _ *observer.ObservedLogs) {
					if withholds(t, a) != row.withheld {
						t.Errorf("%s: withheld is not %v: %+v", row.name, row.withheld, a.Changes())
					}
					for _, c := range a.Changes() {
						if c.Identity == "" || c.Resource == "" || len(c.Note) == 0 {
							t.Errorf("%s: %+v", row.name, c)
						}
					}
				})
		})
	}
}

// What another source's tokens were kept with, and an older file beside what systemd kept, tell of revocations as well.
func TestEveryCopyCounts(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		copyOf := func(lineage string, generation uint64, ids ...string) tokencache.Snapshot {
			m := tokencache.Snapshot{Source: "another", BootID: "this",
				Record: tokencache.Record{Lineage: lineage, Generation: generation}, OnRecord: len(ids)}
			for _, id := range ids {
				m.Record.Changes = append(m.Record.Changes, tokencache.PolicyChange{ID: id, AllIdentities: true,
					Effect: tokencache.Revoked, At: time.Now(), RecordedAt: time.Now()})
			}
			return m
		}
		for _, row := range []struct {
			name   string
			copies []tokencache.Snapshot
			want   string
		}{
			{"one", []tokencache.Snapshot{copyOf("l", 3, "a")}, "[a]"},
			{"the newer first", []tokencache.Snapshot{copyOf("l", 3, "a", "b"), copyOf("l", 2, "a", "c")}, "[a b]"},
			{"the older first", []tokencache.Snapshot{copyOf("l", 2, "a", "c"), copyOf("l", 3, "a", "b")}, "[a b]"},
			{"of two lineages", []tokencache.Snapshot{copyOf("l", 3, "a"), copyOf("m", 1, "b")}, "[a b]"},
			{"of a release without lineages", []tokencache.Snapshot{copyOf("", 0), copyOf("m", 1, "b")}, "[b]"},
		} {
			d := new(disk)
			d.start(t, func(o *agent.Options) { o.Copies = row.copies },
				func(a *agent.Agent, _ *observer.ObservedLogs) {
					var ids []string
					for _, c := range a.Changes() {
						ids = append(ids, c.ID)
					}
					slices.Sort(ids)
					if fmt.Sprint(ids) != row.want {
						t.Errorf("%s: %q, want %s", row.name, ids, row.want)
					}
				})
		}
	})
}

// There was a record that could not be read. When it is found spoilt or gone it is lost, and no first start: nothing
// from before is current, and each token is fetched anew.
func TestUnreadRecordThatIsFoundLost(t *testing.T) {
	t.Parallel()
	eio := errors.New("input/output error")
	for name, later := range map[string]error{"gone": nil, "spoilt": spoilt{errors.New("zeros")}} {
		synctest.Test(t, func(t *testing.T) {
			d := new(disk)
			d.become(eio)
			d.start(t, func(o *agent.Options) { o.UnreadRecord = eio },
				func(a *agent.Agent, logs *observer.ObservedLogs) {
					mustHave(t, a)
					before := d.Count()
					d.become(later)
					time.Sleep(2 * time.Minute)
					synctest.Wait()
					if got := mustHave(t, a).Permissions.State; got != tokencache.Uncertain || d.Count() == before {
						t.Errorf("%s: the token is %v, fetched anew %v", name, got, d.Count() != before)
					}
					trouble := a.Status().Trouble
					if len(trouble) != 1 || !strings.Contains(trouble[0], "withdraw "+lostID(a)) ||
						logs.FilterField(zap.String("message_id", agent.MessageLostRecord)).Len() != 1 {
						t.Errorf("%s: trouble %q", name, trouble)
					}
					if r := d.record(); r == nil || len(r.Changes) != 1 {
						t.Errorf("%s: on the disk %+v", name, r)
					}
				})
		})
	}
}

// lostID is the ID of the change that stands for a lost record.
func lostID(a *agent.Agent) string {
	for _, c := range a.Changes() {
		if strings.HasPrefix(c.ID, "lost-") {
			return c.ID
		}
	}
	return "nothing"
}

// What is written over a record that is just read has what was on it, whoever has something written meanwhile.
func TestNothingIsWrittenOverARecordThatIsJustRead(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d, known := life(t)
		eio := errors.New("input/output error")
		d.become(eio)
		reading, read := make(chan struct{}), make(chan struct{})
		slow := func(o *agent.Options) {
			o.UnreadRecord, o.Snapshot = eio, withoutCopy(known)
			o.LoadRecord = func() (*tokencache.Record, error) {
				close(reading)
				<-read
				return d.there, nil
			}
		}
		d.start(t, slow, func(a *agent.Agent, _ *observer.ObservedLogs) {
			noted, err := a.RecordChange("test", api.PolicyChangeRequest{AllResources: true,
				Effect: tokencache.Granted})
			if codeOf(err) != api.CodeNotKept {
				t.Fatal(err)
			}
			<-reading
			withdrawn := make(chan error)
			go func() {
				_, err := a.WithdrawChange("test", noted.ID)
				withdrawn <- err
			}()
			for range 1000 { // it waits for a lock, for which no bubble's time goes on
				runtime.Gosched()
			}
			close(read)
			if err := <-withdrawn; err != nil {
				t.Error(err)
			}
			synctest.Wait()
			for _, c := range a.Changes() {
				if c.ID == noted.ID {
					t.Error("what was withdrawn meanwhile is back")
				}
			}
			for _, r := range d.kept {
				if !slices.ContainsFunc(r.Changes,
					func(p tokencache.PolicyChange) bool { return p.ID == d.there.Changes[0].ID }) {
					t.Errorf("written over it: %+v", r)
				}
			}
		})
	})
}

// denied is a read that is not permitted, with what mends it.
type denied struct{ error }

func (denied) Remedy() string { return "chown percept: /var/lib/percept/*" }

// What stands for a record that cannot be read is not withdrawn: it ends when the record is read, and every screen says
// how that comes about.
func TestUnreadIsNotWithdrawn(t *testing.T) {
	t.Parallel()
	for _, withhold := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			d, _ := life(t)
			fail(&d.Source, nil)
			fault := denied{errors.New("permission denied")}
			d.become(fault)
			begin := func(o *agent.Options) { o.UnreadRecord, o.Rules.WithholdLost = fault, withhold }
			d.start(t, begin, func(a *agent.Agent, _ *observer.ObservedLogs) {
				answer, err := a.Token(t.Context(), root, requestFor(storage))
				switch {
				case !withhold && answer.Permissions.State != tokencache.Uncertain:
					t.Errorf("%+v, %v", answer.Permissions, err)
				case withhold && (codeOf(err) != api.CodeRevoked || strings.Contains(err.Error(), "by Jan") ||
					strings.Contains(err.Error(), "were revoked on") ||
					!strings.Contains(err.Error(), "cannot be read now, so that nobody knows") ||
					!strings.Contains(err.Error(), "[tokens] lost_record); to end that: "+fault.Remedy())):
					t.Error(err)
				}
				_, err = a.WithdrawChange("test", "unread")
				if codeOf(err) != api.CodeBadRequest || !strings.Contains(err.Error(),
					"permission denied; "+fault.Remedy()) || !strings.Contains(err.Error(), "move its two files") {
					t.Error(err)
				}
				c := a.Changes()
				if len(c) != 1 || c[0].Record != api.RecordUnread || !strings.HasPrefix(c[0].Mend, fault.Remedy()) {
					t.Errorf("%+v", c)
				}
				if trouble := strings.Join(a.Status().Trouble, "\n"); !strings.Contains(trouble, fault.Remedy()) ||
					strings.Contains(trouble, "--state-dir") {
					t.Errorf("trouble %q", trouble)
				}
				d.become(nil)
				time.Sleep(2 * time.Second)
				synctest.Wait()
				if c := a.Changes(); len(c) != 1 || c[0].ID != d.there.Changes[0].ID || c[0].Record != "" ||
					!withholds(t, a) {
					t.Errorf("the record was read: %+v", c)
				}
			})
		})
	}
}

// A record that can never be read is ended by moving it away: then it is lost, be it while perceptd runs or before the
// next start, and what stands for that can be withdrawn.
func TestUnreadRecordIsMovedAway(t *testing.T) {
	t.Parallel()
	eio := errors.New("input/output error")
	lost := func(t *testing.T, a *agent.Agent) {
		t.Helper()
		c := a.Changes()
		if len(c) != 1 || c[0].Record != api.RecordLost || !strings.HasPrefix(c[0].ID, "lost-") ||
			!strings.HasSuffix(c[0].Mend, "perceptctl policy-changes withdraw "+c[0].ID) {
			t.Fatalf("%+v", c)
		}
		_, err := a.Token(t.Context(), root, requestFor(storage))
		if codeOf(err) != api.CodeRevoked || !strings.Contains(err.Error(),
			"the record of policy changes is lost, so that nobody knows") ||
			!strings.HasSuffix(err.Error(), c[0].Mend) {
			t.Errorf("%v", err)
		}
		if _, err := a.WithdrawChange("test", c[0].ID); err != nil || withholds(t, a) {
			t.Errorf("%v", err)
		}
	}
	for _, running := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			d, _ := life(t)
			fail(&d.Source, nil)
			d.become(eio)
			rules := edge()
			rules.WithholdLost = true
			d.start(t, func(o *agent.Options) { o.UnreadRecord, o.Rules = eio, rules },
				func(a *agent.Agent, _ *observer.ObservedLogs) {
					withholds(t, a)
					d.disk.Lock()
					d.there = nil
					d.disk.Unlock()
					if running {
						d.become(nil)
						time.Sleep(time.Minute)
						synctest.Wait()
						lost(t, a)
					}
				})
			if running {
				return
			}
			d.start(t, func(o *agent.Options) { o.Snapshot, o.Rules = d.shelf.lastSaved(), rules },
				func(a *agent.Agent, _ *observer.ObservedLogs) {
					lost(t, a)
				})
		})
	}
}

// What becomes of a change that is not on the disk is told by what carries it.
func TestUnkeptChanges(t *testing.T) {
	t.Parallel()
	full := errors.New("no space left on device")
	for _, row := range []struct {
		name   string
		change func(o *agent.Options)
		says   string
	}{
		{"systemd", func(o *agent.Options) { o.Persistence.Save = nil },
			"systemd carries it over a restart, and a stop or a reboot loses it"},
		{"nothing", func(o *agent.Options) { o.Persistence = agent.Persistence{} },
			"the next start does not know of it"},
		{"the tokens' file", func(o *agent.Options) { o.UnreadRecord = full },
			"the next start knows of it by the copy beside the tokens alone"},
	} {
		synctest.Test(t, func(t *testing.T) {
			d := new(disk)
			d.become(full)
			d.fill(full)
			d.start(t, row.change, func(a *agent.Agent, _ *observer.ObservedLogs) {
				_, err := a.RecordChange("test", api.PolicyChangeRequest{AllResources: true,
					Effect: tokencache.Granted})
				if codeOf(err) != api.CodeNotKept || !strings.Contains(err.Error(), row.says) ||
					strings.Contains(err.Error(), "--state-dir") {
					t.Errorf("%s: %v, want %q", row.name, err, row.says)
				}
			})
		})
	}
}

// inBoot is what an agent begins with in this boot, by what was carried in it and the record, if that can be read.
func (d *disk) inBoot(back *sticky, clock tokencache.Clock, fault error,
	carried *tokencache.Snapshot) func(o *agent.Options) {
	return func(o *agent.Options) {
		o.Fetch, o.Clock = back.Fetch, clock
		var taken []tokencache.Instant
		if carried != nil {
			o.Snapshot, o.Copies = carried, []tokencache.Snapshot{*carried}
			taken = append(taken, carried.Taken())
		}
		if o.UnreadRecord = fault; fault == nil && d.there != nil {
			o.Record = d.there
			taken = append(taken, d.there.Instant)
		}
		o.On = tokencache.OnAtBoot(o.BootID, clock.Boot(), taken...)
	}
}

// sinceBoot is the clock of a device that booted a minute ago.
func sinceBoot() tokencache.Clock {
	began := time.Now()
	return tokencache.Clock{Boot: func() time.Duration { return time.Since(began) + time.Minute }}
}

// A revocation that is noted while the record cannot be read withholds the token from before it when the record is
// read, which is of a later on-time than this boot knew of, also after restarts in between. It has the moment of its
// note, whoever moved it.
func TestRestartWhileTheRecordIsUnread(t *testing.T) {
	t.Parallel()
	eio := errors.New("input/output error")
	for _, row := range []struct {
		name     string
		restarts int  // while it cannot be read
		sealed   bool // the tokens of the boot before could be read, which tell of a lower on-time
		atStart  bool // it is read at another restart
	}{
		{"no restart", 0, false, false},
		{"a restart", 1, false, false},
		{"two restarts", 2, false, false},
		{"read at a restart", 0, false, true},
		{"a restart, and read at another", 1, false, true},
		{"the tokens were read", 0, true, false},
		{"the tokens were read, a restart", 1, true, false},
		{"the tokens were read, and the record at a restart", 1, true, true},
	} {
		synctest.Test(t, func(t *testing.T) {
			d := new(disk)
			d.there = &tokencache.Record{Instant: tokencache.Instant{On: 1000 * time.Hour, Boot: 50 * time.Hour,
				BootID: "before"}, Lineage: "l", Generation: 5}
			d.become(eio)
			back, clock := &sticky{counts: true}, sinceBoot()
			var carried *tokencache.Snapshot
			if row.sealed {
				carried = &tokencache.Snapshot{BootID: "before", Boot: 40 * time.Hour, On: 990 * time.Hour,
					Wall: time.Now(), Record: tokencache.Record{
						Instant: tokencache.Instant{On: 990 * time.Hour, Boot: 40 * time.Hour, BootID: "before"},
						Lineage: "l", Generation: 5,
					}}
			}
			restart := func(fault error, f func(a *agent.Agent)) {
				t.Helper()
				d.start(t, d.inBoot(back, clock, fault, carried), func(a *agent.Agent, _ *observer.ObservedLogs) {
					f(a)
				})
				carried = d.shelf.lastSaved()
				time.Sleep(time.Minute)
			}
			var noted time.Duration
			read := func(a *agent.Agent) {
				d.become(nil)
				time.Sleep(2 * time.Minute)
				synctest.Wait()
				if c := a.Recorded(); !withholds(t, a) || len(c) != 1 ||
					c[0].Moment.Round(time.Second) != 1000*time.Hour+noted {
					t.Errorf("%s: the record was read; noted %v after the boot, on record: %+v", row.name, noted, c)
				}
			}
			last := func(i int, a *agent.Agent) {
				if time.Sleep(time.Minute); !withholds(t, a) {
					t.Errorf("%s: while the record cannot be read it is served", row.name)
				}
				if i == row.restarts && !row.atStart {
					read(a)
				}
			}
			restart(eio, func(a *agent.Agent) {
				time.Sleep(20 * time.Minute)
				mustHave(t, a)
				time.Sleep(40 * time.Minute)
				noted = clock.Boot()
				if _, err := a.RecordChange("test", api.PolicyChangeRequest{Resource: storage,
					Effect: tokencache.Revoked}); codeOf(err) != api.CodeNotKept {
					t.Fatal(err)
				}
				last(0, a)
			})
			for i := range row.restarts {
				restart(eio, func(a *agent.Agent) { last(i+1, a) })
			}
			if row.atStart {
				restart(nil, read)
			}
		})
	}
}

// A revocation of an earlier boot, whose record could not be read at first, or was in a folder that was mounted late,
// withholds no token of this boot, be the record read by the same process or at a restart.
func TestRestartAfterTheFolderWasMended(t *testing.T) {
	t.Parallel()
	eacces := errors.New("permission denied")
	for _, row := range []struct {
		name  string
		fault error // at first; nil: the folder below the mount is empty
	}{{"mended", eacces}, {"mounted late", nil}} {
		synctest.Test(t, func(t *testing.T) {
			before := time.Now().Add(-30 * time.Hour)
			there := &tokencache.Record{
				Instant: tokencache.Instant{On: 1000 * time.Hour, Boot: 50 * time.Hour, BootID: "before"}, Lineage: "l",
				Generation: 5,
				Changes: []tokencache.PolicyChange{{
					ID: "r", AllIdentities: true, Effect: tokencache.Revoked, At: before, RecordedAt: before,
					Vouched: true, Checked: true,
					Moment: 990 * time.Hour, By: 990 * time.Hour, Issuer: tokencache.Window{Earliest: before,
						Latest: before},
				}},
			}
			d := new(disk)
			d.become(row.fault)
			back, clock := &sticky{counts: true}, sinceBoot()
			d.start(t, d.inBoot(back, clock, row.fault, nil), func(a *agent.Agent, _ *observer.ObservedLogs) {
				time.Sleep(20 * time.Minute)
				mustHave(t, a)
				time.Sleep(40 * time.Minute)
			})
			d.become(nil)
			d.there = there
			d.start(t, d.inBoot(back, clock, nil, d.shelf.lastSaved()), func(a *agent.Agent, _ *observer.ObservedLogs) {
				synctest.Wait()
				changes := a.Recorded()
				if withholds(t, a) || len(changes) != 1 || changes[0].Moment != 990*time.Hour ||
					!changes[0].Issuer.Latest.Equal(before) {
					t.Errorf("%s: on record: %+v", row.name, changes)
				}
				if on := d.shelf.lastSaved().On; on < 1001*time.Hour {
					t.Errorf("%s: on-time is %v", row.name, on)
				}
			})
		})
	}
}

// Who withdraws a change while the record cannot be read withdraws what it was to them: where it turns out to have
// taken in another by then, that is in force.
func TestWithdrawnBeforeItIsKnownToStandForMore(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d, known := life(t)
		eio := errors.New("input/output error")
		d.become(eio)
		later := *d.there
		later.Generation++
		later.Changes = slices.Clone(later.Changes)
		later.Changes[0].Joined, later.Changes[0].Resource = 1, ""
		d.there = &later
		d.start(t, func(o *agent.Options) { o.UnreadRecord, o.Snapshot = eio, known },
			func(a *agent.Agent, _ *observer.ObservedLogs) {
				if _, err := a.WithdrawChange("test", later.Changes[0].ID); codeOf(err) != api.CodeNotKept {
					t.Error(err)
				}
				d.become(nil)
				time.Sleep(time.Minute)
				synctest.Wait()
				if c := a.Changes(); !withholds(t, a) || len(c) != 1 || c[0].Joined != 1 {
					t.Errorf("on record: %+v", c)
				}
			})
	})
}

// What stands for a record spreads as a change does which somebody noted at the start: who asks has a token at once
// unless such are to be withheld, and what is to be prefetched waits until it has spread, or the record is read.
func TestPlaceholderSpreads(t *testing.T) {
	t.Parallel()
	eio, torn := errors.New("input/output error"), spoilt{errors.New("policy-changes.json: it is not JSON")}
	for _, row := range []struct {
		name                 string
		lost, unread, mended bool
		withhold             bool
		after                time.Duration // what is to be prefetched comes then
	}{
		{name: "neither"},
		{name: "lost", lost: true, after: tokencache.DefaultPropagationDelay},
		{name: "lost, to be withheld", lost: true, withhold: true, after: tokencache.DefaultPropagationDelay},
		{name: "not read", unread: true, after: tokencache.DefaultPropagationDelay},
		{name: "not read for four minutes", unread: true, mended: true, after: 4 * time.Minute},
	} {
		synctest.Test(t, func(t *testing.T) {
			d := new(disk)
			d.there = new(tokencache.Record)
			d.become(eio)
			d.start(t, func(o *agent.Options) {
				o.Rules.Grants[0].Prefetch, o.Rules.WithholdLost = true, row.withhold // vault and storage
				if row.lost {
					o.LostRecord = torn
				}
				if row.unread {
					o.UnreadRecord = eio
				}
			}, func(a *agent.Agent, _ *observer.ObservedLogs) {
				before := 0 // some may be there already
				if row.after > 0 {
					time.Sleep(row.after - 10*time.Second)
					if n := d.Count(); n != 0 {
						t.Errorf("%s: %d fetched before", row.name, n)
					}
					if _, err := a.Token(t.Context(), root,
						requestFor(storage)); row.withhold != (codeOf(err) == api.CodeRevoked) ||
						!row.withhold && err != nil {
						t.Errorf("%s: who asks has %v", row.name, err)
					}
					before = d.Count()
				}
				if row.mended {
					d.become(nil)
				}
				time.Sleep(2 * time.Minute)
				if n := d.Count() - before; n < 2 {
					t.Errorf("%s: %d fetched then", row.name, n)
				}
			})
		})
	}
}
