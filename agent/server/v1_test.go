package server

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http/httptest"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/attest"
	"perceptd/agent/server/limit"
	"perceptd/tokencache"
)

// provedContext returns the context of a connection whose other end is this process.
func provedContext(t testing.TB) context.Context {
	t.Helper()
	d := &daemon{t: t, dir: shortFolder(t)}
	callers := provingOnly()
	l := callers.Listen(d.listen("s"))
	defer l.Close()
	peer, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { peer.Close() })
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	c := limit.NewConn(conn, time.Second)
	c.BoundUnread()
	places := limit.NewConns(limit.Capacity{Total: 1, PerParent: 1, PerKey: 1}, nil, nil)
	places.Acquire(c, limit.Key{UID: uint32(os.Getuid())}, false)
	return callers.NewContext(context.WithValue(context.Background(), connectionKey{}, c), conn, attest.Socket{})
}

// answer lets a request in without a socket, for tests in virtual time.
func (s *Server) answer(t testing.TB, ctx context.Context, kind socket, method, target, body string) reply {
	t.Helper()
	r := httptest.NewRequestWithContext(ctx, method, "/", strings.NewReader(body))
	r.Host, r.RequestURI = "localhost", target
	r.Header.Set("Metadata", "true")
	r.Header.Set("X-Identity-Header", "x")
	w := httptest.NewRecorder()
	s.httpServer(kind, attest.Socket{}).Handler.ServeHTTP(w, r)
	return reply{status: w.Code, header: w.Header(), body: w.Body.String()}
}

func TestV1Body(t *testing.T) {
	t.Parallel()
	proved := provedContext(t)
	d := newDaemon(t, fetchDay)
	for _, test := range []struct{ query, identity, clientID, resource string }{
		{"resource=" + vault, "device", claimed, vault},
		{"resource=" + vault + "/.default", "device", claimed, vault + "/.default"},
		{"identity=vision&resource=" + vault, "vision", visionID, vault},
		{"resource=" + vault + "&min_ttl=10m", "device", claimed, vault},
		{"resource=" + vault + "&min_ttl=600", "device", claimed, vault},
		{"resource=" + vault + "&min_ttl=0", "device", claimed, vault},
	} {
		got := d.answer(t, proved, onToken, "GET", api.PathToken+"?"+test.query, "")
		if got.status != 200 {
			t.Fatalf("%s: %+v", test.query, got)
		}
		token := decoded[api.Token](t, got.body)
		again, err := json.Marshal(token)
		if err != nil || string(again) != got.body {
			t.Errorf("%s: the body is not api.Token's own:\n got %s\nwant %s", test.query, got.body, again)
		}
		// A second may have begun since the token was fetched, and the refresh is jittered.
		if token.ExpiresIn < 86390 || token.ExpiresIn > 86400 || token.ExpiresOn != noon.Unix()+token.ExpiresIn {
			t.Errorf("%s: the life is not the true one: %+v", test.query, token)
		}
		if token.RefreshIn <= 0 || token.RefreshIn > token.ExpiresIn || time.Since(time.Unix(token.ReceivedOn, 0)) > time.Minute {
			t.Errorf("%s: times: %+v", test.query, token)
		}
		token.ExpiresIn, token.ExpiresOn, token.RefreshIn, token.ReceivedOn = 0, 0, 0, 0
		want := api.Token{
			AccessToken: canary, TokenType: "Bearer", Identity: test.identity, ClientID: test.clientID, Resource: test.resource,
			SHA256:      tokencache.NewSecret(canary).SHA256(),
			Permissions: api.Permissions{Standing: api.StandingCurrent},
		}
		if token != want {
			t.Errorf("%s: got %+v, want %+v", test.query, token, want)
		}
	}
}

func TestV1LeavesOutAnUnknownClientID(t *testing.T) {
	t.Parallel()
	a := agent.Answer{Answer: tokencache.Answer{Token: &tokencache.Token{}}, Identity: &agent.Identity{Name: "device"}}
	a.Left, a.RefreshIn = -time.Second, -time.Second
	got := decoded[api.Token](t, string(appendV1(nil, &a, "r", noon)))
	if got.ClientID != "" || got.ExpiresIn != 0 || got.RefreshIn != 0 {
		t.Errorf("got %+v", got)
	}
}

