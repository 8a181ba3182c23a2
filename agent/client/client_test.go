package client_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"perceptd/agent/api"
	"perceptd/agent/client"
)

// canary is the token that must not show up anywhere but in api.Token.
const canary = "eyJ0eXAi.canary-token-text.signature"

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// connKey is of the number of a request's connection.
type connKey struct{}

var connections atomic.Int64

// serve runs an HTTP server on both sockets of a new folder and returns a client of it.
func serve(t *testing.T, handler http.HandlerFunc) *client.Client {
	t.Helper()
	c := &client.Client{Socket: filepath.Join(client.ShortFolder(t), "token.sock")}
	for _, path := range []string{c.TokenSocketPath(), c.AdminSocketPath()} {
		listener, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		server := httptest.NewUnstartedServer(handler)
		server.Listener.Close()
		server.Listener = listener
		server.Config.ConnContext = func(ctx context.Context, _ net.Conn) context.Context {
			return context.WithValue(ctx, connKey{}, connections.Add(1))
		}
		server.Start()
		t.Cleanup(server.Close)
	}
	return c
}

func answer(w http.ResponseWriter, status int, mediaType, body string) {
	w.Header().Set("Content-Type", mediaType)
	w.WriteHeader(status)
	_, _ = io.WriteString(w, body)
}

func TestPaths(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name         string
		client       client.Client
		token, admin string
	}{
		{"zero", client.Client{}, "/run/percept/token.sock", "/run/percept/admin.sock"},
		{"beside", client.Client{Socket: "/tmp/x/t.sock"}, "/tmp/x/t.sock", "/tmp/x/admin.sock"},
		{"both", client.Client{Socket: "/a/t", AdminSocket: "/b/m"}, "/a/t", "/b/m"},
	}
	for _, test := range tests {
		if got := test.client.TokenSocketPath(); got != test.token {
			t.Errorf("%s: token socket %q, want %q", test.name, got, test.token)
		}
		if got := test.client.AdminSocketPath(); got != test.admin {
			t.Errorf("%s: admin socket %q, want %q", test.name, got, test.admin)
		}
	}
}

func TestFromEnvironment(t *testing.T) {
	t.Setenv(api.SocketVariable, "/somewhere/token.sock")
	if got := client.FromEnvironment().TokenSocketPath(); got != "/somewhere/token.sock" {
		t.Errorf("token socket %q", got)
	}
	t.Setenv(api.SocketVariable, "")
	if got := client.FromEnvironment().TokenSocketPath(); got != api.DefaultTokenSocket {
		t.Errorf("token socket %q", got)
	}
}

var noon = time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)

