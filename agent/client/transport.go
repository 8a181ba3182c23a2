package client

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"perceptd/agent/api"
)

// Transport is an http.RoundTripper that sends requests with a token of perceptd's, and reports to perceptd when a
// resource refuses one. Set its fields before its first use; it may then be used by many goroutines.
//
// At an answer of 401 or 403 it reports, and where perceptd has another token by now, and the request's body can be had
// again, it sends the request once more. Otherwise the answer is the caller's, as it came.
type Transport struct {
	Client *Client // nil: the zero Client

	// Resource and Identity say which token, as in TokenRequest. Resource is required.
	Resource, Identity string

	// Hosts are those that get the token, each as a URL has it: a name, with a port unless it is the scheme's own.
	// Requests to others, to which one of these may have redirected, are sent without. At least one is required.
	Hosts []string

	// LoopbackHTTP lets the token go over plain HTTP to a loopback address among Hosts. All else needs https.
	LoopbackHTTP bool

	// Base sends the requests. Nil: http.DefaultTransport.
	Base http.RoundTripper

	// Advised is called with the answer to each report. Nil: not called.
	Advised func(api.Advice)
}

var (
	errNoHosts    = errors.New("client.Transport: no Hosts are named that may get the token")
	errPlain      = errors.New("client.Transport: a token is not sent over plain HTTP")
	reportTimeout = 15 * time.Second
)

// RoundTrip sends r with a token. Beside Base's errors it returns those of Client.Token. It leaves r as it is; one that
// has an Authorization header already is sent unchanged.
func (t *Transport) RoundTrip(r *http.Request) (*http.Response, error) {
	switch {
	case len(t.Hosts) == 0:
		return nil, closeBody(r, errNoHosts)
	case !slices.Contains(t.Hosts, r.URL.Host) || r.Header.Get("Authorization") != "":
		return t.base().RoundTrip(r)
	case r.URL.Scheme != "https" && !(t.LoopbackHTTP && isLoopback(r.URL.Hostname())):
		return nil, closeBody(r, errPlain)
	}
	token, err := t.token(r.Context())
	if err != nil {
		return nil, closeBody(r, err)
	}
	response, err := t.base().RoundTrip(authorized(r, token))
	if err != nil || response.StatusCode != http.StatusUnauthorized && response.StatusCode != http.StatusForbidden {
		return response, err
	}
	if !t.report(r.Context(), response, token) {
		return response, nil
	}
	return t.retry(r, response, token), nil
}

// retry sends r with a newer token and returns the answer, or the one before where that cannot be done.
func (t *Transport) retry(r *http.Request, before *http.Response, refused api.Token) *http.Response {
	token, err := t.token(r.Context())
	if err != nil || token.SHA256 == refused.SHA256 {
		return before
	}
	next := authorized(r, token)
	if r.Body != nil && r.Body != http.NoBody {
		if r.GetBody == nil {
			return before
		}
		if next.Body, err = r.GetBody(); err != nil {
			return before
		}
	}
	response, err := t.base().RoundTrip(next)
	if err != nil {
		return before
	}
	_, _ = io.CopyN(io.Discard, before.Body, 64<<10) // so that the connection can be used again
	_ = before.Body.Close()
	return response
}

// report reports a refusal to perceptd, and returns whether another token may be accepted now. The caller has an
// answer, so a report that fails is no error.
func (t *Transport) report(ctx context.Context, response *http.Response, token api.Token) bool {
	ctx, cancel := context.WithTimeout(ctx, reportTimeout)
	defer cancel()
	advice, err := t.client().Rejected(ctx, api.Rejection{
		Resource: t.Resource, Identity: t.Identity, SHA256: token.SHA256, Status: response.StatusCode,
		Claims: claimsChallenge(response),
	})
	if err != nil {
		return false
	}
	if t.Advised != nil {
		t.Advised(advice)
	}
	return advice.Retry
}

// claimsChallenge returns the claims challenge of an answer, in the header that it came in.
func claimsChallenge(response *http.Response) string {
	for _, challenge := range response.Header.Values("WWW-Authenticate") {
		if strings.Contains(challenge, "claims=") {
			return challenge
		}
	}
	return ""
}

func (t *Transport) token(ctx context.Context) (api.Token, error) {
	return t.client().Token(ctx, TokenRequest{Resource: t.Resource, Identity: t.Identity})
}

func (t *Transport) client() *Client {
	if t.Client == nil {
		return &Client{}
	}
	return t.Client
}

func (t *Transport) base() http.RoundTripper {
	if t.Base == nil {
		return http.DefaultTransport
	}
	return t.Base
}

func authorized(r *http.Request, token api.Token) *http.Request {
	r = r.Clone(r.Context())
	r.Header.Set("Authorization", "Bearer "+token.AccessToken)
	return r
}

func isLoopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// closeBody closes the body of a request that is not sent, as a RoundTripper must.
func closeBody(r *http.Request, err error) error {
	if r.Body != nil {
		_ = r.Body.Close()
	}
	return err
}
