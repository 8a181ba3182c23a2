package identityproxy

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"perceptd/agent/api"
)

func TestMain(m *testing.M) {
	if address := os.Getenv(asStrangers); address != "" {
		strangers(address)
		return
	}
	_ = os.Chmod("/proc/self/exe", 0o755) // other users run it too, whatever the umask of those who built it
	goleak.VerifyTestMain(m)
}

const canary = "canary-token-text"

// fakePerceptd answers on a Unix socket, and remembers what it was asked.
type fakePerceptd struct {
	socket string
	answer http.HandlerFunc // nil: a token

	mu    sync.Mutex
	asked []string // request lines, and the header that proves an SDK
}

func newFakePerceptd(t *testing.T) *fakePerceptd {
	t.Helper()
	p := &fakePerceptd{socket: filepath.Join(shortFolder(t), "token.sock")}
	l, err := net.Listen("unix", p.socket)
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
	p.asked = append(p.asked, fmt.Sprintf("%s %s %q %q", r.Method, r.RequestURI, r.Header["X-Identity-Header"],
		r.Header["Metadata"]))
	p.mu.Unlock()
	if p.answer != nil {
		p.answer(w, r)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set(api.PermissionsHeader, "current")
	w.Header().Set("Server", "hidden")
	_, _ = io.WriteString(w, `{"access_token":"`+canary+`"}`)
}

func (p *fakePerceptd) requests() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]string(nil), p.asked...)
}

// serving opens a proxy that answers until the test ends.
func serving(t *testing.T, o Options) *Proxy {
	t.Helper()
	r, err := Listen(o)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- r.Serve() }()
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return r
}

// raw sends bytes as they are, and returns the whole answer.
func raw(t *testing.T, r *Proxy, request string) string {
	t.Helper()
	conn, err := net.Dial("tcp4", "127.0.0.1:"+r.port)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	sent := make(chan struct{})
	go func() { defer close(sent); _, _ = io.WriteString(conn, request) }()
	answer, _ := io.ReadAll(conn) // a refused client may see the connection reset
	conn.Close()
	<-sent
	return string(answer)
}

const ask = "GET /msi/token?api-version=2019-08-01&resource=https://vault.azure.net HTTP/1.1\r\n"

func TestForwards(t *testing.T) {
	t.Parallel()
	p := newFakePerceptd(t)
	r := serving(t, Options{Socket: p.socket})
	if got := r.Variables(); len(got) != 2 || got[0] != "IDENTITY_ENDPOINT=http://127.0.0.1:"+r.port+"/msi/token" ||
		got[1] != "IDENTITY_HEADER="+r.secret || len(r.secret) != 64 {
		t.Errorf("%q", got)
	}
	for _, host := range []string{"127.0.0.1", "localhost"} { // and what msal-node adds
		answer := raw(t, r,
			ask+"Host: "+host+":"+r.port+"\r\nx-identity-header: "+r.secret+"\r\nAuthorization: "+
				"ours\r\nsec-fetch-mode: cors\r\nConnection: close\r\n\r\n")
		if !strings.HasPrefix(answer, "HTTP/1.1 200 ") || !strings.Contains(answer, canary) ||
			strings.Contains(answer, "hidden") ||
			!strings.Contains(answer, api.PermissionsHeader+": current\r\n") ||
			!strings.Contains(answer, "Content-Type: application/json\r\n") {
			t.Errorf("%s: %s", host, answer)
		}
	}
	want := `GET /msi/token?api-version=2019-08-01&resource=https://vault.azure.net ["exec"] []`
	if asked := p.requests(); len(asked) != 2 || asked[0] != want || asked[1] != want {
		t.Errorf("perceptd was asked %q", asked)
	}
	p.answer = func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Retry-After", "7")
		http.Error(w, `{"error":"busy"}`, http.StatusTooManyRequests)
	}
	answer := raw(t, r,
		ask+"Host: localhost:"+r.port+"\r\nX-IDENTITY-HEADER: "+r.secret+"\r\nConnection: close\r\n\r\n")
	if !strings.HasPrefix(answer, "HTTP/1.1 429 ") || !strings.Contains(answer, "Retry-After: 7\r\n") ||
		!strings.Contains(answer, `{"error":"busy"}`) {
		t.Errorf("a refusal of perceptd's: %s", answer)
	}
}

