package server

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http/httptest"
	"net/url"
	"os"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/attest"
	"perceptd/agent/grants"
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

// answerTime lets a request in without a socket, for tests in virtual time.
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
		if token.ExpiresIn < 86390 || token.ExpiresIn > 86400 ||
			!token.ExpiresOn.Equal(noon.Add(time.Duration(token.ExpiresIn)*time.Second)) {
			t.Errorf("%s: the life is not the true one: %+v", test.query, token)
		}
		if token.RefreshIn <= 0 || token.RefreshIn > token.ExpiresIn || time.Since(token.ReceivedOn) > time.Minute {
			t.Errorf("%s: times: %+v", test.query, token)
		}
		token.ExpiresIn, token.ExpiresOn, token.RefreshIn, token.ReceivedOn = 0, time.Time{}, 0, time.Time{}
		want := api.Token{
			AccessToken: canary, TokenType: "Bearer", Identity: test.identity, ClientID: test.clientID,
			Resource:    test.resource,
			SHA256:      tokencache.NewSecret(canary).SHA256(),
			Permissions: api.Permissions{State: api.PermissionsCurrent},
		}
		if token != want {
			t.Errorf("%s: got %+v, want %+v", test.query, token, want)
		}
	}
}

func TestV1LeavesOutAnUnknownClientID(t *testing.T) {
	t.Parallel()
	a := agent.Answer{Answer: tokencache.Answer{Token: &tokencache.Token{}}, Identity: &grants.Identity{Name: "device"}}
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
			Type: "urn:percept:problem:bad_request", Title: "Bad Request", Status: 400, Code: api.CodeBadRequest,
			Detail: problem.Detail,
		}
		if got.status != 400 || fmt.Sprint(problem) != fmt.Sprint(want) ||
			!strings.Contains(problem.Detail, test.want) {
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
		if err != nil || asked != values.Get("resource") || request.Resource != asked ||
			request.Identity != values.Get("identity") {
			t.Fatalf("%q was read as %+v", raw, request)
		}
		after := request.IssuedAfter
		if request.Wait < 0 || request.Wait > maxWait || !after.IsZero() &&
			(after.Year() < 2000 || after.UTC().Year() >= 2200) {
			t.Fatalf("%q: %+v", raw, request)
		}
		if !request.MinTTLRequired || request.MinTTL < 0 || request.MinTTL > maxTTL {
			t.Fatalf("%q: %+v", raw, request)
		}
	})
}

func TestSDKBodies(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	token := d.tokens("")
	// The agent advertises an hour of the day that is left.
	times := fmt.Sprintf(`"expires_in":"2100","expires_on":"%d","not_before":"1795399929"`, noon.Unix()+2100)
	body := func(clientID, resource, more string) string {
		return `{"access_token":"` + canary + `","client_id":"` + clientID + `",` + times +
			`,"resource":"` + resource + `","token_type":"Bearer"` + more + `}`
	}
	const imds, app = api.PathIMDSToken + "?api-version=2018-02-01", api.PathAppServiceToken + "?api-version=2019-08-01"
	arm := strings.ReplaceAll(armID, "/", "%2F")
	for _, test := range []struct{ name, query, want string }{
		{"the caller's default identity", "&resource=https://vault.azure.net", body(claimed, vault, "")},
		{"parameters in another order, escaped", "&resource=https%3A%2F%2Fvault%2eazure.net", body(claimed, vault, "")},
		{"a scope is echoed as it was asked for", "&resource=https://vault.azure.net/.default",
			body(claimed, vault+"/.default", "")},
		{"unknown parameters", "&resource=https://vault.azure.net&xms_cc=cp1&bypass_cache=true",
			body(claimed, vault, "")},
		{"client_id", "&resource=https://vault.azure.net&client_id=" + visionID, body(visionID, vault, "")},
		{"object_id", "&resource=https://vault.azure.net&object_id=" + objectID,
			body(visionID, vault, `,"object_id":"`+objectID+`"`)},
		{"object_id in capitals", "&resource=https://vault.azure.net&object_id=" + strings.ToUpper(objectID),
			body(visionID, vault, `,"object_id":"`+strings.ToUpper(objectID)+`"`)},
		{"principal_id", "&resource=https://vault.azure.net&principal_id=" + objectID,
			body(visionID, vault, `,"principal_id":"`+objectID+`"`)},
		{"msi_res_id", "&resource=https://vault.azure.net&msi_res_id=" + arm,
			body(visionID, vault, `,"msi_res_id":"`+armID+`"`)},
		{"mi_res_id", "&resource=https://vault.azure.net&mi_res_id=" + arm,
			body(visionID, vault, `,"mi_res_id":"`+armID+`"`)},
		{"an empty selector is none", "&resource=https://vault.azure.net&client_id=", body(claimed, vault, "")},
		{"an empty selector beside one", "&resource=https://vault.azure.net&client_id=&object_id=" + objectID,
			body(visionID, vault, `,"object_id":"`+objectID+`"`)},
	} {
		for _, form := range []struct{ path, header string }{{imds, metadata}, {app, appHeader}} {
			got := send(t, token, get(form.path+test.query, form.header))
			if got.status != 200 || got.body != test.want {
				t.Errorf("%s at %s: status %d\n got %s\nwant %s", test.name, form.path, got.status, got.body, test.want)
			}
			for name, want := range map[string]string{
				"Content-Type": "application/json", "Cache-Control": "no-store",
				"Content-Length": strconv.Itoa(len(got.body)),
			} {
				if got.header.Get(name) != want {
					t.Errorf("%s: %s is %q, want %q", test.name, name, got.header.Get(name), want)
				}
			}
		}
	}
}

