package source

import (
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"perceptd/tokencache"
)

func TestIMDSRequest(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		key   tokencache.Key
		query url.Values
	}{
		{system, url.Values{}},
		{byClient, url.Values{"client_id": {clientID}}},
		{byObject, url.Values{"object_id": {objectID}}},
		{byARM, url.Values{"msi_res_id": {armID}}},
	} {
		t.Run(test.key.Selector.Kind.String(), func(t *testing.T) {
			t.Parallel()
			var seen *http.Request
			m := imds(t, func(w http.ResponseWriter, r *http.Request) {
				seen = r.Clone(context.Background())
				fmt.Fprint(w, goodAnswer(time.Now()))
			})
			if _, err := m.Fetch(t.Context(), test.key); err != nil {
				t.Fatal(err)
			}
			test.query.Set("api-version", "2018-02-01")
			test.query.Set("resource", vault)
			if seen.Host != "169.254.169.254" || seen.URL.Path != "/metadata/identity/oauth2/token" ||
				seen.URL.Query().Encode() != test.query.Encode() {
				t.Errorf("asked %s for %s", seen.Host, seen.URL)
			}
			if seen.Header.Get("Metadata") != "true" || !strings.HasPrefix(seen.UserAgent(), "perceptd ") {
				t.Errorf("headers %v", seen.Header)
			}
			if seen.Header.Get("Accept-Encoding") != "" {
				t.Error("a compressed answer is asked for")
			}
		})
	}
}

func TestAppServiceRequest(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		q := r.URL.Query()
		if r.Header.Get("X-Identity-Header") != canary || q.Get("api-version") != "2019-08-01" ||
			q.Get("mi_res_id") != armID || q.Get("resource") != vault || q.Get("keep") != "1" {
			t.Errorf("asked %s with %v", r.URL, r.Header)
		}
		fmt.Fprint(w, goodAnswer(time.Now()).with(object{"expires_in": nil, "client_id": clientID, "mi_res_id": armID}))
	}))
	defer server.Close()
	t.Setenv(envEndpoint, server.URL+"/msi/token?keep=1")
	t.Setenv(envHeader, canary)
	for _, name := range []string{"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy"} {
		t.Setenv(name, "http://127.0.0.1:1")
	}
	m, err := New(Options{Endpoint: AppService})
	if err != nil {
		t.Fatal(err)
	}
	if m.Endpoint() != AppService || m.Address() != server.Listener.Addr().String() {
		t.Errorf("endpoint %s at %s", m.Endpoint(), m.Address())
	}
	got, err := m.Fetch(t.Context(), byARM)
	if err != nil {
		t.Fatal(err)
	}
	if got.Left > 24*time.Hour || got.Left < 24*time.Hour-time.Minute {
		t.Errorf("left %v", got.Left)
	}
	noCanary(t, m, got)
}

// A proxy cannot be seen to be passed by with a loopback address, which net/http never proxies: the
// metadata service's address it would.
func TestNoProxy(t *testing.T) {
	proxy := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter,
		*http.Request) {
		t.Error("the proxy was asked")
	}))
	defer proxy.Close()
	server := httptest.NewServer(answering(200, goodAnswer(time.Now()).String()))
	defer server.Close()
	t.Setenv("HTTP_PROXY", proxy.URL)
	t.Setenv(envAuthorityHost, server.URL+"/")
	m, err := New(Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Fetch(t.Context(), system); err != nil {
		t.Error(err)
	}
}

func TestFetched(t *testing.T) {
	t.Parallel()
	now := time.Now().Truncate(time.Second)
	text := makeJWT(claimsAt(now))
	m := imds(t, answering(200, goodAnswer(now).with(object{"access_token": text, "refresh_in": 4000}).String(),
		"Date", now.UTC().Format(http.TimeFormat)))
	got, err := m.Fetch(t.Context(), byClient)
	if err != nil {
		t.Fatal(err)
	}
	if got.Token.Text.Reveal() != text {
		t.Error("another token's text")
	}
	if got.Left != 24*time.Hour || got.Nominal != 24*time.Hour+5*time.Minute || got.RefreshIn != 4000*time.Second {
		t.Errorf("left %v of %v, refresh in %v", got.Left, got.Nominal, got.RefreshIn)
	}
	if !got.Token.ExpiresOn.Equal(now.Add(24*time.Hour)) || !got.Token.NotBefore.Equal(now.Add(-5*time.Minute)) {
		t.Errorf("expires on %v, not before %v", got.Token.ExpiresOn, got.Token.NotBefore)
	}
	c := got.Token.Claims
	if c.ClientID != clientID || c.ObjectID != objectID || len(c.Groups) != 2 ||
		!c.IssuedAt.Equal(now.Add(-5*time.Minute)) {
		t.Errorf("claims %+v", c)
	}
	noCanary(t, got, m)
}

