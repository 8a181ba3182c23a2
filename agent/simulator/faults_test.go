package simulator

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// faulty serves a back end with one fault.
func faulty(t *testing.T, o ServerOptions, f Fault) *Server {
	t.Helper()
	s := start(t, o)
	if err := s.Backend().AddFault(f); err != nil {
		t.Fatal(err)
	}
	return s
}

func TestFaultsThatAnswerOtherwise(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		fault      Fault
		status     int
		header     string
		value      string
		body       string // a part of it
		wantNoJSON bool
	}{
		{Fault{Kind: FaultStatus, Status: 503, RetryAfter: "120"}, 503, "Retry-After", "120", "simulated_fault", false},
		{Fault{Kind: FaultStatus, Status: 410, Body: "gone"}, 410, "Retry-After", "", "gone", true},
		{Fault{Kind: FaultThrottle}, 429, "Retry-After", "",
			`{"error":"invalid_request","error_description":"Temporarily throttled, too many requests"}`, false},
		{Fault{Kind: FaultThrottle, RetryAfter: "2"}, 429, "Retry-After", "2", "throttled", false},
		{Fault{Kind: FaultHTML}, 200, "Content-Type", "text/html; charset=utf-8", "<!DOCTYPE html>", true},
		{Fault{Kind: FaultHTML, Body: "<p>"}, 200, "Content-Type", "text/html; charset=utf-8", "<p>", true},
		{Fault{Kind: FaultHTML, Status: 403}, 403, "Content-Type", "text/html; charset=utf-8", "<!DOCTYPE html>", true},
		{Fault{Kind: FaultHTML, Status: 400, Body: "<?xml version='1.0'?><Error/>"}, 400, "Content-Type",
			"text/html; charset=utf-8", "<Error/>", true},
		{Fault{Kind: FaultUnavailable}, 400, "Retry-After", "",
			`{"error":"temporarily_unavailable","error_description":"AADSTS90033: `, false},
		{Fault{Kind: FaultUnavailable, RetryAfterMS: "1500"}, 400, "X-Ms-Retry-After-Ms", "1500",
			"temporarily_unavailable", false},
		{Fault{Kind: FaultNotJSON}, 200, "Content-Type", "application/json; charset=utf-8", "not JSON", true},
		{Fault{Kind: FaultRedirect}, 302, "Location", "http://127.0.0.1:9/elsewhere", "", true},
		{Fault{Kind: FaultRedirect, Location: "/there"}, 302, "Location", "/there", "", true},
		{Fault{Kind: FaultHugeBody, Size: 100_000}, 200, "Content-Encoding", "", "AAAA", false},
		{Fault{Kind: FaultEmptyToken}, 200, "Content-Encoding", "", `"access_token":"",`, false},
	} {
		s := faulty(t, ServerOptions{}, c.fault)
		got := get(t, s.URL()+imdsQuery, "Metadata", "true")
		if got.status != c.status || got.header.Get(c.header) != c.value || !strings.Contains(got.body, c.body) ||
			json.Valid([]byte(got.body)) == c.wantNoJSON {
			t.Errorf("%+v: %d %v %.200s", c.fault, got.status, got.header, got.body)
		}
		if c.fault.Size > 0 && int64(len(got.body)) != c.fault.Size {
			t.Errorf("%s: %d bytes", c.fault.Kind, len(got.body))
		}
		s.Backend().ClearFaults()
		if got := get(t, s.URL()+imdsQuery, "Metadata", "true"); got.status != 200 {
			t.Errorf("%s, cleared: %d %s", c.fault.Kind, got.status, got.body)
		}
		if calls := s.Backend().Calls().Total; calls != 2 {
			t.Errorf("%s: %d calls, want 2 with the struck one", c.fault.Kind, calls)
		}
	}
}

