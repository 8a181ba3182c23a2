package source

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"syscall"
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
		{"unknown identity", IMDS, byClient, 400, oauth("invalid_request", "Identity not found"),
			tokencache.IdentityNotFound, "client_id " + clientID},
		{"unknown identity, other words", IMDS, byObject, 400, oauth("invalid_request", "?"),
			tokencache.IdentityNotFound, "object_id"},
		{"unknown identity on Arc", Arc, byARM, 400, oauth("invalid_request", "?"), tokencache.IdentityNotFound,
			"resource_id"},
		{"unknown identity on App Service", AppService, byClient, 400,
			message("No User Assigned or Delegated Managed Identity found for specified " +
				"ClientId/ResourceId/PrincipalId."), tokencache.IdentityNotFound, "client_id"},
		{"no system-assigned identity", IMDS, system, 400, oauth("invalid_request", "Identity not found"),
			tokencache.IdentityNotFound, "enable it"},
		{"several identities",
			IMDS, system, 400, oauth("invalid_request",
				"Multiple user assigned identities exist, please specify"), tokencache.IdentityNotFound, "several"},
		{"unknown resource", IMDS, byClient, 400, oauth("invalid_resource", "AADSTS500011"), tokencache.Refused,
			"App ID URI"},
		{"bad request", IMDS, system, 400, oauth("bad_request_102", "Required metadata header"), tokencache.Refused,
			"does not take"},
		{"bad request on App Service", AppService, byClient, 400, message("?"), tokencache.Refused, "does not take"},
		{"bad request without a body", IMDS, system, 400, "", tokencache.Unreachable, "answered 400 with nothing"},
		{"bad request with a page", IMDS, byClient, 400, "<html>" + canary, tokencache.Unreachable,
			"answered 400 with a web page"},
		{"bad request with XML", IMDS, byClient, 400, "\ufeff <?xml version='1.0'?><Error>" + canary,
			tokencache.Unreachable, "or XML"},
		{"bad request in words", Arc, byClient, 400, canary, tokencache.Unreachable, "no JSON object"},
		{"bad request cut off", IMDS, byClient, 400, oauth("invalid_request", "Identity not found")[:40],
			tokencache.Unreachable, "no JSON object"},
		{"bad request without end", IMDS, byClient, 400, "{" + strings.Repeat(" ", maxBodyBytes),
			tokencache.Unreachable, "more than 64 KiB"},
		{"bad request packed", IMDS, byClient, 400, "\x1f\x8b\x08" + canary, tokencache.Unreachable, "no JSON object"},
		{"bad request of a list", IMDS, byClient, 400, "[1]", tokencache.Unreachable, "no JSON object"},
		{"bad request of a gateway", IMDS, byClient, 400, message("Identity not found"), tokencache.Unreachable,
			"JSON of another shape"},
		{"bad request of a web framework", IMDS, byClient, 400, object{"error": "Bad Request", "path": canary}.String(),
			tokencache.Unreachable, "JSON of another shape"},
		{"bad request of Azure's other services", IMDS, byClient, 400,
			object{"error": object{"code": "NotFound",
				"message": canary}}.String(), tokencache.Unreachable, "JSON of another shape"},
		{"another status than it says on App Service", AppService, byClient, 403, message("Identity not found"),
			tokencache.Unreachable, "JSON of another shape"},
		{"wrong header", AppService, system, 401, oauth("", ""), tokencache.Refused, envHeader},
		{"wrong key", Arc, system, 401, oauth("", ""), tokencache.Refused, "himdsd"},
		{"wrong header, without a word", AppService, system, 401, "", tokencache.Refused, envHeader},
		{"wrong key, in words", Arc, system, 401, canary, tokencache.Refused, "himdsd"},
		{"wrong header, with a page", AppService, system, 401, "<html>" + canary, tokencache.Unreachable, "a web page"},
		{"wrong key, with a page", Arc, system, 401, "<html>" + canary, tokencache.Unreachable, "a web page"},
		{"unauthorised", IMDS, system, 401, oauth("unknown_source", "Unknown Source"), tokencache.Refused,
			"no token of system-assigned for " + vault},
		{"unauthorised without a word", IMDS, system, 401, "", tokencache.Unreachable, "answered 401 with nothing"},
		{"forbidden", IMDS, byClient, 403, oauth("access_denied", ""), tokencache.Refused, "no token of client_id"},
		{"forbidden, bare", IMDS, byClient, 403, object{"error": "access_denied"}.String(), tokencache.Refused,
			"no token of client_id"},
		{"forbidden without a word", IMDS, byClient, 403, "", tokencache.Unreachable, "answered 403 with nothing"},
		{"forbidden with a page", AppService, byClient, 403, "<html>" + canary, tokencache.Unreachable,
			"as an App Service endpoint never does"},
		{"forbidden with a page, on Arc", Arc, byClient, 403, " \n<!DOCTYPE html>" + canary, tokencache.Unreachable,
			"as the Azure Arc agent never does"},
		{"forbidden, by an unknown name", IMDS, byClient, 403, object{"error": "forbidden"}.String(),
			tokencache.Unreachable, "JSON of another shape"},
		{"a proxy wants a password", IMDS, system, 407, oauth("access_denied", "?"), tokencache.Unreachable, "a proxy"},
		{"a network wants a sign-in", IMDS, system, 511, "", tokencache.Unreachable, "a sign-in page"},
		{"for legal reasons", IMDS, system, 451, "<html>" + canary, tokencache.Unreachable, "a web page"},
		{"broken, with a page", IMDS, system, 502, "<html>" + canary, tokencache.Unreachable, "a web page"},
		{"not there, with a page", IMDS, system, 404, "<html>" + canary, tokencache.Unreachable, "a web page"},
		{"throttled, with a page", IMDS, system, 429, "<html>" + canary, tokencache.Throttled, "too many calls"},
		{"teapot", AppService, system, 418, canary, tokencache.Unreachable, "answered 418"},
		{"teapot of its own", AppService, system, 418, object{"statusCode": 418, "message": canary}.String(),
			tokencache.Refused, "answered 418"},
		{"updating", IMDS, system, 404, "", tokencache.Unreachable, "being updated"},
		{"updating, soon back", IMDS, system, 410, "", tokencache.Unreachable, "being updated"},
		{"wrong path", AppService, system, 404, canary, tokencache.Unreachable, "nothing at that path"},
		{"gone", AppService, system, 410, "", tokencache.Unreachable, "not now"},
		{"slow", IMDS, system, 408, "", tokencache.Unreachable, "not now"},
		{"throttled", IMDS, system, 429, oauth("invalid_request", "Temporarily throttled, too many requests"),
			tokencache.Throttled, "too many calls"},
		{"throttled under another name", IMDS, byClient, 503, oauth("", "Temporarily throttled"), tokencache.Throttled,
			"too many calls"},
		{"broken", IMDS, system, 500, canary, tokencache.Unreachable, "trouble"},
		{"broken Arc", Arc, system, 502, canary, tokencache.Unreachable, "azcmagent show"},
		{"created",
			IMDS, system, 201, goodAnswer(time.Now()).String(), tokencache.Malformed, "no token endpoint answers so"},
		{"accepted, which azidentity takes for 200",
			IMDS, system, 202, goodAnswer(time.Now()).String(), tokencache.Malformed, "202"},
		{"moved", IMDS, system, 307, canary, tokencache.Unreachable, "a redirect"},
		{"not modified", IMDS, system, 304, "", tokencache.Unreachable, "a redirect"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			at := target{form: test.form, dial: "127.0.0.1:1"}
			wantFailure(t, at.statusFailure(test.key, test.status, 0, []byte(test.body)), test.kind, test.words)
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
		if got := retryAfter(http.Header{"Retry-After": {value}}, now); got != want {
			t.Errorf("Retry-After %q is %v, want %v", value, got, want)
		}
	}
}

