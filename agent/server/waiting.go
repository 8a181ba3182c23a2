package server

import (
	"context"
	"net/http"
	"sync"
	"time"

	"perceptd/agent"
	"perceptd/agent/api"
)

// longestWait is how long a request for a token may ask to wait.
const longestWait = 10 * time.Minute

// queue counts the requests that stay for long, so that no caller can fill the daemon with them.
type queue struct {
	mu   sync.Mutex // protects what follows
	all  int
	each map[quotaKey]int
}

// enter counts a request of k, of which there may be so many at once, so many of a whole that k is a part of, and so many
// in all. It reports false when it is one too many. Call leave in the end.
func (q *queue) enter(k quotaKey, each, perWhole, all int) bool {
	wholes, count := k.wholes()
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.all >= all || q.each[k] >= each {
		return false
	}
	for _, whole := range wholes[:count] {
		if q.each[whole] >= perWhole {
			return false
		}
	}
	if q.each == nil {
		q.each = make(map[quotaKey]int)
	}
	q.all++
	q.each[k]++
	for _, whole := range wholes[:count] {
		q.each[whole]++
	}
	return true
}

// partOf is how many of all k may find taken and still enter: a quarter is kept for modules, of which there are only so many.
func (k quotaKey) partOf(all int) int {
	if k.module != "" {
		return all
	}
	return all - all/4
}

// leave forgets a request that enter counted.
func (q *queue) leave(k quotaKey) {
	wholes, count := k.wholes()
	q.mu.Lock()
	defer q.mu.Unlock()
	q.all--
	for _, of := range append(wholes[:count], k) {
		if q.each[of]--; q.each[of] == 0 {
			delete(q.each, of)
		}
	}
}

// administer counts a request on the admin socket, where some may take long: other people's must not keep root's from
// being heard, and all of them together must not take the memory.
func (s *Server) administer(x *exchange) *fault {
	limits, k := s.Limits.orDefaults(), x.connection.key
	most := limits.AdminRequests
	if !k.isBareRoot() {
		most -= most / 4
	}
	if s.administering.enter(k, limits.AdminRequests/2, limits.AdminRequests/2, most) {
		return nil
	}
	f := busy("too many requests are under way on the admin socket: ask again when some of them are done")
	f.retryAfter = time.Second
	return f
}

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
	if !s.waiting.enter(x.connection.key, limits.Waiting, limits.Waiting, x.connection.key.partOf(limits.AllWaiting)) {
		return agent.Answer{}, busy("too many requests of this caller wait already: share one, or watch")
	}
	defer s.waiting.leave(x.connection.key)
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