func TestFaultPastExp(t *testing.T) {
	t.Parallel()
	s := faulty(t, ServerOptions{}, Fault{Kind: FaultPastExp})
	var answer struct {
		AccessToken string `json:"access_token"`
		ExpiresIn   string `json:"expires_in"`
	}
	got := get(t, s.URL()+imdsQuery, "Metadata", "true")
	if err := json.Unmarshal([]byte(got.body), &answer); err != nil || len(answer.ExpiresIn) != len("86400") {
		t.Fatalf("%v in %s", err, got.body)
	}
	payload, err := base64.RawURLEncoding.DecodeString(strings.Split(answer.AccessToken, ".")[1])
	var c claims
	if err != nil || json.Unmarshal(payload, &c) != nil {
		t.Fatalf("%v in %s", err, got.body)
	}
	if now := s.Backend().now().Unix(); c.Exp > now-3600+5 || c.Exp < now-3600-60 || c.Exp-c.Iat < 86400 {
		t.Errorf("exp is %d s from now, iat %d s before it", c.Exp-now, c.Exp-c.Iat)
	}
}

func TestFaultTimes(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ in, on, wantIn, wantOn string }{
		{"-25h", "-25h", "-3600", "1799996400"},
		{"+90s", "", "86490", "1800086400"},
		{"", "never", "86400", "never"},
		{"missing", "missing", "", ""},
		{"-5 parsecs", "0", "-5 parsecs", "0"},
	} {
		s := faulty(t, ServerOptions{}, Fault{Kind: FaultTimes, ExpiresIn: c.in, ExpiresOn: c.on})
		f := get(t, s.URL()+imdsQuery, "Metadata", "true").fields(t)
		_, in := f["expires_in"]
		_, on := f["expires_on"]
		if f["expires_in"] != c.wantIn || f["expires_on"] != c.wantOn || in != (c.wantIn != "") ||
			on != (c.wantOn != "") || f["access_token"] == "" {
			t.Errorf("%q, %q: expires_in %q (%v), expires_on %q (%v)", c.in, c.on, f["expires_in"], in, f["expires_on"],
				on)
		}
	}
}

func TestFaultWrongIdentity(t *testing.T) {
	t.Parallel()
	s := faulty(t, ServerOptions{Form: FormArc}, Fault{Kind: FaultWrongIdentity})
	f := arcToken(t, s, arcQuery+"&client_id="+vision.ID).fields(t)
	if f["client_id"] != foreignIdentity().ClientID ||
		claimsOf(t, f["access_token"])["appid"] != foreignIdentity().ClientID {
		t.Errorf("the token of %s", f["client_id"])
	}
	if got := arcToken(t, s, arcQuery+"&client_id=x"); got.status != 400 {
		t.Errorf("an unknown identity: %d %s", got.status, got.body)
	}
}

func TestFaultReset(t *testing.T) {
	t.Parallel()
	s := faulty(t, ServerOptions{}, Fault{Kind: FaultReset})
	_, err := client(t).Do(request(t, http.MethodGet, s.URL()+imdsQuery, "", "Metadata", "true"))
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("%v, want a reset", err)
	}
}

func TestFaultResetWithoutAConnection(t *testing.T) {
	t.Parallel()
	defer func() {
		if got := recover(); got != http.ErrAbortHandler {
			t.Errorf("%v, want the request aborted", got)
		}
	}()
	reset(httptest.NewRecorder())
}