func TestRetryAfterInMilliseconds(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		header, ms, other string // Retry-After, x-ms-retry-after-ms, retry-after-ms
		want              time.Duration
	}{
		{"", "30000", "", 30 * time.Second},
		{"", "", "1500", 1500 * time.Millisecond},
		{"5", "30000", "", 30 * time.Second},
		{"60", "30000", "1", time.Minute},
		{"", " 250 ", "", 250 * time.Millisecond},
		{"5", "-1", "soon", 5 * time.Second},
		{"5", "1.5", "", 5 * time.Second},
		{"", "Mon, 23 Nov 2026 12:01:00 GMT", "", 0},
		{"", "9223372036854775807", "", maxRetryAfter},
		{"", "99999999999999999999", "", 0},
		{"", "", "", 0},
	} {
		h := http.Header{}
		h.Set("Retry-After", test.header)
		h.Set("x-ms-retry-after-ms", test.ms)
		h.Set("retry-after-ms", test.other)
		if got := retryAfter(h, time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)); got != test.want {
			t.Errorf("%q, %q, %q: %v, want %v", test.header, test.ms, test.other, got, test.want)
		}
	}
}

func FuzzRetryAfter(f *testing.F) {
	for _, seed := range []string{"", "5", "-1", "Mon, 23 Nov 2026 12:01:00 GMT", "9223372036854775807"} {
		f.Add(seed, seed)
	}
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	f.Fuzz(func(t *testing.T, value, ms string) {
		h := http.Header{"Retry-After": {value}, "X-Ms-Retry-After-Ms": {ms}}
		if d := retryAfter(h, now); d < 0 || d > maxRetryAfter {
			t.Errorf("%q and %q are %v", value, ms, d)
		}
	})
}