// azidentity's cache is the whole process's: without a way past it the second fetch would be no call.
func TestEveryFetchIsOneCall(t *testing.T) {
	t.Parallel()
	var calls atomic.Int64
	m := imds(t, func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, goodAnswer(time.Now()).with(object{"access_token": fmt.Sprintf("token-%d", calls.Add(1))}))
	})
	for want := int64(1); want <= 3; want++ {
		got, err := m.Fetch(t.Context(), system)
		if err != nil {
			t.Fatal(err)
		}
		if calls.Load() != want || got.Token.Text.Reveal() != fmt.Sprintf("token-%d", want) {
			t.Fatalf("after %d fetches there were %d calls", want, calls.Load())
		}
	}
}

func TestFailuresAreNotRetried(t *testing.T) {
	t.Parallel()
	var calls atomic.Int64
	m := imds(t, func(w http.ResponseWriter, _ *http.Request) {
		calls.Add(1)
		w.WriteHeader(http.StatusServiceUnavailable)
	})
	_, err := m.Fetch(t.Context(), system)
	wantFailure(t, err, tokencache.Unreachable, "answered 503")
	if calls.Load() != 1 {
		t.Errorf("%d calls", calls.Load())
	}
}

// A panic is a failure of that fetch, which tells where it was and not its value.
func TestPanicIsAFailure(t *testing.T) {
	t.Parallel()
	m := imds(t, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, goodAnswer(time.Now())) })
	m.transport.wall = func() time.Time { panic("canary-4f1d2c7e9b") }
	_, err := m.Fetch(t.Context(), system)
	wantFailure(t, err, tokencache.Malformed, "a panic of type string in perceptd/agent/source.TestPanicIsAFailure")
	if strings.Contains(err.Error(), "canary") {
		t.Error(err)
	}
	m.transport.wall = time.Now
	if _, err := m.Fetch(t.Context(), system); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

// What a back end sends beside its answer is never taken for the next one's, nor printed by net/http.
func TestNoConnectionIsKept(t *testing.T) {
	t.Parallel()
	peers := map[string]bool{}
	m := imds(t, func(w http.ResponseWriter, r *http.Request) {
		peers[r.RemoteAddr] = true // one fetch at a time
		fmt.Fprint(w, goodAnswer(time.Now()))
	})
	for range 4 {
		if _, err := m.Fetch(t.Context(), system); err != nil {
			t.Fatal(err)
		}
	}
	if len(peers) != 4 {
		t.Errorf("%d connections for 4 fetches", len(peers))
	}
}

func TestIdentitiesAtOnce(t *testing.T) {
	t.Parallel()
	m := imds(t, func(w http.ResponseWriter, r *http.Request) {
		q := r.URL.Query()
		fmt.Fprint(w, goodAnswer(time.Now()).with(object{
			"access_token": "for-" + q.Get("client_id") + q.Get("object_id") + q.Get("msi_res_id")}))
	})
	var all sync.WaitGroup
	for range 8 {
		for _, key := range []tokencache.Key{system, byClient, byObject, byARM} {
			all.Go(func() {
				got, err := m.Fetch(t.Context(), key)
				if err != nil || got.Token.Text.Reveal() != "for-"+key.Selector.ID {
					t.Errorf("%v: another identity's token, or %v", key, err)
				}
			})
		}
	}
	all.Wait()
	if len(m.credentials) != 4 {
		t.Errorf("%d credentials for 4 identities", len(m.credentials))
	}
}

func TestSelectorsThatSelectNothing(t *testing.T) {
	t.Parallel()
	m := imds(t, func(http.ResponseWriter, *http.Request) { t.Error("a request was sent") })
	for _, s := range []tokencache.Selector{
		{Kind: tokencache.ClientID}, {Kind: tokencache.ObjectID}, {Kind: tokencache.ResourceID},
		{Kind: tokencache.SystemAssigned, ID: "x"}, {Kind: "other", ID: "x"},
	} {
		_, err := m.Fetch(t.Context(), tokencache.Key{Selector: s, Resource: vault})
		wantFailure(t, err, tokencache.Refused, "selects no identity")
	}
	_, err := m.Fetch(t.Context(), tokencache.Key{})
	wantFailure(t, err, tokencache.Refused, "no resource")
}

func TestCancelled(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	m := imds(t, func(_ http.ResponseWriter, r *http.Request) {
		cancel()
		<-r.Context().Done()
	})
	_, err := m.Fetch(ctx, system)
	var failed *tokencache.FetchError
	if !errors.Is(err, context.Canceled) || errors.As(err, &failed) {
		t.Errorf("got %v, want context.Canceled and no FetchError", err)
	}
}

