package server

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"strings"
)

// maxBody bounds the body of a POST request.
const maxBody = 64 << 10

// readBody reads a request's body as one JSON object of T's fields and no others. No body is T's zero
// value.
func readBody[T any](x *exchange) (T, *fault) {
	var value T
	if f := noQuery(x); f != nil {
		return value, f
	}
	if f := checkContentType(x.request); f != nil {
		return value, f
	}
	text, err := io.ReadAll(io.LimitReader(x.request.Body, maxBody+1))
	switch {
	case err != nil:
		return value, badRequest("the body did not arrive whole")
	case len(text) > maxBody:
		return value, badRequest(fmt.Sprintf("the body is larger than %d bytes", maxBody))
	}
	value, err = decodeBody[T](text)
	if err != nil {
		return value, badRequest("the body is not what this path takes: " + err.Error())
	}
	return value, nil
}

func checkContentType(r *http.Request) *fault {
	values := r.Header["Content-Type"]
	if len(values) == 0 {
		return nil
	}
	if kind, _, err := mime.ParseMediaType(values[0]); len(values) > 1 || err != nil || kind != "application/json" {
		return badRequest("the body must be JSON: send Content-Type: application/json, once, or none")
	}
	return nil
}

// decodeBody is the strict reading of a body: its errors name the field that is wrong.
func decodeBody[T any](text []byte) (value T, err error) {
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
		return none, plainly(err)
	}
	if _, err := d.Token(); err != io.EOF {
		return none, errors.New("something comes after the JSON object")
	}
	return value, nil
}

// plainly says what a JSON error means to somebody who wrote the JSON.
func plainly(err error) error {
	var kind *json.UnmarshalTypeError
	var syntax *json.SyntaxError
	switch {
	case errors.As(err, &kind):
		return fmt.Errorf("field %q is a %s, it must be a %v", kind.Field, kind.Value, kind.Type)
	case errors.As(err, &syntax):
		return fmt.Errorf("it is no JSON from byte %d on", syntax.Offset)
	case errors.Is(err, io.ErrUnexpectedEOF):
		return errors.New("the JSON object does not end")
	}
	// What is left is an unknown field, with its name.
	return errors.New(strings.TrimPrefix(err.Error(), "json: "))
}
