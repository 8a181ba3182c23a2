package main

import (
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

// setting is when and where a transcript is played.
type setting struct {
	year int    // of perceptd's clock, in November
	zone string // of the screen
}

// scriptSetting is the setting of the scripts in testdata.
var scriptSetting = setting{2026, "Europe/Berlin"}

var (
	// What a script has of moments: perceptd's, as its answers have them and as a header and a parameter do, and those
	// that people see and write.
	wireTime  = regexp.MustCompile(`20(?:26-11-2\d|31-01-01)T\d\d:\d\d:\d\dZ`)
	unixTime  = regexp.MustCompile(`\b179\d{7}\b`)
	shownTime = regexp.MustCompile(`\b20(?:26|31)-\d\d-\d\d[ T]\d\d:\d\d(?::\d\d\\\+01:00)?`)
)

// moved returns a script as it is played at s: perceptd's moments are moved so that the clocks on the walls there show
// what the script says, in the other year. So what perceptctl prints differs by the year and the zone's name alone.
func (s setting) moved(t *testing.T, script string) string {
	t.Helper()
	here, there := scriptSetting.location(t), s.location(t)
	at := func(then time.Time) time.Time {
		local := then.In(here)
		return time.Date(local.Year()+s.year-scriptSetting.year, local.Month(), local.Day(), local.Hour(),
			local.Minute(), local.Second(), 0, there)
	}
	name, offset := at(time.Unix(1795435200, 0)).Format("MST"), at(time.Unix(1795435200, 0)).Format("-07:00")
	move := func(text string) string {
		text = wireTime.ReplaceAllStringFunc(text, func(moment string) string {
			then, err := time.Parse(time.RFC3339, moment)
			if err != nil {
				t.Fatal(err)
			}
			return at(then).UTC().Format(time.RFC3339)
		})
		text = unixTime.ReplaceAllStringFunc(text, func(moment string) string {
			then, err := strconv.ParseInt(moment, 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return strconv.FormatInt(at(time.Unix(then, 0)).Unix(), 10)
		})
		text = shownTime.ReplaceAllStringFunc(text, func(moment string) string {
			year, err := strconv.Atoi(moment[:4])
			if err != nil {
				t.Fatal(err)
			}
			return strconv.Itoa(year+s.year-scriptSetting.year) + strings.ReplaceAll(moment[4:], `\+01:00`,
				regexp.QuoteMeta(offset))
		})
		return strings.ReplaceAll(text, "CET, UTC+01:00", name+", UTC"+offset)
	}
	// The forms of moments that a message shows are the same everywhere.
	forms := strings.ReplaceAll(timeForms, "\n", "\n  ")
	parts := strings.Split(script, forms)
	for i, part := range parts {
		parts[i] = move(part)
	}
	return strings.Join(parts, forms)
}

func (s setting) location(t *testing.T) *time.Location {
	t.Helper()
	zone, err := time.LoadLocation(s.zone)
	if err != nil {
		t.Fatal(err)
	}
	return zone
}
