package server

import (
	"strconv"
	"unicode/utf8"
)

// appendText appends s as a JSON string. Bytes that are no UTF-8 become U+FFFD, as JSON cannot carry
// them.
func appendText(dst []byte, s string) []byte {
	dst = append(dst, '"')
	for {
		n := plainPrefix(s)
		dst = append(dst, s[:n]...)
		if s = s[n:]; s == "" {
			return append(dst, '"')
		}
		if c := s[0]; c < utf8.RuneSelf {
			dst = append(dst, '\\', 'u', '0', '0', hexDigits[c>>4], hexDigits[c&15])
			s = s[1:]
			continue
		}
		r, size := utf8.DecodeRuneInString(s)
		dst = utf8.AppendRune(dst, r)
		s = s[size:]
	}
}

// plainPrefix returns how many bytes at the front of s stand for themselves in a JSON string. It looks
// at eight at once: a token's text is the better part of an answer, and all of it is plain.
func plainPrefix(s string) int {
	const (
		ones  = 0x0101010101010101
		highs = 0x8080808080808080
	)
	n := 0
	for ; n+8 <= len(s); n += 8 {
		b := s[n : n+8]
		x := uint64(b[0]) | uint64(b[1])<<8 | uint64(b[2])<<16 | uint64(b[3])<<24 |
			uint64(b[4])<<32 | uint64(b[5])<<40 | uint64(b[6])<<48 | uint64(b[7])<<56
		quote, slash := x^(ones*'"'), x^(ones*'\\')
		// A byte's high bit is set where the byte is below ' ', '"', '\', or not ASCII; a borrow may
		// set one above such a byte too, which does no harm.
		if (x|(x-ones*' ')|(quote-ones)|(slash-ones))&highs != 0 {
			break
		}
	}
	for n < len(s) && s[n] >= ' ' && s[n] < utf8.RuneSelf && s[n] != '"' && s[n] != '\\' {
		n++
	}
	return n
}

const hexDigits = "0123456789abcdef"

// appendTextField appends a name, which needs no escaping and brings its comma, and a text.
func appendTextField(dst []byte, name, value string) []byte {
	dst = append(dst, name...)
	return appendText(dst, value)
}

// appendDigits appends a name and a number as a string of digits, the SDK forms' way.
func appendDigits(dst []byte, name string, value int64) []byte {
	dst = append(dst, name...)
	dst = append(dst, '"')
	dst = strconv.AppendInt(dst, value, 10)
	return append(dst, '"')
}

// appendNumber appends a name and a number.
func appendNumber(dst []byte, name string, value int64) []byte {
	dst = append(dst, name...)
	return strconv.AppendInt(dst, value, 10)
}
