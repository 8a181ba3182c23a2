package main

import (
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"
)

func TestSpan(t *testing.T) {
	t.Parallel()
	tests := []struct {
		d    time.Duration
		want string
	}{
		{-time.Hour, "0s"},
		{0, "0s"},
		{999 * time.Millisecond, "0s"},
		{9 * time.Second, "9s"},
		{time.Minute, "1m"},
		{4*time.Minute + 12*time.Second, "4m 12s"},
		{time.Hour, "1h"},
		{time.Hour + 59*time.Second, "1h"},
		{11*time.Hour + 52*time.Minute + 59*time.Second, "11h 52m"},
		{24 * time.Hour, "1d"},
		{76 * time.Hour, "3d 4h"},
		{400 * 24 * time.Hour, "400d"},
	}
	for _, test := range tests {
		if got := span(test.d); got != test.want {
			t.Errorf("span(%v) = %q, want %q", test.d, got, test.want)
		}
	}
}

func TestCut(t *testing.T) {
	t.Parallel()
	tests := []struct {
		text  string
		width int
		want  string
	}{
		{"", 8, ""},
		{"12345678", 8, "12345678"},
		{"123456789", 8, "123…6789"},
		{"äöüäöüäöü", 8, "äöü…üäöü"},
		{"123456789", 1, "…"},
	}
	for _, test := range tests {
		if got := cut(test.text, test.width); got != test.want {
			t.Errorf("cut(%q, %d) = %q, want %q", test.text, test.width, got, test.want)
		}
	}
}

func TestTableThatCannotFit(t *testing.T) {
	t.Parallel()
	s := screen{width: 10}
	got := s.table([]column{{"NAME", true}, {"STATE", false}}, []row{{cells: []cell{{"a-long-name", plain}, {"fetching", plain}}}})
	want := "NAME      STATE\na-l…name  fetching\n"
	if got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
}

func TestCleanLines(t *testing.T) {
	t.Parallel()
	got := cleanLines("first\x1b[2J\n\n\tsecond\r\nthird")
	if want := "first\uFFFD[2J\n  second\uFFFD\n  third"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// FuzzLayout checks what holds whatever the daemon says: no line is over the width, and nothing
// that a terminal obeys gets through.
func FuzzLayout(f *testing.F) {
	f.Add("https://vault.azure.net", "a few words of trouble", 80)
	f.Add("\x1b[31m\xff\u202e\u00a0", "one\ntwo "+strings.Repeat("x", 200), 40)
	f.Fuzz(func(t *testing.T, name, text string, width int) {
		s := screen{width: max(leastWidth, min(width, 300))}
		columns := []column{{"IDENTITY", true}, {"RESOURCE", true}, {"STATE", false}}
		shown := s.table(columns, []row{{cells: []cell{{name, plain}, {text, plain}, {"fresh", good}}, notes: []cell{{text, plain}}}})
		shown += s.paragraph("trouble: ", text, bad)
		for line := range strings.Lines(shown) {
			line = strings.TrimSuffix(line, "\n")
			if n := utf8.RuneCountInString(line); n > s.width {
				t.Errorf("%d columns of %d: %q", n, s.width, line)
			}
			for _, r := range line {
				if !unicode.IsPrint(r) && r != unicode.ReplacementChar {
					t.Errorf("%q gets through in %q", r, line)
				}
			}
		}
	})
}
