package server

import (
	"time"

	"perceptd/agent"
)

// The SDK forms wish for this much life, since every SDK asks again on each call below it.
const sdkLife = 5 * time.Minute

// Lowest api-version of each SDK form; they are dates.
const (
	imdsVersion       = "2018-02-01"
	appServiceVersion = "2019-08-01"
)

// sdkRequest is what the two SDK forms have in common.
type sdkRequest struct {
	resource string // as it was asked for, which is how it is echoed
	selector parameter
}

// imdsToken answers as Azure's instance metadata service does. SDKs probe for one with a request that
// lacks the header and must learn at once that somebody answers, so nothing is looked at before it.
func (s *Server) imdsToken(x *exchange) *fault {
	if value, once := onlyValue(x.request, "Metadata"); !once || value != "true" {
		f := badRequest("Required metadata header not specified: send Metadata: true, once")
		f.sdkCode = "bad_request_102"
		return f
	}
	return s.sdkToken(x, imdsVersion)
}

// appServiceToken answers as Azure App Service does. The header has any value, since the socket proves
// the caller; that it is there shows that no page in a browser made the request.
func (s *Server) appServiceToken(x *exchange) *fault {
	if value, once := onlyValue(x.request, "X-Identity-Header"); !once || value == "" {
		return badRequest("the X-IDENTITY-HEADER header must be there once, with any value: set IDENTITY_HEADER")
	}
	return s.sdkToken(x, appServiceVersion)
}

func (s *Server) sdkToken(x *exchange, oldest string) *fault {
	if f := x.query.parse(x.raw); f != nil {
		return f
	}
	asked, f := readSDK(&x.query, oldest)
	if f != nil {
		return f
	}
	request := asked.request()
	answer, err := s.Agent.Token(x.ctx, x.caller, request)
	if err != nil {
		return tokenFault(err)
	}
	x.label(&answer, asked.resource)
	x.body = appendSDK(x.body, &answer, asked, s.now())
	return nil
}

// readSDK reads the parameters of the SDK forms. Those it does not know are ignored, as Azure does.
//
// Both forms take every name of a selector, since clients send the other form's too. An empty one is
// none: SDKs send it for the system-assigned identity, and so do settings that were left blank.
func readSDK(q *query, oldest string) (sdkRequest, *fault) {
	if f := checkVersion(q, oldest); f != nil {
		return sdkRequest{}, f
	}
	var asked sdkRequest
	for _, p := range q.list[:q.count] {
		switch p.name {
		case "resource":
			asked.resource = p.value
		case "client_id", "object_id", "principal_id", "msi_res_id", "mi_res_id":
			if p.value == "" {
				continue
			}
			if asked.selector.name != "" {
				return sdkRequest{}, badRequest("only one of client_id, object_id, principal_id, msi_res_id and mi_res_id may name the identity")
			}
			asked.selector = p
		}
	}
	if asked.resource == "" {
		return sdkRequest{}, badRequest("the resource parameter is missing: name an App ID URI such as https://vault.azure.net")
	}
	return asked, nil
}

func checkVersion(q *query, oldest string) *fault {
	version, ok := q.get("api-version")
	switch {
	case version == oldest:
		return nil
	case !ok || version == "":
		return badRequest("the api-version parameter is missing: send api-version=" + oldest)
	case !isDate(version):
		return badRequest("the api-version parameter is no date: send api-version=" + oldest)
	case version < oldest:
		return badRequest("api-version " + version + " is too old: send " + oldest + " or newer")
	}
	return nil
}

// isDate reports whether s is a day in the form 2006-01-02.
func isDate(s string) bool {
	_, err := time.Parse(time.DateOnly, s)
	return err == nil
}

func (r sdkRequest) request() agent.Request {
	request := agent.Request{Resource: r.resource, MinTTL: sdkLife}
	switch r.selector.name {
	case "client_id":
		request.ClientID = r.selector.value
	case "object_id", "principal_id":
		request.ObjectID = r.selector.value
	case "msi_res_id", "mi_res_id":
		request.ResourceID = r.selector.value
	}
	return request
}

// appendSDK appends the body that satisfies every SDK measured: numbers as strings, no nulls, the
// request's own spellings echoed, and expires_in before expires_on, since one SDK lets the last win.
func appendSDK(dst []byte, a *agent.Answer, asked sdkRequest, now time.Time) []byte {
	left := max(0, int64(a.Advertise/time.Second))
	dst = appendTextField(dst, `{"access_token":`, a.Token.Text.Reveal())
	if id := clientIDOf(a, asked); id != "" {
		dst = appendTextField(dst, `,"client_id":`, id)
	}
	dst = appendDigits(dst, `,"expires_in":`, left)
	dst = appendDigits(dst, `,"expires_on":`, now.Unix()+left)
	if from := notBefore(a, now); !from.IsZero() {
		dst = appendDigits(dst, `,"not_before":`, from.Unix())
	}
	dst = appendTextField(dst, `,"resource":`, asked.resource)
	dst = append(dst, `,"token_type":"Bearer"`...)
	switch asked.selector.name {
	case "object_id":
		dst = appendTextField(dst, `,"object_id":`, asked.selector.value)
	case "principal_id":
		dst = appendTextField(dst, `,"principal_id":`, asked.selector.value)
	case "msi_res_id":
		dst = appendTextField(dst, `,"msi_res_id":`, asked.selector.value)
	case "mi_res_id":
		dst = appendTextField(dst, `,"mi_res_id":`, asked.selector.value)
	}
	return append(dst, '}')
}

// clientIDOf returns the client ID as it was asked for, or configured, or claimed by the token.
func clientIDOf(a *agent.Answer, asked sdkRequest) string {
	switch {
	case asked.selector.name == "client_id":
		return asked.selector.value
	case a.Identity.ClientID != "":
		return a.Identity.ClientID
	}
	return a.Token.Claims.ClientID
}

// notBefore returns since when the token is valid, and never a moment to come: like expires_on it is told by this device's
// clock, which the caller shares and which may be behind the issuer's.
func notBefore(a *agent.Answer, now time.Time) time.Time {
	from := a.Token.NotBefore
	if from.IsZero() {
		from = a.Token.Claims.NotBefore
	}
	if from.After(now) {
		return now
	}
	return from
}
