package server

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"perceptd/agent/api"
	"perceptd/tokencache"
)

// every lists a request of each form for the vault's token.
var every = []struct{ target, header string }{{imdsVault, metadata}, {appVault, appHeader}, {v1Vault, "Accept: */*"}}

func TestPermissionsAreToldOnEveryForm(t *testing.T) {
	t.Parallel()
	const minted = 2 * time.Hour // ago
	for _, test := range []struct {
		name   string
		change time.Duration // ago; 0: none
		want   api.Standing
	}{
		{"no change", 0, api.StandingCurrent},
		{"a change before", 3 * time.Hour, api.StandingCurrent},
		{"a change just before", minted + time.Minute, api.StandingUncertain},
		{"a change after", time.Hour, api.StandingStale},
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
			if test.want == api.StandingCurrent {
				if header != "current" {
					t.Errorf("%s: %q", name, header)
				}
				continue
			}
			var changed, by int64
			if n, err := fmt.Sscanf(header, string(test.want)+"; changed=%d; current-by=%d", &changed, &by); n != 2 || err != nil {
				t.Fatalf("%s: %q", name, header)
			}
			at := time.Now().Add(-test.change).Unix()
			if changed < at-60 || changed > at || by <= time.Now().Unix() {
				t.Errorf("%s: %q, changed on %d", name, header, at)
			}
			if form.target == v1Vault {
				p := decoded[api.Token](t, got.body).Permissions
				if p.Standing != test.want || p.Changed != changed || p.CurrentBy-by > 1 || p.Withheld {
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
		{Standing: api.StandingCurrent},
		{Standing: api.StandingStale, Changed: 1, CurrentBy: 2, Likely: 3, Withheld: true},
		{Standing: api.StandingUncertain, Changed: 1795435200, CurrentBy: 1795521600},
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
		if got := send(t, socket, get(target)); got.status != 200 || got.header[api.AudienceHeader] != nil || strings.Contains(got.body, "audience") {
			t.Fatalf("while both are current: %+v", got)
		}
	}
	d.change(tokencache.Revoked, time.Hour)
	for _, form := range every {
		for _, suffix := range []string{"", "/.default"} {
			target := strings.Replace(form.target, "vault.azure.net", "vault.azure.net"+suffix, 1)
			got := send(t, socket, get(target, form.header))
			if got.status != 200 || got.header.Get(api.AudienceHeader) != other || got.header.Get(api.PermissionsHeader) != "current" {
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