// A date in Retry-After is by the server's clock, and this device's may be years off.
func TestRetryAfterOnTheWire(t *testing.T) {
	t.Parallel()
	for _, status := range []int{429, 503} {
		m := imds(t, answering(status, "", "Date", "Mon, 23 Nov 2020 12:00:00 GMT", "Retry-After",
			"Mon, 23 Nov 2020 12:00:30 GMT"))
		_, err := m.Fetch(t.Context(), system)
		failed := wantFailure(t, err, map[int]tokencache.Kind{429: tokencache.Throttled,
			503: tokencache.Unreachable}[status], "")
		if failed.RetryAfter != 30*time.Second {
			t.Errorf("%d: retry after %v", status, failed.RetryAfter)
		}
	}
	m := imds(t, answering(403, `{"error":"access_denied","error_description":"no"}`, "Retry-After", "30"))
	_, err := m.Fetch(t.Context(), system)
	if failed := wantFailure(t, err, tokencache.Refused, ""); failed.RetryAfter != 0 {
		t.Errorf("asking again after %v does not heal a refusal", failed.RetryAfter)
	}
	m = imds(t, answering(503, "", "Retry-After", "1", "X-Ms-Retry-After-Ms", "30000"))
	_, err = m.Fetch(t.Context(), system)
	if failed := wantFailure(t, err, tokencache.Unreachable, ""); failed.RetryAfter != 30*time.Second {
		t.Errorf("retry after %v", failed.RetryAfter)
	}
}

// Every code that an endpoint may send under a status that is else a refusal: what time heals says when to come back.
func TestErrorCodes(t *testing.T) {
	t.Parallel()
	const wait = 7 * time.Second
	for code, kind := range map[string]tokencache.Kind{
		"temporarily_unavailable": tokencache.Unreachable, "server_error": tokencache.Unreachable,
		"unknown":     tokencache.Unreachable,
		"aadsts90006": tokencache.Unreachable, "aadsts90012": tokencache.Unreachable,
		"aadsts90024": tokencache.Unreachable,
		"aadsts90033": tokencache.Unreachable, "aadsts700024": tokencache.Unreachable,
		"aadsts500133": tokencache.Unreachable,
		"aadsts50196":  tokencache.Throttled, "aadsts90055": tokencache.Throttled,

		"invalid_resource": tokencache.Refused, "invalid_target": tokencache.Refused,
		"invalid_scope":   tokencache.Refused,
		"bad_request_102": tokencache.Refused, "unknown_source": tokencache.Refused,
		"access_denied": tokencache.Refused,
		"unauthorized":  tokencache.Refused, "unauthorized_client": tokencache.Refused,
		"invalid_client": tokencache.Refused,
		"invalid_grant":  tokencache.Refused, "interaction_required": tokencache.Refused,
		"unsupported_grant_type":    tokencache.Refused,
		"unsupported_response_type": tokencache.Refused, "invalid_request": tokencache.Refused,
		"of_tomorrow": tokencache.Refused,
		"aadsts70021": tokencache.Refused, "aadsts50001": tokencache.Refused, "aadsts500011": tokencache.Refused,
		"aadsts90002": tokencache.Refused, "aadsts7000112": tokencache.Refused, "aadsts700027": tokencache.Refused,
		"aadsts7000215": tokencache.Refused, "aadsts7000222": tokencache.Refused, "aadsts50105": tokencache.Refused,
		"aadsts501051": tokencache.Refused, "aadsts53003": tokencache.Refused, "aadsts99999": tokencache.Refused,
		"aadsts700016": tokencache.IdentityNotFound,
	} {
		oauth := object{"error": code, "error_description": canary}
		appService := object{"statusCode": 400, "message": canary}
		if number, ok := strings.CutPrefix(code, "aadsts"); ok {
			text := "AADSTS" + number + ": " + canary
			oauth = object{"error": "unauthorized_client", "error_description": text}
			appService["message"] = text
		} else {
			appService = oauth // which emulators send
		}
		for _, status := range []int{400, 401, 403} {
			at := target{form: IMDS, dial: "h:1"}
			failed := wantFailure(t, at.statusFailure(system, status, wait, []byte(oauth.String())), kind, "")
			heals := kind == tokencache.Unreachable || kind == tokencache.Throttled
			if heals != (failed.RetryAfter == wait) {
				t.Errorf("%s under %d: retry after %v", code, status, failed.RetryAfter)
			}
			at.form = AppService
			if appService["statusCode"] != nil {
				appService["statusCode"] = status
			}
			wantFailure(t, at.statusFailure(system, status, wait, []byte(appService.String())), kind, "")
		}
	}
	for name, m := range oauthErrors {
		if m.words == "" && m.kind != tokencache.Refused {
			t.Errorf("%s has no words", name)
		}
	}
	both := object{"error": "temporarily_unavailable", "error_description": "AADSTS700016 " + canary}.String()
	wantFailure(t, target{form: IMDS}.statusFailure(system, 400, 0, []byte(both)), tokencache.Unreachable,
		"for the moment")
}

