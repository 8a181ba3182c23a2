package agent_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
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
	"perceptd/tokencache"
	"perceptd/tokencache/tokencachetest"
)

// device is what outlives an agent: the record on the disk, and the cache's memory elsewhere.
type device struct {
	tokencachetest.Source
	shelf shelf

	disk sync.Mutex // protects what follows
	kept []tokencache.Record
	full error // why nothing can be kept on the disk
}

func (d *device) keep(r tokencache.Record) error {
	d.disk.Lock()
	defer d.disk.Unlock()
	if d.full == nil {
		d.kept = append(d.kept, r)
	}
	return d.full
}

func (d *device) fill(err error) {
	d.disk.Lock()
	defer d.disk.Unlock()
	d.full = err
}

// record is what is on the disk; nil: nothing.
func (d *device) record() *tokencache.Record {
	d.disk.Lock()
	defer d.disk.Unlock()
	if len(d.kept) == 0 {
		return nil
	}
	return &d.kept[len(d.kept)-1]
}

// run runs an agent that begins with what it is given, until f returns, and returns its warnings of the record.
func (d *device) run(t *testing.T, disk *tokencache.Record, lost error, copied *tokencache.Snapshot,
	f func(a *agent.Agent)) (warnings []observer.LoggedEntry) {
	t.Helper()
	core, logs := observer.New(zapcore.WarnLevel)
	a, err := agent.New(agent.Options{
		Fetch: d.Fetch, Rules: edge(), Log: zap.New(core), BootID: "this", Record: disk, LostRecord: lost,
		Snapshot:   copied,
		SaveRecord: d.keep, Persistence: d.shelf.keeping(),
	})
	if err != nil {
		t.Fatal(err)
	}
	f(a)
	a.Close()
	return logs.Filter(func(e observer.LoggedEntry) bool {
		return strings.Contains(e.Message, "beside the tokens")
	}).All()
}

// withholds reports whether a token from before a revocation is kept back.
func withholds(t *testing.T, a *agent.Agent) bool {
	t.Helper()
	_, err := a.Token(t.Context(), root, requestFor(storage))
	if err != nil && codeOf(err) != api.CodeRevoked {
		t.Error(err)
	}
	return err != nil
}

