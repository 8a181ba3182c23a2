package source

import (
	"crypto/tls"
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
	failed := at.unreachable("no answer from %s within %v", at.dial, waited.Round(time.Millisecond))
	failed.Extent = tokencache.OfIdentity
	return failed
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

// refused sorts an answer with a status other than 200.
func (at place) refused(key tokencache.Key, status int, retry time.Duration, body []byte) *tokencache.FetchError {
	c, own := at.complaintIn(status, body)
	fail := func(kind tokencache.Kind, format string, args ...any) *tokencache.FetchError {
		said := fmt.Sprintf("%s answered %d: ", at.dial, status)
		return &tokencache.FetchError{Kind: kind, Detail: said + fmt.Sprintf(format, args...)}
	}
	later := func(f *tokencache.FetchError) *tokencache.FetchError {
		f.RetryAfter = retry
		return f
	}
	means := c.means()
	switch {
	case status == http.StatusTooManyRequests, status >= 400 && c.says("throttled"):
		return later(fail(tokencache.Throttled, "too many calls from this device; who else asks it?"))
	case status >= 300 && status < 400:
		return at.onTheWay(status, "a redirect")
	case status < 400:
		return fail(tokencache.Malformed, "no token endpoint answers so")
	case looksLikePage(body), status == http.StatusProxyAuthRequired, status == http.StatusNetworkAuthenticationRequired:
		return later(at.onTheWay(status, describe(body)))
	case status == http.StatusNotFound, status == http.StatusRequestTimeout, status == http.StatusGone, status >= 500:
		return later(fail(tokencache.Unreachable, "%s", at.notNow(status)))
	case !own && !at.secretRefused(status):
		return later(at.onTheWay(status, describe(body)))
	case means.words != "" && (means.kind == tokencache.Unreachable || means.kind == tokencache.Throttled):
		return later(fail(means.kind, "%s", means.words))
	case means.words != "":
		return fail(means.kind, "%s", means.words)
	case status == http.StatusBadRequest:
		return at.badRequest(key, c, fail)
	case at.secretRefused(status) && at.form == Arc:
		return fail(tokencache.Refused, "the Arc agent did not accept its own key: systemctl restart himdsd")
	case at.secretRefused(status):
		return fail(tokencache.Refused, "is %s the right one?", envHeader)
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
	vague := c.code == "" || c.code == "invalid_request"
	switch {
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

// retryAfter reads how long the headers ask to wait: Retry-After, and the two in milliseconds of Azure's services. The
// longest holds. now is by the server's clock. What is absent, past or senseless is zero.
func retryAfter(h http.Header, now time.Time) time.Duration {
	longest := secondsOrDate(h.Get("Retry-After"), now)
	for _, name := range []string{"x-ms-retry-after-ms", "retry-after-ms"} {
		wait, _ := waitOf(h.Get(name), time.Millisecond)
		longest = max(longest, wait)
	}
	return longest
}

func secondsOrDate(value string, now time.Time) time.Duration {
	if wait, ok := waitOf(value, time.Second); ok {
		return wait
	}
	at, err := http.ParseTime(strings.TrimSpace(value))
	if err != nil {
		return 0
	}
	return min(max(0, at.Sub(now)), maxRetryAfter)
}

// waitOf reads a whole number of units; a negative one is zero.
func waitOf(value string, unit time.Duration) (time.Duration, bool) {
	n, err := strconv.ParseInt(strings.TrimSpace(value), 10, 64)
	if err != nil {
		return 0, false
	}
	return time.Duration(min(max(0, n), int64(maxRetryAfter/unit))) * unit, true
}
