package server

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/attest"
	"perceptd/agent/grants"
	"perceptd/tokencache"
)

// loopbackAt is a loopback listener of a test's.
type loopbackAt struct {
	address netip.AddrPort
	secrets *attest.Secrets
}

func (d *daemon) listeningNow() (netip.AddrPort, *attest.Secrets) {
	if l := d.listening.Load(); l != nil {
		return l.address, l.secrets
	}
	return netip.AddrPort{}, nil
}

// loopbackListener serves the loopback listener and returns its address and the secrets of the grants.
func (d *daemon) loopbackListener() (address string, secrets *attest.Secrets) {
	d.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		d.t.Fatal(err)
	}
	return d.loopbackOn(l)
}

func (d *daemon) loopbackOn(l net.Listener) (address string, secrets *attest.Secrets) {
	secrets = attest.NewSecrets([32]byte{7})
	secrets.SetGrants(d.Agent.Grants())
	at := netip.MustParseAddrPort(l.Addr().String())
	d.listening.Store(&loopbackAt{at, secrets})
	d.serving(func() error { return d.ServeLoopback(l) })
	return at.String(), secrets
}

// sendTCP writes text as it is on a new connection and reads one answer.
func sendTCP(t testing.TB, address, text string) reply {
	t.Helper()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	return exchangeOn(t, conn, text)
}

// asks returns a request with that Host and more header lines.
func asks(target, host string, lines ...string) string {
	return "GET " + target + " HTTP/1.1\r\nHost: " + host + "\r\n" + strings.Join(append(lines, ""), "\r\n") + "\r\n"
}

func secretLine(value string) string { return "X-IDENTITY-HEADER: " + value }

// Who has a grant's secret is that grant's caller, and nobody else's.
func TestLoopbackKnowsCallersByTheirSecret(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	at, secrets := d.loopbackListener()
	me := uint32(os.Getuid())
	vision := secretLine(secrets.Header(grants.Match{Module: "vision"}))
	mine := secretLine(secrets.Header(grants.Match{UID: &me}))
	const only = "/msi/token?api-version=2019-08-01&resource=https://"
	for _, row := range []struct {
		name, target, line string
		status             int
		client             string
	}{
		{"the module", appVault, vision, 200, visionID},
		{"the module, with a slash behind", strings.Replace(appVault, "?", "/?", 1), vision, 200, visionID},
		{"what is the module's alone", only + "module.only", vision, 200, visionID},
		{"what is the user's alone", only + "device.only", mine, 200, claimed},
		{"the module, for what is the user's", only + "device.only", vision, 403, ""},
		{"the user, for what is the module's", only + "module.only", mine, 403, ""},
		{"what nobody was granted", only + "nobody.has", vision, 403, ""},
	} {
		got := sendTCP(t, at, asks(row.target, at, row.line))
		if got.status != row.status || got.status == 200 && got.field(t, "client_id") != row.client {
			t.Errorf("%s: %+v", row.name, got)
		}
		if (got.status == 200) != strings.Contains(got.body, canary) {
			t.Errorf("%s: %d with or without a token", row.name, got.status)
		}
	}
	text := d.log.String()
	if !strings.Contains(text, fmt.Sprintf("by header secret, peer uid %d", me)) {
		t.Errorf("the audit does not say how the caller was known:\n%s", text)
	}
	for _, line := range []string{vision, mine} {
		if strings.Contains(text, strings.TrimPrefix(line, secretLine(""))) {
			t.Error("the log has a secret")
		}
	}
}

// IPv6 is the same.
func TestLoopbackOfIPv6(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "[::1]:0")
	if err != nil {
		t.Skipf("there is no IPv6 here: %v", err)
	}
	d := newDaemon(t, fetchDay)
	at, secrets := d.loopbackOn(l)
	me := uint32(os.Getuid())
	mine := secretLine(secrets.Header(grants.Match{UID: &me}))
	for host, status := range map[string]int{at: 200, strings.Replace(at, "[::1]", "localhost", 1): 200, "[::1]": 403,
		"[::2]" + at[5:]: 403} {
		if got := sendTCP(t, at, asks(appVault, host, mine)); got.status != status {
			t.Errorf("%s: %+v", host, got)
		}
	}
}