func TestIMDSHasOneTrailingSlash(t *testing.T) {
	t.Parallel()
	token := newDaemon(t, fetchDay).tokens("")
	target := strings.Replace(imdsVault, "?", "/?", 1)
	if got := send(t, token, get(target, metadata)); got.status != 200 {
		t.Errorf("%+v", got)
	}
}

// Only lower case is what Azure takes. A script that writes True, as Python does, has shown the same by it.
func TestMetadataIsTakenInAnyCase(t *testing.T) {
	t.Parallel()
	token := newDaemon(t, fetchDay).tokens("")
	for _, header := range []string{"Metadata: True", "Metadata: TRUE", "METADATA: true", "metadata:  tRue \t"} {
		if got := send(t, token, get(imdsVault, header)); got.status != 200 {
			t.Errorf("%q: %+v", header, got)
		}
	}
}

func TestSDKFormsTakeNewerVersions(t *testing.T) {
	t.Parallel()
	token := newDaemon(t, fetchDay).tokens("")
	for _, version := range []string{"2018-02-01", "2019-08-01", "2019-11-01", "2020-06-01", "2025-03-30"} {
		target := api.PathIMDSToken + "?resource=" + vault + "&api-version=" + version
		if got := send(t, token, get(target, metadata)); got.status != 200 {
			t.Errorf("IMDS %s: %+v", version, got)
		}
		target = strings.Replace(target, api.PathIMDSToken, api.PathAppServiceToken, 1)
		want := 200
		if version < appServiceVersion {
			want = 400
		}
		// MSAL for Python and Terraform send both headers to App Service.
		if got := send(t, token, get(target, appHeader, metadata)); got.status != want {
			t.Errorf("App Service %s: %+v", version, got)
		}
	}
}

