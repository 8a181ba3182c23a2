package server

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/grants"
	"perceptd/agent/source"
	"perceptd/tokencache"
)

// post returns the text of a POST request.
func post(path, body string, lines ...string) string {
	return requestText("POST", path, body, append(lines, "Content-Length: "+strconv.Itoa(len(body)))...)
}

func TestStatus(t *testing.T) {
	t.Parallel()
	r := rules()
	r.Grants = []grants.Grant{
		{Caller: grants.Match{Module: "vision"}, Identity: "vision", Resources: []string{vault}},
		{Caller: grants.Match{Module: "vision"}, Identity: "device", Resources: []string{"https://broken"}},
	}
	d := newDaemonWith(t, func(ctx context.Context, k tokencache.Key) (tokencache.Fetched, error) {
		if k.Resource != vault {
			return tokencache.Fetched{}, &tokencache.FetchError{Kind: tokencache.Refused, Detail: "not this one"}
		}
		return fetchDay(ctx, k)
	}, r)
	started := noon.Add(-time.Hour)
	d.Describe = func() api.Status {
		return api.Status{Version: "1.2.3", StartedOn: started, Trouble: []string{"the daemon's own"},
			Source: api.SourceStatus{Kind: "simulated"}, Simulated: true}
	}
	module, admin := d.tokens("vision"), d.admin()
	send(t, module, get(imdsVault, metadata))
	send(t, module, get("/v1/token?resource=https://broken"))
	answer := send(t, admin, get(api.PathStatus))
	if answer.status != 200 || answer.header.Get("Content-Type") != "application/json" ||
		strings.Contains(answer.body, "null") || strings.Contains(answer.body, "canary") {
		t.Fatalf("%+v", answer)
	}
	got := decoded[api.Status](t, answer.body)
	if got.Version != "1.2.3" || !got.Now.Equal(noon) || !got.StartedOn.Equal(started) || !got.Simulated || !got.Ready {
		t.Errorf("the daemon's part: %+v", got)
	}
	if len(got.Trouble) != 2 || got.Trouble[0] != "the daemon's own" ||
		!strings.Contains(got.Trouble[1], "not this one") {
		t.Errorf("trouble %q", got.Trouble)
	}
	wantIdentities := []api.IdentityStatus{
		{Name: "device", Default: true, Selector: "system-assigned", Grants: 1},
		{Name: "vision", Selector: "client_id " + visionID, Grants: 1, Principal: &api.Principal{ClientID: claimed}},
		{Name: "camera", Selector: "client_id 00000000-0000-0000-0000-000000000002"},
	}
	if !reflect.DeepEqual(got.Identities, wantIdentities) {
		t.Errorf("identities %+v", got.Identities)
	}
	if got.Requests != (api.RequestCounts{Served: 1, Failed: 1}) {
		t.Errorf("requests %+v", got.Requests)
	}
	if len(got.Tokens) != 2 {
		t.Fatalf("tokens %+v", got.Tokens)
	}
	missing, fresh := got.Tokens[0], got.Tokens[1]
	if missing.State != api.StateMissing || missing.LastOutcome != api.OutcomeFailed ||
		!strings.Contains(missing.LastError, "not this one") || !missing.ExpiresOn.IsZero() || missing.SHA256 != "" {
		t.Errorf("the missing token: %+v", missing)
	}
	sum := tokencache.NewSecret(canary).SHA256()
	if fresh.State != api.StateFresh || fresh.LastOutcome != api.OutcomeNewer || fresh.SHA256 != sum ||
		fresh.ExpiresIn == 0 || fresh.ExpiresOn.IsZero() || fresh.NextRefresh.IsZero() || fresh.Served != 1 ||
		fresh.Fetches != 1 {
		t.Errorf("the fresh token: %+v", fresh)
	}
}

func TestStatusOfNothingHasNoNulls(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	got := send(t, d.admin(), get(api.PathStatus))
	if got.status != 200 || strings.Contains(got.body, "null") {
		t.Errorf("%+v", got)
	}
}

