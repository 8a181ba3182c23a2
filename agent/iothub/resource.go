package iothub

import "strings"

// fullResource returns a resource as the configuration names it where the sender left the scheme out, since ":" and "/"
// are not allowed in a twin's keys, and people carry that over to its values: "vault.azure.net" is
// "https://vault.azure.net". An application's ID, which has no dot, stays as it is.
func fullResource(resource string) string {
	if strings.Contains(resource, "://") || !strings.Contains(resource, ".") || strings.HasPrefix(resource, "/") {
		return resource
	}
	return "https://" + resource
}
