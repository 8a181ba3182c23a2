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
	want := "NAME\na-lo…-name\n  state:\n  fetching\n"
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

// A path that is longer than a line is whole, so that it can be copied.
func TestLongWordsStayWhole(t *testing.T) {
	t.Parallel()
	path := "/var/lib/percept/" + strings.Repeat("a", 30) + ".unreadable-20261123T120000.123456789Z"
	s := screen{width: 60}
	if got, want := s.paragraph("trouble: ", "it is now "+path+"; look", bad), "trouble: it is now\n         "+path+";\n         look\n"; got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
	if got, want := s.paragraph("trouble: ", path, bad), "trouble: "+path+"\n"; got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
}

// overWide reports whether a line is over the width, but for one that is because of a word which is that long by itself, behind
// what the longest lead takes.
func overWide(line string, width int) bool {
	const longestLead = 14
	words := strings.Fields(line)
	return utf8.RuneCountInString(line) > width && utf8.RuneCountInString(words[len(words)-1]) <= width-longestLead
}

// FuzzLayout checks what holds whatever the daemon says: no line is over the width but for one word, and nothing
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
			if overWide(line, s.width) {
				t.Errorf("%d columns of %d: %q", utf8.RuneCountInString(line), s.width, line)
			}
			for _, r := range line {
				if !unicode.IsPrint(r) && r != unicode.ReplacementChar {
					t.Errorf("%q gets through in %q", r, line)
				}
			}
		}
	})
}

// A terminal without UTF-8 shows what was cut as the timeline does, and not as a character of a URL.
func TestCutWithoutUTF8(t *testing.T) {
	t.Parallel()
	if got := (&outlet{ascii: true}).visible(cut("https://vault.azure.net", 12)); got != "https~re.net" {
		t.Errorf("%q", got)
	}
}
