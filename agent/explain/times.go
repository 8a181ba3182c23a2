package explain

import (
	"fmt"
	"strconv"
	"time"
)

// Times shows times by the clocks of a time zone.
type Times struct {
	Zone *time.Location // nil: UTC
}

// At shows a time by the clocks here, with its day where that is not today.
func (s Times) At(now, t time.Time) string {
	now, t = now.In(s.Location()), t.In(s.Location())
	switch {
	case t.Format(time.DateOnly) == now.Format(time.DateOnly):
		return t.Format("15:04")
	case t.Year() == now.Year():
		return t.Format("Jan 2 15:04")
	}
	return t.Format("2006-01-02 15:04")
}

// AtIfKnown shows a time as At does, if it is known.
func (s Times) AtIfKnown(now, t time.Time) string {
	if t.IsZero() {
		return "not known"
	}
	return s.At(now, t)
}

// AtRelative shows a time and how far it is from now: "14:05 (in 2h 3m)".
func (s Times) AtRelative(now, t time.Time) string {
	switch {
	case t.Sub(now).Abs() < time.Second:
		return s.At(now, t) + " (now)"
	case t.After(now):
		return s.At(now, t) + " (in " + Duration(t.Sub(now)) + ")"
	}
	return s.At(now, t) + " (" + Duration(now.Sub(t)) + " ago)"
}

// ZoneName names the time zone that times are shown in: "CET, UTC+01:00".
func (s Times) ZoneName(now time.Time) string {
	local := now.In(s.Location())
	name, offset := local.Zone()
	switch {
	case offset == 0:
		return "UTC"
	case name == "" || name[0] == '+' || name[0] == '-': // a zone without a name of its own
		return "UTC" + local.Format("-07:00")
	}
	return name + ", UTC" + local.Format("-07:00")
}

// Location returns the time zone.
func (s Times) Location() *time.Location {
	if s.Zone == nil {
		return time.UTC
	}
	return s.Zone
}

// Duration writes a duration in its two largest units: "3d 4h", "11h 52m", "4m 12s", "9s".
func Duration(d time.Duration) string {
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

// Counted is a number of things: "1 token", "2 tokens".
func Counted(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return strconv.Itoa(n) + " " + thing + "s"
}