// TestRequests checks what each method sends and that its answer comes back whole.
func TestRequests(t *testing.T) {
	t.Parallel()
	token := api.Token{AccessToken: canary, TokenType: "Bearer", Identity: "vision",
		Resource: "https://vault.azure.net", ExpiresIn: 7}
	tests := []struct {
		name   string
		call   func(context.Context, *client.Client) (any, error)
		method string
		uri    string
		body   string
		status int // 0: 200
		answer any
	}{
		{
			name: "token",
			call: func(ctx context.Context, c *client.Client) (any, error) {
				return c.Token(ctx, client.TokenRequest{Resource: "https://vault.azure.net"})
			},
			method: "GET", uri: "/v1/token?resource=https%3A%2F%2Fvault.azure.net", answer: token,
		},
		{
			name: "token with all",
			call: func(ctx context.Context, c *client.Client) (any, error) {
				return c.Token(ctx, client.TokenRequest{Resource: "a&b=c", Identity: "vision",
					MinTTL: 10 * time.Minute})
			},
			method: "GET", uri: "/v1/token?identity=vision&min_ttl=10m0s&resource=a%26b%3Dc", answer: token,
		},
		{
			name: "token issued after",
			call: func(ctx context.Context, c *client.Client) (any, error) {
				return c.Token(ctx, client.TokenRequest{Resource: "r",
					IssuedAfter: time.Unix(1795435200, 999), Wait: 90 * time.Second})
			},
			method: "GET", uri: "/v1/token?issued_after=1795435200&resource=r&wait=1m30s", answer: token,
		},
		{
			name: "token with nothing asked for",
			call: func(ctx context.Context, c *client.Client) (any, error) {
				return c.Token(ctx, client.TokenRequest{Resource: "r", MinTTL: -1, Wait: -1})
			},
			method: "GET", uri: "/v1/token?resource=r", answer: token,
		},
		{
			name: "rejected",
			call: func(ctx context.Context, c *client.Client) (any, error) {
				return c.Rejected(ctx, api.Rejection{Resource: "r", Status: 403})
			},
			method: "POST", uri: "/v1/rejected", body: `{"resource":"r","status":403}`,
			answer: api.Advice{Identity: "vision",
				Findings: []api.Finding{{Cause: api.CauseStale, Detail: "d", Action: "a"}}, Retry: true},
		},
		{
			name:   "policy changes",
			call:   func(ctx context.Context, c *client.Client) (any, error) { return c.PolicyChanges(ctx) },
			method: "GET", uri: "/v1/policy-changes", answer: api.PolicyChanges{Now: noon,
				Changes: []api.PolicyChange{{ID: "1", Touched: 2}}},
		},
		{
			name: "note a policy change",
			call: func(ctx context.Context, c *client.Client) (any, error) {
				at := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
				return c.RecordPolicyChange(ctx, api.PolicyChangeRequest{AllResources: true, At: at,
					Effect: api.EffectRevoked})
			},
			method: "POST", uri: "/v1/policy-changes",
			body: `{"all_resources":true,"at":"2026-11-23T12:00:00Z","effect":"revoked"}`,
			answer: api.PolicyChangeAnswer{PolicyChange: api.PolicyChange{ID: "1", Effect: api.EffectRevoked},
				Now: noon},
		},
		{
			name: "withdraw a policy change",
			call: func(ctx context.Context, c *client.Client) (any,
				error) {
				return c.WithdrawPolicyChange(ctx, "a&b")
			},
			method: "DELETE", uri: "/v1/policy-changes?id=a%26b",
			answer: api.PolicyChangeAnswer{PolicyChange: api.PolicyChange{ID: "a&b"}, Now: noon},
		},
		{
			name:   "status",
			call:   func(ctx context.Context, c *client.Client) (any, error) { return c.Status(ctx) },
			method: "GET", uri: "/v1/status", answer: api.Status{Version: "1.2.3", Ready: true},
		},
		{
			name: "refresh",
			call: func(ctx context.Context, c *client.Client) (any, error) {
				return c.Refresh(ctx, api.RefreshRequest{Identity: "vision"})
			},
			method: "POST", uri: "/v1/refresh", body: `{"identity":"vision"}`,
			answer: api.RefreshResponse{Results: []api.RefreshResult{{Identity: "vision",
				Outcome: api.OutcomeUnchanged}}},
		},
		{
			name:   "reload",
			call:   func(ctx context.Context, c *client.Client) (any, error) { return c.Reload(ctx) },
			method: "POST", uri: "/v1/reload", answer: api.ReloadResponse{Changes: []string{"one grant more"}},
		},
		{
			name:   "deny rules",
			call:   func(ctx context.Context, c *client.Client) (any, error) { return c.DenyRules(ctx) },
			method: "GET", uri: "/v1/deny",
			answer: api.DenyRules{Now: noon, DenyStatus: api.DenyStatus{Rules: []api.DenyRule{{ID: "1f0c2a34"}}}},
		},
		{
			name: "deny",
			call: func(ctx context.Context, c *client.Client) (any, error) {
				return c.Deny(ctx, api.DenyRequest{DenyTarget: api.DenyTarget{Module: "vision"}, Note: "stolen"})
			},
			method: "POST", uri: "/v1/deny", body: `{"module":"vision","note":"stolen"}`,
			answer: api.DenyAnswer{Now: noon, DenyRule: api.DenyRule{ID: "1f0c2a34", Origin: api.DenyLocal}},
		},
		{
			name:   "lift deny",
			call:   func(ctx context.Context, c *client.Client) (any, error) { return c.LiftDeny(ctx, "a&b") },
			method: "DELETE", uri: "/v1/deny?id=a%26b", answer: api.DenyAnswer{DenyRule: api.DenyRule{ID: "a&b"}},
		},
		{
			name:   "set hub aside",
			call:   func(ctx context.Context, c *client.Client) (any, error) { return c.SetHubAside(ctx) },
			method: "DELETE", uri: "/v1/deny/hub",
			answer: api.DenyRules{DenyStatus: api.DenyStatus{HubSetAsideOn: noon}},
		},
		{
			name:   "heed hub",
			call:   func(ctx context.Context, c *client.Client) (any, error) { return c.HeedHub(ctx) },
			method: "POST", uri: "/v1/deny/hub", answer: api.DenyRules{Now: noon},
		},
		{
			name:   "forget lost deny rules",
			call:   func(ctx context.Context, c *client.Client) (any, error) { return c.ForgetLostDenyRules(ctx) },
			method: "DELETE", uri: "/v1/deny/lost", answer: api.DenyRules{Now: noon},
		},
		{
			name:   "ready",
			call:   func(ctx context.Context, c *client.Client) (any, error) { return c.Ready(ctx) },
			method: "GET", uri: "/readyz", answer: api.Health{OK: true, Detail: "every token is there"},
		},
		{
			name:   "not ready",
			call:   func(ctx context.Context, c *client.Client) (any, error) { return c.Ready(ctx) },
			method: "GET", uri: "/readyz", status: 503, answer: api.Health{Detail: "no token yet"},
		},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			encoded, err := json.Marshal(test.answer)
			if err != nil {
				t.Fatal(err)
			}
			c := serve(t, func(w http.ResponseWriter, r *http.Request) {
				body, err := io.ReadAll(r.Body)
				if err != nil || string(body) != test.body {
					t.Errorf("body %q (%v), want %q", body, err, test.body)
				}
				if r.Method != test.method || r.RequestURI != test.uri {
					t.Errorf("%s %s, want %s %s", r.Method, r.RequestURI, test.method, test.uri)
				}
				if r.Host != "localhost" || r.Header.Get("Origin") != "" {
					t.Errorf("host %q, headers %v", r.Host, r.Header)
				}
				answer(w, max(test.status, 200), "application/json; charset=utf-8", string(encoded))
			})
			got, err := test.call(t.Context(), c)
			if err != nil || !reflect.DeepEqual(got, test.answer) {
				t.Errorf("got %+v (%v), want %+v", got, err, test.answer)
			}
		})
	}
}

