package server

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	"go.uber.org/zap"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/attest"
	"perceptd/agent/server/limit"
)

// seenIn returns what a connection's context tells of the caller before anything else is asked, and whether it is
// certain already that it cannot be proved.
func seenIn(ctx context.Context) (who agent.Caller, isUnproved bool) {
	proof, err := attest.FromContext(ctx)
	if err != nil {
		return agent.Caller{UID: agent.NoID, GID: agent.NoID}, true
	}
	who, err = proof.Seen()
	return who, err != nil
}

// provedIn returns who a connection's context proves the caller to be, or why it proves nobody and what is known all
// the same.
func provedIn(ctx context.Context) (agent.Caller, error) {
	proof, err := attest.FromContext(ctx)
	if err != nil {
		return agent.Caller{UID: agent.NoID, GID: agent.NoID}, err
	}
	return proof.Caller(ctx)
}

// ownerIn returns in whose session or service manager the caller of a connection's context runs.
func ownerIn(ctx context.Context) uint32 {
	proof, err := attest.FromContext(ctx)
	if err != nil {
		return agent.NoID
	}
	return proof.Owner()
}

// keyOf returns whom a caller counts for. owner is the user in whose session or service manager it runs, agent.NoID where
// it runs in none: other users that a user can become, such as those of /etc/subuid, count for that user.
//
// On a module's socket every caller counts for the module: a process that takes a place there takes it from the module
// alone. That includes callers that cannot be proved: their user says nothing, nor does a container's, whose root can be
// any user.
func keyOf(who *agent.Caller, owner uint32, isUnproved bool) limit.Key {
	uid := who.UID
	if who.Nested { // then it says nothing, as in a container
		uid = agent.NoID
	}
	if uid != 0 && owner != 0 && owner != agent.NoID {
		uid = owner
	}
	switch {
	case who.Module != "":
		return limit.Key{Module: who.Module, Unattested: isUnproved}
	case isUnproved:
		return limit.Key{UID: uid, Unattested: true}
	case who.Container != nil:
		return limit.Key{Container: who.Container.ID}
	}
	return limit.Key{UID: uid, Unit: who.Unit}
}

// quotas are the limits that apply to the server's connections and requests. Use Server.quotas.
type quotas struct {
	made                             sync.Once
	tokens, modules, admin, loopback *limit.Conns
	requests                         limit.Rate // of one caller on the token sockets and on loopback
	waiting, watching                limit.Semaphore
	administering                    limit.Semaphore // requests on the admin socket
}

func (q *quotas) conns() [4]*limit.Conns {
	return [...]*limit.Conns{q.tokens, q.modules, q.admin, q.loopback}
}

// quotas returns the server's quotas, which are made at the first use.
func (s *Server) quotas() *quotas {
	q := &s.counted
	q.made.Do(func() {
		limits := s.Limits.orDefaults()
		q.requests = limit.Rate{PerSecond: limits.PerSecond, Burst: limits.Burst, MaxWait: rateTimeout}
		tokens, modules, admin, loopback := limits.capacities()
		for _, of := range [...]struct {
			conns    **limit.Conns
			capacity limit.Capacity
		}{{&q.tokens, tokens}, {&q.modules, modules}, {&q.admin, admin}, {&q.loopback, loopback}} {
			*of.conns = limit.NewConns(of.capacity, s.now, s.reportTurnedAway)
		}
	})
	return q
}

// connsOf returns the connections of a kind of listener.
func (s *Server) connsOf(kind socket, module string) *limit.Conns {
	q := s.quotas()
	switch {
	case kind == onAdmin:
		return q.admin
	case kind == onLoopback:
		return q.loopback
	case module != "":
		return q.modules
	}
	return q.tokens
}

// acquire gives a connection its place, or refuses it when there is no room even in the line.
func (s *Server) acquire(ctx context.Context, c *limit.Conn, conns *limit.Conns, kind socket) {
	var key limit.Key
	var itself bool
	if kind == onLoopback {
		key = peerIn(ctx).key()
	} else {
		who, isUnproved := seenIn(ctx)
		key, itself = keyOf(&who, ownerIn(ctx), isUnproved), !isUnproved && isOwn(who)
	}
	if kind == onAdmin {
		c.BoundUnread() // its answers may be long
	}
	conns.Acquire(c, key, itself)
}

// isOwn reports whether who is this very process, and not another one of its user.
func isOwn(who agent.Caller) bool {
	return int(who.PID) == os.Getpid() && int(who.UID) == os.Geteuid()
}

// isItself reports whether a connection is this process's own, which checks whether it answers: that is never one too
// many.
func isItself(conn net.Conn) bool {
	return isOwn(agent.Caller{PID: attest.ProcessOf(conn), UID: attest.UserOf(conn)})
}

// admission is which new connections are let in on a socket whose connections are conns. module is the module whose own
// socket that is, or empty.
func (s *Server) admission(conns *limit.Conns, module string) limit.Admission {
	keyOf := s.newKeyOf()
	if module != "" { // which has no other callers on its socket
		keyOf = func(net.Conn, bool) limit.Key { return limit.Key{Module: module, Parent: true} }
	}
	limits := s.Limits.orDefaults()
	return limit.Admission{
		KeyOf: keyOf, IsExempt: isItself, Refuse: s.refuseEarly(conns, keyOf),
		Rate: &limit.Rate{PerSecond: busyCallers * limits.PerSecond, Burst: busyCallers * limits.Burst},
	}
}