// Whoever is on the same network, and whatever runs in a browser there, gets no token, and perceptd is not even asked.
func TestAttacks(t *testing.T) {
	t.Parallel()
	p := newFakePerceptd(t)
	r := serving(t, Options{Socket: p.socket})
	host, secret := "Host: 127.0.0.1:"+r.port+"\r\n", "X-IDENTITY-HEADER: "+r.secret+"\r\n"
	with := func(path string) string { return "GET " + path + "?resource=x HTTP/1.1\r\n" + host + secret + "\r\n" }
	rows := map[string]struct{ request, status string }{
		"no secret":         {ask + host + "\r\n", "400"},
		"an empty secret":   {ask + host + "X-IDENTITY-HEADER: \r\n\r\n", "400"},
		"a repeated one":    {ask + host + secret + secret + "\r\n", "400"},
		"a list":            {ask + host + "X-IDENTITY-HEADER: " + r.secret + ", " + r.secret + "\r\n\r\n", "401"},
		"another":           {ask + host + "X-IDENTITY-HEADER: " + strings.Repeat("0", 64) + "\r\n\r\n", "401"},
		"a shorter one":     {ask + host + "X-IDENTITY-HEADER: " + r.secret[:63] + "\r\n\r\n", "401"},
		"as a parameter":    {"GET /msi/token?X-IDENTITY-HEADER=" + r.secret + " HTTP/1.1\r\n" + host + "\r\n", "400"},
		"a foreign host":    {ask + "Host: evil.example:" + r.port + "\r\n" + secret + "\r\n", "403"},
		"a rebound name":    {ask + "Host: 127.0.0.1.evil.example:" + r.port + "\r\n" + secret + "\r\n", "403"},
		"another port":      {ask + "Host: 127.0.0.1:1\r\n" + secret + "\r\n", "403"},
		"no port":           {ask + "Host: 127.0.0.1\r\n" + secret + "\r\n", "403"},
		"no host":           {ask + secret + "\r\n", "400"},
		"two hosts":         {ask + host + "Host: evil.example\r\n" + secret + "\r\n", "400"},
		"an origin":         {ask + host + secret + "Origin: http://127.0.0.1:" + r.port + "\r\n\r\n", "403"},
		"an empty origin":   {ask + host + secret + "Origin:\r\n\r\n", "403"},
		"forwarded":         {ask + host + secret + "X-Forwarded-For: 10.0.0.1\r\n\r\n", "403"},
		"forwarded, too":    {ask + host + secret + "Forwarded: for=10.0.0.1\r\n\r\n", "403"},
		"through a proxy":   {ask + host + secret + "Via: 1.1 proxy\r\n\r\n", "403"},
		"through nginx":     {ask + host + secret + "X-Real-IP: 10.0.0.1\r\n\r\n", "403"},
		"an empty one":      {ask + host + secret + "X-Real-IP:\r\n\r\n", "403"},
		"from a page":       {ask + host + secret + "Referer: http://127.0.0.1/\r\n\r\n", "403"},
		"from a browser":    {ask + host + secret + "Sec-Fetch-Site: cross-site\r\n\r\n", "403"},
		"a cookie":          {ask + host + secret + "Cookie: a=b\r\n\r\n", "403"},
		"an old protocol":   {"GET /msi/token HTTP/1.0\r\n" + host + secret + "\r\n", "400"},
		"another path":      {with("/v1/token"), "400"},
		"IMDS":              {with("/metadata/identity/oauth2/token"), "400"},
		"the root":          {with("/"), "400"},
		"a slash":           {with("/msi/token/"), "400"},
		"two slashes":       {with("//msi/token"), "400"},
		"dots":              {with("/x/../msi/token"), "400"},
		"escaped":           {with("/msi%2ftoken"), "400"},
		"an escaped letter": {with("/msi/%74oken"), "400"},
		"an absolute form":  {with("http://127.0.0.1:" + r.port + "/msi/token"), "400"},
		"a proxy's form":    {with("http://evil.example/msi/token"), "403"},
		"CONNECT":           {"CONNECT 127.0.0.1:" + r.port + " HTTP/1.1\r\n" + host + secret + "\r\n", "405"},
		"POST":              {"POST /msi/token HTTP/1.1\r\n" + host + secret + "Content-Length: 0\r\n\r\n", "405"},
		"HEAD":              {"HEAD /msi/token HTTP/1.1\r\n" + host + secret + "\r\n", "405"},
		"OPTIONS":           {"OPTIONS * HTTP/1.1\r\n" + host + secret + "\r\n", "405"},
		"a body":            {"GET /msi/token HTTP/1.1\r\n" + host + secret + "Content-Length: 1\r\n\r\nx", "400"},
		"a body in chunks": {"GET /msi/token HTTP/1.1\r\n" +
			host + secret + "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "400"},
		"a smuggled request": {"GET /msi/token HTTP/1.1\r\n" +
			host + secret + "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "400"},
		"an oversized head": {ask + host + secret + "X: " + strings.Repeat("x", 64<<10) + "\r\n\r\n", "431"},
		"an oversized path": {"GET /msi/token?" + strings.Repeat("x", 64<<10) + " HTTP/1.1\r\n" +
			host + secret + "\r\n", "431"},
		"many lines": {ask + host + secret + strings.Repeat("a:\n", 3700) + "\r\n", "431"},
		"no HTTP":    {"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", "400"},
	}
	for name, row := range rows {
		t.Run(name, func(t *testing.T) {
			request := strings.Replace(row.request, "\r\n", "\r\nConnection: close\r\n", 1)
			if name == "no HTTP" {
				request = row.request
			}
			answer := raw(t, r, request)
			_, after, _ := strings.Cut(answer, " ")
			if answer != "" && !strings.HasPrefix(after, row.status+" ") || answer == "" && row.status != "431" {
				t.Errorf("%.300q, want status %s", answer, row.status)
			}
			if strings.Contains(answer, canary) || strings.Contains(answer, r.secret) {
				t.Errorf("a secret in %q", answer)
			}
		})
	}
	if asked := p.requests(); len(asked) != 0 {
		t.Errorf("perceptd was asked %q", asked)
	}
}

// A connection that never ends its header is closed.
func TestSlowHeader(t *testing.T) {
	t.Parallel()
	r, err := Listen(Options{Socket: "nowhere"})
	if err != nil {
		t.Fatal(err)
	}
	r.server.ReadHeaderTimeout, r.server.ReadTimeout = 20*time.Millisecond, 20*time.Millisecond
	ended := make(chan error, 1)
	go func() { ended <- r.Serve() }()
	conn, err := net.Dial("tcp4", "127.0.0.1:"+r.port)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, ask+"X-IDENTITY-HEADER: "); err != nil {
		t.Fatal(err)
	}
	if answer, _ := io.ReadAll(bufio.NewReader(conn)); strings.Contains(string(answer), "200") {
		t.Errorf("%s", answer)
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// An answer may take longer than a request's header.
func TestSlowAnswer(t *testing.T) {
	t.Parallel()
	p := newFakePerceptd(t)
	r, err := Listen(Options{Socket: p.socket})
	if err != nil {
		t.Fatal(err)
	}
	r.server.ReadHeaderTimeout, r.server.ReadTimeout, r.server.IdleTimeout = time.Second, time.Second,
		50*time.Millisecond
	p.answer = func(w http.ResponseWriter, q *http.Request) {
		select {
		case <-q.Context().Done():
		case <-time.After(1200 * time.Millisecond):
		}
		_, _ = io.WriteString(w, `{"access_token":"`+canary+`"}`)
	}
	ended := make(chan error, 1)
	go func() { ended <- r.Serve() }()
	answer := raw(t, r, ask+"Host: 127.0.0.1:"+r.port+"\r\nX-IDENTITY-HEADER: "+r.secret+"\r\n\r\n")
	if !strings.Contains(answer, canary) {
		t.Errorf("%s", answer)
	}
	_ = r.Close()
	<-ended
}

func TestCloseWithoutServe(t *testing.T) {
	t.Parallel()
	r, err := Listen(Options{Socket: "nowhere"})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	if _, err := net.Dial("tcp4", "127.0.0.1:"+r.port); err == nil {
		t.Error("the port is still open")
	}
	if err := r.Serve(); err != nil {
		t.Errorf("served after Close: %v", err)
	}
}

const askArc = "GET /metadata/identity/oauth2/token?api-version=2020-06-01&resource=r HTTP/1.1\r\nConnection: close\r\n"

func TestArc(t *testing.T) {
	t.Parallel()
	p, folder := newFakePerceptd(t), filepath.Join(t.TempDir(), "tokens")
	r := serving(t, Options{Socket: p.socket, Arc: true, KeyFolder: folder})
	if got := r.Variables(); len(got) != 2 ||
		got[0] != "IDENTITY_ENDPOINT=http://127.0.0.1:"+r.port+"/metadata/identity/oauth2/token" ||
		got[1] != "IMDS_ENDPOINT=http://127.0.0.1:"+r.port {
		t.Errorf("%q", got)
	}
	host := "Host: 127.0.0.1:" + r.port + "\r\nMetadata: true\r\n"
	challenged := func() (path, text string) {
		answer := raw(t, r, askArc+host+"\r\n")
		_, after, _ := strings.Cut(answer, "\r\nWww-Authenticate: Basic realm=")
		path, _, _ = strings.Cut(after, "\r\n")
		if !strings.HasPrefix(answer, "HTTP/1.1 401 ") || filepath.Dir(path) != folder || filepath.Ext(path) != ".key" {
			t.Fatalf("no challenge: %s", answer)
		}
		info, err := os.Stat(path)
		if err != nil || info.Mode() != 0o600 {
			t.Fatalf("%v %v", info, err)
		}
		content, err := os.ReadFile(path)
		if err != nil || len(content) != 64 {
			t.Fatalf("%q %v", content, err)
		}
		return path, string(content)
	}
	path, text := challenged()
	redeemed := askArc + strings.ReplaceAll(host, "true", "True") + "Authorization: Basic " + text + "\r\n\r\n"
	if answer := raw(t, r, redeemed); !strings.HasPrefix(answer, "HTTP/1.1 200 ") || !strings.Contains(answer, canary) {
		t.Errorf("%s", answer)
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("the key is still there: %v", err)
	}
	_, unused := challenged()
	for name, request := range map[string]string{
		"a used key":     redeemed,
		"no key":         askArc + host + "Authorization: Basic \r\n\r\n",
		"another":        askArc + host + "Authorization: Basic " + strings.Repeat("0", 64) + "\r\n\r\n",
		"another scheme": askArc + host + "Authorization: Bearer " + unused + "\r\n\r\n",
		"twice": askArc + host + "Authorization: Basic " + unused + "\r\nAuthorization: Basic " +
			unused + "\r\n\r\n",
		"no Metadata": askArc + "Host: 127.0.0.1:" + r.port + "\r\nAuthorization: Basic " + unused + "\r\n\r\n",
		"Metadata: yes": askArc + "Host: 127.0.0.1:" + r.port + "\r\nMetadata: yes\r\nAuthorization: Basic " +
			unused + "\r\n\r\n",
		"App Service's":     ask + host + "Connection: close\r\nX-IDENTITY-HEADER: " + r.secret + "\r\n\r\n",
		"an origin":         askArc + host + "Origin: null\r\nAuthorization: Basic " + unused + "\r\n\r\n",
		"challenge, origin": askArc + host + "Origin: null\r\n\r\n",
	} {
		if answer := raw(t, r, request); strings.Contains(answer, canary) ||
			!strings.HasPrefix(answer, "HTTP/1.1 40") || strings.Contains(answer, "realm") {
			t.Errorf("%s: %s", name, answer)
		}
	}
	if asked := p.requests(); len(asked) != 1 ||
		asked[0] != `GET /metadata/identity/oauth2/token?api-version=2020-06-01&resource=r [] ["true"]` {
		t.Errorf("perceptd was asked %q", asked)
	}
	for range 2 * maxKeys {
		challenged()
	}
	if left, err := os.ReadDir(folder); err != nil || len(left) != maxKeys {
		t.Errorf("%d keys, %v", len(left), err)
	}
	_ = r.Close()
	if left, err := os.ReadDir(folder); err != nil || len(left) != 0 {
		t.Errorf("%d keys are left, %v", len(left), err)
	}
}

func TestArcWithoutAFolder(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if r, err := Listen(Options{Arc: true, KeyFolder: filepath.Join(file, "tokens")}); err == nil ||
		!strings.Contains(err.Error(), "the form of Azure Arc needs a folder "+file) {
		t.Errorf("%v %v", r, err)
	}
	folder := t.TempDir()
	p := newFakePerceptd(t)
	r := serving(t, Options{Socket: p.socket, Arc: true, KeyFolder: folder})
	if err := os.Remove(folder); err != nil {
		t.Fatal(err)
	}
	answer := raw(t, r, askArc+"Host: 127.0.0.1:"+r.port+"\r\nMetadata: true\r\n\r\n")
	if !strings.HasPrefix(answer, "HTTP/1.1 503 ") || !strings.Contains(answer, "could not be written") {
		t.Errorf("%s", answer)
	}
}
