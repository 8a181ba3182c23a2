package explain

import (
	"errors"
	"testing"

	"perceptd/agent/api"
)

func TestChoose(t *testing.T) {
	t.Parallel()
	const storage = "https://storage.azure.com"
	status := api.Status{Tokens: []api.TokenStatus{
		{Identity: "device", Resource: storage + "/"}, {Identity: "speech", Resource: storage},
		{Identity: "vision", Resource: storage},
	}}
	for _, row := range []struct {
		resource, identity string
		tokens             int
		is, hint           string
	}{
		{storage, "", 2, "", ""},
		{storage + "/.default", "vision", 1, "", ""},
		{storage, "device", 0, "no token for " + storage + " is cached in that spelling",
			"it is cached for: " + storage + "/"},
		{storage, "nobody", 0, `identity "nobody" has no token for ` + storage, "these have: speech, vision"},
		{"https://other.example", "", 0, "no token for https://other.example is cached", "tokens are cached for: " +
			storage + "/, " + storage +
			"; any other comes when a granted caller asks, or with prefetch = true in its grant"},
	} {
		tokens, err := Choose(status, row.resource, row.identity)
		missing, _ := errors.AsType[*MissingError](err)
		switch {
		case len(tokens) != row.tokens:
			t.Errorf("%s of %q: %d tokens", row.resource, row.identity, len(tokens))
		case row.is != "" && (missing == nil || missing.Is != row.is || missing.Hint != row.hint):
			t.Errorf("%s of %q: %+v", row.resource, row.identity, missing)
		}
	}
}
