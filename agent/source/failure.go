package source

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
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

func (at target) unreachable(format string, args ...any) *tokencache.FetchError {
	return &tokencache.FetchError{Kind: tokencache.Unreachable, Detail: fmt.Sprintf(format, args...) + ": " +
		at.advice()}
}

// timeout is the failure of an endpoint that accepted a request and did not answer it in time.
func (at target) timeout(waited time.Duration) *tokencache.FetchError {
	if waited >= time.Second {
		waited = waited.Round(time.Second)
	}
	failed := at.unreachable("no answer from %s within %v", at.dial, waited.Round(time.Millisecond))
	failed.Extent = tokencache.OfIdentity
	return failed
}

// connectionFailure is the failure of a round trip. What err says is not repeated, since some of net/http's
// errors quote what the peer sent.
func (at target) connectionFailure(err error) *tokencache.FetchError {
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
		return at.unreachable(
			"the certificate of %s is not trusted: is it in the system's store, and is the clock right?", at.dial)
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

// statusFailure sorts an answer with a status other than 200.
func (at target) statusFailure(key tokencache.Key, status int, retry time.Duration,
	body []byte) *tokencache.FetchError {
	c, own := at.parseError(status, body)
	fail := func(kind tokencache.Kind, format string, args ...any) *tokencache.FetchError {
		said := fmt.Sprintf("%s answered %d: ", at.dial, status)
		return &tokencache.FetchError{Kind: kind, Detail: said + fmt.Sprintf(format, args...)}
	}
	later := func(f *tokencache.FetchError) *tokencache.FetchError {
		f.RetryAfter = retry
		return f
	}
	meaning := c.meaning()
	switch {
	case status == http.StatusTooManyRequests, status >= 400 && c.mentions("throttled"):
		return later(fail(tokencache.Throttled, "too many calls from this device; who else asks it?"))
	case status >= 300 && status < 400:
		return at.intercepted(status, "a redirect")
	case status < 400:
		return fail(tokencache.Malformed, "no token endpoint answers so")
	case looksLikePage(body), status == http.StatusProxyAuthRequired,
		status == http.StatusNetworkAuthenticationRequired:
		return later(at.intercepted(status, describe(body)))
	case status == http.StatusNotFound, status == http.StatusRequestTimeout, status == http.StatusGone, status >= 500:
		return later(fail(tokencache.Unreachable, "%s", at.retryText(status)))
	case !own && !at.secretRefused(status):
		return later(at.intercepted(status, describe(body)))
	case meaning.words != "" && (meaning.kind == tokencache.Unreachable || meaning.kind == tokencache.Throttled):
		return later(fail(meaning.kind, "%s", meaning.words))
	case meaning.words != "":
		return fail(meaning.kind, "%s", meaning.words)
	case status == http.StatusBadRequest:
		return at.badRequest(key, c, fail)
	case at.secretRefused(status) && at.form == Arc:
		return fail(tokencache.Refused, "the Arc agent did not accept its own key: systemctl restart himdsd")
	case at.secretRefused(status):
		return fail(tokencache.Refused, "is %s the right one?", envHeader)
	}
	return fail(tokencache.Refused, "no token of %v for %s", key.Selector, key.Resource)
}

// retryText is the next step for a status that time heals.
func (at target) retryText(status int) string {
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

// badRequest separates an unknown identity from the other reasons for status 400. Azure asks clients not to
// branch on the description, but gives different reasons the same error code.
func (at target) badRequest(key tokencache.Key, c errorResponse,
	fail func(tokencache.Kind, string, ...any) *tokencache.FetchError) *tokencache.FetchError {
	s := key.Selector
	unknown := c.mentions("identity not found") || c.mentions("managed identity found for specified")
	vague := c.code == "" || c.code == "invalid_request"
	switch {
	case c.mentions("multiple user assigned identities"):
		return fail(tokencache.IdentityNotFound,
			"this device has no system-assigned identity and several user-assigned ones: "+
				"configure one by client_id, object_id or resource_id")
	case unknown && s.Kind == tokencache.SystemAssigned:
		return fail(tokencache.IdentityNotFound, "this device has no system-assigned identity: enable it")
	case unknown, vague && at.form != AppService && s.Kind != tokencache.SystemAssigned:
		return fail(tokencache.IdentityNotFound,
			"no identity %v on this device: check the ID and that the identity is assigned", s)
	}
	return fail(tokencache.Refused, "it does not take the request for %s", key.Resource)
}

// retryAfter reads how long the headers ask to wait: Retry-After, and the two in milliseconds of Azure's services. The
// longest holds. now is by the server's clock. What is absent, past or senseless is zero.
func retryAfter(h http.Header, now time.Time) time.Duration {
	longest := parseRetryAfter(h.Get("Retry-After"), now)
	for _, name := range []string{"x-ms-retry-after-ms", "retry-after-ms"} {
		wait, _ := parseWait(h.Get(name), time.Millisecond)
		longest = max(longest, wait)
	}
	return longest
}

func parseRetryAfter(value string, now time.Time) time.Duration {
	if wait, ok := parseWait(value, time.Second); ok {
		return wait
	}
	at, err := http.ParseTime(strings.TrimSpace(value))
	if err != nil {
		return 0
	}
	return min(max(0, at.Sub(now)), maxRetryAfter)
}

// parseWait reads a whole number of units; a negative one is zero.
func parseWait(value string, unit time.Duration) (time.Duration, bool) {
	n, err := strconv.ParseInt(strings.TrimSpace(value), 10, 64)
	if err != nil {
		return 0, false
	}
	return time.Duration(min(max(0, n), int64(maxRetryAfter/unit))) * unit, true
}

// errorResponse is what an endpoint says in its own form beside a status other than 200. It is recognised, never
// repeated.
type errorResponse struct {
	code        string // the OAuth error code; App Service has none
	description string // in a human language, in lower case
}

func (c errorResponse) mentions(words string) bool { return strings.Contains(c.description, words) }

// parseError reads the body of an answer with a status other than 200. own: the body has the form of such an endpoint.
// Nothing else speaks for Azure.
func (at target) parseError(status int, body []byte) (_ errorResponse, own bool) {
	f := parseFields(body)
	code, noCode := f.text("error")
	description, noDescription := f.text("error_description")
	message, noMessage := f.text("message") // App Service
	number, _ := f.digits("statusCode")
	c := errorResponse{code: code, description: strings.ToLower(description + "\n" + message)}

	_, known := oauthErrors[code]
	oauth := noCode == nil && noDescription == nil &&
		(known || description != "" && (code == "" || codeForm.MatchString(code)))
	appService := at.form == AppService && noMessage == nil && message != "" && number == strconv.Itoa(status)
	if !oauth && !appService {
		return errorResponse{}, false
	}
	return c, true
}

var (
	codeForm   = regexp.MustCompile(`^[a-z0-9_]+$`)
	aadstsForm = regexp.MustCompile(`aadsts([0-9]{4,8})`)
)

// errorMeaning is what an error code stands for. The kinds Unreachable and Throttled pass with time; the others need a
// person. Without words the HTTP status decides.
type errorMeaning struct {
	kind  tokencache.Kind
	words string
}

// oauthErrors are the OAuth error codes of endpoints.
var oauthErrors = map[string]errorMeaning{
	"temporarily_unavailable": {tokencache.Unreachable, "Entra ID cannot answer for the moment"},
	"server_error":            {tokencache.Unreachable, "Entra ID, or the endpoint, has trouble of its own"},
	"unknown": {tokencache.Unreachable,
		"the endpoint had no token from Entra ID and does not know why"},

	"invalid_resource": {tokencache.Refused, unknownResource},
	"invalid_target":   {tokencache.Refused, unknownResource},
	"invalid_scope":    {tokencache.Refused, unknownResource},

	"invalid_request":           {kind: tokencache.Refused}, // an unknown identity too: see badRequest
	"bad_request_102":           {kind: tokencache.Refused},
	"unknown_source":            {kind: tokencache.Refused},
	"access_denied":             {kind: tokencache.Refused},
	"unauthorized":              {kind: tokencache.Refused},
	"unauthorized_client":       {kind: tokencache.Refused},
	"invalid_client":            {kind: tokencache.Refused},
	"invalid_grant":             {kind: tokencache.Refused},
	"interaction_required":      {kind: tokencache.Refused},
	"unsupported_grant_type":    {kind: tokencache.Refused},
	"unsupported_response_type": {kind: tokencache.Refused},
}

const (
	unknownResource = "the directory knows no such resource: check its App ID URI"
	signInFailed    = "Entra ID does not accept how the endpoint signs in: on an Azure Arc machine, azcmagent " +
		"check; elsewhere assign the identity anew"
	assertionTime = "Entra ID finds what the endpoint signs in with outside its time: is the clock right? timedatectl"
)

// entraErrors are Entra ID's own error numbers (AADSTS…), found in descriptions. Entra ID may change them; for a number
// that is not here the OAuth code and the HTTP status decide.
var entraErrors = map[string]errorMeaning{
	"90006":  {tokencache.Unreachable, "Entra ID cannot answer for the moment (AADSTS90006)"},
	"90012":  {tokencache.Unreachable, "Entra ID took too long (AADSTS90012)"},
	"90024":  {tokencache.Unreachable, "Entra ID cannot answer for the moment (AADSTS90024)"},
	"90033":  {tokencache.Unreachable, "Entra ID cannot answer for the moment (AADSTS90033)"},
	"700024": {tokencache.Unreachable, assertionTime},
	"500133": {tokencache.Unreachable, assertionTime},
	"50196": {tokencache.Throttled,
		"Entra ID was asked the same too often (AADSTS50196); who else on this device asks?"},
	"90055": {tokencache.Throttled, "Entra ID takes no more requests of the tenant for now (AADSTS90055)"},

	// An answer about one identity or resource is no reason to pause for all: where time may heal one of these, such as
	// minutes after something was created, the schedule asks again.
	"70021": {tokencache.Refused,
		"no federated credential matches (AADSTS70021): create one; a new one takes minutes to count"},
	"700016": {tokencache.IdentityNotFound,
		"the directory does not know the identity (AADSTS700016): was it deleted? a new one takes minutes to be known"},
	"50001":  {tokencache.Refused, unknownResource},
	"500011": {tokencache.Refused, unknownResource},
	"90002": {tokencache.Refused,
		"the tenant does not exist (AADSTS90002): was the subscription moved to another one?"},
	"7000112": {tokencache.Refused, "the identity is disabled in the directory (AADSTS7000112)"},
	"700027":  {tokencache.Refused, signInFailed},
	"7000215": {tokencache.Refused, signInFailed},
	"7000222": {tokencache.Refused, signInFailed},
	"50105":   {tokencache.Refused, "the resource wants the identity to be assigned to it (AADSTS50105)"},
	"501051":  {tokencache.Refused, "the resource wants the identity to be assigned to it (AADSTS501051)"},
	"53003":   {tokencache.Refused, "conditional access keeps the identity from a token (AADSTS53003)"},
}

// meaning returns what c stands for; zero when the HTTP status decides. A code for trouble that passes counts before
// any other: to call it permanent by mistake is worse than to ask once more.
func (c errorResponse) meaning() errorMeaning {
	m := oauthErrors[c.code]
	if m.words != "" && m.kind == tokencache.Unreachable {
		return m
	}
	if number := aadstsForm.FindStringSubmatch(c.description); number != nil && entraErrors[number[1]].words != "" {
		return entraErrors[number[1]]
	}
	return m
}

// looksLikePage reports whether a body is HTML or XML, which no token endpoint sends.
func looksLikePage(body []byte) bool {
	head := strings.TrimPrefix(string(body[:min(len(body), 512)]), "\ufeff")
	return strings.HasPrefix(strings.TrimSpace(head), "<")
}

// describe names the kind of a body that no token endpoint sends.
func describe(body []byte) string {
	switch {
	case len(body) > maxBodyBytes:
		return "more than 64 KiB"
	case looksLikePage(body):
		return "a web page, or XML"
	case strings.TrimSpace(string(body)) == "":
		return "nothing"
	case parseFields(body) != nil:
		return "JSON of another shape"
	}
	return "what is no JSON object"
}

// intercepted is the failure that something else answered in the endpoint's place. What it says of identities and
// permissions means nothing, so to callers the failure is one that passes with time.
func (at target) intercepted(status int, with string) *tokencache.FetchError {
	endpoint := map[Endpoint]string{Arc: "the Azure Arc agent", AppService: "an App Service endpoint",
		IMDS: "the metadata service"}[at.form]
	return &tokencache.FetchError{Kind: tokencache.Unreachable, Detail: fmt.Sprintf(
		"%s answered %d with %s, as %s never does: a proxy, a filter or a sign-in page on the way, or another "+
			"program there, answers in its "+
			"place; ask that address with curl to see which, and let this device's calls past it", at.dial, status,
		with, endpoint)}
}

// secretRefused reports whether a status says that the endpoint did not accept the secret that it was shown. It says so
// with whatever body, since that is often a framework's.
func (at target) secretRefused(status int) bool {
	return status == http.StatusUnauthorized && (at.form == Arc || at.form == AppService)
}

// extentOf returns which keys a failed round trip is about: without a connection, a request for any key would have
// failed.
func extentOf(err error) tokencache.Extent {
	var (
		cert  *tls.CertificateVerificationError
		alert tls.AlertError
		dns   *net.DNSError
		op    *net.OpError
		slow  net.Error // to connect: the fetch's own deadline is checked before
	)
	switch {
	case errors.As(err, &cert), errors.As(err, &alert), errors.As(err, &dns),
		errors.As(err, &op) && op.Op == "dial",
		errors.As(err, &slow) && slow.Timeout():
		return tokencache.OfSource
	}
	return tokencache.OfKey
}

// expiredError says that the token in an answer has expired.
type expiredError struct {
	ago  time.Duration // since its end, as the back end counted it
	on   time.Time     // its end, by the issuer's clock; zero: not known
	text string
}

func (e *expiredError) Error() string { return e.text }

// invalidAnswer is the failure of an answer that cannot be used, which was received at the wall time now.
func (at target) invalidAnswer(err error, now time.Time) *tokencache.FetchError {
	failed := malformed("the answer of %s cannot be used: %v", at.dial, err)
	var over *expiredError
	if errors.As(err, &over) {
		recent := over.on.IsZero() || now.Sub(over.on) <= tokencache.JustExpired
		failed.JustExpired = recent && over.ago <= tokencache.JustExpired
	}
	return failed
}
