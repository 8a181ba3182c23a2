package tokencache_test

import (
	"context"
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"perceptd/tokencache"
	"perceptd/tokencache/tokencachetest"
)

func TestOnAtBoot(t *testing.T) {
	t.Parallel()
	const h = time.Hour
	before := tokencache.Instant{On: 100 * h, Boot: 40 * h, BootID: "before"}
	longBefore := tokencache.Instant{On: 60 * h, Boot: 60 * h, BootID: "long before"}
	here := tokencache.Instant{On: 103 * h, Boot: 3 * h, BootID: "this"}
	for _, row := range []struct {
		name string
		id   string
		kept []tokencache.Instant
		want time.Duration // with 5 h since the boot
	}{
		{"nothing was ever kept", "this", nil, 0},
		{"kept by a release without on-time", "this",
			[]tokencache.Instant{{Boot: 40 * h, BootID: "before"}, {Boot: 3 * h, BootID: "this"}}, 0},
		{"a later boot", "this", []tokencache.Instant{before}, 100 * h},
		{"a later boot, several kept", "this", []tokencache.Instant{longBefore, before, {}}, 100 * h},
		{"an older file was put back", "this", []tokencache.Instant{longBefore}, 60 * h},
		{"the same boot", "this", []tokencache.Instant{here}, 100 * h},
		{"the same boot, beside an older file", "this", []tokencache.Instant{longBefore, here, before}, 100 * h},
		{"the same boot, beside a file that could not be read at first", "this",
			[]tokencache.Instant{here, {On: 900 * h, Boot: h, BootID: "other"}}, 900 * h},
		{"the same boot, kept at different times", "this",
			[]tokencache.Instant{here, {On: 101 * h, Boot: h, BootID: "this"}}, 100 * h},
		{"the same boot, kept before more was known of those before, and after", "this",
			[]tokencache.Instant{{On: h, Boot: h, BootID: "this"}, here}, 100 * h},
		{"the same name, but later than now: another boot", "this",
			[]tokencache.Instant{{On: 106 * h, Boot: 6 * h, BootID: "this"}}, 106 * h},
		{"the boot it was kept in is not known", "this", []tokencache.Instant{{On: 100 * h, Boot: 3 * h}}, 95 * h},
		{"this boot is not known", "", []tokencache.Instant{here, before}, 98 * h},
		{"this boot is not known, and lasts longer than all that was kept", "",
			[]tokencache.Instant{{On: 3 * h, Boot: 3 * h}}, 0},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			if got := tokencache.OnAtBoot(row.id, 5*h, row.kept...); got != row.want {
				t.Errorf("%v, want %v", got, row.want)
			}
		})
	}
}

// A record that is read late was kept before all that happened in this boot: it withholds nothing that was fetched
// since, and a change that was noted meanwhile goes on withholding what was fetched before it.
func TestRecordThatIsReadLate(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := tokencache.New(tokencache.Options{BootID: "this", Clock: (&tokencachetest.Clock{}).AfterUptime(),
			Fetch: func(_ context.Context, key tokencache.Key) (tokencache.Fetched, error) {
				return tokenOf("a", key, time.Now().Add(-15*time.Minute)), nil
			}})
		defer c.Close()
		mustGet(t, c, vault, sdk)
		mustGet(t, c, storage, sdk)
		time.Sleep(time.Minute)
		if _, err := c.RecordChange(tokencache.PolicyChange{ID: "meanwhile", AllIdentities: true,
			Resource: storage.Resource, Effect: tokencache.Revoked}); err != nil {
			t.Fatal(err)
		}
		before := tokencache.Record{Instant: tokencache.Instant{On: 2000 * time.Hour, Boot: time.Hour,
			BootID: "before"}, Changes: []tokencache.PolicyChange{
			{ID: "before", AllIdentities: true, Effect: tokencache.Revoked, Moment: 1999 * time.Hour,
				By: 1999 * time.Hour},
		}}
		c.ContinueFrom(before.Instant)
		before.Changes = append(before.Changes, c.Record().Changes...)
		c.ReplaceRecord(before)
		if got := policyState(t, c); got != tokencache.Current {
			t.Errorf("a token that was fetched after all that is on the record is %v", got)
		}
		if _, err := c.Get(t.Context(), storage, sdk); !errors.As(err, new(*tokencache.WithheldError)) {
			t.Errorf("a token from before a revocation that was noted meanwhile: %v", err)
		}
		c.ContinueFrom(tokencache.Instant{On: time.Hour, BootID: "before"})
		if on := c.Record().On; on < 2000*time.Hour {
			t.Errorf("on-time went back to %v", on)
		}
	})
}

