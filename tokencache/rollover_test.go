package tokencache

import (
	"math"
	"math/rand/v2"
	"testing"
)

func TestLearn(t *testing.T) {
	t.Parallel()
	hours := func(after, by float64) rollover { return rollover{after: after / 24, by: by / 24} }
	justAfter := func(h float64) float64 { return h + 5.0/3600 }
	for _, row := range []struct {
		name string
		seen history
		kind PatternKind
		age  float64 // hours, with Regular
	}{
		{"nothing", nil, Unlearnt, 0},
		{"one wide", history{hours(0, 12.5)}, Unlearnt, 0},
		{"one close to the expiry", history{hours(23.6, justAfter(24))}, Regular, 24},
		{"two wide around half", history{hours(11.2, 17.6), hours(0, 12.7)}, Unlearnt, 0},
		{"half, tested on both sides", history{hours(0, 12.7), hours(11.97, justAfter(12))}, Regular, 12},
		{"one narrow anywhere: chance", history{hours(16, 16.1)}, Unlearnt, 0},
		{"two narrow at the same age", history{hours(16, 16.1), hours(15.95, 16.05)}, Regular, 16.05},
		{"two narrow at two ages", history{hours(16, 16.1), hours(9, 9.1)}, Irregular, 0},
		{"wide ones that agree with a narrow one", history{hours(0, 20), hours(16, 16.1), hours(12, 18)}, Unlearnt, 0},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			got := row.seen.learn()
			if got.kind != row.kind || row.kind == Regular && math.Abs(got.share*24-row.age) > 1e-6 ||
				got.seen != len(row.seen) {
				t.Errorf("%v at %v h from %d, want %v at %v h", got.kind, got.share*24, got.seen, row.kind, row.age)
			}
		})
	}
}

func TestHistoryIsBounded(t *testing.T) {
	t.Parallel()
	var h history
	for i := range 100 {
		h.add(rollover{by: float64(i)}, 8)
	}
	if len(h) != 8 || h[0].by != 92 || h[7].by != 99 || len(h.last(3)) != 3 || len(h.last(30)) != 8 {
		t.Errorf("%v", h)
	}
}

func TestEarliest(t *testing.T) {
	t.Parallel()
	var h history
	for i := range 3 {
		h.add(rollover{after: 0.4 + 0.1*float64(i), by: 0.41 + 0.1*float64(i)}, 64)
	}
	if got := h.earliest(); got != 0 {
		t.Errorf("of three: %v", got)
	}
	h.add(rollover{by: 0.9, watched: 1}, 64)                // nobody watched
	h.add(rollover{after: 0.3, by: 0.31, watched: 1}, 64)   // nor here, it was luck
	h.add(rollover{after: 0.7, by: 0.71, watched: 0.6}, 64) // watched too late to see an earlier one
	h.add(rollover{after: 0.8, by: 0.81}, 64)
	// The least is 0.4; four that range over 0.41 leave three quarters of that to chance.
	if got := h.earliest(); math.Abs(got-0.0925) > 1e-9 {
		t.Errorf("of four: %v", got)
	}
}

func TestMiddle(t *testing.T) {
	t.Parallel()
	h := history{{after: 0.4, by: 0.5}, {after: 0.6, by: 0.7}, {after: 0.8, by: 0.9}}
	for age, want := range map[float64]middle{
		0:    {0, 0.5, 0.65},
		0.55: {0.55, 0.7, 0.85},
		0.88: {0.88, 0.9, 0.85},
		0.95: {0.95, math.Inf(1), 1},
	} {
		got := h.middle(age)
		if got.from != want.from || got.until != want.until || math.Abs(got.at-want.at) > 1e-9 {
			t.Errorf("from %v on: %v, want %v", age, got, want)
		}
		if !got.covers(age) || got.covers(got.until) {
			t.Errorf("from %v on: %v tells of another time", age, got)
		}
	}
}

// What is remembered of what was learnt is what would be learnt now, at every age and after every rollover.
func TestLearntIsWhatWouldBeLearnt(t *testing.T) {
	t.Parallel()
	c := &Cache{learnedVersion: 1}
	random := rand.New(rand.NewPCG(7, 7))
	entries := []*entry{{key: Key{Resource: "a"}}, {key: Key{Resource: "b"}}}
	for range 700 {
		e := entries[random.IntN(len(entries))]
		after := random.Float64() * 0.9
		c.sawLocked(e, rollover{of: e.key, after: after, by: after + 0.1*random.Float64(), watched: 1})
		for _, e := range entries {
			age := 0.0
			for range 3 {
				age += random.Float64() / 3
				if got, want := c.medianLocked(e, age), max(age, c.rollovers.middle(age).at); got != want {
					t.Fatalf("the middle from %v on: %v, want %v", age, got, want)
				}
			}
			if got, want := c.learnedPatternLocked(e), c.learnLocked(e); got != want {
				t.Fatalf("learnt %+v, want %+v", got, want)
			}
		}
	}
}
