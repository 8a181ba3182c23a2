package server

import (
	"net/http"
	"strings"

	"perceptd/agent/api"
)

// checkOrigin refuses what a process of this device would not send of itself: a page in a browser, a
// proxy that serves others, a name that was made to resolve to this device.
func checkOrigin(r *http.Request) *fault {
	foreign := func(detail string) *fault {
		return &fault{status: http.StatusForbidden, code: api.CodeForeignOrigin, detail: detail}
	}
	switch {
	case r.ProtoMajor != 1 || r.ProtoMinor != 1:
		return badRequest("only HTTP/1.1 is spoken here")
	case !localHost(r.Host):
		return foreign("the Host header must be localhost, 127.0.0.1, [::1] or 169.254.169.254, with or without a port")
	}
	if name, why := api.ForeignHeader(r.Header); name != "" {
		return foreign("requests with the header " + name + " are refused: " + why)
	}
	return nil
}

// localHost reports whether a Host header is one that an SDK sends to a local token endpoint. Their
// names are in lower case everywhere.
func localHost(host string) bool {
	for _, name := range [...]string{"localhost", "127.0.0.1", "169.254.169.254", "[::1]"} {
		if rest, ok := strings.CutPrefix(host, name); ok {
			return rest == "" || rest[0] == ':' && isPort(rest[1:])
		}
	}
	return false
}

func isPort(s string) bool {
	if s == "" || len(s) > 5 {
		return false
	}
	for _, c := range []byte(s) {
		if c < '0' || c > '9' {
			return false
		}
	}
	return true
}

// checkMethod refuses another method than the route's, if that has one, and a body where there is to be none.
func checkMethod(r *http.Request, to *route) *fault {
	switch {
	case to.method != "" && r.Method != to.method:
		allow := strings.Join(to.methods(), ", ")
		return &fault{
			status: http.StatusMethodNotAllowed, code: api.CodeMethod, allow: allow,
			detail: "this path answers " + allow + " only",
		}
	case r.Method != http.MethodPost && r.ContentLength != 0: // -1: chunked
		return badRequest("a " + r.Method + " request must not have a body")
	}
	return nil
}

// onlyValue returns the value of a header that must be there exactly once. name is in canonical form.
func onlyValue(r *http.Request, name string) (value string, once bool) {
	values := r.Header[name]
	if len(values) != 1 {
		return "", false
	}
	return values[0], true
}
