package limit

import (
	"testing"
	"time"
)

func TestRate(t *testing.T) {
	t.Parallel()
	start := time.Unix(1e9, 0)
	at := func(ms int) time.Time { return start.Add(time.Duration(ms) * time.Millisecond) }
	r := Rate{PerSecond: 10, Burst: 5, MaxWait: time.Second}
	flood, quiet := Key{UID: 1}, Key{UID: 2}
	for i := range 5 {
		if wait, ok := r.Reserve(flood, at(0)); wait != 0 || !ok {
			t.Fatalf("request %d of the burst: %v %v", i, wait, ok)
		}
	}
	for i := range 10 {
		want := time.Duration(i+1) * 100 * time.Millisecond
		if wait, ok := r.Reserve(flood, at(0)); wait != want || !ok {
			t.Fatalf("request %d beyond: %v %v, want %v", i, wait, ok, want)
		}
	}
	for range 100 { // those that are refused take nothing
		if wait, ok := r.Reserve(flood, at(0)); wait != 100*time.Millisecond || ok {
			t.Fatalf("overdrawn: %v %v", wait, ok)
		}
	}
	if wait, ok := r.Reserve(quiet, at(0)); wait != 0 || !ok {
		t.Errorf("another caller: %v %v", wait, ok)
	}
	if wait, ok := r.Reserve(flood, at(100)); wait != time.Second || !ok {
		t.Errorf("a moment later: %v %v", wait, ok)
	}
	if wait, ok := r.Reserve(flood, at(60_000)); wait != 0 || !ok {
		t.Errorf("a minute later: %v %v", wait, ok)
	}
	if wait, ok := r.Reserve(flood, at(-60_000)); ok && wait > r.MaxWait {
		t.Errorf("the clock went back: %v %v", wait, ok)
	}
}

// Times that come in another order than they were read fill no budget twice.
func TestRateGrantsNothingTwice(t *testing.T) {
	t.Parallel()
	r := Rate{PerSecond: 200, Burst: 10}
	start, granted := time.Unix(1e9, 0), 0
	for i := range 1000 {
		if _, ok := r.Reserve(Key{UID: 7}, start.Add(time.Duration(i%2)*-50*time.Millisecond)); ok {
			granted++
		}
	}
	if granted != 10 {
		t.Errorf("%d calls are granted at one moment, of 10", granted)
	}
}

// However many callers come, what is kept of them is bounded, and those that are long gone leave nothing.
func TestRateIsBounded(t *testing.T) {
	t.Parallel()
	start := time.Unix(1e9, 0)
	r := Rate{PerSecond: 10, Burst: 5, MaxWait: time.Second}
	for i := range uint32(3 * mostLimiters) {
		if wait, ok := r.Reserve(Key{UID: i}, start); i < mostLimiters && (wait != 0 || !ok) {
			t.Fatalf("caller %d: %v %v", i, wait, ok)
		}
	}
	if len(r.limiters) != mostLimiters+1 {
		t.Errorf("%d are kept", len(r.limiters))
	}
	if _, ok := r.Reserve(Key{UID: 1 << 30}, start); ok {
		t.Error("the budget of everyone else has no end")
	}
	if wait, ok := r.Reserve(Key{UID: 1 << 30}, start.Add(time.Minute)); wait != 0 || !ok || len(r.limiters) != 1 {
		t.Errorf("later: %v %v, %d are kept", wait, ok, len(r.limiters))
	}
}
