package azcredential

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"go.uber.org/goleak"

	"perceptd/agent/api"
	"perceptd/agent/client"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	vault  = "https://vault.azure.net"
	canary = "canary-token-text"
)

// fakePerceptd answers on a token socket with what it was told to, in order, the last over and over.
type fakePerceptd struct {
	client *client.Client

	mu       sync.Mutex
	answers  []any // api.Token, api.Problem
	retry    string
	advice   api.Advice
	asked    []string
	rejected []api.Rejection
}

func newFakePerceptd(t testing.TB) *fakePerceptd {
	t.Helper()
	socket := filepath.Join(shortFolder(t), "token.sock")
	p := &fakePerceptd{client: &client.Client{Socket: socket}}
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: p}
	ended := make(chan struct{})
	go func() { defer close(ended); _ = server.Serve(l) }()
	t.Cleanup(func() { _ = server.Close(); <-ended })
	return p
}

func (p *fakePerceptd) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if r.URL.Path == api.PathRejected {
		var rejection api.Rejection
		_ = json.NewDecoder(r.Body).Decode(&rejection)
		p.rejected = append(p.rejected, rejection)
		answer(w, p.advice, "")
		return
	}
	p.asked = append(p.asked, r.URL.RawQuery)
	next := p.answers[0]
	if len(p.answers) > 1 {
		p.answers = p.answers[1:]
	}
	answer(w, next, p.retry)
}

// stranger is the page of another program at the socket.
type stranger string

func answer(w http.ResponseWriter, v any, retry string) {
	if page, ok := v.(stranger); ok {
		w.Header().Set("Content-Type", "text/html")
		w.WriteHeader(http.StatusForbidden)
		_, _ = io.WriteString(w, string(page))
		return
	}
	w.Header().Set("Content-Type", "application/json")
	if problem, ok := v.(api.Problem); ok {
		w.Header().Set("Content-Type", "application/problem+json")
		if retry != "" {
			w.Header().Set("Retry-After", retry)
		}
		w.WriteHeader(problem.Status)
	}
	_ = json.NewEncoder(w).Encode(v)
}

func token(sha string, standing api.PermissionState, refreshIn int64) api.Token {
	return api.Token{
		AccessToken: canary + sha, TokenType: "Bearer", Resource: vault, ExpiresIn: 36000, RefreshIn: refreshIn,
		SHA256:      sha,
		Permissions: api.Permissions{State: standing},
	}
}

func scope(scopes ...string) policy.TokenRequestOptions {
	return policy.TokenRequestOptions{Scopes: scopes}
}

func TestGetToken(t *testing.T) {
	t.Parallel()
	for name, row := range map[string]struct {
		scope   string
		given   api.Token
		query   string
		refresh time.Duration
	}{
		"a scope": {vault + "/.default", token("1", api.PermissionsCurrent, 600),
			"identity=vision&resource=https%3A%2F%2Fvault.azure.net", 10 * time.Minute},
		"a resource": {vault, token("1", api.PermissionsCurrent, 0),
			"identity=vision&resource=https%3A%2F%2Fvault.azure.net", 0},
		"a slash of its own": {vault + "//.default", token("1", api.PermissionsCurrent, 18000),
			"identity=vision&resource=https%3A%2F%2Fvault.azure.net%2F", refreshWithin},
		"stale permissions": {vault, token("1", api.PermissionsStale, 18000),
			"identity=vision&resource=https%3A%2F%2Fvault.azure.net", refreshStale},
		"stale, and due soon": {vault, token("1", api.PermissionsUncertain, 5),
			"identity=vision&resource=https%3A%2F%2Fvault.azure.net", 5 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newFakePerceptd(t)
			p.answers = []any{row.given}
			before := time.Now().Round(0)
			got, err := New(p.client, &Options{Identity: "vision"}).GetToken(t.Context(),
				policy.TokenRequestOptions{Scopes: []string{row.scope}, EnableCAE: true, TenantID: "another"})
			if err != nil {
				t.Fatal(err)
			}
			after := time.Now().Round(0)
			within := func(at time.Time, d time.Duration) bool {
				return !at.Before(before.Add(d)) &&
					!at.After(after.Add(d))
			}
			if got.Token != canary+"1" || !within(got.ExpiresOn, 10*time.Hour) || !within(got.RefreshOn, row.refresh) {
				t.Errorf("expires in %v, is to be refreshed in %v",
					got.ExpiresOn.Sub(before), got.RefreshOn.Sub(before))
			}
			if len(p.asked) != 1 || p.asked[0] != row.query {
				t.Errorf("asked %q", p.asked)
			}
		})
	}
}