// A crash may come before or after either of two writes: of the record, which is what an acknowledgement waits for, and
// of its copy. An acknowledged revocation is in force after it, whichever of the two was lost or is older; what was
// withdrawn with an acknowledgement stays withdrawn. The start after that has one record, and nothing to say of it.
func TestCrashBetweenTheRecordAndItsCopy(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const gone = -1
		// What there is after each step: a change that withholds nothing, a revocation as well, the first alone again.
		d := new(device)
		disk, copies := make([]*tokencache.Record, 3), make([]*tokencache.Snapshot, 3)
		d.run(t, nil, nil, nil, func(a *agent.Agent) {
			see := func(step int) {
				time.Sleep(3 * time.Second) // saves are as far apart
				synctest.Wait()
				disk[step], copies[step] = d.record(), d.shelf.lastSaved()
			}
			mustHave(t, a)
			note(t, a, api.PolicyChangeRequest{AllResources: true, Effect: tokencache.Granted})
			see(0)
			noted := note(t, a, api.PolicyChangeRequest{AllResources: true, Effect: tokencache.Revoked})
			see(1)
			if _, err := a.WithdrawChange("test", noted.ID); err != nil {
				t.Fatal(err)
			}
			see(2)
		})
		fail(&d.Source, &tokencache.FetchError{Kind: tokencache.Unreachable, Detail: "down"})
		torn := errors.New("torn")
		for _, row := range []struct {
			name         string
			disk, copied int
			lost         error
			withheld     bool
			says         string
		}{
			{"noted: neither was written, nor was it acknowledged", 0, 0, nil, false, ""},
			{"noted: the record alone, acknowledged", 1, 0, nil, true, ""},
			{"noted: the copy alone", 0, 1, nil, true, "was older"},
			{"noted: both", 1, 1, nil, true, ""},
			{"noted, acknowledged, an older record is put back", 0, 1, nil, true, "was older"},
			{"noted, acknowledged, the record is gone", gone, 1, nil, true, "was gone"},
			{"noted, acknowledged, the record is torn", gone, 1, torn, true, "could not be read"},
			{"withdrawn: neither was written, nor was it acknowledged", 1, 1, nil, true, ""},
			{"withdrawn: the record alone, acknowledged", 2, 1, nil, false, ""},
			{"withdrawn: the copy alone", 1, 2, nil, false, "was older"},
			{"withdrawn: both", 2, 2, nil, false, ""},
			{"withdrawn, an older record is put back", 1, 2, nil, false, "was older"},
			{"withdrawn, the record is gone", gone, 2, nil, false, "was gone"},
		} {
			next := new(device)
			fail(&next.Source, &tokencache.FetchError{Kind: tokencache.Unreachable, Detail: "down"})
			var found *tokencache.Record
			if row.disk != gone {
				found = disk[row.disk]
			}
			warnings := next.run(t, found, row.lost, copies[row.copied], func(a *agent.Agent) {
				if withholds(t, a) != row.withheld {
					t.Errorf("%s: withheld is not %v", row.name, row.withheld)
				}
			})
			if row.says == "" {
				if len(warnings) != 0 {
					t.Errorf("%s: %v", row.name, warnings)
				}
				continue
			}
			if len(warnings) != 1 || !strings.Contains(warnings[0].Message, row.says) || next.record() == nil {
				t.Errorf("%s: %v, on the disk %v", row.name, warnings, next.record())
				continue
			}
			// the copy may not be newer yet
			for _, copied := range []*tokencache.Snapshot{copies[row.copied], next.shelf.lastSaved()} {
				again := next.run(t, next.record(), nil, copied, func(a *agent.Agent) {
					if withholds(t, a) != row.withheld {
						t.Errorf("%s, and started again: withheld is not %v", row.name, row.withheld)
					}
				})
				if len(again) != 0 {
					t.Errorf("%s, and started again: %v", row.name, again)
				}
			}
		}
	})
}

// The record is kept whenever the device has been on for twice as long, every hour and at the end, which tells how long
// it was on, and mends what became of the files.
func TestRecordIsKeptEveryHour(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d := new(device)
		count := func() int {
			d.disk.Lock()
			defer d.disk.Unlock()
			return len(d.kept)
		}
		d.run(t, nil, nil, nil, func(a *agent.Agent) {
			time.Sleep(time.Hour + time.Minute)
			if n := count(); n != 1+5 {
				t.Errorf("kept %d times at the start and after 2, 4, 8, 16 and 32 minutes, with nothing on record", n)
			}
			time.Sleep(4 * time.Hour)
			if n := count(); n != 1+5+4 {
				t.Errorf("kept %d times, four of them in four hours", n)
			}
			note(t, a, api.PolicyChangeRequest{AllResources: true, Effect: tokencache.Granted})
			before := count()
			time.Sleep(5 * time.Hour)
			if n := count() - before; n != 5 {
				t.Errorf("kept %d times in five hours", n)
			}
			time.Sleep(20 * time.Minute)
		})
		last := d.kept[len(d.kept)-1]
		if first := d.kept[0]; last.On-first.On != 10*time.Hour+21*time.Minute {
			t.Errorf("the device was on for %v", last.On-first.On)
		}
	})
}