func TestRefresh(t *testing.T) {
	t.Parallel()
	var broken atomic.Bool
	d := newDaemon(t, func(ctx context.Context, k tokencache.Key) (tokencache.Fetched, error) {
		if broken.Load() {
			return tokencache.Fetched{}, &tokencache.FetchError{Kind: tokencache.Unreachable, Detail: "nobody there"}
		}
		return fetchDay(ctx, k)
	})
	token, admin := d.tokens(""), d.admin()
	if got := send(t, admin, post(api.PathRefresh, "")); got.status != 200 || got.body != "{\"results\":[]}\n" {
		t.Errorf("with nothing cached: %+v", got)
	}
	send(t, token, get(v1Vault))
	send(t, token, get(v1Vault+"&identity=vision"))
	for _, test := range []struct {
		body string
		want []api.RefreshResult
	}{
		{``, []api.RefreshResult{{Identity: "device", Resource: vault, Outcome: "unchanged"},
			{Identity: "vision", Resource: vault, Outcome: "unchanged"}}},
		{`{}`, []api.RefreshResult{{Identity: "device", Resource: vault, Outcome: "unchanged"},
			{Identity: "vision", Resource: vault, Outcome: "unchanged"}}},
		{`{"identity":"vision"}`, []api.RefreshResult{{Identity: "vision", Resource: vault, Outcome: "unchanged"}}},
		{`{"identity":"device","resource":"https://device.only"}`,
			[]api.RefreshResult{{Identity: "device", Resource: "https://device.only", Outcome: "newer"}}},
	} {
		got := send(t, admin, post(api.PathRefresh, test.body, "Content-Type: application/json; charset=utf-8"))
		if got.status != 200 {
			t.Fatalf("%s: %+v", test.body, got)
		}
		if results := decoded[api.RefreshResponse](t, got.body).Results; !reflect.DeepEqual(results, test.want) {
			t.Errorf("%s: %+v", test.body, results)
		}
	}
	if got := send(t, admin, post(api.PathRefresh, `{"identity":"vision","forget":true}`)); got.status != 200 ||
		!strings.Contains(d.log.String(), `"token forgotten","identity":"vision","resource":"`+vault) {
		t.Errorf("forgotten: %+v\n%s", got, d.log)
	}
	broken.Store(true)
	results := decoded[api.RefreshResponse](t,
		send(t, admin, post(api.PathRefresh, `{"identity":"vision"}`)).body).Results
	if len(results) != 1 || results[0].Outcome != api.OutcomeFailed ||
		!strings.Contains(results[0].Detail, "nobody there") {
		t.Errorf("a refresh that failed: %+v", results)
	}
	checkRefusal(t, "unknown identity", send(t, admin, post(api.PathRefresh, `{"identity":"nobody"}`)), 400,
		api.CodeUnknownIdentity)
	checkRefusal(t, "unknown resource", send(t, admin, post(api.PathRefresh, `{"resource":"https://nowhere"}`)), 400,
		api.CodeBadRequest)
	if !strings.Contains(d.log.String(), `"refresh asked for","caller":"uid `) {
		t.Errorf("the log does not say who asked:\n%s", d.log)
	}
}

func TestWrongBodies(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	d.Reload = func(context.Context) (api.ReloadResponse, error) { panic("reached") }
	admin := d.admin()
	const refresh = api.PathRefresh
	for _, test := range []struct{ name, text, want string }{
		{"unknown field", post(refresh, `{"force":true}`), `unknown field "force"`},
		{"unknown field of reload", post(api.PathReload, `{"now":true}`), `unknown field "now"`},
		{"wrong type", post(refresh, `{"identity":7}`), `field "identity" is a number, and must be a text`},
		{"list", post(refresh, `[]`), "no JSON object"},
		{"null", post(refresh, `null`), "no JSON object"},
		{"text", post(refresh, `identity=x`), "no JSON object"},
		{"broken", post(refresh, `{"identity" "x"}`), "no JSON from byte"},
		{"unended", post(refresh, `{"identity":`), "does not end"},
		{"two objects", post(refresh, `{}{}`), "after the JSON object"},
		{"rubbish behind", post(refresh, `{}]`), "after the JSON object"},
		{"a form", post(refresh, `{}`, "Content-Type: application/x-www-form-urlencoded"), "Content-Type"},
		{"a broken type", post(refresh, `{}`, "Content-Type: ;"), "Content-Type"},
		{"two types", post(refresh, `{}`, "Content-Type: application/json", "Content-Type: application/json"),
			"Content-Type"},
		{"too large", post(refresh, `{"identity":"`+strings.Repeat("x", maxBody)+`"}`), "larger than 65536"},
		{"broken off", requestText("POST", refresh, "zz\r\n", "Transfer-Encoding: chunked"), "did not arrive whole"},
		{"a query", post(refresh+"?identity=x", ""), "no query parameters"},
		{"a query of reload", post(api.PathReload+"?x", ""), "no query parameters"},
		{"a query of status", get(api.PathStatus + "?x"), "no query parameters"},
		{"a query of health", get(api.PathHealth + "?x"), "no query parameters"},
		{"a query of ready", get(api.PathReady + "?x"), "no query parameters"},
	} {
		got := send(t, admin, test.text)
		checkRefusal(t, test.name, got, 400, api.CodeBadRequest)
		if detail := got.problem(t).Detail; !strings.Contains(detail, test.want) {
			t.Errorf("%s: %q, want %q", test.name, detail, test.want)
		}
	}
}

