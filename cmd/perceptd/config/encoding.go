package config

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/pelletier/go-toml/v2"
)

// plainText returns what a file says, without a byte order mark. The error names what no configuration has, and what
// editors and copying put there.
func plainText(file File) ([]byte, error) {
	text := file.Text
	if isUTF16(text) {
		return nil, fmt.Errorf("%s: it is written in UTF-16, as some editors of Windows do: save it as UTF-8, or "+
			"iconv -f UTF-16 -t UTF-8 -o %[1]s.new %[1]s && mv %[1]s.new %[1]s", file.Path)
	}
	text = bytes.TrimPrefix(text, []byte("\xef\xbb\xbf"))
	if at := bytes.IndexByte(text, 0x1a); at >= 0 && len(bytes.Trim(text[at:], "\x1a\r\n\x00 ")) == 0 {
		return nil, fmt.Errorf("%s:%d: Ctrl-Z is at the end of the file, as DOS marked it: take it out, with "+
			"sed -i 's/\\x1a//g' %s", file.Path, lineAt(text, at), file.Path)
	}
	if at := bytes.IndexByte(text, 0); at >= 0 {
		return nil, fmt.Errorf("%s:%d: a NUL byte is in it, as after a power cut while it was written, or in a file "+
			"that is not text: write the file anew", file.Path, lineAt(text, at))
	}
	if !utf8.Valid(text) {
		at := 0
		for r, size := utf8.DecodeRune(text); r != utf8.RuneError || size > 1; r, size = utf8.DecodeRune(text[at:]) {
			at += size
		}
		return nil, fmt.Errorf("%s:%d: byte 0x%02x is not UTF-8: save the file as UTF-8, not as Latin-1 or "+
			"Windows-1252", file.Path, lineAt(text, at), text[at])
	}
	return text, nil
}

// isUTF16 reports whether text has UTF-16's mark, or each second of its first bytes is zero, as in UTF-16 without one.
func isUTF16(text []byte) bool {
	if bytes.HasPrefix(text, []byte("\xff\xfe")) || bytes.HasPrefix(text, []byte("\xfe\xff")) {
		return true
	}
	const enough = 4
	if len(text) < enough {
		return false
	}
	return text[0] == 0 && text[2] == 0 && text[1] != 0 && text[3] != 0 ||
		text[1] == 0 && text[3] == 0 && text[0] != 0 && text[2] != 0
}

func lineAt(text []byte, offset int) int { return bytes.Count(text[:offset], []byte("\n")) + 1 }

// typographic are the quotes that word processors and web pages put in place of " and '.
const typographic = "“”„‟‘’‚‛«»‹›"

// notTOML says where a file is not TOML, and what to write there.
func notTOML(file string, text []byte, err error) error {
	var syntax *toml.DecodeError
	if !errors.As(err, &syntax) {
		return fmt.Errorf("%s: %s", file, strings.TrimPrefix(err.Error(), "toml: "))
	}
	line, column := syntax.Position()
	what := strings.TrimPrefix(syntax.Error(), "toml: ")
	lines := strings.Split(string(text), "\n")
	if at := strings.IndexAny(lines[min(max(line, 1), len(lines))-1], typographic); at >= 0 {
		quote, _ := utf8.DecodeRuneInString(lines[line-1][at:])
		what = fmt.Sprintf("%c is a typographic quote, as word processors and web pages have them: "+
			"write \" in its place", quote)
	}
	return fmt.Errorf("%s:%d:%d: %s", file, line, column, what)
}
