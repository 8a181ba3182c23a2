package tokencache

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"
)

// drawnChange is a change of one of few targets, with clocks that know of it or do not.
func drawnChange(r *rand.Rand, id int, base time.Time) PolicyChange {
	p := PolicyChange{
		ID: fmt.Sprint(id), At: base.Add(time.Duration(r.IntN(72)) * time.Hour), Vouched: r.IntN(2) == 0,
		Effect: []Effect{Changed, Granted, Revoked, Revoked, Revoked, Unknown}[r.IntN(6)],
		Moment: time.Duration(1+r.IntN(72)) * time.Hour,
	}
	p.RecordedAt, p.By = p.At, p.Moment+time.Duration(r.IntN(2)*r.IntN(5))*time.Hour
	if r.IntN(3) > 0 {
		p.Selector = Selector{Kind: ClientID, ID: fmt.Sprint(r.IntN(3))}
	} else {
		p.AllIdentities = true
	}
	if r.IntN(4) > 0 {
		p.Resource = fmt.Sprint("api://", r.IntN(300), []string{"", "/"}[r.IntN(2)])
	}
	if at := base.Add(p.Moment); r.IntN(3) > 0 {
		p.Issuer = Window{at, at.Add(time.Duration(r.IntN(60)) * time.Minute)}
		if r.IntN(3) == 0 {
			p.Issuer.Earliest = time.Time{}
		}
		if r.IntN(3) == 0 {
			p.Issuer.Latest = time.Time{}
		}
	}
	return p
}

// drawnEntry is a token for one of the targets of drawnChange.
func drawnEntry(r *rand.Rand, base time.Time) *entry {
	on := time.Duration(r.IntN(76*60)) * time.Minute
	e := &entry{key: Key{Selector: Selector{Kind: ClientID, ID: fmt.Sprint(r.IntN(4))},
		Resource: fmt.Sprint("api://", r.IntN(310))}}
	e.canonical = Canonical(e.key.Resource)
	e.token.receipt = receipt{on: on, to: on, from: on - time.Duration(r.IntN(29*60))*time.Minute}
	if r.IntN(2) == 0 {
		at := base.Add(e.token.receipt.from)
		e.token.issued = IssueWindow{at, at.Add(time.Duration(r.IntN(300)) * time.Second)}
	}
	return e
}

// What two changes are joined into is met by no token that lacks one of them, and none is judged better by it.
func TestJoinedIsAsStrictAsItsParts(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(1, 2))
	base := time.Date(2026, 11, 23, 0, 0, 0, 0, time.UTC)
	c := &Cache{clock: Clock{}.OrRuntime(), on: 1000 * time.Hour, propagationDelay: DefaultPropagationDelay}
	strict := 0
	for range 20000 {
		x, y := c.changeLocked(drawnChange(r, 0, base), 0), c.changeLocked(drawnChange(r, 1, base), 0)
		if x.target().effect != y.target().effect {
			continue
		}
		both, e := joined(x, y), drawnEntry(r, base)
		for _, part := range []*change{x, y} {
			if !part.touches(e) {
				continue
			}
			want := c.verdictLocked(e, part)
			if got := c.verdictLocked(e, both); !both.touches(e) || got.worse(want) != got {
				t.Fatalf("%+v is %v to %+v and %v to what it is joined into: %+v", e.token.receipt, want,
					part.PolicyChange, got, both.PolicyChange)
			}
			if want != Current {
				strict++
			}
		}
		if both.Joined != 1 || both.ID != x.ID {
			t.Fatalf("%+v", both.PolicyChange)
		}
	}
	if strict < 1000 {
		t.Errorf("the tokens that were drawn lack too little: %d", strict)
	}
}

// A record of more changes than there is room for loses none of them: whatever is kept back, or said to be stale, by
// one of them is so by what is on record.
func TestLongRecordIsMadeToFit(t *testing.T) {
	t.Parallel()
	base := time.Date(2026, 11, 23, 0, 0, 0, 0, time.UTC)
	for seed := range uint64(10) {
		r := rand.New(rand.NewPCG(seed, 3))
		var parts []PolicyChange
		for i := range MaxChanges + 1 + r.IntN(3*MaxChanges) {
			parts = append(parts, drawnChange(r, i, base))
		}
		c := &Cache{clock: Clock{}.OrRuntime(), on: 1000 * time.Hour, propagationDelay: DefaultPropagationDelay}
		c.loadLocked(parts)
		stands := 0
		for i, ch := range c.changes {
			stands += 1 + ch.Joined
			if i > 0 && ch.Moment < c.changes[i-1].Moment {
				t.Fatal("they are not in order")
			}
		}
		if len(c.changes) != MaxChanges || stands != len(parts) {
			t.Fatalf("%d on record stand for %d of %d", len(c.changes), stands, len(parts))
		}
		for range 100 {
			e := drawnEntry(r, base)
			want, got := make(map[Effect]PermissionState), make(map[Effect]PermissionState)
			judge := func(ch *change, worst map[Effect]PermissionState) {
				if ch.touches(e) {
					effect := ch.target().effect
					worst[effect] = worst[effect].worse(c.verdictLocked(e, ch))
				}
			}
			for _, p := range parts {
				judge(c.changeLocked(p, 0), want)
			}
			for _, ch := range c.changes {
				judge(ch, got)
			}
			for effect := range want {
				if got[effect].worse(want[effect]) != got[effect] {
					t.Fatalf("seed %d: %v was %v to what was %v, and is %v", seed, e.key, want[effect], effect,
						got[effect])
				}
			}
		}
	}
}
