package server

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/grants"
)

// apiError is why a request gets no answer of status 200.
type apiError struct {
	status     int
	code       api.Code
	detail     string             // says what to do next; fit for the caller's eyes
	choices    []string           // identities to name
	granted    []*grants.Identity // the same, where they are those of a request for a token
	nearMiss   *grants.NearMiss   // with code not_granted
	suggestion *grants.Suggestion // with code not_granted
	retryAfter time.Duration      // with status 503 and 429; zero: not known
	allow      string             // with status 405: the methods that the path answers
	sdkCode    string             // the SDK forms' "error" where it is not the status's usual one
	counted    bool               // the agent has counted the request already
	again      bool               // the next request on the connection can prove the caller

	// What was done all the same; nil: nothing was.
	change *api.PolicyChangeAnswer
	rule   *api.DenyAnswer
}

func badRequest(detail string) *apiError {
	return &apiError{status: http.StatusBadRequest, code: api.CodeBadRequest, detail: detail}
}

// tokenError turns the agent's error over a request for a token, which the agent has counted, into an
// answer.
func tokenError(err error) *apiError {
	e := errorOf(err)
	e.counted = true
	return e
}

// errorOf turns the agent's error into an answer.
func errorOf(err error) *apiError {
	var why *agent.Error
	switch {
	case errors.As(err, &why):
		if status, known := api.StatusOf[why.Code]; known {
			return &apiError{
				status: status, code: why.Code, detail: why.Detail, choices: why.Choices, retryAfter: why.RetryAfter,
				granted: why.Granted, nearMiss: why.NearMiss, suggestion: why.Suggestion,
			}
		}
	case errors.Is(err, context.Canceled):
		return &apiError{
			status: http.StatusServiceUnavailable, code: api.CodeUnreachable,
			detail: "the request was given up before there was an answer: ask again",
		}
	}
	return internalError()
}

// internalError says nothing of what went wrong, which could hold a secret.
func internalError() *apiError {
	return &apiError{
		status: http.StatusInternalServerError, code: api.CodeInternal,
		detail: "perceptd has a fault: its log says where",
	}
}

const (
	// defaultRetrySeconds gets every good SDK an answer within 6 to 14 seconds of trying.
	defaultRetrySeconds = 2
	// longestRetrySeconds is low: Node, Python and Terraform really wait that long, each time, while the caller of
	// the SDK hangs; and asking a cache costs the back end nothing.
	longestRetrySeconds = 10
)

// retrySeconds returns the value of Retry-After. With the codes that no SDK gets it is the whole truth.
func (e *apiError) retrySeconds() int {
	if e.retryAfter <= 0 {
		return defaultRetrySeconds
	}
	seconds := int((e.retryAfter + time.Second - 1) / time.Second)
	if e.code == api.CodeNotYet || e.code == api.CodeBusy {
		return seconds
	}
	return min(seconds, longestRetrySeconds)
}

// problem renders f for our own form: RFC 9457.
func (e *apiError) problem() []byte {
	return encode(api.Problem{
		Type:    "urn:percept:problem:" + string(e.code),
		Title:   http.StatusText(e.status),
		Status:  e.status,
		Detail:  e.detail,
		Code:    e.code,
		Choices: e.choices,

		NearMiss:   agent.NearMissOf(e.nearMiss, true),
		Suggestion: agent.SuggestionOf(e.suggestion, true),

		PolicyChange: e.change,
		DenyRule:     e.rule,
	})
}

// sdkError is an error of the two SDK forms. Each SDK shows another pair of its fields.
type sdkError struct {
	Error         string   `json:"error"`
	Description   string   `json:"error_description"`
	StatusCode    int      `json:"statusCode"`
	Message       string   `json:"message"`
	CorrelationID string   `json:"correlationId"`
	Code          api.Code `json:"code"`
}

// sdkError renders f for the two SDK forms.
func (e *apiError) sdkError(shape form, correlationID string) []byte {
	text := e.sdkText(shape)
	return encode(sdkError{
		Error:         e.sdkErrorCode(),
		Description:   text,
		StatusCode:    e.status,
		Message:       text,
		CorrelationID: correlationID,
		Code:          e.code,
	})
}

// notFoundText is what IMDS says of an identity that it does not know; az looks for it.
const notFoundText = "Identity not found"

func (e *apiError) sdkText(shape form) string {
	switch e.code {
	case api.CodeAmbiguous:
		// The first part is what IMDS says.
		return "Multiple user assigned identities exist, please specify the clientId / resourceId of the identity" +
			" in the token request. Granted are: " + sendable(e.granted, shape)
	case api.CodeUnknownIdentity:
		if len(e.granted) == 0 {
			return e.detail + "; no identity is granted to this caller for that resource"
		}
		return e.detail + "; this caller may send " + sendable(e.granted, shape)
	case api.CodeFaultyGrant:
		if len(e.granted) > 0 {
			return e.detail + "; this caller may send " + sendable(e.granted, shape)
		}
	case api.CodeIdentityNotFound:
		if !strings.HasPrefix(e.detail, notFoundText) {
			return notFoundText + ": " + e.detail
		}
	case api.CodeNotGranted:
		return e.detail + suggestionText(agent.SuggestionOf(e.suggestion, true))
	}
	return e.detail
}

// suggestionText says in a part of a sentence what an administrator can do so that the caller gets what it asked for.
func suggestionText(s *api.Suggestion) string {
	const longest = 1 << 10 // bytes of a command that people copy from an error's text
	switch {
	case s == nil:
		return ""
	case len(s.Command) > longest:
		return "; to allow it: perceptctl doctor, on the device, has the grant to add"
	case s.AddTo != nil:
		return fmt.Sprintf("; to allow it: add the resource to %v and run perceptctl reload, or run sudo %s",
			s.AddTo, s.Command)
	}
	return "; to allow it: sudo " + s.Command
}

func (e *apiError) sdkErrorCode() string {
	switch {
	case e.sdkCode != "":
		return e.sdkCode
	case e.status == http.StatusForbidden:
		return "access_denied"
	case e.status == http.StatusServiceUnavailable:
		return "temporarily_unavailable"
	case e.status == http.StatusInternalServerError:
		return "server_error"
	}
	return "invalid_request"
}

// newCorrelationID returns a random UUID, which is what App Service gives.
func newCorrelationID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails: it would end the program
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// encode returns v as JSON. v is a struct of ours, for which encoding cannot fail.
func encode(v any) []byte {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false) // people read it with curl
	if err := e.Encode(v); err != nil {
		panic(err)
	}
	return b.Bytes()
}

// busyRetryAfter is when a caller with too many requests at once may ask again.
const busyRetryAfter = 5 * time.Second

func busy(detail string) *apiError {
	return &apiError{status: http.StatusTooManyRequests, code: api.CodeBusy, detail: detail, retryAfter: busyRetryAfter}
}

// stopping is the answer to a request that would have waited longer when the daemon goes down.
func stopping() *apiError {
	return &apiError{
		status: http.StatusServiceUnavailable, code: api.CodeUnreachable, detail: "perceptd is going down: ask again",
	}
}