// What is refused for good is asked for once; what may pass is asked for again, as long as its Retry-After says.
func TestRefusals(t *testing.T) {
	t.Parallel()
	refusal := func(status int, code api.Code) api.Problem {
		return api.Problem{Status: status, Code: code, Detail: "because of " + string(code)}
	}
	good := token("1", api.PermissionsCurrent, 600)
	for name, row := range map[string]struct {
		answers []any
		retry   string
		pauses  []time.Duration
		code    api.Code // of the error; empty: there is none
	}{
		"denied":           {[]any{refusal(403, api.CodeNotGranted)}, "", nil, api.CodeNotGranted},
		"revoked":          {[]any{refusal(403, api.CodeRevoked)}, "", nil, api.CodeRevoked},
		"unknown identity": {[]any{refusal(400, api.CodeUnknownIdentity)}, "", nil, api.CodeUnknownIdentity},
		"throttled, then not": {[]any{refusal(503, api.CodeThrottled), refusal(503, api.CodeThrottled), good}, "2",
			[]time.Duration{2 * time.Second, 2 * time.Second}, ""},
		"throttled for long": {[]any{refusal(503, api.CodeThrottled), good}, "3600", []time.Duration{maxPause}, ""},
		"down": {[]any{refusal(503, api.CodeUnreachable)}, "",
			[]time.Duration{time.Second, 2 * time.Second, 4 * time.Second}, api.CodeUnreachable},
		"another program":   {[]any{stranger("<html>"), good}, "", []time.Duration{time.Second}, ""},
		"too many requests": {[]any{refusal(429, api.CodeBusy), good}, "1", []time.Duration{time.Second}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newFakePerceptd(t)
			p.answers, p.retry = row.answers, row.retry
			c := New(p.client, nil)
			var pauses []time.Duration
			c.wait = func(_ context.Context, d time.Duration) error { pauses = append(pauses, d); return nil }
			_, err := c.GetToken(t.Context(), scope(vault+"/.default"))
			var refused *client.Error
			if errors.As(err, &refused) != (row.code != "") || refused != nil && refused.Code != row.code {
				t.Errorf("%v", err)
			}
			if err != nil && (!strings.Contains(err.Error(), "because of "+string(row.code)) ||
				!errors.As(err, new(interface{ NonRetriable() }))) {
				t.Errorf("%v", err)
			}
			if !slices.Equal(pauses, row.pauses) {
				t.Errorf("waited %v, want %v", pauses, row.pauses)
			}
		})
	}
}

func TestUnreachable(t *testing.T) {
	t.Parallel()
	c := New(&client.Client{Socket: filepath.Join(shortFolder(t), "none")}, nil)
	waited := 0
	c.wait = func(ctx context.Context, _ time.Duration) error { waited++; return nil }
	_, err := c.GetToken(t.Context(), scope(vault))
	if !errors.Is(err, fs.ErrNotExist) || waited != maxTries-1 {
		t.Errorf("%v after %d pauses", err, waited)
	}
	ctx, cancel := context.WithCancel(t.Context())
	c.wait = func(ctx context.Context, d time.Duration) error { cancel(); return wait(ctx, d) }
	if _, err := c.GetToken(ctx, scope(vault)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%v", err)
	}
	if err := wait(t.Context(), time.Nanosecond); err != nil {
		t.Error(err)
	}
}

