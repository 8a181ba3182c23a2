package tokencache_test

import (
	"testing"
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
