package grants_test

import (
	"strings"
	"testing"
	"unicode/utf8"

	"perceptd/agent/grants"
)

const someObject, someARM = "00000000-0000-0000-0000-00000000000A", "/subscriptions/1/resourceGroups/r/providers/x"

// edgeIdentities are rules of two identities, one of which cam.service may have.
func edgeIdentities() *grants.Authorizer {
	return grants.NewAuthorizer(grants.Rules{
		Identities: []grants.Identity{
			{Name: "vision", ClientID: someID, ObjectID: someObject, ResourceID: someARM},
			{Name: "speech", ClientID: "00000000-0000-0000-0000-000000000002"},
		},
		Grants: []grants.Grant{
			{Caller: grants.Match{Unit: "cam.service"}, Identity: "vision", Resources: []string{vault}},
		},
	})
}

// A refusal repeats what was asked for, and by which parameter, and recognises what was given in the wrong place. What
// it adds are IDs of identities that the caller may name.
func TestUnknownIdentities(t *testing.T) {
	t.Parallel()
	const longARM = "/subscriptions/00000000-0000-0000-0000-000000000001/resourceGroups/r/providers/" +
		"Microsoft.ManagedIdentity/userAssignedIdentities/vison"
	const has = "Identity not found: no [[identity]] of the configuration has the "
	for _, row := range []struct {
		ask  grants.Request
		want string
	}{
		{grants.Request{ClientID: "vision", Parameter: "client_id"},
			`client_id "vision": that is the name of one, and not its client ID, which is ` + someID},
		{grants.Request{ClientID: "speech", Parameter: "client_id"},
			`client_id "speech": that is the name of one, and not its client ID`},
		{grants.Request{ClientID: "VISION"},
			`client_id "VISION": that is the name of one, and not its client ID, which is ` +
				someID},
		{grants.Request{ClientID: someObject},
			`client_id "` + someObject + `": that is the object ID of one, and not its client ID, which is ` + someID},
		{grants.Request{ObjectID: someID, Parameter: "principal_id"},
			`principal_id "` + someID + `": that is the client ID of one, and not its object ID, which is ` +
				someObject},
		{grants.Request{ClientID: someARM},
			`client_id "` + someARM + `": that is the resource ID of one, and not its client ID, which is ` + someID},
		{grants.Request{ResourceID: someID, Parameter: "mi_res_id"},
			`mi_res_id "` + someID + `": that is the client ID of one, and not its resource ID, which is ` + someARM},
		{grants.Request{Identity: someID},
			`name "` + someID + `": that is the client ID of one, and not its name, which is vision`},
		{grants.Request{Identity: "Vision"},
			`name "Vision": that is the name of one in other letters, which is vision`},
		{grants.Request{ClientID: "{" + someID + "}"}, `client_id "{` + someID +
			`}": that is the client ID of one with other characters around it, which is ` + someID},
		{grants.Request{ClientID: someID + "\n"}, `client_id "` + someID +
			`\n": that is the client ID of one with other characters around it, which is ` + someID},
		{grants.Request{ClientID: "a\x00\x1b[31m"}, `client_id "a\x00\x1b[31m"`},
		{grants.Request{ResourceID: someARM[1:], Parameter: "msi_res_id"}, `msi_res_id "` + someARM[1:] +
			`": that is the resource ID of one with other slashes around it, which is ` + someARM},
		{grants.Request{ResourceID: someARM + "/"}, `resource_id "` + someARM +
			`/": that is the resource ID of one with other slashes around it, which is ` + someARM},
		{grants.Request{ResourceID: longARM}, `resource_id "` + longARM + `"`},
		{grants.Request{ClientID: strings.Repeat("é", 200) + strings.Repeat("à", 200)}, `client_id "` +
			strings.Repeat("é", 150) + `"…"` + strings.Repeat("à", 150) + `"`},
	} {
		row.ask.Resource = vault
		_, denial := edgeIdentities().Authorize(&camera, row.ask)
		if denial == nil || denial.Err != grants.ErrUnknownIdentity || denial.Detail != has+row.want ||
			len(denial.Granted) != 1 || denial.Granted[0].Name != "vision" {
			t.Errorf("%+v: %+v\nwant %s", row.ask, denial, has+row.want)
		}
	}
	stranger := grants.Caller{UID: 7}
	_, denial := edgeIdentities().Authorize(&stranger, grants.Request{Resource: vault, ClientID: "vision"})
	if strings.Contains(denial.Detail, someID) || len(denial.Granted) != 0 {
		t.Errorf("to a caller without grants: %+v", denial)
	}
}

// FuzzUnknownIdentity checks that an answer repeats a text on one line and not beyond its bound.
func FuzzUnknownIdentity(f *testing.F) {
	f.Add("vision")
	f.Add("{" + someID + "}\r\n\x00\xff")
	f.Fuzz(func(t *testing.T, asked string) {
		if asked == "" {
			return
		}
		for _, r := range []grants.Request{{ClientID: asked}, {ObjectID: asked}, {ResourceID: asked},
			{Identity: asked}} {
			r.Resource = vault
			_, denial := edgeIdentities().Authorize(&camera, r)
			if denial == nil {
				continue
			}
			text := denial.Detail
			if strings.ContainsAny(text, "\r\n\x00\x1b") || !utf8.ValidString(text) || len(text) > 2000 {
				t.Fatalf("%q: %q", asked, text)
			}
		}
	})
}
