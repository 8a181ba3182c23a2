package server

import (
	"net/http/httptest"
	"reflect"
	"strings"
	"testing"

	"perceptd/agent/api"
	"perceptd/agent/grants"
)

// lift returns the text of a DELETE request.
func lift(query string) string { return requestText("DELETE", api.PathDeny+query, "") }

func TestDenyRules(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	token, module, admin := d.tokens(""), d.tokens("vision"), d.admin()
	if got := send(t, admin, get(api.PathDeny)); got.status != 200 ||
		got.body != "{\"now\":\"2026-11-23T12:00:00Z\",\"rules\":[]}\n" {
		t.Errorf("with none: %+v", got)
	}
	if got := send(t, module, get(v1Vault)); got.status != 200 {
		t.Fatalf("before: %+v", got)
	}
	got := send(t, admin, post(api.PathDeny, `{"module":"vision","note":"stolen"}`))
	if got.status != 200 {
		t.Fatalf("%+v", got)
	}
	rule := decoded[api.DenyAnswer](t, got.body)
	want := api.DenyRule{
		ID: rule.ID, DenyTarget: api.DenyTarget{Module: "vision"}, Origin: api.DenyLocal, Note: "stolen",
		Since: rule.Since, By: rule.By, Idle: rule.Idle,
	}
	if rule.ID == "" || !reflect.DeepEqual(rule.DenyRule, want) || !rule.Now.Equal(noon) ||
		!strings.HasPrefix(rule.By, "uid ") ||
		!strings.Contains(rule.By, "pid ") {
		t.Errorf("%+v", rule)
	}
	checkRefusal(t, "the module", send(t, module, get(v1Vault)), 403, api.CodeDenied)
	if got := send(t, token, get(v1Vault)); got.status != 200 {
		t.Errorf("another caller: %+v", got)
	}
	for socket, denied := range map[string]int{module: 2, token: 0} {
		who := decoded[api.WhoAmI](t, send(t, socket, get(api.PathWhoAmI)).body)
		if len(who.Grants) == 0 || len(who.Grants[0].Denied) != denied {
			t.Errorf("%s is granted %+v", socket, who.Grants)
		}
	}
	list := decoded[api.DenyRules](t, send(t, admin, get(api.PathDeny)).body)
	if len(list.Rules) != 1 || !reflect.DeepEqual(list.Rules[0], rule.DenyRule) || !list.Now.Equal(noon) {
		t.Errorf("the list: %+v", list)
	}
	status := decoded[api.Status](t, send(t, admin, get(api.PathStatus)).body)
	if status.Deny == nil || len(status.Deny.Rules) != 1 || !reflect.DeepEqual(status.Deny.Rules[0], rule.DenyRule) {
		t.Errorf("the status has %+v", status.Deny)
	}
	if len(status.Denials) != 1 || status.Denials[0].Code != api.CodeDenied {
		t.Errorf("the denials are %+v", status.Denials)
	}
	got = send(t, admin, lift("?id="+rule.ID))
	if was := decoded[api.DenyAnswer](t, got.body); got.status != 200 ||
		!reflect.DeepEqual(was.DenyRule, rule.DenyRule) ||
		!was.Now.Equal(noon) {
		t.Errorf("lifted: %+v", got)
	}
	if got := send(t, module, get(v1Vault)); got.status != 200 {
		t.Errorf("after: %+v", got)
	}
}

