package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"time"

	"go.uber.org/zap"

	"perceptd/agent/api"
	"perceptd/agent/server/limit"
)

// Limits bounds how long a connection may take over each thing, and how much callers may take at once. Zero fields mean
// the defaults.
type Limits struct {
	Header time.Duration // to send a request's header; 5 s
	Answer time.Duration // for a token, beside what the request asked to wait; 8 s, so that a busy device keeps 10 s
	Admin  time.Duration // until a request on the admin socket is answered; 8 s as well
	Idle   time.Duration // between two requests on one connection; 60 s
	Place  time.Duration // that a connection waits for a place when all are taken; 1 s
	Alive  time.Duration // between two signs of life on a stream of events; 15 s

	Waiting     int // requests of one caller at once that asked to wait, and of all that one user runs; 64
	AllWaiting  int // such requests at once, a quarter of them for modules alone; 192
	Watching    int // streams of events of one caller at once, half of what all that one user runs may have; 16
	AllWatching int // streams of events at once, a quarter of them for modules alone; 128

	Connections int // at once on the socket of all local services; 1,024
	PerCaller   int // of one user, one unit or one container there; a quarter of Connections
	Modules     int // at once on all modules' sockets, each of which has its part, 128 at most and 2 at least; 512

	AdminConnections int // at once on the admin socket, a quarter of them for root alone; 64
	AdminPerUser     int // of one user there; a quarter of AdminConnections
	AdminRequests    int // under way at once on the admin socket, half of them of one user; 16

	LoopbackConnections int // at once on the loopback listener; 128
	LoopbackPerUser     int // of one user there; half of LoopbackConnections

	PerSecond int // requests of one caller on a token socket, in the long run; 200. More wait, and then get 429
	Burst     int // requests of one caller at once; 400
}

// orDefaults fills in the zero fields.
func (l Limits) orDefaults() Limits {
	for _, bound := range []struct {
		field *time.Duration
		value time.Duration
	}{
		{&l.Header, 5 * time.Second},
		{&l.Answer, 8 * time.Second},
		{&l.Admin, 8 * time.Second},
		{&l.Idle, 60 * time.Second},
		{&l.Place, time.Second},
		{&l.Alive, 15 * time.Second},
	} {
		*bound.field = cmp.Or(*bound.field, bound.value)
	}
	for _, bound := range []struct {
		field *int
		value int
	}{
		{&l.Waiting, 64}, {&l.AllWaiting, 192}, {&l.Watching, 16}, {&l.AllWatching, 128},
		{&l.Connections, 1024}, {&l.Modules, 512}, {&l.AdminConnections, 64}, {&l.AdminRequests, 16},
		{&l.LoopbackConnections, 128}, {&l.PerSecond, 200}, {&l.Burst, 400},
	} {
		*bound.field = cmp.Or(*bound.field, bound.value)
	}
	l.PerCaller = cmp.Or(l.PerCaller, max(1, l.Connections/4))
	l.AdminPerUser = cmp.Or(l.AdminPerUser, max(1, l.AdminConnections/4))
	l.LoopbackPerUser = cmp.Or(l.LoopbackPerUser, max(1, l.LoopbackConnections/2))
	return l
}

// transferTime is how long a body may take to arrive, or an answer to leave, beside the time to answer.
const transferTime = 5 * time.Second

const (
	// perConnection is how many descriptors a connection takes: itself, and a hold on the process at its other end.
	perConnection = 2

	// busyCallers bounds how often connections may come on the socket of all local services: those of one user, and
	// once more those of each of its units, as often as this many busy callers that connect for each request.
	busyCallers = 5
)

