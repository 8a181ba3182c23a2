package server

import (
	"fmt"
	"strings"
)

// maxParameters is more than any client sends.
const maxParameters = 16

// query is a request's parameters, each once, in the order they came in.
type query struct {
	count int
	list  [maxParameters]parameter
}

type parameter struct{ name, value string }

// get returns a parameter's value, and whether it is there.
func (q *query) get(name string) (string, bool) {
	for i := range q.list[:q.count] {
		if q.list[i].name == name {
			return q.list[i].value, true
		}
	}
	return "", false
}

// parse reads the part of a request URI behind the "?". It is stricter than a form has to be: whatever
// two readers could understand differently is refused. Empty pieces between ampersands are skipped.
func (q *query) parse(raw string) *fault {
	q.count = 0
	for raw != "" {
		var piece string
		piece, raw, _ = strings.Cut(raw, "&")
		if piece == "" {
			continue
		}
		if q.count == maxParameters {
			return badRequest(fmt.Sprintf("more than %d query parameters", maxParameters))
		}
		name, value, _ := strings.Cut(piece, "=")
		name, okName := unescape(name)
		value, okValue := unescape(value)
		switch {
		case !okName || !okValue:
			return badRequest("the query is malformed: write special characters as %XX")
		case name == "":
			return badRequest("the query has a parameter without a name")
		}
		if _, twice := q.get(name); twice {
			return badRequest(fmt.Sprintf("query parameter %q is there twice", name))
		}
		q.list[q.count] = parameter{name, value}
		q.count++
	}
	return nil
}

// unescape undoes the form's encoding. It reports false for a broken escape and for bytes that no
// client leaves unescaped.
func unescape(s string) (string, bool) {
	escaped := false
	for i := range len(s) {
		switch c := s[i]; {
		case c <= ' ' || c >= 0x7f || c == '#':
			return "", false
		case c == '%' || c == '+':
			escaped = true
		}
	}
	if !escaped {
		return s, true
	}
	plain := make([]byte, 0, len(s))
	for i := 0; i < len(s); i++ {
		switch c := s[i]; c {
		case '+':
			plain = append(plain, ' ')
		case '%':
			if i+2 >= len(s) {
				return "", false
			}
			high, low := hexDigit(s[i+1]), hexDigit(s[i+2])
			if high > 15 || low > 15 {
				return "", false
			}
			plain = append(plain, high<<4|low)
			i += 2
		default:
			plain = append(plain, c)
		}
	}
	return string(plain), true
}

// hexDigit returns a hexadecimal digit's value, or 255.
func hexDigit(c byte) byte {
	switch {
	case '0' <= c && c <= '9':
		return c - '0'
	case 'a' <= c && c <= 'f':
		return c - 'a' + 10
	case 'A' <= c && c <= 'F':
		return c - 'A' + 10
	}
	return 255
}