func TestDenyRulesThatAreRefused(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	admin := d.admin()
	deny := func(body string) string { return post(api.PathDeny, body) }
	for _, test := range []struct {
		name, text string
		status     int
		code       api.Code
		want       string
	}{
		{"nothing", deny(``), 400, api.CodeBadRequest, ""},
		{"a module that is empty", deny(`{"module":"","resource":"https://vault.azure.net"}`), 400, api.CodeBadRequest,
			"its module is empty"},
		{"an identity that is null", deny(`{"module":"vision","identity":null}`), 400, api.CodeBadRequest,
			"its identity is empty"},
		{"all that is false", deny(`{"module":"vision","all":false}`), 400, api.CodeBadRequest, "its all is empty"},
		{"a note alone", deny(`{"note":"x"}`), 400, api.CodeBadRequest, ""},
		{"everything, and a module", deny(`{"all":true,"module":"vision"}`), 400, api.CodeBadRequest, ""},
		{"an unknown field", deny(`{"modul":"vision"}`), 400, api.CodeBadRequest, `unknown field "modul"`},
		{"an origin", deny(`{"module":"vision","origin":"twin"}`), 400, api.CodeBadRequest, `unknown field "origin"`},
		{"a list", deny(`[{"all":true}]`), 400, api.CodeBadRequest, "no JSON object"},
		{"a module that is a number", deny(`{"module":7}`), 400, api.CodeBadRequest, "is a number"},
		{"a long note", deny(`{"all":true,"note":"` + strings.Repeat("x", 257) + `"}`), 400, api.CodeBadRequest, "256"},
		{"a resource that is none", deny(`{"resource":"vault"}`), 400, api.CodeBadRequest, ""},
		{"a query", post(api.PathDeny+"?x", `{"all":true}`), 400, api.CodeBadRequest, "no query parameters"},
		{"a query of the list", get(api.PathDeny + "?x"), 400, api.CodeBadRequest, "no query parameters"},
		{"nothing lifted", lift(""), 400, api.CodeBadRequest, "which deny rule is lifted: GET /v1/deny lists them"},
		{"an empty ID", lift("?id="), 400, api.CodeBadRequest, "id parameter"},
		{"more than an ID", lift("?id=1&from=hub"), 400, api.CodeBadRequest, "no other"},
		{"an unknown ID", lift("?id=nothing"), 404, api.CodeUnknownDenyRule, `"nothing"`},
		{"a query of the hub", requestText("DELETE", api.PathDenyHub+"?x", ""), 400, api.CodeBadRequest,
			"no query parameters"},
		{"a query of what is lost", requestText("DELETE", api.PathDenyLost+"?x", ""), 400, api.CodeBadRequest,
			"no query parameters"},
		{"a body of the hub", post(api.PathDenyHub, `{"all":true}`), 400, api.CodeBadRequest, "unknown field"},
	} {
		got := send(t, admin, test.text)
		checkRefusal(t, test.name, got, test.status, test.code)
		if detail := got.problem(t).Detail; !strings.Contains(detail, test.want) || len(detail) > 600 {
			t.Errorf("%s: %q, want %q", test.name, detail, test.want)
		}
	}
	if left := d.Agent.DenyStatus(); len(left.Rules) != 0 || !left.HubSetAsideOn.IsZero() {
		t.Errorf("something was denied: %+v", left)
	}
}

// TestSettingTheHubAsideIsForRoot shows that only root on this device sets aside what IoT Hub denies, heeds it again,
// and ends what a lost record causes, and that others are told what to run.
func TestSettingTheHubAsideIsForRoot(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	root := grants.Caller{UID: 0, GID: 0, PID: 7}
	inContainer, nested := root, root
	inContainer.Container = grants.ContainerOf("sha256:" + strings.Repeat("0", 64))
	nested.Nested = true
	for _, route := range []struct {
		method, path, command string
		handle                func(*Server, *request) *apiError
		aside                 bool // afterwards
	}{
		{"DELETE", api.PathDenyHub, "sudo perceptctl deny lift --from-hub", (*Server).setHubAside, true},
		{"POST", api.PathDenyHub, "sudo perceptctl deny heed-hub", (*Server).heedHub, false},
		{"DELETE", api.PathDenyLost, "sudo perceptctl deny forget-lost", (*Server).forgetLostDeny, false},
	} {
		before := !d.Agent.DenyStatus().HubSetAsideOn.IsZero()
		for _, other := range []grants.Caller{
			{UID: 1000, GID: 0, Groups: []uint32{0}, PID: 7}, {UID: grants.NoID, GID: grants.NoID}, inContainer, nested,
		} {
			req := &request{caller: other, http: httptest.NewRequest(route.method, route.path, nil)}
			e := route.handle(d.Server, req)
			if e == nil || e.status != 403 || e.code != api.CodeNotRoot || !strings.Contains(e.detail, route.command) {
				t.Errorf("%s %s of %v: %+v", route.method, route.path, other, e)
			}
			if aside := !d.Agent.DenyStatus().HubSetAsideOn.IsZero(); aside != before {
				t.Errorf("%s %s of %v: set aside is %v", route.method, route.path, other, aside)
			}
		}
		req := &request{caller: root, http: httptest.NewRequest(route.method, route.path, nil)}
		if e := route.handle(d.Server, req); e != nil {
			t.Fatalf("%s %s of root: %+v", route.method, route.path, e)
		}
		answer := decoded[api.DenyRules](t, string(req.body))
		if aside := !answer.HubSetAsideOn.IsZero(); aside != route.aside || !answer.Now.Equal(noon) {
			t.Errorf("%s %s of root: %s", route.method, route.path, req.body)
		}
	}
}