// A change that an older copy of the record lacks was noted after that was taken; one that both have is from no earlier
// than either says. What has no on-time has none to order.
func TestRecordAfter(t *testing.T) {
	t.Parallel()
	const h = time.Hour
	change := func(id string, moment, by time.Duration) tokencache.PolicyChange {
		return tokencache.PolicyChange{ID: id, Moment: moment, By: by}
	}
	record := tokencache.Record{Changes: []tokencache.PolicyChange{
		change("later", 30*h, 31*h), change("fork", 2*h, 3*h), change("both", 5*h, 6*h), change("unknown", 0, 0),
	}}
	kept := tokencache.Record{Instant: tokencache.Instant{On: 20 * h},
		Changes: []tokencache.PolicyChange{change("both", 7*h, 7*h)}}
	want := []tokencache.PolicyChange{
		change("later", 30*h, 31*h), change("fork", 20*h, 20*h), change("both", 7*h, 7*h), change("unknown", 0, 0),
	}
	if got := record.After(kept, tokencache.Instant{}).Changes; !slices.Equal(got, want) {
		t.Errorf("%+v, want %+v", got, want)
	}
	if record.Changes[1].Moment != 2*h {
		t.Error("the record itself was changed")
	}
	now := tokencache.Instant{On: 100 * h, Boot: 10 * h, BootID: "this"}
	for _, row := range []struct {
		name         string
		record, kept tokencache.Instant
		p            tokencache.PolicyChange
		want         time.Duration
	}{
		{"noted in a boot that did not know of the copy", tokencache.Instant{On: 5 * h, BootID: "between"},
			tokencache.Instant{On: 80 * h, BootID: "before"}, change("p", 4*h, 4*h), 80 * h},
		{"noted in this boot, which knows of the copy, for a time before it", now,
			tokencache.Instant{On: 80 * h, BootID: "before"}, change("p", 60*h, 90*h), 60 * h},
		{"both of one boot: a crash between the record and its copy", now,
			tokencache.Instant{On: 99 * h, Boot: 9 * h, BootID: "this"}, change("p", 95*h, 95*h), 95 * h},
		{"both of one boot before", tokencache.Instant{On: 50 * h, Boot: 9 * h, BootID: "before"},
			tokencache.Instant{On: 49 * h, Boot: 8 * h, BootID: "before"}, change("p", 45*h, 45*h), 45 * h},
		{"the copy is of this boot, which did not know of the record", tokencache.Instant{On: 90 * h, BootID: "before"},
			tokencache.Instant{On: 9 * h, Boot: 9 * h, BootID: "this"}, change("p", 85*h, 85*h), 85 * h},
		{"the copy is of this boot, which knew of more than the record",
			tokencache.Instant{On: 5 * h, BootID: "between"}, tokencache.Instant{On: 99 * h, Boot: 9 * h,
				BootID: "this"}, change("p", 4*h, 4*h), 90 * h},
	} {
		r := tokencache.Record{Instant: row.record, Changes: []tokencache.PolicyChange{row.p}}
		if got := r.After(tokencache.Record{Instant: row.kept}, now).Changes[0].Moment; got != row.want {
			t.Errorf("%s: %v, want %v", row.name, got, row.want)
		}
	}
	kept.On, want = 0, slices.Clone(record.Changes)
	want[2] = change("both", 7*h, 7*h)
	if got := record.After(kept, tokencache.Instant{}).Changes; !slices.Equal(got, want) {
		t.Errorf("a copy by a release without on-time: %+v, want %+v", got, want)
	}
}

