package server

import (
	"net"
	"net/http"
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

// seat is whom a connection counts for: a user on the token socket, a user in a module on its own.
type seat struct {
	module string
	uid    uint32
}

// admit counts conn for its caller, and reports false when it is one too many.
func (c *crowd) admit(conn net.Conn, who agent.Caller, limits Limits) bool {
	s := seat{module: who.Module, uid: who.UID}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.of) >= limits.Connections || c.each[s] >= limits.PerCaller {
		return false
	}
	if c.of == nil {
		c.of, c.each = make(map[net.Conn]seat), make(map[seat]int)
	}
	c.of[conn] = s
	c.each[s]++
	return true
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
