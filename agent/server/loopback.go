package server

import (
	"errors"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"strings"

	"perceptd/agent/api"
	"perceptd/agent/attest"
	"perceptd/agent/grants"
)

var (
	errNoPeer        = errors.New("nobody asked who is connecting")
	errUnknownSecret = &attest.Error{What: "whose header secret that is", Why: "no grant's"}
)

// checkLoopback refuses, beside what checkOrigin does, another Host than the listener's own: a name that was made to
// resolve to this device, or to another program's port on it.
func checkLoopback(r *http.Request) *apiError {
	switch {
	case !strings.HasPrefix(r.RequestURI, "/"):
		return badRequest("the request must name a path on this server: this is no proxy")
	case !ownHost(r.Host, r.Context().Value(http.LocalAddrContextKey)):
		return &apiError{
			status: http.StatusForbidden, code: api.CodeForeignOrigin,
			detail: "the Host header must be localhost, 127.0.0.1 or [::1], with the port of this listener",
		}
	}
	return nil
}

// ownHost reports whether host is this device's own name or address with the port of at.
func ownHost(host string, at any) bool {
	address, ok := at.(*net.TCPAddr)
	if !ok {
		return false
	}
	name, found := strings.CutSuffix(host, ":"+strconv.Itoa(address.Port))
	return (found || address.Port == httpPort) && (name == "localhost" || name == "127.0.0.1" || name == "[::1]")
}

const httpPort = 80 // which clients leave out

// loopbackToken answers as Azure App Service does, on the loopback listener: the header tells who is calling.
func (s *Server) loopbackToken(req *request) *apiError {
	header, e := identityHeader(req.http)
	if e != nil {
		return e
	}
	from := peerIn(req.ctx)
	match, known := s.matchOf(header)
	if !known {
		s.Agent.AuditUnattested(from.caller(), errUnknownSecret)
		return &apiError{
			status: http.StatusUnauthorized, code: api.CodeUnknownCaller,
			detail: "the X-IDENTITY-HEADER header has no grant's secret: " +
				"perceptctl env prints the one of the process that runs it",
		}
	}
	var err error
	if req.caller, err = attest.CallerBySecret(match, from.uid, from.unknown); err != nil {
		s.Agent.AuditUnattested(req.caller, err)
		return &apiError{
			status: http.StatusForbidden, code: api.CodeUnknownCaller,
			detail: err.Error() + ": ask as that user, or on the token socket",
		}
	}
	return s.sdkToken(req, appServiceVersion)
}

// matchOf returns whom the grants are for whose secret a header has.
func (s *Server) matchOf(header string) (grants.Match, bool) {
	at, secrets := s.loopbackNow()
	if !at.IsValid() {
		return grants.Match{}, false // it was just closed
	}
	return secrets.Match(header)
}

// identityHeader returns the value of App Service's header.
func identityHeader(r *http.Request) (string, *apiError) {
	value, once := onlyValue(r, "X-Identity-Header")
	if !once || value == "" {
		return "", badRequest("the X-IDENTITY-HEADER header must be there once, with the value of IDENTITY_HEADER")
	}
	return value, nil
}

// loopback answers GET /v1/loopback on a token socket: how the process that asks gets its tokens on the loopback
// listener.
func (s *Server) loopback(req *request) *apiError {
	if e := noQuery(req); e != nil {
		return e
	}
	of, e := s.subjectOf(req.caller)
	if e != nil {
		return e
	}
	return s.answerLoopback(req, of)
}

// loopbackOf answers GET /v1/loopback on the admin socket: the same for whom the query describes. It is for root and
// the daemon's own user, who could read the root of the secrets: to others the admin socket gives no token.
func (s *Server) loopbackOf(req *request) *apiError {
	if uid := req.caller.UID; !req.caller.HasUser() || uid != 0 && int64(uid) != int64(os.Geteuid()) {
		return &apiError{
			status: http.StatusForbidden, code: api.CodeNotGranted,
			detail: "a grant's header secret is a token's worth: only root may ask for another's, " +
				"and not from a container or a pid namespace of its own",
		}
	}
	if e := req.query.parse(req.raw); e != nil {
		return e
	}
	who, request, e := readCheck(&req.query)
	switch {
	case e != nil:
		return e
	case request.Resource != "" || request.Identity != "":
		return badRequest(
			"resource and identity are not asked for here: a grant's variables serve for all that it names")
	}
	of, e := s.subjectOf(who)
	if e != nil {
		return e
	}
	return s.answerLoopback(req, of)
}

// subjectOf returns whom the first grant is for that decides about a caller and gives something.
func (s *Server) subjectOf(caller grants.Caller) (grants.Match, *apiError) {
	if why := s.Agent.WhyNothing(caller); why != nil {
		return grants.Match{}, errorOf(why)
	}
	decide := s.Agent.GrantsFor(caller)
	for i := range decide {
		if decide[i].Fault == "" {
			return decide[i].Caller, nil
		}
	}
	if len(decide) > 0 {
		return grants.Match{}, &apiError{
			status: http.StatusForbidden, code: api.CodeFaultyGrant, detail: decide[0].WhyIdle(),
		}
	}
	return grants.Match{}, &apiError{
		status: http.StatusForbidden, code: api.CodeNotGranted,
		detail: "no [[grant]] is for " + caller.String() + ": an administrator can add one",
	}
}

// answerLoopback answers with the variables of a grant's subject, and logs which caller got them.
func (s *Server) answerLoopback(req *request, of grants.Match) *apiError {
	at, secrets := s.loopbackNow()
	if !at.IsValid() {
		return &apiError{
			status: http.StatusNotFound, code: api.CodeNoLoopback,
			detail: "no [loopback] listener is configured: " +
				"set address = \"127.0.0.1:40380\" in [loopback] of the configuration, and reload",
		}
	}
	s.Agent.AuditSecretIssued(req.caller, of)
	req.body = encode(api.Loopback{
		Endpoint: "http://" + at.String() + api.PathAppServiceToken, Header: secrets.Header(of), Grant: of.String(),
	})
	return nil
}

func (s *Server) loopbackNow() (netip.AddrPort, *attest.Secrets) {
	if s.Loopback == nil {
		return netip.AddrPort{}, nil
	}
	return s.Loopback()
}