// newKeyOf returns a function that returns whom a connection counts for on its way in, for one goroutine. What a process
// was found to be holds for a moment: one that connects in a loop is not looked up each time.
func (s *Server) newKeyOf() func(conn net.Conn, closely bool) limit.Key {
	const moment, most = 100 * time.Millisecond, 256
	seen, since := make(map[int32]limit.Key), time.Time{}
	return func(conn net.Conn, closely bool) limit.Key {
		if !closely {
			return limit.Key{UID: attest.UserOf(conn), Parent: true}
		}
		pid := attest.ProcessOf(conn)
		if now := time.Now(); now.Sub(since) >= moment || len(seen) >= most {
			clear(seen)
			since = now
		}
		k, known := seen[pid]
		if !known {
			who, owner := s.Callers.Whence(conn)
			k = keyOf(&who, owner, false)
			seen[pid] = k
		}
		return k
	}
}

// refuseEarly returns what ends a connection of which no more is known than whom it comes from: with an answer, but for
// what one caller has beyond as many a second as requests. So a flood costs little more than before.
func (s *Server) refuseEarly(conns *limit.Conns, keyOf func(conn net.Conn, closely bool) limit.Key) func(net.Conn) {
	limits := s.Limits.orDefaults()
	answers := &limit.Rate{PerSecond: limits.PerSecond, Burst: limits.Burst}
	return func(conn net.Conn) {
		of := keyOf(conn, false)
		conns.RecordOverBudget(of)
		if _, ok := answers.Reserve(of, time.Now()); ok {
			conns.Refuse(conn, keyOf(conn, true))
			return
		}
		_ = conn.Close()
	}
}

// reportTurnedAway reports whose fault it is that connections are turned away.
func (s *Server) reportTurnedAway(one limit.TurnedAway) {
	s.log().Warn("connections are turned away",
		zap.String("listener", one.Listener), zap.Stringer("turned_away", one.Key), zap.Stringer("held_by", one.Holder),
		zap.Int("holds", one.Holds), zap.Int("of", one.Of), zap.Int64("count", one.Count))
	if s.ConnectionsChanged != nil {
		s.ConnectionsChanged()
		time.AfterFunc(limit.TroubleTime, s.ConnectionsChanged)
	}
}

// Connections returns how full the listeners are, and in sentences whose fault it is that connections were turned away
// lately.
func (s *Server) Connections() (all []api.ConnectionsStatus, trouble []string) {
	for _, conns := range s.quotas().conns() {
		all = append(all, connectionsStatus(conns.Usage()))
		if why := conns.Trouble(time.Now()); why != "" {
			trouble = append(trouble, why)
		}
	}
	return all, trouble
}

func connectionsStatus(u limit.Usage) api.ConnectionsStatus {
	status := api.ConnectionsStatus{Listener: u.Listener, Open: u.Open, Limit: u.Limit, TurnedAway: u.TurnedAway}
	if u.TurnedAway > 0 {
		status.TurnedAwayOn, status.TurnedAwayFor = &u.Last.On, u.Last.Key.String()
		status.HeldBy, status.Holds = u.Last.Holder.String(), u.Last.Holds
	}
	return status
}

// awaitPlace waits until the request's connection has its place, or returns why it gets none.
func awaitPlace(x *exchange) *fault {
	err := x.connection.Await(x.request.Context(), x.down)
	var full *limit.TurnedAway
	switch {
	case err == nil:
		return nil
	case errors.Is(err, limit.ErrStopped):
		return goingDown()
	case errors.As(err, &full):
		f := busy(full.Advice())
		f.retryAfter = time.Second
		return f
	}
	return busy(err.Error())
}

// rateTimeout is how long a request waits for its turn, and how long one that gets none is held before it is refused.
const rateTimeout = time.Second

// awaitTurn makes the request wait for its turn, or returns why it gets none.
func (s *Server) awaitTurn(x *exchange) *fault {
	wait, ok := s.quotas().requests.Reserve(x.connection.Key(), time.Now())
	if ok && wait == 0 {
		return nil
	}
	held := wait
	if !ok {
		held = rateTimeout
	}
	timer := time.NewTimer(held)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-x.down: // then no request is kept waiting
	case <-x.request.Context().Done():
	}
	if ok {
		return nil
	}
	f := busy(fmt.Sprintf("more than %d requests a second: "+
		"keep the token that you have until it is nearly over, as expires_in says", s.Limits.orDefaults().PerSecond))
	f.retryAfter = max(wait, time.Second)
	return f
}

// isRateLimited reports whether a request counts. The daemon's check of its own health does not.
func (x *exchange) isRateLimited(to *route) bool {
	isOwnCheck := to.path == api.PathHealth && isOwn(x.caller) && x.request.Method == http.MethodGet
	return to.socket != onAdmin && !isOwnCheck
}

// partOf is how many of all k may find taken and still get one: a quarter is kept for modules, of which there are only
// so many.
func partOf(all int, k limit.Key) int {
	if k.Module != "" {
		return all
	}
	return all - all/4
}

// administer counts a request on the admin socket, where some may take long: other people's must not keep root's from
// being heard, and all of them together must not take the memory.
func (s *Server) administer(x *exchange) *fault {
	limits, k := s.Limits.orDefaults(), x.connection.Key()
	most := limits.AdminRequests
	if !k.IsBareRoot() {
		most -= most / 4
	}
	if s.quotas().administering.TryAcquire(k, limit.Quota{
		PerKey: limits.AdminRequests / 2, PerParent: limits.AdminRequests / 2, Total: most,
	}) {
		return nil
	}
	f := busy("too many requests are under way on the admin socket: ask again when some of them are done")
	f.retryAfter = time.Second
	return f
}
