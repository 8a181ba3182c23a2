package server

import (
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/grants"
	"perceptd/agent/server/limit"
)

// maxTTL is the life of a managed identity's token: no caller can have more.
const maxTTL = 24 * time.Hour

// maxWait is how long a request for a token may ask to wait.
const maxWait = 10 * time.Minute

// token answers GET /v1/token.
func (s *Server) token(req *request) *apiError {
	if e := req.query.parse(req.raw); e != nil {
		return e
	}
	request, asked, e := readV1(&req.query)
	if e != nil {
		return e
	}
	answer, e := s.askFor(req, request)
	if e != nil {
		return e
	}
	req.label(&answer, asked)
	req.body = appendV1(req.body, &answer, asked, s.now())
	return nil
}

// askFor gets a token of the agent's, for a caller that may have asked to wait for it.
func (s *Server) askFor(req *request, request agent.Request) (agent.Answer, *apiError) {
	if request.Wait == 0 {
		answer, err := s.Agent.Token(req.ctx, req.caller, request)
		if err != nil {
			return agent.Answer{}, tokenError(err)
		}
		return answer, nil
	}
	limits := s.Limits.orDefaults()
	key, waiting := req.conn.Key(), &s.quotas().waiting
	if !waiting.TryAcquire(key, limit.Quota{
		PerKey: limits.Waiting, PerParent: limits.Waiting, Total: partOf(limits.AllWaiting, key),
	}) {
		return agent.Answer{}, busy("too many requests of this caller wait already: share one, or watch")
	}
	defer waiting.Release(key)
	req.extendDeadline(request.Wait)
	ctx, cancel := req.untilStopping()
	defer cancel()
	answer, err := s.Agent.Token(ctx, req.caller, request)
	if err == nil {
		return answer, nil
	}
	e := tokenError(err)
	select {
	case <-req.stopping:
		e = stopping()
		e.counted = true
	default:
	}
	return agent.Answer{}, e
}

// readV1 reads the parameters of GET /v1/token. A name that it does not know is refused, since whoever
// sent it counts on its effect. asked is the resource as it is echoed.
func readV1(q *query) (request agent.Request, asked string, e *apiError) {
	request.MinTTLRequired = true
	for _, p := range q.list[:q.count] {
		switch p.name {
		case "resource":
			request.Resource = p.value
		case "identity":
			if p.value == "" {
				return agent.Request{}, "", badRequest("the identity parameter is empty: " +
					"name one, or leave it out for the one that is granted")
			}
			request.Identity = p.value
		case "min_ttl":
			life, ok := parseDuration(p.value, maxTTL)
			if !ok {
				return agent.Request{}, "", badRequest(
					"min_ttl is a duration such as 10m or a number of seconds, at most 24h")
			}
			request.MinTTL = life
		case "issued_after":
			at, ok := parseIssued(p.value)
			if !ok {
				return agent.Request{}, "", badRequest("issued_after is a time in whole Unix seconds, " +
					"such as 1795435200 (date +%s)")
			}
			request.IssuedAfter = at
		case "wait":
			wait, ok := parseDuration(p.value, maxWait)
			if !ok {
				return agent.Request{}, "", badRequest(
					"wait is a duration such as 30s or a number of seconds, at most 10m")
			}
			request.Wait = wait
		default:
			return agent.Request{}, "", unknownV1(p.name, "resource, identity, min_ttl, issued_after and wait")
		}
	}
	if request.Resource == "" {
		return agent.Request{}, "", badRequest("the resource parameter is missing: " +
			"name an App ID URI such as https://vault.azure.net")
	}
	return request, request.Resource, nil
}

// unknownV1 refuses a parameter that is not among those known of our own form. In it a configured name is all that
// names an identity.
func unknownV1(name, known string) *apiError {
	detail := fmt.Sprintf("query parameter %s is not known here: %s are", grants.Quoted(name), known)
	if isSelector(name) || selectorMeant(name) != "" {
		detail += "; the identity is named as the configuration does: identity=NAME"
	}
	return badRequest(detail)
}

// parseDuration reads Go's durations and plain seconds, from 0 to longest.
func parseDuration(s string, longest time.Duration) (time.Duration, bool) {
	if seconds, err := strconv.ParseUint(s, 10, 32); err == nil {
		d := time.Duration(seconds) * time.Second
		return d, d <= longest
	}
	d, err := time.ParseDuration(s)
	return d, err == nil && d >= 0 && d <= longest
}

// Moments that a token can be asked to have been issued after, in Unix seconds. Milliseconds, and lives
// that were meant for min_ttl, lie outside.
const (
	firstIssued = 946684800  // 2000
	lastIssued  = 7258118400 // 2200
)

