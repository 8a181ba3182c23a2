package server

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"perceptd/agent/api"
)

// rejected answers POST /v1/rejected.
func (s *Server) rejected(req *request) *apiError {
	body, f := readBody[api.Rejection](req)
	if f != nil {
		return f
	}
	challenge, err := readChallenge(body.Claims)
	if err != nil {
		return badRequest("field \"claims\" is no claims challenge: " + err.Error() +
			"; send the value of claims in the WWW-Authenticate header as it came, or the JSON object in it, " +
			"or the whole header from Bearer on")
	}
	body.Claims = string(challenge)
	advice, err := s.Agent.Rejected(req.ctx, req.caller, body)
	if err != nil {
		return errorOf(err)
	}
	req.body = encode(advice)
	return nil
}

// maxClaims bounds a decoded claims challenge.
const maxClaims = 8 << 10

// readChallenge returns the JSON object of a claims challenge, which comes as that object, or in base64 of
// either alphabet, or in a whole WWW-Authenticate header. Nil: there is none.
func readChallenge(text string) ([]byte, error) {
	text = strings.TrimSpace(text)
	if isBearer(text) {
		claims, err := claimsParameter(text)
		if err != nil {
			return nil, err
		}
		text = strings.TrimSpace(claims)
	}
	if text == "" {
		return nil, nil
	}
	object := []byte(text)
	if text[0] != '{' {
		var err error
		if object, err = decodeBase64(text); err != nil {
			return nil, err
		}
	}
	switch {
	case len(object) > maxClaims:
		return nil, fmt.Errorf("it is larger than %d bytes", maxClaims)
	case len(object) == 0 || object[0] != '{' || !json.Valid(object):
		return nil, errors.New("it does not hold a JSON object")
	}
	return object, nil
}

// decodeBase64 reads either alphabet of base64, padded or not.
func decodeBase64(text string) ([]byte, error) {
	plain := strings.NewReplacer("-", "+", "_", "/").Replace(strings.TrimRight(text, "="))
	object, err := base64.RawStdEncoding.Strict().DecodeString(plain)
	if err != nil || len(text)-len(plain) > 2 {
		return nil, errors.New("it is neither JSON nor base64")
	}
	return object, nil
}

const bearer = "bearer"

// isBearer reports whether text is a WWW-Authenticate header for bearer tokens.
func isBearer(text string) bool {
	if len(text) < len(bearer) || !strings.EqualFold(text[:len(bearer)], bearer) {
		return false
	}
	return len(text) == len(bearer) || text[len(bearer)] == ' '
}

// claimsParameter returns the claims of a WWW-Authenticate header that isBearer (RFC 9110, 11.6.1): names
// with values, in quotes or without, between commas. Empty: there are none.
func claimsParameter(header string) (string, error) {
	broken := errors.New("the header cannot be read: its parameters are not name=\"value\" with commas between them")
	rest := header[len(bearer):]
	for {
		rest = strings.TrimLeft(rest, " \t,")
		if rest == "" {
			return "", nil
		}
		name, after, found := strings.Cut(rest, "=")
		if !found {
			return "", broken
		}
		value, after, ok := parameterValue(strings.TrimLeft(after, " \t"))
		if !ok {
			return "", broken
		}
		if strings.EqualFold(strings.TrimSpace(name), "claims") {
			return value, nil
		}
		rest = after
	}
}

// parameterValue reads a value and returns it and what comes after it.
func parameterValue(s string) (value, rest string, ok bool) {
	if !strings.HasPrefix(s, `"`) {
		end := strings.IndexAny(s, ", \t")
		if end < 0 {
			end = len(s)
		}
		return s[:end], s[end:], end > 0
	}
	var unquoted strings.Builder
	for i := 1; i < len(s); i++ {
		switch c := s[i]; {
		case c == '"':
			return unquoted.String(), s[i+1:], true
		case c == '\\' && i+1 < len(s):
			i++
			unquoted.WriteByte(s[i])
		default:
			unquoted.WriteByte(c)
		}
	}
	return "", "", false
}
