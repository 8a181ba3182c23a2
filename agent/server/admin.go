package server

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"go.uber.org/zap"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/tokencache"
)

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

// noQuery refuses parameters where there are none to give.
func noQuery(x *exchange) *fault {
	if x.raw != "" {
		return badRequest("this path takes no query parameters")
	}
	return nil
}
