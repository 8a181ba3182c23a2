package server

import (
	"strconv"
	"strings"
	"time"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/tokencache"
)

// label notes what the answer's headers say of the token in it.
func (x *exchange) label(a *agent.Answer, asked string) {
	x.permissions = permissionsHeader(permissionsOf(a.Permissions))
	x.audience = audienceOf(a, asked)
}

// audienceOf returns the resource that the token was asked for where it is not the one that the caller
// asked for, or "".
func audienceOf(a *agent.Answer, asked string) string {
	if a.Resource == strings.TrimSuffix(asked, "/.default") {
		return ""
	}
	return a.Resource
}

// currentHeader is shared by all answers. net/http only reads it.
var currentHeader = []string{string(api.StandingCurrent)}

// permissionsHeader returns the value of api.PermissionsHeader.
func permissionsHeader(p api.Permissions) []string {
	if p.Standing == api.StandingCurrent {
		return currentHeader
	}
	text := append([]byte(nil), p.Standing...)
	text = appendNumber(text, "; changed=", p.Changed)
	text = appendNumber(text, "; current-by=", p.CurrentBy)
	return []string{string(text)}
}

// permissionsOf returns what is known of the permissions of a token that is there.
func permissionsOf(p tokencache.Permissions) api.Permissions {
	return api.Permissions{
		Standing:  api.Standing(p.Standing.String()), // the same words
		Changed:   unixOf(p.Changed),
		CurrentBy: unixOf(p.CurrentBy),
		Likely:    unixOf(p.Likely),
		Withheld:  p.Withheld,
	}
}

// appendPermissions appends p as a JSON object.
func appendPermissions(dst []byte, p api.Permissions) []byte {
	dst = appendTextField(dst, `{"standing":`, string(p.Standing))
	for _, field := range [...]struct {
		name  string
		value int64
	}{{`,"changed":`, p.Changed}, {`,"current_by":`, p.CurrentBy}, {`,"likely":`, p.Likely}} {
		if field.value != 0 {
			dst = appendNumber(dst, field.name, field.value)
		}
	}
	if p.Withheld {
		dst = strconv.AppendBool(append(dst, `,"withheld":`...), true)
	}
	return append(dst, '}')
}

func claimsOf(c tokencache.Claims) api.TokenClaims {
	return api.TokenClaims{
		Issuer: c.Issuer, Audience: c.Audience, ClientID: c.ClientID, ObjectID: c.ObjectID, TenantID: c.TenantID,
		Groups: c.Groups, Roles: c.Roles, WIDs: c.WIDs, Omitted: c.Omitted,
	}
}

// unixOf returns t in Unix seconds, 0 for no time.
func unixOf(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Unix()
}
