package iothub

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/explain"
	"perceptd/tokencache"
)

// statusAnswer returns the status within a method's answer: of claims the IDs alone, and of long lists the part that a
// person needs most.
func statusAnswer(status api.Status) api.StatusAnswer {
	a := api.StatusAnswer{Status: status}
	a.Tokens = slices.Clone(status.Tokens)
	for i := range a.Tokens {
		a.Tokens[i].Claims, a.Tokens[i].Before = claimIDs(a.Tokens[i].Claims), nil
	}
	slices.SortStableFunc(a.Tokens, func(x, y api.TokenStatus) int { return cmp.Compare(urgency(y), urgency(x)) })
	idle, rules := new([]string), new([]api.DenyRule)
	if status.Deny != nil {
		deny := *status.Deny
		a.Deny, rules = &deny, &deny.Rules
	}
	if status.Hub != nil {
		hub := *status.Hub
		a.Hub, idle = &hub, &hub.Desired.Idle
	}
	a.LeftOut = fit(sizeOf(a), api.MaxMethodAnswer, listOf("tokens", &a.Tokens), listOf("policy_changes", &a.Changes),
		listOf("trouble", &a.Trouble), listOf("denials", &a.Denials), listOf("identities", &a.Identities),
		listOf("connections", &a.Connections), listOf("files", &a.Config.Files),
		listOf("limitations", &a.Callers.Limitations), listOf("idle", idle), listOf("deny_rules", rules))
	slices.SortStableFunc(a.Tokens, func(x, y api.TokenStatus) int {
		return cmp.Or(strings.Compare(x.Identity, y.Identity), strings.Compare(x.Resource, y.Resource))
	})
	return a
}

// claimIDs returns the claims that are IDs.
func claimIDs(c *api.TokenClaims) *api.TokenClaims {
	if c == nil {
		return nil
	}
	return &api.TokenClaims{
		Issuer: c.Issuer, Audience: c.Audience, ClientID: c.ClientID, ObjectID: c.ObjectID, TenantID: c.TenantID,
	}
}

// urgency says how much a person needs to know of a token.
func urgency(t api.TokenStatus) int {
	switch {
	case t.InTrouble() || t.Permissions.Withheld:
		return 2
	case t.ExpiresIn == 0 || !explain.IsCurrent(t):
		return 1
	}
	return 0
}

// explanations is the answer of percept.explain.
type explanations struct {
	Now          time.Time       `json:"now"`
	Explanations []explain.Story `json:"explanations"`
	LeftOut      api.LeftOut     `json:"leftOut,omitempty"`
}

// explainAnswer returns the stories of the tokens that a request is about. The error is an *agent.Error.
func explainAnswer(status api.Status, r api.ExplainRequest) (explanations, error) {
	if r.Resource == "" {
		return explanations{}, &agent.Error{Code: api.CodeBadRequest,
			Detail: `the payload names no resource: give one, as in {"resource":"https://vault.azure.net"}`}
	}
	var names []string
	for _, identity := range status.Identities {
		names = append(names, identity.Name)
	}
	if r.Identity != "" && !slices.Contains(names, r.Identity) {
		return explanations{}, &agent.Error{Code: api.CodeUnknownIdentity, Choices: names,
			Detail: fmt.Sprintf("no identity %.64q is configured on this device", r.Identity)}
	}
	tokens, err := explain.Choose(status, spelling(status, r), r.Identity)
	if missing, ok := errors.AsType[*explain.MissingError](err); ok {
		return explanations{}, &agent.Error{Code: api.CodeNotCached, Detail: missing.Is + "; " + missing.Hint}
	}
	answer := explanations{Now: status.Now, Explanations: []explain.Story{}}
	for _, token := range tokens {
		answer.Explanations = append(answer.Explanations, explain.Of(explain.Times{}, status, token))
	}
	if sizeOf(answer) > api.MaxMethodAnswer {
		for i := range answer.Explanations {
			token := &answer.Explanations[i].Token
			token.Claims, token.Before = claimIDs(token.Claims), nil
		}
	}
	answer.LeftOut = fit(sizeOf(answer), api.MaxMethodAnswer, listOf("explanations", &answer.Explanations))
	return answer, nil
}

// spelling returns the resource of a request as a token is held for it, if one is.
func spelling(status api.Status, r api.ExplainRequest) string {
	resource := api.FullResource(r.Resource)
	asked := tokencache.Canonical(strings.TrimSuffix(resource, explain.DefaultScope))
	spelt := ""
	for _, token := range status.Tokens {
		switch {
		case r.Identity != "" && token.Identity != r.Identity:
		case token.Resource == resource:
			return resource
		case spelt == "" && tokencache.Canonical(token.Resource) == asked:
			spelt = token.Resource
		}
	}
	return cmp.Or(spelt, resource)
}
