package server

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"

	"perceptd/agent/api"
)

// Status returns all that GET /v1/status answers: own, which is the daemon's own part, and the agent's and the
// server's.
func (s *Server) Status(own api.Status) api.Status {
	state := s.Agent.Status()
	connections, turnedAway := s.Connections()
	own.Connections = connections
	own.Now = api.Time(s.now())
	own.Ready, own.Simulated = state.Ready, own.Simulated || state.Simulated
	own.Clock.Known, own.Clock.Skew = state.Clock.Known, state.Clock.Skew
	own.Trouble = emptyIfNil(slices.Concat(own.Trouble, turnedAway, state.Trouble))
	own.Config.Files = emptyIfNil(own.Config.Files)
	own.Callers.Limitations = emptyIfNil(own.Callers.Limitations)
	own.Identities, own.Tokens, own.Changes = state.Identities, state.Tokens, state.Changes
	own.Denials, own.Requests, own.Deny = state.Denials, state.Requests, state.Deny
	own.Requests.Denied += s.denied.Load()
	own.Requests.Invalid += s.invalid.Load()
	own.Requests.Failed += s.failed.Load()
	return own
}

// status answers GET /v1/status.
func (s *Server) status(req *request) *apiError {
	if e := noQuery(req); e != nil {
		return e
	}
	var own api.Status
	if s.Describe != nil {
		own = s.Describe()
	}
	req.body = encode(s.Status(own))
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

// recordPolicyChange answers POST /v1/policy-changes.
func (s *Server) recordPolicyChange(req *request) *apiError {
	body, e := readBody[api.PolicyChangeRequest](req)
	if e != nil {
		return e
	}
	body.Resource = api.FullResource(body.Resource)
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
	id, e := readID(req, "policy change is withdrawn", api.PathPolicyChanges)
	if e != nil {
		return e
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
	wanted.Resource = api.FullResource(wanted.Resource)
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
	req.body = encode(api.RefreshResponse{Results: results})
	return nil
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
	for _, token := range status.Tokens {
		if token.Prefetch && token.ExpiresIn == 0 {
			missing = append(missing, fmt.Sprintf("identity %q for %s", token.Identity, token.Resource))
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