// A revocation that is in force but not on the full disk is in the copy, and on the disk again when there is room.
func TestRevocationOnAFullDisk(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d := new(device)
		var before *tokencache.Record
		var copied *tokencache.Snapshot
		var id string
		d.run(t, nil, nil, nil, func(a *agent.Agent) {
			mustHave(t, a)
			note(t, a, api.PolicyChangeRequest{AllResources: true, Effect: tokencache.Granted})
			before = d.record()
			d.fill(errors.New("no space left on device"))
			noted, err := a.RecordChange("test", api.PolicyChangeRequest{AllResources: true,
				Effect: tokencache.Revoked})
			if codeOf(err) != api.CodeNotKept {
				t.Error(err)
			}
			id = noted.ID
			time.Sleep(3 * time.Second) // saves are as far apart
			synctest.Wait()
			copied = d.shelf.lastSaved() // and it is killed
		})
		fail(&d.Source, &tokencache.FetchError{Kind: tokencache.Unreachable, Detail: "down"})
		warnings := d.run(t, before, nil, copied, func(a *agent.Agent) {
			if !withholds(t, a) {
				t.Error("the token is handed out")
			}
			if trouble := strings.Join(a.Status().Trouble, "\n"); !strings.Contains(trouble, "no space left") {
				t.Errorf("trouble %q", trouble)
			}
			d.fill(nil)
		})
		if len(warnings) != 1 {
			t.Fatalf("%v", warnings)
		}
		if told := fmt.Sprint(warnings[0].ContextMap()); !strings.Contains(told, "changes:2") ||
			!strings.Contains(told, "revocations:["+id+"]") {
			t.Errorf("it tells %s", told)
		}
		if r := d.record(); len(r.Changes) != 2 || r.Generation != copied.Record.Generation {
			t.Errorf("on the disk: %+v, beside the tokens: %+v", r, copied.Record)
		}
	})
}

// Where neither is newer, as in files of a release before generations, what either has is in force.
func TestRecordsWithoutAnOrder(t *testing.T) {
	t.Parallel()
	revocation := func(ids ...string) (all []tokencache.PolicyChange) {
		for _, id := range ids {
			all = append(all, tokencache.PolicyChange{ID: id, AllIdentities: true, Effect: tokencache.Revoked})
		}
		return all
	}
	var many, others []tokencache.PolicyChange
	for i := range tokencache.MaxChanges {
		many = append(many, tokencache.PolicyChange{ID: fmt.Sprint("granted-", i), AllIdentities: true,
			Effect: tokencache.Granted})
		if i < 20 {
			others = append(others, revocation(fmt.Sprint("revoked-", i))...)
		}
	}
	for _, row := range []struct {
		name         string
		generation   uint64
		other        uint64 // the copy's generation, which is of another lineage; 0: both are the same
		disk, copied []tokencache.PolicyChange
		want         []string
		told         string // revocations that the warning names; empty: there is none
	}{
		{"the same", 5, 0, revocation("a", "b"), revocation("b", "a"), []string{"a", "b"}, ""},
		{"the copy has less", 0, 0, revocation("a", "b"), revocation("a"), []string{"a", "b"}, ""},
		{"the copy has more", 0, 0, revocation("a"), revocation("a", "b"), []string{"a", "b"}, "[a b]"},
		{"each has its own", 5, 0, revocation("a", "b"), revocation("b", "c"), []string{"a", "b", "c"}, "[a b c]"},
		{"the copy has more, of another lineage and an earlier generation", 5, 1, revocation("a"), revocation("b"),
			[]string{"a", "b"}, "[a b]"},
		{"the copy has less, of another lineage and a later generation", 5, 9, revocation("a", "b"), revocation("b"),
			[]string{"a", "b"}, ""},
		{"each has its own, of another lineage and a later generation", 5, 9, revocation("a"), revocation("b"),
			[]string{"a", "b"}, "[a b]"},
		{"more than there is room for", 5, 0, many, others, nil, "and 12 more"},
	} {
		synctest.Test(t, func(t *testing.T) {
			d := new(device)
			for i := range row.disk {
				row.disk[i].At, row.disk[i].RecordedAt = time.Now(), time.Now()
			}
			for i := range row.copied {
				row.copied[i].At, row.copied[i].RecordedAt = time.Now(), time.Now()
			}
			copied := &tokencache.Snapshot{BootID: "this", Record: tokencache.Record{Lineage: "here",
				Generation: row.generation, Changes: row.copied}}
			if row.other != 0 {
				copied.Record.Lineage, copied.Record.Generation = "elsewhere", row.other
			}
			warnings := d.run(t, &tokencache.Record{Lineage: "here", Generation: row.generation, Changes: row.disk},
				nil, copied, func(a *agent.Agent) {
					var ids []string
					revoked := 0
					for _, c := range a.Changes() {
						ids = append(ids, c.ID)
						if c.Effect == tokencache.Revoked {
							revoked++
						}
					}
					slices.Sort(ids)
					if row.want != nil && !slices.Equal(ids, row.want) {
						t.Errorf("%s: %q are in force", row.name, ids)
					}
					if row.want == nil && (len(ids) != tokencache.MaxChanges || revoked != len(others)) {
						t.Errorf("%s: %d are in force, %d revocations", row.name, len(ids), revoked)
					}
				})
			if row.told == "" {
				generation := row.generation
				if row.other != 0 {
					generation = max(row.generation, row.other) + 1 // it has what the other has as well
				}
				if r := d.record(); len(warnings) != 0 || r == nil || r.Generation != generation ||
					len(r.Changes) != len(row.disk) {
					t.Errorf("%s: %v, written %v", row.name, warnings, d.record())
				}
				return
			}
			if len(warnings) != 1 || !strings.Contains(fmt.Sprint(warnings[0].ContextMap()), row.told) {
				t.Errorf("%s: %v", row.name, warnings)
			}
			if r := d.record(); r == nil || r.Generation != max(row.generation, row.other)+1 || r.Lineage == "here" ||
				r.Lineage == "elsewhere" {
				t.Errorf("%s: on the disk %v", row.name, r)
			}
		})
	}
}

