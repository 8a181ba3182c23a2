package simulator

import (
	"math"
	"time"
)

// FastClock returns a clock that starts at now's present time and then runs speed times as fast as
// now does, for a demonstration that cannot wait a day. A speed that is not above zero counts as 1.
func FastClock(now func() time.Time, speed float64) func() time.Time {
	if !(speed > 0) {
		speed = 1
	}
	start := now()
	return func() time.Time {
		gone := float64(now().Sub(start)) * speed
		// The largest float64 below 2^63: beyond it the conversion has no defined result.
		return start.Add(time.Duration(min(gone, math.Nextafter(math.MaxInt64, 0)))).Round(0)
	}
}
