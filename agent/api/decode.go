package api

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
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
		return none, explainJSON(err)
	}
	if _, err := d.Token(); err != io.EOF {
		return none, errors.New("something comes after the JSON object")
	}
	return value, nil
}

// explainJSON says what a JSON error means to the author of the JSON.
func explainJSON(err error) error {
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
	return errors.New(text) // an unknown field, with its name
}

const timeForms = "write one with its zone as 2026-11-23T14:30:00Z or 2026-11-23T15:30:00+01:00"
