package agent_test

import (
	"testing"

	"perceptd/agent"
	"perceptd/agent/grants"
)

// A printed command grants whom the grant beside it is for: perceptctl takes digits for an ID, also where they are
// the name of another user or group.
func TestCommandOfNamesThatAreNumbers(t *testing.T) {
	t.Parallel()
	id := uint32(4_000_001_501) // of no account
	for _, row := range []struct {
		caller    grants.Match
		toml, arg string
	}{
		{grants.Match{UID: &id, User: "1000"}, "uid = 4000001501", "--user 4000001501"},
		{grants.Match{UID: &id, User: "edge"}, `user = "edge"`, "--user edge"},
		{grants.Match{UID: &id}, "uid = 4000001501", "--user 4000001501"},
		{grants.Match{GID: &id, Group: "2000"}, "gid = 4000001501", "--group 4000001501"},
		{grants.Match{GID: &id, Group: "video"}, `group = "video"`, "--group video"},
	} {
		s := agent.SuggestionOf(&grants.Suggestion{Grants: []grants.Grant{
			{Caller: row.caller, Identity: "device", Resources: []string{"api://x"}},
		}}, true)
		wantTOML := "[[grant]]\ncaller    = { " + row.toml + " }\nidentity  = \"device\"\nresources = [\"api://x\"]\n"
		want := "perceptctl grants add " + row.arg + " --identity device --resource api://x"
		if s.TOML != wantTOML || s.Command != want {
			t.Errorf("%+v: %s\n%s", row.caller, s.Command, s.TOML)
		}
	}
}

// Where a caller's identities are several, the printed command has a call for each, which a shell runs as it is.
func TestCommandOfSeveralIdentities(t *testing.T) {
	t.Parallel()
	id := uint32(4_000_001_501)
	s := agent.SuggestionOf(&grants.Suggestion{Repeats: true, Grants: []grants.Grant{
		{Caller: grants.Match{UID: &id}, Identity: "device", Resources: []string{"api://new", "api://x"}},
		{Caller: grants.Match{UID: &id}, Identity: "vision", Resources: []string{"api://y"}},
	}}, true)
	const want = "perceptctl grants add --user 4000001501 --identity device --resource api://new " +
		"--resource api://x && sudo perceptctl grants add --user 4000001501 --identity vision --resource api://y"
	if s.Command != want {
		t.Errorf("%s\nwant %s", s.Command, want)
	}
}
