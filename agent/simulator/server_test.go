package simulator

import (
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

var epoch = time.Unix(1_800_000_000, 0)

// start serves a back end whose clock stands still at epoch, unless o brings one.
func start(t *testing.T, o ServerOptions) *Server {
	t.Helper()
	if o.Backend == nil {
		o.Backend = New(Options{Now: func() time.Time { return epoch }})
	}
	if o.Form == FormArc && o.ArcKeyDir == "" {
		o.ArcKeyDir = filepath.Join(t.TempDir(), "azcmagent", "tokens")
	}
	s, err := Start(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return s
}

type answer struct {
	status int
	header http.Header
	body   string
}

// fields decodes a body whose members are all strings, as those of tokens are.
func (a answer) fields(t *testing.T) map[string]string {
	t.Helper()
	var all map[string]string
	if err := json.Unmarshal([]byte(a.body), &all); err != nil {
		t.Fatalf("%d %s: %v", a.status, a.body, err)
	}
	return all
}

// client follows no redirect and keeps no connection.
func client(t *testing.T) *http.Client {
	transport := &http.Transport{DisableKeepAlives: true}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

// request builds one; headers are name and value by turns.
func request(t *testing.T, method, url, body string, headers ...string) *http.Request {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for pair := range slices.Chunk(headers, 2) {
		r.Header.Set(pair[0], pair[1])
	}
	return r
}

// send returns an answer that has to come whole.
func send(t *testing.T, r *http.Request) answer {
	t.Helper()
	res, err := client(t).Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = res.Body.Close() }()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer{res.StatusCode, res.Header, string(body)}
}

func get(t *testing.T, url string, headers ...string) answer {
	t.Helper()
	return send(t, request(t, http.MethodGet, url, "", headers...))
}

const (
	imdsQuery = metadataPath + "?api-version=2018-02-01&resource=" + vault
	arcQuery  = metadataPath + "?api-version=2020-06-01&resource=" + vault
	appQuery  = "?api-version=2019-08-01&resource=" + vault
)

func TestIMDSForm(t *testing.T) {
	t.Parallel()
	s := start(t, ServerOptions{})
	got := get(t, s.URL()+imdsQuery, "Metadata", "true")
	m := token(t, s.Backend(), Selection{}, vault)
	want := `{"access_token":"` + m.Text + `","refresh_token":"","client_id":"00000000-0000-0000-0000-000000000009",` +
		`"expires_in":"86400","expires_on":"1800086400","ext_expires_in":"86400","not_before":"1799999700",` +
		`"resource":"` + vault + `","token_type":"Bearer"}`
	if got.status != 200 || got.body != want {
		t.Errorf("%d %s, want %s", got.status, got.body, want)
	}
	if got.header.Get("Server") != "simulated-managed-identity" ||
		got.header.Get("Date") != epoch.UTC().Format(http.TimeFormat) {
		t.Errorf("headers %v", got.header)
	}
	for _, selector := range []string{"client_id=" + vision.ID, "object_id=00000000-0000-0000-0001-000000000001",
		"msi_res_id=" + userAssigned + "vision"} {
		for _, path := range []string{imdsQuery, strings.Replace(imdsQuery, "?", "/?", 1)} {
			f := get(t, s.URL()+path+"&"+selector, "Metadata", "true").fields(t)
			if f["client_id"] != vision.ID || claimsOf(t, f["access_token"])["appid"] != vision.ID {
				t.Errorf("%s: the token of %s", selector, f["client_id"])
			}
		}
	}
}

func TestIMDSRefusals(t *testing.T) {
	t.Parallel()
	s := start(t, ServerOptions{Backend: New(Options{Identities: DefaultIdentities()[1:]})})
	const version = metadataPath + "?api-version=2018-02-01"
	for _, c := range []struct{ name, path, header, value, want string }{
		{"no header", imdsQuery, "Accept", "*/*",
			`{"error":"bad_request_102","error_description":"Required metadata header not specified"}`},
		{"header not lower case", imdsQuery, "Metadata", "True", "bad_request_102"},
		{"probe", metadataPath, "Accept", "*/*", "bad_request_102"},
		{"ambiguous", imdsQuery, "", "",
			`{"error":"invalid_request","error_description":"Multiple user assigned identities exist, please specify ` +
				`the clientId / resourceId of the identity in the token request"}`},
		{"unknown", imdsQuery + "&client_id=x", "", "",
			`{"error":"invalid_request","error_description":"Identity not found"}`},
		{"no resource", version, "", "", "'resource' is missing"},
		{"long resource", version + "&resource=" + strings.Repeat("r", maxResource+1), "", "", "invalid_resource"},
		{"no version", metadataPath + "?resource=r", "", "", "'api-version' is missing"},
		{"other version", metadataPath + "?resource=r&api-version=2019-08-01", "", "", "not supported"},
		{"two selectors", imdsQuery + "&client_id=x&object_id=y", "", "", "exclude each other"},
		{"empty selector", imdsQuery + "&client_id=", "", "", "is empty"},
		{"repeated", imdsQuery + "&resource=other", "", "", "is repeated"},
		{"malformed", imdsQuery + "&a=%zz", "", "", "malformed"},
	} {
		headers := []string{"Metadata", "true"}
		if c.header != "" {
			headers = []string{c.header, c.value}
		}
		got := get(t, s.URL()+c.path, headers...)
		if got.status != 400 || !strings.Contains(got.body, c.want) {
			t.Errorf("%s: %d %s, want %s", c.name, got.status, got.body, c.want)
		}
	}
	if got := get(t, s.URL()+imdsQuery, "Metadata", "true", "X-Forwarded-For", "192.0.2.1"); got.status != 400 {
		t.Errorf("forwarded: %d %s", got.status, got.body)
	}
	post := send(t, request(t, http.MethodPost, s.URL()+imdsQuery, "", "Metadata", "true"))
	if post.status != 405 || post.header.Get("Allow") != "GET" {
		t.Errorf("POST: %d %s", post.status, post.body)
	}
	if got := get(t, s.URL()+"/metadata/identity/getplatformmetadata", "Metadata", "true"); got.status != 404 {
		t.Errorf("another path: %d", got.status)
	}
	if got := get(t, s.URL()+"/"); got.status != 404 {
		t.Errorf("the root: %d", got.status)
	}
}

func TestAppServiceForm(t *testing.T) {
	t.Parallel()
	s := start(t, ServerOptions{Form: FormAppService, AppServicePath: "/custom/token/"})
	env := environment(s)
	endpoint, secret := env["IDENTITY_ENDPOINT"], env["IDENTITY_HEADER"]
	if endpoint != s.URL()+"/custom/token" || len(secret) < 20 {
		t.Fatalf("environment %v", env)
	}
	got := get(t, endpoint+appQuery, "X-IDENTITY-HEADER", secret)
	m := token(t, s.Backend(), Selection{}, vault)
	want := `{"access_token":"` + m.Text + `","client_id":"00000000-0000-0000-0000-000000000009",` +
		`"expires_on":"1800086400",` +
		`"not_before":"1799999700","resource":"` + vault + `","token_type":"Bearer"}`
	if got.status != 200 || got.body != want {
		t.Errorf("%d %s, want %s", got.status, got.body, want)
	}
	for _, selector := range []string{"client_id=" + vision.ID, "object_id=00000000-0000-0000-0001-000000000001",
		"principal_id=00000000-0000-0000-0001-000000000001", "mi_res_id=" + userAssigned + "vision"} {
		if f := get(t, endpoint+appQuery+"&"+selector, "X-IDENTITY-HEADER",
			secret).fields(t); f["client_id"] != vision.ID {
			t.Errorf("%s: the token of %s", selector, f["client_id"])
		}
	}
	if got := get(t, endpoint+appQuery, "X-IDENTITY-HEADER", secret+"x"); got.status != 401 {
		t.Errorf("wrong secret: %d %s", got.status, got.body)
	}
	if got := get(t, endpoint+appQuery, "Metadata", "true"); got.status != 401 {
		t.Errorf("no secret: %d %s", got.status, got.body)
	}
	if got := get(t, s.URL()+imdsQuery, "Metadata", "true"); got.status != 404 {
		t.Errorf("the metadata path: %d", got.status)
	}
}

func TestAppServiceBesideIMDSWithoutFallingBack(t *testing.T) {
	t.Parallel()
	s := start(t, ServerOptions{Backend: New(Options{Identities: DefaultIdentities()[1:2]})})
	if got := get(t, s.URL()+imdsQuery, "Metadata", "true"); got.status != 200 {
		t.Errorf("IMDS takes the only identity: %d %s", got.status, got.body)
	}
	got := get(t, s.URL()+appServicePath+appQuery, "X-IDENTITY-HEADER", s.secret)
	var body struct {
		StatusCode             int
		Message, CorrelationID string
	}
	if err := json.Unmarshal([]byte(got.body), &body); err != nil || got.status != 400 || body.StatusCode != 400 ||
		body.Message != "Identity not found" || len(body.CorrelationID) != 36 {
		t.Errorf("App Service does not: %d %s, %v", got.status, got.body, err)
	}
}

// arcKey makes the first leg and returns the path of the key file.
func arcKey(t *testing.T, s *Server, query string) string {
	t.Helper()
	got := get(t, s.URL()+query, "Metadata", "true")
	path, ok := strings.CutPrefix(got.header.Get("WWW-Authenticate"), "Basic realm=")
	if got.status != 401 || !ok {
		t.Fatalf("challenge: %d %v %s", got.status, got.header, got.body)
	}
	return path
}

// arcToken makes both legs.
func arcToken(t *testing.T, s *Server, query string) answer {
	t.Helper()
	text, err := os.ReadFile(arcKey(t, s, query))
	if err != nil {
		t.Fatal(err)
	}
	return get(t, s.URL()+query, "Metadata", "true", "Authorization", "Basic "+string(text))
}

func TestArcForm(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "azcmagent", "tokens")
	s := start(t, ServerOptions{Form: FormArc, ArcKeyDir: dir})
	path := arcKey(t, s, arcQuery)
	text, err := os.ReadFile(path)
	if err != nil || filepath.Dir(path) != dir || filepath.Ext(path) != ".key" || len(text) < 32 ||
		strings.ContainsAny(string(text), "\n ") {
		t.Fatalf("key file %s: %q, %v", path, text, err)
	}
	for name, want := range map[string]os.FileMode{path: 0o640, dir: 0o750 | os.ModeDir,
		filepath.Dir(dir): 0o750 | os.ModeDir} {
		if info, err := os.Lstat(name); err != nil || info.Mode() != want {
			t.Errorf("%s: %v, %v, want %v", name, info.Mode(), err, want)
		}
	}
	if c := s.Backend().Calls(); c.Total != 0 {
		t.Errorf("the first leg counts as a call: %+v", c)
	}
	got := get(t, s.URL()+arcQuery, "Metadata", "true", "Authorization", "Basic "+string(text))
	m := token(t, s.Backend(), Selection{}, vault)
	want := `{"access_token":"` + m.Text + `","refresh_token":"","expires_in":"86400","expires_on":"1800086400",` +
		`"ext_expires_in":"86400","not_before":"1799999700","resource":"` + vault + `","token_type":"Bearer"}`
	if got.status != 200 || got.body != want {
		t.Errorf("%d %s, want %s", got.status, got.body, want)
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("the used key file: %v", err)
	}
	if again := get(t, s.URL()+arcQuery, "Metadata", "true", "Authorization",
		"Basic "+string(text)); again.status != 401 {
		t.Errorf("a key used twice: %d %s", again.status, again.body)
	}
	if got := get(t, s.URL()+arcQuery); got.status != 400 || !strings.Contains(got.body, "bad_request_102") {
		t.Errorf("no Metadata header: %d %s", got.status, got.body)
	}
	if got := arcToken(t, s, strings.Replace(arcQuery, "2020-06-01", "2019-11-01", 1)); got.status != 200 {
		t.Errorf("the older version: %d %s", got.status, got.body)
	}
	if got := arcToken(t, s, arcQuery+"&client_id=x"); got.status != 400 ||
		!strings.Contains(got.body, "Identity not found") {
		t.Errorf("unknown identity: %d %s", got.status, got.body)
	}
	if err := s.Close(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Dir(dir)); !os.IsNotExist(err) {
		t.Errorf("the directories that were made are left: %v", err)
	}
}

func TestArcEchoesTheSelector(t *testing.T) {
	t.Parallel()
	for _, legacy := range []bool{false, true} {
		s := start(t, ServerOptions{Form: FormArc, LegacyArc: legacy})
		for param, id := range map[string]string{"client_id": vision.ID,
			"object_id": "00000000-0000-0000-0001-000000000001", "msi_res_id": userAssigned + "vision"} {
			f := arcToken(t, s, arcQuery+"&"+param+"="+id).fields(t)
			appid := claimsOf(t, f["access_token"])["appid"]
			if !legacy && (f[param] != id || appid != vision.ID) {
				t.Errorf("%s: echoes %q with the token of %v", param, f[param], appid)
			}
			if _, echoed := f[param]; legacy && (echoed || appid == vision.ID) {
				t.Errorf("legacy, %s: echoes %v with the token of %v", param, echoed, appid)
			}
		}
	}
}

func environment(s *Server) map[string]string {
	all := map[string]string{}
	for _, variable := range s.Environment() {
		name, value, _ := strings.Cut(variable, "=")
		all[name] = value
	}
	return all
}

func TestEnvironment(t *testing.T) {
	t.Parallel()
	s := start(t, ServerOptions{Listen: "localhost:0"})
	if got, want := environment(s),
		map[string]string{"AZURE_POD_IDENTITY_AUTHORITY_HOST": s.URL()}; !reflect.DeepEqual(got, want) {
		t.Errorf("IMDS: %v, want %v", got, want)
	}
	s = start(t, ServerOptions{Form: FormArc})
	want := map[string]string{"IDENTITY_ENDPOINT": s.URL() + metadataPath, "IMDS_ENDPOINT": s.URL()}
	if got := environment(s); !reflect.DeepEqual(got, want) {
		t.Errorf("Arc: %v, want %v", got, want)
	}
	if s.URL() != "http://"+s.address.String() {
		t.Errorf("URL %s of %s", s.URL(), s.address)
	}
}

func TestManyHeaderLinesAreRefused(t *testing.T) {
	t.Parallel()
	s := start(t, ServerOptions{})
	r := request(t, http.MethodGet, s.URL()+"/metadata/identity/oauth2/token", "")
	for range 100 {
		r.Header.Add("X-Many", "1")
	}
	if got := send(t, r); got.status != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("%+v", got)
	}
}

