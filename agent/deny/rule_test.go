package deny

import "testing"

func TestTargetText(t *testing.T) {
	t.Parallel()
	for want, target := range map[string]Target{
		"everything":                       {All: true},
		"module vision":                    {Module: "vision"},
		"resource https://vault.azure.net": {Resource: "https://vault.azure.net"},
		"identity device":                  {Identity: "device"},
		"unit camera.service, user edge":   {Unit: "camera.service", User: "edge"},
		"module vision, identity device for https://vault.azure.net": {
			Module: "vision", Identity: "device", Resource: "https://vault.azure.net",
		},
	} {
		if got := target.String(); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