func FuzzRefreshBody(f *testing.F) {
	f.Add([]byte(`{"identity":"vision","resource":"https://vault.azure.net"}`))
	f.Add([]byte(`{}{`))
	f.Add([]byte(` null`))
	f.Add([]byte("{}\v"))
	f.Fuzz(func(t *testing.T, text []byte) {
		got, err := api.Decode[api.RefreshRequest](text)
		if err != nil {
			if got != (api.RefreshRequest{}) || err.Error() == "" {
				t.Fatalf("%q: %+v beside %v", text, got, err)
			}
			return
		}
		if len(strings.TrimSpace(string(text))) == 0 {
			return
		}
		var fields map[string]*string // null is the same as leaving a field out
		if err := json.Unmarshal(text, &fields); err != nil {
			t.Fatalf("%q was taken as %+v: %v", text, got, err)
		}
	})
}

func TestReload(t *testing.T) {
	t.Parallel()
	without := newDaemon(t, fetchDay)
	checkRefusal(t, "no configuration", send(t, without.admin(), post(api.PathReload, "")), 422, api.CodeInvalidConfig)
	var mu sync.Mutex // protects what follows
	var answer api.ReloadResponse
	var fault error
	d := newDaemon(t, fetchDay)
	d.Reload = func(context.Context) (api.ReloadResponse, error) {
		mu.Lock()
		defer mu.Unlock()
		return answer, fault
	}
	next := func(a api.ReloadResponse, f error) {
		mu.Lock()
		defer mu.Unlock()
		answer, fault = a, f
	}
	admin := d.admin()
	if got := send(t, admin, post(api.PathReload, "")); got.status != 200 || got.body != "{\"changes\":[]}\n" {
		t.Errorf("nothing changed: %+v", got)
	}
	want := api.ReloadResponse{Changes: []string{`identity "x" added`}, Warnings: []string{"config.toml: mode 0664"}}
	next(want, nil)
	if got := decoded[api.ReloadResponse](t, send(t, admin, post(api.PathReload, "{}")).body); !reflect.DeepEqual(got,
		want) {
		t.Errorf("%+v", got)
	}
	next(api.ReloadResponse{}, errors.New("config.toml:7: no such key"))
	refusal := send(t, admin, post(api.PathReload, ""))
	checkRefusal(t, "a bad file", refusal, 422, api.CodeInvalidConfig)
	if detail := refusal.problem(t).Detail; detail != "config.toml:7: no such key" {
		t.Errorf("detail %q", detail)
	}
	if !strings.Contains(d.log.String(), "reload asked for") {
		t.Error("the log does not say that somebody asked")
	}
}

func TestHealth(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	admin := d.admin()
	got := send(t, admin, get(api.PathHealth))
	if health := decoded[api.Health](t, got.body); got.status != 200 || !health.OK || health.Detail == "" {
		t.Errorf("%+v", got)
	}
	d.Agent.Close()
	got = send(t, admin, get(api.PathHealth))
	health := decoded[api.Health](t, got.body)
	if got.status != 503 || health.OK || health.Detail == "" || got.header.Get("Content-Type") != "application/json" {
		t.Errorf("of a closed agent: %+v", got)
	}
}

