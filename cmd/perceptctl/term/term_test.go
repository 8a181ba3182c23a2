package term

import (
	"bytes"
	"encoding/json"
	"fmt"
	"regexp"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"
)

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
		if got := Cut(test.text, test.width); got != test.want {
			t.Errorf("cut(%q, %d) = %q, want %q", test.text, test.width, got, test.want)
		}
	}
}

func TestTableThatCannotFit(t *testing.T) {
	t.Parallel()
	s := Screen{Width: 10}
	got := s.Table([]Column{{Title: "NAME", Shrinks: true}, {Title: "STATE"}},
		[]Row{{Cells: []Cell{{Text: "a-long-name"}, {Text: "fetching"}}}})
	want := "NAME\na-lo…-name\n  state:\n  fetching\n"
	if got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
}

func TestCleanLines(t *testing.T) {
	t.Parallel()
	got := CleanLines("first\x1b[2J\n\n\tsecond\r\nthird")
	if want := "first\uFFFD[2J\n  second\uFFFD\n  third"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// A path that is longer than a line is whole, so that it can be copied.
func TestLongWordsStayWhole(t *testing.T) {
	t.Parallel()
	path := "/var/lib/percept/" + strings.Repeat("a", 30) + ".unreadable-20261123T120000.123456789Z"
	s := Screen{Width: 60}
	if got, want := s.Paragraph("trouble: ", "it is now "+path+"; look",
		Bad), "trouble: it is now\n         "+path+";\n         look\n"; got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
	if got, want := s.Paragraph("trouble: ", path, Bad), "trouble: "+path+"\n"; got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
}

// No line of a table ends in spaces, though what its last cell says does.
func TestNoSpacesAtTheEnd(t *testing.T) {
	t.Parallel()
	columns := []Column{{Title: "ID"}, {Title: "NOTE", Shrinks: true}}
	rows := []Row{{Cells: []Cell{{Text: "a \n"}, {Text: "b \t"}}}, {Cells: []Cell{{Text: "c"}, {Text: "  "}}}}
	if got, want := (Screen{Width: 80}).Table(columns, rows), "ID   NOTE\na    b\nc\n"; got != want {
		t.Errorf("%q", got)
	}
}

// overWide reports whether a line is over the width, but for one that is because of a word which is that long by
// itself, behind what the longest lead takes.
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
		s := Screen{Width: max(LeastWidth, min(width, 300))}
		columns := []Column{{Title: "IDENTITY", Shrinks: true}, {Title: "RESOURCE", Shrinks: true}, {Title: "STATE"}}
		shown := s.Table(columns, []Row{{Cells: []Cell{{Text: name}, {Text: text}, {Text: "fresh", Style: Good}},
			Notes: []Cell{{Text: text}}}})
		shown += s.Paragraph("trouble: ", text, Bad)
		for line := range strings.Lines(shown) {
			line = strings.TrimSuffix(line, "\n")
			if overWide(line, s.Width) {
				t.Errorf("%d columns of %d: %q", utf8.RuneCountInString(line), s.Width, line)
			}
			if strings.TrimRight(line, " ") != line {
				t.Errorf("spaces at the end of %q", line)
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
	if got := (&Output{ascii: true}).visible(Cut("https://vault.azure.net", 12)); got != "https~re.net" {
		t.Errorf("%q", got)
	}
}

func TestLocales(t *testing.T) {
	t.Parallel()
	tests := []struct {
		environ map[string]string
		ascii   bool
	}{
		{nil, true},
		{map[string]string{"LANG": "C"}, true},
		{map[string]string{"LANG": "de_DE.UTF-8"}, false},
		{map[string]string{"LANG": "de_DE.utf8", "LC_ALL": ""}, false},
		{map[string]string{"LANG": "de_DE.utf8", "LC_ALL": "POSIX"}, true},
		{map[string]string{"LANG": "C", "LC_CTYPE": "C.UTF-8"}, false},
	}
	for _, test := range tests {
		if got := asciiLocale(func(name string) string { return test.environ[name] }); got != test.ascii {
			t.Errorf("%q: %t", test.environ, got)
		}
	}
}

// painted are the control sequences of Paint, whole.
var painted = regexp.MustCompile("\x1b\\[(?:1|2|32|33|1;31|1;7;33)m|\x1b\\[0m")

// FuzzOutput checks that what goes through an Output cannot steer a terminal, and that JSON stays what it was.
func FuzzOutput(f *testing.F) {
	f.Add("a\x1b[2J\x1b]0;title\x07b\u009b31mc\rd\ne\x7f\u202ef\u200b\x00g\th\u2028i\x1b[31mj\xff\x9b2J\xc2")
	f.Add("\x1b[0m\x1b[1;31m")
	f.Fuzz(func(t *testing.T, text string) {
		for _, o := range []Output{{}, {ascii: true}, {colour: true}, {colour: true, ascii: true}} {
			shown := o.visible(text)
			if o.colour {
				shown = painted.ReplaceAllString(shown, "")
			}
			for _, r := range shown {
				if r != '\n' && r != '\t' && !unicode.IsPrint(r) || o.ascii && r > unicode.MaxASCII {
					t.Errorf("%+v: %q of %q", o, shown, text)
				}
			}
			if !utf8.ValidString(shown) {
				t.Errorf("%+v: %q of %q", o, shown, text)
			}
			var printed bytes.Buffer
			o.to = &printed
			if err := o.JSON(text, ""); err != nil {
				t.Fatal(err)
			}
			var back string
			if err := json.Unmarshal(printed.Bytes(), &back); err != nil ||
				back != strings.ToValidUTF8(text, "\ufffd") && utf8.ValidString(text) {
				t.Errorf("%+v: %q came back as %q (%v)", o, text, back, err)
			}
			if fmt.Sprint(o.visible(printed.String())) != printed.String() {
				t.Errorf("JSON is not as it was printed: %q", &printed)
			}
		}
	})
}
