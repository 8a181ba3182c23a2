// Package term lays out text for people, as wide as their terminal is, and writes it there.
//
// What it shows may come from outside, and a terminal obeys control characters. An Output replaces them in all that
// it writes; tables and paragraphs also keep a line break from outside from beginning a line of its own.
package term

import (
	"strings"
	"unicode"
	"unicode/utf8"
)

// Style is how a text is shown. Colour only repeats what the words say.
type Style string

const (
	Plain   Style = ""
	Good    Style = "32"
	Warning Style = "33"
	Bad     Style = "1;31"
	Faint   Style = "2"
	Title   Style = "1"
	Loud    Style = "1;7;33"
)

// begin is the control sequence that begins a style, and styleEnd ends each.
func (how Style) begin() string { return "\x1b[" + string(how) + "m" }

const styleEnd = "\x1b[0m"

const (
	DefaultWidth = 80 // columns, where there is no terminal to ask
	LeastWidth   = 40 // of a terminal; a narrower one wraps the lines
)

// Screen is what an Output can show. The zero value is of no width: each word has a line of its own.
type Screen struct {
	Width  int  // columns
	Colour bool // it understands styles
	ASCII  bool // by the locale, it shows ASCII alone
}

// Paint returns text in a style, on a screen with colours.
func (s Screen) Paint(how Style, text string) string {
	if !s.Colour || how == Plain {
		return text
	}
	return how.begin() + text + styleEnd
}

// Gap stands between columns, and before what is indented.
const Gap = "  "

// Paragraph breaks text into lines between words. The first begins with lead, the others with as
// many spaces. A word that is longer than a line has one of its own and stays whole, since it may be a path to copy:
// the terminal wraps it.
func (s Screen) Paragraph(lead, text string, how Style) string {
	room := s.Width - utf8.RuneCountInString(lead)
	var lines []string
	line := ""
	for _, word := range strings.Fields(Clean(text)) {
		if line != "" && utf8.RuneCountInString(line)+1+utf8.RuneCountInString(word) <= room {
			line += " " + word
			continue
		}
		if line != "" {
			lines = append(lines, line)
		}
		line = word
	}
	lines = append(lines, line)
	var b strings.Builder
	for _, line := range lines {
		b.WriteString(s.Paint(how, strings.TrimRight(lead+line, " ")) + "\n")
		lead = strings.Repeat(" ", utf8.RuneCountInString(lead))
	}
	return b.String()
}

// Clean replaces what could steer a terminal; line breaks become spaces.
func Clean(text string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\t':
			return ' '
		case unicode.IsPrint(r):
			return r
		}
		return unicode.ReplacementChar
	}, text)
}

// CleanLines cleans each line of text, drops empty ones and indents those after the first.
func CleanLines(text string) string {
	var lines []string
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(Clean(line)); line != "" {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, "\n"+Gap)
}

// Cut takes the middle out of text that is longer than width, and says so with "…".
func Cut(text string, width int) string {
	runes := []rune(text)
	if len(runes) <= width {
		return text
	}
	head := (width - 1) / 2
	tail := width - 1 - head
	return string(runes[:head]) + "…" + string(runes[len(runes)-tail:])
}
