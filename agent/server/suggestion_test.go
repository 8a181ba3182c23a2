package server

import (
	"fmt"
	"os"
	"os/user"
	"strings"
	"testing"

	"perceptd/agent/api"
	"perceptd/agent/grants"
)

// A denial has the grant that would help on every path: in the SDK forms' text as a command, and as a field on /v1. The
// administrator's folder is on none.
func TestDenialsHaveASuggestion(t *testing.T) {
	t.Parallel()
	r := rules()
	for i := range r.Grants {
		r.Grants[i].Place = fmt.Sprintf("/etc/percept/config.toml:%d", 10*i+3)
	}
	d := newDaemonWith(t, fetchDay, r)
	module, own := d.tokens("vision"), d.tokens("")
	const app = api.PathAppServiceToken + "?api-version=2019-08-01&resource="
	const imds = api.PathIMDSToken + "?api-version=2018-02-01&resource="
	const other = "https://other.example"
	const says = "; to allow it: add the resource to grant 4 (config.toml:33) and run perceptctl reload, or run " +
		"sudo " +
		"perceptctl grants add --module vision --identity vision --resource " + other
	for _, path := range []string{app, imds} {
		got := send(t, module, get(path+other, metadata, appHeader))
		e := decoded[sdkError](t, got.body)
		if got.status != 403 || !strings.HasSuffix(e.Description, says) || e.Message != e.Description ||
			strings.Contains(got.body, "/etc") {
			t.Errorf("%s: %+v", path, got)
		}
	}
	p := send(t, module, get(api.PathToken+"?resource="+other)).problem(t)
	if p.Suggestion == nil || p.NearMiss != nil || p.Suggestion.AddTo == nil ||
		*p.Suggestion.AddTo != (api.GrantPlace{Number: 4, Place: "config.toml:33"}) ||
		p.Suggestion.TOML != "[[grant]]\ncaller    = { module = \"vision\" }\n"+
			"identity  = \"vision\"\nresources = [\""+other+
			"\"]\n" {
		t.Errorf("%+v", p)
	}
	// A user by its name; a new grant is for the identity that a request names.
	p = send(t, own, get(api.PathToken+"?identity=camera&resource="+vault)).problem(t)
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	if want := "perceptctl grants add --user " + me.Username + " --identity camera --resource " +
		vault; p.Suggestion == nil ||
		p.Suggestion.Command != want {
		t.Errorf("%+v, want %s", p.Suggestion, want)
	}
	// Another spelling of what is granted.
	p = send(t, module, get(api.PathToken+"?resource="+vault+"/")).problem(t)
	if p.Suggestion != nil || p.NearMiss == nil || p.NearMiss.Spelling != vault ||
		p.NearMiss.Place != "config.toml:33" ||
		!strings.HasSuffix(p.Detail, p.NearMiss.Advice) || p.NearMiss.Usual != vault {
		t.Errorf("%+v", p)
	}
	got := send(t, module, get(imds+"vault.azure.net", metadata))
	if got.status != 400 || !strings.Contains(got.body, "grant 4 (config.toml:33) names "+vault) {
		t.Errorf("%+v", got)
	}
	if log := d.log.String(); !strings.Contains(log,
		"grant 4 (/etc/percept/config.toml:33) for module vision names "+vault+", which differs in the slash") {
		t.Error("the log does not say which grant was meant")
	}
}

