package server

import (
	"net/http"
	"strings"

	"perceptd/agent/api"
)

// socket is the kind of socket that a request came in on: the permission that a route asks for.
type socket uint8

const (
	onToken socket = iota + 1
	onAdmin
	onLoopback
)

// form is the contract that a route's answers and errors keep.
type form uint8

const (
	formIMDS       form = iota + 1 // Azure's instance metadata service
	formAppService                 // Azure App Service
	formV1                         // our own
)

// route is one path of the API and one method on it. Its handler leaves the answer in the request, or
// returns why there is none.
type route struct {
	path   string
	slash  bool   // one trailing slash is the same path
	method string // empty: any
	socket socket
	form   form
	handle func(*Server, *request) *apiError
}

// routes is the whole API.
var routes = [...]route{
	{api.PathIMDSToken, true, http.MethodGet, onToken, formIMDS, (*Server).imdsToken},
	{api.PathAppServiceToken, false, http.MethodGet, onToken, formAppService, (*Server).appServiceToken},
	{api.PathToken, false, http.MethodGet, onToken, formV1, (*Server).token},
	{api.PathWatch, false, http.MethodGet, onToken, formV1, (*Server).watch},
	{api.PathRejected, false, http.MethodPost, onToken, formV1, (*Server).rejected},
	{api.PathWhoAmI, false, http.MethodGet, onToken, formV1, (*Server).whoAmI},
	{api.PathLoopback, false, http.MethodGet, onToken, formV1, (*Server).loopback},
	{api.PathHealth, false, http.MethodGet, onToken, formV1, (*Server).health},

	{api.PathAppServiceToken, true, http.MethodGet, onLoopback, formAppService, (*Server).loopbackToken},

	{api.PathStatus, false, http.MethodGet, onAdmin, formV1, (*Server).status},
	{api.PathPolicyChanges, false, http.MethodGet, onAdmin, formV1, (*Server).policyChanges},
	{api.PathPolicyChanges, false, http.MethodPost, onAdmin, formV1, (*Server).recordPolicyChange},
	{api.PathPolicyChanges, false, http.MethodDelete, onAdmin, formV1, (*Server).withdrawPolicyChange},
	{api.PathDeny, false, http.MethodGet, onAdmin, formV1, (*Server).denyRules},
	{api.PathDeny, false, http.MethodPost, onAdmin, formV1, (*Server).deny},
	{api.PathDeny, false, http.MethodDelete, onAdmin, formV1, (*Server).liftDeny},
	{api.PathDenyHub, false, http.MethodPost, onAdmin, formV1, (*Server).heedHub},
	{api.PathDenyHub, false, http.MethodDelete, onAdmin, formV1, (*Server).setHubAside},
	{api.PathDenyLost, false, http.MethodDelete, onAdmin, formV1, (*Server).forgetLostDeny},
	{api.PathGrants, false, http.MethodGet, onAdmin, formV1, (*Server).grants},
	{api.PathGrantsCheck, false, http.MethodGet, onAdmin, formV1, (*Server).checkGrants},
	{api.PathLoopback, false, http.MethodGet, onAdmin, formV1, (*Server).loopbackOf},
	{api.PathRefresh, false, http.MethodPost, onAdmin, formV1, (*Server).refresh},
	{api.PathReload, false, http.MethodPost, onAdmin, formV1, (*Server).reload},
	{api.PathHealth, false, http.MethodGet, onAdmin, formV1, (*Server).health},
	{api.PathReady, false, http.MethodGet, onAdmin, formV1, (*Server).ready},
}

// Routes of unknown paths. SDKs repeat a 404 for minutes, so the status is 404 only where no SDK asks, and where one
// must learn at once that there is nothing.
var (
	notFoundIMDS     = route{form: formIMDS, handle: (*Server).unknownPath}
	notFoundLoopback = route{form: formAppService, handle: (*Server).unknownLoopbackPath}
	notFoundAdmin    = route{form: formV1, handle: (*Server).unknownAdminPath}
	notFoundV1       = route{form: formV1, handle: (*Server).notFound}
)

// Paths that MSAL looks for in front of IMDS; it goes on to the token path at a quick 404.
const (
	probePlatform   = "/metadata/identity/getplatformmetadata"
	probeCredential = "/metadata/identity/issuecredential"
)

// findRoute returns the route of a path and method, or one of that path with another method where it has none
// of that one. The path must be spelled exactly so: nothing is decoded or cleaned.
func findRoute(kind socket, path, method string) *route {
	var other *route
	for i := range routes {
		r := &routes[i]
		if r.socket != kind || path != r.path && !(r.slash && hasSlash(path, r.path)) {
			continue
		}
		if r.method == method {
			return r
		}
		other = r
	}
	switch {
	case other != nil:
		return other
	case strings.HasPrefix(path, "/v1/"), path == probePlatform, path == probeCredential:
		return &notFoundV1
	case kind == onAdmin:
		return &notFoundAdmin
	case kind == onLoopback:
		return &notFoundLoopback
	}
	return &notFoundIMDS
}

// hasSlash reports whether path is want and one trailing slash.
func hasSlash(path, want string) bool {
	return len(path) == len(want)+1 && path[len(want)] == '/' && path[:len(want)] == want
}

// methods lists the methods that r's path answers.
func (r *route) methods() []string {
	var all []string
	for i := range routes {
		if o := &routes[i]; o.socket == r.socket && o.path == r.path {
			all = append(all, o.method)
		}
	}
	return all
}

func (s *Server) unknownPath(*request) *apiError {
	return &apiError{
		status: http.StatusBadRequest, code: api.CodeUnknownPath,
		detail: "no such path on this socket: tokens are at " + api.PathIMDSToken + ", " +
			api.PathAppServiceToken + " and " + api.PathToken + ", spelled exactly so",
	}
}

func (s *Server) unknownAdminPath(*request) *apiError {
	return &apiError{
		status: http.StatusBadRequest, code: api.CodeUnknownPath,
		detail: "no such path on this socket: begin with " + api.PathStatus,
	}
}

func (s *Server) unknownLoopbackPath(*request) *apiError {
	return &apiError{
		status: http.StatusBadRequest, code: api.CodeUnknownPath,
		detail: "no such path on this listener: tokens are at " + api.PathAppServiceToken + ", spelled exactly so",
	}
}

func (s *Server) notFound(*request) *apiError {
	return &apiError{status: http.StatusNotFound, code: api.CodeUnknownPath, detail: "no such path on this socket"}
}