// What was kept of this boot, before more was known of the boots before, is moved as a whole when a later start knows
// it: the token that a revocation of this boot withholds stays withheld, and what was revoked in an earlier boot
// withholds none of this one.
func TestWhatThisBootKeptIsMovedAsAWhole(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		clock := (&tokencachetest.Clock{}).AfterUptime()
		fetch := func(_ context.Context, key tokencache.Key) (tokencache.Fetched, error) {
			return tokenOf("a", key, time.Now().Add(-15*time.Minute)), nil
		}
		c := tokencache.New(tokencache.Options{BootID: "this", Clock: clock, Fetch: fetch})
		mustGet(t, c, vault, sdk)
		mustGet(t, c, storage, sdk)
		time.Sleep(time.Minute)
		if _, err := c.RecordChange(tokencache.PolicyChange{ID: "here", AllIdentities: true, Resource: storage.Resource,
			Effect: tokencache.Revoked}); err != nil {
			t.Fatal(err)
		}
		m := c.Snapshot()
		c.Close()
		time.Sleep(time.Minute)

		before := tokencache.Record{Instant: tokencache.Instant{On: 2000 * time.Hour, Boot: time.Hour,
			BootID: "before"}, Changes: []tokencache.PolicyChange{
			{ID: "before", AllIdentities: true, Effect: tokencache.Revoked, Moment: 1999 * time.Hour,
				By: 1999 * time.Hour},
		}}
		on := tokencache.OnAtBoot("this", clock.Boot(), before.Instant, m.Taken())
		now := tokencache.Instant{On: on + clock.Boot(), Boot: clock.Boot(), BootID: "this"}
		record := m.Record.In(now)
		record.Changes = append(record.Changes, before.In(now).Changes...)
		c = tokencache.New(tokencache.Options{BootID: "this", On: on, Clock: clock, Fetch: fetch, Snapshot: &m,
			Record: record})
		defer c.Close()
		if got := policyState(t, c); got != tokencache.Current {
			t.Errorf("a token that was fetched after all that was noted in earlier boots is %v", got)
		}
		if _, err := c.Get(t.Context(), storage, sdk); !errors.As(err, new(*tokencache.WithheldError)) {
			t.Errorf("a token from before a revocation of this boot: %v", err)
		}
		after := c.Snapshot()
		for i, k := range after.Keys {
			if moved := k.ReceivedOnTime - m.Keys[i].ReceivedOnTime; moved != 2000*time.Hour-1 ||
				k.IssuedFrom-m.Keys[i].IssuedFrom != moved {
				t.Errorf("%v was received %v later", k.Key, moved)
			}
		}
		again := after.Record.In(now)
		for i, p := range again.Changes {
			if p.Moment != after.Record.Changes[i].Moment {
				t.Errorf("%s was moved twice", p.ID)
			}
		}
	})
}

// What was kept in the last moment of an earlier boot is of no later on-time than the beginning of this one, and is not
// moved with what happened in this one.
func TestGoOnLeavesEarlierBoots(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const end = 100 * time.Hour
		before := tokencache.Instant{On: end, Boot: end, BootID: "before"}
		m := tokencache.Snapshot{BootID: "before", Boot: end, On: end, Wall: time.Now(),
			Tombstones: []tokencache.Tombstone{{SHA256: "x", ReceivedOnTime: end, IssuedTo: end}}}
		c := tokencache.New(tokencache.Options{BootID: "this", On: end, Clock: (&tokencachetest.Clock{}).AfterUptime(),
			Snapshot: &m, Record: tokencache.Record{
				Instant: before, Changes: []tokencache.PolicyChange{{ID: "before", AllIdentities: true,
					Effect: tokencache.Revoked, Moment: end, By: end}},
			}})
		defer c.Close()
		dated, err := c.RecordChange(tokencache.PolicyChange{ID: "dated", AllIdentities: true,
			Effect: tokencache.Revoked, At: time.Now().Add(-101 * time.Hour)})
		if err != nil {
			t.Fatal(err)
		}
		c.ContinueFrom(tokencache.Instant{On: 500 * time.Hour, BootID: "between"})
		for _, p := range c.Record().Changes {
			want := end
			if p.ID == "dated" {
				want = dated.Moment + 400*time.Hour
			}
			if p.Moment != want {
				t.Errorf("%s is of %v, want %v", p.ID, p.Moment, want)
			}
		}
		if got := c.Snapshot().Tombstones[0].ReceivedOnTime; got != end {
			t.Errorf("a token of the boot before was received at %v", got)
		}
	})
}