func TestRefusals(t *testing.T) {
	t.Parallel()
	const problem = "application/problem+json"
	tests := []struct {
		name       string
		status     int
		mediaType  string
		body       string
		retryAfter string
		want       client.Error
		text       string
	}{
		{
			name: "problem", status: 403, mediaType: problem,
			body: `{"type":"urn:percept:problem:not_granted","title":"Forbidden","status":403,"detail":"no grant ` +
				`names uid 7","code":"not_granted"}`,
			want: client.Error{Problem: api.Problem{
				Type: "urn:percept:problem:not_granted", Title: "Forbidden", Status: 403,
				Detail: "no grant names uid 7", Code: api.CodeNotGranted,
			}},
			text: "no grant names uid 7",
		},
		{
			name: "choices and time", status: 503, mediaType: problem, retryAfter: "2",
			body: `{"title":"Service Unavailable","status":503,"code":"unreachable","choices":["device"]}`,
			want: client.Error{
				Problem: api.Problem{Title: "Service Unavailable",
					Status: 503, Code: api.CodeUnreachable, Choices: []string{"device"}},
				RetryAfter: 2 * time.Second,
			},
			text: "perceptd answered 503 Service Unavailable",
		},
		{
			name: "the body lies about the status", status: 500, mediaType: problem, retryAfter: "soon",
			body: `{"status":200,"code":"internal"}`,
			want: client.Error{Problem: api.Problem{Status: 500, Code: api.CodeInternal}},
			text: "perceptd answered 500 Internal Server Error",
		},
		{
			name: "no problem document", status: 502, mediaType: "text/html", body: canary,
			want: client.Error{Problem: api.Problem{Title: "Bad Gateway", Status: 502}},
			text: "what answers at the socket is not perceptd, or another version of it: it answered 502 Bad Gateway",
		},
		{
			name: "broken problem document", status: 404, mediaType: problem, body: `{"detail":"half`,
			want: client.Error{Problem: api.Problem{Title: "Not Found", Status: 404}},
			text: "what answers at the socket is not perceptd, or another version of it: it answered 404 Not Found",
		},
		{
			name: "a redirect is not followed", status: 302, mediaType: "text/plain",
			want: client.Error{Problem: api.Problem{Title: "Found", Status: 302}},
			text: "what answers at the socket is not perceptd, or another version of it: it answered 302 Found",
		},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			c := serve(t, func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Location", "http://localhost/elsewhere")
				if test.retryAfter != "" {
					w.Header().Set("Retry-After", test.retryAfter)
				}
				answer(w, test.status, test.mediaType, test.body)
			})
			_, err := c.Token(t.Context(), client.TokenRequest{Resource: "https://vault.azure.net"})
			var refusal *client.Error
			if !errors.As(err, &refusal) {
				t.Fatalf("error %v", err)
			}
			if !reflect.DeepEqual(*refusal, test.want) {
				t.Errorf("got %+v, want %+v", *refusal, test.want)
			}
			if err.Error() != test.text {
				t.Errorf("text %q, want %q", err, test.text)
			}
		})
	}
}

