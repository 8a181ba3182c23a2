package server

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/attest"
	"perceptd/agent/grants"
	"perceptd/tokencache"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	canary   = "eyJ0eXAi.canary-that-must-not-leak.c2ln"
	vault    = "https://vault.azure.net"
	visionID = "00000000-0000-0000-0000-000000000001"
	objectID = "00000000-0000-0000-0000-0000000000aa"
	armID    = "/subscriptions/s/resourceGroups/g/providers/Microsoft.ManagedIdentity/userAssignedIdentities/v"
	claimed  = "00000000-0000-0000-0000-0000000000cc"
)

// noon is the device's wall clock in every test.
var noon = time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)

type fetchFunc = func(context.Context, tokencache.Key) (tokencache.Fetched, error)

// fetchDay gives every key the canary with a day to live.
func fetchDay(context.Context, tokencache.Key) (tokencache.Fetched, error) {
	return tokencache.Fetched{
		Token: tokencache.Token{
			Text:      tokencache.NewSecret(canary),
			ExpiresOn: time.Now().Add(24 * time.Hour),
			NotBefore: time.Unix(1795399929, 0),
			Claims:    tokencache.Claims{ClientID: claimed},
		},
		Left: 24 * time.Hour,
	}, nil
}

func fetchError(err error) fetchFunc {
	return func(context.Context, tokencache.Key) (tokencache.Fetched, error) {
		return tokencache.Fetched{}, err
	}
}

// rules grant this process, and module vision, what the tests ask for.
func rules() agent.Rules {
	me := uint32(os.Getuid())
	return agent.Rules{Rules: grants.Rules{
		Identities: []grants.Identity{
			{Name: "device", Default: true},
			{Name: "vision", ClientID: visionID, ObjectID: objectID, ResourceID: armID},
			{Name: "camera", ClientID: "00000000-0000-0000-0000-000000000002"},
		},
		Grants: []grants.Grant{
			{Caller: grants.Match{UID: &me}, Identity: "device", Resources: []string{vault, "https://device.only"}},
			{Caller: grants.Match{UID: &me}, Identity: "vision", Resources: []string{vault, "https://two.choices"}},
			{Caller: grants.Match{UID: &me}, Identity: "camera", Resources: []string{"https://two.choices"}},
			{Caller: grants.Match{Module: "vision"}, Identity: "vision",
				Resources: []string{vault, "https://module.only"}},
		},
	}}
}

// logged keeps every line written, for a look at what must not be there.
type logged struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logged) Sync() error { return nil }

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

func (l *logged) logger() *zap.Logger {
	encoder := zapcore.NewJSONEncoder(zap.NewProductionEncoderConfig())
	return zap.New(zapcore.NewCore(encoder, l, zap.DebugLevel))
}

// daemon is a server at work with everything that a test may look at.
type daemon struct {
	*Server
	listening atomic.Pointer[loopbackAt] // nil: no loopback listener
	t         testing.TB
	log       *logged
	dir       string
}

// newDaemon returns a server on a real agent, shut down at the end of the test. Nothing listens yet.
func newDaemon(t testing.TB, fetch fetchFunc) *daemon {
	t.Helper()
	return newDaemonWith(t, fetch, rules())
}

func newDaemonWith(t testing.TB, fetch fetchFunc, r agent.Rules) *daemon {
	t.Helper()
	return newDaemonOf(t, agent.Options{Fetch: fetch, Rules: r})
}

func newDaemonOf(t testing.TB, o agent.Options) *daemon {
	t.Helper()
	log := new(logged)
	o.Log = log.logger()
	a, err := agent.New(o)
	if err != nil {
		t.Fatal(err)
	}
	d := &daemon{
		Server: &Server{Agent: a, Callers: provingOnly("vision", "stranger", "q"), Log: log.logger(),
			Now: func() time.Time { return noon }},
		t: t, log: log, dir: shortFolder(t),
	}
	d.Loopback = d.listeningNow
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := d.Shutdown(ctx); err != nil {
			t.Errorf("shutdown: %v", err)
		}
		a.Close()
		if strings.Contains(log.String(), "canary") {
			t.Errorf("the log has the token:\n%s", log)
		}
	})
	return d
}