// Whatever the body, only one of the endpoint's own form refuses, and the secret's status.
func FuzzRefused(f *testing.F) {
	f.Add(uint16(400), `{"error":"invalid_request","error_description":"Identity not found"}`)
	f.Add(uint16(403), `{"statusCode":403,"message":"AADSTS90033: later"}`)
	f.Add(uint16(401), "<html>")
	f.Add(uint16(403), `{"error":{"code":"x"},"error_description":"Multiple user assigned identities exist"}`)
	f.Add(uint16(503), `{"error":"temporarily_unavailable"}`)
	f.Fuzz(func(t *testing.T, status uint16, body string) {
		status = 201 + status%399
		for _, form := range []Endpoint{Arc, AppService, IMDS} {
			at := target{form: form, dial: "h:1"}
			failed := at.statusFailure(byClient, int(status), time.Second, []byte(body))
			final := failed.Kind == tokencache.Refused || failed.Kind == tokencache.IdentityNotFound
			object := parseFields([]byte(body)) != nil
			switch {
			case final && (status < 400 || status >= 500 || looksLikePage([]byte(body))):
				t.Errorf("%s: %d with %q is final", form, status, body)
			case final && !object && !at.secretRefused(int(status)):
				t.Errorf("%s: %d with %q speaks for Azure", form, status, body)
			case final && failed.RetryAfter != 0:
				t.Errorf("%s: %d with %q is final and to be asked again", form, status, body)
			}
			if words := strings.TrimSpace(body); len(words) > 40 && strings.Contains(failed.Detail, words) {
				t.Errorf("%q is repeated: %s", body, failed.Detail)
			}
		}
	})
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
		{"closed in the body", answer(ok + "Content-Length: 500\r\n\r\n{"), tokencache.Unreachable,
			"closed the connection"},
		{"not HTTP", answer("SSH-2.0-" + canary + "\r\n"), tokencache.Malformed, "what listens there?"},
		{"bad chunks", answer(ok + "Transfer-Encoding: chunked\r\n\r\n" + canary + "\r\n"), tokencache.Malformed,
			"what listens there?"},
		{"headers without end", answer(ok + "X: " + strings.Repeat(canary, 4<<10) + "\r\n\r\n"), tokencache.Malformed,
			"what listens there?"},
		{"too much", answer(ok + "\r\n" + strings.Repeat(" ", maxBodyBytes+1)), tokencache.Unreachable,
			"more than 64 KiB"},
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
	at := target{form: AppService, dial: "host:1"}
	timeout := &net.OpError{Op: "dial", Err: timeoutError{}}
	for _, test := range []struct {
		err   error
		kind  tokencache.Kind
		words string
	}{
		{&net.DNSError{Err: canary, Name: canary}, tokencache.Unreachable, "cannot be resolved"},
		{timeout, tokencache.Unreachable,
			"no connection to host:1 within 5s: does IDENTITY_ENDPOINT name the right host"},
		{&net.OpError{Op: "read", Err: net.ErrClosed}, tokencache.Unreachable, "broke"},
		{tls.AlertError(40), tokencache.Unreachable, "refused the TLS handshake"},
		{&tls.CertificateVerificationError{Err: x509.UnknownAuthorityError{}}, tokencache.Unreachable, "not trusted"},
		{fmt.Errorf("%s", canary), tokencache.Malformed, "what listens there?"},
	} {
		wantFailure(t, at.connectionFailure(test.err), test.kind, test.words)
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

// What kept a connection from coming about would have kept any; what broke one may be about what was asked for.
func TestExtents(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		err  error
		want tokencache.Extent
	}{
		{&net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}, tokencache.OfSource},
		{&net.OpError{Op: "dial", Err: timeoutError{}}, tokencache.OfSource},
		{&net.DNSError{Name: "himds"}, tokencache.OfSource},
		{timeoutError{}, tokencache.OfSource}, // of the TLS handshake
		{tls.AlertError(40), tokencache.OfSource},
		{&tls.CertificateVerificationError{Err: x509.UnknownAuthorityError{}}, tokencache.OfSource},
		{&net.OpError{Op: "read", Err: syscall.ECONNRESET}, tokencache.OfKey},
		{fmt.Errorf("malformed HTTP response"), tokencache.OfKey},
	} {
		if got := extentOf(row.err); got != row.want {
			t.Errorf("%v: %v, want %v", row.err, got, row.want)
		}
	}
}

