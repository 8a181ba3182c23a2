package link

import (
	"math/rand/v2"
	"testing"
	"time"
)

func TestSchedule(t *testing.T) {
	t.Parallel()
	most := NewSchedule(20*time.Second, func() float64 { return 0.9999999 })
	for n, bound := range []time.Duration{1, 2, 4, 8, 16, 20, 20, 20} {
		if wait := most.Next(); wait > bound*time.Second || wait < bound*time.Second-time.Millisecond {
			t.Errorf("wait %d is %v, want %vs", n, wait, bound)
		}
	}
	most.Reset()
	if wait := most.Next(); wait > time.Second {
		t.Errorf("after a reset the first wait is %v", wait)
	}
	none := NewSchedule(20*time.Second, func() float64 { return 0 })
	for n := range 8 {
		want := time.Duration(0)
		if n > 5 {
			want = 20 * time.Second
		}
		if wait := none.Next(); wait != want {
			t.Errorf("wait %d is %v, want %v", n, wait, want)
		}
	}
	if wait := NewSchedule(300*time.Millisecond, func() float64 { return 0.5 }).Next(); wait != 150*time.Millisecond {
		t.Errorf("the first wait is %v, though the longest is 300 ms", wait)
	}
}

// Agents that lost the hub at one moment come back evenly over the longest wait, however long the outage was.
func TestReconnectSpread(t *testing.T) {
	t.Parallel()
	const (
		agents  = 200
		longest = time.Minute
		buckets = 6
	)
	worst, beyond := 0.0, 0
	const fleets = 1000
	for seed := range uint64(fleets) {
		random := rand.New(rand.NewPCG(seed, 1))
		outage := 2*longest + time.Duration(random.Float64()*float64(10*time.Minute))
		var back [buckets]int
		for range agents {
			s := NewSchedule(longest, random.Float64)
			var at time.Duration
			for at < outage {
				at += s.Next()
			}
			if after := at - outage; after < longest {
				back[after*buckets/longest]++
			}
		}
		peak, sum := 0, 0
		for _, n := range back {
			peak, sum = max(peak, n), sum+n
		}
		if sum < agents*99/100 {
			t.Fatalf("seed %d: %d of %d are back after the longest wait", seed, sum, agents)
		}
		shape := float64(peak) / (float64(sum) / buckets)
		worst = max(worst, shape)
		if shape > 1.5 {
			beyond++
		}
	}
	t.Logf("the peak is at most %.2f times the mean, and above 1.5 times in %d of %d fleets", worst, beyond, fleets)
	if beyond > fleets/50 {
		t.Errorf("the peak is above 1.5 times the mean in %d of %d fleets", beyond, fleets)
	}
}

func TestRenewal(t *testing.T) {
	t.Parallel()
	for _, roll := range []float64{0, 0.5, 0.999} {
		at := renewal(24*time.Hour, func() float64 { return roll })
		if at < 18*time.Hour || at > 24*time.Hour*9/10 {
			t.Errorf("with %v it is renewed after %v", roll, at)
		}
	}
}
