package source

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log"
	"net"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"perceptd/tokencache"
)

func TestStatusOtherThan200(t *testing.T) {
	t.Parallel()
	oauth := func(code, description string) string {
		return object{"error": code, "error_description": description + " " + canary}.String()
	}
	message := func(s string) string { return object{"statusCode": 400, "message": s + " " + canary}.String() }
	for _, test := range []struct {
		name   string
		form   Endpoint
		key    tokencache.Key
		status int
		body   string
		kind   tokencache.Kind
		words  string
	}{
		{"unknown identity", IMDS, byClient, 400, oauth("invalid_request", "Identity not found"), tokencache.IdentityNotFound, "client_id " + clientID},
		{"unknown identity, other words", IMDS, byObject, 400, oauth("invalid_request", "?"), tokencache.IdentityNotFound, "object_id"},
		{"unknown identity on Arc", Arc, byARM, 400, oauth("invalid_request", "?"), tokencache.IdentityNotFound, "resource_id"},
		{"unknown identity on App Service", AppService, byClient, 400,
			message("No User Assigned or Delegated Managed Identity found for specified ClientId/ResourceId/PrincipalId."), tokencache.IdentityNotFound, "client_id"},
		{"no system-assigned identity", IMDS, system, 400, oauth("invalid_request", "Identity not found"), tokencache.IdentityNotFound, "enable it"},
		{"several identities", IMDS, system, 400, oauth("invalid_request", "Multiple user assigned identities exist, please specify"), tokencache.IdentityNotFound, "several"},
		{"unknown resource", IMDS, byClient, 400, oauth("invalid_resource", "AADSTS500011"), tokencache.Refused, "App ID URI"},
		{"bad request", IMDS, system, 400, oauth("bad_request_102", "Required metadata header"), tokencache.Refused, "does not take"},
		{"bad request on App Service", AppService, byClient, 400, message("?"), tokencache.Refused, "does not take"},
		{"bad request without a body", IMDS, system, 400, "", tokencache.Refused, "does not take"},
		{"bad request with a page", IMDS, system, 400, "<html>" + canary, tokencache.Refused, "does not take"},
		{"wrong header", AppService, system, 401, oauth("", ""), tokencache.Refused, envHeader},
		{"wrong key", Arc, system, 401, oauth("", ""), tokencache.Refused, "himdsd"},
		{"unauthorised", IMDS, system, 401, "", tokencache.Refused, "no token of system-assigned for " + vault},
		{"forbidden", IMDS, byClient, 403, oauth("access_denied", ""), tokencache.Refused, "no token of client_id"},
		{"teapot", AppService, system, 418, canary, tokencache.Refused, "answered 418"},
		{"updating", IMDS, system, 404, "", tokencache.Unreachable, "being updated"},
		{"updating, soon back", IMDS, system, 410, "", tokencache.Unreachable, "being updated"},
		{"wrong path", AppService, system, 404, canary, tokencache.Unreachable, "nothing at that path"},
		{"gone", AppService, system, 410, "", tokencache.Unreachable, "not now"},
		{"slow", IMDS, system, 408, "", tokencache.Unreachable, "not now"},
		{"throttled", IMDS, system, 429, oauth("invalid_request", "Temporarily throttled, too many requests"), tokencache.Throttled, "too many calls"},
		{"throttled under another name", IMDS, byClient, 503, oauth("", "Temporarily throttled"), tokencache.Throttled, "too many calls"},
		{"broken", IMDS, system, 500, canary, tokencache.Unreachable, "trouble"},
		{"broken Arc", Arc, system, 502, canary, tokencache.Unreachable, "azcmagent show"},
		{"created", IMDS, system, 201, goodAnswer(time.Now()).String(), tokencache.Malformed, "no token endpoint answers so"},
		{"accepted, which azidentity takes for 200", IMDS, system, 202, goodAnswer(time.Now()).String(), tokencache.Malformed, "202"},
		{"moved", IMDS, system, 307, canary, tokencache.Malformed, "a redirect"},
		{"not modified", IMDS, system, 304, "", tokencache.Malformed, "a redirect"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			at := place{form: test.form, dial: "127.0.0.1:1"}
			wantFailure(t, at.refused(test.key, test.status, 0, []byte(test.body)), test.kind, test.words)
			if test.form != IMDS {
				return
			}
			m := imds(t, answering(test.status, test.body, "WWW-Authenticate", "Basic realm="+canary))
			_, err := m.Fetch(t.Context(), test.key)
			wantFailure(t, err, test.kind, test.words)
		})
	}
}

func TestRetryAfter(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	for value, want := range map[string]time.Duration{
		"":                              0,
		"0":                             0,
		"5":                             5 * time.Second,
		" 7 ":                           7 * time.Second,
		"-5":                            0,
		"9223372036854775807":           maxRetryAfter,
		"-9223372036854775808":          0,
		"99999999999999999999":          0,
		"soon":                          0,
		"1.5":                           0,
		"Mon, 23 Nov 2026 12:01:00 GMT": time.Minute,
		"Mon, 23 Nov 2026 11:59:00 GMT": 0,
		"Fri, 31 Dec 9999 23:59:59 GMT": maxRetryAfter,
	} {
		if got := retryAfter(value, now); got != want {
			t.Errorf("Retry-After %q is %v, want %v", value, got, want)
		}
	}
}

func FuzzRetryAfter(f *testing.F) {
	for _, seed := range []string{"", "5", "-1", "Mon, 23 Nov 2026 12:01:00 GMT", "9223372036854775807"} {
		f.Add(seed)
	}
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	f.Fuzz(func(t *testing.T, value string) {
		if d := retryAfter(value, now); d < 0 || d > maxRetryAfter {
			t.Errorf("%q is %v", value, d)
		}
	})
}