// TestBusyReadyIsARefusal keeps a refused question apart from the answer "not ready", which shares
// its status.
func TestBusyReadyIsARefusal(t *testing.T) {
	t.Parallel()
	c := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		answer(w, 503, "application/problem+json", `{"code":"internal"}`)
	})
	_, err := c.Ready(t.Context())
	var refusal *client.Error
	if !errors.As(err, &refusal) || refusal.Code != api.CodeInternal {
		t.Errorf("error %v", err)
	}
}

func TestAnswersOutsideTheContract(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name, mediaType, body, want string
	}{
		{"other media type", "text/plain", `{"access_token":"` + canary + `"}`, "the answer is not one of perceptd's"},
		{"no media type", "", `{"access_token":"` + canary + `"}`, "the answer is not one of perceptd's"},
		{"no JSON", "application/json", canary, "the answer is not one of perceptd's"},
		{"cut", "application/json", `{"access_token":"` + canary, "the answer is not one of perceptd's"},
		{"other type", "application/json", `{"access_token":"x","expires_in":"` + canary + `"}`,
			"the answer is not one of perceptd's"},
		{"no token", "application/json", `{"access_token":""}`, "the answer is not one of perceptd's"},
		{"endless", "application/json", `{"access_token":"` + strings.Repeat(canary, 1+api.MaxAnswer/len(canary)) +
			`"}`, fmt.Sprintf("longer than %d bytes", api.MaxAnswer)},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			c := serve(t, func(w http.ResponseWriter, _ *http.Request) {
				answer(w, 200, test.mediaType, test.body)
			})
			token, err := c.Token(t.Context(), client.TokenRequest{Resource: "https://vault.azure.net"})
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error %v, want %q", err, test.want)
			}
			if strings.Contains(fmt.Sprintf("%v %+v %#v", err, err, err), "canary") {
				t.Errorf("the error tells the token: %v", err)
			}
			if token != (api.Token{}) {
				t.Error("a token beside an error")
			}
		})
	}
}

