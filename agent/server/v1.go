package server

import (
	"fmt"
	"strconv"
	"time"

	"perceptd/agent"
)

// longestTTL is the life of a managed identity's token: nobody can have more.
const longestTTL = 24 * time.Hour

// token answers GET /v1/token.
func (s *Server) token(x *exchange) *fault {
	if f := x.query.parse(x.raw); f != nil {
		return f
	}
	request, asked, f := readV1(&x.query)
	if f != nil {
		return f
	}
	answer, f := s.askFor(x, request)
	if f != nil {
		return f
	}
	x.label(&answer, asked)
	x.body = appendV1(x.body, &answer, asked, s.now())
	return nil
}

// readV1 reads the parameters of GET /v1/token. A name that it does not know is refused, since whoever
// sent it counts on its effect. asked is the resource as it is echoed.
func readV1(q *query) (request agent.Request, asked string, f *fault) {
	request.Firm = true
	for _, p := range q.list[:q.count] {
		switch p.name {
		case "resource":
			request.Resource = p.value
		case "identity":
			if p.value == "" {
				return agent.Request{}, "", badRequest("the identity parameter is empty: name one, or leave it out for the one that is granted")
			}
			request.Identity = p.value
		case "min_ttl":
			life, ok := parseDuration(p.value, longestTTL)
			if !ok {
				return agent.Request{}, "", badRequest("min_ttl is a duration such as 10m or a number of seconds, at most 24h")
			}
			request.MinTTL = life
		case "issued_after":
			at, ok := parseIssued(p.value)
			if !ok {
				return agent.Request{}, "", badRequest("issued_after is a time in whole Unix seconds, such as 1795435200 (date +%s)")
			}
			request.IssuedAfter = at
		case "wait":
			wait, ok := parseDuration(p.value, longestWait)
			if !ok {
				return agent.Request{}, "", badRequest("wait is a duration such as 30s or a number of seconds, at most 10m")
			}
			request.Wait = wait
		default:
			return agent.Request{}, "", badRequest(fmt.Sprintf("query parameter %q is not known here: resource, identity, min_ttl, issued_after and wait are", p.name))
		}
	}
	if request.Resource == "" {
		return agent.Request{}, "", badRequest("the resource parameter is missing: name an App ID URI such as https://vault.azure.net")
	}
	return request, request.Resource, nil
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
	dst = appendNumber(dst, `,"expires_on":`, now.Unix()+left)
	if a.Unconfirmed {
		dst = append(dst, `,"unconfirmed":true`...)
	}
	dst = appendNumber(dst, `,"refresh_in":`, max(0, int64(a.RefreshIn/time.Second)))
	dst = appendNumber(dst, `,"received_on":`, a.ReceivedOn.Unix())
	dst = appendTextField(dst, `,"token_sha256":`, a.Token.Text.SHA256())
	if other := audienceOf(a, asked); other != "" {
		dst = appendTextField(dst, `,"audience":`, other)
	}
	dst = appendPermissions(append(dst, `,"permissions":`...), permissionsOf(a.Permissions))
	return append(dst, '}')
}
