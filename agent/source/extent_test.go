package source

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"syscall"
	"testing"
	"time"

	"perceptd/tokencache"
)

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
		server.transport.wall, server.transport.known = func() time.Time { return now }, func() bool { return true }
		_, err := server.Fetch(t.Context(), system)
		if failed := wantFailure(t, err, tokencache.Malformed, ""); failed.JustExpired != row.want {
			t.Errorf("a token that has expired, %s: %v, just expired %v", name, err, failed.JustExpired)
		}
	}
}
