package main

import (
	"time"

	"perceptd/agent/explain"
)

// seconds turns the wire's seconds into a duration.
func seconds(n int64) time.Duration { return time.Duration(n) * time.Second }

// at shows a time by the clocks here, with its day where that is not today.
func (s screen) at(now, t time.Time) string { return s.times().At(now, t) }

// atIfKnown shows a time as at does, if it is known.
func (s screen) atIfKnown(now, t time.Time) string { return s.times().AtIfKnown(now, t) }

// atSecond shows a time to the second, with its day where that is not today.
func (s screen) atSecond(now, t time.Time) string {
	return s.at(now, t) + t.In(s.location()).Format(":05")
}

// atRelative shows a time and how far it is from now: "14:05 (in 2h 3m)".
func (s screen) atRelative(now, t time.Time) string { return s.times().AtRelative(now, t) }

// zoneName names the time zone that times are shown in: "CET, UTC+01:00".
func (s screen) zoneName(now time.Time) string { return s.times().ZoneName(now) }

// times shows times by the clocks here.
func (s screen) times() explain.Times { return explain.Times{Zone: s.zone} }

func (s screen) location() *time.Location { return s.times().Location() }

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

func earliest(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}