func TestDateSkew(t *testing.T) {
	t.Parallel()
	s := start(t, ServerOptions{DateSkew: -26 * time.Hour})
	got := get(t, s.URL()+imdsQuery, "Metadata", "true").header.Get("Date")
	if want := epoch.Add(-26 * time.Hour).UTC().Format(http.TimeFormat); got != want {
		t.Errorf("Date %s, want %s", got, want)
	}
}

func TestStartRefuses(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = taken.Close() }()
	free := filepath.Join(t.TempDir(), "keys")
	for _, c := range []struct {
		o    ServerOptions
		want string
	}{
		{ServerOptions{Listen: ":0"}, "not on loopback"},
		{ServerOptions{Listen: "0.0.0.0:0"}, "not on loopback"},
		{ServerOptions{Listen: "[::]:0"}, "not on loopback"},
		{ServerOptions{Listen: "192.0.2.1:80"}, "not on loopback"},
		{ServerOptions{Listen: "example.com:80"}, "not on loopback"},
		{ServerOptions{Listen: "127.0.0.1"}, "missing port"},
		{ServerOptions{Listen: taken.Addr().String(), Form: FormArc, ArcKeyDir: free}, "address already in use"},
		{ServerOptions{Form: 9}, "choose one of imds, arc, app-service"},
		{ServerOptions{AppServicePath: "msi"}, "not a path of its own"},
		{ServerOptions{AppServicePath: metadataPath}, "not a path of its own"},
		{ServerOptions{AppServicePath: "/simulator/state"}, "not a path of its own"},
		{ServerOptions{Form: FormArc, ArcKeyDir: filepath.Join(file, "keys")}, "not a directory"},
		{ServerOptions{Form: FormArc, ArcKeyDir: file}, "not a directory"},
		{ServerOptions{Form: FormArc, ArcKeyDir: "/tmp/a=b"}, "cannot be written in a challenge"},
	} {
		s, err := Start(t.Context(), c.o)
		if err == nil {
			_ = s.Close(t.Context())
		}
		if err == nil || !strings.Contains(err.Error(), c.want) || !strings.HasPrefix(err.Error(), "simulator: ") {
			t.Errorf("%+v: %v, want %s", c.o, err, c.want)
		}
	}
	if _, err := os.Stat(free); !os.IsNotExist(err) {
		t.Errorf("a Server that did not start left its key directory: %v", err)
	}
}

