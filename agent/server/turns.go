package server

import (
	"net"
	"slices"
	"sync"
	"time"

	"perceptd/agent"
	"perceptd/agent/attest"
)

// turns is a listener at which callers take turns. Accepting a connection is cheap; finding out who calls is not, and is
// done one by one. So a caller that connects without pause waits for itself, and what comes beyond its budget is refused at
// once.
//
// The kernel names the user for nothing. Only of users whose budget is used up, or of whom some wait already, it is looked up
// which unit or container connects: each of those has a budget and a queue of its own, so that one that connects in a loop,
// or many times at once, takes nothing from the others of its user, which may be root.
type turns struct {
	net.Listener
	whence func(conn net.Conn, closely bool) quotaKey
	refuse func(conn net.Conn) // and close it
	most   int                 // may wait
	per    int                 // of one caller
	budget rate
	pace   pace

	mu      sync.Mutex // protects what follows
	changed sync.Cond
	callers []quotaKey // who have somebody waiting, the next one first
	waiting map[quotaKey][]net.Conn
	count   int
	fault   error // why nobody comes at the moment
	told    bool  // fault was returned
	closed  bool
}

// busyCallers is as how many busy callers, with a connection for each request, all callers of one user may connect.
const busyCallers = 5

// arrivals is the budget of one user's new connections on the socket of all local services, and once more of each of its
// units'.
func (l Limits) arrivals() rate {
	return rate{perSecond: busyCallers * l.PerSecond, burst: busyCallers * l.Burst}
}

// mostArriving is how many connections may wait until it is found out who calls.
func (l Limits) mostArriving() int { return max(1, l.Connections/2) }

// fewWaiting is how many of a user wait as one, before it is looked up what each of them is.
const fewWaiting = 4

// takeTurns starts accepting on l, until that or what it returns is closed. Call the latter's Accept until it fails for good, since
// who was accepted is lost otherwise, and then close it. whence returns whom a connection counts for: all that its user runs, or where
// closely is set what of it. refuse ends one that gets no turn, and does not wait.
func takeTurns(l net.Listener, whence func(conn net.Conn, closely bool) quotaKey, refuse func(net.Conn), limits Limits) *turns {
	t := &turns{Listener: l, whence: whence, refuse: refuse, most: limits.mostArriving(), budget: limits.arrivals(), waiting: make(map[quotaKey][]net.Conn)}
	t.per = max(1, t.most/2)
	t.changed.L = &t.mu
	go t.greet()
	return t
}

// whence returns a function that tells whom a connection counts for on its way in, for one goroutine. What a process was
// found to be holds for a moment: one that connects in a loop is not looked up each time.
func (s *Server) whence() func(conn net.Conn, closely bool) quotaKey {
	const moment, most = 100 * time.Millisecond, 256
	seen, since := make(map[int32]quotaKey), time.Time{}
	return func(conn net.Conn, closely bool) quotaKey {
		if !closely {
			return quotaKey{uid: attest.UserOf(conn), whole: true}
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

// refuseEarly returns what ends a connection of which no more is known than whom it comes from: with an answer, but for what one
// caller has beyond as many a second as requests. So a flood costs little more than before.
func (s *Server) refuseEarly(cr *crowd, from func(conn net.Conn, closely bool) quotaKey) func(net.Conn) {
	refused, told, budget := &cr.refused, new(pace), s.Limits.orDefaults().requests()
	budget.patience = 0
	return func(conn net.Conn) {
		of := from(conn, false)
		cr.missed(of)
		if _, ok := told.turn(of, time.Now(), budget); ok {
			refused.Refuse(conn, from(conn, true))
			return
		}
		_ = conn.Close()
	}
}

// isItself reports whether a connection is this process's own, which looks whether it answers: that is never one too many.
func isItself(conn net.Conn) bool {
	return isOwn(agent.Caller{PID: attest.ProcessOf(conn), UID: attest.UserOf(conn)})
}

// budgeted is a listener with a budget of new connections for each caller, where callers need not take turns.
type budgeted struct {
	net.Listener
	from   func(conn net.Conn, closely bool) quotaKey // as of takeTurns
	refuse func(net.Conn)                             // and close it
	budget rate
	pace   pace
}

// Accept waits for the next connection within its caller's budget.
func (l *budgeted) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		now := time.Now()
		for _, closely := range [...]bool{false, true} {
			if _, ok := l.pace.turn(l.from(conn, closely), now, l.budget); ok || isItself(conn) {
				return conn, nil
			}
		}
		l.refuse(conn)
	}
}

// greet accepts whoever comes, as fast as it can: the kernel's queue is the same for all, and turns away those who do not
// wait when it is full.
func (t *turns) greet() {
	for {
		conn, err := t.Listener.Accept()
		if err != nil && !t.fail(err) {
			return
		}
		if err == nil && !t.queue(conn) {
			t.refuse(conn)
		}
	}
}

// fail hands err to whoever accepts, and waits until they want to go on after it. It reports false when they do not.
func (t *turns) fail(err error) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.fault, t.told = err, false
	t.changed.Broadcast()
	for t.fault != nil && !t.closed {
		t.changed.Wait()
	}
	if t.fault == nil {
		return true
	}
	t.fault = net.ErrClosed // whatever it was does not pass any more
	return false
}