func TestFaultTruncated(t *testing.T) {
	t.Parallel()
	s := faulty(t, ServerOptions{}, Fault{Kind: FaultTruncated})
	res, err := client(t).Do(request(t, http.MethodGet, s.URL()+imdsQuery, "", "Metadata", "true"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = res.Body.Close() }()
	body, err := io.ReadAll(res.Body)
	if !errors.Is(err, io.ErrUnexpectedEOF) || len(body) == 0 || int64(len(body)) >= res.ContentLength {
		t.Errorf("%d of %d bytes, %v", len(body), res.ContentLength, err)
	}
}

func TestFaultSlowBody(t *testing.T) {
	t.Parallel()
	s := faulty(t, ServerOptions{}, Fault{Kind: FaultSlowBody, Every: time.Microsecond})
	if got := get(t, s.URL()+imdsQuery, "Metadata", "true"); got.status != 200 || got.fields(t)["access_token"] == "" {
		t.Errorf("%d %s", got.status, got.body)
	}
}

// The body comes a byte at a time, at the pace that was asked for, and ends with its reader.
func TestSlowBodyPace(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		h := &handler{}
		f := strike{Fault: Fault{Kind: FaultSlowBody, Every: time.Second}}
		r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil)
		began, w := time.Now(), httptest.NewRecorder()
		h.send(w, r, f, 200, []byte("0123456789"))
		if took := time.Since(began); took != 10*time.Second || w.Body.String() != "0123456789" {
			t.Errorf("%q in %v", w.Body, took)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 3500*time.Millisecond)
		defer cancel()
		w = httptest.NewRecorder()
		func() {
			defer func() { _ = recover() }()
			h.send(w, r.WithContext(ctx), f, 200, []byte("0123456789"))
		}()
		if w.Body.String() != "012" {
			t.Errorf("%q in three and a half seconds", w.Body)
		}
	})
}

func TestFaultGzipBomb(t *testing.T) {
	t.Parallel()
	s := faulty(t, ServerOptions{}, Fault{Kind: FaultGzipBomb, Size: 1 << 20})
	got := get(t, s.URL()+imdsQuery, "Metadata", "true", "Accept-Encoding", "identity")
	if got.header.Get("Content-Encoding") != "gzip" || len(got.body) > 1<<14 {
		t.Fatalf("%d bytes, %v", len(got.body), got.header)
	}
	packed, err := gzip.NewReader(strings.NewReader(got.body))
	if err != nil {
		t.Fatal(err)
	}
	if n, err := io.Copy(io.Discard, packed); n != 1<<20 || err != nil {
		t.Errorf("unpacks to %d bytes, %v", n, err)
	}
}

// failingWriter takes so many writes and no more.
type failingWriter struct {
	http.ResponseWriter
	writes int
}

func (w *failingWriter) Write(b []byte) (int, error) {
	if w.writes--; w.writes < 0 {
		return 0, io.ErrClosedPipe
	}
	return len(b), nil
}

func TestBodiesEndWithTheirReader(t *testing.T) {
	t.Parallel()
	for writes := range 3 {
		w := &failingWriter{httptest.NewRecorder(), writes}
		writeHuge(t.Context(), w, 1<<40)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	func() {
		defer func() {
			if recover() != http.ErrAbortHandler {
				t.Error("a huge body survives its request")
			}
		}()
		writeHuge(ctx, io.Discard, 1<<40)
	}()
	f := strike{Fault: Fault{Kind: FaultSlowBody, Every: time.Nanosecond}}
	w := &failingWriter{httptest.NewRecorder(), 3}
	(&handler{}).send(w, httptest.NewRequest(http.MethodGet, "/", nil), f, 200, bytes.Repeat([]byte{'x'}, 100))
}

// hang starts a request that a fault holds, and returns when the fault has struck.
func hang(t *testing.T, s *Server) <-chan error {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)
	status := make(chan error, 1)
	r := request(t, http.MethodGet, s.URL()+imdsQuery, "", "Metadata", "true").WithContext(ctx)
	c := client(t)
	go func() {
		res, err := c.Do(r)
		if err == nil {
			_ = res.Body.Close()
			if res.StatusCode != 200 {
				err = errors.New(res.Status)
			}
		}
		status <- err
	}()
	for { // the fault is set for one request, and is gone from the list once it has struck
		select {
		case err := <-status:
			t.Fatalf("the request did not hang: %v", err)
		default:
		}
		if len(s.Backend().Faults()) == 0 {
			return status
		}
		runtime.Gosched()
	}
}

