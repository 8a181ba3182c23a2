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

// Decode reads text strictly as a JSON object: a T with no field that T does not have, and nothing after it. Nothing
// but white space is the zero T. Errors name the field that is wrong.
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
	return value, nil
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
		return fmt.Errorf("field %q is a %s, it must be a %v", kind.Field, kind.Value, kind.Type)
	case errors.As(err, &syntax):
		return fmt.Errorf("it is no JSON from byte %d on", syntax.Offset)
	case errors.Is(err, io.ErrUnexpectedEOF):
		return errors.New("the JSON object does not end")
	}
	text, isJSON := strings.CutPrefix(err.Error(), "json: ")
	if !isJSON { // it is time.Time's own
		return errors.New("a time in it is not a string: " + timeForms)
	}
	switch isUnknown := strings.HasPrefix(text, "unknown field"); {
	case isUnknown && len(fields) == 0:
		text += ": there is none to give"
	case isUnknown:
		text += ": there are " + strings.Join(fields, ", ")
	}
	return errors.New(text)
}

const timeForms = "write one with its zone as 2026-11-23T14:30:00Z or 2026-11-23T15:30:00+01:00"
