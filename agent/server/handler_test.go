package server

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"perceptd/agent/api"
	"perceptd/agent/attest"
	"perceptd/agent/client"
	"perceptd/agent/grants"
	"perceptd/agent/server/limit"
	"perceptd/tokencache"
)

// checkRefusal checks a refusal in whichever shape it came, and that it holds no token.
func checkRefusal(t *testing.T, name string, got reply, status int, code api.Code) {
	t.Helper()
	if strings.Contains(got.body, "canary") {
		t.Errorf("%s: the answer has the token", name)
	}
	if got.status != status || got.field(t, "code") != string(code) {
		t.Errorf("%s: got %d %s, want %d %s", name, got.status, got.body, status, code)
	}
	if cache := got.header.Get("Cache-Control"); cache != "no-store" {
		t.Errorf("%s: Cache-Control %q", name, cache)
	}
}

func TestPathsAreExact(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	token, admin := d.tokens(""), d.admin()
	query := "?api-version=2019-08-01&resource=" + vault
	for _, test := range []struct {
		socket, path string
		status       int
	}{
		{token, "/", 400},
		{token, "/nowhere", 400},
		{token, "//metadata/identity/oauth2/token", 400},
		{token, "/metadata//identity/oauth2/token", 400},
		{token, "/metadata/identity/oauth2/token//", 400},
		{token, "/metadata/identity/oauth2/token/x", 400},
		{token, "/metadata/identity/oauth2/Token", 400},
		{token, "/metadata/identity/oauth2%2ftoken", 400},
		{token, "/metadata/identity/oauth2/%74oken", 400},
		{token, `/metadata\identity\oauth2\token`, 400},
		{token, "/metadata/identity/x/../oauth2/token", 400},
		{token, "/metadata/identity/./oauth2/token", 400},
		{token, "/metadata/identity/oauth2/token;x=1", 400},
		{token, "/metadata/identity/oauth2/token#x", 400},
		{token, "/metadata/identity/oauth2/token/#x", 400},
		{token, "http://localhost/metadata/identity/oauth2/token", 400},
		{token, "/msi/token/", 400},
		{token, "/MSI/token", 400},
		{token, "/msi/token%00", 400},
		{token, "/V1/token", 400},
		{token, "/v1", 400},
		{token, "/v1/token/", 404},
		{token, "/v1//token", 404},
		{token, "/v1/Token", 404},
		{token, "/v1/../msi/token", 404},
		{token, "/v1/", 404},
		{token, probePlatform, 404},
		{token, probeCredential, 404},
		{token, probePlatform + "/", 400},
		{token, api.PathStatus, 404},
		{token, api.PathRefresh, 404},
		{token, api.PathReload, 404},
		{token, api.PathHealth + "/", 400},
		{token, api.PathReady, 400},
		{admin, api.PathIMDSToken, 400},
		{admin, api.PathAppServiceToken, 400},
		{token, api.PathPolicyChanges, 404},
		{token, api.PathWatch + "/", 404},
		{admin, api.PathToken, 404},
		{admin, api.PathWatch, 404},
		{admin, api.PathRejected, 404},
		{admin, api.PathPolicyChanges + "/1", 404},
		{admin, api.PathHealth + "/", 400},
		{admin, "/v1/status/", 404},
		{admin, "/metrics", 400},
	} {
		for _, method := range []string{"GET", "POST"} {
			got := send(t, test.socket, requestText(method, test.path+query, "",
				metadata, appHeader, "Content-Length: 0"))
			checkRefusal(t, method+" "+test.path, got, test.status, api.CodeUnknownPath)
		}
	}
}

