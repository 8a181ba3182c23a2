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

// exchange is one fetch as it crosses azidentity: what was asked for goes in, what came of it out.
// azidentity calls the transport on the goroutine that called it, so it needs no lock.
type exchange struct {
	key     tokencache.Key
	secret  tokencache.Secret      // Arc: what the challenge's key file held
	fetched tokencache.Fetched     // set with a good answer
	failed  *tokencache.FetchError // set with any other
}

type exchangeKey struct{}

var errNoFetch = errors.New("a request outside a fetch is not sent")

// transport carries azidentity's requests to one place and nowhere else: no proxy, no redirect, one
// dialled address. It judges each answer before azidentity sees it, so that azidentity, which quotes
// what it does not like, has nothing to quote and never caches a token that was refused here.
type transport struct {
	at      place
	wall    func() time.Time
	known   func() bool // whether wall is right
	ignored ignored
	http    *http.Transport
}

func newTransport(at place, o Options) *transport {
	dialer := &net.Dialer{Timeout: dialTimeout}
	return &transport{at: at, wall: o.Wall, known: o.Known, ignored: ignored{log: o.Log}, http: &http.Transport{
		Proxy: nil, // the variables that name one are not meant for tokens
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, network, at.dial)
		},
		TLSHandshakeTimeout:    dialTimeout,
		DisableCompression:     true, // so that the bound on a body is one on what it unpacks to
		MaxResponseHeaderBytes: maxHeaderBytes,
		// A connection of its own for each request: what is sent beside an answer is never read, and so never the next
		// one's; and net/http does not repeat a request, as it does when a kept connection breaks under it.
		DisableKeepAlives: true,
		// Headers and body are waited for until the fetch's own deadline.
	}}
}

// Do sends one request of azidentity's, implementing azcore's policy.Transporter. Its error is the
// exchange's failure, or the request context's.
func (t *transport) Do(req *http.Request) (*http.Response, error) {
	x, ok := req.Context().Value(exchangeKey{}).(*exchange)
	if !ok {
		return nil, errNoFetch
	}
	if x.failed = t.mayNotSend(x, req); x.failed != nil {
		return nil, x.failed
	}
	resp, err := t.http.RoundTrip(req)
	if err != nil {
		return nil, t.broken(x, req, err)
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxBodyBytes+1))
	if err != nil {
		return nil, t.broken(x, req, err)
	}
	answer, failed := t.judge(x, req, resp, body)
	if failed != nil {
		x.failed = failed
		return nil, x.failed
	}
	resp.Body, resp.ContentLength = io.NopCloser(bytes.NewReader(answer)), int64(len(answer))
	return resp, nil
}

// mayNotSend stops a request that azidentity should not have made: since its environment changed, or
// since somebody put another file in the place of a checked key file.
func (t *transport) mayNotSend(x *exchange, req *http.Request) *tokencache.FetchError {
	if !t.at.serves(req.URL) {
		return malformed("azidentity no longer asks %s: was the environment changed or the Arc agent installed? restart perceptd", t.at.dial)
	}
	if sent := req.Header.Get("Authorization"); sent != "" && sent != "Basic "+x.secret.Reveal() {
		return malformed("the Arc key file changed between check and use: who else can write to %s?", arcKeyDir)
	}
	return nil
}

// broken turns a failed round trip into the exchange's failure, unless the caller's patience ended it.
func (t *transport) broken(x *exchange, req *http.Request, err error) error {
	if ctxErr := req.Context().Err(); ctxErr != nil {
		return ctxErr
	}
	x.failed = t.at.broken(err)
	x.failed.Extent = extentOf(err)
	return x.failed
}

// judge checks an answer, and returns the body that azidentity gets. body may be cut off after maxBodyBytes and one more.
func (t *transport) judge(x *exchange, req *http.Request, resp *http.Response, body []byte) ([]byte, *tokencache.FetchError) {
	now := t.wall().Round(0)
	date, _ := http.ParseTime(resp.Header.Get("Date")) // zero for none and for nonsense

	if t.at.form == Arc && req.Header.Get("Authorization") == "" {
		switch resp.StatusCode {
		case http.StatusUnauthorized:
			var failed *tokencache.FetchError
			x.secret, failed = readChallenge(resp.Header.Values("WWW-Authenticate"), arcKeyDir)
			return nil, failed
		case http.StatusOK:
			return nil, malformed("%s gave an answer without a challenge first: it is not the Azure Arc agent", t.at.dial)
		}
	}
	if resp.StatusCode != http.StatusOK {
		if !date.IsZero() {
			now = date // Retry-After's date is by the same clock
		}
		return nil, t.at.refused(x.key, resp.StatusCode, retryAfter(resp.Header, now), body)
	}
	f := parseFields(body)
	if f == nil || len(body) > maxBodyBytes {
		return nil, t.at.onTheWay(resp.StatusCode, describe(body))
	}
	a, err := parseAnswer(f, t.known())
	if err != nil {
		return nil, t.at.unusable(err, now)
	}
	if failed := a.checkIdentity(t.at, x.key); failed != nil {
		return nil, failed
	}
	fetched, err := a.fetched(now)
	if err != nil {
		return nil, t.at.unusable(err, now)
	}
	if t.at.form == Arc {
		fetched.Counted = false // the agent runs on this device, and counts by its clock
	}
	x.fetched = fetched
	t.ignored.note(a.ignored)
	return a.forAzidentity(x.key, fetched.Left), nil
}

// ignored tells the log of fields that endpoints fill with nonsense and that a token can do without: once of each name,
// which bounds it, and never of what was in them.
type ignored struct {
	log *zap.Logger

	mu   sync.Mutex // protects told
	told []string
}

func (i *ignored) note(fields []string) {
	i.mu.Lock()
	defer i.mu.Unlock()
	for _, name := range fields {
		if !slices.Contains(i.told, name) {
			i.told = append(i.told, name)
			i.log.Warn("a field of the back end's answer makes no sense and is ignored; the token is used, and this is not told again",
				zap.String("field", name))
		}
	}
}