// TestGrantsThatAreDenied shows that the list of grants says what rules take away from whom.
func TestGrantsThatAreDenied(t *testing.T) {
	t.Parallel()
	uid, gid := uint32(1000), uint32(44)
	r := rules()
	of := func(m grants.Match) {
		r.Grants = append(r.Grants, grants.Grant{Caller: m, Identity: "camera", Resources: []string{vault}})
	}
	r.Grants = nil
	of(grants.Match{Module: "vision"})
	of(grants.Match{Unit: "cam.service"})
	of(grants.Match{Image: "cam@sha256:" + strings.Repeat("0a", 32)})
	of(grants.Match{UID: &uid})
	of(grants.Match{GID: &gid})
	d := newDaemonWith(t, fetchDay, r)
	admin := d.admin()
	if got := send(t, admin, get(api.PathGrants)).body; strings.Contains(got, "denied") ||
		strings.Contains(got, `"deny"`) {
		t.Errorf("without rules: %s", got)
	}
	// What a rule is for: yes, no, or perhaps, for the module, the unit, the image, the user and the group.
	for target, want := range map[string]string{
		`"all":true`:                           "yyyyy",
		`"resource":"` + vault + `"`:           "yyyyy",
		`"resource":"https://other.azure.net"`: "nnnnn",
		`"identity":"camera"`:                  "yyyyy",
		`"identity":"speech"`:                  "nnnnn",
		`"module":"vision"`:                    "ynpnn",
		`"module":"other"`:                     "nnpnn",
		`"unit":"cam"`:                         "nynpp",
		`"unit":"other.service"`:               "nnnpp",
		`"user":"1000"`:                        "pppyp",
		`"user":"1001"`:                        "pppnp",
	} {
		rule := decoded[api.DenyAnswer](t, send(t, admin, post(api.PathDeny, "{"+target+"}")).body)
		answer := decoded[api.Grants](t, send(t, admin, get(api.PathGrants)).body)
		got := ""
		for _, g := range answer.Grants {
			how := "n"
			switch {
			case reflect.DeepEqual(g.Denied, []string{vault}) && g.MayBeDenied == nil:
				how = "y"
			case reflect.DeepEqual(g.MayBeDenied, []string{vault}) && g.Denied == nil:
				how = "p"
			}
			got += how
			if by := reflect.DeepEqual(g.DeniedBy, []string{rule.ID}); by != (how != "n") {
				t.Errorf("%s: grant %d is denied by %q", target, g.Number, g.DeniedBy)
			}
		}
		if got != want || answer.Deny == nil || len(answer.Deny.Rules) != 1 || answer.Deny.Rules[0].ID != rule.ID ||
			!answer.Now.Equal(noon) {
			t.Errorf("%s: %s, not %s; %+v", target, got, want, answer)
		}
		if got := send(t, admin, lift("?id="+rule.ID)); got.status != 200 {
			t.Fatalf("%+v", got)
		}
	}
}

// TestResourcesWithoutAScheme shows that what people ask on the admin socket takes a resource without its scheme, as
// the twin and the methods of IoT Hub do.
func TestResourcesWithoutAScheme(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	admin, module := d.admin(), d.tokens("vision")
	if got := send(t, module, get(v1Vault)); got.status != 200 {
		t.Fatalf("%+v", got)
	}
	got := send(t, admin, get(api.PathGrantsCheck+"?module=vision&resource=vault.azure.net"))
	if decision := decoded[api.Decision](t, got.body); !decision.Allowed {
		t.Errorf("it is not granted: %+v", got)
	}
	got = send(t, admin, post(api.PathRefresh, `{"resource":"vault.azure.net"}`))
	if got.status != 200 || !strings.Contains(got.body, `"resource":"https://vault.azure.net"`) {
		t.Errorf("refreshed: %+v", got)
	}
	got = send(t, admin, post(api.PathPolicyChanges, `{"resource":"vault.azure.net","effect":"granted"}`))
	if change := decoded[api.PolicyChangeAnswer](t, got.body); change.Resource != "https://vault.azure.net" {
		t.Errorf("noted: %+v", got)
	}
	got = send(t, admin, post(api.PathDeny, `{"resource":"vault.azure.net"}`))
	if rule := decoded[api.DenyAnswer](t, got.body); rule.Resource != "https://vault.azure.net" {
		t.Errorf("denied: %+v", got)
	}
	checkRefusal(t, "the module", send(t, module, get(v1Vault)), 403, api.CodeDenied)
	checkRefusal(t, "no host", send(t, admin, post(api.PathDeny, `{"resource":"vault"}`)), 400, api.CodeBadRequest)
}
