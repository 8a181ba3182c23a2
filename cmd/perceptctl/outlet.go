package main

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

// outlet is standard output or standard error, and the only way there. What perceptctl prints is in part what perceptd, a
// simulated back end, a file, another program or a command line has said, and a terminal obeys what it is given: an outlet
// writes characters that can be seen, tabs and line breaks, and replaces all others. The screen's own control sequences are
// no exception but where the screen understands them.
type outlet struct {
	to       io.Writer
	terminal *os.File // nil: it is none
	redraws  bool     // understands control sequences
	colour   bool
	ascii    bool // a terminal that may take the bytes of other characters for control sequences
}

func (a *app) outlet(to io.Writer) *outlet {
	file, isFile := to.(*os.File)
	if !isFile || !term.IsTerminal(int(file.Fd())) {
		return &outlet{to: to}
	}
	understands := a.getenv("TERM") != "dumb"
	return &outlet{
		to: to, terminal: file, redraws: understands, colour: understands && a.getenv("NO_COLOR") == "", ascii: a.plainText(),
	}
}

// Write writes what of whole text can be seen. It counts all of p as written, or nothing.
func (o *outlet) Write(p []byte) (int, error) { return o.write(p, o.visible(string(p))) }

// redraw writes text in place of the picture that was drawn before, where there is one.
func (o *outlet) redraw(text string, first bool) error {
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

func (o *outlet) write(p []byte, shown string) (int, error) {
	if _, err := io.WriteString(o.to, shown); err != nil {
		return 0, err
	}
	return len(p), nil
}

// visible returns text with what cannot be seen replaced.
func (o *outlet) visible(text string) string {
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
		case o.ascii && r == '…': // what was left out, as in the timeline
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
	for _, sequence := range []string{styleEnd, good.begin(), warning.begin(), bad.begin(), faint.begin(), title.begin(), loud.begin()} {
		if strings.HasPrefix(text, sequence) {
			return sequence
		}
	}
	return ""
}

// encodeJSON writes an answer for programs, with the line breaks of indent where there is one. In strings, what cannot be
// seen is escaped: programs read it as it came.
func (o *outlet) encodeJSON(answer any, indent string) error {
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