func TestUnreachable(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name string
		at   func(t *testing.T, path string)
		want error
	}{
		{"nothing there", func(*testing.T, string) {}, fs.ErrNotExist},
		{"nobody listens", func(t *testing.T, path string) {
			// No process may be started meanwhile: until it runs its own program it has the socket too.
			syscall.ForkLock.RLock()
			defer syscall.ForkLock.RUnlock()
			listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
			if err != nil {
				t.Fatal(err)
			}
			listener.SetUnlinkOnClose(false)
			listener.Close()
		}, syscall.ECONNREFUSED},
		{"hangs up", func(t *testing.T, path string) {
			listener, err := net.Listen("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			done := make(chan struct{})
			go func() {
				defer close(done)
				if conn, err := listener.Accept(); err == nil {
					// The request is read first, so that the close is an end and not a reset.
					_, _ = conn.Read(make([]byte, 4096))
					conn.Close()
				}
			}()
			t.Cleanup(func() { listener.Close(); <-done })
		}, io.EOF},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			c := &client.Client{Socket: filepath.Join(client.ShortFolder(t), "token.sock")}
			test.at(t, c.Socket)
			checkUnreachable(t, c, test.want)
		})
	}
}

func checkUnreachable(t *testing.T, c *client.Client, want error) {
	t.Helper()
	_, err := c.Token(t.Context(), client.TokenRequest{Resource: "https://vault.azure.net"})
	var unreachable *client.UnreachableError
	if !errors.As(err, &unreachable) || unreachable.Socket != c.Socket {
		t.Fatalf("error %v", err)
	}
	if !errors.Is(err, want) {
		t.Errorf("cause %v, want %v", unreachable.Err, want)
	}
	if strings.Count(err.Error(), c.Socket) != 1 {
		t.Errorf("text %q does not name the socket once", err)
	}
}

// Not in parallel: a process on its way to another program holds this one's sockets open for a moment.
func TestNotPermitted(t *testing.T) {
	if os.Getuid() == 0 {
		runAsNobody(t)
		return
	}
	c := &client.Client{Socket: filepath.Join(client.ShortFolder(t), "token.sock")}
	listener, err := net.Listen("unix", c.Socket)
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	if err := os.Chmod(c.Socket, 0); err != nil {
		t.Fatal(err)
	}
	checkUnreachable(t, c, fs.ErrPermission)
}

// runAsNobody runs the calling test once more in a process of the user nobody: no mode keeps root out.
func runAsNobody(t *testing.T) {
	t.Helper()
	again := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v")
	again.Dir = "/"
	again.Env = []string{"TMPDIR=/tmp"}
	again.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := again.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
		t.Errorf("as nobody: %v\n%s", err, out)
	}
}

// hang serves until the client is gone; waiting for the request tells that it was sent.
func hang(t *testing.T, afterHeader bool) (c *client.Client, asked <-chan struct{}) {
	t.Helper()
	arrived := make(chan struct{})
	var once sync.Once
	c = serve(t, func(w http.ResponseWriter, r *http.Request) {
		if afterHeader {
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusOK)
			_, _ = io.WriteString(w, `{"access_`)
			_ = http.NewResponseController(w).Flush()
		}
		once.Do(func() { close(arrived) })
		<-r.Context().Done()
	})
	return c, arrived
}

func TestContexts(t *testing.T) {
	t.Parallel()
	for _, afterHeader := range []bool{false, true} {
		t.Run(fmt.Sprintf("cancelled, after the header: %t", afterHeader), func(t *testing.T) {
			t.Parallel()
			c, asked := hang(t, afterHeader)
			ctx, cancel := context.WithCancel(t.Context())
			go func() { <-asked; cancel() }()
			_, err := c.Status(ctx)
			if err != context.Canceled {
				t.Errorf("error %v", err)
			}
		})
		t.Run(fmt.Sprintf("out of time, after the header: %t", afterHeader), func(t *testing.T) {
			t.Parallel()
			c, _ := hang(t, afterHeader)
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
			defer cancel()
			_, err := c.Token(ctx, client.TokenRequest{Resource: "https://vault.azure.net"})
			var unreachable *client.UnreachableError
			if !errors.As(err, &unreachable) || !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("error %v", err)
			}
		})
	}
}

// lateContext is a context whose deadline is over and whose timer has not fired yet, as on a busy machine.
type lateContext struct{ context.Context }

func (lateContext) Deadline() (time.Time, bool) { return time.Unix(1, 0), true }

