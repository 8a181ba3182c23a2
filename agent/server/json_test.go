package server

import (
	"encoding/json"
	"strings"
	"testing"
	"unicode/utf8"
)

func TestTextIsEscaped(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ in, want string }{
		{"", `""`},
		{"plain", `"plain"`},
		{"12345678", `"12345678"`},
		{"1234567\"", `"1234567\u0022"`},
		{"12345678\\90", `"12345678\u005c90"`},
		{"a\x00\x1f\x7fb", "\"a\\u0000\\u001f\x7fb\""},
		{"ü€😀 done", `"ü€😀 done"`},
		{"broken \xff\xc3 bytes", "\"broken \ufffd\ufffd bytes\""},
		{"<&>", `"<&>"`},
	} {
		if got := string(appendText(nil, test.in)); got != test.want {
			t.Errorf("%q: got %s, want %s", test.in, got, test.want)
		}
	}
}

func TestEveryByteAtEveryPlaceIsEscaped(t *testing.T) {
	t.Parallel()
	for c := range 256 {
		for at := range 17 {
			text := strings.Repeat("x", at) + string([]byte{byte(c)}) + strings.Repeat("y", 17)
			checkText(t, text)
		}
	}
}

func FuzzText(f *testing.F) {
	f.Add("https://vault.azure.net")
	f.Add("\"\\\x00\u2028\xff\ufffd")
	f.Fuzz(checkText)
}

// checkText checks that a text comes back from JSON as it was, but for bytes that are no UTF-8.
func checkText(t *testing.T, text string) {
	body := appendText(nil, text)
	var got string
	if err := json.Unmarshal(body, &got); err != nil {
		t.Fatalf("%q became %s: %v", text, body, err)
	}
	want := text
	if !utf8.ValidString(text) {
		want = string([]rune(text))
	}
	if got != want {
		t.Fatalf("%q came back as %q", text, got)
	}
}