// A start takes a newer copy for the record and begins another lineage with it, which a full disk keeps out of the
// file. The next start knows what that was begun from: no revocation comes back that is over, as one from now on.
func TestCopyOfALineageBegunFromTheRecord(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name string
		from tokencache.Origin
		over bool // "a" is
	}{
		{"from what is on the disk", tokencache.Origin{Lineage: "here", Generation: 5}, true},
		{"from what is newer than that", tokencache.Origin{Lineage: "here", Generation: 6}, true},
		{"from what is older than that", tokencache.Origin{Lineage: "here", Generation: 4}, false},
		{"from another", tokencache.Origin{Lineage: "there", Generation: 6}, false},
	} {
		synctest.Test(t, func(t *testing.T) {
			change := func(id string) tokencache.PolicyChange {
				return tokencache.PolicyChange{ID: id, AllIdentities: true, Effect: tokencache.Revoked, At: time.Now(),
					RecordedAt: time.Now(), Moment: time.Hour, By: time.Hour, Vouched: true}
			}
			disk := &tokencache.Record{Lineage: "here", Generation: 5,
				Changes: []tokencache.PolicyChange{change("a"), change("b")}}
			taken := tokencache.Instant{On: 40 * time.Hour, Boot: time.Hour, BootID: "this"}
			copied := &tokencache.Snapshot{On: taken.On, Boot: taken.Boot, BootID: taken.BootID,
				Record: tokencache.Record{
					Instant: taken, Lineage: "elsewhere", Origins: []tokencache.Origin{row.from}, Generation: 7,
					Changes: []tokencache.PolicyChange{change("b")}}}
			new(device).run(t, disk, nil, copied, func(a *agent.Agent) {
				var ids []string
				for _, c := range a.Changes() {
					ids = append(ids, c.ID)
				}
				slices.Sort(ids)
				if over := !slices.Contains(ids, "a"); over != row.over || !slices.Contains(ids, "b") {
					t.Errorf("%s: %q are in force", row.name, ids)
				}
			})
		})
	}
}