// No attack brings a token, and each is told why.
func TestLoopbackAttacks(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	at, secrets := d.loopbackListener()
	_, port, _ := net.SplitHostPort(at)
	secret := secrets.Header(grants.Match{Module: "vision"})
	right := secretLine(secret)
	away := grants.Match{Module: "no-grant-names-it"}
	const versions = "?api-version=2019-08-01&resource=https%3A%2F%2Fvault.azure.net"
	for _, row := range []struct {
		name, text string
		status     int
	}{
		{"no header", asks(appVault, at), 400},
		{"an empty one", asks(appVault, at, secretLine("")), 400},
		{"two", asks(appVault, at, right, right), 400},
		{"two, one wrong", asks(appVault, at, right, secretLine("x")), 400},
		{"a wrong one", asks(appVault, at, secretLine("anything")), 401},
		{"one digit less", asks(appVault, at, secretLine(secret[:63])), 401},
		{"one digit more", asks(appVault, at, secretLine(secret+"0")), 401},
		{"upper case", asks(appVault, at, secretLine(strings.ToUpper(secret))), 401},
		{"a long one", asks(appVault, at, secretLine(strings.Repeat("a", 8<<10))), 401},
		{"of nobody's grant", asks(appVault, at, secretLine(secrets.Header(away))), 401},
		{"in the query", asks(appVault+"&X-IDENTITY-HEADER="+secret, at), 400},
		{"as a bearer", asks(appVault, at, "Authorization: Bearer "+secret), 400},
		{"a name made to resolve here", asks(appVault, "evil.example:"+port, right), 403},
		{"a name that begins like ours", asks(appVault, "localhost.evil.example:"+port, right), 403},
		{"the address of the metadata service", asks(appVault, "169.254.169.254", right), 403},
		{"another port", asks(appVault, "127.0.0.1:1", right), 403},
		{"no port", asks(appVault, "127.0.0.1", right), 403},
		{"another of this device's addresses", asks(appVault, "127.0.0.2:"+port, right), 403},
		{"an empty Host", asks(appVault, "", right), 403},
		{"a page in a browser", asks(appVault, at, right, "Origin: http://"+at), 403},
		{"a page without an origin", asks(appVault, at, right, "Origin: null"), 403},
		{"a proxy", asks(appVault, at, right, "X-Forwarded-For: 10.0.0.1"), 403},
		{"another proxy", asks(appVault, at, right, "Forwarded: for=10.0.0.1"), 403},
		{"a whole URL", asks("http://"+at+appVault, at, right), 400},
		{"CONNECT", "CONNECT " + at + " HTTP/1.1\r\nHost: " + at + "\r\n" + right + "\r\n\r\n", 400},
		{"OPTIONS for all", "OPTIONS * HTTP/1.1\r\nHost: " + at + "\r\n" + right + "\r\n\r\n", 400},
		{"two slashes", asks("//msi/token"+versions, at, right), 400},
		{"a way around", asks("/x/../msi/token"+versions, at, right), 400},
		{"an escaped slash", asks("/msi%2ftoken"+versions, at, right), 400},
		{"an escaped letter", asks("/msi/%74oken"+versions, at, right), 400},
		{"two slashes behind", asks("/msi/token//"+versions, at, right), 400},
		{"upper case path", asks("/MSI/token"+versions, at, right), 400},
		{"the metadata service's path", asks(imdsVault, at, right, metadata), 400},
		{"our own form", asks(v1Vault, at, right), 404},
		{"who am I", asks(api.PathWhoAmI, at, right), 404},
		{"a secret through a secret", asks(api.PathLoopback, at, right), 404},
		{"the admin's status", asks(api.PathStatus, at, right), 404},
		{"health", asks(api.PathHealth, at, right), 400},
		{"POST", "POST " + appVault + " HTTP/1.1\r\nHost: " + at + "\r\n" + right + "\r\nContent-Length: 0\r\n\r\n",
			405},
		{"a body", asks(appVault, at, right, "Content-Length: 2", "", "{}"), 400},
		{"a body in pieces", asks(appVault, at, right, "Transfer-Encoding: chunked", "", "0", ""), 400},
		{"HTTP/1.0", "GET " + appVault + " HTTP/1.0\r\nHost: " + at + "\r\n" + right + "\r\n\r\n", 400},
		{"HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400},
		{"a header without end", asks(appVault, at, right, "X-Pad: "+strings.Repeat("x", 64<<10)), 431},
	} {
		got := sendTCP(t, at, row.text)
		if got.status != row.status || strings.Contains(got.body, "eyJ") {
			t.Errorf("%s: %d %.200s, want %d", row.name, got.status, got.body, row.status)
		}
		if strings.Contains(got.body, secret) {
			t.Errorf("%s: the answer has the secret", row.name)
		}
	}
	if strings.Contains(d.log.String(), secret) {
		t.Error("the log has the secret")
	}
	if got := sendTCP(t, at, asks(appVault, "localhost:"+port, right)); got.status != 200 {
		t.Errorf("afterwards: %+v", got)
	}
}

// A user's secret does not serve another user, nor where the other end cannot be seen.
func TestLoopbackSecondFactor(t *testing.T) {
	t.Parallel()
	other := uint32(os.Getuid()) + 1
	r := rules()
	r.Grants = append(r.Grants, grants.Grant{Caller: grants.Match{UID: &other}, Identity: "device",
		Resources: []string{vault}})
	d := newDaemonWith(t, fetchDay, r)
	at, secrets := d.loopbackListener()
	text := asks(appVault, at, secretLine(secrets.Header(grants.Match{UID: &other})))
	want := fmt.Sprintf("that uid %d sent its header secret: uid %d did", other, os.Getuid())
	if got := sendTCP(t, at, text); got.status != 403 || got.field(t, "code") != string(api.CodeUnknownCaller) ||
		!strings.Contains(got.body, want) {
		t.Errorf("%+v", got)
	}
	if !strings.Contains(d.log.String(), want) {
		t.Error("the audit does not say so")
	}
	blind := newDaemonWith(t, fetchDay, r)
	blind.Callers = attest.New(attest.Options{Proc: t.TempDir()}) // a table without anybody
	at, secrets = blind.loopbackListener()
	for _, row := range []struct {
		of     grants.Match
		status int
	}{{grants.Match{UID: &other}, 403}, {grants.Match{Module: "vision"}, 200}} {
		if got := sendTCP(t, at, asks(appVault, at, secretLine(secrets.Header(row.of)))); got.status != row.status {
			t.Errorf("%v, whose user cannot be seen: %+v", row.of, got)
		}
	}
	if text := blind.log.String(); !strings.Contains(text, "by header secret, peer unknown") ||
		!strings.Contains(text, "another network namespace, or gone") {
		t.Errorf("the audit does not say that the peer is unknown:\n%s", text)
	}
}

// A secret counts as long as its grant, and no longer than the listener is configured.
func TestLoopbackSecretEnds(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	at, secrets := d.loopbackListener()
	text := asks(appVault, at, secretLine(secrets.Header(grants.Match{Module: "vision"})))
	conn, err := net.Dial("tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if got := exchangeOn(t, conn, text); got.status != 200 {
		t.Errorf("%+v", got)
	}
	secrets.SetGrants(nil)
	if got := exchangeOn(t, conn, text); got.status != 401 {
		t.Errorf("without a grant: %+v", got)
	}
	if d.invalid.Load() != 0 || d.denied.Load() != 1 {
		t.Errorf("%d invalid, %d denied", d.invalid.Load(), d.denied.Load())
	}
}

// A client that sends its header drop by drop is cut off.
func TestLoopbackCutsSlowHeaders(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	d.Limits = Limits{Header: 20 * time.Millisecond}
	at, _ := d.loopbackListener()
	slow, err := net.Dial("tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	defer slow.Close()
	_, _ = io.WriteString(slow, "GET / HTTP/1.1\r\nHost:")
	if answer, err := io.ReadAll(slow); err != nil || strings.Contains(string(answer), "200 OK") {
		t.Errorf("%q %v", answer, err)
	}
}

// A client that floods is made to wait, then refused.
func TestLoopbackLimits(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	d.Limits = Limits{PerSecond: 1, Burst: 2}
	at, _ := d.loopbackListener()
	wrong := asks(appVault, at, secretLine("guess"))
	var refused atomic.Int32
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			if got := sendTCP(t, at, wrong); got.status == http.StatusTooManyRequests {
				refused.Add(1)
			}
		})
	}
	all.Wait()
	if refused.Load() == 0 {
		t.Error("guesses are never slowed down")
	}
	if open := d.tokens("vision"); send(t, open, get(v1Vault)).status != 200 {
		t.Error("a flood on loopback takes the turns of those on the sockets")
	}
}

