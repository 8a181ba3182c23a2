package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/tokencache"
)

// post returns the text of a POST request.
func post(path, body string, lines ...string) string {
	return request("POST", path, body, append(lines, "Content-Length: "+strconv.Itoa(len(body)))...)
}

func TestStatus(t *testing.T) {
	t.Parallel()
	r := rules()
	r.Grants = []agent.Grant{
		{Caller: agent.Match{Module: "vision"}, Identity: "vision", Resources: []string{vault}},
		{Caller: agent.Match{Module: "vision"}, Identity: "device", Resources: []string{"https://broken"}},
	}
	d := newDaemonWith(t, func(ctx context.Context, k tokencache.Key) (tokencache.Fetched, error) {
		if k.Resource != vault {
			return tokencache.Fetched{}, &tokencache.FetchError{Kind: tokencache.Refused, Detail: "not this one"}
		}
		return fetchDay(ctx, k)
	}, r)
	started := noon.Add(-time.Hour)
	d.Describe = func() api.Status {
		return api.Status{Version: "1.2.3", StartedOn: started, Trouble: []string{"the daemon's own"}, Source: api.SourceStatus{Kind: "simulated"}, Simulated: true}
	}
	module, admin := d.tokens("vision"), d.admin()
	send(t, module, get(imdsVault, metadata))
	send(t, module, get("/v1/token?resource=https://broken"))
	answer := send(t, admin, get(api.PathStatus))
	if answer.status != 200 || answer.header.Get("Content-Type") != "application/json" || strings.Contains(answer.body, "null") || strings.Contains(answer.body, "canary") {
		t.Fatalf("%+v", answer)
	}
	got := decoded[api.Status](t, answer.body)
	if got.Version != "1.2.3" || !got.Now.Equal(noon) || !got.StartedOn.Equal(started) || !got.Simulated || !got.Ready {
		t.Errorf("the daemon's part: %+v", got)
	}
	if len(got.Trouble) != 2 || got.Trouble[0] != "the daemon's own" || !strings.Contains(got.Trouble[1], "not this one") {
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
	if missing.State != api.StateMissing || missing.LastOutcome != api.OutcomeFailed || !strings.Contains(missing.LastError, "not this one") || missing.ExpiresOn != nil || missing.SHA256 != "" {
		t.Errorf("the missing token: %+v", missing)
	}
	sum := tokencache.NewSecret(canary).SHA256()
	if fresh.State != api.StateFresh || fresh.LastOutcome != api.OutcomeNewer || fresh.SHA256 != sum[:12] || fresh.ExpiresIn == 0 || fresh.ExpiresOn == nil || fresh.NextRefresh == nil || fresh.Served != 1 || fresh.Fetches != 1 {
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

// The server hands the cache's words on as the contract's.
func TestWordsAgree(t *testing.T) {
	t.Parallel()
	for state, want := range map[tokencache.State]api.TokenState{
		tokencache.Missing: api.StateMissing, tokencache.Fetching: api.StateFetching, tokencache.Fresh: api.StateFresh,
		tokencache.Refreshing: api.StateRefresh, tokencache.Failing: api.StateFailing, tokencache.Idle: api.StateIdle,
	} {
		if got := api.TokenState(state.String()); got != want {
			t.Errorf("state %q, the contract says %q", got, want)
		}
	}
	for outcome, want := range map[tokencache.Outcome]api.Outcome{
		tokencache.Newer: api.OutcomeNewer, tokencache.Unchanged: api.OutcomeUnchanged,
		tokencache.Older: api.OutcomeOlder, tokencache.Former: api.OutcomeFormer, tokencache.Failed: api.OutcomeFailed,
	} {
		if got := refreshResult(agent.RefreshResult{Outcome: outcome}).Outcome; got != want {
			t.Errorf("outcome %q, the contract says %q", got, want)
		}
		if got := adviceOf(agent.Advice{Identity: &agent.Identity{}, Fetched: outcome}, "").Fetched; got != want {
			t.Errorf("outcome %q, the contract says %q", got, want)
		}
	}
	for standing, want := range map[tokencache.Standing]api.Standing{
		tokencache.Current: api.StandingCurrent, tokencache.Uncertain: api.StandingUncertain, tokencache.Stale: api.StandingStale,
	} {
		if got := permissionsOf(tokencache.Permissions{Standing: standing}).Standing; got != want {
			t.Errorf("standing %q, the contract says %q", got, want)
		}
	}
	for effect, want := range map[tokencache.Effect]api.Effect{
		tokencache.Granted: api.EffectGranted, tokencache.Revoked: api.EffectRevoked,
		tokencache.Changed: api.EffectChanged, tokencache.Unknown: api.EffectUnknown,
	} {
		var noted agent.NotedChange
		noted.Effect = effect
		if got := policyChange(noted).Effect; got != want {
			t.Errorf("effect %q, the contract says %q", got, want)
		}
		noted.Record, noted.Mend = agent.RecordLost, "mend" // which is no revocation, though it may withhold as much
		if got := policyChange(noted); got.Effect != api.EffectUnknown || got.Record != api.RecordLost || got.Mend != "mend" || got.Withholds != (effect == tokencache.Revoked) {
			t.Errorf("%+v", got)
		}
		if back := effectOf(want); back != effect && want != api.EffectUnknown {
			t.Errorf("%q is read as %v", want, back)
		}
	}
	for kind, want := range map[tokencache.PatternKind]api.RolloverPattern{
		tokencache.Unlearnt: api.RolloverUnlearnt, tokencache.Regular: api.RolloverRegular, tokencache.Irregular: api.RolloverIrregular,
	} {
		var key agent.KeyStatus
		key.Pattern.Kind = kind
		if got := tokenStatus(key).Rollover.Pattern; got != want {
			t.Errorf("pattern %q, the contract says %q", got, want)
		}
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
		{``, []api.RefreshResult{{Identity: "device", Resource: vault, Outcome: "unchanged"}, {Identity: "vision", Resource: vault, Outcome: "unchanged"}}},
		{`{}`, []api.RefreshResult{{Identity: "device", Resource: vault, Outcome: "unchanged"}, {Identity: "vision", Resource: vault, Outcome: "unchanged"}}},
		{`{"identity":"vision"}`, []api.RefreshResult{{Identity: "vision", Resource: vault, Outcome: "unchanged"}}},
		{`{"identity":"device","resource":"https://device.only"}`, []api.RefreshResult{{Identity: "device", Resource: "https://device.only", Outcome: "newer"}}},
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
	results := decoded[api.RefreshResponse](t, send(t, admin, post(api.PathRefresh, `{"identity":"vision"}`)).body).Results
	if len(results) != 1 || results[0].Outcome != api.OutcomeFailed || !strings.Contains(results[0].Detail, "nobody there") {
		t.Errorf("a refresh that failed: %+v", results)
	}
	checkRefusal(t, "unknown identity", send(t, admin, post(api.PathRefresh, `{"identity":"nobody"}`)), 400, api.CodeUnknownIdentity)
	checkRefusal(t, "unknown resource", send(t, admin, post(api.PathRefresh, `{"resource":"https://nowhere"}`)), 400, api.CodeBadRequest)
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
		{"wrong type", post(refresh, `{"identity":7}`), `field "identity" is a number, it must be a string`},
		{"list", post(refresh, `[]`), "no JSON object"},
		{"null", post(refresh, `null`), "no JSON object"},
		{"text", post(refresh, `identity=x`), "no JSON object"},
		{"broken", post(refresh, `{"identity" "x"}`), "no JSON from byte"},
		{"unended", post(refresh, `{"identity":`), "does not end"},
		{"two objects", post(refresh, `{}{}`), "after the JSON object"},
		{"rubbish behind", post(refresh, `{}]`), "after the JSON object"},
		{"a form", post(refresh, `{}`, "Content-Type: application/x-www-form-urlencoded"), "Content-Type"},
		{"a broken type", post(refresh, `{}`, "Content-Type: ;"), "Content-Type"},
		{"two types", post(refresh, `{}`, "Content-Type: application/json", "Content-Type: application/json"), "Content-Type"},
		{"too large", post(refresh, `{"identity":"`+strings.Repeat("x", maxBody)+`"}`), "larger than 65536"},
		{"broken off", request("POST", refresh, "zz\r\n", "Transfer-Encoding: chunked"), "did not arrive whole"},
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
		got, err := decodeBody[api.RefreshRequest](text)
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
	if got := decoded[api.ReloadResponse](t, send(t, admin, post(api.PathReload, "{}")).body); !reflect.DeepEqual(got, want) {
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
		if !works && (got.status != 503 || health.OK || !strings.Contains(health.Detail, fmt.Sprintf("identity %q for %s", "device", vault))) {
			t.Errorf("without: %+v", got)
		}
	}
}