func TestDeadlineBeforeItsTimer(t *testing.T) {
	t.Parallel()
	c, _ := hang(t, false)
	_, err := c.Status(lateContext{t.Context()})
	var unreachable *client.UnreachableError
	if !errors.As(err, &unreachable) || unreachable.Err != context.DeadlineExceeded {
		t.Errorf("error %v", err)
	}
}

func FuzzAnswer(f *testing.F) {
	f.Add(200, "application/json", []byte(`{"access_token":"x"}`), "")
	f.Add(403, "application/problem+json", []byte(`{"code":"not_granted","choices":["a"]}`), "3")
	f.Add(503, "application/problem+json; charset=", []byte(`null`), "-1")
	f.Fuzz(func(t *testing.T, status int, mediaType string, body []byte, retryAfter string) {
		if status < 200 || status > 599 {
			t.Skip("no final HTTP status")
		}
		c := serve(t, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", mediaType)
			w.Header().Set("Retry-After", retryAfter)
			w.WriteHeader(status)
			_, _ = w.Write(body)
		})
		token, err := c.Token(t.Context(), client.TokenRequest{Resource: "https://vault.azure.net"})
		if (err == nil) == (token.AccessToken == "") {
			t.Errorf("error %v beside a token of %d bytes", err, len(token.AccessToken))
		}
		if err != nil && err.Error() == "" {
			t.Error("an error without text")
		}
		var refusal *client.Error
		if errors.As(err, &refusal) && refusal.RetryAfter < 0 {
			t.Errorf("retry after %v", refusal.RetryAfter)
		}
	})
}

// A deny rule that is in force, or lifted, and not on the disk is returned beside the error that says so.
func TestDenyRuleThatIsNotKeptIsReturned(t *testing.T) {
	t.Parallel()
	c := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		answer(w, 507, "application/problem+json",
			`{"code":"not_kept","detail":"in force","deny_rule":{"id":"1f0c2a34","module":"vision"}}`)
	})
	rule, err := c.Deny(t.Context(), api.DenyRequest{DenyTarget: api.DenyTarget{Module: "vision"}})
	if refusal, ok := errors.AsType[*client.Error](err); !ok || refusal.Code != api.CodeNotKept ||
		rule.ID != "1f0c2a34" || rule.Module != "vision" {
		t.Errorf("denied %+v, %v", rule, err)
	}
	if was, err := c.LiftDeny(t.Context(), "1f0c2a34"); err == nil || was.ID != "1f0c2a34" {
		t.Errorf("lifted %+v, %v", was, err)
	}
}

// A policy change that is in force, or withdrawn, and not on the disk is returned beside the error that says so.
func TestChangeThatIsNotKeptIsReturned(t *testing.T) {
	t.Parallel()
	c := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		answer(w, 507, "application/problem+json",
			`{"code":"not_kept","detail":"in force","policy_change":{"id":"9b2e7c10","effect":"revoked"}}`)
	})
	recorded, err := c.RecordPolicyChange(t.Context(),
		api.PolicyChangeRequest{AllResources: true, Effect: api.EffectRevoked})
	if refusal, ok := errors.AsType[*client.Error](err); !ok || refusal.Code != api.CodeNotKept ||
		recorded.ID != "9b2e7c10" || recorded.Effect != api.EffectRevoked {
		t.Errorf("recorded %+v, %v", recorded, err)
	}
	was, err := c.WithdrawPolicyChange(t.Context(), "9b2e7c10")
	if err == nil || was.ID != "9b2e7c10" {
		t.Errorf("withdrawn %+v, %v", was, err)
	}
}

// An answer that hands over the connection is not the daemon's, and ends at once: no context ends a read of it.
func TestAnswerThatSwitchesProtocols(t *testing.T) {
	t.Parallel()
	c := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		connection, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		_, _ = io.WriteString(connection, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: "+
			"x\r\n\r\n")
		_, _ = connection.Read(make([]byte, 1)) // until the other side closes it
		_ = connection.Close()
	})
	_, err := c.DenyRules(t.Context())
	if _, is := errors.AsType[*client.ContractError](err); !is {
		t.Error(err)
	}
}
