package client_test

import (
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"perceptd/agent/api"
	"perceptd/agent/client"
)

// tokenDaemon gives tokens one after the other, and advice; it remembers what was reported.
type tokenDaemon struct {
	client *client.Client

	mu       sync.Mutex
	given    int
	newer    bool // each report has the next token differ
	rejected []api.Rejection
	fault    bool // reports are refused
}

func newTokenDaemon(t *testing.T) *tokenDaemon {
	t.Helper()
	socket := filepath.Join(client.ShortFolder(t), "token.sock")
	d := &tokenDaemon{client: &client.Client{Socket: socket}, given: 1}
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: d}
	ended := make(chan struct{})
	go func() { defer close(ended); _ = server.Serve(l) }()
	t.Cleanup(func() { _ = server.Close(); <-ended })
	return d
}

func (d *tokenDaemon) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	d.mu.Lock()
	defer d.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	if r.URL.Path == api.PathRejected {
		var rejection api.Rejection
		_ = json.NewDecoder(r.Body).Decode(&rejection)
		d.rejected = append(d.rejected, rejection)
		if d.fault {
			w.WriteHeader(http.StatusTooManyRequests)
			return
		}
		if d.newer {
			d.given++
		}
		_ = json.NewEncoder(w).Encode(api.Advice{Retry: d.newer})
		return
	}
	name := string(rune('0' + d.given))
	_ = json.NewEncoder(w).Encode(api.Token{AccessToken: "token-" + name, SHA256: "digest-" + name,
		Resource: r.URL.Query().Get("resource")})
}

// resource is a server that accepts one token only, and remembers who came with what.
type resource struct {
	*httptest.Server
	accepts, challenge string
	status             int

	mu   sync.Mutex
	seen []string // token and body
}

func newResource(t *testing.T, accepts string) *resource {
	t.Helper()
	s := &resource{accepts: accepts, status: http.StatusForbidden}
	s.Server = httptest.NewTLSServer(s)
	t.Cleanup(s.Close)
	return s
}

func (s *resource) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	s.mu.Lock()
	s.seen = append(s.seen, r.Header.Get("Authorization")+" "+string(body))
	s.mu.Unlock()
	if r.Header.Get("Authorization") != "Bearer "+s.accepts {
		w.Header().Set("WWW-Authenticate", s.challenge)
		w.WriteHeader(s.status)
	}
	_, _ = io.WriteString(w, "answer")
}

func (s *resource) host() string { return strings.TrimPrefix(s.URL, "https://") }

func (s *resource) transport(d *tokenDaemon) *client.Transport {
	return &client.Transport{Client: d.client, Resource: "https://vault.azure.net", Identity: "vision",
		Hosts: []string{s.host()}, Base: s.Client().Transport}
}

func get(t *testing.T, tr http.RoundTripper, to string) (status int, body string) {
	t.Helper()
	response, err := (&http.Client{Transport: tr}).Get(to)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response.StatusCode, string(text)
}

func TestTransport(t *testing.T) {
	t.Parallel()
	t.Run("adds the token", func(t *testing.T) {
		d, s := newTokenDaemon(t), newResource(t, "token-1")
		request, _ := http.NewRequest("GET", s.URL, nil)
		response, err := s.transport(d).RoundTrip(request)
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		if response.StatusCode != 200 || request.Header.Get("Authorization") != "" || len(d.rejected) != 0 {
			t.Errorf("%d, %v, %v", response.StatusCode, request.Header, d.rejected)
		}
	})
	t.Run("tries a newer one", func(t *testing.T) {
		d, s := newTokenDaemon(t), newResource(t, "token-2")
		d.newer = true
		s.challenge = `Bearer error="insufficient_claims", claims="e30="`
		tr := s.transport(d)
		var advised []api.Advice
		tr.Advised = func(a api.Advice) { advised = append(advised, a) }
		response, err := (&http.Client{Transport: tr}).Post(s.URL, "text/plain", strings.NewReader("body"))
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		want := api.Rejection{Resource: "https://vault.azure.net", Identity: "vision", SHA256: "digest-1", Status: 403,
			Claims: s.challenge}
		if response.StatusCode != 200 || len(d.rejected) != 1 || d.rejected[0] != want || len(advised) != 1 {
			t.Errorf("%d, %+v, %+v", response.StatusCode, d.rejected, advised)
		}
		if got := strings.Join(s.seen, "; "); got != "Bearer token-1 body; Bearer token-2 body" {
			t.Errorf("%s", got)
		}
	})
	t.Run("hands the answer on where there is none", func(t *testing.T) {
		d, s := newTokenDaemon(t), newResource(t, "another")
		if status, body := get(t, s.transport(d), s.URL); status != 403 || body != "answer" || len(s.seen) != 1 ||
			len(d.rejected) != 1 || d.rejected[0].Claims != "" {
			t.Errorf("%d %s, %v, %+v", status, body, s.seen, d.rejected)
		}
		d.newer, s.status = true, 401 // a newer one is refused as well: it is tried once
		if status, body := get(t, s.transport(d), s.URL); status != 401 || body != "answer" || len(s.seen) != 3 ||
			len(d.rejected) != 2 {
			t.Errorf("%d %s, %v, %+v", status, body, s.seen, d.rejected)
		}
		d.fault = true
		if status, _ := get(t, s.transport(d), s.URL); status != 401 || len(s.seen) != 4 {
			t.Errorf("a report that fails: %d, %v", status, s.seen)
		}
	})
	t.Run("does not repeat what it cannot", func(t *testing.T) {
		d, s := newTokenDaemon(t), newResource(t, "token-2")
		d.newer = true
		for name, again := range map[string]func() (io.ReadCloser, error){
			"a body that is gone": nil, "a body that fails": func() (io.ReadCloser, error) {
				return nil,
					errors.New("no more")
			},
		} {
			request, _ := http.NewRequest("POST", s.URL, io.NopCloser(strings.NewReader("body")))
			request.GetBody = again
			d.given = 1
			response, err := s.transport(d).RoundTrip(request)
			if err != nil {
				t.Fatal(err)
			}
			response.Body.Close()
			if response.StatusCode != 403 {
				t.Errorf("%s: %d", name, response.StatusCode)
			}
		}
		if len(s.seen) != 2 {
			t.Errorf("%v", s.seen)
		}
	})
}