// Two records may have more revocations than there is room for on one. None is left out: some are joined, and the log
// says so.
func TestRecordsOfMoreThanThereIsRoomFor(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d := new(device)
		d.run(t, nil, nil, nil, func(a *agent.Agent) { mustHave(t, a) })
		known := d.shelf.lastSaved()
		fail(&d.Source, &tokencache.FetchError{Kind: tokencache.Unreachable, Detail: "down"})
		time.Sleep(time.Minute)
		var ours, theirs []tokencache.PolicyChange
		for i := range tokencache.MaxChanges {
			p := tokencache.PolicyChange{AllIdentities: true, Effect: tokencache.Revoked, At: time.Now(),
				RecordedAt: time.Now(), Moment: known.On + time.Second, By: known.On + time.Second}
			p.ID, p.Resource = fmt.Sprint("ours-", i), vault
			ours = append(ours, p)
			p.ID, p.Resource = fmt.Sprint("theirs-", i), storage
			theirs = append(theirs, p)
		}
		known.Record = tokencache.Record{Lineage: "theirs", Generation: 1, Changes: theirs}
		core, logs := observer.New(zapcore.WarnLevel)
		a, err := agent.New(agent.Options{
			Fetch: d.Fetch, Rules: edge(), Log: zap.New(core), BootID: "this", SaveRecord: d.keep,
			Persistence: d.shelf.keeping(),
			Record:      &tokencache.Record{Lineage: "ours", Generation: 1, Changes: ours},
			Snapshot:    known, On: known.On,
		})
		if err != nil {
			t.Fatal(err)
		}
		defer a.Close()
		if !withholds(t, a) {
			t.Error("a revocation is left out")
		}
		stands := 0
		for _, c := range a.Changes() {
			if stands += 1 + c.Joined; c.Resource == "" {
				t.Errorf("%s is about more than what it stands for", c.ID)
			}
		}
		if stands != 2*tokencache.MaxChanges || len(d.record().Changes) != tokencache.MaxChanges {
			t.Errorf("%d in force, %d on the disk", stands, len(d.record().Changes))
		}
		if logs.FilterMessageSnippet("1024 policy changes are more than there is room for, which is 512").Len() != 1 {
			t.Errorf("%v", logs.All())
		}
	})
}

// A record that began in a folder mounted over the state, while nobody had a copy, is younger than the one below it,
// whatever their generations: with the mount gone, the revocation that its copy has is in force beside what was there.
func TestRecordThatBeganAnew(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		below, above := new(device), new(device)
		below.run(t, nil, nil, nil, func(a *agent.Agent) {
			for range 5 {
				note(t, a, api.PolicyChangeRequest{AllResources: true, Effect: tokencache.Granted})
			}
		})
		var copied *tokencache.Snapshot
		above.run(t, nil, nil, nil, func(a *agent.Agent) {
			mustHave(t, a)
			note(t, a, api.PolicyChangeRequest{AllResources: true, Effect: tokencache.Revoked})
			time.Sleep(3 * time.Second) // saves are as far apart
			synctest.Wait()
			copied = above.shelf.lastSaved() // and it is killed
		})
		fail(&below.Source, &tokencache.FetchError{Kind: tokencache.Unreachable, Detail: "down"})
		for range 2 { // the second time the copy is of the other record still
			below.run(t, below.record(), nil, copied, func(a *agent.Agent) {
				if !withholds(t, a) || len(a.Changes()) != 6 {
					t.Errorf("in force: %+v", a.Changes())
				}
			})
		}
	})
}

