package main

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// momentForms shows every form that parseMoment takes, a line each.
const momentForms = `2026-11-23T14:05:00+01:00  RFC 3339, with its zone
2026-11-23 14:05           in this device's time zone
14:05                      the last time it was that
10m ago, or -10m           so long before now (d, h, m and s)`

// oldest is how long ago a moment may be by a span: beyond it is a slip of the finger.
const oldest = 366 * 24 * time.Hour

// parseMoment reads a moment as people write it. now says what "ago" and a mere time of day mean, its
// location is the device's time zone. A local time that the end of summer time brings twice is the later
// of the two that is not to come; one that its beginning leaves out is refused.
func parseMoment(text string, now time.Time) (time.Time, error) {
	text = strings.TrimSpace(text)
	if at, err := time.Parse(time.RFC3339, text); err == nil {
		return at, nil
	}
	if before, isSpan := strings.CutPrefix(text, "-"); isSpan {
		return momentAgo(text, before, now)
	}
	if before, isSpan := strings.CutSuffix(text, "ago"); isSpan {
		return momentAgo(text, before, now)
	}
	for _, form := range []string{"15:04", "15:04:05"} {
		if clock, err := time.Parse(form, text); err == nil {
			return lastTime(clock, now), nil
		}
	}
	for _, form := range []string{"2006-01-02 15:04", time.DateTime, "2006-01-02T15:04", "2006-01-02T15:04:05"} {
		if day, err := time.Parse(form, text); err == nil {
			return localMoment(text, day, now)
		}
	}
	return time.Time{}, fmt.Errorf("%q is no time; it can be\n%s", text, momentForms)
}

func momentAgo(text, span string, now time.Time) (time.Time, error) {
	ago, err := parseSpan(strings.TrimSpace(span))
	switch {
	case err != nil:
		return time.Time{}, fmt.Errorf("%q is no time; it can be\n%s", text, momentForms)
	case ago > oldest:
		return time.Time{}, fmt.Errorf("%q is more than a year ago", text)
	}
	return now.Add(-ago), nil
}

// parseSpan reads a span of time: Go's form, of which each unit may be there once, and days before it.
func parseSpan(text string) (time.Duration, error) {
	parts := spanForm.FindStringSubmatch(strings.ReplaceAll(text, " ", ""))
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

var spanForm = regexp.MustCompile(`^(?:(\d{1,4})d)?(?:(\d{1,6})h)?(?:(\d{1,7})m)?(?:(\d{1,8})s)?$`)

// lastTime returns the last moment at which a clock on the wall here showed that.
func lastTime(clock, now time.Time) time.Time {
	for back := 0; ; back++ {
		year, month, day := now.AddDate(0, 0, -back).Date()
		wanted := time.Date(year, month, day, clock.Hour(), clock.Minute(), clock.Second(), 0, time.UTC)
		if at, shown := latestShowing(wanted, now); shown {
			return at
		}
	}
}

func localMoment(text string, wanted, now time.Time) (time.Time, error) {
	if at, shown := latestShowing(wanted, now); shown {
		return at, nil
	}
	at := inZone(wanted, now.Location())
	if !sameClock(at, wanted) {
		return time.Time{}, fmt.Errorf("%q was skipped by the clocks here, which were put forward then", text)
	}
	return at, nil
}

// latestShowing returns the latest moment up to now at which the clocks here showed wanted's date and time.
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

// moment reads the moment that a flag was given; an empty one is none. What depends on the time of day goes by perceptd's
// clock, for which now asks, as all that perceptctl shows does. Without an answer the error is now's.
func (a *app) moment(flag, text string, now func() (time.Time, error)) (time.Time, error) {
	if text == "" {
		return time.Time{}, nil
	}
	zone := a.zone()
	// What is not a moment is not one at any time: it is refused before perceptd is asked.
	at, err := parseMoment(text, time.Unix(0, 0).In(zone))
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
	return parseMoment(text, today.In(zone))
}