// provingOnly returns an attestor that knows those modules by their sockets, and no engine.
func provingOnly(modules ...string) *attest.Attestor {
	rules := attest.Rules{Modules: make(map[string]attest.Requirement)}
	for _, module := range modules {
		rules.Modules[module] = attest.Requirement{}
	}
	p := attest.New(attest.Options{})
	p.SetRules(rules)
	return p
}

func (d *daemon) listen(name string) net.Listener {
	d.t.Helper()
	l, err := net.Listen("unix", filepath.Join(d.dir, name))
	if err != nil {
		d.t.Fatal(err)
	}
	return l
}

// tokens serves the token socket, or a module's own, and returns its path.
func (d *daemon) tokens(module string) string {
	d.t.Helper()
	l := d.listen("token" + module + ".sock")
	d.serving(func() error { return d.ServeTokens(l, module) })
	return l.Addr().String()
}

// admin serves the admin socket and returns its path.
func (d *daemon) admin() string {
	d.t.Helper()
	l := d.listen("admin.sock")
	d.serving(func() error { return d.ServeAdmin(l) })
	return l.Addr().String()
}

// serving runs serve and checks in the end that it ended well.
func (d *daemon) serving(serve func() error) {
	done := make(chan error, 1)
	go func() { done <- serve() }()
	d.t.Cleanup(func() {
		_ = d.Shutdown(context.Background())
		if err := <-done; err != nil {
			d.t.Errorf("serving ended with %v", err)
		}
	})
}

// reply is an answer as it came over the wire.
type reply struct {
	status int
	header http.Header
	body   string
	closes bool // the server closes the connection
}

// field returns a field of a JSON body.
func (r reply) field(t testing.TB, name string) any {
	t.Helper()
	var all map[string]any
	if err := json.Unmarshal([]byte(r.body), &all); err != nil {
		t.Fatalf("body is no JSON object: %v\n%s", err, r.body)
	}
	return all[name]
}

func (r reply) problem(t testing.TB) api.Problem {
	t.Helper()
	if got := r.header.Get("Content-Type"); got != "application/problem+json" {
		t.Errorf("content type %q, want a problem", got)
	}
	return decoded[api.Problem](t, r.body)
}

// decoded reads body strictly as a T.
func decoded[T any](t testing.TB, body string) T {
	t.Helper()
	var value T
	d := json.NewDecoder(strings.NewReader(body))
	d.DisallowUnknownFields()
	if err := d.Decode(&value); err != nil {
		t.Fatalf("%v in body %s", err, body)
	}
	return value
}

// send writes text as it is on a new connection and reads one answer.
func send(t testing.TB, socket, text string) reply {
	t.Helper()
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	return exchangeOn(t, conn, text)
}

func exchangeOn(t testing.TB, conn net.Conn, text string) reply {
	t.Helper()
	// The server may answer and close before all is written: that answer is what counts.
	_, _ = io.WriteString(conn, text)
	method, _, _ := strings.Cut(text, " ")
	response, err := http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: method})
	if err != nil {
		t.Fatalf("no answer to %.80q: %v", text, err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatalf("answer to %.80q broke off: %v", text, err)
	}
	return reply{response.StatusCode, response.Header, string(body), response.Close}
}

// get returns the text of a GET request with more header lines.
func get(target string, lines ...string) string {
	return requestText("GET", target, "", lines...)
}

func requestText(method, target, body string, lines ...string) string {
	text := method + " " + target + " HTTP/1.1\r\nHost: localhost\r\n"
	for _, line := range lines {
		text += line + "\r\n"
	}
	return text + "\r\n" + body
}

const (
	metadata  = "Metadata: true"
	appHeader = "X-IDENTITY-HEADER: anything"
	imdsVault = "/metadata/identity/oauth2/token?api-version=2018-02-01&resource=https%3A%2F%2Fvault.azure.net"
	appVault  = "/msi/token?api-version=2019-08-01&resource=https%3A%2F%2Fvault.azure.net"
	v1Vault   = "/v1/token?resource=https%3A%2F%2Fvault.azure.net"
)

// shortFolder makes a folder for a test's sockets, whose paths may have 107 bytes: TMPDIR, where t.TempDir is, may be
// longer than that.
func shortFolder(t testing.TB) string {
	t.Helper()
	folder, err := os.MkdirTemp("/tmp", "percept")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(folder) })
	return folder
}
