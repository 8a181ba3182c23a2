package tokencache

import "strings"

// Spelling returns the form in which two spellings of one resource are the same: without trailing slashes, scheme and host in
// lower case, without the scheme's own port. Policy changes, denials and advice compare by it. Grants, keys and
// requests do not, since the back end and the resource take every other spelling for another resource.
func Spelling(resource string) string {
	scheme, rest, isURI := strings.Cut(resource, "://")
	if !isURI {
		return strings.TrimRight(resource, "/")
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
