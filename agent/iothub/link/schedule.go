package link

import "time"

// firstBackoff bounds the first wait.
const firstBackoff = time.Second

// Schedule says how long to wait before each try to connect. The waits are random, up to a bound that doubles from a
// second to the longest. At the longest there is one more random wait, and then all are the longest: thousands of
// devices that lost one hub together come back evenly over that time, and no wave of them forms.
type Schedule struct {
	longest time.Duration
	roll    func() float64

	bound time.Duration // of the next wait
	even  bool          // the waits are the longest
}

// NewSchedule returns a Schedule that begins with the shortest waits. roll returns random numbers in [0, 1).
func NewSchedule(longest time.Duration, roll func() float64) *Schedule {
	s := &Schedule{longest: longest, roll: roll}
	s.Reset()
	return s
}

// Reset makes the waits begin from the shortest again.
func (s *Schedule) Reset() { s.bound, s.even = min(firstBackoff, s.longest), false }

// Next returns the next wait.
func (s *Schedule) Next() time.Duration {
	switch {
	case s.even:
		return s.longest
	case s.bound == s.longest:
		s.even = true
	}
	wait := time.Duration(s.roll() * float64(s.bound))
	s.bound = min(2*s.bound, s.longest)
	return wait
}

// renewal returns how long after its making a signature is renewed: at a random point in 75 to 90 % of its life.
func renewal(life time.Duration, roll func() float64) time.Duration {
	return time.Duration((0.75 + 0.15*roll()) * float64(life))
}

// Bounds of the wait before the twin is read again from a hub that is too busy.
const (
	firstBusyPause = 2 * time.Second
	maxBusyPause   = 5 * time.Minute
)

// busyPause returns how long to wait after the hub was too busy so many times in a row: a random time, up to a bound
// that doubles. So devices that read their twins together do not come back together.
func busyPause(times int, roll func() float64) time.Duration {
	bound := min(firstBusyPause<<min(times-1, 16), maxBusyPause)
	return time.Duration(roll() * float64(bound))
}
