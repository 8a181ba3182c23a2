package server

import (
	"context"
	"net/http"
	"time"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/server/limit"
)

// longestWait is how long a request for a token may ask to wait.
const longestWait = 10 * time.Minute

// busyRetry is when a caller with too many requests at once may ask again.
const busyRetry = 5 * time.Second

func busy(detail string) *fault {
	return &fault{status: http.StatusTooManyRequests, code: api.CodeBusy, detail: detail, retryAfter: busyRetry}
}

// goingDown answers those who would have stayed longer.
func goingDown() *fault {
	return &fault{
		status: http.StatusServiceUnavailable, code: api.CodeUnreachable, detail: "perceptd is going down: ask again",
	}
}

// askFor gets a token of the agent's, for a caller that may have asked to wait for it.
func (s *Server) askFor(x *exchange, request agent.Request) (agent.Answer, *fault) {
	if request.Wait == 0 {
		answer, err := s.Agent.Token(x.ctx, x.caller, request)
		if err != nil {
			return agent.Answer{}, tokenFault(err)
		}
		return answer, nil
	}
	limits := s.Limits.orDefaults()
	key, waiting := x.connection.Key(), &s.quotas().waiting
	if !waiting.TryAcquire(key, limit.Quota{
		PerKey: limits.Waiting, PerParent: limits.Waiting, Total: partOf(limits.AllWaiting, key),
	}) {
		return agent.Answer{}, busy("too many requests of this caller wait already: share one, or watch")
	}
	defer waiting.Release(key)
	x.stay(request.Wait)
	ctx, cancel := x.untilDown()
	defer cancel()
	answer, err := s.Agent.Token(ctx, x.caller, request)
	if err == nil {
		return answer, nil
	}
	f := tokenFault(err)
	select {
	case <-x.down:
		f = goingDown()
		f.counted = true
	default:
	}
	return agent.Answer{}, f
}

// untilDown returns x's context, ended as well when the daemon goes down.
func (x *exchange) untilDown() (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(x.ctx)
	down := x.down // x is another request's soon
	go func() {
		select {
		case <-down:
			cancel()
		case <-ctx.Done():
		}
	}()
	return ctx, cancel
}

// stay puts off by how much the answer is due and when net/http cuts the connection. For the next request
// on it net/http sets its deadlines anew.
func (x *exchange) stay(by time.Duration) {
	x.ctx.extend(by)
	due, _ := x.ctx.Deadline()
	c := http.NewResponseController(x.w)
	// Where there is nothing to put off, nothing will cut.
	_ = c.SetReadDeadline(due.Add(transfer))
	_ = c.SetWriteDeadline(due.Add(transfer))
}