func TestV1RefusesWrongRequests(t *testing.T) {
	t.Parallel()
	proved := provedContext(t)
	d := newDaemon(t, fetchDay)
	const ok = "resource=https://vault.azure.net&"
	for _, test := range []struct{ query, want string }{
		{"", "resource parameter is missing"},
		{"resource=", "resource parameter is missing"},
		{"identity=device", "resource parameter is missing"},
		{"resource=nonsense", "App ID URI"},
		{ok + "identity=", "identity parameter is empty"},
		{ok + "min_ttl=", "min_ttl"},
		{ok + "min_ttl=-1s", "min_ttl"},
		{ok + "min_ttl=-1", "min_ttl"},
		{ok + "min_ttl=25h", "min_ttl"},
		{ok + "min_ttl=86401", "min_ttl"},
		{ok + "min_ttl=1e3", "min_ttl"},
		{ok + "min_ttl=99999999999999999999", "min_ttl"},
		{ok + "min_ttl=9999999999h", "min_ttl"},
		{ok + "min_ttl=ten", "min_ttl"},
		{ok + "issued_after=", "issued_after"},
		{ok + "issued_after=0", "issued_after"},
		{ok + "issued_after=-1795435200", "issued_after"},
		{ok + "issued_after=3600", "issued_after"},
		{ok + "issued_after=1795435200000", "issued_after"},
		{ok + "issued_after=99999999999999999999", "issued_after"},
		{ok + "issued_after=1795435200.5", "issued_after"},
		{ok + "issued_after=1e9", "issued_after"},
		{ok + "issued_after=2026-11-23T12:00:00Z", "whole Unix seconds"},
		{ok + "wait=", "at most 10m"},
		{ok + "wait=-1s", "at most 10m"},
		{ok + "wait=601", "at most 10m"},
		{ok + "wait=10m1s", "at most 10m"},
		{ok + "wait=long", "at most 10m"},
		{ok + "client_id=" + visionID, `"client_id" is not known`},
		{ok + "api-version=2018-02-01", `"api-version" is not known`},
		{ok + "Identity=device", `"Identity" is not known`},
		{ok + "x%22%0a=1", `"x\"\n" is not known`},
		{ok + "resource=x", `"resource" is there twice`},
		{"resource=%", "malformed"},
	} {
		got := d.answer(t, proved, onToken, "GET", api.PathToken+"?"+test.query, "")
		problem := got.problem(t)
		want := api.Problem{
			Type: "urn:percept:problem:bad_request", Title: "Bad Request", Status: 400, Code: api.CodeBadRequest, Detail: problem.Detail,
		}
		if got.status != 400 || fmt.Sprint(problem) != fmt.Sprint(want) || !strings.Contains(problem.Detail, test.want) {
			t.Errorf("%q: status %d, %+v, want %q", test.query, got.status, problem, test.want)
		}
	}
}

func TestMinTTLIsFirm(t *testing.T) {
	t.Parallel()
	proved := provedContext(t)
	d := newDaemon(t, func(ctx context.Context, k tokencache.Key) (tokencache.Fetched, error) {
		fetched, err := fetchDay(ctx, k)
		fetched.Left = time.Hour
		fetched.Token.ExpiresOn = time.Now().Add(time.Hour)
		return fetched, err
	})
	if got := d.answer(t, proved, onToken, "GET", v1Vault+"&min_ttl=59m", ""); got.status != 200 {
		t.Errorf("less than there is: %+v", got)
	}
	got := d.answer(t, proved, onToken, "GET", v1Vault+"&min_ttl=24h", "")
	checkRefusal(t, "more than there is", got, 503, api.CodeShortLife)
	got = d.answer(t, proved, onToken, "GET", imdsVault, "")
	if got.status != 200 {
		t.Errorf("the SDK form's wish is firm: %+v", got)
	}
}

func FuzzV1(f *testing.F) {
	f.Add("resource=https%3A%2F%2Fvault.azure.net&identity=device&min_ttl=10m")
	f.Add("min_ttl=86400&resource=a:b")
	f.Add("resource=a:b&wait=600&issued_after=1795435200")
	f.Fuzz(func(t *testing.T, raw string) {
		var q query
		if q.parse(raw) != nil {
			return
		}
		request, asked, fault := readV1(&q)
		if fault != nil {
			if request != (agent.Request{}) || fault.status != 400 || fault.detail == "" {
				t.Fatalf("%q: %+v beside %+v", raw, request, fault)
			}
			return
		}
		values, err := url.ParseQuery(strings.ReplaceAll(raw, ";", "%3B"))
		if err != nil || asked != values.Get("resource") || request.Resource != asked || request.Identity != values.Get("identity") {
			t.Fatalf("%q was read as %+v", raw, request)
		}
		after := request.IssuedAfter
		if request.Wait < 0 || request.Wait > longestWait || !after.IsZero() && (after.Year() < 2000 || after.UTC().Year() >= 2200) {
			t.Fatalf("%q: %+v", raw, request)
		}
		if !request.Firm || request.MinTTL < 0 || request.MinTTL > longestTTL {
			t.Fatalf("%q: %+v", raw, request)
		}
	})
}