// parseIssued reads whole Unix seconds.
func parseIssued(s string) (time.Time, bool) {
	seconds, err := strconv.ParseUint(s, 10, 63)
	if err != nil || seconds < firstIssued || seconds >= lastIssued {
		return time.Time{}, false
	}
	return time.Unix(int64(seconds), 0), true
}

// appendV1 appends an api.Token: the life is the true one, the times are by the device's clock.
func appendV1(dst []byte, a *agent.Answer, asked string, now time.Time) []byte {
	left := max(0, int64(a.Left/time.Second))
	dst = appendTextField(dst, `{"access_token":`, a.Token.Text.Reveal())
	dst = append(dst, `,"token_type":"Bearer"`...)
	dst = appendTextField(dst, `,"identity":`, a.Identity.Name)
	if id := clientIDOf(a, sdkRequest{}); id != "" {
		dst = appendTextField(dst, `,"client_id":`, id)
	}
	dst = appendTextField(dst, `,"resource":`, asked)
	dst = appendNumber(dst, `,"expires_in":`, left)
	dst = appendTime(dst, `,"expires_on":`, api.Time(now).Add(time.Duration(left)*time.Second))
	if a.Unconfirmed {
		dst = append(dst, `,"unconfirmed":true`...)
	}
	dst = appendNumber(dst, `,"refresh_in":`, max(0, int64(a.RefreshIn/time.Second)))
	dst = appendTime(dst, `,"received_on":`, api.Time(a.ReceivedOn))
	dst = appendTextField(dst, `,"token_sha256":`, a.Token.Text.SHA256())
	if other := audienceOf(a, asked); other != "" {
		dst = appendTextField(dst, `,"audience":`, other)
	}
	dst = appendPermissions(append(dst, `,"permissions":`...), a.Permissions)
	return append(dst, '}')
}

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
// lacks the header and must learn at once that somebody answers, so nothing is looked at before it. Its value is taken
// in any case: what it shows, that no page in a browser made the request, any spelling shows.
func (s *Server) imdsToken(req *request) *apiError {
	if value, once := onlyValue(req.http, "Metadata"); !once || !strings.EqualFold(strings.TrimSpace(value), "true") {
		e := badRequest("Required metadata header not specified: send Metadata: true, once")
		e.sdkCode = "bad_request_102"
		return e
	}
	return s.sdkToken(req, imdsVersion)
}

// appServiceToken answers as Azure App Service does. The header has any value, since the socket proves
// the caller; that it is there shows that no page in a browser made the request.
func (s *Server) appServiceToken(req *request) *apiError {
	if value, once := onlyValue(req.http, "X-Identity-Header"); !once || value == "" {
		return badRequest("the X-IDENTITY-HEADER header must be there once, with any value: set IDENTITY_HEADER")
	}
	return s.sdkToken(req, appServiceVersion)
}

func (s *Server) sdkToken(req *request, minVersion string) *apiError {
	if e := req.query.parse(req.raw); e != nil {
		return e
	}
	asked, e := readSDK(&req.query, minVersion)
	if e != nil {
		return e
	}
	request := asked.request()
	answer, err := s.Agent.Token(req.ctx, req.caller, request)
	if err != nil {
		return tokenError(err)
	}
	req.label(&answer, asked.resource)
	req.body = appendSDK(req.body, &answer, asked, s.now())
	return nil
}

// readSDK reads the parameters of the SDK forms. Those it does not know are ignored, as Azure does, but for what was
// meant to name the identity.
//
// Both forms take every name of a selector, since clients send the other form's too. An empty one is
// none: SDKs send it for the system-assigned identity, and so do settings that were left blank.
func readSDK(q *query, minVersion string) (sdkRequest, *apiError) {
	if e := checkVersion(q, minVersion); e != nil {
		return sdkRequest{}, e
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
				return sdkRequest{}, badRequest(
					"only one of client_id, object_id, principal_id, msi_res_id and mi_res_id " +
						"may name the identity")
			}
			asked.selector = p
		default:
			if e := checkSlip(p, minVersion); e != nil {
				return sdkRequest{}, e
			}
		}
	}
	if asked.resource == "" {
		return sdkRequest{}, badRequest(
			"the resource parameter is missing: name an App ID URI such as https://vault.azure.net")
	}
	return asked, nil
}

func checkVersion(q *query, minVersion string) *apiError {
	version, ok := q.get("api-version")
	switch {
	case version == minVersion:
		return nil
	case !ok || version == "":
		return badRequest("the api-version parameter is missing: send api-version=" + minVersion)
	case !isDate(version):
		return badRequest("the api-version parameter is no date: send api-version=" + minVersion)
	case version < minVersion:
		return badRequest("api-version " + version + " is too old: send " + minVersion + " or newer")
	}
	return nil
}

// isDate reports whether s is a day in the form 2006-01-02.
func isDate(s string) bool {
	_, err := time.Parse(time.DateOnly, s)
	return err == nil
}

