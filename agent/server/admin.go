package server

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"

	"perceptd/agent"
	"perceptd/agent/api"
)

// status answers GET /v1/status: the daemon's own part and the agent's.
func (s *Server) status(req *request) *apiError {
	if e := noQuery(req); e != nil {
		return e
	}
	var answer api.Status
	if s.Describe != nil {
		answer = s.Describe()
	}
	state := s.Agent.Status()
	connections, turnedAway := s.Connections()
	answer.Connections = connections
	answer.Now = api.Time(s.now())
	answer.Ready = state.Ready
	answer.Simulated = answer.Simulated || state.Simulated()
	answer.Clock.Known = state.Clock.Trusted
	if state.Clock.Counted {
		skew := int64(state.Clock.Skew / time.Second)
		answer.Clock.Skew = &skew
	}
	answer.Trouble = emptyIfNil(slices.Concat(answer.Trouble, turnedAway, state.Trouble))
	answer.Config.Files = emptyIfNil(answer.Config.Files)
	answer.Callers.Blind = emptyIfNil(answer.Callers.Blind)
	answer.Identities = []api.IdentityStatus{}
	for _, identity := range state.Identities {
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
	for _, key := range state.Keys {
		answer.Tokens = append(answer.Tokens, agent.TokenStatus(key))
	}
	answer.Changes = state.Changes
	answer.Requests = api.RequestCounts{
		Served:  state.Counts.Served,
		Denied:  state.Counts.Denied + s.denied.Load(),
		Invalid: state.Counts.Invalid + s.invalid.Load(),
		Failed:  state.Counts.Failed + s.failed.Load(),
	}
	answer.Denials = []api.Denial{}
	for _, d := range state.Denials {
		d.On = api.Time(d.On)
		answer.Denials = append(answer.Denials, api.Denial(d))
	}
	req.body = encode(answer)
	return nil
}

// emptyIfNil keeps null out of JSON.
func emptyIfNil[T any](list []T) []T {
	if list == nil {
		return []T{}
	}
	return list
}

// policyChanges answers GET /v1/policy-changes.
func (s *Server) policyChanges(req *request) *apiError {
	if e := noQuery(req); e != nil {
		return e
	}
	req.body = encode(api.PolicyChanges{Now: api.Time(s.now()), Changes: s.Agent.Changes()})
	return nil
}

// notePolicyChange answers POST /v1/policy-changes.
func (s *Server) notePolicyChange(req *request) *apiError {
	body, e := readBody[api.PolicyChangeRequest](req)
	if e != nil {
		return e
	}
	change, err := s.Agent.RecordChange(req.caller.String(), body)
	return s.answerChange(req, change, err)
}

// answerChange answers with a change that was recorded, or withdrawn. So does the error that it is not on the disk.
func (s *Server) answerChange(req *request, change api.PolicyChange, err error) *apiError {
	answer := api.PolicyChangeAnswer{PolicyChange: change, Now: api.Time(s.now())}
	if err != nil {
		e := errorOf(err)
		if e.code == api.CodeNotKept {
			e.change = &answer
		}
		return e
	}
	req.body = encode(answer)
	return nil
}

// withdrawPolicyChange answers DELETE /v1/policy-changes?id=ID.
func (s *Server) withdrawPolicyChange(req *request) *apiError {
	if e := req.query.parse(req.raw); e != nil {
		return e
	}
	id, ok := req.query.get("id")
	if !ok || id == "" || req.query.count != 1 {
		return badRequest("the id parameter, and no other, says which policy change is withdrawn: GET " +
			api.PathPolicyChanges + " lists them")
	}
	was, err := s.Agent.WithdrawChange(req.caller.String(), id)
	return s.answerChange(req, was, err)
}

// refresh answers POST /v1/refresh.
func (s *Server) refresh(req *request) *apiError {
	wanted, f := readBody[api.RefreshRequest](req)
	if f != nil {
		return f
	}
	s.log().Info("refresh asked for", zap.Stringer("caller", req.caller),
		zap.String("identity", wanted.Identity), zap.String("resource", wanted.Resource),
		zap.Bool("now", wanted.Now), zap.Bool("forget", wanted.Forget))
	refresh := s.Agent.Refresh
	if wanted.Forget {
		refresh = s.Agent.Forget
	}
	results, err := refresh(req.ctx, wanted.Identity, wanted.Resource, wanted.Now)
	if err != nil {
		return errorOf(err)
	}
	answer := api.RefreshResponse{Results: []api.RefreshResult{}}
	for _, r := range results {
		answer.Results = append(answer.Results, refreshResult(r))
	}
	req.body = encode(answer)
	return nil
}

func refreshResult(r agent.RefreshResult) api.RefreshResult {
	result := api.RefreshResult{Identity: r.Identity, Resource: r.Resource, Outcome: r.Outcome}
	if r.Err != nil {
		result.Detail = r.Err.Error()
	}
	return result
}

// reload answers POST /v1/reload.
func (s *Server) reload(req *request) *apiError {
	if _, e := readBody[struct{}](req); e != nil {
		return e
	}
	s.log().Info("reload asked for", zap.Stringer("caller", req.caller))
	invalid := &apiError{status: http.StatusUnprocessableEntity, code: api.CodeInvalidConfig}
	if s.Reload == nil {
		invalid.detail = "this daemon has no configuration to read again"
		return invalid
	}
	answer, err := s.Reload(req.ctx)
	if err != nil {
		invalid.detail = err.Error()
		return invalid
	}
	answer.Changes = emptyIfNil(answer.Changes)
	req.body = encode(answer)
	return nil
}

// checkTime is how long the agent may take to show that it is alive.
const checkTime = 2 * time.Second

// health answers GET /healthz: whether the daemon is alive.
func (s *Server) health(req *request) *apiError {
	if e := noQuery(req); e != nil {
		return e
	}
	ctx, cancel := context.WithTimeout(req.ctx, checkTime)
	defer cancel()
	if err := s.Agent.Ping(ctx); err != nil {
		req.answerHealth(api.Health{Detail: err.Error()})
		return nil
	}
	req.answerHealth(api.Health{OK: true, Detail: "alive"})
	return nil
}

// ready answers GET /readyz: whether every token that is to be prefetched is there.
func (s *Server) ready(req *request) *apiError {
	if e := noQuery(req); e != nil {
		return e
	}
	status := s.Agent.Status()
	if status.Ready {
		req.answerHealth(api.Health{OK: true, Detail: "every prefetched token is there"})
		return nil
	}
	var missing []string
	for _, key := range status.Keys {
		if key.Prefetch && key.Left == 0 {
			missing = append(missing, fmt.Sprintf("identity %q for %s", key.Identity, key.Key.Resource))
		}
	}
	req.answerHealth(api.Health{Detail: "no token yet of " + strings.Join(missing, ", ")})
	return nil
}

func (req *request) answerHealth(h api.Health) {
	if !h.OK {
		req.status = http.StatusServiceUnavailable
	}
	req.body = encode(h)
}
