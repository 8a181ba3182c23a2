package main

import (
	"strings"
	"testing"
	"time"
)

func berlin(t testing.TB) *time.Location {
	t.Helper()
	zone, err := time.LoadLocation("Europe/Berlin")
	if err != nil {
		t.Fatal(err)
	}
	return zone
}

func TestParseTime(t *testing.T) {
	t.Parallel()
	zone := berlin(t)
	now := time.Date(2026, 11, 23, 14, 30, 20, 0, zone)
	autumn := time.Date(2026, 10, 25, 12, 0, 0, 0, zone) // at 3:00 the clocks went back to 2:00
	between := time.Date(2026, 10, 25, 0, 45, 0, 0, time.UTC).In(zone)
	spring := time.Date(2026, 3, 29, 12, 0, 0, 0, zone) // at 2:00 they went forward to 3:00
	tests := []struct {
		text string
		now  time.Time
		want string
	}{
		{"2026-11-23T14:05:00+01:00", now, "2026-11-23T14:05:00+01:00"},
		{" 2026-11-23T13:05:00Z ", now, "2026-11-23T14:05:00+01:00"},
		{"2026-12-24T13:05:00Z", now, "2026-12-24T14:05:00+01:00"}, // whether it is to come is the daemon's to judge
		{"2026-11-23 14:05", now, "2026-11-23T14:05:00+01:00"},
		{"2026-11-23 14:05:09", now, "2026-11-23T14:05:09+01:00"},
		{"2026-11-23T14:05", now, "2026-11-23T14:05:00+01:00"},
		{"2026-07-01 14:05", now, "2026-07-01T14:05:00+02:00"},
		{"2027-01-01 14:05", now, "2027-01-01T14:05:00+01:00"},
		{"14:05", now, "2026-11-23T14:05:00+01:00"},
		{"14:30", now, "2026-11-23T14:30:00+01:00"},
		{"14:30:21", now, "2026-11-22T14:30:21+01:00"},
		{"14:31", now, "2026-11-22T14:31:00+01:00"},
		{"0:00", now, "2026-11-23T00:00:00+01:00"},
		{"10m ago", now, "2026-11-23T14:20:20+01:00"},
		{"10mago", now, "2026-11-23T14:20:20+01:00"},
		{"-10m", now, "2026-11-23T14:20:20+01:00"},
		{"1d 2h ago", now, "2026-11-22T12:30:20+01:00"},
		{"-1h30m5s", now, "2026-11-23T13:00:15+01:00"},
		{"90s ago", now, "2026-11-23T14:28:50+01:00"},
		// What the clocks showed twice is the later of the two, unless that is to come.
		{"2026-10-25 02:30", autumn, "2026-10-25T02:30:00+01:00"},
		{"2:30", autumn, "2026-10-25T02:30:00+01:00"},
		{"2026-10-25 02:30", between, "2026-10-25T02:30:00+02:00"},
		{"2:30", between, "2026-10-25T02:30:00+02:00"},
		// What they did not show that day was the day before.
		{"2:30", spring, "2026-03-28T02:30:00+01:00"},
	}
	for _, test := range tests {
		got, err := parseTime(test.text, test.now)
		if text := got.In(zone).Format(time.RFC3339); err != nil || text != test.want {
			t.Errorf("%q at %v: %s (%v), want %s", test.text, test.now, text, err, test.want)
		}
	}
}

func TestParseTimeRefuses(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 23, 14, 30, 20, 0, berlin(t))
	for text, want := range map[string]string{
		"":                             "10m ago, or -10m",
		"soon":                         "2026-11-23 14:05 ",
		"25:00":                        "is no time",
		"2026-02-30 14:05":             "is no time",
		"2026-11-23":                   "is no time",
		"2026-11-23T14:05:00 +01:00":   "is no time",
		"ago":                          "is no time",
		"-":                            "is no time",
		"10 ago":                       "is no time",
		"-5m10h":                       "is no time",
		"--5m":                         "is no time",
		"-1.5h":                        "is no time",
		"-9999d":                       "more than a year ago",
		"99999999s ago":                "more than a year ago",
		"2026-03-29 02:30":             "put forward",
		"-99999999999999999999999999s": "is no time",
	} {
		got, err := parseTime(text, now)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, %v; want %q", text, got, err, want)
		}
	}
}

// FuzzParseTime checks what holds for every command line: a moment that was told as ago or by the clock alone
// is not to come, and none of those told by a span is over a year back.
func FuzzParseTime(f *testing.F) {
	for _, text := range []string{"14:05", "10m ago", "-1d2h", "2026-11-23 14:05", "2026-11-23T14:05:00+01:00", "-",
		"2:30"} {
		f.Add(text, int64(1795440620))
	}
	zone := berlin(f)
	f.Fuzz(func(t *testing.T, text string, unix int64) {
		now := time.Unix(unix%(1<<34), 0).In(zone)
		got, err := parseTime(text, now)
		_, never := parseTime(text, time.Unix(0, 0).In(zone))
		if (err == nil) != (never == nil) {
			t.Errorf("%q: %v in %v, %v in 1970", text, err, now, never)
		}
		if err != nil {
			if !got.IsZero() {
				t.Errorf("%q: %v beside %v", text, got, err)
			}
			return
		}
		byDay := strings.Contains(strings.TrimPrefix(strings.TrimSpace(text), "-"), "-")
		if !byDay && (got.After(now) || got.Before(now.Add(-maxAgo))) {
			t.Errorf("%q at %v is %v", text, now, got)
		}
	})
}
