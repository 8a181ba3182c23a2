package agent

import (
	"time"
	"unicode/utf8"
)

// cut returns text shortened to n bytes, at the end of a character.
func cut(text string, n int) string {
	if len(text) <= n {
		return text
	}
	for n > 0 && !utf8.RuneStart(text[n]) {
		n--
	}
	return text[:n]
}

func stamp(t time.Time) string { return t.UTC().Format("Jan 2 15:04:05 UTC") }

func orUntold(value string) string {
	if value == "" {
		return "not told"
	}
	return value
}