func (r sdkRequest) request() agent.Request {
	request := agent.Request{
		Request: grants.Request{Resource: r.resource, Parameter: r.selector.name}, MinTTL: sdkLife,
	}
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

// notBefore returns since when the token is valid, and never a moment to come: like expires_on it is told by this
// device's clock, which the caller shares and which may be behind the issuer's.
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

// label notes what the answer's headers say of the token in it.
func (req *request) label(a *agent.Answer, asked string) {
	req.permissions = permissionsHeader(a.Permissions)
	req.audience = audienceOf(a, asked)
}

// audienceOf returns the resource that the token was asked for where it is not the one that the caller
// asked for, or "".
func audienceOf(a *agent.Answer, asked string) string {
	if a.Resource == grants.TrimScope(asked) {
		return ""
	}
	return a.Resource
}

// currentHeader is shared by all answers. net/http only reads it.
var currentHeader = []string{string(api.PermissionsCurrent)}

// permissionsHeader returns the value of api.PermissionsHeader.
func permissionsHeader(p api.Permissions) []string {
	if p.State == api.PermissionsCurrent {
		return currentHeader
	}
	text := append([]byte(nil), p.State...)
	text = appendNumber(text, "; changed=", p.Changed.Unix())
	text = appendNumber(text, "; current-by=", p.CurrentBy.Unix())
	return []string{string(text)}
}

// appendPermissions appends p as a JSON object.
func appendPermissions(dst []byte, p api.Permissions) []byte {
	dst = appendTextField(dst, `{"standing":`, string(p.State))
	for _, field := range [...]struct {
		name  string
		value time.Time
	}{{`,"changed":`, p.Changed}, {`,"current_by":`, p.CurrentBy}, {`,"likely":`, p.Likely}} {
		if !field.value.IsZero() {
			dst = appendTime(dst, field.name, field.value)
		}
	}
	if p.Withheld {
		dst = strconv.AppendBool(append(dst, `,"withheld":`...), true)
	}
	return append(dst, '}')
}

// appendText appends s as a JSON string. Bytes that are no UTF-8 become U+FFFD, as JSON cannot carry
// them.
func appendText(dst []byte, s string) []byte {
	dst = append(dst, '"')
	for {
		n := plainPrefix(s)
		dst = append(dst, s[:n]...)
		if s = s[n:]; s == "" {
			return append(dst, '"')
		}
		if c := s[0]; c < utf8.RuneSelf {
			dst = append(dst, '\\', 'u', '0', '0', hexDigits[c>>4], hexDigits[c&15])
			s = s[1:]
			continue
		}
		r, size := utf8.DecodeRuneInString(s)
		dst = utf8.AppendRune(dst, r)
		s = s[size:]
	}
}

// plainPrefix returns how many bytes at the front of s stand for themselves in a JSON string. It looks
// at eight at once: a token's text is the better part of an answer, and all of it is plain.
func plainPrefix(s string) int {
	const (
		ones  = 0x0101010101010101
		highs = 0x8080808080808080
	)
	n := 0
	for ; n+8 <= len(s); n += 8 {
		b := s[n : n+8]
		x := uint64(b[0]) | uint64(b[1])<<8 | uint64(b[2])<<16 | uint64(b[3])<<24 |
			uint64(b[4])<<32 | uint64(b[5])<<40 | uint64(b[6])<<48 | uint64(b[7])<<56
		quote, slash := x^(ones*'"'), x^(ones*'\\')
		// A byte's high bit is set where the byte is below ' ', '"', '\', or not ASCII; a borrow may
		// set one above such a byte too, which does no harm.
		if (x|(x-ones*' ')|(quote-ones)|(slash-ones))&highs != 0 {
			break
		}
	}
	for n < len(s) && s[n] >= ' ' && s[n] < utf8.RuneSelf && s[n] != '"' && s[n] != '\\' {
		n++
	}
	return n
}

const hexDigits = "0123456789abcdef"

// appendTextField appends a name, which needs no escaping and brings its comma, and a text.
func appendTextField(dst []byte, name, value string) []byte {
	dst = append(dst, name...)
	return appendText(dst, value)
}

// appendDigits appends a name and a number as a string of digits, the SDK forms' way.
func appendDigits(dst []byte, name string, value int64) []byte {
	dst = append(dst, name...)
	dst = append(dst, '"')
	dst = strconv.AppendInt(dst, value, 10)
	return append(dst, '"')
}

// appendTime appends a name and a time, as api.Time returns it.
func appendTime(dst []byte, name string, t time.Time) []byte {
	dst = append(dst, name...)
	dst = append(dst, '"')
	dst = t.AppendFormat(dst, time.RFC3339)
	return append(dst, '"')
}

// appendNumber appends a name and a number.
func appendNumber(dst []byte, name string, value int64) []byte {
	dst = append(dst, name...)
	return strconv.AppendInt(dst, value, 10)
}
