package server

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/tokencache"
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

// policyChanges answers GET /v1/policy-changes.
func (s *Server) policyChanges(x *exchange) *fault {
	if f := noQuery(x); f != nil {
		return f
	}
	x.body = encode(api.PolicyChanges{Now: s.now(), Changes: policyChanges(s.Agent.Changes())})
	return nil
}

// changeBody is an api.PolicyChangeRequest before its time is read.
type changeBody struct {
	Resource     string     `json:"resource"`
	AllResources bool       `json:"all_resources"`
	Identity     string     `json:"identity"`
	At           *string    `json:"at"`
	Effect       api.Effect `json:"effect"`
	Note         string     `json:"note"`
}

// notePolicyChange answers POST /v1/policy-changes.
func (s *Server) notePolicyChange(x *exchange) *fault {
	body, f := readBody[changeBody](x)
	if f != nil {
		return f
	}
	change := agent.Change{
		Resource: body.Resource, AllResources: body.AllResources, Identity: body.Identity,
		Effect: effectOf(body.Effect), Note: body.Note,
	}
	if body.At != nil {
		if change.At, f = readTime("at", *body.At); f != nil {
			return f
		}
	}
	noted, err := s.Agent.NoteChange(x.caller.String(), change)
	if err != nil {
		return faultOf(err)
	}
	x.body = encode(api.PolicyChangeAnswer{PolicyChange: policyChange(noted), Now: s.now()})
	return nil
}

// withdrawPolicyChange answers DELETE /v1/policy-changes?id=ID.
func (s *Server) withdrawPolicyChange(x *exchange) *fault {
	if f := x.query.parse(x.raw); f != nil {
		return f
	}
	id, ok := x.query.get("id")
	if !ok || id == "" || x.query.count != 1 {
		return badRequest("the id parameter, and no other, says which policy change is withdrawn: GET " + api.PathPolicyChanges + " lists them")
	}
	was, err := s.Agent.WithdrawChange(x.caller.String(), id)
	if err != nil {
		return faultOf(err)
	}
	x.body = encode(api.PolicyChangeAnswer{PolicyChange: policyChange(was), Now: s.now()})
	return nil
}

// readTime reads a time of a body's field.
func readTime(field, text string) (time.Time, *fault) {
	var at time.Time
	if err := at.UnmarshalText([]byte(text)); err != nil {
		return time.Time{}, badRequest(fmt.Sprintf(
			"field %q is %.64q: write a time with its zone as 2026-11-23T14:30:00Z or 2026-11-23T15:30:00+01:00", field, text))
	}
	return at, nil
}

// effectOf returns the effect that is so called, or none, which the agent refuses.
func effectOf(name api.Effect) tokencache.Effect {
	for _, effect := range []tokencache.Effect{tokencache.Granted, tokencache.Revoked, tokencache.Changed} {
		if string(name) == effect.String() {
			return effect
		}
	}
	return 0
}

func policyChanges(all []agent.NotedChange) []api.PolicyChange {
	list := make([]api.PolicyChange, len(all))
	for i, c := range all {
		list[i] = policyChange(c)
	}
	return list
}

func policyChange(c agent.NotedChange) api.PolicyChange {
	p := api.PolicyChange{
		ID: c.ID, Resource: c.Resource, Identity: c.Identity, At: c.At,
		Effect: api.Effect(c.Effect.String()), // the same words
		Note:   c.Note, NotedOn: c.NotedOn, Unsure: c.Unsure, AsOfNote: c.AsOfNote, Joined: c.Joined, EndsOn: c.EndsOn,
		Touched: c.Touched, Waiting: c.Waiting,
	}
	if c.Record != 0 { // which is no revocation, though it may withhold as much
		p.Record, p.Mend = map[agent.RecordState]api.RecordState{agent.RecordLost: api.RecordLost, agent.RecordUnread: api.RecordUnread}[c.Record], c.Mend
		p.Effect, p.Withholds = api.EffectUnknown, c.Effect == tokencache.Revoked
	}
	return p
}

// refresh answers POST /v1/refresh.
func (s *Server) refresh(x *exchange) *fault {
	wanted, f := readBody[api.RefreshRequest](x)
	if f != nil {
		return f
	}
	s.log().Info("refresh asked for", zap.Stringer("caller", x.caller),
		zap.String("identity", wanted.Identity), zap.String("resource", wanted.Resource), zap.Bool("now", wanted.Now), zap.Bool("forget", wanted.Forget))
	refresh := s.Agent.Refresh
	if wanted.Forget {
		refresh = s.Agent.Forget
	}
	results, err := refresh(x.ctx, wanted.Identity, wanted.Resource, wanted.Now)
	if err != nil {
		return faultOf(err)
	}
	answer := api.RefreshResponse{Results: []api.RefreshResult{}}
	for _, r := range results {
		answer.Results = append(answer.Results, refreshResult(r))
	}
	x.body = encode(answer)
	return nil
}

func refreshResult(r agent.RefreshResult) api.RefreshResult {
	result := api.RefreshResult{Identity: r.Identity, Resource: r.Resource}
	var held *tokencache.HeldError
	switch {
	case errors.As(r.Err, &held):
		result.Outcome, result.Detail = api.OutcomeHeld, held.Error()
	case r.Err != nil:
		result.Outcome, result.Detail = api.OutcomeFailed, r.Err.Error()
	default:
		result.Outcome = api.Outcome(r.Outcome.String()) // the same words
	}
	return result
}

// reload answers POST /v1/reload.
func (s *Server) reload(x *exchange) *fault {
	if _, f := readBody[struct{}](x); f != nil {
		return f
	}
	s.log().Info("reload asked for", zap.Stringer("caller", x.caller))
	invalid := &fault{status: http.StatusUnprocessableEntity, code: api.CodeInvalidConfig}
	if s.Reload == nil {
		invalid.detail = "this daemon has no configuration to read again"
		return invalid
	}
	answer, err := s.Reload(x.ctx)
	if err != nil {
		invalid.detail = err.Error()
		return invalid
	}
	answer.Changes = orEmpty(answer.Changes)
	x.body = encode(answer)
	return nil
}

// checkTime is how long the agent may take to show that it is alive.
const checkTime = 2 * time.Second

// health answers GET /healthz: whether the daemon is alive.
func (s *Server) health(x *exchange) *fault {
	if f := noQuery(x); f != nil {
		return f
	}
	ctx, cancel := context.WithTimeout(x.ctx, checkTime)
	defer cancel()
	if err := s.Agent.Check(ctx); err != nil {
		x.answerHealth(api.Health{Detail: err.Error()})
		return nil
	}
	x.answerHealth(api.Health{OK: true, Detail: "alive"})
	return nil
}

// ready answers GET /readyz: whether every token that is to be prefetched is there.
func (s *Server) ready(x *exchange) *fault {
	if f := noQuery(x); f != nil {
		return f
	}
	status := s.Agent.Status()
	if status.Ready {
		x.answerHealth(api.Health{OK: true, Detail: "every prefetched token is there"})
		return nil
	}
	var missing []string
	for _, key := range status.Keys {
		if key.Prefetch && key.Left == 0 {
			missing = append(missing, fmt.Sprintf("identity %q for %s", key.Identity, key.Key.Resource))
		}
	}
	x.answerHealth(api.Health{Detail: "no token yet of " + strings.Join(missing, ", ")})
	return nil
}

func (x *exchange) answerHealth(h api.Health) {
	if !h.OK {
		x.status = http.StatusServiceUnavailable
	}
	x.body = encode(h)
}
