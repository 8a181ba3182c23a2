package api_test

import (
	"os/exec"
	"strings"
	"testing"

	"perceptd/agent/api"
)

func TestNewGrant(t *testing.T) {
	t.Parallel()
	uid, gid := uint32(7), uint32(44)
	for _, row := range []struct {
		caller         api.GrantCaller
		inTOML, inCall string
	}{
		{api.GrantCaller{Module: "vision"}, `{ module = "vision" }`, "--module vision"},
		{api.GrantCaller{Unit: `cam@3f\x2dx.service`}, `{ unit = "cam@3f\\x2dx.service" }`,
			`--unit 'cam@3f\x2dx.service'`},
		{api.GrantCaller{Image: "sha256:0a"}, `{ container_image = "sha256:0a" }`, "--container-image sha256:0a"},
		{api.GrantCaller{User: "edge"}, `{ user = "edge" }`, "--user edge"},
		{api.GrantCaller{UID: &uid}, `{ uid = 7 }`, "--user 7"},
		{api.GrantCaller{Group: "video"}, `{ group = "video" }`, "--group video"},
		{api.GrantCaller{GID: &gid}, `{ gid = 44 }`, "--group 44"},
	} {
		g := api.NewGrant{Caller: row.caller, Resources: []string{"https://vault.azure.net", "api://x"}}
		want := "[[grant]]\ncaller    = " + row.inTOML + "\nidentity  = \"NAME\"\n" +
			"resources = [\"https://vault.azure.net\", \"api://x\"]\n"
		if got := g.TOML(); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
		g.Identity = "device"
		want = "perceptctl grants add " + row.inCall +
			" --identity device --resource https://vault.azure.net --resource api://x"
		if got := g.Command(); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
}

// A resource may have any printable character that is not a quote, and callers choose the one they are denied.
func TestCommandIsNotCode(t *testing.T) {
	t.Parallel()
	const hostile = "https://x/$(touch${IFS}/tmp/x);`id`&|'*?~!#"
	g := api.NewGrant{Caller: api.GrantCaller{Unit: "cam.service"}, Identity: "device", Resources: []string{hostile}}
	text := strings.Replace(g.Command(), "perceptctl", `printf '%s\n'`, 1)
	output, err := exec.Command("sh", "-c", text).Output()
	lines := strings.Split(strings.TrimSpace(string(output)), "\n")
	if err != nil || lines[len(lines)-1] != hostile {
		t.Errorf("%q, %v", lines, err)
	}
}
