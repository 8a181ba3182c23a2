package agent

import (
	"time"
	"unicode/utf8"
)

// truncate returns text shortened to n bytes at most, at the end of a character.
func truncate(text string, n int) string {
	if len(text) <= n {
		return text
	}
	for n > 0 && !utf8.RuneStart(text[n]) {
		n--
	}
	return text[:n]
}

// formatTime writes a moment as errors and sentences of the status do.
func formatTime(t time.Time) string { return t.UTC().Format("Jan 2 15:04:05 UTC") }

// notStated stands in sentences for what a token does not say.
const notStated = "not told"
