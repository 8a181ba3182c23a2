package server

import (
	"bufio"
	"bytes"
	"cmp"
	"compress/gzip"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/grants"
	"perceptd/agent/source"
	"perceptd/tokencache"
)

// backEndFault is something that goes wrong at the back end.
type backEndFault struct {
	name  string
	talk  func(w io.Writer, good string)
	kind  tokencache.Kind    // by which the source knows it
	hang  bool               // the source has to lose patience
	gives tokencache.Outcome // what the source gives after all; zero for nothing

	challenge string // of Azure Arc's agent, instead of one that names the key's file
}

// raw answers with those bytes.
func raw(text string) func(io.Writer, string) {
	return func(w io.Writer, _ string) { _, _ = io.WriteString(w, text) }
}

// says answers in order, with a body of its own.
func says(status int, body string, lines ...string) func(io.Writer, string) {
	head := fmt.Sprintf("HTTP/1.1 %d %s\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: "+
		"%d\r\n", status, http.StatusText(status), len(body))
	for _, line := range lines {
		head += line + "\r\n"
	}
	return raw(head + "\r\n" + body)
}

// changed answers with the right body, of which members are others; nil takes one away.
func changed(members map[string]any) func(io.Writer, string) {
	return func(w io.Writer, good string) {
		var body map[string]any
		if json.Unmarshal([]byte(good), &body) != nil {
			return
		}
		for name, value := range members {
			body[name] = value
			if value == nil {
				delete(body, name)
			}
		}
		text, _ := json.Marshal(body)
		says(200, string(text))(w, good)
	}
}

// ownExpiry is a token whose own exp is that far from now.
func ownExpiry(in time.Duration) string {
	exp := time.Now().Add(in).Unix()
	claims := fmt.Sprintf(`{"exp":%d,"iat":%d,"nbf":%d}`, exp, exp-86700, exp-86700)
	encode := base64.RawURLEncoding.EncodeToString
	return "e30." + encode([]byte(claims)) + "." + encode([]byte(canary))
}

// endless repeats text until nobody reads it any more.
func endless(head, text string) func(io.Writer, string) {
	return func(w io.Writer, _ string) {
		_, err := io.WriteString(w, head)
		for err == nil {
			_, err = io.WriteString(w, text)
		}
	}
}

func gzipped(good string) string {
	var packed bytes.Buffer
	w := gzip.NewWriter(&packed)
	zeros := make([]byte, 1<<20)
	for range 64 {
		_, _ = w.Write(zeros)
	}
	_ = w.Close()
	return packed.String()
}

const year = 365 * 24 * 3600

