package api

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"reflect"
	"slices"
	"strings"
	"time"
)

// Decode reads text strictly as a JSON object: a T with no field that T does not have, none of them twice or in another
// case, and nothing after it. Nothing but white space is the zero T. Errors name the field that is wrong.
func Decode[T any](text []byte) (value T, err error) {
	text = bytes.Trim(text, " \t\r\n") // what JSON calls white space
	if len(text) == 0 {
		return value, nil
	}
	var none T
	if text[0] != '{' {
		return none, errors.New("it is no JSON object")
	}
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(&value); err != nil {
		return none, explainJSON(err, fieldsOf(reflect.TypeFor[T]()))
	}
	if _, err := d.Token(); err != io.EOF {
		return none, errors.New("something comes after the JSON object")
	}
	if err := checkKeys(text, fieldsOf(reflect.TypeFor[T]())); err != nil {
		return none, err
	}
	return value, nil
}

// checkKeys looks at the keys of a JSON object, of which encoding/json takes those in another case, and the last of
// several.
func checkKeys(text []byte, fields []string) error {
	d := json.NewDecoder(bytes.NewReader(text))
	_, err := d.Token() // the brace
	seen := make(map[string]bool)
	for err == nil && d.More() {
		var key json.Token
		if key, err = d.Token(); err != nil {
			break
		}
		name, _ := key.(string)
		switch {
		case seen[name]:
			return fmt.Errorf("field %q is there twice", name)
		case len(fields) > 0 && !slices.Contains(fields, name):
			return unknownField(fmt.Sprintf("unknown field %q", name), fields)
		}
		seen[name] = true
		var value json.RawMessage
		err = d.Decode(&value)
	}
	return err // none: the text was decoded before
}

// unknownField returns the error of a field that is none of fields.
func unknownField(text string, fields []string) error {
	if len(fields) == 0 {
		return errors.New(text + ": there is none to give")
	}
	return errors.New(text + ": there are " + strings.Join(fields, ", "))
}

// CheckFilled returns an error that names a field of a JSON object that is there and empty, as in what a script wrote
// whose variable is not set: it was to narrow something down, and would stand for all. Empty are "", null, and what
// alsoEmpty has. A note may be empty.
func CheckFilled(text []byte, alsoEmpty ...any) error {
	var fields map[string]any
	_ = json.Unmarshal(text, &fields) // Decode says what is wrong with it
	empty := append([]any{"", nil}, alsoEmpty...)
	for _, name := range slices.Sorted(maps.Keys(fields)) {
		if !strings.EqualFold(name, "note") && slices.Contains(empty, fields[name]) {
			return fmt.Errorf("its %s is empty: write what it is to be, or leave it out", name)
		}
	}
	return nil
}

// fieldsOf lists the fields that a struct has in JSON.
func fieldsOf(t reflect.Type) []string {
	var names []string
	for _, field := range reflect.VisibleFields(t) {
		if name, _, _ := strings.Cut(field.Tag.Get("json"), ","); name != "" {
			names = append(names, name)
		}
	}
	return names
}

// explainJSON says what a JSON error means to the author of the JSON. fields are those that there may be.
func explainJSON(err error, fields []string) error {
	var kind *json.UnmarshalTypeError
	var syntax *json.SyntaxError
	var moment *time.ParseError
	switch {
	case errors.As(err, &moment):
		return fmt.Errorf("a time in it is %.64q: %s", moment.Value, timeForms)
	case errors.As(err, &kind):
		return fmt.Errorf("field %q is %s, and must be %s", inJSON(kind.Field), given(kind.Value), wanted(kind.Type))
	case errors.As(err, &syntax):
		return fmt.Errorf("it is no JSON from byte %d on", syntax.Offset)
	case errors.Is(err, io.ErrUnexpectedEOF):
		return errors.New("the JSON object does not end")
	}
	text, isJSON := strings.CutPrefix(err.Error(), "json: ")
	if !isJSON { // it is time.Time's own
		return errors.New("a time in it is not a string: " + timeForms)
	}
	if strings.HasPrefix(text, "unknown field") {
		return unknownField(text, fields)
	}
	return errors.New(text)
}

// inJSON returns a field's path as JSON has it: without the structs that are embedded, which encoding/json names by
// their types.
func inJSON(path string) string {
	parts := strings.Split(path, ".")
	return strings.Join(slices.DeleteFunc(parts, func(part string) bool {
		return part != strings.ToLower(part)
	}), ".")
}

// given says what encoding/json calls a value.
func given(value string) string {
	switch kind, _, _ := strings.Cut(value, " "); kind {
	case "string":
		return "a text"
	case "number":
		return "a number"
	case "bool":
		return "true or false"
	case "array":
		return "a list"
	}
	return "an object"
}

// wanted says what JSON has for a type.
func wanted(t reflect.Type) string {
	switch t.Kind() {
	case reflect.String:
		return "a text"
	case reflect.Bool:
		return "true or false"
	case reflect.Slice, reflect.Array:
		return "a list"
	case reflect.Float32, reflect.Float64:
		return "a number"
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		return "a whole number"
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		return "a whole number of 0 or more"
	}
	return "an object"
}

const timeForms = "write one with its zone as 2026-11-23T14:30:00Z or 2026-11-23T15:30:00+01:00"