// A date in Retry-After is by the server's clock, and this device's may be years off.
func TestRetryAfterOnTheWire(t *testing.T) {
	t.Parallel()
	for _, status := range []int{429, 503} {
		m := imds(t, answering(status, "", "Date", "Mon, 23 Nov 2020 12:00:00 GMT", "Retry-After", "Mon, 23 Nov 2020 12:00:30 GMT"))
		_, err := m.Fetch(t.Context(), system)
		failed := wantFailure(t, err, map[int]tokencache.Kind{429: tokencache.Throttled, 503: tokencache.Unreachable}[status], "")
		if failed.RetryAfter != 30*time.Second {
			t.Errorf("%d: retry after %v", status, failed.RetryAfter)
		}
	}
	m := imds(t, answering(403, "", "Retry-After", "30"))
	_, err := m.Fetch(t.Context(), system)
	if failed := wantFailure(t, err, tokencache.Refused, ""); failed.RetryAfter != 0 {
		t.Errorf("asking again after %v does not heal a refusal", failed.RetryAfter)
	}
}

func TestNobodyListens(t *testing.T) {
	t.Parallel()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := listener.Addr().String()
	_ = listener.Close()
	_, err = imdsAt(t, address, Options{}).Fetch(t.Context(), system)
	wantFailure(t, err, tokencache.Unreachable, "connection to "+address+": connection refused: is this an Azure VM?")
}

func TestConversationsThatGoWrong(t *testing.T) {
	t.Parallel()
	// answer reads the request, so that closing does not reset, and answers raw.
	answer := func(raw string) func(net.Conn) {
		return func(c net.Conn) {
			_, _ = c.Read(make([]byte, 64<<10))
			fmt.Fprint(c, raw)
		}
	}
	reset := func(c net.Conn) {
		_, _ = c.Read(make([]byte, 64<<10))
		_ = c.(*net.TCPConn).SetLinger(0)
	}
	const ok = "HTTP/1.1 200 OK\r\n"
	for _, test := range []struct {
		name  string
		talk  func(net.Conn)
		kind  tokencache.Kind
		words string
	}{
		{"reset", reset, tokencache.Unreachable, "connection reset by peer"},
		{"closed at once", answer(""), tokencache.Unreachable, "closed the connection"},
		{"closed in the headers", answer(ok + "Content-Length: 5"), tokencache.Unreachable, "closed the connection"},
		{"closed in the body", answer(ok + "Content-Length: 500\r\n\r\n{"), tokencache.Unreachable, "closed the connection"},
		{"not HTTP", answer("SSH-2.0-" + canary + "\r\n"), tokencache.Malformed, "what listens there?"},
		{"bad chunks", answer(ok + "Transfer-Encoding: chunked\r\n\r\n" + canary + "\r\n"), tokencache.Malformed, "what listens there?"},
		{"headers without end", answer(ok + "X: " + strings.Repeat(canary, 4<<10) + "\r\n\r\n"), tokencache.Malformed, "what listens there?"},
		{"too much", answer(ok + "\r\n" + strings.Repeat(" ", maxBodyBytes+1)), tokencache.Malformed, "more than 64 KiB"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			_, err := imdsAt(t, talking(t, test.talk), Options{}).Fetch(t.Context(), system)
			wantFailure(t, err, test.kind, test.words)
		})
	}
}

func TestConnectionFailuresInWords(t *testing.T) {
	t.Parallel()
	at := place{form: AppService, dial: "host:1"}
	timeout := &net.OpError{Op: "dial", Err: timeoutError{}}
	for _, test := range []struct {
		err   error
		kind  tokencache.Kind
		words string
	}{
		{&net.DNSError{Err: canary, Name: canary}, tokencache.Unreachable, "cannot be resolved"},
		{timeout, tokencache.Unreachable, "no connection to host:1 within 5s: does IDENTITY_ENDPOINT name the right host"},
		{&net.OpError{Op: "read", Err: net.ErrClosed}, tokencache.Unreachable, "broke"},
		{tls.AlertError(40), tokencache.Unreachable, "refused the TLS handshake"},
		{&tls.CertificateVerificationError{Err: x509.UnknownAuthorityError{}}, tokencache.Unreachable, "not trusted"},
		{fmt.Errorf("%s", canary), tokencache.Malformed, "what listens there?"},
	} {
		wantFailure(t, at.broken(test.err), test.kind, test.words)
	}
}

type timeoutError struct{}

func (timeoutError) Error() string { return canary }
func (timeoutError) Timeout() bool { return true }

func TestTLS(t *testing.T) {
	date := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	server := httptest.NewUnstartedServer(answering(200, goodAnswer(date).String()))
	server.Config.ErrorLog = log.New(io.Discard, "", 0) // the first handshake fails on purpose
	server.StartTLS()
	defer server.Close()
	t.Setenv(envEndpoint, server.URL+"/msi/token")
	t.Setenv(envHeader, "secret")
	wrong := func() time.Time { return time.Date(1970, 1, 2, 0, 0, 0, 0, time.UTC) }
	m, err := New(Options{Wall: wrong})
	if err != nil {
		t.Fatal(err)
	}
	_, err = m.Fetch(t.Context(), system)
	wantFailure(t, err, tokencache.Unreachable, "not trusted")

	roots := x509.NewCertPool()
	roots.AddCert(server.Certificate())
	m.transport.http.TLSClientConfig = &tls.Config{RootCAs: roots}
	got, err := m.Fetch(t.Context(), system)
	if err != nil {
		t.Fatal(err)
	}
	if got.Left != 24*time.Hour {
		t.Errorf("left %v by a clock that is 56 years behind", got.Left)
	}
}