func TestRequestLineIsStrict(t *testing.T) {
	t.Parallel()
	token := newDaemon(t, fetchDay).tokens("")
	for _, line := range []string{
		"GET * HTTP/1.1",
		"OPTIONS * HTTP/1.1",
		"CONNECT localhost:80 HTTP/1.1",
		"GET  /v1/token HTTP/1.1",
		"GET /v1/%zz HTTP/1.1",
		"GET v1/token HTTP/1.1",
		"GET /v1/token HTTP/1.1 x",
		"GET " + v1Vault + " HTTP/1.0",
		"GET " + v1Vault + " HTTP/1.2",
		"GET " + v1Vault + " HTTP/2.0",
		"GET " + v1Vault + " HTTP/0.9",
		"PRI * HTTP/2.0",
		"GET " + v1Vault,
		"nonsense",
	} {
		got := send(t, token, line+"\r\nHost: localhost\r\n\r\n")
		if got.status/100 != 4 && got.status != 505 || strings.Contains(got.body, "canary") {
			t.Errorf("%s: %+v", line, got)
		}
	}
}

// severalMethods are the methods of the paths that answer more than one.
var severalMethods = map[string][]string{
	api.PathPolicyChanges: {"GET", "POST", "DELETE"},
	api.PathDeny:          {"GET", "POST", "DELETE"},
	api.PathDenyHub:       {"POST", "DELETE"},
}

func TestMethods(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	sockets := map[socket]string{onToken: d.tokens(""), onAdmin: d.admin()}
	for _, r := range routes {
		if r.socket == onLoopback {
			continue // is no Unix socket; TestLoopbackAttacks has its methods
		}
		methods := []string{r.method}
		if several, ok := severalMethods[r.path]; ok {
			methods = several
		}
		want := strings.Join(methods, ", ")
		for _, method := range []string{"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "get", "ODD"} {
			if slices.Contains(methods, method) {
				continue
			}
			got := send(t, sockets[r.socket], requestText(method, r.path, "", metadata, "Content-Length: 0"))
			if allow := got.header.Get("Allow"); got.status != http.StatusMethodNotAllowed || allow != want {
				t.Errorf("%s %s: status %d, Allow %q", method, r.path, got.status, allow)
			}
			if method != "HEAD" {
				checkRefusal(t, method+" "+r.path, got, 405, api.CodeMethod)
			}
		}
	}
}

func TestForeignRequestsAreRefused(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	token, admin := d.tokens(""), d.admin()
	for _, host := range []string{
		"", "localhost:", "localhost:x", "localhost:80x", "localhost:123456", "localhost.", "LOCALHOST",
		"localhost.evil.example", "evil.example", "127.0.0.1.evil.example", "127.0.0.2", "127.1", "0.0.0.0",
		"::1", "[::1", "[::1]x", "[::]", "169.254.169.254x", "169.254.169.253", "user@localhost", "evil.example:80",
	} {
		for _, to := range []struct{ socket, target string }{{token, imdsVault}, {token, appVault}, {token, v1Vault},
			{admin, api.PathStatus}} {
			text := strings.Replace(get(to.target, metadata, appHeader), "Host: localhost", "Host: "+host, 1)
			got := send(t, to.socket, text)
			if host == "::1" || host == "[::1" || host == "user@localhost" {
				// net/http may have refused these by itself.
				if got.status != 400 && got.status != 403 {
					t.Errorf("Host %q: %+v", host, got)
				}
				continue
			}
			checkRefusal(t, fmt.Sprintf("Host %q at %s", host, to.target), got, 403, api.CodeForeignOrigin)
		}
	}
}

