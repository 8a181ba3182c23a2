package grants

import "strings"

// parts are those of a resource. What people and programs spell in more than one way is apart from the rest.
type parts struct {
	whole        string
	scheme, host string // the scheme without ://, empty: none; the host without port
	port         string // with its colon
	path         string // without slashes at the end and doubled ones

	slash   bool // there is one at the end
	doubled bool // there is a doubled slash
	dot     bool // the host ends with one
	scopes  int  // how many /.default are behind it
	spaces  bool // there are spaces or quotes around it
}

const scopeSuffix = "/.default"

// partsOf takes a resource apart. Any text has parts.
func partsOf(resource string) parts {
	s := parts{whole: resource}
	rest := strings.Trim(resource, " \t\r\n\"'`<>")
	s.spaces = rest != resource
	for len(rest) > len(scopeSuffix) && strings.EqualFold(rest[len(rest)-len(scopeSuffix):], scopeSuffix) {
		rest = rest[:len(rest)-len(scopeSuffix)]
		s.scopes++
	}
	s.scheme, rest = cutScheme(rest)
	if s.scheme != "" {
		bare := strings.TrimLeft(rest, "/")
		s.doubled = len(rest)-len(bare) != len("//")
		rest = bare
	}
	s.host = rest
	if i := strings.IndexAny(rest, "/?#"); i >= 0 {
		s.host, s.path = rest[:i], rest[i:]
	}
	if i := strings.LastIndexByte(s.host, ':'); i >= 0 && isDigits(s.host[i+1:]) {
		s.host, s.port = s.host[:i], s.host[i:]
	}
	if bare := strings.TrimRight(s.host, "."); bare != "" && bare != s.host {
		s.host, s.dot = bare, true
	}
	s.slash = strings.HasSuffix(s.path, "/")
	for strings.Contains(s.path, "//") {
		s.path, s.doubled = strings.ReplaceAll(s.path, "//", "/"), true
	}
	s.path = strings.TrimSuffix(s.path, "/")
	return s
}

// cutScheme returns a resource's scheme, and the rest with the slashes before it. That of the web's is found with a
// slash too few as well.
func cutScheme(resource string) (scheme, rest string) {
	if i := strings.Index(resource, "://"); i > 0 && !strings.ContainsAny(resource[:i], "/?#") {
		return resource[:i], resource[i+1:]
	}
	for _, web := range [...]string{"https:", "http:"} {
		if len(resource) >= len(web) && strings.EqualFold(resource[:len(web)], web) {
			return resource[:len(web)-1], resource[len(web):]
		}
	}
	return "", resource
}

func isDigits(text string) bool {
	return !strings.ContainsFunc(text, func(r rune) bool { return r < '0' || r > '9' })
}

// isWeb reports whether the scheme is one that people put in the place of the other, or leave out.
func (s parts) isWeb() bool {
	return s.scheme == "" || strings.EqualFold(s.scheme, "https") || strings.EqualFold(s.scheme, "http")
}

// isSame reports whether two texts are spellings of one resource, be it the very same.
func (s parts) isSame(o parts) bool {
	return s.host != "" && strings.EqualFold(s.host, o.host) && strings.EqualFold(s.path, o.path) &&
		(strings.EqualFold(s.scheme, o.scheme) || s.isWeb() && o.isWeb() || s.scheme == "" || o.scheme == "")
}

// differences says in what the spelling asked for, s, differs from the one granted. None: in nothing, or not in
// spelling alone.
func (s parts) differences(granted parts) []string {
	if s.whole == granted.whole || !s.isSame(granted) {
		return nil
	}
	var all []string
	add := func(differs bool, text string) {
		if differs {
			all = append(all, text)
		}
	}
	add(s.spaces, "the spaces or quotes around it")
	add(s.scheme == "" && granted.scheme != "", "a missing scheme")
	add(s.scheme != "" && !strings.EqualFold(s.scheme, granted.scheme), "the scheme "+s.scheme)
	add(s.port != "" && s.port != granted.port, "the port "+s.port)
	add(s.port == "" && granted.port != "", "a missing port")
	add(s.dot != granted.dot, "the dot behind the host")
	add(s.slash && !granted.slash, "the slash at the end")
	add(!s.slash && granted.slash, "a missing slash at the end")
	add(s.doubled != granted.doubled, "the slashes")
	add(s.scopes != granted.scopes, "the /.default")
	add(strings.EqualFold(s.scheme, granted.scheme) && s.scheme != granted.scheme || s.host != granted.host ||
		s.path != granted.path, "upper and lower case")
	if len(all) == 0 {
		all = append(all, "its spelling")
	}
	return all
}

// inWords joins what people list with an "and".
func inWords(all []string) string {
	if len(all) < 2 {
		return strings.Join(all, "")
	}
	return strings.Join(all[:len(all)-1], ", ") + " and " + all[len(all)-1]
}