func TestReady(t *testing.T) {
	t.Parallel()
	proved := provedContext(t)
	for _, works := range []bool{true, false} {
		r := rules()
		r.Grants[0].Prefetch = true
		d := newDaemonWith(t, func(ctx context.Context, k tokencache.Key) (tokencache.Fetched, error) {
			if !works {
				return tokencache.Fetched{}, &tokencache.FetchError{Kind: tokencache.Refused, Detail: "no"}
			}
			return fetchDay(ctx, k)
		}, r)
		// Getting each prefetched token waits for its fetch.
		for _, resource := range r.Grants[0].Resources {
			d.answer(t, proved, onToken, "GET", api.PathToken+"?identity=device&resource="+resource, "")
		}
		got := d.answer(t, proved, onAdmin, "GET", api.PathReady, "")
		health := decoded[api.Health](t, got.body)
		if works && (got.status != 200 || !health.OK) {
			t.Errorf("with every token: %+v", got)
		}
		if !works && (got.status != 503 || health.OK ||
			!strings.Contains(health.Detail, fmt.Sprintf("identity %q for %s", "device", vault))) {
			t.Errorf("without: %+v", got)
		}
	}
}

// withdraw returns the text of a DELETE request.
func withdraw(query string) string { return requestText("DELETE", api.PathPolicyChanges+query, "") }

func TestPolicyChanges(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, newRolling(2*time.Hour).fetch)
	token, admin := d.tokens(""), d.admin()
	if got := send(t, admin, get(api.PathPolicyChanges)); got.status != 200 ||
		got.body != "{\"now\":\"2026-11-23T12:00:00Z\",\"changes\":[]}\n" {
		t.Errorf("with none: %+v", got)
	}
	send(t, token, get(v1Vault))
	at := time.Now().Add(-time.Hour).Truncate(time.Second)
	zoned := at.In(time.FixedZone("", 3600)).Format(time.RFC3339)
	got := send(t, admin, post(api.PathPolicyChanges, fmt.Sprintf(
		`{"resource":%q,"identity":"device","at":%q,"effect":"granted","note":"a reader"}`, vault+"/.default", zoned)))
	if got.status != 200 {
		t.Fatalf("%+v", got)
	}
	first := decoded[api.PolicyChangeAnswer](t, got.body)
	if first.ID == "" || !first.At.Equal(at) || first.RecordedOn.Before(at) || first.EndsOn.Before(first.RecordedOn) {
		t.Errorf("%+v", first)
	}
	want := api.PolicyChange{
		ID: first.ID, Resource: vault, Identity: "device", At: first.At, Effect: api.EffectGranted, Note: "a reader",
		RecordedOn: first.RecordedOn, EndsOn: first.EndsOn, Touched: 1, Waiting: 1,
	}
	if first.PolicyChange != want || !first.Now.Equal(noon) {
		t.Errorf("got %+v, want %+v at %v", first, want, noon)
	}
	got = send(t, admin, post(api.PathPolicyChanges, `{"all_resources":true,"effect":"revoked","at":null}`))
	second := decoded[api.PolicyChangeAnswer](t, got.body)
	if got.status != 200 || second.Resource != "" || second.Identity != "" || time.Since(second.At) > time.Minute {
		t.Errorf("on everything, now: %+v", got)
	}
	list := decoded[api.PolicyChanges](t, send(t, admin, get(api.PathPolicyChanges)).body).Changes
	if len(list) != 2 || list[0].ID != second.ID || list[1].ID != first.ID {
		t.Errorf("%+v", list)
	}
	status := decoded[api.Status](t, send(t, admin, get(api.PathStatus)).body)
	if len(status.Changes) != 2 || status.Changes[0].ID != second.ID {
		t.Errorf("the status lists %+v", status.Changes)
	}
	got = send(t, admin, withdraw("?id="+second.ID))
	if was := decoded[api.PolicyChangeAnswer](t, got.body); got.status != 200 || !was.Now.Equal(noon) ||
		was.ID != second.ID || was.Effect != api.EffectRevoked || was.Touched != 1 {
		t.Errorf("withdrawn: %+v", got)
	}
	if list := d.Agent.Changes(); len(list) != 1 {
		t.Errorf("left are %+v", list)
	}
	for _, want := range []string{`"policy change noted","by":"uid `, `"policy change withdrawn","by":"uid `} {
		if !strings.Contains(d.log.String(), want) {
			t.Errorf("the log lacks %s", want)
		}
	}
}