func TestSDKFormsRefuseWrongRequests(t *testing.T) {
	t.Parallel()
	token := newDaemon(t, fetchDay).tokens("")
	const imds, app = api.PathIMDSToken, api.PathAppServiceToken
	const ok = "?api-version=2019-08-01&resource=https://vault.azure.net"
	type row struct {
		name, target string
		headers      []string
		err, text    string
	}
	rows := []row{
		{"a probe", imds, nil, "bad_request_102", "Required metadata header not specified"},
		{"a full probe", imds + ok, nil, "bad_request_102", "Required metadata header"},
		{"a probe with a broken query", imds + "?a&a=%zz", nil, "bad_request_102", "Required metadata header"},
		{"Metadata: false", imds + ok, []string{"Metadata: false"}, "bad_request_102", "Required metadata header"},
		{"Metadata empty", imds + ok, []string{"Metadata:"}, "bad_request_102", "Required metadata header"},
		{"Metadata twice", imds + ok, []string{metadata, metadata}, "bad_request_102", "once"},
		{"the other form's header", imds + ok, []string{appHeader}, "bad_request_102", "Required metadata header"},
		{"no header", app + ok, nil, "invalid_request", "X-IDENTITY-HEADER"},
		{"an empty header", app + ok, []string{"X-IDENTITY-HEADER:"}, "invalid_request", "X-IDENTITY-HEADER"},
		{"the header twice", app + ok, []string{appHeader, appHeader}, "invalid_request", "X-IDENTITY-HEADER"},
		{"the other form's header", app + ok, []string{metadata}, "invalid_request", "X-IDENTITY-HEADER"},
		{"the 2017 form", app + "?api-version=2017-09-01&resource=" + vault, []string{appHeader}, "invalid_request",
			"2019-08-01 or newer"},
		{"an old version", imds + "?api-version=2017-12-01&resource=" + vault, []string{metadata}, "invalid_request",
			"2018-02-01 or newer"},
	}
	both := []string{metadata, appHeader}
	for _, path := range []string{imds, app} {
		rows = append(rows,
			row{"no query", path, both, "invalid_request", "api-version"},
			row{"no version", path + "?resource=" + vault, both, "invalid_request", "api-version parameter is missing"},
			row{"an empty version", path + "?api-version=&resource=" + vault, both, "invalid_request",
				"api-version parameter is missing"},
			row{"a version that is no date", path + "?api-version=latest&resource=" + vault, both, "invalid_request",
				"no date"},
			row{"a version that is no day", path + "?api-version=2019-13-01&resource=" + vault, both, "invalid_request",
				"no date"},
			row{"a preview", path + "?api-version=2019-08-01-preview&resource=" + vault, both, "invalid_request",
				"no date"},
			row{"no resource", path + "?api-version=2019-08-01", both, "invalid_request",
				"resource parameter is missing"},
			row{"an empty resource", path + "?api-version=2019-08-01&resource=", both, "invalid_request",
				"resource parameter is missing"},
			row{"two resources", path + ok + "&resource=https://x", both, "invalid_request",
				`"resource" is there twice`},
			row{"any parameter twice", path + ok + "&x=1&x=1", both, "invalid_request", `"x" is there twice`},
			row{"two selectors", path + ok + "&client_id=a&object_id=b", both, "invalid_request", "only one of"},
			row{"two spellings", path + ok + "&msi_res_id=a&mi_res_id=a", both, "invalid_request", "only one of"},
			row{"a broken escape", path + ok + "%2", both, "invalid_request", "malformed"},
			row{"a fragment", path + ok + "#x", both, "invalid_request", "malformed"},
			row{"no App ID URI", path + "?api-version=2019-08-01&resource=nonsense", both, "invalid_request",
				"App ID URI"},
			row{"control characters", path + "?api-version=2019-08-01&resource=https://x%0d%0a%22", both,
				"invalid_request", "character"},
		)
	}
	for _, r := range rows {
		got := send(t, token, get(r.target, r.headers...))
		name := r.name + " at " + r.target
		checkRefusal(t, name, got, 400, api.CodeBadRequest)
		checkSDKError(t, name, got, r.err, r.text)
	}
}

// checkSDKError checks that every SDK finds in got what it shows.
func checkSDKError(t *testing.T, name string, got reply, code, text string) {
	t.Helper()
	e := decoded[sdkError](t, got.body)
	if e.Error != code || !strings.Contains(e.Description, text) {
		t.Errorf("%s: error %q, %q: want %q, %q", name, e.Error, e.Description, code, text)
	}
	if e.StatusCode != got.status || e.Message != e.Description || len(e.CorrelationID) != 36 {
		t.Errorf("%s: fields disagree: %+v", name, e)
	}
	if kind := got.header.Get("Content-Type"); kind != "application/json" {
		t.Errorf("%s: content type %q", name, kind)
	}
}

