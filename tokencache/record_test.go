package tokencache_test

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"perceptd/tokencache"
)

// Of two records that went on apart, changes of one ID are compared by what they stand for: what either took in on a
// full record is in force.
func TestBoth(t *testing.T) {
	t.Parallel()
	const h = time.Hour
	noon := time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)
	at := func(moment time.Duration) tokencache.PolicyChange {
		on := noon.Add(moment)
		return tokencache.PolicyChange{
			ID: "r", Selector: vault.Selector, Resource: vault.Resource, Effect: tokencache.Revoked, At: on,
			RecordedAt: on, Vouched: true,
			Moment: moment, By: moment, Issuer: tokencache.Window{Earliest: on, Latest: on}, NotLater: on.Add(h),
		}
	}
	plain := at(h)
	took := func(change func(*tokencache.PolicyChange)) tokencache.PolicyChange {
		p := at(3 * h)
		p.Joined = 1
		change(&p)
		return p
	}
	for _, row := range []struct {
		name      string
		x, y      tokencache.PolicyChange
		stands    bool // x for all of y
		joined    int
		selector  bool // the one of both
		resource  string
		moment    time.Duration
		uncertain bool // it has no date by the issuer
	}{
		{"the same", plain, plain, true, 0, true, vault.Resource, h, false},
		{"the same, in another spelling", plain,
			took(func(p *tokencache.PolicyChange) { *p = plain; p.Resource += "/" }), true, 0, true, vault.Resource, h,
			false},
		{"dated for people", plain, took(func(p *tokencache.PolicyChange) { *p = plain; p.At = noon.Add(9 * h) }), true,
			0, true, vault.Resource, h, false},
		{"one took in another of its kind", plain, took(func(*tokencache.PolicyChange) {}), false, 1, true,
			vault.Resource, 3 * h, false},
		{"it has what the other took in", took(func(*tokencache.PolicyChange) {}), plain, true, 1, true, vault.Resource,
			3 * h, false},
		{"one took in another resource's", plain, took(func(p *tokencache.PolicyChange) { p.Resource = "" }), false, 1,
			true, "", 3 * h, false},
		{"one took in another identity's", plain,
			took(func(p *tokencache.PolicyChange) {
				p.AllIdentities, p.Selector = true,
					tokencache.Selector{}
			}), false, 1, false, vault.Resource, 3 * h, false},
		{"each took in one", took(func(p *tokencache.PolicyChange) { *p = plain; p.Joined = 1; p.Resource = "" }),
			took(func(*tokencache.PolicyChange) {}), false, 1, true, "", 3 * h, false},
		{"one took in what has no date", plain,
			took(func(p *tokencache.PolicyChange) { p.Issuer.Latest = time.Time{} }), false, 1, true, vault.Resource,
			3 * h, true},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			if got := row.x.StandsFor(row.y); got != row.stands {
				t.Errorf("it stands for the other: %v", got)
			}
			other := row.y
			other.ID = "another"
			all := tokencache.Both([]tokencache.PolicyChange{row.x}, []tokencache.PolicyChange{row.y, other})
			if len(all) != 2 || all[1].ID != "another" {
				t.Fatalf("%+v", all)
			}
			p := all[0]
			if p.ID != "r" || p.Joined != row.joined || p.AllIdentities == row.selector ||
				tokencache.Canonical(p.Resource) != tokencache.Canonical(row.resource) ||
				p.Moment != row.moment || p.By != row.moment || p.Issuer.Latest.IsZero() != row.uncertain ||
				p.Effect != tokencache.Revoked {
				t.Errorf("%+v", p)
			}
			if !p.StandsFor(row.x) || !p.StandsFor(row.y) {
				t.Error("both together stand for less than each")
			}
			if row.x.StandsFor(other) {
				t.Error("it stands for a change of another ID")
			}
		})
	}
}

// Of two records the one is newer that was taken from what the other is, or was, though both began anew since. Where
// each has something that the other lacks, neither is.
func TestOrderOfRecords(t *testing.T) {
	t.Parallel()
	noted := func(r tokencache.Record, more uint64) tokencache.Record {
		r.Generation += more
		r.Changes = append(slices.Clone(r.Changes), tokencache.PolicyChange{ID: fmt.Sprint(r.Lineage, r.Generation)})
		return r
	}
	root := noted(tokencache.Record{Lineage: "root"}, 3)
	a, b := root.WithLineage("a", root), root.WithLineage("b", root)
	again := a.WithLineage("again", a) // nothing was noted on a
	more := noted(root, 2)             // the root has gone on
	both := root.WithLineage("both", noted(a, 1), noted(b, 1))
	old := noted(tokencache.Record{}, 3)
	for _, row := range []struct {
		name  string
		x, y  tokencache.Record
		newer int // 1: x is, -1: y is
		has   bool
	}{
		{"the same", root, root, 0, true},
		{"it was taken from the other", a, root, 1, true},
		{"it was taken from the other, in between", again, root, 1, true},
		{"both were taken from one", a, b, 0, true},
		{"both were taken from one, and it has gone on", noted(a, 1), b, 1, true},
		{"both were taken from one, and have gone on", noted(a, 2), noted(b, 1), 0, false},
		{"what it was taken from has gone on", a, more, -1, false},
		{"so it has, and both have", noted(a, 9), more, 0, false},
		{"it was begun again, and the one before has gone on", again, noted(a, 1), -1, false},
		{"so it was, and both have", noted(again, 9), noted(a, 1), 0, false},
		{"it was taken from two", both, noted(b, 1), 1, true},
		{"it was taken from two, of which one has gone on", both, noted(b, 2), 0, false},
		{"it was taken from one without a lineage", old.WithLineage("o", old), old, 0, false},
		{"it has what no other has besides", root.WithLineage("c", root, old), root, 1, true},
	} {
		if newer, older := row.x.IsNewer(row.y), row.y.IsNewer(row.x); newer != (row.newer > 0) ||
			older != (row.newer < 0) {
			t.Errorf("%s: newer %v, older %v", row.name, newer, older)
		}
		if got := row.x.Has(row.y); got != row.has {
			t.Errorf("%s: it has all that the other has: %v", row.name, got)
		}
	}
	if again.Generation != root.Generation || both.Generation <= noted(a, 1).Generation {
		t.Errorf("generations %d and %d, begun from %d", again.Generation, both.Generation, root.Generation)
	}
	r := root
	for i := range 3 * tokencache.MaxOrigins { // starts at which nothing changes
		r = r.WithLineage(fmt.Sprint("start", i), r)
	}
	if !r.Has(root) || len(r.Origins) != 1 {
		t.Errorf("after many starts: %+v", r.Origins)
	}
	for i := range 3 * tokencache.MaxOrigins { // each of which changes something
		r = noted(r.WithLineage(fmt.Sprint("later", i), r), 1)
	}
	if r.Has(root) || len(r.Origins) != tokencache.MaxOrigins {
		t.Errorf("after many changes: %+v", r.Origins)
	}
}