// queue has conn wait for its caller's turn, and reports false when it gets none.
func (t *turns) queue(conn net.Conn) bool {
	from, now, itself := t.whence(conn, false), time.Now(), isItself(conn)
	switch {
	case itself:
	case !t.isWelcome(from, now):
		if from = t.whence(conn, true); !t.isWelcome(from, now) {
			return false
		}
	case t.isBusy(from):
		from = t.whence(conn, true)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if !itself && (len(t.waiting[from]) >= t.per || t.count >= t.most && !t.makeRoom(from)) {
		return false
	}
	if len(t.waiting[from]) == 0 {
		t.callers = append(t.callers, from)
	}
	t.waiting[from] = append(t.waiting[from], conn)
	t.count++
	t.changed.Broadcast()
	return true
}

// isBusy reports whether so many wait, of a user or of all, that it matters who exactly they are: one user can be many.
func (t *turns) isBusy(from quotaKey) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.waiting[from]) >= fewWaiting || t.count >= t.most/2
}

// makeRoom refuses the connection that came last of the caller with the most waiting, and reports false when no caller has
// more than from would have then. The lock is held.
func (t *turns) makeRoom(from quotaKey) bool {
	most, n := from, len(t.waiting[from])+1
	for key, all := range t.waiting {
		if len(all) > n {
			most, n = key, len(all)
		}
	}
	if most == from {
		return false
	}
	last := len(t.waiting[most]) - 1
	t.refuse(t.waiting[most][last])
	t.waiting[most] = t.waiting[most][:last]
	t.count--
	return true
}

// isWelcome takes a new connection out of a budget, and reports false when nothing is left of it.
func (t *turns) isWelcome(from quotaKey, now time.Time) bool {
	_, ok := t.pace.turn(from, now, t.budget)
	return ok
}

// Accept returns the connection whose turn it is, or waits for one. After an error whose cause can pass, call it again.
func (t *turns) Accept() (net.Conn, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.told && !t.closed {
		t.fault, t.told = nil, false
		t.changed.Broadcast()
	}
	for t.count == 0 && t.fault == nil {
		t.changed.Wait()
	}
	if t.count == 0 {
		t.told = true
		return nil, t.fault
	}
	return t.next(), nil
}

// next takes out the first connection of the caller whose turn it is. The lock is held.
func (t *turns) next() net.Conn {
	from := t.callers[0]
	t.callers = slices.Delete(t.callers, 0, 1)
	conn, rest := t.waiting[from][0], t.waiting[from][1:]
	t.count--
	if len(rest) == 0 {
		delete(t.waiting, from)
		return conn
	}
	t.waiting[from] = rest
	t.callers = append(t.callers, from)
	return conn
}

// Close has nobody come any more. Those who wait keep their turns.
func (t *turns) Close() error {
	err := t.Listener.Close()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closed = true
	t.changed.Broadcast()
	return err
}
