package systemd

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/coreos/go-systemd/v22/journal"
	"go.uber.org/zap/zapcore"
)

// Bounds on an entry. Together they stay below 128 KiB, which a Unix datagram carries with the kernel's
// default buffers; journald would take more only in a sealed memfd.
const (
	longestMessage = 8 << 10
	longestValue   = 2 << 10
	longestInLine  = 256 // of one value in MESSAGE
	mostFields     = 48
	longestName    = 64 // journald drops longer ones
	fieldPrefix    = "PERCEPT_"
	messageIDField = "message_id"
)

// field is one zap field as text. Names of nested fields are joined with a dot.
type field struct{ name, value string }

// flatten evaluates fields in the order of their names; of two with one name the later counts.
func flatten(fields []zapcore.Field) []field {
	encoder := zapcore.NewMapObjectEncoder()
	for _, f := range fields {
		f.AddTo(encoder)
	}
	flat := appendFlat(nil, "", encoder.Fields)
	return flat[:min(len(flat), mostFields)]
}

func appendFlat(flat []field, prefix string, fields map[string]any) []field {
	for _, name := range slices.Sorted(maps.Keys(fields)) {
		if nested, ok := fields[name].(map[string]any); ok {
			flat = appendFlat(flat, prefix+name+".", nested)
			continue
		}
		flat = append(flat, field{prefix + name, cut(text(fields[name]), longestValue)})
	}
	return flat
}

// text writes a value as a person would, and what is no plain value as JSON.
func text(value any) string {
	switch v := value.(type) {
	case string:
		return v
	case time.Time:
		return v.Format(time.RFC3339Nano)
	case time.Duration:
		return v.String()
	case []byte:
		return string(v)
	case bool, int, int8, int16, int32, int64, uint, uint8, uint16, uint32, uint64, uintptr,
		float32, float64, complex64, complex128:
		return fmt.Sprint(v)
	}
	encoded, err := json.Marshal(value)
	if err != nil {
		return fmt.Sprintf("(%T)", value) // its innards may be what it does not want shown
	}
	return string(encoded)
}

// lineOf is the entry as a person reads it: one line, no control characters.
func lineOf(entry zapcore.Entry, fields []field) string {
	var b strings.Builder
	b.WriteString(oneLine(entry.Message, longestMessage/2))
	for _, f := range fields {
		if f.name == messageIDField {
			continue
		}
		value := oneLine(f.value, longestInLine)
		if value == "" || value != f.value || strings.ContainsAny(value, ` "=`) {
			value = strconv.Quote(value)
		}
		b.WriteString(" " + oneLine(f.name, longestName) + "=" + value)
	}
	return cut(b.String(), longestMessage)
}

// encode writes an entry in journald's native protocol.
func encode(entry zapcore.Entry, line string, fields []field) []byte {
	b := appendField(nil, "MESSAGE", line)
	b = appendField(b, "PRIORITY", strconv.Itoa(int(priority(entry.Level))))
	if entry.Caller.Defined {
		b = appendField(b, "CODE_FILE", cut(entry.Caller.File, longestValue))
		b = appendField(b, "CODE_LINE", strconv.Itoa(entry.Caller.Line))
		b = appendField(b, "CODE_FUNC", cut(entry.Caller.Function, longestValue))
	}
	if entry.LoggerName != "" {
		b = appendField(b, fieldPrefix+"LOGGER", cut(entry.LoggerName, longestValue))
	}
	if entry.Stack != "" {
		b = appendField(b, fieldPrefix+"STACK", cut(entry.Stack, longestMessage))
	}
	for _, f := range fields {
		name := fieldName(f.name)
		if f.name == messageIDField && isMessageID(f.value) {
			name = "MESSAGE_ID"
		}
		b = appendField(b, name, f.value)
	}
	return b
}

func priority(level zapcore.Level) journal.Priority {
	switch {
	case level >= zapcore.DPanicLevel:
		return journal.PriCrit
	case level == zapcore.ErrorLevel:
		return journal.PriErr
	case level == zapcore.WarnLevel:
		return journal.PriWarning
	case level == zapcore.InfoLevel:
		return journal.PriInfo
	}
	return journal.PriDebug
}

// appendField writes NAME=value, or, for a value of several lines, the name, its length and the value.
func appendField(b []byte, name, value string) []byte {
	b = append(b, name...)
	if strings.ContainsRune(value, '\n') {
		b = append(b, '\n')
		b = binary.LittleEndian.AppendUint64(b, uint64(len(value)))
	} else {
		b = append(b, '=')
	}
	b = append(b, value...)
	return append(b, '\n')
}

// fieldName makes name a journal field's: capitals, digits and underscores, at most 64 bytes. The prefix
// keeps it from being one of journald's own.
func fieldName(name string) string {
	b := []byte(fieldPrefix + name)
	b = b[:min(len(b), longestName)]
	for i, c := range b {
		switch {
		case 'a' <= c && c <= 'z':
			b[i] = c - 'a' + 'A'
		case 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '_':
		default:
			b[i] = '_'
		}
	}
	return string(b)
}

func isMessageID(id string) bool {
	return len(id) == 32 && strings.Trim(id, "0123456789abcdef") == ""
}

// cut shortens text to at most limit bytes, between characters, and marks it.
func cut(text string, limit int) string {
	const mark = "…"
	if len(text) <= limit {
		return text
	}
	end := limit - len(mark)
	for end > 0 && !utf8.RuneStart(text[end]) {
		end--
	}
	return text[:end] + mark
}
