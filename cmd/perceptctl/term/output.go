package term

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"

	"golang.org/x/term"
)

// Output is standard output or standard error, and the only way there. What is printed is in part what a daemon, a
// simulated back end, a file, another program or a command line has said, and a terminal obeys what it is given: an
// Output writes characters that can be seen, tabs and line breaks, and replaces all others. A Screen's own control
// sequences are no exception but where the terminal understands them.
type Output struct {
	to       io.Writer
	terminal *os.File // nil: it is none
	redraws  bool     // understands control sequences
	colour   bool
	ascii    bool // a terminal that may take the bytes of other characters for control sequences

	locale bool // the locale's characters are other than UTF-8's
}

// Open returns the Output to a stream. getenv reads what is known of the terminal: TERM, NO_COLOR and the locale.
func Open(to io.Writer, getenv func(string) string) *Output {
	o := &Output{to: to, locale: asciiLocale(getenv)}
	if file, isFile := to.(*os.File); isFile && term.IsTerminal(int(file.Fd())) {
		o.terminal, o.ascii = file, o.locale
		o.redraws = getenv("TERM") != "dumb"
		o.colour = o.redraws && getenv("NO_COLOR") == ""
	}
	return o
}

// asciiLocale reports whether the locale's characters are other than UTF-8's.
func asciiLocale(getenv func(string) string) bool {
	for _, name := range []string{"LC_ALL", "LC_CTYPE", "LANG"} {
		if locale := strings.ToLower(getenv(name)); locale != "" {
			return !strings.Contains(locale, "utf-8") && !strings.Contains(locale, "utf8")
		}
	}
	return true
}

// Screen returns what the Output can show now.
func (o *Output) Screen() Screen {
	s := Screen{Width: DefaultWidth, Colour: o.colour, ASCII: o.locale}
	if o.terminal == nil {
		return s
	}
	// A terminal may not know its width and then says 0.
	if width, _, err := term.GetSize(int(o.terminal.Fd())); err == nil && width > 0 {
		s.Width = max(width, LeastWidth)
	}
	return s
}

// IsTerminal reports whether a person may be reading.
func (o *Output) IsTerminal() bool { return o.terminal != nil }

// Redraws reports whether Redraw can be used.
func (o *Output) Redraws() bool { return o.redraws }

// Write writes what can be seen of whole text. It counts all of p as written, or nothing.
func (o *Output) Write(p []byte) (int, error) { return o.write(p, o.visible(string(p))) }

// Redraw writes text in place of what was drawn before. first says that nothing was.
func (o *Output) Redraw(text string, first bool) error {
	text = o.visible(text)
	if first {
		text = "\x1b[2J\x1b[H" + text
	} else {
		// Line by line, so that the picture does not flicker as a cleared screen would.
		text = "\x1b[H" + strings.ReplaceAll(text, "\n", "\x1b[K\n") + "\x1b[J"
	}
	_, err := o.write(nil, text)
	return err
}

func (o *Output) write(p []byte, shown string) (int, error) {
	if _, err := io.WriteString(o.to, shown); err != nil {
		return 0, err
	}
	return len(p), nil
}

// visible returns text with what cannot be seen replaced.
func (o *Output) visible(text string) string {
	var b strings.Builder
	for text != "" {
		if style := styleAt(text); style != "" && o.colour {
			b.WriteString(style)
			text = text[len(style):]
			continue
		}
		r, size := utf8.DecodeRuneInString(text)
		text = text[size:]
		switch {
		case o.ascii && r == '…': // what was left out
			b.WriteByte('~')
		case o.ascii && r > unicode.MaxASCII:
			b.WriteByte('?')
		case r == '\n' || r == '\t' || unicode.IsPrint(r):
			b.WriteRune(r)
		case o.ascii:
			b.WriteByte('?')
		default:
			b.WriteRune(unicode.ReplacementChar)
		}
	}
	return b.String()
}

// styleAt returns the control sequence of a style, or of a style's end, that text begins with; else "".
func styleAt(text string) string {
	if text[0] != '\x1b' {
		return ""
	}
	for _, sequence := range []string{
		styleEnd, Good.begin(), Warning.begin(), Bad.begin(), Faint.begin(), Title.begin(), Loud.begin(),
	} {
		if strings.HasPrefix(text, sequence) {
			return sequence
		}
	}
	return ""
}

// JSON writes an answer for programs, with the line breaks of indent where there is one. In strings, characters that
// cannot be seen are escaped, so that programs read them as they came.
func (o *Output) JSON(answer any, indent string) error {
	var plain bytes.Buffer
	encoder := json.NewEncoder(&plain)
	encoder.SetEscapeHTML(false)
	encoder.SetIndent("", indent)
	if err := encoder.Encode(answer); err != nil {
		return err
	}
	var b strings.Builder
	for _, r := range plain.String() {
		switch {
		case r == '\n' || unicode.IsPrint(r) && !(o.ascii && r > unicode.MaxASCII):
			b.WriteRune(r)
		case r > 0xffff:
			high, low := utf16.EncodeRune(r)
			fmt.Fprintf(&b, `\u%04x\u%04x`, high, low)
		default:
			fmt.Fprintf(&b, `\u%04x`, r)
		}
	}
	_, err := io.WriteString(o, b.String())
	return err
}