// capacities returns how many connections each kind of listener has room for.
func (l Limits) capacities() (tokens, modules, admin, loopback limit.Capacity) {
	tokens = limit.Capacity{
		Name: "token socket", Total: l.Connections, PerParent: l.PerCaller, PerKey: l.PerCaller - l.PerCaller/8,
		ForRoot: l.Connections / 16, Line: max(1, l.Connections/16), LinePerParent: max(1, l.Connections/64),
		Refused: 3 * l.Connections / 8,
	}
	modules = limit.Capacity{
		Name: "modules' sockets", Total: l.Modules, PerModule: true,
		Line: max(1, l.Modules/8), LinePerParent: max(1, l.Modules/64), Refused: l.Modules / 8,
	}
	admin = limit.Capacity{
		Name: "admin socket", Total: l.AdminConnections, PerParent: l.AdminPerUser, PerKey: l.AdminPerUser,
		ForRoot: l.AdminConnections / 4, Line: max(1, l.AdminConnections/4),
		LinePerParent: max(1, l.AdminConnections/16), Refused: l.AdminConnections / 2,
	}
	loopback = limit.Capacity{
		Name: "loopback listener", Total: l.LoopbackConnections, PerParent: l.LoopbackPerUser,
		PerKey: l.LoopbackPerUser,
		Line:   l.LoopbackConnections, LinePerParent: max(1, l.LoopbackPerUser), Refused: 9 * l.LoopbackConnections / 4,
	}
	for _, c := range [...]*limit.Capacity{&tokens, &modules, &admin, &loopback} {
		c.LineTimeout = l.Place
	}
	return tokens, modules, admin, loopback
}

// mostArriving is how many connections may wait for their turn to be attested.
func (l Limits) mostArriving() int { return max(1, l.Connections/2) }

// most is how many connections there can be at once, those included that wait for a place or for their refusal.
func (l Limits) most() (sum int) {
	tokens, modules, admin, loopback := l.capacities()
	for _, c := range [...]limit.Capacity{tokens, modules, admin, loopback} {
		sum += c.Total + c.Line + limit.OwnPlaces
	}
	return sum
}

// mostRefused is how many connections at once were refused and are not closed yet.
func (l Limits) mostRefused() (sum int) {
	tokens, modules, admin, loopback := l.capacities()
	for _, c := range [...]limit.Capacity{tokens, modules, admin, loopback} {
		sum += c.Refused
	}
	return sum
}

// Descriptors returns how many descriptors all callers together can take.
func (l Limits) Descriptors() int {
	l = l.orDefaults()
	return perConnection * (l.most() + l.mostArriving() + l.mostRefused())
}

// Within returns l with fewer connections, where that many descriptors are too few for all of them.
func (l Limits) Within(descriptors int) Limits {
	l = l.orDefaults()
	const own = 4 * limit.OwnPlaces * perConnection // the same however few others there are
	most := l.Descriptors() - own
	descriptors = max(0, descriptors-own)
	if most <= descriptors {
		return l
	}
	for _, field := range [...]*int{
		&l.Connections, &l.PerCaller, &l.Modules, &l.AdminConnections, &l.AdminPerUser,
		&l.LoopbackConnections, &l.LoopbackPerUser,
	} {
		*field = max(1, *field*descriptors/most)
	}
	return l
}

const (
	// connectionMemory is what a connection takes of this process's memory, whatever its client does with it.
	connectionMemory = 40 << 10

	// stayMemory is what a request that waits, or a stream, takes beside that.
	stayMemory = 28 << 10

	// refusedMemory is what a connection takes that was refused and is not closed yet.
	refusedMemory = 9 << 10
)

