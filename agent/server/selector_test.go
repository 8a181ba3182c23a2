package server

import (
	"strings"
	"testing"

	"perceptd/agent/api"
)

func TestSelectorsOneSlipAway(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]string{
		"clientId": "client_id", "client-id": "client_id", "CLIENT_ID": "client_id", "Client_Id": "client_id",
		"clientid": "client_id", "cliend_id": "client_id", "client_di": "client_id", "clint_id": "client_id",
		"client_idd": "client_id", "appId": "client_id", "identity": "client_id", "client_id ": "client_id",
		"identty": "client_id", "identities": "client_id", "id": "client_id", "name": "client_id", "uami": "client_id",
		"user_assigned_identity": "client_id", "userAssignedIdentty": "client_id", "managed_identity": "client_id",
		"objectid": "object_id", "objectId": "object_id", "object-id": "object_id", "objekt_id": "object_id",
		"principalId": "principal_id", "principalid": "principal_id", "pricipal_id": "principal_id",
		"resource_id": "msi_res_id", "resourceId": "msi_res_id", "msiResId": "msi_res_id", "msi_resid": "msi_res_id",
		"res_id": "msi_res_id", "msi_resource_id": "msi_res_id",
		"mi_resource_id": "mi_res_id", "miResId": "mi_res_id", "MI_RES_ID": "mi_res_id",

		// What clients send beside a selector, and names that mean nothing here.
		"client_id": "", "mi_res_id": "", "resource": "", "api-version": "", "bypass_cache": "", "xms_cc": "",
		"token_sha256_to_refresh": "", "tenant_id": "", "authority": "", "scope": "", "client_info": "",
		"x-client-SKU": "", "client-request-id": "", "secret": "", "": "", "principal": "",
		strings.Repeat("clientid", 1000): "",
	} {
		if got := selectorMeant(name); got != want {
			t.Errorf("%q is taken for %q, not for %q", name, got, want)
		}
	}
}

// A selector with a name that is not one gets no token on any path, be the name taken or the value's identity granted.
func TestSlipsGetNoToken(t *testing.T) {
	t.Parallel()
	token := newDaemon(t, fetchDay).tokens("")
	const app = api.PathAppServiceToken + "?api-version=2019-08-01&resource=" + vault
	for _, test := range []struct{ target, want string }{
		{imdsVault + "&clientId=" + visionID, `parameter \"clientId\" is not known here: send client_id, or leave it`},
		{app + "&clientId=" + visionID, "send client_id, or leave it out for the identity that is granted"},
		{imdsVault + "&resource_id=/subscriptions/x", "send msi_res_id,"},
		{app + "&resource_id=/subscriptions/x", "send mi_res_id,"},
		{app + "&identity=vision", "send client_id,"},
		{imdsVault + "&identty=vision", "send client_id,"},
		{app + "&identities=vision", "send client_id,"},
		{imdsVault + "&id=vision", "send client_id,"},
		{app + "&name=vision", "send client_id,"},
		{imdsVault + "&uami=vision", "send client_id,"},
		{imdsVault + "&user_assigned_identity=vision", "send client_id,"},
		{app + "&userAssignedIdentty=vision", "send client_id,"},
		{app + "&managed_identity=vision", "send client_id,"},
		{imdsVault + "&client_id=" + visionID + "&ClientID=" + visionID, "send client_id,"},
		{imdsVault + "&client%0aid=x", `query parameter \"client\\nid\" is not known here: send client_id,`},
		{v1Vault + "&client_id=" + visionID, "wait are; the identity is named as the configuration does"},
		{v1Vault + "&Identity=vision", "identity=NAME"},
		{api.PathWatch + "?resource=" + vault + "&objectId=x", "resource and identity are; the identity is named as"},
	} {
		got := send(t, token, get(test.target, metadata, appHeader))
		if got.status != 400 || !strings.Contains(got.body, test.want) || strings.Contains(got.body, canary) {
			t.Errorf("%s: %+v", test.target, got)
		}
	}
	for _, target := range []string{imdsVault, app} {
		for _, rest := range []string{"&clientid=", "&msiResId=", "&bypass_cache=true", "&xms_cc=cp1", "&trace=1"} {
			if got := send(t, token, get(target+rest, metadata, appHeader)); got.status != 200 {
				t.Errorf("%s: %+v", target+rest, got)
			}
		}
	}
}

// FuzzSelectorMeant checks that what is taken for a selector is one, whatever the case and separators.
func FuzzSelectorMeant(f *testing.F) {
	f.Add("clientId")
	f.Add("\x00[]client")
	f.Fuzz(func(t *testing.T, name string) {
		meant := selectorMeant(name)
		if meant != "" && (!isSelector(meant) || isSelector(name)) {
			t.Fatalf("%q is taken for %q", name, meant)
		}
		if again := selectorMeant(strings.ToUpper(name)); meant != "" && !isSelector(strings.ToUpper(name)) &&
			again != meant && isASCII(name) {
			t.Fatalf("%q is taken for %q, and in upper case for %q", name, meant, again)
		}
		e := checkSlip(parameter{name, "x"}, imdsVersion)
		if (e != nil) != (meant != "") || e != nil && e.status != 400 {
			t.Fatalf("%q: %+v", name, e)
		}
	})
}

func isASCII(text string) bool {
	return !strings.ContainsFunc(text, func(r rune) bool { return r >= 0x80 })
}