// The token is for the hosts that are named, over TLS, and nobody else.
func TestTransportKeepsTheToken(t *testing.T) {
	t.Parallel()
	d, s, other := newTokenDaemon(t), newResource(t, "token-1"), newResource(t, "none")
	redirects := newResource(t, "token-1")
	redirects.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, strings.Replace(other.URL, "127.0.0.1", "localhost",
			1)+"/?"+url.Values{"had": {r.Header.Get("Authorization")}}.Encode(), http.StatusFound)
	})
	base := s.Client().Transport.(*http.Transport).Clone()
	base.TLSClientConfig.InsecureSkipVerify = true // the name that it redirects to is not in the certificate of tests
	t.Cleanup(base.CloseIdleConnections)
	tr := redirects.transport(d)
	tr.Base = base
	if status, _ := get(t, tr, redirects.URL); status != 403 || len(other.seen) != 1 ||
		strings.Contains(other.seen[0], "token") || len(d.rejected) != 0 {
		t.Errorf("%d, the other host got %q, reported %v", status, other.seen, d.rejected)
	}
	own, _ := http.NewRequest("GET", s.URL, nil)
	own.Header.Set("Authorization", "Bearer own")
	response, err := s.transport(d).RoundTrip(own)
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	if s.seen[0] != "Bearer own " {
		t.Errorf("a request with an authorization of its own had %q", s.seen)
	}

	plain := httptest.NewServer(s)
	defer plain.Close()
	host := strings.TrimPrefix(plain.URL, "http://")
	refused := &client.Transport{Client: d.client, Resource: "r", Hosts: []string{host, "example.invalid"}}
	body := &closes{Reader: strings.NewReader("")}
	request, _ := http.NewRequest("POST", plain.URL, body)
	if _, err := refused.RoundTrip(request); err == nil || !strings.Contains(err.Error(), "plain HTTP") ||
		!body.closed {
		t.Errorf("plain HTTP: %v, body closed: %v", err, body.closed)
	}
	refused.LoopbackHTTP = true
	if status, _ := get(t, refused, plain.URL); status != 200 {
		t.Errorf("plain HTTP to loopback, as allowed: %d", status)
	}
	request, _ = http.NewRequest("GET", "http://example.invalid/", nil)
	if _, err := refused.RoundTrip(request); err == nil || !strings.Contains(err.Error(), "plain HTTP") {
		t.Errorf("plain HTTP to elsewhere: %v", err)
	}
	if _, err := (&client.Transport{Resource: "r"}).RoundTrip(request); err == nil ||
		!strings.Contains(err.Error(), "no Hosts") {
		t.Errorf("no hosts: %v", err)
	}
	refused.Client = &client.Client{Socket: "/nowhere/token.sock"}
	if _, err := (&http.Client{Transport: refused}).Get(plain.URL); !errors.As(err, new(*client.UnreachableError)) {
		t.Errorf("no daemon: %v", err)
	}
	http.DefaultTransport.(*http.Transport).CloseIdleConnections()
}

type closes struct {
	io.Reader
	closed bool
}

func (c *closes) Close() error { c.closed = true; return nil }

// Many at once share a Transport.
func TestTransportTogether(t *testing.T) {
	t.Parallel()
	d, s := newTokenDaemon(t), newResource(t, "token-1")
	tr := s.transport(d)
	var all sync.WaitGroup
	for range 16 {
		all.Go(func() {
			response, err := (&http.Client{Transport: tr}).Get(s.URL)
			if err != nil {
				t.Error(err)
				return
			}
			defer response.Body.Close()
			if response.StatusCode != 200 {
				t.Errorf("%d", response.StatusCode)
			}
		})
	}
	all.Wait()
}
