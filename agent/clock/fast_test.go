package clock

import (
	"math"
	"testing"
	"time"
)

// Two processes that know an origin have one clock: what the one writes, the other reads.
func TestOriginIsShared(t *testing.T) {
	t.Parallel()
	began := Origin{Speed: 2880.5, Wall: wall().Add(-time.Minute), Boot: boot() - time.Second}
	read, err := ParseOrigin(began.String())
	if err != nil || read.Speed != began.Speed || !read.Wall.Equal(began.Wall) || read.Boot != began.Boot {
		t.Fatalf("%+v, %v: not %+v", read, err, began)
	}
	one, other := began.Clock(), read.Clock()
	for range 100 {
		first, second, third := one.Boot(), other.Boot(), one.Boot()
		if second < first || third < second {
			t.Fatalf("boot times %v, %v, %v", first, second, third)
		}
		before, between, after := one.Wall(), other.Wall(), one.Wall()
		if between.Before(before) || after.Before(between) {
			t.Fatalf("wall times %v, %v, %v", before, between, after)
		}
	}
	if gone := one.Wall().Sub(began.Wall); gone < 2880*time.Second {
		t.Errorf("%v went by in a second", gone)
	}
}

func TestBeginWithNoSpeed(t *testing.T) {
	t.Parallel()
	for _, speed := range []float64{0, -1, math.NaN(), math.Inf(1)} {
		if got := Begin(speed).Speed; got != 1 {
			t.Errorf("Begin(%v) runs %v times as fast", speed, got)
		}
	}
}

func TestParseOriginRefuses(t *testing.T) {
	t.Parallel()
	for _, text := range []string{
		"", "60", "60,1", "60,1,2,3", "0,1,2", "-1,1,2", "NaN,1,2", "+Inf,1,2", "1e10,1,2", "fast,1,2", "60,-1,2",
		"60,1,-2", "60,x,2", "60,1,", "60,1,9223372036854775807", "60,99999999999999999999,1",
	} {
		if o, err := ParseOrigin(text); err == nil {
			t.Errorf("%q was taken as %+v", text, o)
		}
	}
}

func FuzzParseOrigin(f *testing.F) {
	f.Add(Begin(60).String())
	f.Add("1e9,0,0")
	f.Add("0x1p-2,1,1")
	f.Fuzz(func(t *testing.T, text string) {
		o, err := ParseOrigin(text)
		if err != nil {
			return
		}
		again, err := ParseOrigin(o.String())
		if err != nil || again != o {
			t.Fatalf("%q: %+v, then %+v, %v", text, o, again, err)
		}
		// Whatever was read is a clock that runs forwards.
		c := o.Clock()
		if first, second := c.Boot(), c.Boot(); second < first || first < 0 {
			t.Fatalf("%q: boot times %v, %v", text, first, second)
		}
	})
}