// foreignLines are headers that browsers and proxies add, by which a request is refused on every socket.
var foreignLines = []string{
	"Origin: http://localhost", "Origin: null", "Origin:", "origin: x",
	"Referer: http://localhost/", "Referer: http://evil.example/page", "referer:",
	"Sec-Fetch-Site: cross-site", "Sec-Fetch-Site: same-origin", "sec-fetch-site: none",
	"Cookie: a=b",
	"X-Forwarded-For: 127.0.0.1", "x-forwarded-for:", "X-Forwarded-Host: localhost", "X-Forwarded-Proto: https",
	"X-Forwarded-Port: 443", "X-Forwarded-Server: x", "X-FORWARDED-ANYTHING: x",
	"Forwarded: for=127.0.0.1", "Forwarded:",
	"Via: 1.1 proxy", "via:", "X-Real-IP: 127.0.0.1", "X-Client-IP: 127.0.0.1", "X-Cluster-Client-IP: 127.0.0.1",
	"X-Original-Forwarded-For: 127.0.0.1", "True-Client-IP: 127.0.0.1", "CF-Connecting-IP: 127.0.0.1", "CDN-Loop: x",
}

func TestForeignHeadersAreRefused(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	token, module, admin := d.tokens(""), d.tokens("vision"), d.admin()
	at, secrets := d.loopbackListener()
	right := secretLine(secrets.Header(grants.Match{Module: "vision"}))
	for _, line := range foreignLines {
		for _, to := range []struct{ name, socket, text string }{
			{"IMDS", token, get(imdsVault, metadata, line)},
			{"App Service", token, get(appVault, appHeader, line)},
			{"our own", token, get(v1Vault, line)},
			{"a module", module, get(v1Vault, line)},
			{"a report", token, post(api.PathRejected, fmt.Sprintf(`{"resource":%q,"status":403}`, vault), line)},
			{"who I am", token, get(api.PathWhoAmI, line)},
			{"the status", admin, get(api.PathStatus, line)},
			{"metrics", admin, get("/metrics", line)},
			{"a refresh", admin, post(api.PathRefresh, "{}", line)},
			{"a policy change", admin, post(api.PathPolicyChanges, `{"all_resources":true,"effect":"revoked"}`, line)},
			{"a reload", admin, post(api.PathReload, "", line)},
		} {
			checkRefusal(t, line+", "+to.name, send(t, to.socket, to.text), 403, api.CodeForeignOrigin)
		}
		checkRefusal(t, line+", loopback", sendTCP(t, at, asks(appVault, at, right, line)), 403, api.CodeForeignOrigin)
	}
	if changes := d.Agent.Changes(); len(changes) != 0 {
		t.Errorf("%+v", changes)
	}
	for _, line := range []string{ // of SDKs: docs/modules/clients.md
		"Sec-Fetch-Mode: cors", "Accept-Language: *", "User-Agent: x", "X-Ms-Client-Request-Id: x",
		"Traceparent: 00-0-0-00", "X-Request-Id: x",
	} {
		if got := send(t, token, get(appVault, appHeader, line)); got.status != 200 {
			t.Errorf("%s: %+v", line, got)
		}
	}
}

func TestLocalHostsAreServed(t *testing.T) {
	t.Parallel()
	token := newDaemon(t, fetchDay).tokens("")
	for _, host := range []string{
		"localhost", "localhost:80", "127.0.0.1", "127.0.0.1:40342", "[::1]", "[::1]:1", "169.254.169.254",
		"169.254.169.254:80",
	} {
		text := strings.Replace(get(imdsVault, metadata), "Host: localhost", "Host: "+host, 1)
		if got := send(t, token, text); got.status != 200 {
			t.Errorf("Host %q: %+v", host, got)
		}
	}
	// What SDKs send beside, and no guard may trip over.
	got := send(t, token, get(imdsVault, metadata, "sec-fetch-mode: cors", "accept-language: *",
		"Content-Type: application/json", "Content-Length: 0", "Authorization: Bearer x", "Connection: keep-alive"))
	if got.status != 200 {
		t.Errorf("with an SDK's headers: %+v", got)
	}
}

func TestHostMustBeThereOnce(t *testing.T) {
	t.Parallel()
	token := newDaemon(t, fetchDay).tokens("")
	for _, text := range []string{
		"GET " + v1Vault + " HTTP/1.1\r\n\r\n",
		"GET " + v1Vault + " HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
	} {
		if got := send(t, token, text); got.status != 400 {
			t.Errorf("%q: %+v", text, got)
		}
	}
}