func TestPolicyChangesThatAreRefused(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	admin := d.admin()
	note := func(body string) string { return post(api.PathPolicyChanges, body) }
	const rest = `,"all_resources":true,"effect":"changed"}`
	future := time.Now().Add(time.Hour).UTC().Format(time.RFC3339)
	for _, test := range []struct {
		name, text string
		status     int
		code       api.Code
		want       string
	}{
		{"nothing", note(``), 400, api.CodeBadRequest, "names a resource"},
		{"both", note(`{"resource":"https://vault.azure.net"` + rest), 400, api.CodeBadRequest, "not both"},
		{"no effect", note(`{"all_resources":true}`), 400, api.CodeBadRequest, "granted, revoked or changed"},
		{"an effect that is none", note(`{"all_resources":true,"effect":"Revoked"}`), 400, api.CodeBadRequest,
			"granted, revoked or changed"},
		{"an effect not for entering", note(`{"all_resources":true,"effect":"unknown"}`), 400, api.CodeBadRequest,
			"granted, revoked or changed"},
		{"an effect that is a number", note(`{"all_resources":true,"effect":7}`), 400, api.CodeBadRequest,
			`field "effect" is a number`},
		{"a resource that nobody has", note(`{"resource":"https://vault.azure.net/x","effect":"granted"}`), 400,
			api.CodeBadRequest, "no grant names resource"},
		{"a resource that is none", note(`{"resource":"vault","effect":"granted"}`), 400, api.CodeBadRequest,
			"App ID URI"},
		{"an unknown identity", note(`{"identity":"nobody"` + rest), 400, api.CodeUnknownIdentity, `"nobody"`},
		{"an unknown field", note(`{"when":"now"` + rest), 400, api.CodeBadRequest, `unknown field "when"`},
		{"a time that is a number", note(`{"at":1795435200` + rest), 400, api.CodeBadRequest,
			"a time in it is not a string: write one with its zone"},
		{"a time in words", note(`{"at":"yesterday"` + rest), 400, api.CodeBadRequest,
			`a time in it is "yesterday": write one with its zone as 2026-11-23T14:30:00Z`},
		{"a time without a zone", note(`{"at":"2026-11-23T12:00:00"` + rest), 400, api.CodeBadRequest, "with its zone"},
		{"an empty time", note(`{"at":""` + rest), 400, api.CodeBadRequest, "with its zone"},
		{"a day that is none", note(`{"at":"2026-02-30T12:00:00Z"` + rest), 400, api.CodeBadRequest, "with its zone"},
		{"a long time", note(`{"at":"` + strings.Repeat("9", 1000) + `"` + rest), 400, api.CodeBadRequest, `9": write`},
		{"the year 1", note(`{"at":"0001-01-02T00:00:00Z"` + rest), 400, api.CodeBadRequest, "the year 1"},
		{"the future", note(`{"at":"` + future + `"` + rest), 422, api.CodeFutureChange, "synchronised"},
		{"a long note", note(`{"note":"` + strings.Repeat("x", 257) + `"` + rest), 400, api.CodeBadRequest,
			"more than 256"},
		{"a hundred thousand", note(`[` + strings.Repeat(`{"effect":"changed"},`, 100_000) + `{}]`), 400,
			api.CodeBadRequest, "larger than 65536 bytes"},
		{"a list", note(`[{"effect":"changed"}]`), 400, api.CodeBadRequest, "no JSON object"},
		{"a query", post(api.PathPolicyChanges+"?x", "{}"), 400, api.CodeBadRequest, "no query parameters"},
		{"a query of the list", get(api.PathPolicyChanges + "?x"), 400, api.CodeBadRequest, "no query parameters"},
		{"nothing withdrawn", withdraw(""), 400, api.CodeBadRequest, "id parameter"},
		{"an empty ID", withdraw("?id="), 400, api.CodeBadRequest, "id parameter"},
		{"more than an ID", withdraw("?id=1&x=2"), 400, api.CodeBadRequest, "no other"},
		{"a broken query", withdraw("?id=%"), 400, api.CodeBadRequest, "malformed"},
		{"an unknown ID", withdraw("?id=nothing"), 404, api.CodeUnknownChange, `"nothing"`},
		{"a body where none is", requestText("DELETE", api.PathPolicyChanges+"?id=1", "{}", "Content-Length: 2"), 400,
			api.CodeBadRequest, "DELETE request must not have a body"},
	} {
		got := send(t, admin, test.text)
		checkRefusal(t, test.name, got, test.status, test.code)
		if detail := got.problem(t).Detail; !strings.Contains(detail, test.want) || len(detail) > 600 {
			t.Errorf("%s: %q, want %q", test.name, detail, test.want)
		}
	}
	if left := d.Agent.Changes(); len(left) != 0 {
		t.Errorf("something was noted: %+v", left)
	}
}

