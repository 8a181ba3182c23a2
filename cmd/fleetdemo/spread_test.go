package main

import (
	"encoding/xml"
	"errors"
	"io"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

func evenly(n int, over time.Duration) (all []time.Duration) {
	for i := range n {
		all = append(all, over*time.Duration(i+1)/time.Duration(n))
	}
	return all
}

func TestSpread(t *testing.T) {
	t.Parallel()
	s := spread{devices: 4, milestones: []milestone{
		{"on record", []time.Duration{3 * time.Second, time.Second, 4 * time.Second, 2 * time.Second}},
		{"acknowledged", []time.Duration{8 * time.Second, 6 * time.Second}},
		{"current", nil},
	}}
	const table = `                  devices     first      half      95 %      last
  on record             4    1.00 s    2.00 s    4.00 s    4.00 s
  acknowledged          2    6.00 s    8.00 s         -         -
  current               0         -         -         -         -
`
	if got := s.table(); got != table {
		t.Errorf("got\n%s\nwant\n%s", got, table)
	}
	const picture = `  on record     ▂▄▆█████
  acknowledged       ▂▂▄
  current               ` + `
                0 8.00 s
`
	if got := s.picture(8); got != picture {
		t.Errorf("got\n%s\nwant\n%s", got, picture)
	}
}

func TestReconnect(t *testing.T) {
	t.Parallel()
	const cap = 6 * time.Second
	even := reconnectOf(evenly(120, cap-time.Millisecond), 120, cap)
	if even.peak() != 20 || even.ratio() != 1 || len(even.buckets) != parts {
		t.Errorf("%+v", even)
	}
	stampede := reconnectOf(evenly(120, time.Second/2), 120, cap)
	if stampede.peak() != 120 || stampede.ratio() != 6 {
		t.Errorf("%+v", stampede)
	}
	late := reconnectOf([]time.Duration{0, cap + time.Second}, 2, cap)
	if len(late.buckets) != 8 || late.buckets[7] != 1 {
		t.Errorf("%+v", late)
	}
	text := even.picture(10)
	if strings.Count(text, "██████████ 20\n") != parts || !strings.Contains(text, "1.00 times the mean") ||
		!utf8.ValidString(text) {
		t.Errorf("got\n%s", text)
	}
}

// What is shown of a large fleet has room within 80 columns.
func TestWidth(t *testing.T) {
	t.Parallel()
	const devices, cap = 100_000, 100 * time.Second
	reached := evenly(devices, cap)
	s := spread{devices: devices, milestones: []milestone{{"on record", reached}, {"acknowledged", reached},
		{"in the token", reached}}}
	r := reconnectOf(reached, devices, cap)
	for line := range strings.Lines(s.table() + s.picture(columns) + r.picture(columns/2)) {
		if width := utf8.RuneCountInString(strings.TrimSuffix(line, "\n")); width > 80 {
			t.Errorf("%d columns: %s", width, line)
		}
	}
}

// What is drawn is XML, also where nothing was reached.
func TestSVG(t *testing.T) {
	t.Parallel()
	for _, s := range []spread{
		{},
		{devices: 3, milestones: []milestone{{"a <b> & c", evenly(3, time.Second)}, {"none", nil}}},
	} {
		text := svg("a <title>", s, reconnectOf(evenly(s.devices, time.Second), s.devices, time.Second))
		d := xml.NewDecoder(strings.NewReader(text))
		for {
			_, err := d.Token()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatalf("%v in %s", err, text)
			}
		}
		if strings.Contains(text, "NaN") {
			t.Errorf("%s", text)
		}
	}
}
