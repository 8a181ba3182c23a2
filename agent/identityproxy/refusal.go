package identityproxy

import (
	"encoding/json"
	"net/http"
	"strconv"
)

// refusal is why a request gets no answer of perceptd's.
type refusal struct {
	status int
	detail string // says what to do next; fit for the caller's eyes
	header map[string]string
}

// refuse is for who has not shown the secret, or asks what no SDK does: the connection ends.
func refuse(status int, detail string) *refusal {
	return &refusal{status: status, detail: detail, header: map[string]string{"Connection": "close"}}
}

// away is that perceptd does not answer. SDKs that try again find it within some 10 seconds.
func away(detail string) *refusal {
	return &refusal{
		status: http.StatusServiceUnavailable, detail: detail,
		header: map[string]string{"Retry-After": strconv.Itoa(retryAfter)},
	}
}

const retryAfter = 2 // seconds

// reply renders f with the fields that SDKs show, each another pair.
func (f *refusal) reply() reply {
	// Strings and a number cannot fail to be encoded.
	body, _ := json.Marshal(struct {
		Error       string `json:"error"`
		Description string `json:"error_description"`
		StatusCode  int    `json:"statusCode"`
		Message     string `json:"message"`
	}{f.code(), f.detail, f.status, f.detail})
	header := map[string]string{"Content-Type": "application/json", "Cache-Control": "no-store"}
	for name, value := range f.header {
		header[name] = value
	}
	return reply{status: f.status, header: header, body: append(body, '\n')}
}

func (f *refusal) code() string {
	switch f.status {
	case http.StatusForbidden, http.StatusUnauthorized:
		return "access_denied"
	case http.StatusServiceUnavailable:
		return "temporarily_unavailable"
	}
	return "invalid_request"
}