// backEndFaults are the rows of the matrix.
func backEndFaults() []backEndFault {
	const ok = "HTTP/1.1 200 OK\r\n"
	slow := func(w io.Writer, good string) {
		for _, b := range []byte(ok + "Content-Length: 1000\r\n\r\n" + good) {
			if _, err := w.Write([]byte{b}); err != nil {
				return
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
	return []backEndFault{
		{name: "closes without a word", talk: raw(""), kind: tokencache.Unreachable},
		{name: "hangs", talk: raw(""), kind: tokencache.Unreachable, hang: true},
		{name: "hangs in the header", talk: raw(ok + "Content-Type: appl"), kind: tokencache.Unreachable, hang: true},
		{name: "hangs in the body", talk: raw(ok + "Content-Length: 500\r\n\r\n{"), kind: tokencache.Unreachable,
			hang: true},
		{name: "sends byte by byte", talk: slow, kind: tokencache.Unreachable, hang: true},
		{name: "is no HTTP", talk: raw("SSH-2.0-OpenSSH_9.2\r\n"), kind: tokencache.Malformed},
		{name: "200 with a page, of a captive portal",
			talk: says(200, "<html>sign in</html>", "Content-Type: text/html"), kind: tokencache.Unreachable},
		{name: "200 with nothing", talk: says(200, ""), kind: tokencache.Unreachable},
		{name: "200 with half a body", talk: raw(ok + "Content-Length: 500\r\n\r\n{"), kind: tokencache.Unreachable},
		{name: "200 with a body without end", talk: endless(ok+"\r\n{", strings.Repeat(" ", 4096)),
			kind: tokencache.Unreachable},
		{name: "a header without end", talk: endless(ok, "X-Pad: "+strings.Repeat("x", 4096)+"\r\n"),
			kind: tokencache.Malformed},
		{name: "a gzip bomb", talk: says(200, gzipped(""), "Content-Encoding: gzip"), kind: tokencache.Unreachable},
		{name: "a redirect to elsewhere", talk: says(307, "", "Location: http://127.0.0.1:9/"),
			kind: tokencache.Unreachable},
		{name: "no token in it", talk: changed(map[string]any{"access_token": nil}), kind: tokencache.Malformed},
		{name: "a token that has expired", talk: changed(map[string]any{"expires_on": "1600000000", "expires_in": "0"}),
			kind: tokencache.Malformed},
		{name: "a token that has expired by its own exp",
			talk: changed(map[string]any{"access_token": ownExpiry(-time.Hour)}), kind: tokencache.Malformed},
		{name: "expires_in alone, of a token that has expired by its own exp",
			talk: changed(map[string]any{"access_token": ownExpiry(-time.Hour),
				"expires_on": nil}), gives: tokencache.Older},
		{name: "an expires_in that stands still",
			talk: changed(map[string]any{"expires_in": "86400", "expires_on": nil}), gives: tokencache.Newer},
		{name: "expires_in 0 beside a good expires_on, by a clock that is known",
			talk: changed(map[string]any{"expires_in": "0"}), gives: tokencache.Newer},
		{name: "senseless advice", talk: changed(map[string]any{"refresh_in": -1.5, "not_before": "never",
			"ext_expires_in": "later"}), gives: tokencache.Newer},
		{name: "negative times", talk: changed(map[string]any{"expires_on": "-1", "expires_in": "-86400"}),
			kind: tokencache.Malformed},
		{name: "the year 9999", talk: changed(map[string]any{"expires_on": "253402300799",
			"expires_in": "251637407999"}), kind: tokencache.Malformed},
		{name: "times in words", talk: changed(map[string]any{"expires_on": "tomorrow", "expires_in": "a day"}),
			kind: tokencache.Malformed},
		{name: "another resource's token", talk: changed(map[string]any{"resource": "https://elsewhere.example.net"}),
			kind: tokencache.Malformed},
		{name: "400, no such identity",
			talk: says(400,
				`{"statusCode":400,"message":"No User Assigned or Delegated Managed Identity found for specified `+
					`ClientId/ResourceId/PrincipalId."}`), kind: tokencache.IdentityNotFound},
		{name: "401", talk: says(401, ""), kind: tokencache.Refused},
		{name: "403", talk: says(403, `{"statusCode":403,"message":"Forbidden"}`), kind: tokencache.Refused},
		{name: "403 with nothing", talk: says(403, ""), kind: tokencache.Unreachable},
		{name: "403 with a page, of a filter", talk: says(403, "<!DOCTYPE html><p>Identity not found",
			"Content-Type: text/html"), kind: tokencache.Unreachable},
		{name: "400 with XML, of a proxy", talk: says(400, "<?xml version='1.0'?><Error/>", "Content-Type: text/xml"),
			kind: tokencache.Unreachable},
		{name: "400 with JSON of another shape", talk: says(400, `{"error":{"code":"BadRequest"}}`),
			kind: tokencache.Unreachable},
		{name: "407", talk: says(407, ""), kind: tokencache.Unreachable},
		{name: "400, temporarily_unavailable",
			talk: says(400,
				`{"error":"temporarily_unavailable","error_description":"AADSTS90033: A transient error has `+
					`occurred."}`), kind: tokencache.Unreachable},
		{name: "403, server_error", talk: says(403, `{"error":"server_error"}`), kind: tokencache.Unreachable},
		{name: "404", talk: says(404, ""), kind: tokencache.Unreachable},
		{name: "429", talk: says(429, ""), kind: tokencache.Throttled},
		{name: "429, come back in 30,000 ms", talk: says(429, "", "x-ms-retry-after-ms: 30000"),
			kind: tokencache.Throttled},
		{name: "429, come back in years", talk: says(429, "", "Retry-After: "+strconv.Itoa(30*year)),
			kind: tokencache.Throttled},
		{name: "429, come back yesterday", talk: says(429, "", "Retry-After: Sun, 06 Nov 1994 08:49:37 GMT"),
			kind: tokencache.Throttled},
		{name: "500", talk: says(500, ""), kind: tokencache.Unreachable},
		{name: "502 with a page", talk: says(502, "<html>bad gateway</html>"), kind: tokencache.Unreachable},
		{name: "503, come back in nonsense", talk: says(503, "", "Retry-After: soon, perhaps"),
			kind: tokencache.Unreachable},
	}
}

// sickBackEnd is an App Service endpoint, or Azure Arc's agent, that has another ailment for each resource, or none.
type sickBackEnd struct {
	key string // the file that Azure Arc's agent has put its key into; empty: it is no such agent

	mu  sync.Mutex // protects what follows
	ill map[string]*patient
}

// patient is what the back end knows of one resource.
type patient struct {
	mu      sync.Mutex // protects what follows
	ill     *backEndFault
	life    int // seconds that its tokens have
	calls   int
	written atomic.Int64 // bytes of answers that were taken
}

func (p *patient) set(ill *backEndFault, life int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ill, p.life = ill, life
}

func (p *patient) called() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.calls
}

// counting counts what a connection takes.
type counting struct {
	net.Conn
	taken *atomic.Int64
}

func (c counting) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.taken.Add(int64(n))
	return n, err
}

func (b *sickBackEnd) of(resource string) *patient {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ill[resource] == nil {
		b.ill[resource] = &patient{life: 86400}
	}
	return b.ill[resource]
}

// serve answers one request on each connection.
func (b *sickBackEnd) serve(l net.Listener) {
	var talking sync.WaitGroup
	defer talking.Wait()
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		talking.Go(func() {
			defer conn.Close()
			request, err := http.ReadRequest(bufio.NewReader(conn))
			if err != nil {
				return
			}
			b.answer(conn, request)
		})
	}
}

