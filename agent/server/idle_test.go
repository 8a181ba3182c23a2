package server

import (
	"encoding/json"
	"net/http"
	"strings"
	"testing"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/grants"
)

// Where a grant is faulty, or no configuration is in force, each form is refused with that reason, and who am I, the
// list of grants and the check of one say the same.
func TestFaultsOnEveryForm(t *testing.T) {
	t.Parallel()
	const fault = `unknown key "prefech"`
	faulty := func(r *agent.Rules) { r.Grants[3].Fault, r.Grants[3].Place = fault, "config.toml:23" }
	unclear := func(r *agent.Rules) {
		r.Grants = append(r.Grants[:3:3],
			grants.Grant{Fault: fault, Place: "config.toml:23", Unclear: grants.AllKinds, AnyResource: true})
	}
	for _, row := range []struct {
		name   string
		change func(*agent.Rules)
		status int
		code   api.Code
		says   string
	}{
		{"a faulty grant", faulty, 403, api.CodeFaultyGrant,
			"grant 4 (config.toml:23) decides about module vision"},
		{"one whose caller is not understood", unclear, 403, api.CodeFaultyGrant,
			"grant 4 (config.toml:23) may be for"},
		{"a faulty identity", func(r *agent.Rules) { r.Identities[1].Fault = fault }, 403, api.CodeFaultyGrant, fault},
		{"no configuration", func(r *agent.Rules) { *r = agent.Rules{NoRules: fault} }, 503, api.CodeNoConfiguration,
			"no configuration is in force, so that no token is handed out: " + fault},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			r := rules()
			row.change(&r)
			d := newDaemonWith(t, fetchDay, r)
			module, admin := d.tokens("vision"), d.admin()
			for name, request := range map[string]string{
				"IMDS":        get(imdsVault, metadata),
				"App Service": get(appVault, appHeader),
				"v1":          get(v1Vault),
				"waiting":     get(v1Vault + "&wait=30s"),
				"watch":       get(watchVault),
				"rejected":    post(api.PathRejected, `{"resource":"`+vault+`","status":403}`),
			} {
				got := send(t, module, request)
				if got.status != row.status || !strings.Contains(got.body, string(row.code)) ||
					!strings.Contains(strings.ReplaceAll(got.body, `\"`, `"`), row.says) {
					t.Errorf("%s: %d, %s", name, got.status, got.body)
				}
				retry := got.header.Get("Retry-After")
				if (retry != "") != (row.status == http.StatusServiceUnavailable) {
					t.Errorf("%s: Retry-After %q", name, retry)
				}
			}
			isDenial := row.status == http.StatusForbidden
			if who := send(t, module, get(api.PathWhoAmI)); isDenial != strings.Contains(who.body, `"fault":`) ||
				isDenial == strings.Contains(who.body, `"refused":`) || who.status != 200 {
				t.Errorf("who am I: %s", who.body)
			}
			check := send(t, admin, get(api.PathGrantsCheck+"?module=vision&resource="+vault))
			var decided api.Decision
			err := json.Unmarshal([]byte(check.body), &decided)
			if err != nil || decided.Allowed || decided.Code != row.code ||
				!strings.Contains(decided.Reason, row.says) {
				t.Errorf("check: %+v, %v", decided, err)
			}
			all := send(t, admin, get(api.PathGrants))
			if all.status != 200 || !strings.Contains(strings.ReplaceAll(all.body, `\"`, `"`), fault) {
				t.Errorf("grants: %s", all.body)
			}
			if status := send(t, admin, get(api.PathStatus)); status.status != 200 {
				t.Errorf("status: %s", status.body)
			}
		})
	}
}

// A faulty grant opens nothing on the loopback listener either, and its caller is told its fault, not another's secret.
func TestFaultyGrantOnLoopback(t *testing.T) {
	t.Parallel()
	r := rules()
	r.Grants[3].Fault, r.Grants[3].Place = "y", "config.toml:23"
	r.Grants = append(r.Grants,
		grants.Grant{Fault: "x", Unclear: grants.Modules, AnyResource: true, Place: "config.toml:30"})
	d := newDaemonWith(t, fetchDay, r)
	at, secrets := d.loopbackListener()
	secrets.SetGrants(d.Agent.Grants())
	if _, known := secrets.Match(secrets.Header(grants.Match{})); known {
		t.Error("a secret counts that is for nobody")
	}
	got := sendTCP(t, at, asks(appVault, at, secretLine(secrets.Header(grants.Match{Module: "vision"}))))
	if got.status != 403 || !strings.Contains(got.body, string(api.CodeFaultyGrant)) {
		t.Errorf("a token: %d, %s", got.status, got.body)
	}
	for name, ask := range map[string]struct{ socket, says string }{
		"its own grant":       {d.tokens("vision"), "grant 4 (config.toml:23)"},
		"what may be for one": {d.tokens("stranger"), "grant 5 (config.toml:30)"},
	} {
		got := send(t, ask.socket, get(api.PathLoopback))
		if got.status != 403 || got.problem(t).Code != api.CodeFaultyGrant || !strings.Contains(got.body, ask.says) {
			t.Errorf("%s: %d, %s", name, got.status, got.body)
		}
	}
}

// A faulty grant that may be for another caller shows a caller its number, file and line alone, on every path, and one
// that is for the caller its fault too. The folder is for administrators.
func TestFaultyGrantToItsCallerAndOthers(t *testing.T) {
	t.Parallel()
	const fault, place = `module "gone" is not there`, "/etc/percept/60.toml:1"
	const secret = "https://secret-of-gone.example"
	for _, row := range []struct {
		name  string
		grant grants.Grant
		told  bool // the fault
	}{
		{"its own", grants.Grant{Caller: grants.Match{Module: "stranger"}}, true},
		{"another's", grants.Grant{Unclear: grants.Modules}, false},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			r := rules()
			row.grant.Identity, row.grant.Resources = "device", []string{secret}
			row.grant.Place, row.grant.Fault = place, fault
			r.Grants = append(r.Grants, row.grant)
			d := newDaemonWith(t, fetchDay, r)
			stranger, admin := d.tokens("stranger"), d.admin()
			const asked = "resource=" + secret
			for name, request := range map[string]string{
				"IMDS":        get(api.PathIMDSToken+"?api-version=2018-02-01&"+asked, metadata),
				"App Service": get(api.PathAppServiceToken+"?api-version=2019-08-01&"+asked, appHeader),
				"v1":          get(api.PathToken + "?" + asked),
				"watch":       get(api.PathWatch + "?" + asked),
				"loopback":    get(api.PathLoopback),
				"who am I":    get(api.PathWhoAmI),
			} {
				body := send(t, stranger, request).body
				if strings.Contains(body, "/etc") || !strings.Contains(body, "60.toml:1") ||
					strings.Contains(body, "is not there") != row.told {
					t.Errorf("%s: %s", name, body)
				}
				if isShown := strings.Contains(body, secret); name == "who am I" && isShown != row.told {
					t.Errorf("%s: %s", name, body)
				}
			}
			for name, path := range map[string]string{
				"check":  api.PathGrantsCheck + "?module=stranger&" + asked,
				"grants": api.PathGrants, "status": api.PathStatus,
			} {
				if body := send(t, admin, get(path)).body; !strings.Contains(body, place) ||
					!strings.Contains(body, "is not there") {
					t.Errorf("%s: %s", name, body)
				}
			}
			if log := d.log.String(); !strings.Contains(log, place) {
				t.Error("the journal does not say where the grant is")
			}
		})
	}
}