// A record that was put together from its copy, in a folder mounted over the state, goes on by itself, and so does the
// one below it. Whichever comes back finds the other's revocations in the copy, whatever the generations.
func TestRecordsThatFork(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		below, above := new(device), new(device)
		revoke := func(d *device, times int, copied *tokencache.Snapshot) *tokencache.Snapshot {
			d.run(t, d.record(), nil, copied, func(a *agent.Agent) {
				_, _ = a.Token(t.Context(), root, requestFor(storage)) // it may be withheld
				for range times {
					note(t, a, api.PolicyChangeRequest{AllResources: true, Effect: tokencache.Revoked})
				}
				time.Sleep(3 * time.Second) // saves are as far apart
				synctest.Wait()
				copied = d.shelf.lastSaved()
			})
			return copied
		}
		copied := revoke(below, 1, nil)
		revoke(above, 1, copied)       // in a folder that is mounted over it; then there is a boot without the copy
		copied = revoke(below, 2, nil) // without the mount
		fail(&above.Source, &tokencache.FetchError{Kind: tokencache.Unreachable, Detail: "down"})
		above.run(t, above.record(), nil, copied, func(a *agent.Agent) {
			if n := len(a.Changes()); n != 4 {
				t.Errorf("%d revocations are in force, of 4", n)
			}
		})
	})
}

// Two records may go on apart, and one of them be so full that it joins a revocation into an older one, under the ID of
// that. Put together, the revocation is in force, also where the mark on the token names that ID.
func TestJoinedInARecordThatForked(t *testing.T) {
	t.Parallel()
	const quiet, between = "https://quiet.example", "https://between.example"
	others := map[string][]string{vault: {quiet}}
	for _, row := range []struct {
		name       string
		torn       bool
		alternates map[string][]string
		named      int // changes of its ID that are in force
	}{
		{"with a copy", false, others, 1},
		{"with marks alone", true, others, 2}, // that of the record, and what stands for the mark
		{"with marks of a resource's other name", true, map[string][]string{storage: {quiet}}, 1},
		{"with marks of what another name goes by", true, map[string][]string{storage: {between},
			quiet: {between + "/"}}, 1},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				d := new(device)
				rules := edge()
				rules.Alternates = row.alternates
				start := func(disk *tokencache.Record, m *tokencache.Snapshot, f func(a *agent.Agent)) {
					t.Helper()
					a, err := agent.New(agent.Options{Fetch: d.Fetch, Rules: rules, BootID: "this", Record: disk,
						Snapshot: m, SaveRecord: d.keep, Persistence: d.shelf.keeping()})
					if err != nil {
						t.Fatal(err)
					}
					defer a.Close()
					f(a)
				}
				var folder, known = new(tokencache.Record), new(tokencache.Snapshot)
				start(nil, nil, func(a *agent.Agent) {
					mustHave(t, a)
					time.Sleep(time.Minute)
					note(t, a, api.PolicyChangeRequest{Resource: quiet, Effect: tokencache.Revoked})
					*folder = *d.record() // another is mounted over the folder that this is in
					time.Sleep(time.Minute)
					note(t, a, api.PolicyChangeRequest{Resource: storage, Effect: tokencache.Revoked})
					for range tokencache.MaxChanges - 1 {
						time.Sleep(time.Second)
						note(t, a, api.PolicyChangeRequest{Resource: vault, Effect: tokencache.Revoked})
					}
					synctest.Wait()
					*known = *d.shelf.lastSaved()
				})
				known.Record.Lineage, known.Record.Origins = "of the folder that was mounted over it", nil
				id := folder.Changes[0].ID
				// the two oldest are joined, as on a record that is full of many resources
				for i := range known.Record.Changes {
					if p := &known.Record.Changes[i]; p.Resource == storage {
						p.ID, p.Resource, p.Joined = id, "", 1
					}
				}
				known.Record.Changes = slices.DeleteFunc(known.Record.Changes,
					func(p tokencache.PolicyChange) bool { return p.ID == id && p.Joined == 0 })
				known.OnRecord = len(known.Record.Changes)
				known.Keys[0].Withheld = []string{id}
				if row.torn {
					known = withoutCopy(known)
				}
				folder.Generation++ // it went on by itself when it was back
				fail(&d.Source, &tokencache.FetchError{Kind: tokencache.Unreachable, Detail: "down"})
				start(folder, known, func(a *agent.Agent) {
					if !withholds(t, a) {
						t.Errorf("a token that a revocation withheld is handed out; its marks: %v",
							known.Keys[0].Withheld)
					}
					named := 0
					for _, c := range a.Changes() {
						if strings.HasPrefix(c.ID, id) {
							named++
						}
					}
					if named != row.named {
						t.Errorf("%d changes of that ID: %+v", named, a.Changes())
					}
				})
			})
		})
	}
}

