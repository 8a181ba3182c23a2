package config

import (
	"encoding/binary"
	"strings"
	"testing"
	"unicode/utf16"

	"perceptd/cmd/perceptd/e2e/harness"
)

func TestByteOrderMark(t *testing.T) {
	t.Parallel()
	c, err := Load(harness.WriteConfig(t, map[string]string{
		"config.toml":     "\ufeff" + harness.GoodConfig,
		"config.d/a.toml": "\ufeff[tokens]\r\nsdk_life = \"30m\"\r\n",
	}))
	if err != nil || len(c.Rules.Grants) != 1 || c.Rules.SDKLife == 0 {
		t.Errorf("%v, %+v", err, c.Rules)
	}
	_, err = Load(harness.WriteConfig(t, map[string]string{"config.toml": "\ufeff[sorce]\n"}))
	if err == nil || !strings.Contains(err.Error(), "config.toml:1: unknown key sorce: ") {
		t.Errorf("the line of a fault: %v", err)
	}
}

// A file that an editor, a copy or a power cut has spoilt is named for what it is, with what mends it.
func TestSpoiltText(t *testing.T) {
	t.Parallel()
	utf16le := func(text string) string {
		var b []byte
		for _, c := range utf16.Encode([]rune(text)) {
			b = binary.LittleEndian.AppendUint16(b, c)
		}
		return string(b)
	}
	for _, row := range []struct{ name, text, want string }{
		{"UTF-16", utf16le("\ufeff" + harness.GoodConfig), ": it is written in UTF-16, as some editors of Windows " +
			"do: save it as UTF-8, or iconv -f UTF-16 -t UTF-8 -o "},
		{"UTF-16 without its mark", utf16le(harness.GoodConfig), ": it is written in UTF-16"},
		{"the other UTF-16", "\xfe\xff\x00[", ": it is written in UTF-16"},
		{"Ctrl-Z", "[tokens]\n\x1a", ":2: Ctrl-Z is at the end of the file, as DOS marked it: take it out"},
		{"Ctrl-Z and an end of line", "[tokens]\r\n\x1a\r\n", ":2: Ctrl-Z is at the end"},
		{"NUL bytes", "[tokens]\n\x00\x00\x00\x00", ":2: a NUL byte is in it, as after a power cut"},
		{"Latin-1", "# Gr\xfc\xdfe\n", ":1: byte 0xfc is not UTF-8: save the file as UTF-8"},
		{"curled quotes", "[source]\nkind = “simulated”\n",
			`:2:8: “ is a typographic quote, as word processors and web pages have them: write " in its place`},
		{"low quotes", "[source]\nkind = „simulated“\n", ":2:8: „ is a typographic quote"},
		{"guillemets", "[source]\nkind = «simulated»\n", ":2:8: « is a typographic quote"},
		{"a quote that was opened as it should be", "[source]\nkind = \"simulated”\n", ":2:"},
	} {
		path := harness.WriteConfig(t, map[string]string{"config.toml": row.text})
		r := Read(path)
		if len(r.Faults) != 1 || !strings.HasPrefix(r.Faults[0].Error(), path+":") ||
			!strings.Contains(r.Faults[0].Error(), row.want) {
			t.Errorf("%s: %v\nwant %s", row.name, r.Faults, row.want)
		}
		if _, err := Load(path); err == nil || !strings.Contains(err.Error(), row.want) {
			t.Errorf("%s: loaded: %v", row.name, err)
		}
	}
	quoted := "[[identity]]\nname = \"device\"\n# “in a comment”, and in a text:\n" +
		"resource_id = \"/subscriptions/«x»\"\n"
	if r := Read(harness.WriteConfig(t, map[string]string{"config.toml": quoted})); len(r.Faults) != 0 {
		t.Errorf("where such quotes are text: %v", r.Faults)
	}
}
