package main

import (
	"fmt"
	"time"
)

// formatDuration writes a duration in its two largest units: "3d 4h", "11h 52m", "4m 12s", "9s".
func formatDuration(d time.Duration) string {
	seconds := int64(max(d, 0) / time.Second)
	units := []struct {
		name    string
		seconds int64
	}{{"d", 86400}, {"h", 3600}, {"m", 60}, {"s", 1}}
	for i, unit := range units {
		if seconds < unit.seconds || i == len(units)-1 {
			continue
		}
		text := fmt.Sprintf("%d%s", seconds/unit.seconds, unit.name)
		smaller := units[i+1]
		if rest := seconds % unit.seconds / smaller.seconds; rest > 0 {
			text += fmt.Sprintf(" %d%s", rest, smaller.name)
		}
		return text
	}
	return fmt.Sprintf("%ds", seconds)
}

// seconds turns the wire's seconds into a duration.
func seconds(n int64) time.Duration { return time.Duration(n) * time.Second }

// at shows a time by the clocks here, with its day where that is not today.
func (s screen) at(now, t time.Time) string {
	now, t = now.In(s.location()), t.In(s.location())
	switch {
	case t.Format(time.DateOnly) == now.Format(time.DateOnly):
		return t.Format("15:04")
	case t.Year() == now.Year():
		return t.Format("Jan 2 15:04")
	}
	return t.Format("2006-01-02 15:04")
}

// atIfKnown shows a time as at does, if it is known.
func (s screen) atIfKnown(now, t time.Time) string {
	if t.IsZero() {
		return "not known"
	}
	return s.at(now, t)
}

// atSecond shows a time to the second, with its day where that is not today.
func (s screen) atSecond(now, t time.Time) string {
	return s.at(now, t) + t.In(s.location()).Format(":05")
}

// atRelative shows a time and how far it is from now: "14:05 (in 2h 3m)".
func (s screen) atRelative(now, t time.Time) string {
	switch {
	case t.Sub(now).Abs() < time.Second:
		return s.at(now, t) + " (now)"
	case t.After(now):
		return s.at(now, t) + " (in " + formatDuration(t.Sub(now)) + ")"
	}
	return s.at(now, t) + " (" + formatDuration(now.Sub(t)) + " ago)"
}

// zoneName names the time zone that times are shown in: "CET, UTC+01:00".
func (s screen) zoneName(now time.Time) string {
	local := now.In(s.location())
	name, offset := local.Zone()
	switch {
	case offset == 0:
		return "UTC"
	case name == "" || name[0] == '+' || name[0] == '-': // a zone without a name of its own
		return "UTC" + local.Format("-07:00")
	}
	return name + ", UTC" + local.Format("-07:00")
}

func (s screen) location() *time.Location {
	if s.zone == nil {
		return time.UTC
	}
	return s.zone
}

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
