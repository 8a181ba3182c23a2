package main

import (
	"io"
	"strings"
	"time"
	"unicode"

	"golang.org/x/term"
)

// The rules of what people see:
//
//   - Standard output carries the answer and nothing else; errors and hints go to standard error.
//   - Text is lower-case facts without a full stop. An error says what is so, its hint what to do.
//     What explains, as `explain` does, is whole sentences.
//   - Times of day are those of the device's time zone.
//   - What needs a person comes first; a simulated back end is said before all else.
//   - Text for people fits the terminal, or 80 columns where there is none. What is too long is cut in
//     its middle with "…" in tables, and stays whole in sentences. Whoever needs all of it asks for --json.
//   - Colour only repeats what the words say, and only on a terminal, and not with $NO_COLOR.
//   - Control characters from outside never reach the terminal: an outlet sees to it. Line breaks from outside begin no
//     line of their own in tables and paragraphs, which clean their text.
//   - A token's text is printed by `token`, which was asked for it, and by nothing else.

// style is how a word is shown on a terminal.
type style string

const (
	plain   style = ""
	good    style = "32"
	warning style = "33"
	bad     style = "1;31"
	faint   style = "2"
	title   style = "1"
	loud    style = "1;7;33"
)

// begin is the control sequence that begins a style, and styleEnd ends each.
func (how style) begin() string { return "\x1b[" + string(how) + "m" }

const styleEnd = "\x1b[0m"

const (
	plainWidth = 80 // columns, where there is no terminal to ask
	leastWidth = 40 // narrower terminals get lines that wrap
)

// screen is what a stream of output can show.
type screen struct {
	width     int
	colour    bool
	plainText bool           // shows ASCII alone
	zone      *time.Location // nil: UTC
}

func (a *app) screen(o *outlet) screen {
	s := screen{plainText: a.plainText(), zone: a.zone(), width: plainWidth, colour: o.colour}
	if o.terminal == nil {
		return s
	}
	// A terminal may not know its width and then says 0.
	if width, _, err := term.GetSize(int(o.terminal.Fd())); err == nil && width > 0 {
		s.width = max(width, leastWidth)
	}
	return s
}

func (s screen) paint(how style, text string) string {
	if !s.colour || how == plain {
		return text
	}
	return how.begin() + text + styleEnd
}

// clean replaces what could steer a terminal; line breaks become spaces.
func clean(text string) string {
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

// cleanLines cleans each line of text, drops empty ones and indents those after the first.
func cleanLines(text string) string {
	var lines []string
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(clean(line)); line != "" {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, "\n  ")
}

// print writes the answer.
func (a *app) print(text string) error {
	_, err := io.WriteString(a.stdout, text)
	return err
}

// printJSON writes the answer for programs: one indented document.
func (a *app) printJSON(answer any) error { return a.stdout.encodeJSON(answer, "  ") }

// printJSONLine writes one of several answers for programs: a line each.
func (a *app) printJSONLine(answer any) error { return a.stdout.encodeJSON(answer, "") }

// plainText reports whether the locale's characters are other than UTF-8's.
func (a *app) plainText() bool {
	for _, name := range []string{"LC_ALL", "LC_CTYPE", "LANG"} {
		if locale := strings.ToLower(a.getenv(name)); locale != "" {
			return !strings.Contains(locale, "utf-8") && !strings.Contains(locale, "utf8")
		}
	}
	return true
}

// getenv returns the value of a variable of the environment that run was given.
func (a *app) getenv(name string) string {
	for _, entry := range a.environ {
		if value, found := strings.CutPrefix(entry, name+"="); found {
			return value
		}
	}
	return ""
}