func TestLessLifeThanAnHourIsTold(t *testing.T) {
	t.Parallel()
	asked := sdkRequest{resource: "r"}
	a := agent.Answer{Answer: tokencache.Answer{Token: &tokencache.Token{}}, Identity: &grants.Identity{},
		Advertise: 90*time.Second + 999*time.Millisecond}
	a.Token.Text = tokencache.NewSecret(`a "quoted" text`)
	got := string(appendSDK(nil, &a, asked, time.Unix(1000, 999)))
	const want = `{"access_token":"a \u0022quoted\u0022 text","expires_in":"90","expires_on":"1090","resource":"r",` +
		`"token_type":"Bearer"}`
	if got != want {
		t.Errorf("got %s\nwant %s", got, want)
	}
	a.Advertise = -time.Second
	a.Token.Claims.NotBefore = time.Unix(7, 0)
	got = string(appendSDK(nil, &a, asked, time.Unix(1000, 0)))
	if !strings.Contains(got, `"expires_in":"0","expires_on":"1000","not_before":"7"`) {
		t.Errorf("a negative life is told: %s", got)
	}
}

// A device whose clock is years behind is told the token's expiry by its own clock, and so its beginning: a module must
// never read that the token begins after its end, or later than now.
func TestNotBeforeIsNeverToCome(t *testing.T) {
	t.Parallel()
	issued := noon.Add(-5 * time.Minute)
	for _, test := range []struct {
		name string
		now  time.Time
		from time.Time // in the answer; zero: in the token's claims alone
		want time.Time
	}{
		{"clock right", noon, issued, issued},
		{"clock ahead", noon.Add(72 * time.Hour), issued, issued},
		{"clock a minute behind", noon.Add(-6 * time.Minute), issued, noon.Add(-6 * time.Minute)},
		{"clock years behind", noon.AddDate(-5, 0, 0), issued, noon.AddDate(-5, 0, 0)},
		{"clock years behind, by the claims", noon.AddDate(-5, 0, 0), time.Time{}, noon.AddDate(-5, 0, 0)},
	} {
		a := agent.Answer{Answer: tokencache.Answer{Token: &tokencache.Token{NotBefore: test.from}},
			Identity: &grants.Identity{}, Advertise: time.Hour}
		a.Token.Claims.NotBefore = issued
		var got map[string]string
		if err := json.Unmarshal(appendSDK(nil, &a, sdkRequest{resource: "r"}, test.now), &got); err != nil {
			t.Fatal(err)
		}
		if want := strconv.FormatInt(test.want.Unix(), 10); got["not_before"] != want ||
			got["expires_on"] <= got["not_before"] {
			t.Errorf("%s: not_before %s, want %s; expires_on %s", test.name, got["not_before"], want, got["expires_on"])
		}
	}
}

// FuzzSDKEcho checks that whatever is echoed comes back from the body as it was asked for.
func FuzzSDKEcho(f *testing.F) {
	f.Add("https://vault.azure.net", "client")
	f.Add("\"\\\x00\n", "</script>")
	f.Fuzz(func(t *testing.T, resource, id string) {
		a := agent.Answer{Answer: tokencache.Answer{Token: &tokencache.Token{}}, Identity: &grants.Identity{},
			Advertise: time.Hour}
		asked := sdkRequest{resource: strings.ToValidUTF8(resource, ""),
			selector: parameter{"msi_res_id", strings.ToValidUTF8(id, "")}}
		body := appendSDK(nil, &a, asked, noon)
		var got map[string]string
		if err := json.Unmarshal(body, &got); err != nil {
			t.Fatalf("%v in %s", err, body)
		}
		if got["resource"] != asked.resource || got["msi_res_id"] != asked.selector.value || len(got) != 6 {
			t.Fatalf("%q and %q became %s", resource, id, body)
		}
	})
}

// hang is a back end that never answers.
func hang(ctx context.Context, _ tokencache.Key) (tokencache.Fetched, error) {
	<-ctx.Done()
	return tokencache.Fetched{}, ctx.Err()
}

