package main

import (
	"testing"
	"time"
)

func TestFormattedTimes(t *testing.T) {
	t.Parallel()
	s := screen{zone: berlin(t)}
	now := time.Date(2026, 11, 23, 23, 30, 0, 0, s.zone)
	for d, want := range map[time.Duration]string{
		0:                     "23:30 (now)",
		-10 * time.Minute:     "23:20 (10m ago)",
		time.Hour:             "Nov 24 00:30 (in 1h)",
		-24 * time.Hour:       "Nov 22 23:30 (1d ago)",
		100 * 24 * time.Hour:  "2027-03-03 23:30 (in 100d)",
		-400 * 24 * time.Hour: "2025-10-20 00:30 (400d ago)",
	} {
		if got := s.atRelative(now, now.Add(d)); got != want {
			t.Errorf("%v: %q, want %q", d, got, want)
		}
	}
}

func TestZones(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	for name, want := range map[string]string{
		"Europe/Berlin":       "CET, UTC+01:00",
		":America/Sao_Paulo":  "UTC-03:00",
		"Asia/Kolkata":        "IST, UTC+05:30",
		"UTC":                 "UTC",
		"Etc/GMT":             "UTC",
		"America/Los_Angeles": "PST, UTC-08:00",
	} {
		a := &app{environ: []string{"TZ=" + name}}
		if got := (screen{zone: a.zone()}).zoneName(now); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	for _, name := range []string{"", "Nowhere/Atall"} {
		if got := (&app{environ: []string{"TZ=" + name}}).zone(); got != time.Local {
			t.Errorf("%q: %v", name, got)
		}
	}
	if got := (screen{}).zoneName(now); got != "UTC" {
		t.Errorf("zero screen: %q", got)
	}
}