func TestScopes(t *testing.T) {
	t.Parallel()
	p := newFakePerceptd(t)
	c := New(p.client, nil)
	for want, scopes := range map[string][]string{"there are 0": nil, "there are 2": {"a", "b"},
		"names no resource": {""}, "write RESOURCE/.default": {"/.default"}} {
		if _, err := c.GetToken(t.Context(), scope(scopes...)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", scopes, err)
		}
	}
	for _, err := range c.Watch(t.Context(), "") {
		if err == nil || !strings.Contains(err.Error(), "names no resource") {
			t.Errorf("watched: %v", err)
		}
	}
	if _, err := c.Rejected(t.Context(), "", 403); err == nil || len(p.asked)+len(p.rejected) != 0 {
		t.Errorf("%v, asked %q", err, p.asked)
	}
}

// A claims challenge is told to perceptd with the token that it is about. What perceptd knows is the error, where it
// has no other token; the one that was refused is not handed out again.
func TestClaimsChallenge(t *testing.T) {
	t.Parallel()
	p := newFakePerceptd(t)
	p.answers = []any{token("1", api.PermissionsCurrent, 600), token("2", api.PermissionsCurrent, 600)}
	c := New(p.client, &Options{Identity: "vision"})
	if _, err := c.GetToken(t.Context(), scope(vault)); err != nil {
		t.Fatal(err)
	}
	challenge := scope(vault)
	challenge.Claims = `{"access_token":{"nbf":{"essential":true,"value":"1"}}}`
	p.advice = api.Advice{Findings: []api.Finding{{Cause: api.CauseRevoked, Detail: "the back end has no newer token",
		Action: "wait until 14:00"}}}
	_, err := c.GetToken(t.Context(), challenge)
	if err == nil || !strings.Contains(err.Error(),
		vault+" wants another token, and there is none: the back end has no newer token; wait until 14:00") {
		t.Errorf("%v", err)
	}
	p.advice = api.Advice{}
	if _, err = c.GetToken(t.Context(), challenge); err == nil || !strings.Contains(err.Error(), "nothing is known") {
		t.Errorf("%v", err)
	}
	p.advice = api.Advice{Retry: true}
	got, err := c.GetToken(t.Context(), challenge)
	if err != nil || got.Token != canary+"2" {
		t.Errorf("%v", err)
	}
	want := api.Rejection{Resource: vault, Identity: "vision", SHA256: "1", Status: 401, Claims: challenge.Claims}
	if len(p.rejected) != 3 || p.rejected[2] != want || len(p.asked) != 2 {
		t.Errorf("reported %+v, asked %q", p.rejected, p.asked)
	}
	if advice, err := c.Rejected(t.Context(), vault+"/.default", 403); err != nil || !advice.Retry ||
		p.rejected[3].SHA256 != "2" || p.rejected[3].Status != 403 {
		t.Errorf("%+v %v %+v", advice, err, p.rejected[3])
	}
	p.client.Socket += "-gone"
	if _, err := c.GetToken(t.Context(), challenge); !errors.Is(err, fs.ErrNotExist) ||
		!strings.Contains(err.Error(), "telling of a claims challenge") {
		t.Errorf("%v", err)
	}
}

// Many at once, as a pipeline's clients are.
func TestConcurrent(t *testing.T) {
	t.Parallel()
	p := newFakePerceptd(t)
	p.answers = []any{token("1", api.PermissionsCurrent, 600)}
	c := New(p.client, nil)
	var all sync.WaitGroup
	for i := range 32 {
		all.Go(func() {
			if _, err := c.GetToken(t.Context(), scope(fmt.Sprint("api://", i%4))); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
}

func FuzzResourceOf(f *testing.F) {
	for _, s := range []string{"", "/.default", vault, vault + "/.default", vault + "//.default", "\x00/.default"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		resource, err := resourceOf([]string{s})
		if (err == nil) != (resource != "") || err == nil && resource != s && resource+suffix != s {
			t.Errorf("%q: %q, %v", s, resource, err)
		}
	})
}