func TestNoAnswerInTime(t *testing.T) {
	t.Parallel()
	hang := func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }
	stall := func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, `{"access_token":"`)
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	}
	for name, handler := range map[string]http.HandlerFunc{"headers": hang, "body": stall} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := httptest.NewServer(handler)
			t.Cleanup(server.Close)
			m := imdsAt(t, server.Listener.Addr().String(), Options{Timeout: 20 * time.Millisecond})
			_, err := m.Fetch(t.Context(), system)
			wantFailure(t, err, tokencache.Unreachable, "no answer from 127.0.0.1:")

			m = imdsAt(t, server.Listener.Addr().String(), Options{})
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
			defer cancel()
			_, err = m.Fetch(ctx, system)
			wantFailure(t, err, tokencache.Unreachable, "no answer from 127.0.0.1:")
		})
	}
}

// An answer that hands over the connection fails as any other that is no token, at once: no deadline ends a read of it.
func TestAnswerThatSwitchesProtocols(t *testing.T) {
	t.Parallel()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		c, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		fmt.Fprint(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n")
		_, _ = c.Read(make([]byte, 1)) // until the other side closes it
		_ = c.Close()
	}))
	t.Cleanup(server.Close)
	_, err := imdsAt(t, server.Listener.Addr().String(), Options{}).Fetch(t.Context(), system)
	wantFailure(t, err, tokencache.Malformed, "answered 101: no token endpoint answers so")
}

func TestEnvironmentChangedBehindOurBack(t *testing.T) {
	asked := func(http.ResponseWriter, *http.Request) { t.Error("a request was sent") }
	server := httptest.NewServer(http.HandlerFunc(asked))
	defer server.Close()
	m := imdsAt(t, server.Listener.Addr().String(), Options{})
	t.Setenv(envEndpoint, server.URL)
	t.Setenv(envHeader, canary)
	_, err := m.Fetch(t.Context(), system)
	wantFailure(t, err, tokencache.Malformed, "no longer asks")

	t.Setenv(envThumbprint, "x")
	_, err = m.Fetch(t.Context(), byClient)
	wantFailure(t, err, tokencache.Refused, "was the environment changed?")
}

func TestRequestOutsideAFetch(t *testing.T) {
	t.Parallel()
	m := imds(t, func(http.ResponseWriter, *http.Request) { t.Error("a request was sent") })
	req := httptest.NewRequest(http.MethodGet, imdsURL, nil)
	resp, err := m.transport.Do(req)
	if !errors.Is(err, errNoFetch) {
		_ = resp.Body.Close()
		t.Errorf("got %v, want errNoFetch", err)
	}
}

func TestRedirectsAreNotFollowed(t *testing.T) {
	t.Parallel()
	other := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter,
		*http.Request) {
		t.Error("the redirect was followed")
	}))
	t.Cleanup(other.Close)
	m := imds(t, answering(http.StatusFound, "", "Location", other.URL))
	_, err := m.Fetch(t.Context(), system)
	wantFailure(t, err, tokencache.Unreachable, "302 with a redirect")
}

func TestCompressedAnswerIsNotUnpacked(t *testing.T) {
	t.Parallel()
	m := imds(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Encoding", "gzip")
		z := gzip.NewWriter(w)
		fmt.Fprint(z, goodAnswer(time.Now()))
		_ = z.Close()
	})
	_, err := m.Fetch(t.Context(), system)
	wantFailure(t, err, tokencache.Unreachable, "no JSON object")
}

// azidentity gets what was judged: it would refuse a token for a field that nobody needs, and take a member in
// capitals, with another token, for the real one.
func TestAzidentityGetsWhatWasJudged(t *testing.T) {
	t.Parallel()
	for name, body := range map[string]string{
		"a field that it cannot read": goodAnswer(time.Now()).and("ext_expires_in", "never "+canary).String(),
		"a member in capitals": strings.TrimSuffix(goodAnswer(time.Now()).String(), "}") +
			`,"ACCESS_TOKEN":"other"}`,
	} {
		m := imds(t, answering(200, body))
		got, err := m.Fetch(t.Context(), system)
		if err != nil || got.Token.Text.Reveal() != canary {
			t.Errorf("%s: another token, or %v", name, err)
		}
	}
}

func TestWhatIsIgnoredIsToldOnce(t *testing.T) {
	t.Parallel()
	core, told := observer.New(zap.DebugLevel)
	server := httptest.NewServer(answering(200,
		goodAnswer(time.Now()).with(object{"refresh_in": canary, "not_before": canary}).String()))
	t.Cleanup(server.Close)
	m := imdsAt(t, server.Listener.Addr().String(), Options{Log: zap.New(core)})
	for _, key := range []tokencache.Key{system, byClient, system} {
		if _, err := m.Fetch(t.Context(), key); err != nil {
			t.Fatal(err)
		}
	}
	var fields []string
	for _, entry := range told.All() {
		fields = append(fields, fmt.Sprint(entry.ContextMap()["field"]))
		noCanary(t, entry.Message, entry.ContextMap())
	}
	if fmt.Sprint(fields) != "[refresh_in not_before]" {
		t.Errorf("told of %v", fields)
	}
}