func (b *sickBackEnd) answer(conn net.Conn, request *http.Request) {
	resource := request.URL.Query().Get("resource")
	p := b.of(resource)
	p.mu.Lock()
	ill := p.ill
	if b.key != "" && request.Header.Get("Authorization") == "" {
		p.mu.Unlock()
		challenge := "Basic realm=" + b.key
		if ill != nil {
			challenge = ill.challenge
		}
		says(401, "", "WWW-Authenticate: "+challenge)(conn, "")
		return
	}
	p.calls++
	good := fmt.Sprintf(`{"access_token":"opaque-%d-%s","token_type":"Bearer","resource":%q,"client_id":"c",`+
		`"expires_in":"%d","expires_on":"%d"}`,
		p.calls, canary, resource, p.life, time.Now().Unix()+int64(p.life))
	p.mu.Unlock()
	w := counting{conn, &p.written}
	if ill == nil || ill.talk == nil {
		says(200, good)(w, good)
		return
	}
	ill.talk(w, good)
	if ill.hang {
		_, _ = io.Copy(io.Discard, conn) // until the other end has had enough
	}
}

// bed is one cell of the matrix: a daemon of its own, with one resource.
type bed struct {
	*daemon
	t       *testing.T
	patient *patient
	token   string // sockets
	admin   string
	target  string
	ahead   atomic.Int64
}

