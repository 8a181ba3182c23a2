package config

import (
	"strings"
	"testing"

	"perceptd/cmd/perceptd/e2e/harness"
)

// --check notes what is spelt as Azure does not, and the configuration is in force all the same.
func TestUnlikelySpellingsAreNoted(t *testing.T) {
	t.Parallel()
	c, err := Load(harness.WriteConfig(t, map[string]string{"config.toml": harness.GoodConfig + `
[[grant]]
caller = { module = "vision" }
identity = "device"
resources = ["https://vault.azure.net/", "http://other.example", "https://management.azure.com/"]
`}))
	if err != nil {
		t.Fatal(err)
	}
	text := c.Describe()
	for _, want := range []string{
		"note: https://vault.azure.net/ is not how Azure spells that resource: https://vault.azure.net is",
		"note: http://other.example has the scheme http",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in:\n%s", want, text)
		}
	}
	if strings.Count(text, "\nnote: ") != 2 {
		t.Errorf("other notes:\n%s", text)
	}
}
