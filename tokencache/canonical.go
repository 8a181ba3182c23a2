package tokencache

import (
	"regexp"
	"slices"
	"strings"
)

// guid matches an application's ID, which a resource may be named by, without a scheme.
var guid = regexp.MustCompile(`^[[:xdigit:]]{8}(-[[:xdigit:]]{4}){3}-[[:xdigit:]]{12}$`)

// Canonical returns the form in which two spellings of one resource are equal: without trailing slashes and default
// port, with scheme, host and an application's ID in lower case. Policy changes, denials and advice compare resources
// by it. Grants, keys and requests do not, since the back end and the resource treat every other spelling as a
// different resource.
func Canonical(resource string) string {
	scheme, rest, isURI := strings.Cut(resource, "://")
	if !isURI {
		if resource = strings.TrimRight(resource, "/"); guid.MatchString(resource) {
			return strings.ToLower(resource)
		}
		return resource
	}
	scheme = strings.ToLower(scheme)
	host, path := rest, ""
	if i := strings.IndexAny(rest, "/?#"); i >= 0 {
		host, path = rest[:i], rest[i:]
	}
	host = strings.ToLower(host)
	switch scheme {
	case "https":
		host = strings.TrimSuffix(host, ":443")
	case "http":
		host = strings.TrimSuffix(host, ":80")
	}
	return scheme + "://" + host + strings.TrimRight(path, "/")
}

// GoesBy reports whether other is a name of resource, given alternates as for Cache.SetAlternates. A policy change for
// one of them is about both.
func GoesBy(alternates map[string][]string, resource, other string) bool {
	return slices.Contains(together(alternates)[Canonical(resource)], Canonical(other))
}

// together groups the resources that have an alternate in common. It returns, by each resource's canonical form, the
// canonical forms of its group, itself included.
func together(alternates map[string][]string) map[string][]string {
	groups := make(map[string][]string)
	groupOf := func(resource string) []string {
		if group := groups[Canonical(resource)]; group != nil {
			return group
		}
		return []string{Canonical(resource)}
	}
	for resource, others := range alternates {
		for _, other := range others {
			one, two := groupOf(resource), groupOf(other)
			if slices.Contains(one, two[0]) {
				continue
			}
			both := slices.Concat(one, two)
			for _, name := range both {
				groups[name] = both
			}
		}
	}
	return groups
}