func TestGetHasNoBody(t *testing.T) {
	t.Parallel()
	token := newDaemon(t, fetchDay).tokens("")
	for _, text := range []string{
		requestText("GET", imdsVault, "{}", metadata, "Content-Length: 2"),
		requestText("GET", imdsVault, "", metadata, "Content-Length: 2"), // which never come
		requestText("GET", imdsVault, "0\r\n\r\n", metadata, "Transfer-Encoding: chunked"),
		requestText("GET", imdsVault, "", metadata, "Transfer-Encoding: chunked"), // which never ends
	} {
		got := send(t, token, text)
		checkRefusal(t, text, got, 400, api.CodeBadRequest)
		if !got.closes {
			t.Errorf("%q: the connection stays open", text)
		}
	}
}

func TestLongHeadersAreRefused(t *testing.T) {
	t.Parallel()
	token := newDaemon(t, fetchDay).tokens("")
	for name, text := range map[string]string{
		"one header":   get(v1Vault, "X-Long: "+strings.Repeat("x", 20<<10)),
		"many headers": get(v1Vault, strings.Split(strings.Repeat("X-Many: 1\n", 2048), "\n")[:2048]...),
		"a query":      get(v1Vault + "&x=" + strings.Repeat("x", 20<<10)),
	} {
		if got := send(t, token, text); got.status != http.StatusRequestHeaderFieldsTooLarge {
			t.Errorf("20 KB of %s: status %d", name, got.status)
		}
	}
	if got := send(t, token, get(v1Vault, "X-Long: "+strings.Repeat("x", 8<<10))); got.status != 200 {
		t.Errorf("8 KB of header: %+v", got)
	}
}

// A caller may send as many header lines as any client does, and no more, on each listener.
func TestManyHeaderLinesAreRefused(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	token, module, admin := d.tokens(""), d.tokens("vision"), d.admin()
	at, _ := d.loopbackListener()
	for name, to := range map[string]func(text string) reply{
		"token":    func(text string) reply { return send(t, token, text) },
		"module":   func(text string) reply { return send(t, module, text) },
		"admin":    func(text string) reply { return send(t, admin, text) },
		"loopback": func(text string) reply { return sendTCP(t, at, text) },
	} {
		lines := strings.Split(strings.Repeat("X: 1\n", limit.HeadLines), "\n")
		if got := to(get(v1Vault,
			lines[:limit.HeadLines-1]...)); got.status == http.StatusRequestHeaderFieldsTooLarge || got.status == 0 {
			t.Errorf("%s: as many as may be: %+v", name, got)
		}
		got := to(get(v1Vault, lines[:limit.HeadLines]...))
		if got.status != http.StatusRequestHeaderFieldsTooLarge || !got.closes ||
			got.field(t, "error") != "invalid_request" {
			t.Errorf("%s: one more: %+v", name, got)
		}
	}
}

func TestSlowClientsAreCut(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	d.Limits = Limits{Header: 20 * time.Millisecond, Idle: 20 * time.Millisecond}
	token := d.tokens("")
	for _, text := range []string{"", "GET /v1/tok", "GET /v1/token HTTP/1.1\r\nHost: local", get(v1Vault)} {
		conn, err := net.Dial("unix", token)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(conn, text)
		_, _ = io.ReadAll(conn) // comes back only when the server has cut the connection
		conn.Close()
	}
}