// A record that changes while it is being written is written once more soon, whoever changed it.
func TestRecordThatChangesWhileItIsWritten(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d, slow, written := new(device), false, make(chan struct{})
		keep := func(r tokencache.Record) error {
			if slow {
				<-written
			}
			return d.keep(r)
		}
		rules := edge()
		a, err := agent.New(agent.Options{Fetch: d.Fetch, Rules: rules, SaveRecord: keep,
			LostRecord: errors.New("torn")})
		if err != nil {
			t.Fatal(err)
		}
		defer a.Close()
		time.Sleep(3 * time.Minute)
		synctest.Wait()
		slow = true
		go func() {
			_, _ = a.RecordChange("test", api.PolicyChangeRequest{AllResources: true, Effect: tokencache.Granted})
		}()
		synctest.Wait()
		rules.WithholdLost = true // what stands for the lost record is another from now on
		if _, err := a.Apply(rules); err != nil {
			t.Fatal(err)
		}
		close(written)
		time.Sleep(45 * time.Second) // before it is kept anew in any case
		synctest.Wait()
		if r := d.record(); !slices.ContainsFunc(r.Changes,
			func(p tokencache.PolicyChange) bool { return p.Effect == tokencache.Revoked }) {
			t.Errorf("on the disk: %+v", r.Changes)
		}
	})
}

// Where the record is lost, a token that comes again was received when it was first, also by what starts before could
// not open: it is not current, whatever the back end says of its age.
func TestReceiptsOutliveALostRecord(t *testing.T) {
	t.Parallel()
	for _, unopened := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			// the same token, as if it were issued now
			fetch := func(context.Context, tokencache.Key) (tokencache.Fetched, error) {
				return tokencache.Fetched{Token: tokencache.Token{Text: tokencache.NewSecret(canary)},
					Left: 24 * time.Hour, Counted: true}, nil
			}
			var s shelf
			a, err := agent.New(agent.Options{Fetch: fetch, Rules: edge(), BootID: "before", Persistence: s.keeping()})
			if err != nil {
				t.Fatal(err)
			}
			mustHave(t, a)
			note(t, a, api.PolicyChangeRequest{AllResources: true, Effect: tokencache.Granted})
			time.Sleep(time.Hour)
			a.Close()
			known := *withoutCopy(s.lastSaved())
			began := time.Now()
			o := agent.Options{
				Fetch: fetch, Rules: edge(), BootID: "this", On: known.On, LostRecord: errors.New("torn"),
				Copies: []tokencache.Snapshot{known},
				Clock: tokencache.Clock{Boot: func() time.Duration { return time.Since(began) }, Wall: time.Now,
					Synchronised: func() bool { return true }},
			}
			if unopened {
				o.Unopened = []*tokencache.Snapshot{&known}
			} else {
				o.Snapshot = &known
			}
			if a, err = agent.New(o); err != nil {
				t.Fatal(err)
			}
			defer a.Close()
			time.Sleep(6 * time.Hour) // tokens have no date, and live for up to four hours more than they tell
			if answer := mustHave(t, a); answer.Permissions.State != tokencache.Uncertain {
				t.Errorf("by what could not be opened before: %v: a token from before is %v", unopened,
					answer.Permissions.State)
			}
			if known.Keys[0].Token.Text.IsZero() {
				t.Error("what was given to the agent is another")
			}
		})
	}
}