func TestListensOnLoopbackIPv6(t *testing.T) {
	t.Parallel()
	s, err := Start(t.Context(), ServerOptions{Listen: "[::1]:0"})
	if err != nil {
		t.Skipf("no IPv6 loopback here: %v", err)
	}
	defer func() { _ = s.Close(t.Context()) }()
	if got := get(t, s.URL()+imdsQuery, "Metadata", "true"); got.status != 200 {
		t.Errorf("%d %s", got.status, got.body)
	}
}

func TestClosesWithItsContext(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	dir := filepath.Join(t.TempDir(), "keys")
	s, err := Start(ctx, ServerOptions{Form: FormArc, ArcKeyDir: dir})
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := s.Wait(); err != nil {
		t.Error(err)
	}
	if err := s.Close(context.Background()); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("the key directory is left: %v", err)
	}
	if _, err := client(t).Do(request(t, http.MethodGet, s.URL(), "")); err == nil {
		t.Error("the port still answers")
	}
	done, cancel := context.WithCancel(t.Context())
	cancel()
	if s, err := Start(done, ServerOptions{}); err == nil {
		_ = s.Wait()
	}
}

func TestWaitTellsWhyServingEnded(t *testing.T) {
	t.Parallel()
	s := &Server{served: make(chan struct{}), err: io.ErrUnexpectedEOF}
	close(s.served)
	if err := s.Wait(); err != io.ErrUnexpectedEOF {
		t.Error(err)
	}
}