// Memory returns how many bytes of this process's memory all callers together can have in use.
func (l Limits) Memory() int {
	l = l.orDefaults()
	return l.most()*connectionMemory + l.mostRefused()*refusedMemory + (l.AllWaiting+l.AllWatching)*stayMemory
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
	q := &s.usage
	q.made.Do(func() {
		limits := s.Limits.orDefaults()
		q.requests = limit.Rate{PerSecond: limits.PerSecond, Burst: limits.Burst, MaxWait: rateTimeout}
		tokens, modules, admin, loopback := limits.capacities()
		q.tokens = limit.NewConns(tokens, s.now, s.reportTurnedAway)
		q.modules = limit.NewConns(modules, s.now, s.reportTurnedAway)
		q.admin = limit.NewConns(admin, s.now, s.reportTurnedAway)
		q.loopback = limit.NewConns(loopback, s.now, s.reportTurnedAway)
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
	var isOwn bool
	if kind == onLoopback {
		key = peerIn(ctx).key()
	} else {
		who, isUnattested := presumedCaller(ctx)
		key, isOwn = keyOf(&who, sessionOwner(ctx), isUnattested), !isUnattested && isOwnProcess(who)
	}
	if kind == onAdmin {
		c.BoundUnread() // its answers may be long
	}
	conns.Acquire(c, key, isOwn)
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
		KeyOf: keyOf, IsExempt: isOwnConn, Refuse: s.refuseEarly(conns, keyOf),
		Rate: &limit.Rate{PerSecond: busyCallers * limits.PerSecond, Burst: busyCallers * limits.Burst},
	}
}

// refuseEarly returns what ends a connection when no more is known of it than whom it comes from. It answers each
// caller as many connections a second as the caller may make requests, and closes the others without an answer. So a
// flood costs little more than before.
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

// reportTurnedAway logs that connections are turned away, and which caller has taken the places.
func (s *Server) reportTurnedAway(one limit.TurnedAway) {
	s.log().Warn("connections are turned away",
		zap.String("listener", one.Listener), zap.Stringer("turned_away", one.Key), zap.Stringer("held_by", one.Holder),
		zap.Int("holds", one.Holds), zap.Int("of", one.Of), zap.Int64("count", one.Count))
	if s.ConnectionsChanged != nil {
		s.ConnectionsChanged()
		time.AfterFunc(limit.TroubleTime, s.ConnectionsChanged)
	}
}

// Connections returns how full the listeners are, and a sentence for each that turned connections away lately, with the
// caller that had taken the places.
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
		status.TurnedAwayOn, status.TurnedAwayFor = api.Time(u.Last.On), u.Last.Key.String()
		status.HeldBy, status.Holds = u.Last.Holder.String(), u.Last.Holds
	}
	return status
}

// awaitPlace waits until the request's connection has its place, or returns why it gets none.
func awaitPlace(req *request) *apiError {
	err := req.conn.Await(req.http.Context(), req.stopping)
	var full *limit.TurnedAway
	switch {
	case err == nil:
		return nil
	case errors.Is(err, limit.ErrStopped):
		return stopping()
	case errors.As(err, &full):
		e := busy(full.Advice())
		e.retryAfter = time.Second
		return e
	}
	return busy(err.Error())
}

// rateTimeout is how long a request waits for its turn, and how long one that gets none is held before it is refused.
const rateTimeout = time.Second

// awaitTurn makes the request wait for its turn, or returns why it gets none.
func (s *Server) awaitTurn(req *request) *apiError {
	wait, ok := s.quotas().requests.Reserve(req.conn.Key(), time.Now())
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
	case <-req.stopping: // then no request is kept waiting
	case <-req.http.Context().Done():
	}
	if ok {
		return nil
	}
	e := busy(fmt.Sprintf("more than %d requests a second: "+
		"keep the token that you have until it is nearly over, as expires_in says", s.Limits.orDefaults().PerSecond))
	e.retryAfter = max(wait, time.Second)
	return e
}

// isRateLimited reports whether a request counts. The daemon's check of its own health does not.
func (req *request) isRateLimited(to *route) bool {
	isOwnCheck := to.path == api.PathHealth && isOwnProcess(req.caller) && req.http.Method == http.MethodGet
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

// administer counts a request on the admin socket, where some may take long. Other users' requests must not keep root's
// from being answered, and all of them together must not take the memory.
func (s *Server) administer(req *request) *apiError {
	limits, k := s.Limits.orDefaults(), req.conn.Key()
	most := limits.AdminRequests
	if !k.IsBareRoot() {
		most -= most / 4
	}
	if s.quotas().administering.TryAcquire(k, limit.Quota{
		PerKey: limits.AdminRequests / 2, PerParent: limits.AdminRequests / 2, Total: most,
	}) {
		return nil
	}
	e := busy("too many requests are under way on the admin socket: ask again when some of them are done")
	e.retryAfter = time.Second
	return e
}
