package identityproxy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"perceptd/agent/api"
)

const (
	// patience is how long perceptd may be away, or be started anew, without anybody noticing. Beyond it, SDKs are told
	// to try again: none of them has a useful timeout of its own.
	patience = 8 * time.Second
	// longest is how long perceptd may take to answer. It answers within some 10 seconds.
	longest = 30 * time.Second
	maxBody = 1 << 20 // bytes
)

// Pauses between two tries.
const (
	shortPause = 20 * time.Millisecond
	longPause  = 500 * time.Millisecond
)

// handedBack are the headers of an answer that mean something to a client of the two forms.
var handedBack = [...]string{"Content-Type", "Cache-Control", "Retry-After", api.PermissionsHeader, api.AudienceHeader}

// forward hands a request on to path of the token socket, with one header, and returns perceptd's answer. A request for a
// token may be made twice: so as long as there is no whole answer, and perceptd was not away for too long, it is made again.
func (r *Relay) forward(q *http.Request, path, header, value string) (reply, *refusal) {
	asked := &http.Request{
		Method: http.MethodGet, URL: &url.URL{Scheme: "http", Host: "localhost", Path: path, RawQuery: q.URL.RawQuery},
		Header: http.Header{header: {value}, "User-Agent": {"perceptctl-exec"}},
	}
	ctx, cancel := context.WithTimeout(q.Context(), longest)
	defer cancel()
	begun := time.Now()
	for pause := shortPause; ; pause = min(2*pause, longPause) {
		given, err := r.ask(asked.Clone(ctx))
		switch {
		case err == nil:
			return given, nil
		case ctx.Err() != nil || time.Since(begun)+pause > patience:
			return reply{}, away("perceptd does not answer: " + err.Error() + ": look at systemctl status perceptd, and whether its folder is mounted")
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
	}
}

// errAgain is an answer to a process that perceptd believes once it has asked again, as a young one on an old kernel.
var errAgain = errors.New("it cannot tell who is calling yet")

// errLeaving is an answer of a perceptd that is about to end: the next one may give another.
var errLeaving = errors.New("it is just ending")

// errStranger is an answer that perceptd never gives: a page, or a text. What it says of a request must not reach an SDK, which
// takes a 403 for a refusal.
var errStranger = errors.New("what answers at its socket is not perceptd")

func isObject(body []byte) bool {
	var members map[string]json.RawMessage
	return json.Unmarshal(body, &members) == nil && members != nil
}

// codeIn returns the code of a refusal of perceptd's, or "".
func codeIn(body []byte) api.Code {
	var refusal struct{ Code api.Code }
	_ = json.Unmarshal(body, &refusal) // what is no refusal of perceptd's has none
	return refusal.Code
}

// ask asks perceptd once.
func (r *Relay) ask(q *http.Request) (reply, error) {
	answer, err := r.socket.RoundTrip(q)
	var system *net.OpError
	switch {
	case errors.As(err, &system) || err != nil && q.Context().Err() != nil:
		return reply{}, err
	case err != nil: // net/http quotes what was sent, which may be a token
		return reply{}, errors.New("its answer broke off, or is not HTTP")
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(io.LimitReader(answer.Body, maxBody+1))
	switch {
	case err != nil:
		return reply{}, errors.New("its answer broke off")
	case len(body) > maxBody:
		return reply{}, fmt.Errorf("its answer has more than %d bytes", maxBody)
	case !isObject(body):
		return reply{}, errStranger
	case answer.StatusCode == http.StatusServiceUnavailable && answer.Close:
		return reply{}, errLeaving
	case answer.StatusCode == http.StatusServiceUnavailable && codeIn(body) == api.CodeAskAgain:
		return reply{}, errAgain
	}
	given := reply{status: answer.StatusCode, header: make(map[string]string), body: body}
	for _, name := range handedBack {
		if value := answer.Header.Get(name); value != "" {
			given.header[name] = value
		}
	}
	return given, nil
}

// reply is a whole answer.
type reply struct {
	status int
	header map[string]string // by canonical name
	body   []byte
}

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
