package agent

import (
	"strings"
	"unicode"
	"unicode/utf8"

	"perceptd/tokencache"
)

const maxNote = tokencache.MaxNote

// checkNote checks what people write beside a policy change or a deny rule.
func checkNote(note string) *Error {
	switch {
	case len(note) > maxNote:
		return badChange("the note is %d bytes long, more than %d", len(note), maxNote)
	case !utf8.ValidString(note):
		return badChange("the note is not UTF-8")
	case strings.ContainsFunc(note, func(r rune) bool { return !unicode.IsPrint(r) }):
		return badChange("the note has a character that cannot be printed, such as a line end: write it in one line")
	}
	return nil
}
