package server

import (
	"os"
	"strings"
	"testing"

	"perceptd/agent/api"
	"perceptd/agent/grants"
)

func TestWhoAmI(t *testing.T) {
	t.Parallel()
	r := rules()
	for i := range r.Grants {
		r.Grants[i].Place = "/etc/percept/config.toml:1"
	}
	d := newDaemonWith(t, fetchDay, r)
	got := send(t, d.tokens(""), get(api.PathWhoAmI))
	w := decoded[api.WhoAmI](t, got.body)
	if got.status != 200 || !w.Proved || w.Unattested != nil || w.Caller.UID == nil ||
		*w.Caller.UID != uint32(os.Getuid()) || *w.Caller.GID != uint32(os.Getgid()) ||
		int(w.Caller.PID) != os.Getpid() {
		t.Errorf("%+v", w)
	}
	if len(w.Grants) != 3 || w.Grants[0].Number != 1 || w.Grants[0].Place != "" || w.Grants[0].Identity != "device" ||
		len(w.Grants[0].Resources) != 2 {
		t.Errorf("%+v", w.Grants)
	}
	if os.Getuid() == 0 && (w.Caller.User != "root" || w.Caller.Group != "root") {
		t.Errorf("%+v", w.Caller)
	}
	if got := send(t, d.tokens("vision"), get(api.PathWhoAmI)); !strings.Contains(got.body, `"module":"vision"`) ||
		strings.Contains(got.body, `"user"`) {
		t.Errorf("on a module's socket: %s", got.body)
	}
	stranger := decoded[api.WhoAmI](t, send(t, d.tokens("stranger"), get(api.PathWhoAmI)).body)
	if !stranger.Proved || stranger.Grants == nil || len(stranger.Grants) != 0 {
		t.Errorf("nothing granted: %+v", stranger)
	}
	if got := send(t, d.tokens("q"), get(api.PathWhoAmI+"?x=1")); got.status != 400 {
		t.Errorf("%+v", got)
	}
	if strings.Contains(got.body, "config.toml") {
		t.Error("a caller is told where the administrator's files are")
	}
}

// Who could not be proved is told why, on that path and on no other, and from no browser.
func TestWhoAmIOfTheUnproved(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	l, la := d.listen("t"), d.listen("a")
	d.serving(func() error { return d.ServeTokens(anonymous{l}, "vision") })
	d.serving(func() error { return d.ServeAdmin(anonymous{la}) })
	got := send(t, l.Addr().String(), get(api.PathWhoAmI))
	w := decoded[api.WhoAmI](t, got.body)
	if got.status != 200 || w.Proved || w.Unattested == nil || w.Unattested.What == "" || len(w.Grants) != 0 ||
		w.Caller.UID != nil || w.Caller.User != "" {
		t.Errorf("%+v", got)
	}
	for _, text := range []string{get(api.PathWhoAmI, "Origin: http://x"), requestText("POST", api.PathWhoAmI, ""),
		get(api.PathHealth)} {
		if got := send(t, l.Addr().String(), text); got.status == 200 {
			t.Errorf("%q: %+v", text, got)
		}
	}
	if got := send(t, la.Addr().String(), get(api.PathWhoAmI)); got.status != 403 {
		t.Errorf("on the admin socket: %+v", got)
	}
	status := decoded[api.Status](t, send(t, d.admin(), get(api.PathStatus)).body)
	if len(status.Denials) != 2 || status.Denials[1].Reason == "" || status.Denials[1].Count < 2 {
		t.Errorf("denials in the status: %+v", status.Denials)
	}
}

func TestCallerOfAContainer(t *testing.T) {
	t.Parallel()
	got := callerOf(&grants.Caller{UID: 0, GID: 0, PID: 3, Container: &grants.Container{ID: "1f", Name: "cam",
		Image: "cam:2", Digest: "sha256:0", EdgeModule: "cam"}})
	if got.User != "" || got.Group != "" || got.Groups == nil || got.Container.EdgeModule != "cam" ||
		got.Container.Image != "cam:2" {
		t.Errorf("%+v", got)
	}
}