func (timeoutError) Temporary() bool { return true } // a net.Error

func TestExtentsOnTheWire(t *testing.T) {
	t.Parallel()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nobody := listener.Addr().String()
	_ = listener.Close()
	silent := talking(t, func(c net.Conn) { _, _ = c.Read(make([]byte, 64<<10)); _, _ = c.Read(make([]byte, 1)) })
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	for _, row := range []struct {
		ctx     context.Context
		address string
		want    tokencache.Extent
	}{
		{t.Context(), nobody, tokencache.OfSource},
		{ctx, silent, tokencache.OfIdentity},
	} {
		_, err := imdsAt(t, row.address, Options{}).Fetch(row.ctx, system)
		if failed := wantFailure(t, err, tokencache.Unreachable, ""); failed.Extent != row.want {
			t.Errorf("%v: extent %v, want %v", err, failed.Extent, row.want)
		}
	}
	for _, status := range []int{400, 403, 404, 429, 500, 503} {
		_, err := imds(t, answering(status, "")).Fetch(t.Context(), system)
		if failed := wantFailure(t, err, kindOfError(err), ""); failed.Extent != tokencache.OfKey {
			t.Errorf("status %d is no answer about one key: %+v", status, failed)
		}
	}
}

func kindOfError(err error) tokencache.Kind {
	failed, _ := err.(*tokencache.FetchError)
	return failed.Kind
}

// A token whose life is just over is no nonsense: the back end is about to roll over.
func TestJustExpired(t *testing.T) {
	t.Parallel()
	now := time.Now()
	unix := func(in time.Duration) string { return strconv.FormatInt(now.Add(in).Unix(), 10) }
	for name, row := range map[string]struct {
		times object
		want  bool
	}{
		"counted to nothing":         {object{"expires_in": "0", "expires_on": nil}, true},
		"of some seconds ago":        {object{"expires_in": "-9", "expires_on": nil}, true},
		"of a minute ago":            {object{"expires_in": "-60", "expires_on": nil}, false},
		"by its date":                {object{"expires_in": nil, "expires_on": unix(-2 * time.Second)}, true},
		"by its date and by count":   {object{"expires_in": "0", "expires_on": unix(-2 * time.Second)}, true},
		"counted, but long ago":      {object{"expires_in": "0", "expires_on": unix(-time.Hour)}, false},
		"with no times":              {object{"expires_in": nil, "expires_on": nil}, false},
		"with a life of all seconds": {object{"expires_in": "99999999", "expires_on": nil}, false},
	} {
		server := imds(t, func(w http.ResponseWriter, r *http.Request) {
			answering(200, goodAnswer(now).with(row.times).with(object{"not_before": nil}).String())(w, r)
		})
		server.transport.wall, server.transport.clockTrusted = func() time.Time { return now },
			func() bool { return true }
		_, err := server.Fetch(t.Context(), system)
		if failed := wantFailure(t, err, tokencache.Malformed, ""); failed.JustExpired != row.want {
			t.Errorf("a token that has expired, %s: %v, just expired %v", name, err, failed.JustExpired)
		}
	}
}
