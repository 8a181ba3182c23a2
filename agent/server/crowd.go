package server

import (
	"net"
	"net/http"
	"os"
	"sync"

	"perceptd/agent"
)

// crowd counts the connections on the token sockets, so that no caller can use up the descriptors that
// the others, the back end and the daemon's check of itself need.
type crowd struct {
	mu   sync.Mutex // protects what follows
	of   map[net.Conn]seat
	each map[seat]int
}

// ownSeats is how many connections of the daemon to itself are let in, however many others there are. Its
// check makes one at a time; when that many wait, a restart is what it should lead to.
const ownSeats = 4

// admit counts conn for its caller, and reports false when it is one too many. Somebody who cannot be proved is
// let in, to be told so.
func (c *crowd) admit(conn net.Conn, who agent.Caller, isUnproved bool, limits Limits) bool {
	itself := !isUnproved && isOwn(who)
	s := seat{own: true}
	c.mu.Lock()
	defer c.mu.Unlock()
	if own := c.each[s]; !itself || own >= ownSeats {
		s = seatOf(&who, isUnproved)
		if len(c.of)-own >= limits.Connections || c.each[s] >= limits.PerCaller {
			return false
		}
	}
	if c.of == nil {
		c.of, c.each = make(map[net.Conn]seat), make(map[seat]int)
	}
	c.of[conn] = s
	c.each[s]++
	return true
}

// isOwn reports whether who is this very process, and not another one of its user.
func isOwn(who agent.Caller) bool {
	return int(who.PID) == os.Getpid() && int(who.UID) == os.Geteuid()
}

// note forgets a connection that has ended. It is an http.Server's ConnState.
func (c *crowd) note(conn net.Conn, state http.ConnState) {
	if state != http.StateClosed && state != http.StateHijacked {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	s, counted := c.of[conn]
	if !counted {
		return
	}
	delete(c.of, conn)
	if c.each[s]--; c.each[s] == 0 {
		delete(c.each, s)
	}
}
