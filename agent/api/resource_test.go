package api

import "testing"

const (
	vault   = "https://vault.azure.net"
	storage = "https://storage.azure.com"
)

func TestFullResource(t *testing.T) {
	t.Parallel()
	for given, want := range map[string]string{
		"":                      "",
		"vault.azure.net":       vault,
		vault:                   vault,
		"api://a.b":             "api://a.b",
		"storage.azure.com/":    storage + "/",
		"/subscriptions/a.b":    "/subscriptions/a.b",
		"00000000-0000-0000-00": "00000000-0000-0000-00",
	} {
		if got := FullResource(given); got != want {
			t.Errorf("%q: %q, want %q", given, got, want)
		}
	}
}