func TestLimitsLeaveTimeToAnswer(t *testing.T) {
	t.Parallel()
	s := new(Server)
	for _, kind := range []socket{onToken, onAdmin} {
		hs := s.httpServer(kind, attest.Socket{})
		d := hs.Handler.(*handler)
		if hs.ReadHeaderTimeout != 5*time.Second || hs.IdleTimeout != time.Minute {
			t.Errorf("socket %d: %+v", kind, hs)
		}
		if hs.WriteTimeout <= d.answerTime || hs.ReadTimeout <= hs.ReadHeaderTimeout+d.answerTime {
			t.Errorf("socket %d: a timeout of net/http comes before the answer is due", kind)
		}
		if kind == onToken && d.answerTime >= 10*time.Second {
			t.Errorf("requests for tokens are answered after %v", d.answerTime)
		}
	}
}

func TestRefusalsAreCounted(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	token, admin := d.tokens(""), d.admin()
	send(t, token, get(v1Vault))
	send(t, token, get("/nowhere"))
	send(t, token, get(imdsVault))
	send(t, token, get("/v1/token?resource=nonsense"))
	send(t, token, get("/v1/token?resource=https://not.granted"))
	send(t, admin, get("/nowhere"))
	status := decoded[api.Status](t, send(t, admin, get(api.PathStatus)).body)
	want := api.RequestCounts{Served: 1, Denied: 1, Invalid: 3}
	if status.Requests != want {
		t.Errorf("got %+v, want %+v", status.Requests, want)
	}
}

// FuzzRequest sends whatever it is given to a token socket: the server lives on, and gives a token only
// where one of the token paths is spelled exactly so.
func FuzzRequest(f *testing.F) {
	d := newDaemon(f, fetchDay)
	d.Limits.Waiting, d.Limits.Watching = -1, -1 // whose answers may not end by themselves
	token := d.tokens("")
	f.Add(get(imdsVault, metadata))
	f.Add(get(appVault, appHeader))
	f.Add(get(v1Vault))
	f.Add("GET //v1/token HTTP/1.1\r\nHost: x\r\n\r\n")
	exact := regexp.MustCompile(
		`(?s)GET (/metadata/identity/oauth2/token/?|/msi/token|/v1/token)\?.*resource=.* HTTP/1\.1`)
	f.Fuzz(func(t *testing.T, text string) {
		conn, err := net.Dial("unix", token)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		go func() {
			_, _ = io.WriteString(conn, text)
			_ = conn.(*net.UnixConn).CloseWrite()
		}()
		answers, _ := io.ReadAll(conn) // a reset after the answer is no fault
		if strings.Contains(string(answers), "canary") {
			if !exact.MatchString(text) {
				t.Fatalf("a token for %q", text)
			}
		}
	})
}

// waitingBefore has a request written before anybody serves the socket, as through a restart, where the kernel gives no
// handle on processes, and returns the connection when it is served.
func waitingBefore(t *testing.T, text string) (*daemon, net.Conn) {
	t.Helper()
	d := newDaemon(t, fetchDay)
	d.Callers = attest.New(attest.Options{NoPidfd: true})
	l := d.listen("token.sock")
	conn, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if _, err := io.WriteString(conn, text); err != nil {
		t.Fatal(err)
	}
	d.serving(func() error { return d.ServeTokens(l, "") })
	return d, conn
}

// Who may be another than connected is asked for another request, on the same connection, and proved by that.
func TestAskAgain(t *testing.T) {
	t.Parallel()
	// more than is read at once
	report := fmt.Sprintf(`{"resource":%q,"status":403}%s`, vault, strings.Repeat(" ", 20<<10))
	for name, text := range map[string]string{
		"IMDS":        get(imdsVault, metadata),
		"App Service": get(appVault, appHeader),
		"our own":     get(v1Vault),
		"who I am":    get(api.PathWhoAmI),
		"a report":    post(api.PathRejected, report),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d, conn := waitingBefore(t, text)
			first := exchangeOn(t, conn, "")
			checkRefusal(t, name, first, 503, api.CodeAskAgain)
			if first.header.Get("Retry-After") != "1" || first.closes {
				t.Errorf("%+v", first)
			}
			if second := exchangeOn(t, conn, text); second.status != 200 {
				t.Errorf("again: %+v", second)
			}
			if denials := d.Agent.Status().Denials; len(denials) != 0 ||
				strings.Contains(d.log.String(), "caller not proved") {
				t.Errorf("it is noted as denied: %+v", denials)
			}
		})
	}
}