// whoami has the caller's latest denials, and no other caller's; the status has all, with what helps now.
func TestLatestDenialsSayWhatHelps(t *testing.T) {
	t.Parallel()
	r := rules()
	r.Grants = r.Grants[3:]
	r.Grants[0].Place = "/etc/percept/config.toml:33"
	d := newDaemonWith(t, fetchDay, r)
	module, stranger, admin := d.tokens("vision"), d.tokens("stranger"), d.admin()
	send(t, module, get(api.PathToken+"?resource="+vault+"/"))
	send(t, module, get(api.PathToken+"?resource=https://other.example"))
	send(t, stranger, get(api.PathToken+"?resource="+vault+"/"))
	w := decoded[api.WhoAmI](t, send(t, module, get(api.PathWhoAmI)).body)
	if len(w.Denials) != 2 || w.Denials[0].Resource != "https://other.example" || w.Denials[0].Suggestion == nil ||
		w.Denials[1].NearMiss == nil || w.Denials[1].NearMiss.Place != "config.toml:33" ||
		!strings.Contains(w.Denials[1].Reason, "ask for that one") {
		t.Errorf("%+v", w.Denials)
	}
	got := send(t, stranger, get(api.PathWhoAmI)).body
	if s := decoded[api.WhoAmI](t, got); len(s.Denials) != 1 || s.Denials[0].NearMiss != nil ||
		strings.Contains(got, "grant 1") || strings.Contains(got, "module vision") {
		t.Errorf("of another module's grants: %s", got)
	}
	all := decoded[api.Status](t, send(t, admin, get(api.PathStatus)).body).Denials
	if len(all) != 3 || all[0].NearMiss == nil || all[0].NearMiss.Caller != "module vision" ||
		all[0].NearMiss.Place != "/etc/percept/config.toml:33" || all[1].Suggestion.AddTo.Number != 1 {
		t.Errorf("%+v", all)
	}
	r.Grants = append(r.Grants, grants.Grant{Caller: grants.Match{Module: "vision"}, Identity: "vision",
		Resources: []string{"https://other.example"}})
	if _, err := d.Agent.Apply(r); err != nil {
		t.Fatal(err)
	}
	all = decoded[api.Status](t, send(t, admin, get(api.PathStatus)).body).Denials
	if len(all) != 3 || !all[1].GrantedNow || all[1].Suggestion != nil || all[0].GrantedNow {
		t.Errorf("once it is granted: %+v", all)
	}
	w = decoded[api.WhoAmI](t, send(t, module, get(api.PathWhoAmI)).body)
	if len(w.Denials) != 1 {
		t.Errorf("once it is granted: %+v", w.Denials)
	}
	c := decoded[api.Decision](t, send(t, admin, get(api.PathGrantsCheck+"?module=speech&resource="+vault+"/")).body)
	if c.NearMiss == nil || c.NearMiss.Caller != "module vision" || c.Suggestion == nil ||
		c.Suggestion.Grants[0].Caller.Module != "speech" || c.Suggestion.Grants[0].Resources[0] != vault ||
		!strings.Contains(c.Reason, "for module vision names "+vault) {
		t.Errorf("%+v", c)
	}
}

// What an SDK can send is said on its form: IDs, and never a configured name.
func TestChoicesThatAnSDKCanSend(t *testing.T) {
	t.Parallel()
	r := rules()
	r.Identities = append(r.Identities, grants.Identity{Name: "object",
		ObjectID: "00000000-0000-0000-0000-000000000003"},
		grants.Identity{Name: "arm", ResourceID: "/subscriptions/1/x"})
	me := uint32(os.Getuid())
	for _, name := range []string{"device", "vision", "object", "arm"} {
		r.Grants = append(r.Grants, grants.Grant{Caller: grants.Match{UID: &me}, Identity: name,
			Resources: []string{"https://all.four"}})
	}
	r.Grants = append(r.Grants, grants.Grant{Caller: grants.Match{UID: &me}, Identity: "device",
		Resources: []string{"https://system.only"}})
	token := newDaemonWith(t, fetchDay, r).tokens("")
	const app = api.PathAppServiceToken + "?api-version=2019-08-01"
	const imds = api.PathIMDSToken + "?api-version=2018-02-01"
	const ids = "=/subscriptions/1/x, or none, for the system-assigned identity, or " +
		"object_id=00000000-0000-0000-0000-000000000003, or client_id=" + visionID
	for target, want := range map[string]string{
		imds + "&resource=https://all.four&client_id=camera": `the client_id "camera": that is ` +
			"the name of one, and not its " +
			"client ID; this caller may send msi_res_id" + ids,
		app + "&resource=https://all.four&principal_id=nobody": `the principal_id "nobody"; this caller may send ` +
			"mi_res_id" + ids,
		imds + "&resource=https://system.only&client_id=nobody": `"nobody"; this caller may send none, for the ` +
			"system-assigned identity",
		imds + "&resource=https://nothing&mi_res_id=nobody": `the mi_res_id "nobody"; no identity is granted to this ` +
			"caller for that resource",
		imds + "&resource=https://two.choices": "Granted are: " +
			"client_id=00000000-0000-0000-0000-000000000002, or client_id=" +
			visionID,
	} {
		got := send(t, token, get(target, metadata, appHeader))
		if e := decoded[sdkError](t, got.body); got.status != 400 || !strings.HasSuffix(e.Description, want) {
			t.Errorf("%s: %s\nwant %s", target, e.Description, want)
		}
	}
}
