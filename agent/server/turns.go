package server

import (
	"net"
	"slices"
	"sync"
	"time"
)

// turns is a listener at which users take turns. Accepting a connection is cheap; finding out who calls is not, and is
// done one by one. So a user who connects without pause waits for himself, and what comes beyond his budget is closed
// at once.
type turns struct {
	net.Listener
	userOf func(net.Conn) uint32
	most   int // may wait
	budget rate
	pace   pace

	mu      sync.Mutex // protects what follows
	changed sync.Cond
	users   []uint32 // who have somebody waiting, the next one first
	waiting map[uint32][]net.Conn
	count   int
	fault   error // why nobody comes at the moment
	told    bool  // fault was returned
	closed  bool
}

// busyCallers is as how many busy callers, with a connection for each request, all callers of one user may connect.
const busyCallers = 5

// arrivals is the budget of one user's new connections on the socket of all local services.
func (l Limits) arrivals() rate {
	return rate{perSecond: busyCallers * l.PerSecond, burst: busyCallers * l.Burst}
}

// takeTurns starts accepting on l, until it is closed. Close what it returns instead of l.
func takeTurns(l net.Listener, userOf func(net.Conn) uint32, limits Limits) *turns {
	t := &turns{Listener: l, userOf: userOf, most: limits.Connections / 2, budget: limits.arrivals(), waiting: make(map[uint32][]net.Conn)}
	t.changed.L = &t.mu
	go t.greet()
	return t
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
			_ = conn.Close() // one too many, who is told nothing else either
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
	return t.fault == nil
}

// queue has conn wait for its user's turn, and reports false when it gets none.
func (t *turns) queue(conn net.Conn) bool {
	user := t.userOf(conn)
	if _, ok := t.pace.turn(seat{uid: user}, time.Now(), t.budget); !ok {
		return false
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.count >= t.most {
		return false
	}
	if len(t.waiting[user]) == 0 {
		t.users = append(t.users, user)
	}
	t.waiting[user] = append(t.waiting[user], conn)
	t.count++
	t.changed.Broadcast()
	return true
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

// next takes out the first connection of the user whose turn it is. The lock is held.
func (t *turns) next() net.Conn {
	user := t.users[0]
	t.users = slices.Delete(t.users, 0, 1)
	conn, rest := t.waiting[user][0], t.waiting[user][1:]
	t.count--
	if len(rest) == 0 {
		delete(t.waiting, user)
		return conn
	}
	t.waiting[user] = rest
	t.users = append(t.users, user)
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
