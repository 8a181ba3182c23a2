package clock

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"perceptd/tokencache"
)

// Origin is where a clock begins that runs faster than the device's, for the simulated back end. Two processes that
// know it have the same clock, and so has one that is started again, until the device is booted.
type Origin struct {
	Speed float64       // how many times as fast as the device's it runs
	Wall  time.Time     // what it shows at its beginning
	Boot  time.Duration // the device's boot time at its beginning, and its own
}

// Begin returns the origin of a clock that shows the device's time now, and runs speed times faster from now on. A
// speed that is not a positive finite number counts as 1.
func Begin(speed float64) Origin {
	if !(speed > 0) || math.IsInf(speed, 1) {
		speed = 1
	}
	return Origin{speed, wall(), boot()}
}

// Fast is the clock that begins now.
func Fast(speed float64) tokencache.Clock { return Begin(speed).Clock() }

// Clock returns the clock: Wall and Boot run ahead of the device's, Timer fires as much sooner, and it counts as
// synchronised with itself. A step of the device's wall clock does not move it.
func (o Origin) Clock() tokencache.Clock {
	elapsed := func() time.Duration { return scale(boot()-o.Boot, o.Speed) }
	return tokencache.Clock{
		Wall:         func() time.Time { return o.Wall.Add(elapsed()) },
		Boot:         func() time.Duration { return o.Boot + elapsed() },
		Synchronised: func() bool { return true },
		Timer: func(d time.Duration) (<-chan time.Time, func() bool) {
			return timer(scale(d, 1/o.Speed))
		},
	}
}

// String is for ParseOrigin: the speed, and the two clocks in nanoseconds. A shell takes it as it is.
func (o Origin) String() string {
	return fmt.Sprintf("%s,%d,%d", strconv.FormatFloat(o.Speed, 'g', -1, 64), o.Wall.UnixNano(), o.Boot)
}

// maxSpeed is beyond what shows anything.
const maxSpeed = 1e9

// ParseOrigin is String's inverse. It refuses an origin that lies in another boot, as far as that can be seen.
func ParseOrigin(text string) (Origin, error) {
	parts := strings.Split(text, ",")
	if len(parts) != 3 {
		return Origin{}, fmt.Errorf("%q is not a speed and two times in nanoseconds with commas between", text)
	}
	speed, err := strconv.ParseFloat(parts[0], 64)
	if err != nil || !(speed > 0 && speed <= maxSpeed) {
		return Origin{}, fmt.Errorf("the speed %q is not a number above 0 and up to %g", parts[0], maxSpeed)
	}
	var times [2]int64
	for i := range times {
		if times[i], err = strconv.ParseInt(parts[i+1], 10, 64); err != nil || times[i] < 0 {
			return Origin{}, fmt.Errorf("%q is not a time in nanoseconds", parts[i+1])
		}
	}
	o := Origin{speed, time.Unix(0, times[0]), time.Duration(times[1])}
	if now := boot(); o.Boot > now {
		return Origin{}, fmt.Errorf("it began %v after this device was booted, which is only %v ago", o.Boot, now)
	}
	return o, nil
}

// scale multiplies d, rounding away from zero so that a scaled timer never fires early, and stops at
// the longest duration there is, half of it to leave room for adding a start.
func scale(d time.Duration, by float64) time.Duration {
	const longest = time.Duration(math.MaxInt64 / 2)
	x := float64(d) * by
	switch {
	case x >= float64(longest):
		return longest
	case x <= -float64(longest):
		return -longest
	case x < 0:
		return time.Duration(math.Floor(x))
	}
	return time.Duration(math.Ceil(x))
}