func TestFaultHang(t *testing.T) {
	t.Parallel()
	s := faulty(t, ServerOptions{}, Fault{Kind: FaultHang, Count: 1})
	status := hang(t, s)
	s.Backend().ClearFaults()
	if err := <-status; err != nil {
		t.Errorf("released: %v", err)
	}

	if err := s.Backend().AddFault(Fault{Kind: FaultHang}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	r := request(t, http.MethodGet, s.URL()+imdsQuery, "", "Metadata", "true").WithContext(ctx)
	if _, err := client(t).Do(r); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a caller that gives up: %v", err)
	}
}

func TestCloseLetsGoOfWhatHangs(t *testing.T) {
	t.Parallel()
	s := faulty(t, ServerOptions{}, Fault{Kind: FaultHang, Count: 1})
	status := hang(t, s)
	if err := s.Close(t.Context()); err != nil {
		t.Error(err)
	}
	if err := <-status; err == nil {
		t.Error("a request that hung was answered by Close")
	}
}

// A peer that does not read keeps a Server from closing no longer than the grace.
func TestCloseDoesNotWaitForAStalledReader(t *testing.T) {
	t.Parallel()
	s := faulty(t, ServerOptions{}, Fault{Kind: FaultHugeBody, Size: 1 << 40})
	res, err := client(t).Do(request(t, http.MethodGet, s.URL()+imdsQuery, "", "Metadata", "true"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = res.Body.Close() }()
	if err := s.Close(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestNothingIsAnsweredAfterClose(t *testing.T) {
	t.Parallel()
	h, err := newHandler(ServerOptions{}, "secret")
	if err != nil {
		t.Fatal(err)
	}
	h.close()
	defer func() {
		if got := recover(); got != http.ErrAbortHandler {
			t.Errorf("%v, want the request aborted", got)
		}
	}()
	h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest(http.MethodGet, "/", nil))
}

func TestKeyFaultsOverHTTP(t *testing.T) {
	t.Parallel()
	for kind := FaultKeyOutside; kind.known(); kind++ {
		dir := filepath.Join(t.TempDir(), "keys")
		s := faulty(t, ServerOptions{Form: FormArc, ArcKeyDir: dir}, Fault{Kind: kind, Count: 1})
		got := get(t, s.URL()+arcQuery, "Metadata", "true")
		path, named := strings.CutPrefix(got.header.Get("WWW-Authenticate"), "Basic realm=")
		if got.status != 401 || named == (kind == FaultKeyNoHeader) ||
			(filepath.Dir(path) == dir) == (kind == FaultKeyOutside || kind == FaultKeyNoHeader) {
			t.Errorf("%s: %d %v", kind, got.status, got.header)
		}
		if kind == FaultKeyOutside || kind == FaultKeySymlink {
			text, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			careless := get(t, s.URL()+arcQuery, "Metadata", "true", "Authorization", "Basic "+string(text))
			if careless.status != 200 {
				t.Errorf("%s: a client that follows gets %d", kind, careless.status)
			}
		}
		if got := arcToken(t, s, arcQuery); got.status != 200 {
			t.Errorf("after %s: %d %s", kind, got.status, got.body)
		}
	}
}

func TestWhichLegOfArcIsStruck(t *testing.T) {
	t.Parallel()
	s := faulty(t, ServerOptions{Form: FormArc}, Fault{Kind: FaultThrottle})
	if got := arcToken(t, s, arcQuery); got.status != 429 {
		t.Errorf("second leg: %d", got.status)
	}
	s.Backend().ClearFaults()
	if err := s.Backend().AddFault(Fault{Kind: FaultStatus, Status: 500, Challenge: true}); err != nil {
		t.Fatal(err)
	}
	if got := get(t, s.URL()+arcQuery, "Metadata", "true"); got.status != 500 {
		t.Errorf("first leg: %d", got.status)
	}
	if got := get(t, s.URL()+appServicePath+appQuery, "X-IDENTITY-HEADER", s.secret); got.status != 200 {
		t.Errorf("App Service has no first leg: %d", got.status)
	}
}

func TestFaultLimits(t *testing.T) {
	t.Parallel()
	now := epoch
	b := New(Options{Now: func() time.Time { return now }})
	add := func(f Fault) {
		t.Helper()
		if err := b.AddFault(f); err != nil {
			t.Fatal(err)
		}
	}
	hits := func(resource string, times int) (n int) {
		for range times {
			if b.strike(resource, false).Kind != 0 {
				n++
			}
		}
		return n
	}
	add(Fault{Kind: FaultThrottle, Count: 2})
	if n := hits(vault, 5); n != 2 {
		t.Errorf("count 2: struck %d", n)
	}
	add(Fault{Kind: FaultThrottle, For: time.Minute})
	now = now.Add(time.Minute - 1)
	if n := hits(vault, 3); n != 3 {
		t.Errorf("within its duration: struck %d of 3", n)
	}
	if got := b.Faults(); len(got) != 1 || got[0].Struck != 3 || !got[0].Until.Equal(epoch.Add(time.Minute)) {
		t.Errorf("in force: %+v", got)
	}
	now = now.Add(1)
	if n := hits(vault, 3); n != 0 || len(b.Faults()) != 0 {
		t.Errorf("after its duration: struck %d", n)
	}
	add(Fault{Kind: FaultThrottle, Resource: vault})
	if a, o := hits(vault, 1), hits(vault+"/", 1); a != 1 || o != 0 {
		t.Errorf("for one resource: struck %d of it, %d of another", a, o)
	}
	b.ClearFaults()
	add(Fault{Kind: FaultThrottle, Probability: 0.25})
	if n := hits(vault, 1000); n < 180 || n > 320 {
		t.Errorf("a quarter: struck %d of 1000", n)
	}
	b.ClearFaults()
	add(Fault{Kind: FaultReset, Count: 1})
	add(Fault{Kind: FaultHang})
	if first, second := b.strike(vault, false).Kind, b.strike(vault, false).Kind; first != FaultReset ||
		second != FaultHang {
		t.Errorf("struck by %s, then by %s", first, second)
	}
	b.ClearFaults()
	for range maxFaults {
		add(Fault{Kind: FaultThrottle})
	}
	if err := b.AddFault(Fault{Kind: FaultThrottle}); err == nil {
		t.Error("faults without end")
	}
}

func TestFaultsThatMakeNoSense(t *testing.T) {
	t.Parallel()
	b := New(Options{})
	for _, c := range []struct {
		fault Fault
		want  string
	}{
		{Fault{}, "gzip-bomb"},
		{Fault{Kind: 200}, "gzip-bomb"},
		{Fault{Kind: FaultHang, Count: -1}, "not negative"},
		{Fault{Kind: FaultHang, For: -1}, "not negative"},
		{Fault{Kind: FaultHugeBody, Size: -1}, "not negative"},
		{Fault{Kind: FaultSlowBody, Every: -1}, "not negative"},
		{Fault{Kind: FaultHang, Probability: 1.5}, "probability"},
		{Fault{Kind: FaultHang, Probability: -1}, "probability"},
		{Fault{Kind: FaultStatus}, "status from 200 to 599"},
		{Fault{Kind: FaultStatus, Status: 101}, "status from 200 to 599"},
		{Fault{Kind: FaultTimes}, "expires_in or expires_on"},
		{Fault{Kind: FaultTimes, ExpiresIn: "0", Challenge: true}, "carries no token"},
		{Fault{Kind: FaultRedirect, Location: "/a\r\nb"}, "one line"},
	} {
		if err := b.AddFault(c.fault); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v, want %s", c.fault, err, c.want)
		}
	}
	if n := len(b.Faults()); n != 0 {
		t.Errorf("%d faults in force", n)
	}
}

func ExampleFaultKinds() {
	all := FaultKinds()
	fmt.Println(all[:11])
	fmt.Println(all[11:17])
	fmt.Println(all[17:])
	// Output:
	// [status throttle hang slow-body reset truncated html not-json huge-body gzip-bomb redirect]
	// [times wrong-identity empty-token unavailable past-exp key-outside]
	// [key-symlink key-directory key-fifo key-too-big key-no-header]
}
