package binding

import (
	"slices"
	"strings"
)

// tellsApart reports whether a value, in small letters, can be one device's own: firmware that was never given one says
// zeros, counts, or what somebody should have replaced. A device whose own value is taken for such is bound to the next
// best.
func tellsApart(value string) bool {
	const longest = 256
	if len(value) > longest || slices.ContainsFunc(saysNobody,
		func(words string) bool { return strings.Contains(value, words) }) {
		return false
	}
	digits := plain(value)
	for _, before := range []string{"sn", "sys", "mb"} { // SYS-1234567890
		digits = strings.TrimPrefix(digits, before)
	}
	return !filler(digits) && !filler(swapped(digits))
}

// saysNobody is what stands in words that no device is told apart by. No serial number is likely to have them.
var saysNobody = []string{
	"filled by", "default", "not ", "none", "null", "empty", "unknow", "undefined", "unspecified", "invalid", "n/a",
	"o.e.m", "oem_", "oem ",
	"serial", "system", "number", "asset", "chassis", "computer", "customer", "reserved", "example", "sample",
}

// copied are values that makers have left in many devices, and that no rule tells.
var copied = []string{
	"123456781234567890abcddeefaabbcc",
	"6ab5b300538d10149fb5b0684d007b53",
	"4c4c454400002010802080c04f202020", // "DELL", and blanks for the service tag
	"deadbeefdeadbeefdeadbeefdeadbeef",
	"123456fvgv3i0b8o5n6n7k",
	"iatpass",
}

// plain is a value without what stands between its letters and digits.
func plain(value string) string {
	return strings.Map(func(r rune) rune {
		if r >= '0' && r <= '9' || r >= 'a' && r <= 'z' {
			return r
		}
		return -1
	}, value)
}

// swapped is a UUID's digits with the bytes of its first three fields the other way round, which is how firmware of
// other releases means the same; any other value as it is.
func swapped(digits string) string {
	if len(digits) != 32 {
		return digits
	}
	var s strings.Builder
	for _, field := range [][2]int{{0, 8}, {8, 12}, {12, 16}} {
		for at := field[1] - 2; at >= field[0]; at -= 2 {
			s.WriteString(digits[at : at+2])
		}
	}
	return s.String() + digits[16:]
}

// filler reports whether letters and digits are what nobody drew: few, of few kinds, repeated, or counted.
func filler(digits string) bool {
	const fewest, kinds = 6, 3
	different := make(map[byte]bool)
	for i := range len(digits) {
		different[digits[i]] = true
	}
	return len(digits) < fewest || len(different) < kinds || slices.Contains(copied, digits) || repeats(digits) ||
		runs(digits, 1) || runs(digits, -1) || runs(halved(digits), 1) || runs(halved(digits), -1) || counts(digits)
}

// repeats reports whether digits are the same few three times or more.
func repeats(digits string) bool {
	for n := 1; 3*n <= len(digits); n++ {
		if len(digits)%n == 0 && strings.Repeat(digits[:n], len(digits)/n) == digits {
			return true
		}
	}
	return false
}

// runs reports whether digits are runs, each of four or more: 0123456789abcdef, 123412341234, 9876543210.
func runs(digits string, step int) bool {
	const fewest = 4
	run := 1
	for i := 1; i < len(digits); i++ {
		from, to := digits[i-1], digits[i]
		if step < 0 {
			from, to = to, from
		}
		switch {
		case follows(from, to):
			run++
		case run < fewest:
			return false
		default:
			run = 1
		}
	}
	return run >= fewest
}

// follows reports whether somebody who counts says b after a: by tens, by sixteens, or through the alphabet.
func follows(a, b byte) bool {
	switch a {
	case '9':
		return b == '0' || b == 'a'
	case '0':
		return b == '1' || b == 'a' // …890ab…
	case 'f':
		return b == '0' || b == 'g'
	case 'z':
		return b == '0' || b == 'a'
	}
	return b == a+1
}

// halved is one of each pair, where digits are pairs of the same: 112233; else nothing.
func halved(digits string) string {
	var half []byte
	for i := 0; i < len(digits); i += 2 {
		if i+1 == len(digits) || digits[i] != digits[i+1] {
			return ""
		}
		half = append(half, digits[i])
	}
	return string(half)
}

// counts reports whether digits are numbers of the same length, four or more, of which each is one more than the one
// before: 00010203, 0002000300040005.
func counts(digits string) bool {
	for _, width := range []int{2, 4, 8} {
		n := len(digits) / width
		if n < 4 || len(digits)%width != 0 {
			continue
		}
		counted := true
		for i := width; i < len(digits) && counted; i += width {
			counted = digits[i:i+width] == next(digits[i-width:i])
		}
		if counted {
			return true
		}
	}
	return false
}

// next is the number after that one, in as many hexadecimal digits.
func next(number string) string {
	const hex = "0123456789abcdef"
	digits := []byte(number)
	for i := len(digits) - 1; i >= 0; i-- {
		at := strings.IndexByte(hex, digits[i]) + 1 // 0 for what is no digit, after which comes none
		digits[i] = hex[at%len(hex)]
		if at < len(hex) {
			break
		}
	}
	return string(digits)
}