func TestLoopbackVariables(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	open, module, admin := d.tokens(""), d.tokens("vision"), d.admin()
	me := uint32(os.Getuid())
	if got := send(t, open, get(api.PathLoopback)); got.status != 404 || got.problem(t).Code != api.CodeNoLoopback ||
		!strings.Contains(got.body, "[loopback]") {
		t.Errorf("without a listener: %+v", got)
	}
	at, secrets := d.loopbackListener()
	for _, row := range []struct {
		name, socket, target string
		of                   grants.Match
		status               int
		code                 api.Code
	}{
		{"the user", open, api.PathLoopback, grants.Match{UID: &me}, 200, ""},
		{"the module", module, api.PathLoopback, grants.Match{Module: "vision"}, 200, ""},
		{"another, on a token socket", open, api.PathLoopback + "?module=vision",
			grants.Match{}, 400, api.CodeBadRequest},
		{"nobody's grant", d.tokens("stranger"), api.PathLoopback, grants.Match{}, 403, api.CodeNotGranted},
		{"the administrator", admin, api.PathLoopback + "?module=vision", grants.Match{Module: "vision"}, 200, ""},
		{"the administrator, for a user", admin, fmt.Sprintf("%s?uid=%d", api.PathLoopback, me), grants.Match{UID: &me},
			200, ""},
		{"the administrator, for nobody", admin, api.PathLoopback, grants.Match{}, 400, api.CodeBadRequest},
		{"the administrator, without a grant", admin, api.PathLoopback + "?module=speech",
			grants.Match{}, 403, api.CodeNotGranted},
		{"the administrator, for a resource", admin, api.PathLoopback + "?module=vision&resource=" + vault,
			grants.Match{}, 400, api.CodeBadRequest},
		{"the administrator, broken", admin, api.PathLoopback + "?module=%", grants.Match{}, 400, api.CodeBadRequest},
	} {
		got := send(t, row.socket, get(row.target))
		if got.status != row.status {
			t.Errorf("%s: %+v", row.name, got)
			continue
		}
		if row.status != 200 {
			if code := got.problem(t).Code; code != row.code {
				t.Errorf("%s: %v", row.name, code)
			}
			continue
		}
		told := decoded[api.Loopback](t, got.body)
		if told.Header != secrets.Header(row.of) || told.Endpoint != "http://"+at+"/msi/token" ||
			told.Grant != row.of.String() {
			t.Errorf("%s: %+v", row.name, told)
		}
		if strings.Contains(d.log.String(), told.Header) {
			t.Errorf("%s: the log has the secret", row.name)
		}
	}
	if !strings.Contains(d.log.String(), agent.MessageSecretIssued) {
		t.Error("the audit does not tell that a secret was handed out")
	}
}

// A request that waits for the back end gets its answer, and an error of the back end is one here too.
func TestLoopbackWaits(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchError(&tokencache.FetchError{Kind: tokencache.Unreachable}))
	at, secrets := d.loopbackListener()
	got := sendTCP(t, at, asks(appVault, at, secretLine(secrets.Header(grants.Match{Module: "vision"}))))
	if got.status != 503 || got.header.Get("Retry-After") != "2" {
		t.Errorf("%+v", got)
	}
}
