package source

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"perceptd/tokencache"
)

const (
	dialTimeout    = 5 * time.Second
	maxHeaderBytes = 16 << 10
	maxBodyBytes   = 64 << 10
)

// fetch is one fetch as it crosses azidentity: it carries the key in, and the result or the failure out.
// azidentity calls the transport on the goroutine that called it, so it needs no lock.
type fetch struct {
	key     tokencache.Key
	secret  tokencache.Secret      // Arc: what the challenge's key file held
	result  tokencache.Fetched     // set with a good answer
	failure *tokencache.FetchError // set with any other
}

type fetchKey struct{}

var errNoFetch = errors.New("a request outside a fetch is not sent")

// transport carries azidentity's requests to one place and nowhere else: no proxy, no redirect, one
// dialled address. It judges each answer before azidentity sees it, so that azidentity, which quotes
// what it does not like, has nothing to quote and never caches a token that was refused here.
type transport struct {
	at           target
	wall         func() time.Time
	clockTrusted func() bool // whether wall is right
	ignored      ignoredFields
	http         *http.Transport
}

func newTransport(at target, o Options) *transport {
	dialer := &net.Dialer{Timeout: dialTimeout}
	return &transport{at: at, wall: o.Wall, clockTrusted: o.ClockTrusted, ignored: ignoredFields{logger: o.Log},
		http: &http.Transport{
			Proxy: nil, // the variables that name one are not meant for tokens
			DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
				return dialer.DialContext(ctx, network, at.dial)
			},
			TLSHandshakeTimeout:    dialTimeout,
			DisableCompression:     true, // so that the bound on a body is one on what it unpacks to
			MaxResponseHeaderBytes: maxHeaderBytes,
			// A connection of its own for each request: what is sent beside an answer is never read, and so never the
			// next one's; and net/http does not repeat a request, as it does when a kept connection breaks under it.
			DisableKeepAlives: true,
			// Headers and body are waited for until the fetch's own deadline.
		}}
}

// Do sends one request of azidentity's, implementing azcore's policy.Transporter. Its error is the
// fetch's failure, or the request context's.
func (t *transport) Do(req *http.Request) (*http.Response, error) {
	f, ok := req.Context().Value(fetchKey{}).(*fetch)
	if !ok {
		return nil, errNoFetch
	}
	if f.failure = t.checkRequest(f, req); f.failure != nil {
		return nil, f.failure
	}
	resp, err := t.http.RoundTrip(req)
	if err != nil {
		return nil, t.roundTripError(f, req, err)
	}
	defer func() { _ = resp.Body.Close() }()
	var body []byte
	if resp.StatusCode != http.StatusSwitchingProtocols { // its body is the connection: no deadline ends a read of it
		if body, err = io.ReadAll(io.LimitReader(resp.Body, maxBodyBytes+1)); err != nil {
			return nil, t.roundTripError(f, req, err)
		}
	}
	answer, failed := t.checkResponse(f, req, resp, body)
	if failed != nil {
		f.failure = failed
		return nil, f.failure
	}
	resp.Body, resp.ContentLength = io.NopCloser(bytes.NewReader(answer)), int64(len(answer))
	return resp, nil
}

// checkRequest stops a request that azidentity should not have made, because its environment changed, or because the
// key file was replaced after it was checked.
func (t *transport) checkRequest(f *fetch, req *http.Request) *tokencache.FetchError {
	if !t.at.serves(req.URL) {
		return malformed("azidentity no longer asks %s: was the environment changed or the Arc agent installed? "+
			"restart perceptd", t.at.dial)
	}
	if sent := req.Header.Get("Authorization"); sent != "" && sent != "Basic "+f.secret.Reveal() {
		return malformed("the Arc key file changed between check and use: who else can write to %s?", arcKeyDir)
	}
	return nil
}

// roundTripError makes a failed round trip the fetch's failure, unless the context ended it.
func (t *transport) roundTripError(f *fetch, req *http.Request, err error) error {
	if ctxErr := req.Context().Err(); ctxErr != nil {
		return ctxErr
	}
	f.failure = t.at.connectionFailure(err)
	f.failure.Extent = extentOf(err)
	return f.failure
}

// checkResponse checks an answer, and returns the body that azidentity gets. body may end after maxBodyBytes+1.
func (t *transport) checkResponse(
	f *fetch, req *http.Request, resp *http.Response, body []byte,
) ([]byte, *tokencache.FetchError) {
	now := t.wall().Round(0)
	date, _ := http.ParseTime(resp.Header.Get("Date")) // zero for none and for nonsense

	if t.at.form == Arc && req.Header.Get("Authorization") == "" {
		switch resp.StatusCode {
		case http.StatusUnauthorized:
			var failed *tokencache.FetchError
			f.secret, failed = readChallenge(resp.Header.Values("WWW-Authenticate"), arcKeyDir)
			return nil, failed
		case http.StatusOK:
			return nil, malformed("%s gave an answer without a challenge first: it is not the Azure Arc agent",
				t.at.dial)
		}
	}
	if resp.StatusCode != http.StatusOK {
		if !date.IsZero() {
			now = date // Retry-After's date is by the same clock
		}
		return nil, t.at.statusFailure(f.key, resp.StatusCode, retryAfter(resp.Header, now), body)
	}
	members := parseFields(body)
	if members == nil || len(body) > maxBodyBytes {
		return nil, t.at.intercepted(resp.StatusCode, describe(body))
	}
	a, err := parseAnswer(members, t.clockTrusted())
	if err != nil {
		return nil, t.at.invalidAnswer(err, now)
	}
	if failed := a.checkIdentity(t.at, f.key); failed != nil {
		return nil, failed
	}
	fetched, err := a.fetched(now)
	if err != nil {
		return nil, t.at.invalidAnswer(err, now)
	}
	if t.at.form == Arc {
		fetched.Counted = false // the agent runs on this device, and counts by its clock
	}
	f.result = fetched
	t.ignored.log(a.ignored)
	return a.forAzidentity(f.key, fetched.Left), nil
}

// ignoredFields logs the fields that endpoints fill with nonsense and that a token can do without: each name once,
// which bounds it, and never their content.
type ignoredFields struct {
	logger *zap.Logger

	mu     sync.Mutex // protects logged
	logged []string
}

func (i *ignoredFields) log(fields []string) {
	i.mu.Lock()
	defer i.mu.Unlock()
	for _, name := range fields {
		if !slices.Contains(i.logged, name) {
			i.logged = append(i.logged, name)
			i.logger.Warn("a field of the back end's answer makes no sense and is ignored; the token is used, and "+
				"this is not told again",
				zap.String("field", name))
		}
	}
}
