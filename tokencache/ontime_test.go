package tokencache_test

import (
	"context"
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"perceptd/tokencache"
)

func TestOnAtBoot(t *testing.T) {
	t.Parallel()
	const h = time.Hour
	before := tokencache.Taken{On: 100 * h, Boot: 40 * h, BootID: "before"}
	longBefore := tokencache.Taken{On: 60 * h, Boot: 60 * h, BootID: "long before"}
	here := tokencache.Taken{On: 103 * h, Boot: 3 * h, BootID: "this"}
	for _, row := range []struct {
		name string
		id   string
		kept []tokencache.Taken
		want time.Duration // with 5 h since the boot
	}{
		{"nothing was ever kept", "this", nil, 0},
		{"kept by a release without on-time", "this", []tokencache.Taken{{Boot: 40 * h, BootID: "before"}, {Boot: 3 * h, BootID: "this"}}, 0},
		{"a later boot", "this", []tokencache.Taken{before}, 100 * h},
		{"a later boot, several kept", "this", []tokencache.Taken{longBefore, before, {}}, 100 * h},
		{"an older file was put back", "this", []tokencache.Taken{longBefore}, 60 * h},
		{"the same boot", "this", []tokencache.Taken{here}, 100 * h},
		{"the same boot, beside an older file", "this", []tokencache.Taken{longBefore, here, before}, 100 * h},
		{"the same boot, beside a file of another life", "this", []tokencache.Taken{here, {On: 900 * h, Boot: h, BootID: "other"}}, 100 * h},
		{"the same boot, kept at different times", "this", []tokencache.Taken{here, {On: 101 * h, Boot: h, BootID: "this"}}, 100 * h},
		{"the same name, but later than now: another boot", "this", []tokencache.Taken{{On: 106 * h, Boot: 6 * h, BootID: "this"}}, 106 * h},
		{"the boot it was kept in is not known", "this", []tokencache.Taken{{On: 100 * h, Boot: 3 * h}}, 95 * h},
		{"this boot is not known", "", []tokencache.Taken{here, before}, 98 * h},
		{"this boot is not known, and lasts longer than all that was kept", "", []tokencache.Taken{{On: 3 * h, Boot: 3 * h}}, 0},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			if got := tokencache.OnAtBoot(row.id, 5*h, row.kept...); got != row.want {
				t.Errorf("%v, want %v", got, row.want)
			}
		})
	}
}

// A record that is read late was kept before all that happened in this boot: it withholds nothing that was fetched since, and a
// change that was noted meanwhile goes on withholding what was fetched before it.
func TestRecordThatIsReadLate(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := tokencache.New(tokencache.Options{BootID: "this", Clock: (&watch{}).clock(), Fetch: func(_ context.Context, key tokencache.Key) (tokencache.Fetched, error) {
			return tokenOf("a", key, time.Now().Add(-15*time.Minute)), nil
		}})
		defer c.Close()
		mustGet(t, c, vault, sdk)
		mustGet(t, c, storage, sdk)
		time.Sleep(time.Minute)
		if _, err := c.Note(tokencache.PolicyChange{ID: "meanwhile", AllIdentities: true, Resource: storage.Resource, Effect: tokencache.Revoked}); err != nil {
			t.Fatal(err)
		}
		before := tokencache.Record{Taken: tokencache.Taken{On: 2000 * time.Hour, Boot: time.Hour, BootID: "before"}, Changes: []tokencache.PolicyChange{
			{ID: "before", AllIdentities: true, Effect: tokencache.Revoked, Moment: 1999 * time.Hour, By: 1999 * time.Hour},
		}}
		c.GoOn(before.Taken)
		before.Changes = append(before.Changes, c.Record().Changes...)
		c.Replace(before)
		if got := standing(t, c); got != tokencache.Current {
			t.Errorf("a token that was fetched after all that is on the record is %v", got)
		}
		if _, err := c.Get(t.Context(), storage, sdk); !errors.As(err, new(*tokencache.WithheldError)) {
			t.Errorf("a token from before a revocation that was noted meanwhile: %v", err)
		}
		c.GoOn(tokencache.Taken{On: time.Hour, BootID: "before"})
		if on := c.Record().On; on < 2000*time.Hour {
			t.Errorf("on-time went back to %v", on)
		}
	})
}

// A change that an older copy of the record lacks was noted after that was taken; one that both have is from no earlier than
// either says. What has no on-time has none to order.
func TestRecordAfter(t *testing.T) {
	t.Parallel()
	const h = time.Hour
	change := func(id string, moment, by time.Duration) tokencache.PolicyChange {
		return tokencache.PolicyChange{ID: id, Moment: moment, By: by}
	}
	record := tokencache.Record{Changes: []tokencache.PolicyChange{
		change("later", 30*h, 31*h), change("fork", 2*h, 3*h), change("both", 5*h, 6*h), change("unknown", 0, 0),
	}}
	kept := tokencache.Record{Taken: tokencache.Taken{On: 20 * h}, Changes: []tokencache.PolicyChange{change("both", 7*h, 7*h)}}
	want := []tokencache.PolicyChange{
		change("later", 30*h, 31*h), change("fork", 20*h, 20*h), change("both", 7*h, 7*h), change("unknown", 0, 0),
	}
	if got := record.After(kept).Changes; !slices.Equal(got, want) {
		t.Errorf("%+v, want %+v", got, want)
	}
	if record.Changes[1].Moment != 2*h {
		t.Error("the record itself was changed")
	}
	kept.On, want = 0, slices.Clone(record.Changes)
	want[2] = change("both", 7*h, 7*h)
	if got := record.After(kept).Changes; !slices.Equal(got, want) {
		t.Errorf("a copy by a release without on-time: %+v, want %+v", got, want)
	}
}