func TestGrantsAreListed(t *testing.T) {
	t.Parallel()
	r := rules()
	r.Grants[3].Place = "config.toml:20"
	d := newDaemonWith(t, fetchDay, r)
	admin := d.admin()
	all := decoded[api.Grants](t, send(t, admin, get(api.PathGrants)).body)
	if len(all.Grants) != 4 || all.Grants[3].Number != 4 || all.Grants[3].Place != "config.toml:20" ||
		all.Grants[3].Caller != "module vision" {
		t.Errorf("%+v", all)
	}
	if got := send(t, admin, get(api.PathGrants+"?module=vision")); got.status != 400 {
		t.Errorf("%+v", got)
	}
	if got := send(t, d.tokens(""), get(api.PathGrants)); got.status != 404 {
		t.Errorf("on the token socket: %+v", got)
	}
}

func TestGrantsAreChecked(t *testing.T) {
	t.Parallel()
	r := rules()
	r.Grants = append(r.Grants,
		grants.Grant{Caller: grants.Match{Unit: "cam.service"}, Identity: "camera", Resources: []string{vault}},
		grants.Grant{Caller: grants.Match{Image: "cam@sha256:" + strings.Repeat("0a", 32)}, Identity: "camera",
			Resources: []string{vault}})
	gid := uint32(44)
	r.Grants = append(r.Grants, grants.Grant{Caller: grants.Match{GID: &gid}, Identity: "device",
		Resources: []string{vault}})
	d := newDaemonWith(t, fetchDay, r)
	admin := d.admin()
	for _, row := range []struct {
		query   string
		allowed bool
		want    string // in the reason
		grants  int    // considered
	}{
		{"module=vision", true, `grant 4 lets module vision have tokens of identity "vision"`, 1},
		{"module=speech", false, "no grant is for module speech", 0},
		{"module=vision&identity=device", false, "none of the grants that decide over module vision", 1},
		{"unit=cam", true, "grant 5 lets unit cam.service", 1},
		{"unit=cam.service&gid=44", true, "grant 5", 2},
		{"unit=other&gid=44", true, "grant 7 lets gid 44", 1},
		{"gid=44", true, "grant 7", 1},
		{"uid=4000000000&gid=45,44", true, "grant 7", 1},
		{"module=speech&container_image=cam@sha256:" + strings.Repeat("0a", 32), true, "grant 6", 1},
		{"module=vision&container_image=cam@sha256:" + strings.Repeat("0a", 32), true, "grant 4", 2},
		{"gid=45", false, "no grant is for gid 45", 0},
		{"container_image=cam@sha256:" + strings.Repeat("0a", 32), true, "grant 6", 1},
		{"container_image=sha256:" + strings.Repeat("0b", 32), false, "no grant is for container of image sha256:0b",
			0},
		{"uid=4000000000", false, "no grant is for uid 4000000000", 0},
	} {
		got := send(t, admin, get(api.PathGrantsCheck+"?resource="+vault+"&"+row.query))
		if got.status != 200 {
			t.Errorf("%s: %+v", row.query, got)
			continue
		}
		v := decoded[api.Decision](t, got.body)
		if v.Allowed != row.allowed || v.Allowed != (v.Grant != nil) || v.Allowed != (v.Code == "") ||
			!strings.Contains(v.Reason, row.want) || len(v.Considered) != row.grants {
			t.Errorf("%s: %+v", row.query, v)
		}
	}
	for query, want := range map[string]string{
		"":                      "nothing says who",
		"module=a%2Fb":          "module name",
		"module=":               "exactly one",
		"unit=x.scope":          "is no service",
		"container_image=cam:2": "tags move",
		"uid=me":                "must be a number",
		"uid=4294967295":        "must be a number",
		"gid=-1":                "must be a number",
		"gid=44,":               "must be a number",
		"module=vision&uid=1":   "say nothing",
		"container_image=sha256:" + strings.Repeat("0b", 32) + "&gid=44": "say nothing",
		"pod=x":                        `query parameter "pod" is not known`,
		"module=vision&resource=twice": "twice",
	} {
		got := send(t, admin, get(api.PathGrantsCheck+"?resource="+vault+"&"+query))
		if got.status != 400 || !strings.Contains(got.problem(t).Detail, want) {
			t.Errorf("%s: %+v", query, got)
		}
	}
	if got := send(t, admin, get(api.PathGrantsCheck+"?module=vision")); got.status != 400 ||
		!strings.Contains(got.body, "the resource is empty") {
		t.Errorf("no resource: %+v", got)
	}
}
