package tokencache_test

import (
	"testing"
	"time"

	"perceptd/tokencache"
)

// Of two records that went on apart, changes of one ID are compared by what they stand for: what either took in on a full record
// is in force.
func TestBoth(t *testing.T) {
	t.Parallel()
	const h = time.Hour
	noon := time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)
	at := func(moment time.Duration) tokencache.PolicyChange {
		on := noon.Add(moment)
		return tokencache.PolicyChange{
			ID: "r", Selector: vault.Selector, Resource: vault.Resource, Effect: tokencache.Revoked, At: on, NotedOn: on, Vouched: true,
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
		{"the same, in another spelling", plain, took(func(p *tokencache.PolicyChange) { *p = plain; p.Resource += "/" }), true, 0, true, vault.Resource, h, false},
		{"dated for people", plain, took(func(p *tokencache.PolicyChange) { *p = plain; p.At = noon.Add(9 * h) }), true, 0, true, vault.Resource, h, false},
		{"one took in another of its kind", plain, took(func(*tokencache.PolicyChange) {}), false, 1, true, vault.Resource, 3 * h, false},
		{"it has what the other took in", took(func(*tokencache.PolicyChange) {}), plain, true, 1, true, vault.Resource, 3 * h, false},
		{"one took in another resource's", plain, took(func(p *tokencache.PolicyChange) { p.Resource = "" }), false, 1, true, "", 3 * h, false},
		{"one took in another identity's", plain, took(func(p *tokencache.PolicyChange) { p.AllIdentities, p.Selector = true, tokencache.Selector{} }), false, 1, false, vault.Resource, 3 * h, false},
		{"each took in one", took(func(p *tokencache.PolicyChange) { *p = plain; p.Joined = 1; p.Resource = "" }), took(func(*tokencache.PolicyChange) {}), false, 1, true, "", 3 * h, false},
		{"one took in what has no date", plain, took(func(p *tokencache.PolicyChange) { p.Issuer.Latest = time.Time{} }), false, 1, true, vault.Resource, 3 * h, true},
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
			if p.ID != "r" || p.Joined != row.joined || p.AllIdentities == row.selector || tokencache.Spelling(p.Resource) != tokencache.Spelling(row.resource) ||
				p.Moment != row.moment || p.By != row.moment || p.Issuer.Latest.IsZero() != row.uncertain || p.Effect != tokencache.Revoked {
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