// The client does that by itself.
func TestClientAsksAgain(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	d.Callers = attest.New(attest.Options{NoPidfd: true})
	l := d.listen("token.sock")
	done := make(chan error, 1)
	go func() {
		c := client.Client{Socket: l.Addr().String()}
		_, err := c.Token(t.Context(), client.TokenRequest{Resource: vault})
		done <- err
	}()
	raw, err := l.(*net.UnixListener).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := raw.Control(func(fd uintptr) { // until it has connected
		for n := 0; n == 0; {
			n, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1)
		}
	}); err != nil {
		t.Fatal(err)
	}
	d.serving(func() error { return d.ServeTokens(l, "") })
	if err := <-done; err != nil {
		t.Error(err)
	}
	if n := d.denied.Load(); n != 1 {
		t.Errorf("asked again %d times", n)
	}
}

// A second request that was there before proves nothing; the one after that does. A body that is too long is not waited
// for.
func TestAskAgainOfWhoDoesNotWait(t *testing.T) {
	t.Parallel()
	_, conn := waitingBefore(t, get(v1Vault)+get(v1Vault))
	answers := bufio.NewReader(conn)
	for range 2 {
		if answer, err := http.ReadResponse(answers, nil); err != nil || answer.StatusCode != 503 {
			t.Fatal(answer, err)
		} else if _, err := io.Copy(io.Discard, answer.Body); err != nil {
			t.Fatal(err)
		}
	}
	if got := exchangeOn(t, conn, get(v1Vault)); got.status != 200 {
		t.Errorf("after an answer: %+v", got)
	}
	_, conn = waitingBefore(t, post(api.PathRejected, strings.Repeat(" ", maxBody+1)))
	if got := exchangeOn(t, conn, ""); got.status != 503 || !got.closes {
		t.Errorf("a long body: %+v", got)
	}
}

// stricter has module vision be a container from now on, which this process is not in.
func (d *daemon) stricter() {
	d.Callers.SetRules(attest.Rules{Modules: map[string]attest.Requirement{"vision": {Container: "vision"}}})
}

// Who waits for a token gets none by a proof that has ended meanwhile.
func TestProofEndsWhileTheRequestWaits(t *testing.T) {
	t.Parallel()
	const imds = "/metadata/identity/oauth2/token?api-version=2018-02-01&resource=https://vault.azure.net"
	for _, text := range []string{get(v1Vault), get(v1Vault + "&wait=1m"), get(imds, "Metadata: true")} {
		asked, release := make(chan struct{}), make(chan struct{})
		d := newDaemon(t, func(ctx context.Context, key tokencache.Key) (tokencache.Fetched, error) {
			close(asked)
			<-release
			return fetchDay(ctx, key)
		})
		socket := d.tokens("vision")
		conn := dial(t, socket, text)
		defer conn.Close()
		<-asked
		d.stricter()
		close(release)
		got := exchangeOn(t, conn, "") // which was sent
		if got.status != 403 || !strings.Contains(got.body, string(api.CodeUnknownCaller)) ||
			strings.Contains(got.body, "canary") || !got.closes {
			t.Errorf("%q: %+v", text, got)
		}
		if got := send(t, socket, text); got.status != 403 {
			t.Errorf("%q, on a connection of its own: %+v", text, got)
		}
	}
}

func TestProofEndsWhileWatching(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	socket := d.tokens("vision")
	send(t, socket, get(v1Vault))
	w := d.watchAt(socket, watchVault)
	w.next(api.EventToken)
	d.stricter()
	d.change(tokencache.Granted, 0) // which would be told
	w.ends("could not be proved any more")
}