// A date is told as one that does not count where it was given by a clock that nobody vouches for.
func TestUncountedDateIsTold(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		known            bool
		dated            string
		unsure, asOfNote bool
	}{
		{known: true, dated: fmt.Sprintf(`,"at":%q`, time.Now().Add(-time.Hour).Format(time.RFC3339))},
		{known: false, dated: fmt.Sprintf(`,"at":%q`, time.Now().Add(-time.Hour).Format(time.RFC3339)), unsure: true,
			asOfNote: true},
		{known: false, unsure: true},
	} {
		d := newDaemonOf(t, agent.Options{Fetch: fetchDay, Rules: rules(),
			Clock: tokencache.Clock{Synchronised: func() bool { return row.known }}})
		admin := d.admin()
		told := decoded[api.PolicyChangeAnswer](t,
			send(t, admin, post(api.PathPolicyChanges, `{"all_resources":true,"effect":"changed"`+row.dated+`}`)).body)
		listed := decoded[api.PolicyChanges](t, send(t, admin, get(api.PathPolicyChanges)).body).Changes
		if len(listed) != 1 || listed[0].Unsure != row.unsure || listed[0].AsOfRecording != row.asOfNote ||
			told.Unsure != row.unsure || told.AsOfRecording != row.asOfNote {
			t.Errorf("clock known %v, %q: %+v, listed as %+v", row.known, row.dated, told, listed)
		}
	}
}

func TestTooManyPolicyChanges(t *testing.T) {
	t.Parallel()
	full := tokencache.Record{Lineage: "l", Generation: 1}
	for i := range tokencache.MaxChanges { // no two of one resource
		full.Changes = append(full.Changes, tokencache.PolicyChange{
			ID: fmt.Sprint(i), AllIdentities: true, Resource: fmt.Sprint("api://",
				i), Effect: tokencache.Revoked, At: time.Now(), RecordedAt: time.Now(),
		})
	}
	d := newDaemonOf(t, agent.Options{Fetch: fetchDay, Rules: rules(), Record: &full})
	admin := d.admin()
	got := send(t, admin, post(api.PathPolicyChanges, `{"all_resources":true,"effect":"changed"}`))
	checkRefusal(t, "one more", got, 422, api.CodeTooManyChanges)
	// All of them fit into an answer that a client takes.
	if got := send(t, admin, get(api.PathPolicyChanges)); got.status != 200 || len(got.body) > 1<<20 {
		t.Errorf("the list is %d bytes", len(got.body))
	}
}

// A change that cannot be written down is in force, and whoever entered it learns both.
func TestPolicyChangeThatIsNotKept(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	log := new(logged)
	a, err := agent.New(agent.Options{
		Fetch: fetchDay, Rules: rules(), Log: log.logger(),
		SaveRecord: func(tokencache.Record) error { return errors.New("no space left on device") },
	})
	if err != nil {
		t.Fatal(err)
	}
	d.Agent.Close()
	d.Agent = a
	defer a.Close()
	admin := d.admin()
	got := send(t, admin, post(api.PathPolicyChanges, `{"all_resources":true,"effect":"changed"}`))
	checkRefusal(t, "noted", got, 507, api.CodeNotKept)
	if detail := got.problem(t).Detail; !strings.Contains(detail, "in force") ||
		!strings.Contains(detail, "no space left") {
		t.Errorf("%q", detail)
	}
	list := decoded[api.PolicyChanges](t, send(t, admin, get(api.PathPolicyChanges)).body).Changes
	if len(list) != 1 {
		t.Fatalf("%+v", list)
	}
	if recorded := got.problem(t).PolicyChange; recorded == nil || recorded.ID != list[0].ID ||
		recorded.Effect != api.EffectChanged || !recorded.At.Equal(list[0].At) {
		t.Errorf("recorded %+v, and on record is %+v", recorded, list[0])
	}
	got = send(t, admin, withdraw("?id="+list[0].ID))
	checkRefusal(t, "withdrawn", got, 507, api.CodeNotKept)
	if was := got.problem(t).PolicyChange; was == nil || was.ID != list[0].ID {
		t.Errorf("withdrawn %+v", was)
	}
	if detail := got.problem(t).Detail; !strings.Contains(detail, "withdrawn") {
		t.Errorf("%q", detail)
	}
	got = send(t, admin, withdraw("?id="+list[0].ID))
	checkRefusal(t, "once more", got, 404, api.CodeUnknownChange)
	if was := got.problem(t).PolicyChange; was != nil {
		t.Errorf("nothing was withdrawn, and the answer has %+v", was)
	}
}

