package source

import (
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"syscall"
	"time"

	"perceptd/tokencache"
)

const maxRetryAfter = 365 * 24 * time.Hour // only so that no sum overflows; the cache has a bound of its own

func malformed(format string, args ...any) *tokencache.FetchError {
	return &tokencache.FetchError{Kind: tokencache.Malformed, Detail: fmt.Sprintf(format, args...)}
}

func (at place) unreachable(format string, args ...any) *tokencache.FetchError {
	return &tokencache.FetchError{Kind: tokencache.Unreachable, Detail: fmt.Sprintf(format, args...) + ": " + at.advice()}
}

// silent is the failure of an endpoint that took a request and did not answer it in time.
func (at place) silent(waited time.Duration) *tokencache.FetchError {
	if waited >= time.Second {
		waited = waited.Round(time.Second)
	}
	return at.unreachable("no answer from %s within %v", at.dial, waited.Round(time.Millisecond))
}

// broken is the failure of a round trip. What err says is not repeated, since some of net/http's
// errors quote what the peer sent.
func (at place) broken(err error) *tokencache.FetchError {
	var (
		errno syscall.Errno
		dns   *net.DNSError
		cert  *tls.CertificateVerificationError
		alert tls.AlertError
		op    *net.OpError
		slow  net.Error
	)
	switch {
	case errors.As(err, &cert):
		return at.unreachable("the certificate of %s is not trusted: is it in the system's store, and is the clock right?", at.dial)
	case errors.As(err, &alert):
		return at.unreachable("%s refused the TLS handshake", at.dial)
	case errors.As(err, &dns):
		return at.unreachable("the name in %s cannot be resolved", at.dial)
	case errors.As(err, &slow) && slow.Timeout():
		return at.unreachable("no connection to %s within %v", at.dial, dialTimeout)
	case errors.As(err, &errno):
		return at.unreachable("connection to %s: %v", at.dial, errno)
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return at.unreachable("%s closed the connection before its answer was complete", at.dial)
	case errors.As(err, &op):
		return at.unreachable("the connection to %s broke", at.dial)
	}
	return malformed("%s does not answer in HTTP as a token endpoint does: what listens there?", at.dial)
}

// complaint is what endpoints say beside a status other than 200. It is recognised, never repeated.
type complaint struct {
	Error       string `json:"error"`
	Description string `json:"error_description"`
	Message     string `json:"message"` // App Service
}

func (c complaint) says(words string) bool {
	return strings.Contains(strings.ToLower(c.Description+"\n"+c.Message), words)
}

// refused sorts an answer with a status other than 200.
func (at place) refused(key tokencache.Key, status int, retry time.Duration, body []byte) *tokencache.FetchError {
	var c complaint
	if json.Unmarshal(body, &c) != nil {
		c = complaint{} // an error without a readable reason
	}
	fail := func(kind tokencache.Kind, format string, args ...any) *tokencache.FetchError {
		said := fmt.Sprintf("%s answered %d: ", at.dial, status)
		return &tokencache.FetchError{Kind: kind, Detail: said + fmt.Sprintf(format, args...)}
	}
	switch {
	case status == http.StatusTooManyRequests, status >= 400 && c.says("throttled"):
		f := fail(tokencache.Throttled, "too many calls from this device; who else asks it?")
		f.RetryAfter = retry
		return f
	case status == http.StatusNotFound, status == http.StatusRequestTimeout, status == http.StatusGone, status >= 500:
		f := fail(tokencache.Unreachable, "%s", at.notNow(status))
		f.RetryAfter = retry
		return f
	case status >= 300 && status < 400:
		return fail(tokencache.Malformed, "a redirect, which no token endpoint sends")
	case status < 400:
		return fail(tokencache.Malformed, "no token endpoint answers so")
	case status == http.StatusBadRequest:
		return at.badRequest(key, c, fail)
	case status == http.StatusUnauthorized && at.form == AppService:
		return fail(tokencache.Refused, "is %s the right one?", envHeader)
	case status == http.StatusUnauthorized && at.form == Arc:
		return fail(tokencache.Refused, "the Arc agent did not accept its own key: systemctl restart himdsd")
	}
	return fail(tokencache.Refused, "no token of %v for %s", key.Selector, key.Resource)
}

// notNow is the next step for a status that time heals.
func (at place) notNow(status int) string {
	switch {
	case at.form == IMDS && (status == http.StatusNotFound || status == http.StatusGone):
		return "the metadata service is being updated"
	case status == http.StatusNotFound:
		return "nothing at that path; " + at.advice()
	case status >= 500 && at.form == Arc:
		return "the Arc agent has trouble, or is offline: azcmagent show"
	case status >= 500:
		return "the endpoint has trouble, or does not know the resource"
	}
	return "not now"
}

// badRequest tells an unknown identity from the other reasons for status 400. Azure asks not to
// branch on the description, but puts different reasons under the same error code.
func (at place) badRequest(key tokencache.Key, c complaint, fail func(tokencache.Kind, string, ...any) *tokencache.FetchError) *tokencache.FetchError {
	s := key.Selector
	unknown := c.says("identity not found") || c.says("managed identity found for specified")
	vague := c.Error == "" || c.Error == "invalid_request"
	switch {
	case c.Error == "invalid_resource" || c.Error == "invalid_target":
		return fail(tokencache.Refused, "the directory knows no resource %s: check its App ID URI", key.Resource)
	case c.says("multiple user assigned identities"):
		return fail(tokencache.IdentityNotFound, "this device has no system-assigned identity and several user-assigned ones: "+
			"configure one by client_id, object_id or resource_id")
	case unknown && s.Kind == tokencache.SystemAssigned:
		return fail(tokencache.IdentityNotFound, "this device has no system-assigned identity: enable it")
	case unknown, vague && at.form != AppService && s.Kind != tokencache.SystemAssigned:
		return fail(tokencache.IdentityNotFound, "no identity %v on this device: check the ID and that the identity is assigned", s)
	}
	return fail(tokencache.Refused, "it does not take the request for %s", key.Resource)
}

// retryAfter reads a Retry-After header, of seconds or a date; now is by the server's clock. What is
// absent, past or senseless is zero.
func retryAfter(value string, now time.Time) time.Duration {
	value = strings.TrimSpace(value)
	if n, err := strconv.ParseInt(value, 10, 64); err == nil {
		return min(max(0, time.Duration(min(n, int64(maxRetryAfter/time.Second)))*time.Second), maxRetryAfter)
	}
	at, err := http.ParseTime(value)
	if err != nil {
		return 0
	}
	return min(max(0, at.Sub(now)), maxRetryAfter)
}
