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
	// unavailableTimeout is how long a request waits for a perceptd that is away or restarts. After it, the SDK is
	// asked to try again: none of them has a useful timeout of its own.
	unavailableTimeout = 8 * time.Second
	// answerTimeout is how long perceptd may take to answer. It answers within about 10 seconds.
	answerTimeout = 30 * time.Second
	maxBody       = 1 << 20 // bytes
)

// Pauses between two tries.
const (
	minPause = 20 * time.Millisecond
	maxPause = 500 * time.Millisecond
)

// forwardedHeaders are the headers of an answer that mean something to a client of the two forms.
var forwardedHeaders = [...]string{"Content-Type", "Cache-Control", "Retry-After",
	api.PermissionsHeader, api.AudienceHeader}

// forward sends a request on to path of the token socket, with one header, and returns perceptd's answer. A request for
// a token may be repeated: as long as there is no whole answer, it is, until perceptd was away for too long.
func (p *Proxy) forward(r *http.Request, path, header, value string) (reply, *refusal) {
	upstream := &http.Request{
		Method: http.MethodGet, URL: &url.URL{Scheme: "http", Host: "localhost", Path: path, RawQuery: r.URL.RawQuery},
		Header: http.Header{header: {value}, "User-Agent": {"perceptctl-exec"}},
	}
	ctx, cancel := context.WithTimeout(r.Context(), answerTimeout)
	defer cancel()
	begun := time.Now()
	for pause := minPause; ; pause = min(2*pause, maxPause) {
		answer, err := p.roundTrip(upstream.Clone(ctx))
		switch {
		case err == nil:
			return answer, nil
		case ctx.Err() != nil || time.Since(begun)+pause > unavailableTimeout:
			return reply{}, unavailable("perceptd does not answer: " + err.Error() +
				": look at systemctl status perceptd, and whether its folder is mounted")
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
	}
}

// errAskAgain is an answer to a process that perceptd can attest only at its next request, as a young one on an old
// kernel.
var errAskAgain = errors.New("it cannot tell who is calling yet")

// errShuttingDown is an answer of a perceptd that is about to end: the next one may answer otherwise.
var errShuttingDown = errors.New("it is just ending")

// errNotPerceptd is an answer that perceptd never gives: a page, or a text. It must not reach an SDK, which would take
// a 403 for a refusal.
var errNotPerceptd = errors.New("what answers at its socket is not perceptd")

func isObject(body []byte) bool {
	var members map[string]json.RawMessage
	return json.Unmarshal(body, &members) == nil && members != nil
}

// codeIn returns the code of a refusal of perceptd's, or "".
func codeIn(body []byte) api.Code {
	var refusal struct{ Code api.Code }
	_ = json.Unmarshal(body, &refusal) // any other body has no code
	return refusal.Code
}

// roundTrip asks perceptd once.
func (p *Proxy) roundTrip(r *http.Request) (reply, error) {
	answer, err := p.socket.RoundTrip(r)
	var system *net.OpError
	switch {
	case errors.As(err, &system) || err != nil && r.Context().Err() != nil:
		return reply{}, err
	case err != nil: // net/http quotes what was sent, which may be a token
		return reply{}, errors.New("its answer broke off, or is not HTTP")
	}
	defer answer.Body.Close()
	if answer.StatusCode == http.StatusSwitchingProtocols { // its body is the connection, which nothing ends
		return reply{}, errNotPerceptd
	}
	body, err := io.ReadAll(io.LimitReader(answer.Body, maxBody+1))
	switch {
	case err != nil:
		return reply{}, errors.New("its answer broke off")
	case len(body) > maxBody:
		return reply{}, fmt.Errorf("its answer has more than %d bytes", maxBody)
	case !isObject(body):
		return reply{}, errNotPerceptd
	case answer.StatusCode == http.StatusServiceUnavailable && answer.Close:
		return reply{}, errShuttingDown
	case answer.StatusCode == http.StatusServiceUnavailable && codeIn(body) == api.CodeAskAgain:
		return reply{}, errAskAgain
	}
	forwarded := reply{status: answer.StatusCode, header: make(map[string]string), body: body}
	for _, name := range forwardedHeaders {
		if value := answer.Header.Get(name); value != "" {
			forwarded.header[name] = value
		}
	}
	return forwarded, nil
}

// reply is a whole answer.
type reply struct {
	status int
	header map[string]string // by canonical name
	body   []byte
}

// refusal is the answer to a request that is not forwarded, or that perceptd does not answer.
type refusal struct {
	status int
	detail string // says what to do next; fit for the caller's eyes
	header map[string]string
}

// refuse is for a request without the secret, or one that no SDK sends: the connection ends.
func refuse(status int, detail string) *refusal {
	return &refusal{status: status, detail: detail, header: map[string]string{"Connection": "close"}}
}

// unavailable says that perceptd does not answer. An SDK that tries again finds it within about 10 seconds.
func unavailable(detail string) *refusal {
	return &refusal{
		status: http.StatusServiceUnavailable, detail: detail,
		header: map[string]string{"Retry-After": strconv.Itoa(retryAfter)},
	}
}

const retryAfter = 2 // seconds

// reply renders f with the fields that SDKs show: some show the first two, others the last two.
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
