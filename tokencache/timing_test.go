package tokencache

import (
	"math"
	"testing"
	"time"
)

func TestFirstRefresh(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name          string
		left, advised time.Duration
		roll          float64
		want          time.Duration
	}{
		{"half of a day", 24 * time.Hour, 0, 0.5, 12 * time.Hour},
		{"earliest", 24 * time.Hour, 0, 0, 10*time.Hour + 48*time.Minute},
		{"latest", 24 * time.Hour, 0, 1, 13*time.Hour + 12*time.Minute},
		{"the back end's own cached copy, half spent", 12 * time.Hour, 0, 0.5, 6 * time.Hour},
		{"two hours are not short", 2 * time.Hour, 0, 0.5, time.Hour},
		{"less than two hours are", 2*time.Hour - time.Second, 0, 0.5, 5759200 * time.Millisecond},
		{"ten minutes", 10 * time.Minute, 0, 0.5, 8 * time.Minute},
		{"advised", 24 * time.Hour, 5 * time.Hour, 0.9, 5 * time.Hour},
		{"advised past the expiry is no advice", time.Hour, 2 * time.Hour, 0.5, 48 * time.Minute},
		{"advised too soon", time.Hour, time.Second, 0.5, 30 * time.Second},
		{"nothing left", 0, 0, 0.5, 30 * time.Second},
	} {
		if got := firstRefresh(row.left, row.advised, row.roll); got != row.want {
			t.Errorf("%s: firstRefresh(%v, %v, %v) = %v, want %v", row.name, row.left, row.advised, row.roll, got,
				row.want)
		}
	}
}

func TestNextTry(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		left time.Duration
		roll float64
		want time.Duration
	}{
		{12 * time.Hour, 0.5, 6 * time.Hour},
		{12 * time.Hour, 0, 324 * time.Minute},
		{10 * time.Minute, 0.5, 5 * time.Minute},
		{10 * time.Minute, 0.4, 10*time.Minute + time.Second}, // less than the floor: the expiry itself
		{time.Second, 0.5, 2 * time.Second},
		{0, 0.5, time.Second},
	} {
		if got := nextTry(row.left, row.roll); got != row.want {
			t.Errorf("nextTry(%v, %v) = %v, want %v", row.left, row.roll, got, row.want)
		}
	}
}

// From half life on, a back end that keeps its copy to the end costs about eight calls, the last of them
// one second after the expiry.
func TestNextTryConverges(t *testing.T) {
	t.Parallel()
	for _, roll := range []float64{0, 0.25, 0.5, 0.75, 0.999} {
		left, calls := 12*time.Hour, 0
		for left > 0 {
			left -= nextTry(left, roll)
			calls++
		}
		if left != -afterExpiry {
			t.Errorf("roll %v: the last try comes %v after the expiry, want %v", roll, -left, afterExpiry)
		}
		if calls < 7 || calls > 9 {
			t.Errorf("roll %v: %d calls from half life to expiry", roll, calls)
		}
	}
}

func TestBackoff(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name     string
		failures int
		left     time.Duration
		roll     float64
		want     time.Duration
	}{
		{"first", 1, 12 * time.Hour, 1, time.Second},
		{"second", 2, 12 * time.Hour, 1, 2 * time.Second},
		{"full jitter", 5, 12 * time.Hour, 0.5, 8 * time.Second},
		{"floor", 5, 12 * time.Hour, 0, time.Second},
		{"top", 50, 12 * time.Hour, 1, 5 * time.Minute},
		{"no overflow", 1 << 30, 12 * time.Hour, 1, 5 * time.Minute},
		{"last minutes", 50, 4 * time.Minute, 1, 5 * time.Second},
		{"the last minutes are not slept through", 50, 7 * time.Minute, 1, 2 * time.Minute},
		{"just before the last minutes", 50, 5*time.Minute + 10*time.Millisecond, 1, time.Second},
		{"just expired", 50, -4 * time.Minute, 1, 5 * time.Second},
		{"long expired", 50, -6 * time.Minute, 1, 5 * time.Minute},
		{"never had one", 50, noToken, 1, 5 * time.Minute},
	} {
		if got := backoff(row.failures, row.left, row.roll); got != row.want {
			t.Errorf("%s: backoff(%d, %v, %v) = %v, want %v", row.name, row.failures, row.left, row.roll, got, row.want)
		}
	}
}

func TestNominalOf(t *testing.T) {
	t.Parallel()
	for _, row := range []struct{ told, want time.Duration }{
		{0, 24 * time.Hour},
		{-time.Hour, 24 * time.Hour},
		{time.Hour, time.Hour},
		{28 * time.Hour, 28 * time.Hour},
		{1000 * time.Hour, 28*time.Hour + 5*time.Minute},
	} {
		if got := nominalOf(Fetched{Nominal: row.told}); got != row.want {
			t.Errorf("nominalOf(%v) = %v, want %v", row.told, got, row.want)
		}
	}
}

// A probe's step shrinks with what is left, within its bounds.
func TestProbeInterval(t *testing.T) {
	t.Parallel()
	last := time.Duration(math.MaxInt64)
	for left := 28 * time.Hour; left > -time.Hour; left -= 10 * time.Minute {
		step := probeInterval(left, 0.5)
		if step > last || step > probeTop || step < probeFloor {
			t.Errorf("with %v left: %v after %v", left, step, last)
		}
		last = step
	}
}
