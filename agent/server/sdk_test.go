package server

import (
	"context"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/tokencache"
)

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
		{"a scope is echoed as it was asked for", "&resource=https://vault.azure.net/.default", body(claimed, vault+"/.default", "")},
		{"unknown parameters", "&resource=https://vault.azure.net&xms_cc=cp1&bypass_cache=true", body(claimed, vault, "")},
		{"client_id", "&resource=https://vault.azure.net&client_id=" + visionID, body(visionID, vault, "")},
		{"object_id", "&resource=https://vault.azure.net&object_id=" + objectID, body(visionID, vault, `,"object_id":"`+objectID+`"`)},
		{"object_id in capitals", "&resource=https://vault.azure.net&object_id=" + strings.ToUpper(objectID), body(visionID, vault, `,"object_id":"`+strings.ToUpper(objectID)+`"`)},
		{"principal_id", "&resource=https://vault.azure.net&principal_id=" + objectID, body(visionID, vault, `,"principal_id":"`+objectID+`"`)},
		{"msi_res_id", "&resource=https://vault.azure.net&msi_res_id=" + arm, body(visionID, vault, `,"msi_res_id":"`+armID+`"`)},
		{"mi_res_id", "&resource=https://vault.azure.net&mi_res_id=" + arm, body(visionID, vault, `,"mi_res_id":"`+armID+`"`)},
		{"an empty selector is none", "&resource=https://vault.azure.net&client_id=", body(claimed, vault, "")},
		{"an empty selector beside one", "&resource=https://vault.azure.net&client_id=&object_id=" + objectID, body(visionID, vault, `,"object_id":"`+objectID+`"`)},
	} {
		for _, form := range []struct{ path, header string }{{imds, metadata}, {app, appHeader}} {
			got := send(t, token, get(form.path+test.query, form.header))
			if got.status != 200 || got.body != test.want {
				t.Errorf("%s at %s: status %d\n got %s\nwant %s", test.name, form.path, got.status, got.body, test.want)
			}
			for name, want := range map[string]string{
				"Content-Type": "application/json", "Cache-Control": "no-store", "Content-Length": strconv.Itoa(len(got.body)),
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
		{"Metadata: True", imds + ok, []string{"Metadata: True"}, "bad_request_102", "Required metadata header"},
		{"Metadata: false", imds + ok, []string{"Metadata: false"}, "bad_request_102", "Required metadata header"},
		{"Metadata empty", imds + ok, []string{"Metadata:"}, "bad_request_102", "Required metadata header"},
		{"Metadata twice", imds + ok, []string{metadata, metadata}, "bad_request_102", "once"},
		{"the other form's header", imds + ok, []string{appHeader}, "bad_request_102", "Required metadata header"},
		{"no header", app + ok, nil, "invalid_request", "X-IDENTITY-HEADER"},
		{"an empty header", app + ok, []string{"X-IDENTITY-HEADER:"}, "invalid_request", "X-IDENTITY-HEADER"},
		{"the header twice", app + ok, []string{appHeader, appHeader}, "invalid_request", "X-IDENTITY-HEADER"},
		{"the other form's header", app + ok, []string{metadata}, "invalid_request", "X-IDENTITY-HEADER"},
		{"the 2017 form", app + "?api-version=2017-09-01&resource=" + vault, []string{appHeader}, "invalid_request", "2019-08-01 or newer"},
		{"an old version", imds + "?api-version=2017-12-01&resource=" + vault, []string{metadata}, "invalid_request", "2018-02-01 or newer"},
	}
	both := []string{metadata, appHeader}
	for _, path := range []string{imds, app} {
		rows = append(rows,
			row{"no query", path, both, "invalid_request", "api-version"},
			row{"no version", path + "?resource=" + vault, both, "invalid_request", "api-version parameter is missing"},
			row{"an empty version", path + "?api-version=&resource=" + vault, both, "invalid_request", "api-version parameter is missing"},
			row{"a version that is no date", path + "?api-version=latest&resource=" + vault, both, "invalid_request", "no date"},
			row{"a version that is no day", path + "?api-version=2019-13-01&resource=" + vault, both, "invalid_request", "no date"},
			row{"a preview", path + "?api-version=2019-08-01-preview&resource=" + vault, both, "invalid_request", "no date"},
			row{"no resource", path + "?api-version=2019-08-01", both, "invalid_request", "resource parameter is missing"},
			row{"an empty resource", path + "?api-version=2019-08-01&resource=", both, "invalid_request", "resource parameter is missing"},
			row{"two resources", path + ok + "&resource=https://x", both, "invalid_request", `"resource" is there twice`},
			row{"any parameter twice", path + ok + "&x=1&x=1", both, "invalid_request", `"x" is there twice`},
			row{"two selectors", path + ok + "&client_id=a&object_id=b", both, "invalid_request", "only one of"},
			row{"two spellings", path + ok + "&msi_res_id=a&mi_res_id=a", both, "invalid_request", "only one of"},
			row{"a broken escape", path + ok + "%2", both, "invalid_request", "malformed"},
			row{"a fragment", path + ok + "#x", both, "invalid_request", "malformed"},
			row{"no App ID URI", path + "?api-version=2019-08-01&resource=nonsense", both, "invalid_request", "App ID URI"},
			row{"control characters", path + "?api-version=2019-08-01&resource=https://x%0d%0a%22", both, "invalid_request", "character"},
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
	a := agent.Answer{Answer: tokencache.Answer{Token: &tokencache.Token{}}, Identity: &agent.Identity{}, Advertise: 90*time.Second + 999*time.Millisecond}
	a.Token.Text = tokencache.NewSecret(`a "quoted" text`)
	got := string(appendSDK(nil, &a, asked, time.Unix(1000, 999)))
	const want = `{"access_token":"a \u0022quoted\u0022 text","expires_in":"90","expires_on":"1090","resource":"r","token_type":"Bearer"}`
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

// A device whose clock is years behind is told the token's expiry by its own clock, and so its beginning: a module must never
// read that the token begins after its end, or later than now.
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
		a := agent.Answer{Answer: tokencache.Answer{Token: &tokencache.Token{NotBefore: test.from}}, Identity: &agent.Identity{}, Advertise: time.Hour}
		a.Token.Claims.NotBefore = issued
		var got map[string]string
		if err := json.Unmarshal(appendSDK(nil, &a, sdkRequest{resource: "r"}, test.now), &got); err != nil {
			t.Fatal(err)
		}
		if want := strconv.FormatInt(test.want.Unix(), 10); got["not_before"] != want || got["expires_on"] <= got["not_before"] {
			t.Errorf("%s: not_before %s, want %s; expires_on %s", test.name, got["not_before"], want, got["expires_on"])
		}
	}
}

// FuzzSDKEcho checks that whatever is echoed comes back from the body as it was asked for.
func FuzzSDKEcho(f *testing.F) {
	f.Add("https://vault.azure.net", "client")
	f.Add("\"\\\x00\n", "</script>")
	f.Fuzz(func(t *testing.T, resource, id string) {
		a := agent.Answer{Answer: tokencache.Answer{Token: &tokencache.Token{}}, Identity: &agent.Identity{}, Advertise: time.Hour}
		asked := sdkRequest{resource: strings.ToValidUTF8(resource, ""), selector: parameter{"msi_res_id", strings.ToValidUTF8(id, "")}}
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