func TestRefreshIsHeldWhileAChangeSpreads(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, newRolling(2*time.Hour).fetch)
	token, admin := d.tokens(""), d.admin()
	send(t, token, get(v1Vault))
	d.change(tokencache.Granted, 0)
	result := func(body string) api.RefreshResult {
		t.Helper()
		results := decoded[api.RefreshResponse](t, send(t, admin, post(api.PathRefresh, body)).body).Results
		if len(results) != 1 {
			t.Fatalf("%s: %+v", body, results)
		}
		return results[0]
	}
	if got := result(`{}`); got.Outcome != api.OutcomeHeld || !strings.Contains(got.Detail, "still spreading") {
		t.Errorf("%+v", got)
	}
	if got := result(`{"now":true}`); got.Outcome != api.OutcomeUnchanged || got.Detail != "" {
		t.Errorf("%+v", got)
	}
}

func TestStatusTellsOfPermissions(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, newRolling(2*time.Hour).fetch)
	token, admin := d.tokens(""), d.admin()
	send(t, token, get(v1Vault))
	one := func() api.TokenStatus {
		t.Helper()
		got := send(t, admin, get(api.PathStatus))
		if strings.Contains(got.body, "canary") || strings.Contains(got.body, "null") {
			t.Fatal(got.body)
		}
		tokens := decoded[api.Status](t, got.body).Tokens
		if len(tokens) != 1 {
			t.Fatalf("%+v", tokens)
		}
		return tokens[0]
	}
	first := one()
	if first.Permissions.State != api.PermissionsCurrent || first.Life != 86400 || len(first.SHA256) != 64 ||
		!first.HeldUntil.IsZero() || first.Before != nil || !first.Refused.IsZero() {
		t.Errorf("%+v", first)
	}
	minted := time.Now().Add(-2 * time.Hour)
	if first.IssuedFrom.IsZero() || first.IssuedTo.IsZero() || first.IssuedFrom.After(minted) ||
		first.IssuedTo.Before(minted.Add(-time.Minute)) {
		t.Errorf("minted from %v to %v", first.IssuedFrom, first.IssuedTo)
	}
	if c := first.Claims; c == nil || c.Audience != vault || c.ClientID != claimed || c.ObjectID != objectID ||
		fmt.Sprint(c.Groups, c.Roles, c.WIDs) != "[group-1] [role-1] [wid-1]" {
		t.Errorf("claims %+v", first.Claims)
	}
	if first.Rollover.Pattern != api.RolloverUnlearnt || first.Rollover.Seen != 0 {
		t.Errorf("rollover %+v", first.Rollover)
	}
	d.change(tokencache.Revoked, time.Minute)
	if got := one(); got.Permissions.State != api.PermissionsStale || !got.Permissions.Withheld ||
		got.HeldUntil.IsZero() {
		t.Errorf("while a change spreads: %+v", got)
	}
	send(t, token, post(api.PathRejected, `{"resource":"https://vault.azure.net","status":403}`))
	if got := one(); got.Refused.IsZero() {
		t.Errorf("after a report: %+v", got)
	}
}

// A watcher and a waiting caller see a change made on the admin socket, and the token that follows it.
func TestChangeIsSeenByAll(t *testing.T) {
	t.Parallel()
	back := newRolling(2 * time.Hour)
	d := newDaemon(t, back.fetch)
	token, admin := d.tokens(""), d.admin()
	send(t, token, get(v1Vault))
	w := d.watchAt(token, watchVault)
	w.next(api.EventToken)
	at := time.Now().Add(-time.Hour).UTC().Format(time.RFC3339)
	send(t, admin, post(api.PathPolicyChanges, `{"all_resources":true,"effect":"revoked","at":"`+at+`"}`))
	if got := w.next(api.EventPermissions); !got.Permissions.Withheld {
		t.Errorf("%+v", got)
	}
	conn := dial(t, token, get(v1Vault+"&wait=10m"))
	defer conn.Close()
	come(&d.quotas().waiting, 1)
	back.roll("", time.Minute)
	send(t, admin, post(api.PathRefresh, `{"now":true}`))
	if got := w.next(api.EventToken); got.Permissions.State != api.PermissionsCurrent {
		t.Errorf("%+v", got)
	}
	if got := exchangeOn(t, conn, ""); got.status != 200 || got.header.Get(api.PermissionsHeader) != "current" {
		t.Errorf("%+v", got)
	}
}