// ahead moves the daemon's clocks, which its tokens live by.
func (b *bed) pass(d time.Duration) { b.ahead.Add(int64(d)) }

func newBed(t *testing.T, from *source.ManagedIdentity, backEnd *sickBackEnd, resource string) *bed {
	b := &bed{t: t, patient: backEnd.of(resource),
		target: "/metadata/identity/oauth2/token?api-version=2018-02-01&resource=" + url.QueryEscape(resource)}
	me, begun := uint32(os.Getuid()), time.Now()
	b.daemon = newDaemonOf(t, agent.Options{
		Fetch: from.Fetch,
		Rules: agent.Rules{Rules: grants.Rules{
			Identities: []grants.Identity{{Name: "device", Default: true}},
			Grants: []grants.Grant{{Caller: grants.Match{UID: &me}, Identity: "device",
				Resources: []string{resource}}},
		}},
		Clock: tokencache.Clock{
			Wall:         time.Now, // the back end's
			Boot:         func() time.Duration { return time.Since(begun) + time.Hour + time.Duration(b.ahead.Load()) },
			Synchronised: func() bool { return false },
		},
	})
	b.Limits.Answer = 1500 * time.Millisecond
	b.token, b.admin = b.tokens(""), b.daemon.admin()
	return b
}

// ask returns what an SDK gets, in a few words.
func (b *bed) ask() string {
	got := send(b.t, b.token, get(b.target, metadata))
	if got.status == http.StatusOK {
		return "token"
	}
	if wait := got.header.Get("Retry-After"); wait != "" {
		if seconds, err := strconv.Atoi(wait); err != nil || seconds > 300 {
			b.t.Errorf("Retry-After %q", wait)
		}
	}
	return fmt.Sprintf("%d %v", got.status, got.field(b.t, "error"))
}

// refresh has the daemon ask the back end, and returns what the daemon calls what came.
func (b *bed) refresh() string {
	got := send(b.t, b.admin, post(api.PathRefresh, "{}"))
	results := decoded[api.RefreshResponse](b.t, got.body).Results
	if len(results) != 1 {
		b.t.Fatalf("%+v", got)
	}
	if results[0].Detail != "" {
		kind, _, _ := strings.Cut(results[0].Detail, ":")
		return kind
	}
	return string(results[0].Outcome)
}

// row is a line of the matrix.
type row struct{ fault, cold, fresh, expiring, expired, known string }

// observe goes through a fault with each kind of cache.
func observe(t *testing.T, from *source.ManagedIdentity, backEnd *sickBackEnd, n int, ill backEndFault) row {
	resource := func(state string) string { return fmt.Sprintf("https://%s-%d.example.net", state, n) }
	r := row{fault: ill.name}

	cold := newBed(t, from, backEnd, resource("cold"))
	cold.patient.set(&ill, 86400)
	r.cold = cold.ask()
	if calls := cold.patient.called(); calls != 1 && ill.talk != nil || calls != 0 && ill.talk == nil {
		t.Errorf("%s: %d calls for one request without a token", ill.name, calls)
	}
	cold.recovers(ill)

	fresh := newBed(t, from, backEnd, resource("fresh"))
	fresh.mustHave(ill)
	fresh.patient.set(&ill, 86400)
	fresh.pass(13 * time.Hour)
	r.fresh = fresh.ask()
	want := cmp.Or(string(ill.gives), strings.ReplaceAll(string(ill.kind), "_", " "))
	if r.known = fresh.refresh(); r.known != want {
		t.Errorf("%s: known as %s, want %v", ill.name, r.known, want)
	}
	if after := fresh.ask(); after != r.fresh {
		t.Errorf("%s: %s with a fresh token, and %s after a failed refresh", ill.name, r.fresh, after)
	}
	fresh.recovers(ill)

	ending := newBed(t, from, backEnd, resource("ending"))
	ending.patient.set(nil, 180)
	ending.mustHave(ill)
	ending.patient.set(&ill, 180)
	ending.pass(time.Minute) // callers may wish for more life by now
	r.expiring = ending.ask()
	ending.pass(150 * time.Second)
	r.expired = ending.ask()
	ending.recovers(ill)

	for _, b := range []*bed{cold, fresh, ending} {
		if taken := b.patient.written.Load(); taken > 32<<20 {
			t.Errorf("%s: %d bytes of answers were taken", ill.name, taken)
		}
	}
	return r
}