func TestEveryFormIsAnsweredInTime(t *testing.T) {
	t.Parallel()
	for _, target := range []string{imdsVault, appVault, v1Vault} {
		proved := provedContext(t)
		synctest.Test(t, func(t *testing.T) {
			a, err := agent.New(agent.Options{Fetch: hang, Rules: rules()})
			if err != nil {
				t.Fatal(err)
			}
			defer a.Close()
			s := &Server{Agent: a}
			began := time.Now()
			got := s.answer(t, proved, onToken, "GET", target, "")
			took := time.Since(began)
			if took > 10*time.Second || got.status != 503 || got.field(t, "code") != string(api.CodeUnreachable) {
				t.Errorf("%s: %+v after %v", target, got, took)
			}
			if got.header.Get("Retry-After") != "2" {
				t.Errorf("%s: Retry-After %q", target, got.header.Get("Retry-After"))
			}
		})
	}
}

// every lists a request of each form for the vault's token.
var every = []struct{ target, header string }{{imdsVault, metadata}, {appVault, appHeader}, {v1Vault, "Accept: */*"}}

func TestPermissionsAreToldOnEveryForm(t *testing.T) {
	t.Parallel()
	const minted = 2 * time.Hour // ago
	for _, test := range []struct {
		name   string
		change time.Duration // ago; 0: none
		want   api.PermissionState
	}{
		{"no change", 0, api.PermissionsCurrent},
		{"a change before", 3 * time.Hour, api.PermissionsCurrent},
		{"a change just before", minted + time.Minute, api.PermissionsUncertain},
		{"a change after", time.Hour, api.PermissionsStale},
	} {
		d := newDaemon(t, newRolling(minted).fetch)
		socket := d.tokens("")
		if test.change != 0 {
			d.change(tokencache.Granted, test.change)
		}
		for _, form := range every {
			got := send(t, socket, get(form.target, form.header))
			if got.status != 200 {
				t.Fatalf("%s: %+v", test.name, got)
			}
			name := test.name + " at " + form.target
			header := got.header.Get(api.PermissionsHeader)
			if other := got.header[api.AudienceHeader]; other != nil {
				t.Errorf("%s: audience %q", name, other)
			}
			if test.want == api.PermissionsCurrent {
				if header != "current" {
					t.Errorf("%s: %q", name, header)
				}
				continue
			}
			var changed, by int64
			if n, err := fmt.Sscanf(header, string(test.want)+"; changed=%d; current-by=%d", &changed, &by); n != 2 ||
				err != nil {
				t.Fatalf("%s: %q", name, header)
			}
			at := time.Now().Add(-test.change).Unix()
			if changed < at-60 || changed > at || by <= time.Now().Unix() {
				t.Errorf("%s: %q, changed on %d", name, header, at)
			}
			if form.target == v1Vault {
				p := decoded[api.Token](t, got.body).Permissions
				if p.State != test.want || p.Changed.Unix() != changed || p.CurrentBy.Unix()-by > 1 || p.Withheld {
					t.Errorf("%s: %+v", name, p)
				}
			}
		}
	}
}

func TestRefusalsHaveNoPermissions(t *testing.T) {
	t.Parallel()
	socket := newDaemon(t, fetchDay).tokens("")
	for _, target := range []string{"/v1/token?resource=https://not.granted", "/nowhere", "/healthz"} {
		if got := send(t, socket, get(target)); got.header[api.PermissionsHeader] != nil {
			t.Errorf("%s: %+v", target, got)
		}
	}
}

// What is written by hand is what encoding/json would write.
func TestPermissionsBody(t *testing.T) {
	t.Parallel()
	for _, p := range []api.Permissions{
		{},
		{State: api.PermissionsCurrent},
		{State: api.PermissionsStale, Changed: noon, CurrentBy: noon.Add(time.Hour), Likely: noon.Add(time.Minute),
			Withheld: true},
		{State: api.PermissionsUncertain, Changed: noon, CurrentBy: noon.Add(24 * time.Hour)},
	} {
		want, err := json.Marshal(p)
		if got := string(appendPermissions(nil, p)); err != nil || got != string(want) {
			t.Errorf("got %s, want %s (%v)", got, want, err)
		}
	}
}

