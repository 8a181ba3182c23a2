package server

import (
	"fmt"
	"strings"

	"perceptd/agent/grants"
)

// isSelector reports whether a parameter of the SDK forms names the identity.
func isSelector(name string) bool {
	switch name {
	case "client_id", "object_id", "principal_id", "msi_res_id", "mi_res_id":
		return true
	}
	return false
}

// checkSlip refuses a parameter that was meant to name the identity and has a name that Azure does not know, as
// clientId. Ignored, as Azure ignores it, it would bring the default identity's token without a word. An empty one
// names none.
func checkSlip(p parameter, minVersion string) *apiError {
	if p.value == "" {
		return nil
	}
	meant := selectorMeant(p.name)
	switch {
	case meant == "":
		return nil
	case meant == "msi_res_id" && minVersion == appServiceVersion:
		meant = "mi_res_id" // as App Service calls it
	}
	return badRequest(fmt.Sprintf("query parameter %s is not known here: "+
		"send %s, or leave it out for the identity that is granted", grants.Quoted(p.name), meant))
}

// plainSelectors are the names of selectors in lower case and without separators, as people and other interfaces of
// Azure write them, and the parameter that each means.
var plainSelectors = map[string]string{
	"clientid": "client_id", "client": "client_id", "appid": "client_id", "applicationid": "client_id",
	"identity": "client_id", "identityid": "client_id", "identityclientid": "client_id",
	"identities": "client_id", "identityname": "client_id", "id": "client_id", "name": "client_id",
	"uami": "client_id", "uamiid": "client_id", "uamiclientid": "client_id",
	"userassignedidentity": "client_id", "userassignedidentityid": "client_id",
	"userassignedidentityclientid": "client_id", "managedidentity": "client_id", "managedidentityid": "client_id",
	"managedidentityclientid": "client_id", "msiclientid": "client_id", "miclientid": "client_id",
	"objectid": "object_id", "identityobjectid": "object_id", "msiobjectid": "object_id", "oid": "object_id",
	"principalid": "principal_id", "identityprincipalid": "principal_id",
	"msiresid": "msi_res_id", "resourceid": "msi_res_id", "resid": "msi_res_id", "msiresourceid": "msi_res_id",
	"identityresourceid": "msi_res_id", "managedidentityresourceid": "msi_res_id",
	"miresid": "mi_res_id", "miresourceid": "mi_res_id",
}

// slippery are the names in plainSelectors that one wrong letter does not make another word of.
var slippery = [...]string{"clientid", "objectid", "principalid", "msiresid", "miresid", "resourceid", "msiresourceid",
	"miresourceid", "identity", "userassignedidentity", "managedidentity"}

// selectorMeant returns the selector that a parameter of another name was meant for; empty: it was meant for none.
func selectorMeant(name string) string {
	const longest = 40 // no name that was meant for a selector is longer
	if len(name) > longest || isSelector(name) {
		return ""
	}
	plain := strings.Map(func(r rune) rune {
		switch r {
		case '_', '-', '.', ' ', '[', ']':
			return -1
		}
		return r
	}, strings.ToLower(name))
	if meant := plainSelectors[plain]; meant != "" {
		return meant
	}
	for _, one := range slippery {
		if isOneSlipAway(plain, one) {
			return plainSelectors[one]
		}
	}
	return ""
}

// isOneSlipAway reports whether one letter more, less or other, or two that changed places, makes b of a.
func isOneSlipAway(a, b string) bool {
	for len(a) > 0 && len(b) > 0 && a[0] == b[0] {
		a, b = a[1:], b[1:]
	}
	for len(a) > 0 && len(b) > 0 && a[len(a)-1] == b[len(b)-1] {
		a, b = a[:len(a)-1], b[:len(b)-1]
	}
	return len(a) <= 1 && len(b) <= 1 || len(a) == 2 && len(b) == 2 && a[0] == b[1] && a[1] == b[0]
}
