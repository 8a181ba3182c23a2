package explain

import (
	"fmt"
	"slices"
	"strings"

	"perceptd/agent/api"
	"perceptd/tokencache"
)

// DefaultScope may stand behind a resource and is dropped.
const DefaultScope = "/.default"

// MissingError says that there is no such token, and in Hint what there is instead. Both have names from outside.
type MissingError struct{ Is, Hint string }

func (e *MissingError) Error() string { return e.Is }

// Choose returns the tokens of the status that are for a resource, which is one of each identity where identity is
// empty. The error is a *MissingError.
func Choose(status api.Status, resource, identity string) ([]api.TokenStatus, error) {
	resource = strings.TrimSuffix(resource, DefaultScope)
	var chosen []api.TokenStatus
	var holders, resources, spelt []string
	for _, token := range status.Tokens {
		if !slices.Contains(resources, token.Resource) {
			resources = append(resources, token.Resource)
		}
		if token.Resource != resource {
			ofIts := identity == "" || token.Identity == identity
			if ofIts && tokencache.Canonical(token.Resource) == tokencache.Canonical(resource) &&
				!slices.Contains(spelt, token.Resource) {
				spelt = append(spelt, token.Resource)
			}
			continue
		}
		holders = append(holders, token.Identity)
		if identity == "" || token.Identity == identity {
			chosen = append(chosen, token)
		}
	}
	switch {
	case len(chosen) > 0:
		return chosen, nil
	case len(spelt) > 0:
		return nil, &MissingError{fmt.Sprintf("no token for %s is cached in that spelling", resource),
			"it is cached for: " + strings.Join(spelt, ", ")}
	case len(holders) > 0:
		return nil, &MissingError{fmt.Sprintf("identity %q has no token for %s", identity, resource),
			"these have: " + strings.Join(holders, ", ")}
	case len(resources) > 0:
		return nil, &MissingError{fmt.Sprintf("no token for %s is cached", resource),
			"tokens are cached for: " + strings.Join(resources, ", ") +
				"; any other comes when a granted caller asks, or with prefetch = true in its grant"}
	}
	return nil, &MissingError{fmt.Sprintf("no token for %s is cached, nor any other", resource),
		"a token comes when a granted caller asks, or with prefetch = true in its grant"}
}
