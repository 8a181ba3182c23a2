package main

import (
	"errors"
	"strings"
	"testing"
	"time"
)

func TestStrain(t *testing.T) {
	t.Parallel()
	idle := processors{all: 1000, idle: 900, own: 50, known: true}
	for name, test := range map[string]struct {
		late  []time.Duration
		after processors
		want  string
	}{
		"nothing":           {nil, processors{all: 2000, idle: 1500, own: 500, known: true}, ""},
		"its own work":      {nil, processors{all: 2000, idle: 900, own: 1050, known: true}, ""},
		"late at times":     {[]time.Duration{20 * time.Millisecond}, idle, ""},
		"late once":         {[]time.Duration{300 * time.Millisecond}, idle, "came late by up to 300ms, 300ms in all"},
		"late all the time": {slicesOf(100*time.Millisecond, 30), idle, "came late by up to 100ms, 3s in all"},
		"others": {nil, processors{all: 2000, idle: 1300, own: 150, known: true},
			"other processes had 50 %"},
		"the host": {nil, processors{all: 2000, idle: 1300, own: 550, stolen: 100, known: true},
			"the host of this machine had 10 %"},
		"not known": {nil, processors{}, ""},
	} {
		got := strainOf(10*time.Second, test.late, idle, test.after)
		if test.want == "" && got != "" || !strings.Contains(got, test.want) {
			t.Errorf("%s: %q, want %q", name, got, test.want)
		}
	}
}

func slicesOf(d time.Duration, n int) (all []time.Duration) {
	for range n {
		all = append(all, d)
	}
	return all
}

func TestParseProcessors(t *testing.T) {
	t.Parallel()
	got := parseProcessors([]byte("cpu  10 20 30 400 5 6 7 8 9 1\ncpu0 1 2 3 4 5 6 7 8 9 10\n"))
	if want := (processors{all: 486, idle: 405, stolen: 8, known: true}); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	for _, text := range []string{"", "cpu 1 2 3", "cpu 1 2 3 4 5 6 7 x", "cpu0 1 2 3 4 5 6 7 8"} {
		if got := parseProcessors([]byte(text)); got != (processors{}) {
			t.Errorf("%q: %+v", text, got)
		}
	}
	if p := readProcessors(); !p.known || p.all <= 0 || p.own < 0 {
		t.Errorf("of this machine: %+v", p)
	}
}

// What a busy machine keeps from being judged is said and is not a fault; what is not so on an idle machine is one, and
// so is what no machine can be too busy for.
func TestJudging(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		ok     bool
		strain string
		word   string
		faults int
	}{
		"so":                      {true, "", "so", 0},
		"so although it was busy": {true, "others", "so", 0},
		"not so":                  {false, "", "NOT SO", 1},
		"not to be judged":        {false, "others", "NOT JUDGED", 0},
	} {
		var out strings.Builder
		s := &show{fleet: &fleet{out: &out}}
		s.judge(test.ok, test.strain, "it is fast")
		if len(s.faults) != test.faults || len(s.unjudged) != 0 != (test.word == "NOT JUDGED") ||
			!strings.Contains(out.String(), test.word) || !strings.Contains(out.String(), "it is fast") {
			t.Errorf("%s: %v, %q", name, s.faults, &out)
		}
	}
	var out strings.Builder
	s := &show{fleet: &fleet{out: &out}}
	s.check(false, "it happens")
	if errors.Join(s.faults...) == nil {
		t.Error("what does not happen is not a fault")
	}
}
