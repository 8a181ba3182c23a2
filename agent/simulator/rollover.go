package simulator

import (
	"fmt"
	"strings"
	"time"
)

// Rollover says at which age the back end stops handing out a token and issues a newer one.
type Rollover uint8

const (
	AtExpiry   Rollover = iota // with its expiry and not before
	AtHalfLife                 // at half of its life
	Jittered                   // anywhere from a third of its life to all of it: 8 h to 24 h of 24 h
)

var rollovers = [...]string{AtExpiry: "expiry", AtHalfLife: "half-life", Jittered: "jittered"}

func (r Rollover) String() string {
	if int(r) < len(rollovers) {
		return rollovers[r]
	}
	return "unknown rollover"
}

// ParseRollover is String's inverse; its error lists the choices.
func ParseRollover(s string) (Rollover, error) {
	for r, name := range rollovers {
		if s == name {
			return Rollover(r), nil
		}
	}
	return 0, fmt.Errorf("unknown rollover %q: choose one of %s", s, strings.Join(rollovers[:], ", "))
}

// MarshalText is String, for the control path.
func (r Rollover) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// age returns how old a token of that life is when the back end no longer hands it out, for a roll
// in [0, 1) that only Jittered heeds.
func (r Rollover) age(life time.Duration, roll float64) time.Duration {
	switch r {
	case AtHalfLife:
		return life / 2
	case Jittered:
		third := life / 3
		return third + time.Duration(roll*float64(life-third))
	}
	return life
}