func TestWithheldOnEveryForm(t *testing.T) {
	t.Parallel()
	back := newRolling(2 * time.Hour)
	d := newDaemon(t, back.fetch)
	socket := d.tokens("")
	d.change(tokencache.Revoked, time.Hour)
	for _, form := range every {
		got := send(t, socket, get(form.target, form.header))
		checkRefusal(t, form.target, got, 403, api.CodeRevoked)
		if got.header.Get("Retry-After") != "" {
			t.Errorf("%s: Retry-After %q", form.target, got.header.Get("Retry-After"))
		}
		const until = "it is withheld until a current one is here, by "
		if form.target == v1Vault {
			if detail := got.problem(t).Detail; !strings.Contains(detail, until) {
				t.Errorf("%q", detail)
			}
			continue
		}
		checkSDKError(t, form.target, got, "access_denied", until)
	}
	back.roll("", 10*time.Minute)
	d.refresh()
	for _, form := range every {
		got := send(t, socket, get(form.target, form.header))
		if header := got.header.Get(api.PermissionsHeader); got.status != 200 || header != "current" {
			t.Errorf("%s after the rollover: %q, %+v", form.target, header, got)
		}
	}
}

func TestAlternatesAreToldByTheirAudience(t *testing.T) {
	t.Parallel()
	const other = "https://device.only"
	back := newRolling(2 * time.Hour)
	back.roll(other, time.Minute)
	r := rules()
	r.Alternates = map[string][]string{vault: {other}}
	d := newDaemonWith(t, back.fetch, r)
	socket := d.tokens("")
	for _, target := range []string{v1Vault, "/v1/token?resource=" + other} { // so that both are there
		if got := send(t, socket, get(target)); got.status != 200 || got.header[api.AudienceHeader] != nil ||
			strings.Contains(got.body, "audience") {
			t.Fatalf("while both are current: %+v", got)
		}
	}
	d.change(tokencache.Revoked, time.Hour)
	for _, form := range every {
		for _, suffix := range []string{"", "/.default"} {
			target := strings.Replace(form.target, "vault.azure.net", "vault.azure.net"+suffix, 1)
			got := send(t, socket, get(target, form.header))
			if got.status != 200 || got.header.Get(api.AudienceHeader) != other ||
				got.header.Get(api.PermissionsHeader) != "current" {
				t.Errorf("%s: %+v", target, got)
			}
			if resource := got.field(t, "resource"); resource != vault+suffix {
				t.Errorf("%s: resource %q", target, resource)
			}
			audience := got.field(t, "audience")
			if form.target == v1Vault && audience != other || form.target != v1Vault && audience != nil {
				t.Errorf("%s: audience %v", target, audience)
			}
		}
	}
	// Who has not both granted gets neither.
	got := send(t, socket, get(v1Vault+"&identity=vision"))
	checkRefusal(t, "another identity", got, 403, api.CodeRevoked)
}

func TestTextIsEscaped(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ in, want string }{
		{"", `""`},
		{"plain", `"plain"`},
		{"12345678", `"12345678"`},
		{"1234567\"", `"1234567\u0022"`},
		{"12345678\\90", `"12345678\u005c90"`},
		{"a\x00\x1f\x7fb", "\"a\\u0000\\u001f\x7fb\""},
		{"ü€😀 done", `"ü€😀 done"`},
		{"broken \xff\xc3 bytes", "\"broken \ufffd\ufffd bytes\""},
		{"<&>", `"<&>"`},
	} {
		if got := string(appendText(nil, test.in)); got != test.want {
			t.Errorf("%q: got %s, want %s", test.in, got, test.want)
		}
	}
}

func TestEveryByteAtEveryPlaceIsEscaped(t *testing.T) {
	t.Parallel()
	for c := range 256 {
		for at := range 17 {
			text := strings.Repeat("x", at) + string([]byte{byte(c)}) + strings.Repeat("y", 17)
			checkText(t, text)
		}
	}
}

func FuzzText(f *testing.F) {
	f.Add("https://vault.azure.net")
	f.Add("\"\\\x00\u2028\xff\ufffd")
	f.Fuzz(checkText)
}

// checkText checks that a text comes back from JSON as it was, but for bytes that are no UTF-8.
func checkText(t *testing.T, text string) {
	body := appendText(nil, text)
	var got string
	if err := json.Unmarshal(body, &got); err != nil {
		t.Fatalf("%q became %s: %v", text, body, err)
	}
	want := text
	if !utf8.ValidString(text) {
		want = string([]rune(text))
	}
	if got != want {
		t.Fatalf("%q came back as %q", text, got)
	}
}
