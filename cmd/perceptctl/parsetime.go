package main

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// timeForms shows every form that parseTime reads, a line each.
const timeForms = `2026-11-23T14:05:00+01:00  RFC 3339, with its zone
2026-11-23 14:05           in this device's time zone
14:05                      the last time it was that
10m ago, or -10m           so long before now (d, h, m and s)`

// maxAgo bounds how long ago a time may be: more is a slip of the finger.
const maxAgo = 366 * 24 * time.Hour

// parseTime reads a time as people write it. "ago" and a time of day are relative to now, whose location is the
// device's time zone. A local time that comes twice, at the end of summer time, is the later of the two that is past;
// one that is skipped at its beginning is refused.
func parseTime(text string, now time.Time) (time.Time, error) {
	text = strings.TrimSpace(text)
	if at, err := time.Parse(time.RFC3339, text); err == nil {
		return at, nil
	}
	if before, isSpan := strings.CutPrefix(text, "-"); isSpan {
		return timeAgo(text, before, now)
	}
	if before, isSpan := strings.CutSuffix(text, "ago"); isSpan {
		return timeAgo(text, before, now)
	}
	for _, form := range []string{"15:04", "15:04:05"} {
		if clock, err := time.Parse(form, text); err == nil {
			return lastClockTime(clock, now), nil
		}
	}
	for _, form := range []string{"2006-01-02 15:04", time.DateTime, "2006-01-02T15:04", "2006-01-02T15:04:05"} {
		if day, err := time.Parse(form, text); err == nil {
			return localTime(text, day, now)
		}
	}
	return time.Time{}, fmt.Errorf("%q is no time; it can be\n%s", text, timeForms)
}

func timeAgo(text, span string, now time.Time) (time.Time, error) {
	ago, err := parseDuration(strings.TrimSpace(span))
	switch {
	case err != nil:
		return time.Time{}, fmt.Errorf("%q is no time; it can be\n%s", text, timeForms)
	case ago > maxAgo:
		return time.Time{}, fmt.Errorf("%q is more than a year ago", text)
	}
	return now.Add(-ago), nil
}

// parseDuration reads a duration: Go's form with each unit at most once, and days before it.
func parseDuration(text string) (time.Duration, error) {
	parts := durationForm.FindStringSubmatch(strings.ReplaceAll(text, " ", ""))
	if parts == nil || parts[0] == "" {
		return 0, fmt.Errorf("%q is no span of time", text)
	}
	var whole time.Duration
	for i, unit := range []time.Duration{24 * time.Hour, time.Hour, time.Minute, time.Second} {
		if parts[i+1] == "" {
			continue
		}
		// At most 6 digits of days: no sum of these is out of range.
		n, err := strconv.Atoi(parts[i+1])
		if err != nil {
			return 0, err
		}
		whole += time.Duration(n) * unit
	}
	return whole, nil
}

var durationForm = regexp.MustCompile(`^(?:(\d{1,4})d)?(?:(\d{1,6})h)?(?:(\d{1,7})m)?(?:(\d{1,8})s)?$`)

// lastClockTime returns the last time at which a clock on the wall here showed that.
func lastClockTime(clock, now time.Time) time.Time {
	for back := 0; ; back++ {
		year, month, day := now.AddDate(0, 0, -back).Date()
		wanted := time.Date(year, month, day, clock.Hour(), clock.Minute(), clock.Second(), 0, time.UTC)
		if at, shown := latestShowing(wanted, now); shown {
			return at
		}
	}
}

func localTime(text string, wanted, now time.Time) (time.Time, error) {
	if at, shown := latestShowing(wanted, now); shown {
		return at, nil
	}
	at := inZone(wanted, now.Location())
	if !sameClock(at, wanted) {
		return time.Time{}, fmt.Errorf("%q was skipped by the clocks here, which were put forward then", text)
	}
	return at, nil
}

// latestShowing returns the latest time up to now at which the clocks here showed wanted's date and time.
func latestShowing(wanted, now time.Time) (time.Time, bool) {
	near := inZone(wanted, now.Location())
	// No clock is put on by more than an hour or so, in either direction.
	for _, shift := range []time.Duration{time.Hour, 30 * time.Minute, 0, -30 * time.Minute, -time.Hour} {
		if at := near.Add(shift); sameClock(at, wanted) && !at.After(now) {
			return at, true
		}
	}
	return time.Time{}, false
}

func inZone(t time.Time, zone *time.Location) time.Time {
	return time.Date(t.Year(), t.Month(), t.Day(), t.Hour(), t.Minute(), t.Second(), 0, zone)
}

func sameClock(a, b time.Time) bool { return a.Format(time.DateTime) == b.Format(time.DateTime) }

// timeFlag reads the time that a flag was given; empty is none. A time that is relative to the present goes by
// perceptd's clock, as all that perceptctl shows does: now asks for it. Without an answer the error is now's.
func (a *app) timeFlag(flag, text string, now func() (time.Time, error)) (time.Time, error) {
	if text == "" {
		return time.Time{}, nil
	}
	zone := a.zone()
	// Text that is not a time is refused before perceptd is asked.
	at, err := parseTime(text, time.Unix(0, 0).In(zone))
	if err != nil {
		return time.Time{}, &usageError{fmt.Errorf("--%s: %w", flag, err)}
	}
	if _, err := time.Parse(time.RFC3339, strings.TrimSpace(text)); err == nil {
		return at, nil
	}
	today, err := now()
	if err != nil {
		return time.Time{}, err
	}
	return parseTime(text, today.In(zone))
}