func (b *bed) mustHave(ill backEndFault) {
	b.t.Helper()
	if got := b.ask(); got != "token" {
		b.t.Fatalf("%s: %s before anything is wrong", ill.name, got)
	}
}

// recovers checks that the fault leaves nothing behind when it is over, however long a pause it asked for.
func (b *bed) recovers(ill backEndFault) {
	b.t.Helper()
	b.patient.set(nil, 86400)
	if ill.hang {
		b.refresh() // joins the call that still hangs
	}
	b.pass(6 * time.Minute)
	if got := b.refresh(); got != "newer" {
		b.t.Errorf("%s: %s after it is over", ill.name, got)
	}
	if got := b.ask(); got != "token" {
		b.t.Errorf("%s: %s after it is over", ill.name, got)
	}
}

// TestFaultMatrix goes through every fault of the back end, with every state of the cache, with the real source on the
// one side and a client on the other. The table in docs/reliability.md is what comes of it.
func TestFaultMatrix(t *testing.T) {
	backEnd, address := startSick(t, "")
	proxy := listenForDetours(t)
	point(t, map[string]string{
		"IDENTITY_ENDPOINT": "http://" + address + "/msi/token", "IDENTITY_HEADER": "secret",
		"HTTP_PROXY": proxy, "HTTPS_PROXY": proxy, "ALL_PROXY": proxy,
	})
	wantTable(t, "back end", matrix(t, "the back end", source.AppService, backEnd, backEndFaults()))
}

// TestArcFaultMatrix does so with what Azure Arc's agent can get wrong in its challenge.
func TestArcFaultMatrix(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("Azure Arc's keys lie in a folder of root's: run it as root")
	}
	const folder = "/var/opt/azcmagent/tokens"
	if err := os.MkdirAll(folder, 0o755); err != nil {
		t.Fatal(err)
	}
	at := func(name string) string {
		return filepath.Join(folder, fmt.Sprintf("matrix%d%s.key", os.Getpid(), name))
	}
	for name, text := range map[string]string{"": "secret", "large": strings.Repeat("x", 1<<20), "empty": ""} {
		if err := os.WriteFile(at(name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = os.Remove(at(name)) })
	}
	elsewhere := filepath.Join(t.TempDir(), "elsewhere.key")
	for _, err := range []error{
		os.WriteFile(elsewhere, []byte("secret"), 0o600), os.Symlink(at(""), at("link")),
		os.Mkdir(at("folder"), 0o700), unix.Mkfifo(at("pipe"), 0o600),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"link", "folder", "pipe"} {
		t.Cleanup(func() { _ = os.Remove(at(name)) })
	}
	var all []backEndFault
	for _, row := range []struct{ name, challenge string }{
		{"names a file elsewhere", "Basic realm=" + elsewhere},
		{"names a file by a way round", "Basic realm=" + folder + "/../tokens/" + filepath.Base(at(""))},
		{"names a file that is not there", "Basic realm=" + at("none")},
		{"names a link", "Basic realm=" + at("link")},
		{"names a pipe", "Basic realm=" + at("pipe")},
		{"names a folder", "Basic realm=" + at("folder")},
		{"names a huge file", "Basic realm=" + at("large")},
		{"names an empty file", "Basic realm=" + at("empty")},
		{"names nothing", "Basic"},
		{"is of another kind", "Bearer realm=" + at("")},
	} {
		all = append(all, backEndFault{name: row.name, challenge: row.challenge, kind: tokencache.Malformed})
	}
	backEnd, address := startSick(t, at(""))
	point(t, map[string]string{"IDENTITY_ENDPOINT": "http://" + address + "/metadata/identity/oauth2/token",
		"IMDS_ENDPOINT": "http://" + address})
	wantTable(t, "arc", matrix(t, "Azure Arc's challenge", source.Arc, backEnd, all))
}

