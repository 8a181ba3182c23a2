package server

import (
	"slices"
	"time"

	"perceptd/agent"
	"perceptd/agent/api"
)

// status answers GET /v1/status: the daemon's own part and the agent's.
func (s *Server) status(x *exchange) *fault {
	if f := noQuery(x); f != nil {
		return f
	}
	var answer api.Status
	if s.Describe != nil {
		answer = s.Describe()
	}
	now := s.Agent.Status()
	connections, crowded := s.Connections()
	answer.Connections = connections
	answer.Now = s.now()
	answer.Ready = now.Ready
	answer.Simulated = answer.Simulated || now.Simulated()
	answer.Clock.Known = now.Clock.Known
	if now.Clock.Counted {
		skew := int64(now.Clock.Skew / time.Second)
		answer.Clock.Skew = &skew
	}
	answer.Trouble = orEmpty(slices.Concat(answer.Trouble, crowded, now.Trouble))
	answer.Config.Files = orEmpty(answer.Config.Files)
	answer.Callers.Blind = orEmpty(answer.Callers.Blind)
	answer.Identities = []api.IdentityStatus{}
	for _, identity := range now.Identities {
		status := api.IdentityStatus{
			Name: identity.Name, Default: identity.Default,
			Selector: identity.Selector().String(), Grants: identity.Grants,
		}
		if !identity.Principal.IsZero() {
			principal := api.Principal(identity.Principal)
			status.Principal = &principal
		}
		answer.Identities = append(answer.Identities, status)
	}
	answer.Tokens = []api.TokenStatus{}
	for _, key := range now.Keys {
		answer.Tokens = append(answer.Tokens, tokenStatus(key))
	}
	answer.Changes = policyChanges(now.Changes)
	answer.Requests = api.RequestCounts{
		Served:  now.Counts.Served,
		Denied:  now.Counts.Denied + s.denied.Load(),
		Invalid: now.Counts.Invalid + s.invalid.Load(),
		Failed:  now.Counts.Failed + s.failed.Load(),
	}
	answer.Denials = []api.Denial{}
	for _, d := range now.Denials {
		answer.Denials = append(answer.Denials, api.Denial(d))
	}
	x.body = encode(answer)
	return nil
}

// shownDigest is how many digits of a token's digest are enough to tell two tokens apart.
const shownDigest = 12

func tokenStatus(key agent.KeyStatus) api.TokenStatus {
	status := api.TokenStatus{
		Identity:    key.Identity,
		Resource:    key.Key.Resource,
		State:       api.TokenState(key.State.String()), // the same words
		Prefetch:    key.Prefetch,
		SHA256:      key.SHA256[:min(shownDigest, len(key.SHA256))],
		ReceivedOn:  unlessZero(key.ReceivedOn),
		ExpiresOn:   unlessZero(key.ExpiresOn),
		ExpiresIn:   int64(key.Left / time.Second),
		NextRefresh: unlessZero(key.NextRefresh),
		LastFetch:   unlessZero(key.LastFetch),
		Failures:    key.Failures,
		Fetches:     key.Fetches,
		Served:      key.Served,
		Life:        int64(key.Life / time.Second),
		Former:      key.Former,
		HeldUntil:   unlessZero(key.HeldUntil),
		Refused:     unlessZero(key.Refused),
		Rollover: api.RolloverStatus{
			Pattern:  api.RolloverPattern(key.Pattern.Kind.String()), // the same words
			Seen:     key.Seen,
			Age:      int64(key.Pattern.Age / time.Second),
			Expected: unlessZero(key.Expected),
		},
	}
	if key.Left > 0 {
		claims := claimsOf(key.Claims)
		status.Unconfirmed = key.Unconfirmed
		status.Permissions = permissionsOf(key.Permissions)
		status.MintedFrom, status.MintedTo = unlessZero(key.Minted.Earliest), unlessZero(key.Minted.Latest)
		status.Claims = &claims
	}
	if key.Before != nil {
		before := claimsOf(*key.Before)
		status.Before = &before
	}
	if status.LastFetch != nil {
		status.LastOutcome = api.Outcome(key.LastOutcome.String()) // the same words
	}
	if key.LastError != nil {
		status.LastError = key.LastError.Error()
	}
	return status
}

func unlessZero(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return &t
}

// orEmpty keeps null out of JSON.
func orEmpty[T any](list []T) []T {
	if list == nil {
		return []T{}
	}
	return list
}
