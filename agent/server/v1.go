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
	answer, err := s.Agent.Token(x.ctx, x.caller, request)
	if err != nil {
		return faultOf(err)
	}
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
			life, ok := parseLife(p.value)
			if !ok {
				return agent.Request{}, "", badRequest("min_ttl is a duration such as 10m or a number of seconds, at most 24h")
			}
			request.MinTTL = life
		default:
			return agent.Request{}, "", badRequest(fmt.Sprintf("query parameter %q is not known here: resource, identity and min_ttl are", p.name))
		}
	}
	if request.Resource == "" {
		return agent.Request{}, "", badRequest("the resource parameter is missing: name an App ID URI such as https://vault.azure.net")
	}
	return request, request.Resource, nil
}

// parseLife reads Go's durations and plain seconds, from 0 to longestTTL.
func parseLife(s string) (time.Duration, bool) {
	if seconds, err := strconv.ParseUint(s, 10, 32); err == nil {
		life := time.Duration(seconds) * time.Second
		return life, life <= longestTTL
	}
	life, err := time.ParseDuration(s)
	return life, err == nil && life >= 0 && life <= longestTTL
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
	dst = appendNumber(dst, `,"refresh_in":`, max(0, int64(a.RefreshIn/time.Second)))
	dst = appendNumber(dst, `,"received_on":`, a.ReceivedOn.Unix())
	dst = appendTextField(dst, `,"token_sha256":`, a.Token.Text.SHA256())
	return append(dst, '}')
}