// point has azidentity find the back end, and nothing else, until the end of the test.
func point(t *testing.T, environment map[string]string) {
	t.Helper()
	for _, name := range []string{"IDENTITY_ENDPOINT", "IDENTITY_HEADER", "IDENTITY_SERVER_THUMBPRINT", "IMDS_ENDPOINT",
		"MSI_ENDPOINT", "MSI_SECRET"} {
		t.Setenv(name, "") // it is as before at the end
		_ = os.Unsetenv(name)
	}
	for name, value := range environment {
		t.Setenv(name, value)
	}
}

// startSick starts a back end on loopback, and returns its address. key is for an agent of Azure Arc.
func startSick(t *testing.T, key string) (*sickBackEnd, string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b := &sickBackEnd{key: key, ill: make(map[string]*patient)}
	served := make(chan struct{})
	go func() { defer close(served); b.serve(l) }()
	t.Cleanup(func() { l.Close(); <-served })
	return b, l.Addr().String()
}

// listenForDetours returns the address of a proxy that nobody is to ask.
func listenForDetours(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	listened := make(chan struct{})
	go func() {
		defer close(listened)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			t.Error("the proxy was asked")
			conn.Close()
		}
	}()
	t.Cleanup(func() { l.Close(); <-listened })
	return "http://" + l.Addr().String()
}

// matrix goes through all ailments at once and returns the table.
func matrix(t *testing.T, heading string, endpoint source.Endpoint, backEnd *sickBackEnd, all []backEndFault) string {
	t.Helper()
	from, err := source.New(source.Options{Endpoint: endpoint, Timeout: 2 * time.Second,
		ClockTrusted: func() bool { return true }})
	if err != nil {
		t.Fatal(err)
	}
	rows := make([]row, len(all))
	var observing sync.WaitGroup
	for i, ill := range all {
		observing.Go(func() { rows[i] = observe(t, from, backEnd, i, ill) })
	}
	observing.Wait()
	var b strings.Builder
	fmt.Fprintf(&b,
		"| %s | no token yet | a fresh token | 2 minutes left | expired meanwhile | known as "+
			"|\n|---|---|---|---|---|---|\n", heading)
	for _, r := range rows {
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s | %s |\n", r.fault, r.cold, r.fresh, r.expiring, r.expired, r.known)
	}
	return b.String()
}

// wantTable compares a table with the one that stands between the markers of that name in docs/reliability.md, or puts
// it there when FAULT_MATRIX_DOCS names the folder.
func wantTable(t *testing.T, name, table string) {
	t.Helper()
	write := os.Getenv("FAULT_MATRIX_DOCS") != ""
	path := "../../docs/reliability.md"
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	begin, end := "<!-- "+name+": begin -->\n", "<!-- "+name+": end -->"
	before, rest, found := strings.Cut(string(text), begin)
	there, after, closed := strings.Cut(rest, end)
	switch {
	case !found || !closed:
		t.Fatalf("%s has no markers for the table %q", path, name)
	case there == table:
	case !write:
		t.Errorf("%s tells of other outcomes of %q than these: make fault-matrix brings it up to date\n%s",
			path, name, table)
	default:
		if err := os.WriteFile(path, []byte(before+begin+table+end+after), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if write {
		fmt.Printf("\n%s\n", table)
	}
}
