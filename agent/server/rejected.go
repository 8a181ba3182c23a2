package server

import (
	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/tokencache"
)

// rejected answers POST /v1/rejected.
func (s *Server) rejected(x *exchange) *fault {
	body, f := readBody[api.Rejection](x)
	if f != nil {
		return f
	}
	challenge, err := readChallenge(body.Claims)
	if err != nil {
		return badRequest("field \"claims\" is no claims challenge: " + err.Error() +
			"; send the value of claims in the WWW-Authenticate header as it came, or the JSON object in it, or the whole header from Bearer on")
	}
	advice, err := s.Agent.Rejected(x.ctx, x.caller, agent.Rejection{
		Resource: body.Resource, Identity: body.Identity, SHA256: body.SHA256, Status: body.Status, Challenge: challenge,
	})
	if err != nil {
		return faultOf(err)
	}
	x.body = encode(adviceOf(advice, body.Resource))
	return nil
}

func adviceOf(a agent.Advice, asked string) api.Advice {
	advice := api.Advice{
		Identity: a.Identity.Name, Resource: asked, SHA256: a.Sight.SHA256, Findings: []api.Finding{},
		Retry: a.Retry, RetryOn: unixOf(a.RetryOn), Claims: claimsOf(a.Sight.Claims),
	}
	for _, finding := range a.Findings {
		advice.Findings = append(advice.Findings, api.Finding{
			Cause: causeOf[finding.Cause], Detail: finding.Detail, Action: finding.Action,
		})
	}
	if a.Fetched != tokencache.NotFetched {
		advice.Fetched = api.Outcome(a.Fetched.String()) // the same words
	}
	if a.Sight.SHA256 != "" {
		advice.Permissions = permissionsOf(a.Sight.Permissions)
	}
	return advice
}

// causeOf is how each cause of the agent's is told to callers.
var causeOf = map[agent.Cause]api.Cause{
	agent.OldToken:      api.CauseOldToken,
	agent.StaleToken:    api.CauseStale,
	agent.StaleClaims:   api.CauseStaleClaims,
	agent.RBACDelay:     api.CauseRBACDelay,
	agent.WrongAudience: api.CauseWrongAudience,
	agent.WrongIdentity: api.CauseWrongIdentity,
	agent.RevokedToken:  api.CauseRevoked,
	agent.WrongClock:    api.CauseClock,
	agent.NoPermission:  api.CauseNoPermission,
	agent.UnknownToken:  api.CauseUnknownToken,
}