// A revocation that ends while somebody waits lets the token through.
func TestWithdrawingEndsAWait(t *testing.T) {
	t.Parallel()
	back := newRolling(0)
	inBubble(t, back.fetch, func(b *bubble) {
		back.roll("", 2*time.Hour) // by the bubble's clock
		revoked := changeOn(b.t, b.agent, tokencache.Revoked, time.Hour)
		w := newRecorder()
		leave, done := b.begin(w, v1Vault+"&wait=10m")
		defer leave()
		time.Sleep(time.Minute)
		synctest.Wait()
		if text := w.take(); text != "" {
			b.t.Fatalf("answered: %s", text)
		}
		if _, err := b.agent.WithdrawChange("the test", revoked.ID); err != nil {
			b.t.Fatal(err)
		}
		<-done
		if token := decoded[api.Token](b.t, w.take()); token.Permissions.State != api.PermissionsCurrent {
			b.t.Errorf("%+v", token.Permissions)
		}
	})
}

// However long the claims are that the back end gives, a client takes the status: every key has a token, and another
// one before it.
func TestTheLargestStatusIsAnAnswer(t *testing.T) {
	t.Parallel()
	claims := func(size int) tokencache.Claims {
		payload := make(map[string]any)
		for _, name := range []string{"groups", "roles", "wids"} {
			payload[name] = []string{strings.Repeat("x", size)}
		}
		for _, name := range []string{"iss", "aud", "appid", "oid", "tid", "xms_mirid"} {
			payload[name] = strings.Repeat("x", size)
		}
		text, err := json.Marshal(payload)
		if err != nil {
			t.Fatal(err)
		}
		return source.Claims(tokencache.NewSecret("a." + base64.RawURLEncoding.EncodeToString(text) + ".c"))
	}
	if huge := claims(10_000); len(huge.Omitted) != 9 || huge.ObjectID+huge.Issuer != "" || huge.Groups != nil {
		t.Errorf("claims that are too long are kept: %+v", huge)
	}
	largest := claims(1000)
	lists := claims(8<<10 - len(`"",`))
	if largest.Groups, largest.Roles, largest.WIDs = lists.Groups, lists.Roles, lists.WIDs; largest.Groups == nil ||
		largest.Issuer == "" {
		t.Fatalf("claims that are just short enough are not kept: %v", lists.Omitted)
	}
	long, now := strings.Repeat(`"`, 512), time.Now()
	told := api.TokenClaims{
		Issuer: largest.Issuer, Audience: largest.Audience, ClientID: largest.ClientID, ObjectID: largest.ObjectID,
		TenantID: largest.TenantID,
		Groups:   largest.Groups, Roles: largest.Roles, WIDs: largest.WIDs, Omitted: largest.Omitted,
	}
	token := api.TokenStatus{
		Identity: long, Resource: long, Refused: now, SHA256: strings.Repeat("0",
			64), ReceivedOn: now, ExpiresOn: now, ExpiresIn: 3600, NextRefresh: now,
		LastFetch: now, LastOutcome: tokencache.Failed, LastError: long, Claims: &told, Before: &told,
		Rollover: api.RolloverStatus{Expected: now}, HeldUntil: now, IssuedFrom: now, IssuedTo: now,
		Permissions: api.Permissions{State: tokencache.Stale, Changed: now, CurrentBy: now, Likely: now,
			Withheld: true},
		Changes: slices.Repeat([]api.TokenChange{{ID: long[:64], State: tokencache.Uncertain}},
			tokencache.MaxVerdicts),
		MoreChanges: tokencache.MaxChanges,
	}
	change := api.PolicyChange{
		ID: long[:64], Identity: long, Resource: long, Note: long[:256], At: now, RecordedOn: now, EndsOn: now,
		Effect: tokencache.Revoked, Joined: 1,
	}
	var status api.Status
	for range tokencache.MaxKeys {
		status.Tokens, status.Trouble = append(status.Tokens, token), append(status.Trouble, long)
	}
	for range tokencache.MaxChanges {
		status.Changes = append(status.Changes, change)
	}
	if text := encode(status); len(text) > api.MaxAnswer || len(text) < api.MaxAnswer/2 {
		t.Errorf("it has %d bytes", len(text))
	}
}
