package api

import "strings"

// FullResource returns a resource as the configuration names it where its sender left the scheme out, as people do:
// "vault.azure.net" is "https://vault.azure.net". An application's ID, which has no dot, stays as it is.
func FullResource(resource string) string {
	if strings.Contains(resource, "://") || !strings.Contains(resource, ".") || strings.HasPrefix(resource, "/") {
		return resource
	}
	return "https://" + resource
}
